"""Batches through a pipeline: the accumulated batches of an optimiser step are its microbatches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lorica import parallel
from lorica.train.collate import Batch, takes_positions
from lorica.train.data import IGNORE
from lorica.train.evaluate import summed_cross_entropy
from lorica.train.layouts import stages

# A pipeline is made anew for every shape, so widths are rounded up.
_ROUND = 16


class Pipelines:
    """Runs batches through the stages of a model; all ranks call alike, the last stage gets the losses.

    Args:
        model: this rank's stage, adapted.
        axis: the axis of the stages.
        pad_id: a token to fill rows with.
    """

    def __init__(self, model: nn.Module, axis: parallel.Axis, pad_id: int) -> None:
        self._model, self._axis, self._pad = model, axis, pad_id
        self._positions = takes_positions(model)
        self._made: dict[tuple[int, ...], parallel.Pipeline] = {}
        self._scale = 1.0

    def train(self, batches: Sequence[Batch], scale: float) -> Tensor:
        """Add the gradients of the summed cross-entropy times ``scale``; return that sum, unscaled (else 0)."""
        # Gradients come out divided by the number of microbatches.
        self._scale = scale * len(batches)
        return self._run(batches, training=True) / self._scale

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> Tensor:
        """Return the summed cross-entropy of a batch (on other stages than the last: 0)."""
        self._scale = 1.0
        return self._run([batch], training=False)

    def _run(self, batches: Sequence[Batch], *, training: bool) -> Tensor:
        device = next(self._model.parameters()).device
        ids, labels, positions = (whole.to(device) for whole in self._joined(batches))
        pipeline = self._pipeline(len(batches), ids.shape, training)
        losses: list[Tensor] = []
        given: dict[str, Any] = {"position_ids": positions} if self._positions else {}
        if self._axis.rank == self._axis.size - 1:
            given |= {"target": labels, "losses": losses}
        run = pipeline.schedule.step if training else pipeline.schedule.eval
        run(*([ids] if self._axis.rank == 0 else []), return_outputs=False, **given)
        return torch.stack(losses).sum().detach() if losses else torch.zeros((), device=device)

    def _pipeline(self, count: int, shape: torch.Size, training: bool) -> parallel.Pipeline:
        key = count, *shape, int(training)
        if key not in self._made:
            kind: Literal["1f1b", "gpipe"] = "1f1b" if count >= self._axis.size else "gpipe"
            self._made[key] = parallel.stage(
                self._model, self._axis, microbatches=count, schedule=kind, loss=self._loss
            )
        return self._made[key]

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return summed_cross_entropy(logits, labels) * self._scale

    def _joined(self, batches: Sequence[Batch]) -> tuple[Tensor, Tensor, Tensor]:
        """One batch of all, each filled up to the rows and the width of the largest."""
        rows = max(batch["input_ids"].shape[0] for batch in batches)
        width = -(-max(batch["input_ids"].shape[1] for batch in batches) // _ROUND) * _ROUND
        filled = {"input_ids": self._pad, "labels": IGNORE, "position_ids": 0}
        ids, labels, positions = (
            torch.cat([_filled(batch[key], rows, width, value) for batch in batches]) for key, value in filled.items()
        )
        return ids, labels, positions


def measure_of(model: nn.Module, pad_id: int) -> Callable[[Batch], Tensor] | None:
    """What gives a batch's summed cross-entropy where a model is split into stages; None where it is not."""
    axis = stages(model)
    return Pipelines(model, axis, pad_id).evaluate if axis is not None else None


def _filled(tensor: Tensor, rows: int, width: int, value: int) -> Tensor:
    more = (0, width - tensor.shape[1], 0, rows - tensor.shape[0])
    return nn.functional.pad(tensor, more, value=value)
