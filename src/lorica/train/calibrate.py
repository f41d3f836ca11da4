"""Initialisations that look at data first, on batches of the training set."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorica import calibration
from lorica.combine.initial import check_variant
from lorica.config import LoraConfig
from lorica.init import find
from lorica.train import evaluate, layouts
from lorica.train.collate import Batch, Batches, Collator
from lorica.train.data import IGNORE, Example
from lorica.train.pipeline import Pipelines
from lorica.train.ranks import Ranks

#: Where the adapter is kept as it was before the first step, if loading it again would need the data.
START = "start"


def from_data(init: bool | str) -> bool:
    """Whether an initialisation looks at data."""
    found = find(init)
    return found is not None and bool(found.needs)


def keeps_start(init: bool | str) -> bool:
    """Whether an initialisation takes something out of the base weights that only the data tell."""
    found = find(init)
    return found is not None and bool(found.needs) and found.subtracts


@dataclass
class Data:
    """What there is to look at.

    Attributes:
        packs: the rows of the training set.
        collate: makes batches of them.
        batch_size: rows of a batch, over all ranks.
        count: how many batches.
        seed: of their order, which is that of the training.
        pad_id: a token to fill rows with.
        ranks: who shares them.
    """

    packs: Sequence[Sequence[Example]]
    collate: Collator
    batch_size: int
    count: int
    seed: int
    pad_id: int
    ranks: Ranks = field(default_factory=Ranks)

    def before(self, base: nn.Module, config: LoraConfig) -> None:
        """Do what is done before the adapter is added."""
        if keeps_start(config.init_lora_weights):
            check_variant(config)
        kind = found.needs if (found := find(config.init_lora_weights)) is not None else ""
        if kind == "covariance":
            # Row by row: padding would count as much as words.
            rows, share = self.count * self.batch_size, self.ranks.share[1]
            batches = list(self._batches(share, max(1, rows // share)))
            calibration.preprocess_corda(base, config, lambda: [_evaluate(base, batch, self) for batch in batches])
        elif kind == "gradient":
            calibration.preprocess_loraga(base, config, lambda: self._learn(base))

    def after(self, model: nn.Module, config: LoraConfig, *, progress: bool = False) -> None:
        """Do what is done once the adapter is there."""
        found = find(config.init_lora_weights)
        if found is not None and found.needs == "inputs":
            calibration.initialize_lora_eva_weights(
                model,
                list(self._batches(self.batch_size, self.count)),
                forward_fn=lambda model, batch: _evaluate(model, batch, self),
                prepare_model_inputs_fn=_learned,
                show_progress_bar=progress,
            )

    def _batches(self, batch_size: int, count: int) -> Iterator[Batch]:
        stream = Batches(self.packs, self.collate, batch_size, self.seed, self.ranks.share)
        return islice(stream, max(1, min(count, len(self.packs) // batch_size)))

    def _learn(self, base: nn.Module) -> None:
        stages = layouts.stages(base)
        pipelines = Pipelines(base, stages, self.pad_id) if stages is not None else None
        for batch in self._batches(self.batch_size, self.count):
            scale = self.ranks.share[1] / max(1, int(batch["learned"]))
            if pipelines is not None:
                pipelines.train([batch], scale)
            else:
                torch.autograd.backward(evaluate.token_losses(base, batch)[0] * scale)


def _learned(batch: Batch, config: Any) -> Tensor:
    """Return the positions that are learned, or all where labels are not to be looked at."""
    counts = batch["labels"] != IGNORE
    return (counts if config.eva_config.use_label_mask else torch.ones_like(counts)).nonzero()


@torch.no_grad()
def _evaluate(model: nn.Module, batch: Batch, data: Data) -> None:
    stages = layouts.stages(model)
    if stages is None:
        evaluate.token_losses(model, batch)
    else:
        Pipelines(model, stages, data.pad_id).evaluate(batch)


def start_of(output: Path) -> Path:
    """Return where a run keeps the adapter as it started."""
    return output / START


__all__ = ["START", "Data", "from_data", "keeps_start", "start_of"]
