"""The measures of a user's own model: what an adapter costs on it, beside peft and the frozen base.

All sides hold the same weights, so that the model is in memory once.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorica.bench.contest import (
    AGAINST_FROZEN,
    AGAINST_PEFT,
    LORICA,
    PEFT,
    Case,
    Contest,
    Measure,
    quiet,
)
from lorica.bench.counting import QUANTITIES
from lorica.bench.sides import adapt, adapted, config, forward, twin, with_frozen
from lorica.bench.timing import Task
from lorica.errors import RecipeError

#: How far the two libraries' logits may lie apart, relatively: in 16 bits peft computes the low-rank part in fp32.
TOLERANCE, TOLERANCE_16 = 1e-3, 0.1
_PASS = tuple(quantity for quantity in QUANTITIES if quantity != "saved bytes")
_WORK = ("kernels", "bytes moved")


@dataclass
class Own:
    """A causal language model, and the adapter and the batch that it is measured with.

    Attributes:
        base: the model, on its device.
        fields: of both libraries' ``LoraConfig``: ``r``, ``target_modules``, ``lora_dropout`` …
        batch: rows of a step, and of a decoded token.
        tokens: of each row of a step.
        peft: whether to compare with it.
    """

    base: nn.Module
    fields: Mapping[str, Any]
    batch: int = 1
    tokens: int = 128
    peft: bool = True

    def __post_init__(self) -> None:
        self.base.requires_grad_(False)

    @property
    def libraries(self) -> tuple[str, ...]:
        """The sides that have adapters."""
        return (PEFT, LORICA) if self.peft else (LORICA,)

    @cached_property
    def adapted(self) -> dict[str, nn.Module]:
        """The model by side, adapted with equal factors."""
        with quiet():
            adapt(LORICA, twin(self.base), **self.fields).unload()  # type: ignore[operator]  # its errors come first
        try:
            return adapted(self.base, libraries=self.libraries, copied=twin, **self.fields)
        except Exception as error:
            if not self.peft:
                raise
            raise RecipeError(f"peft cannot adapt this model ({error}); measure without it: --no-peft") from error

    @cached_property
    def models(self) -> dict[str, nn.Module]:
        """The model by side, the frozen base among them."""
        return with_frozen(self.base, self.adapted)

    @cached_property
    def ids(self) -> Tensor:
        """Random tokens, ``[batch, tokens]``."""
        embedding = self.base.get_input_embeddings()  # type: ignore[operator]
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(0, embedding.num_embeddings, (self.batch, self.tokens), generator=generator)
        return ids.to(embedding.weight.device)

    @property
    def tolerance(self) -> float:
        """How far the sides' outputs may lie apart."""
        return TOLERANCE if self.base.dtype == torch.float32 else TOLERANCE_16


def measures_of(own: Own, names: Sequence[str]) -> dict[str, Measure]:
    """Return the named measures (of :data:`KINDS`), in the order in which they are taken."""
    return {name: KINDS[name](own) for name in KINDS if name in names}


def _measure(own: Own, name: str, title: str, note: str, cases: Mapping[str, Callable[[bool], Contest]]) -> Measure:
    return Measure(
        name,
        title,
        note,
        tuple(Case(case, build) for case, build in cases.items()),
        against=AGAINST_PEFT if own.peft else AGAINST_FROZEN,
    )


# ---- passes through the model ---------------------------------------------------------------------------------------


def step(own: Own) -> Measure:
    """A training step."""
    return _measure(
        own,
        "step",
        "Training step: forward, loss and backward",
        f"{own.batch} × {own.tokens} random tokens, given as embeddings that require a gradient on every side, so that "
        "backward runs through the whole base model too; adapters of embeddings do not take part. No optimiser.",
        {f"{own.batch} × {own.tokens} tokens": partial(_build_step, own)},
    )


def _build_step(own: Own, quick: bool) -> Contest:
    embedding = own.base.get_input_embeddings()  # type: ignore[operator]
    with torch.no_grad():
        x = embedding(own.ids)
    models = {side: model.train() for side, model in own.models.items()}

    def task(model: nn.Module) -> Task:
        def run() -> Tensor:
            out = model(inputs_embeds=x.detach().requires_grad_(), labels=own.ids, use_cache=False)
            out.loss.backward()
            logits: Tensor = out.logits.detach()
            return logits

        return Task(run, reset=lambda: model.zero_grad(set_to_none=True))

    return Contest(
        tasks={side: task(model) for side, model in models.items()},
        rounds=6 if quick else 40,
        counts=QUANTITIES,
        models=models,
        tolerance=None if own.fields.get("lora_dropout") else own.tolerance,
    )


def decode(own: Own) -> Measure:
    """A token of each row."""
    return _measure(
        own,
        "decode",
        "Decoding: forward of one token of each row, without autograd",
        f"{own.batch} rows, evaluation mode, not merged; no cache of earlier tokens.",
        {f"{own.batch} × 1 token": partial(_build_decode, own)},
    )


def _build_decode(own: Own, quick: bool) -> Contest:
    def call(model: nn.Module, ids: Tensor) -> Tensor:
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
        return logits

    return Contest(
        tasks={side: forward(model, call, own.ids[:, :1]) for side, model in own.models.items()},
        rounds=20 if quick else 200,
        counts=_PASS,
        models=own.models,
        tolerance=own.tolerance,
    )


# ---- the adapter's life ---------------------------------------------------------------------------------------------


def injection(own: Own) -> Measure:
    """Adapters in, switched, off and on."""
    return _measure(
        own,
        "injection",
        "Putting adapters in and switching them",
        "`set_adapter`: to the second of two adapters and back. `disable_adapter`: into the context and out of it.",
        {
            "get_peft_model": partial(_build_inject, own),
            "set_adapter, there and back": partial(_build_switch, own, _there_and_back),
            "disable_adapter, off and on": partial(_build_switch, own, _off_and_on),
        },
    )


def _build_inject(own: Own, quick: bool) -> Contest:
    def task(side: str) -> Task:
        held: list[Any] = [twin(own.base)]

        def reset() -> None:
            held[0] = held[0].unload() if hasattr(held[0], "peft_config") else held[0]

        def run() -> None:
            held[0] = adapt(side, held[0], **own.fields)

        return Task(run, reset)

    return Contest({side: task(side) for side in own.libraries}, rounds=6 if quick else 20, counts=_WORK)


def _there_and_back(model: Any) -> None:
    model.set_adapter("second")
    model.set_adapter("default")


def _off_and_on(model: Any) -> None:
    with model.disable_adapter():
        pass


def _build_switch(own: Own, operation: Callable[[Any], None], quick: bool) -> Contest:
    tasks = {}
    for side in own.libraries:
        model: Any = adapt(side, twin(own.base), **own.fields)
        model.add_adapter("second", config(side, **own.fields))
        tasks[side] = Task(partial(operation, model))
    return Contest(tasks, rounds=6 if quick else 20)


def files(own: Own) -> Measure:
    """Saving and loading."""
    return _measure(
        own,
        "files",
        "Saving and loading the adapter",
        "In the system's temporary directory. lorica checks every name, shape and value before it writes into the "
        "model, and flushes to the disk, so that a crash leaves no half of a file.",
        {"save_pretrained": partial(_build_save, own), "load_adapter": partial(_build_load, own)},
    )


def _build_save(own: Own, quick: bool) -> Contest:
    folder = tempfile.TemporaryDirectory(prefix="lorica-bench-")

    def task(side: str, model: Any) -> Task:
        # A reset of nothing: saving is never looped, so that the disk is not flooded.
        return Task(partial(model.save_pretrained, Path(folder.name, side)), reset=lambda: None)

    tasks = {side: task(side, model) for side, model in own.adapted.items()}
    return Contest(tasks, rounds=6 if quick else 20, close=folder.cleanup)


def _build_load(own: Own, quick: bool) -> Contest:
    folder = tempfile.TemporaryDirectory(prefix="lorica-bench-")
    own.adapted[LORICA].save_pretrained(folder.name)  # type: ignore[operator]

    def task(model: Any) -> Task:
        def reset() -> None:
            if "extra" in model.peft_config:
                model.delete_adapter("extra")

        return Task(partial(model.load_adapter, folder.name, "extra"), reset)

    def close() -> None:
        for model in own.adapted.values():
            model.delete_adapter("extra")  # type: ignore[operator]
        folder.cleanup()

    tasks = {side: task(model) for side, model in own.adapted.items()}
    return Contest(tasks, rounds=6 if quick else 20, counts=(*_WORK, "peak bytes"), close=close)


def merging(own: Own) -> Measure:
    """Into the weights and out of them."""
    return _measure(
        own,
        "merging",
        "Merging and unmerging all layers",
        "Taken last: all sides merge into the same weights, which rounding has changed afterwards.",
        {"merge_adapter, unmerge_adapter": partial(_build_merge, own)},
    )


def _build_merge(own: Own, quick: bool) -> Contest:
    def task(model: Any) -> Task:
        def run() -> None:
            model.merge_adapter()
            model.unmerge_adapter()

        return Task(run)

    tasks = {side: task(model) for side, model in own.adapted.items()}
    return Contest(tasks, rounds=6 if quick else 20, counts=_PASS)


#: What ``lorica bench --only`` takes, in the order in which it is taken.
KINDS: dict[str, Callable[[Own], Measure]] = {
    "step": step,
    "decode": decode,
    "injection": injection,
    "files": files,
    "merging": merging,
}

__all__ = ["KINDS", "Own", "measures_of"]
