"""One forward and backward of a rank, run on tensors without values: what it keeps in memory and what it sends.

The code that runs is the code that trains: the cut model, its adapter, torch's autograd. Layers that are equal are run
once or twice, and what the second one added is taken for each of the others.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor

from lorica.config import LoraConfig
from lorica.engines.native import next_token_loss
from lorica.engines.native import stage as pipeline_stage
from lorica.engines.native.blocks import decoder_of
from lorica.errors import LayoutError
from lorica.parallel.plan.division import Division
from lorica.parallel.plan.held import adapted, stage_layers
from lorica.parallel.plan.outline import Outline
from lorica.parallel.plan.traffic import Traffic
from lorica.targets.parameters import experts_per_token

_LOGGER = logging.getLogger("torch._subclasses.fake_tensor")


@dataclass(frozen=True)
class Work:
    """What a step has to do.

    Attributes:
        batch: rows of a forward pass, of each rank that has rows of its own.
        sequence: tokens of a row.
        passes: forward passes per optimiser step; of a pipeline, its microbatches.
        checkpointing: whether the layers' activations are computed again in backward.
    """

    batch: int = 1
    sequence: int = 4096
    passes: int = 1
    checkpointing: bool = False

    @property
    def tokens(self) -> int:
        """Tokens of one forward pass of a rank."""
        return self.batch * self.sequence


@dataclass(frozen=True)
class Step:
    """One forward and backward of one rank.

    Attributes:
        saved: bytes that autograd keeps from the forward for the backward.
        working: bytes that were alive besides, at the highest point.
        layer: bytes of ``saved`` that the largest decoder layer has.
        layers: number of decoder layers.
        between: bytes that go from one of them to the next.
        sent: (axis, collective) → bytes.
        calls: (axis, collective) → how often.
    """

    saved: int = 0
    working: int = 0
    layer: int = 0
    layers: int = 0
    between: int = 0
    sent: Counter[tuple[str, str]] = field(default_factory=Counter)
    calls: Counter[tuple[str, str]] = field(default_factory=Counter)

    def activations(self, *, checkpointing: bool) -> int:
        """Return the bytes that are kept between a forward and its backward."""
        if not checkpointing:
            return self.saved
        return self.saved - self.layers * (self.layer - self.between) + self.layer


class Steps:
    """Runs steps, each different one once.

    Args:
        outline: the model.
        config: the adapter's configuration.
        work: what a step has to do.
    """

    def __init__(self, outline: Outline, config: LoraConfig, work: Work) -> None:
        self._outline, self._config, self._work = outline, config, work
        self._known: dict[Any, Step] = {}

    def step(self, division: Division, stage: int, *, adapter: bool = True, flowing: bool = False) -> Step:
        """Return the step of the first rank of a stage.

        Args:
            division: over which ranks.
            stage: which pipeline stage.
            adapter: whether it takes part.
            flowing: let gradients flow to the very first layer.

        Raises:
            LayoutError: a model that is divided so does not run.
        """
        layers = stage_layers(len(self._outline.kinds), division, stage)
        counts = self._outline.counts(layers)
        run = _Run(self, division, stage, adapter, flowing)
        total = first = self._run(run, tuple(counts))
        largest = 0
        for index, number in counts.items():
            kind = self._outline.kinds[index]
            twin = next((i for i in layers if i != index and self._outline.kinds[i] == kind), None)
            if twin is None:
                continue
            more = self._run(run, tuple(sorted({*counts, twin})))
            total = _add(total, more, first, number - 1)
            largest = max(largest, more.saved - first.saved)
        return dataclasses.replace(total, layer=largest, layers=len(layers))

    def _run(self, run: _Run, layers: tuple[int, ...]) -> Step:
        division, stage = run.division, run.stage
        ends = (stage == 0, stage == division.pp - 1)
        cut = (division.tp, division.ep, division.sp, division.engine)
        kinds = tuple(self._outline.kinds[index] for index in layers)
        key = (cut, ends, kinds, run.adapter, run.flowing)
        if key not in self._known:
            self._known[key] = run.run(layers)
        return self._known[key]

    @property
    def parts(self) -> tuple[Outline, LoraConfig, Work]:
        """The model, the configuration and the work."""
        return self._outline, self._config, self._work


def _add(total: Step, more: Step, less: Step, times: int) -> Step:
    def sums(name: str) -> Counter[tuple[str, str]]:
        a, b, c = getattr(total, name), getattr(more, name), getattr(less, name)
        return Counter({key: a[key] + times * (b[key] - c[key]) for key in {*a, *b, *c}})

    saved = total.saved + times * (more.saved - less.saved)
    return dataclasses.replace(total, saved=saved, sent=sums("sent"), calls=sums("calls"))


@dataclass(frozen=True)
class _Run:
    steps: Steps
    division: Division
    stage: int
    adapter: bool
    flowing: bool

    def run(self, layers: tuple[int, ...]) -> Step:
        """Run it with these layers; wrap what torch or transformers say when a cut model cannot run."""
        outline, config, work = self.steps.parts
        try:
            with adapted(outline, self.division, self.stage, layers, config, stored_whole=True) as (model, axes):
                names = {axis.group.group_name: axis.name for axis in axes if axis.size > 1}
                with FakeTensorMode(allow_non_fake_inputs=True), _taken_for_real():
                    model.train().to_empty(device="cpu")
                    traffic = Traffic(names, _even(work, model, self.division))
                    with nullcontext() if self.adapter else model.disable_adapter(), _flowing(model, self.flowing):
                        return self._measured(model, traffic)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            if isinstance(error, LayoutError):
                raise
            said = str(error).strip().splitlines() or [type(error).__name__]
            raise LayoutError(f"it cannot be run so: {said[0]}") from error

    def _measured(self, model: Any, traffic: Traffic) -> Step:
        kept = _Saved(model)
        forward, x = self._forward(model)
        handles = [layer.register_forward_hook(kept.passed) for layer in self._layers(model)]
        with traffic:
            with torch.autograd.graph.saved_tensors_hooks(kept.pack, _same):
                output = forward(x)
            torch.autograd.backward(output, None if output.dim() == 0 else torch.empty_like(output))
        for handle in handles:
            handle.remove()
        for tensor in (output if output.dim() else None, x.grad):  # to the next stage, to the one before
            if tensor is not None:
                traffic.calls["pp", "send"] += 1
                traffic.sent["pp", "send"] += tensor.numel() * tensor.element_size()
        working = max(0, traffic.peak - kept.size)
        return Step(kept.size, working, 0, 0, kept.between, Counter(traffic.sent), Counter(traffic.calls))

    def _layers(self, model: Any) -> list[nn.Module]:
        try:
            return list(decoder_of(model.get_base_model())[1].layers)  # type: ignore[arg-type]
        except LayoutError:
            return []

    def _forward(self, model: Any) -> tuple[Callable[[Tensor], Tensor], Tensor]:
        """Return the forward of this rank, up to the loss where it has one, and its input."""
        work, division = self.steps.parts[2], self.division
        ids = torch.empty(work.batch, work.sequence, dtype=torch.long)
        if division.pp == 1:
            return (lambda x: model(input_ids=x, labels=x, use_cache=False).loss), ids
        base = model.get_base_model()
        part = pipeline_stage(model, base.lorica_mesh["pp"], microbatches=division.pp).stage.submod
        x = ids
        if self.stage:
            x = torch.empty(*ids.shape, base.config.hidden_size, dtype=base.dtype, requires_grad=True)
        if self.stage < division.pp - 1:
            return part, x
        return (lambda x: next_token_loss(part(x), ids)), x


class _Saved:
    """Everything that autograd saves, but for parameters and buffers; each piece of memory once."""

    def __init__(self, model: Any) -> None:
        self._own = {_storage(tensor)._cdata for tensor in [*model.parameters(), *model.buffers()]}
        self._kept: dict[int, Any] = {}
        self.between = 0

    def pack(self, tensor: Tensor) -> Tensor:
        """Look at a tensor that is saved."""
        storage = _storage(tensor)
        if storage._cdata not in self._own:
            self._kept[storage._cdata] = storage
        return tensor

    def passed(self, layer: nn.Module, args: Any, output: Any) -> None:
        """Look at what a decoder layer hands on."""
        tensor = output if isinstance(output, Tensor) else output[0]
        self.between = tensor.numel() * tensor.element_size()

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(storage.nbytes() for storage in self._kept.values())


def _storage(tensor: Tensor) -> Any:
    return (tensor._local_tensor if isinstance(tensor, DTensor) else tensor).untyped_storage()


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _even(work: Work, model: Any, division: Division) -> Callable[[Tensor], Any]:
    """Return what to answer where code asks how many tokens go to each rank: as many to one as to another."""
    routed = work.tokens * (experts_per_token(model.get_base_model().config) or 1) // division.tp
    asked = 0

    def answer(scalar: Tensor) -> Any:
        nonlocal asked
        if scalar.dtype.is_floating_point or scalar.dtype == torch.bool:
            return True  # of a mask: that it is all ones, as in rows of full length
        asked += 1
        return routed // division.ep + ((asked - 1) % division.ep < routed % division.ep)

    return answer


@contextmanager
def _taken_for_real() -> Iterator[None]:
    """Let transformers not take tensors without values for a graph that is traced, for which it makes other masks."""
    from transformers.utils import import_utils

    asked = getattr(import_utils, "is_fake_tensor", None)
    import_utils.is_fake_tensor = lambda x: False
    said, _LOGGER.disabled = _LOGGER.disabled, True  # what cannot run is an error, and needs no log besides
    try:
        yield
    finally:
        import_utils.is_fake_tensor, _LOGGER.disabled = asked, said


@contextmanager
def _flowing(model: nn.Module, wanted: bool) -> Iterator[None]:
    embedding = model.get_base_model().get_input_embeddings() if wanted else None  # type: ignore[operator]
    if not isinstance(embedding, nn.Module):
        yield
        return
    handle = embedding.register_forward_hook(lambda module, args, output: output.requires_grad_())
    try:
        yield
    finally:
        handle.remove()


__all__ = ["Step", "Steps", "Work"]
