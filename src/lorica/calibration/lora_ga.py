"""LoRA-GA's statistics: the gradient of each base weight (https://arxiv.org/abs/2407.05000).

No base weight is asked for its gradient. A layer's is ``Σ dyᵀ·x`` over its tokens, and both are seen where the layer is
called: kept as they are while that is less than the gradient itself, added up into it afterwards. So it works on every
engine, frozen or quantised, and nothing but one layer's logical gradient is ever whole at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lorica.adapt.inject import base_of
from lorica.calibration import files, over_ranks
from lorica.calibration.watch import Watch, adapters_off, mode, targets_of
from lorica.config import LoraConfig
from lorica.engines.stages import STAGES
from lorica.errors import AdapterError, CheckpointError, ConfigError
from lorica.init import INITS, target_generator
from lorica.init.lora_ga import EXACT_UP_TO
from lorica.init.statistics import keep
from lorica.lowrank import cut, exact_svd, sketched_svd
from lorica.targets import make_plan
from lorica.targets.plan import Target


def preprocess_loraga(
    model: nn.Module,
    lora_config: LoraConfig,
    train_step: Callable[[], object],
    cache_file: str | None = None,
) -> None:
    """Find out what ``init_lora_weights="lora_ga"`` starts from, before the adapter is added.

    Args:
        model: the base model, which is put into training mode meanwhile; nothing of it changes. It may be cut by any
            engine; then every rank calls, with its share of the data.
        lora_config: its ``lora_ga_config`` must be there.
        train_step: runs forward and backward passes; their gradients are averaged.
        cache_file: safetensors file that keeps the directions of the gradients. Where it is there, nothing is run.

    Raises:
        ConfigError: ``lora_ga_config`` is missing, or a weight has fewer directions than are needed.
        AdapterError: no backward pass reached a layer, or its gradient is not finite.
        CheckpointError: the file is no safetensors file, or lacks a layer.
    """
    if lora_config.lora_ga_config is None:
        raise ConfigError(
            "If you want to use LoRA-GA, please initialize the LoraConfig with init_lora_weights='lora_ga' and "
            "lora_ga_config=LoraGAConfig(...)."
        )
    targets = targets_of(make_plan(base_of(model), lora_config))
    if not targets:
        raise ConfigError("No supported layers found for LoRA-GA initialization: it starts linear layers")
    for target in targets:
        _check_rank(target)
    if cache_file is not None and files.is_there(cache_file):
        found = files.read(cache_file, "cache_file")
        for target in targets:
            _keep(target, {part: _cached(found, target, part, cache_file) for part, _, _ in _parts(target)})
        return
    run = _Run(targets)
    with mode(model, training=True), adapters_off(model), _nothing_trains(model), run.watch, torch.enable_grad():
        train_step()
    made: dict[str, Tensor] = {}
    for target in targets:
        directions = _directions(target, run.gradient(target))
        _keep(target, directions)
        made |= {_key(target, part, n): tensor for part, each in directions.items() for n, tensor in each.items()}
    if cache_file is not None:
        files.write(cache_file, made, model)


def _keep(target: Target, found: dict[str, dict[str, Tensor]]) -> None:
    keep(target.base, target.op.weight_name, INITS["lora_ga"].needs, found)


def _key(target: Target, part: str, name: str) -> str:
    parent = target.name.rpartition(".")[0]
    own = target.name if not part else f"{parent}.{part}" if parent else part
    return f"{own}.gradient.{name}"


def _cached(found: dict[str, Tensor], target: Target, part: str, path: str) -> dict[str, Tensor]:
    try:
        return {name: found[_key(target, part, name)] for name in ("u", "s", "v")}
    except KeyError as error:
        raise CheckpointError(f"cache_file={path!r} has no {error}: it was made for other targets") from None


def _logical_shape(target: Target) -> tuple[int, int]:
    if target.site is not None:
        sizes = target.site.layout.sizes
        return sizes["out"], sizes["in"]
    out_features, in_features = target.op.logical_shape(target.base)
    return out_features, in_features


def _parts(target: Target) -> list[tuple[str, int, int]]:
    return target.op.parts(target.base) or [("", 0, _logical_shape(target)[0])]


def _check_rank(target: Target) -> None:
    for part, first, last in _parts(target):
        sides, needed = (last - first, _logical_shape(target)[1]), 2 * target.spec.r
        if needed > min(sides):
            raise ConfigError(
                f"{target.name}{' ' if part else ''}{part}: LoRA-GA takes {needed} directions of a gradient for "
                f"r={target.spec.r}, which {sides[0]} × {sides[1]} numbers have not; choose a smaller rank "
                "(rank_pattern sets it for this layer alone)"
            )


def _directions(target: Target, gradient: Tensor) -> dict[str, dict[str, Tensor]]:
    """Return the first ``2r`` singular triples of the gradient of each projection, the same on all ranks."""
    found = {}
    for part, first, last in _parts(target):
        rows = gradient[first:last]
        if min(rows.shape) <= EXACT_UP_TO:
            svd = cut(exact_svd(rows.double()), 2 * target.spec.r)
        else:
            generator = target_generator(0, target.name)
            svd = cut(sketched_svd(rows, 2 * target.spec.r, generator), 2 * target.spec.r)
        tensors = {name: tensor.float() for name, tensor in svd._asdict().items()}
        found[part] = over_ranks.agreed(tensors, target.site)
    return found


@contextmanager
def _nothing_trains(model: nn.Module) -> Iterator[None]:
    """Run a block with every parameter frozen, so that no gradient but the wanted ones takes memory."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


class _Run:
    """The gradients that one run of the model gives."""

    def __init__(self, targets: list[Target]) -> None:
        self.watch = Watch(targets, self._record)
        self._gradients: dict[str, _Gradient] = {}

    def _record(self, target: Target, x: Tensor, y: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return y
        x, seen = x.detach(), list[Tensor]()
        gradient = self._gradients.setdefault(target.name, _Gradient())
        leaf = torch.empty(0, device=y.device, requires_grad=True)
        leaf.register_post_accumulate_grad_hook(lambda leaf: gradient.add(seen.pop(), x))  # type: ignore[no-untyped-call]
        tapped: Tensor = _Tap.apply(y, leaf, seen)  # type: ignore[no-untyped-call]
        return tapped

    @torch.no_grad()
    def gradient(self, target: Target) -> Tensor:
        """Return the logical gradient ``[out, in]`` of one layer, averaged; what was kept of it is let go.

        Raises:
            AdapterError: there is none, or it is not finite.
        """
        kept = self._gradients.pop(target.name, None)
        if kept is None or not kept.count:
            raise AdapterError(f"{target.name}: no backward pass of train_step reached this layer")
        whole = _whole(kept.dense() / kept.count, target)
        if not whole.isfinite().all():
            raise AdapterError(f"{target.name}: its gradient is not finite")
        return whole


class _Tap(torch.autograd.Function):
    """Passes a layer's output on and notes its gradient.

    It lets the graph begin here where nothing before the layer trains. The leaf of no elements is reached by passes
    that accumulate gradients and by no others: torch's pipelines run a pass of their own on memory without values,
    only to learn the shapes.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, leaf: Tensor, seen: list[Tensor]) -> Tensor:
        """Return ``y``, free to be written into."""
        ctx.seen, ctx.leaf = seen, leaf.detach()
        return y.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        """Note the gradient; :class:`_Run` takes it when the leaf gets its own."""
        ctx.seen[:] = [gradients[0].detach()]
        return gradients[0], ctx.leaf, None


class _Gradient:
    """A sum of ``dyᵀ·x``, kept as its factors while they are smaller."""

    def __init__(self) -> None:
        self.count = 0
        self._factors: list[tuple[Tensor, Tensor]] = []
        self._sum: Tensor | None = None

    @torch.no_grad()
    def add(self, dy: Tensor, x: Tensor) -> None:
        """Take in what one backward pass gave."""
        dy, x = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
        self.count += 1
        self._factors.append((dy, x))
        tokens = sum(len(part) for part, _ in self._factors)
        if self._sum is not None or tokens * (dy.shape[1] + x.shape[1]) > dy.shape[1] * x.shape[1]:
            self._sum = self.dense()
            self._factors = []

    def dense(self) -> Tensor:
        """Return the sum, ``[out, in]``, in float32."""
        total = self._sum
        for dy, x in self._factors:
            if total is None:
                total = torch.zeros(dy.shape[1], x.shape[1], device=x.device)
            total.addmm_(dy.float().T, x.float())
        assert total is not None
        return total


def _whole(local: Tensor, target: Target) -> Tensor:
    """Return the logical gradient from the ranks' shares: pieces put in their places and added up, batches averaged."""
    site, roles = target.site, ("out", "in")
    if site is None:
        groups = over_ranks.data_groups(None)
        return over_ranks.summed(local, groups) / (dist.get_world_size() if groups else 1)
    layout = site.layout
    whole = local.new_zeros(_logical_shape(target))
    for box in layout.boxes(roles, whole.shape, site.at):
        whole[box.logical] += local[box.local]
    summing = {*layout.sharded(roles), *layout.summed(roles)}
    for name, axis in sorted(site.axes.items()):
        if name == STAGES or axis.size == 1 or not (name in summing or name in layout.averaged()):
            continue
        dist.all_reduce(whole, group=axis.group)
        if name in layout.averaged():
            whole /= axis.size
    return whole


__all__ = ["preprocess_loraga"]
