"""DoRA: the adapted weight's direction and its magnitude are learned apart (https://arxiv.org/abs/2402.09353).

::

    y = m / ‖W + s·B·A‖ · (x Wᵀ + s·(x Aᵀ) Bᵀ) + b        one magnitude m and one norm for every output

The norms are constants for the gradient (section 4.3 of the paper).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from lorica.config.spec import AdapterSpec
from lorica.engines.kinds import is_distributed
from lorica.engines.rest import storage_axes
from lorica.engines.site import Axis, Site
from lorica.errors import TargetError
from lorica.init import Factors
from lorica.init.borrow import there
from lorica.kernels import kernel_for
from lorica.kernels.gain import plain as plain_gain
from lorica.ops import Op
from lorica.ops.base import autocast_off
from lorica.storage import Packed, stored_weight
from lorica.storage.deltas import chunk_elements
from lorica.variants.base import Extra, Hosting, Variant

#: Name of the magnitudes in a file, below the layer.
MAGNITUDE = "lora_magnitude_vector"
#: Elements of a chunk of rows while norms are taken: the only extra memory is that many float32 values.
CHUNK_ELEMENTS = 4 * 1024 * 1024
#: Where ``‖W + ΔW‖²`` is less than this part of ``‖W‖²``, its three terms cancel and it is taken anew. Elsewhere none
#: of them is more than 7 times the sum.
CANCELLATION = 1 / 2
#: Whether norms are kept from one forward to the next (:class:`lorica.helpers.DoraCaching`).
keeps_norms = True


class Dora(Variant):
    """One magnitude for every output of the layer.

    On a layer that is cut by its outputs, magnitudes and norms are cut alike and nothing is sent. Where it is cut by
    its inputs (row and vocabulary layers), every rank has all magnitudes, and the squared norms are summed over the
    axis: one ``all_reduce`` of ``out`` numbers, in the first forward after the factors or the weight changed.
    """

    across = False  # it multiplies the base product, before anything is done to it

    def check(self, op: Op, base: Any, spec: AdapterSpec, where: str) -> None:
        """The delta must have its place in the weight, one row to an output."""
        if op.roles_magnitude is None:
            why = "; its module multiplies, and no file has a place for its magnitudes" if op.inward else ""
            raise TargetError(f"{where}: use_dora=True is not supported for a layer of the kind {op.kind}{why}")
        if getattr(base, "groups", 1) > 1:
            raise TargetError(f"{where}: use_dora=True is not supported for convolutions with groups > 1")

    def extras(self, layer: Hosting, factors: Factors, spec: AdapterSpec) -> list[Extra]:
        """The magnitudes: ``[out]``, and ``[1, out, 1 …]`` of a convolution (PEFT's shapes)."""
        roles = layer.op.roles_magnitude
        assert roles is not None
        outputs = _outputs(layer, factors)
        shape = torch.Size(outputs if role == "out" else 1 for role in roles)
        return [Extra(MAGNITUDE, MAGNITUDE, "weight", roles, shape)]

    def start(self, layer: Hosting, factors: Factors, spec: AdapterSpec, seed: int) -> dict[str, Tensor]:
        """The norms, so that the layer starts as plain LoRA would."""
        return {MAGNITUDE: norms(layer, factors, spec)}

    def after(self, z: Tensor, layer: Hosting, factors: Factors, spec: AdapterSpec) -> Tensor:
        """Multiply all but the base layer's bias by ``m / ‖W + s·B·A‖``: ``gain·z + (1 - gain)·b``.

        The base product is not computed again, with dropout before A neither: what is dropped is A's input alone.
        """
        gain, bias = _gain(factors, _kept_norms(layer, factors, spec)), _bias(layer)
        rest = None if bias is None else _per_output(layer.op, (1 - gain) * bias)
        arguments = (z, _per_output(layer.op, gain), rest)
        # A compiler makes one kernel of it anyway, and cannot look into what chooses.
        run = plain_gain if torch.compiler.is_compiling() else kernel_for("gain", *arguments)
        y: Tensor = run(*arguments)
        return y

    def gain(self, layer: Hosting, factors: Factors, spec: AdapterSpec) -> Tensor:
        """``m / ‖W + s·B·A‖``."""
        return _gain(factors, _judged(_take(layer, factors, spec), layer, spec))[
            layer.share_at_rest()[_out_dim(layer.op)]
        ]


class Norms(NamedTuple):
    """What the magnitudes of a layer are divided by.

    Attributes:
        norm: ``[out]``, nowhere zero.
        fixed: ``[out]``, which outputs have a gain of 1 whatever their magnitude; None: none has.
    """

    norm: Tensor
    fixed: Tensor | None


def _gain(factors: Factors, norms: Norms) -> Tensor:
    magnitude = factors.extras[MAGNITUDE]
    gain = (magnitude if magnitude.dim() == 1 else magnitude.flatten()).to(norms.norm.dtype) / norms.norm
    return gain if norms.fixed is None else torch.where(norms.fixed, 1, gain)


def _judged(taken: _Taken, layer: Hosting, spec: AdapterSpec) -> Norms:
    norm, site = taken.norm, layer.site if spec.parts else None
    if taken.positive and site is None:
        return Norms(norm, None)
    free = norm > 0  # a row of zeros stays one, whatever multiplies it
    if site is not None:
        free = free & _adapted(site, spec, norm)
    if not torch.compiler.is_compiling() and free.all():
        return Norms(norm, None)
    return Norms(torch.where(free, norm, 1), ~free)


def _adapted(site: Site, spec: AdapterSpec, norm: Tensor) -> Tensor:
    """Tell which outputs belong to those of several fused projections that are adapted."""
    mine = torch.zeros(len(norm), dtype=torch.bool, device=norm.device)
    for (name, _), rows in zip(site.layout.parts, site.layout.part_rows(site.at), strict=True):
        for start, stop in rows:
            mine[start:stop] = name in spec.parts
    return mine


class _Taken(NamedTuple):
    """Norms as they were taken.

    Attributes:
        norm: ``[out]``.
        positive: whether it is known that none is zero.
    """

    norm: Tensor
    positive: bool


def norms(layer: Hosting, factors: Factors, spec: AdapterSpec) -> Tensor:
    """Return ``‖W + s·B·A‖`` of every output that this rank computes, detached, in float32 (float64 stays).

    Collective over the axes that cut the layer's inputs and, between forwards, over those that shard the weight.

    Args:
        layer: the adapted layer.
        factors: of the adapter.
        spec: its scale.
    """
    return _take(layer, factors, spec).norm


def _take(layer: Hosting, factors: Factors, spec: AdapterSpec, keep: bool = False) -> _Taken:
    """See :func:`norms`; ``keep``: take ``‖W‖²`` from the last time, as long as nothing was written to ``W``."""
    with torch.inference_mode(False), torch.no_grad(), autocast_off(factors.b.device.type):
        stored: Any = stored_weight(layer.base_layer, layer.op.weight_name)
        held = layer.share_at_rest() if is_distributed(stored) else _ALL
        plain = Factors(factors.a.detach(), factors.b.detach())
        left, right = layer.op.delta(layer.base_layer, plain)
        weight: Any = layer.unmerged_weight()
        weight = weight if weight.dim() == 2 else weight.flatten(1)
        if isinstance(weight, Packed) and torch.compiler.is_compiling():
            weight = weight.dequantize()  # a graph's nodes pass tensors only
        if held is not _ALL:
            left, right = left[held[0]], right[:, held[1]]
        matrices, kept = (weight, left, right), held[0]
        if _out_dim(layer.op) == 1:
            matrices, kept = (weight.T, right.T, left.T), held[1]
        positive = False
        if torch.compiler.is_compiling():
            squares = _traced(*matrices, spec.scaling)
        else:
            state, known = _known_squares(layer, stored) if keep else (None, None)
            squares, weights, positive = row_squares(*matrices, spec.scaling, known)
            if keep and known is None:
                layer.notes[_SQUARES] = (state, weights)
        if axes := _axes_of_terms(layer, stored):
            positive = False  # that of the others' rows is not known here
            part, squares = squares, squares.new_zeros(_outputs(layer, factors))
            squares[kept] = part
            for axis in axes:
                dist.all_reduce(squares, group=axis.group)
        return _Taken(squares.sqrt(), positive)


def _outputs(layer: Hosting, factors: Factors) -> int:
    return factors.b.shape[layer.op.roles_b.index("out")]


class Weights(NamedTuple):
    """What is known of a weight's rows.

    Attributes:
        squares: ``‖W‖²``, ``[out]``.
        least: of ``‖W + s·B·A‖²``, down to which its terms do not cancel.
    """

    squares: Tensor
    least: Tensor


class Squares(NamedTuple):
    """What :func:`row_squares` finds.

    Attributes:
        squares: ``‖W + s·B·A‖²``, ``[out]``.
        weights: what it needed of the weight alone.
        positive: whether it is known that no row is zero.
    """

    squares: Tensor
    weights: Weights
    positive: bool


def row_squares(weight_OI: Tensor, b_OR: Tensor, a_RI: Tensor, scale: float, weights: Weights | None = None) -> Squares:
    """Return ``‖W + s·B·A‖²`` and ``‖W‖²`` of every row, in one pass, without a second matrix of the weight's size.

    ``‖W‖² + 2s·⟨W Aᵀ, B⟩ + s²·⟨B (A Aᵀ), B⟩``, and row by row as it stands where these terms cancel, so that the result
    is good to a few roundings.

    Args:
        weight_OI: ``[out, in]``; what is not float32 or wider is widened, a chunk of rows at a time.
        b_OR: ``[out, r]``.
        a_RI: ``[r, in]``.
        scale: ``s``.
        weights: what is known of ``W`` already.
    """
    wide, device = torch.promote_types(weight_OI.dtype, torch.float32), weight_OI.device
    b_OR, a_RI = there(b_OR).to(wide), there(a_RI).to(wide)
    fresh_O = b_OR.new_empty(len(b_OR)) if weights is None else None
    cross_OR = torch.empty_like(b_OR, memory_format=torch.contiguous_format)
    for rows, w_OI in _chunks(weight_OI):
        torch.mm(w_OI, a_RI.T, out=cross_OR[rows])
        if fresh_O is not None:
            fresh_O[rows] = _squares(w_OI)
    if weights is None:
        assert fresh_O is not None
        weights = Weights(fresh_O.to(device), (CANCELLATION * fresh_O).to(device))
    cross_OR.addmm_(b_OR, a_RI @ a_RI.T, beta=2 * scale, alpha=scale * scale)
    squares_O = cross_OR.mul_(b_OR).sum(1).add_(there(weights.squares))
    cancelled_O = squares_O <= there(weights.least)
    cancelled = bool(cancelled_O.any())
    if cancelled:
        for rows, w_OI in _chunks(weight_OI):
            found = cancelled_O[rows].nonzero().flatten()
            if len(found):
                squares_O[rows][found] = _squares(torch.addmm(w_OI[found], b_OR[rows][found], a_RI, alpha=scale))
    return Squares(squares_O.to(device), weights, not cancelled)


def _chunks(weight_OI: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield slices of the rows, and these rows in float32 or wider."""
    wide = torch.promote_types(weight_OI.dtype, torch.float32)
    # Widened rows are read as soon as they are written, so on a CPU they are to fit into its cache.
    most = CHUNK_ELEMENTS if weight_OI.dtype == wide else min(CHUNK_ELEMENTS, chunk_elements(weight_OI.device))
    step = max(1, most // max(1, weight_OI.shape[1]))
    for start in range(0, len(weight_OI), step):
        rows = slice(start, start + step)
        yield rows, there(weight_OI[rows].to(wide))


def _squares(matrix_OI: Tensor) -> Tensor:
    # A reduction of its own: as products of the rows with themselves it is ten times slower, and less exact.
    norm: Tensor = torch.linalg.vector_norm(matrix_OI, dim=1)
    return norm.square_()


@torch.library.custom_op("lorica::row_squares", mutates_args=())
def _traced(weight_OI: Tensor, b_OR: Tensor, a_RI: Tensor, scale: float) -> Tensor:
    """One node in a compiled graph: what happens inside depends on the numbers."""
    return row_squares(weight_OI, b_OR, a_RI, scale)[0]


@_traced.register_fake
def _(weight_OI: Tensor, b_OR: Tensor, a_RI: Tensor, scale: float) -> Tensor:
    return weight_OI.new_empty(weight_OI.shape[0], dtype=torch.promote_types(weight_OI.dtype, torch.float32))


#: Where ``‖W‖²`` is kept in a layer's notes; the names of adapters are strings.
_SQUARES = ("squares",)
_ALL = (slice(None), slice(None))

_steps = 0


def _count_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    global _steps
    _steps += 1


register_optimizer_step_post_hook(_count_step)


def _kept_norms(layer: Hosting, factors: Factors, spec: AdapterSpec) -> Norms:
    """Return the norms of the last forward, as long as nothing was written to what they depend on.

    Writes are seen through torch's version counters and, since fully-sharded parallelism hides them there, through the
    steps of any optimiser. A write through ``.data`` moves neither.

    Where norms are collective, all ranks have to come to the same answer. So it depends there on nothing that is a
    rank's own, such as where in memory a gathered weight happens to lie.
    """
    stored: Any = stored_weight(layer.base_layer, layer.op.weight_name)
    sources: tuple[Tensor, ...] = (stored, factors.a, factors.b)
    if not keeps_norms or torch.compiler.is_compiling() or any(tensor.is_inference() for tensor in sources):
        return _judged(_take(layer, factors, spec), layer, spec)
    adapter = next(name for name, known in layer.specs.items() if known is spec)
    place: tuple[Any, ...] = ()
    if not _axes_of_terms(layer, stored):
        # Engines hand the forward a new object around the same memory.
        place = (_address(layer, stored), id(factors.a), id(factors.b))
    state = (_steps, spec.scaling, place, *(tensor._version for tensor in sources))
    kept = layer.notes.get(adapter)
    if kept is None or kept[0] != state:
        # The optimiser's steps do not write to a frozen weight, but parallelism may hide other writes to it.
        trains = getattr(stored, "requires_grad", False)
        alone = not (trains or (dist.is_available() and dist.is_initialized()))
        kept = layer.notes[adapter] = (state, _judged(_take(layer, factors, spec, alone), layer, spec))
    found: Norms = kept[1]
    return found


def _known_squares(layer: Hosting, stored: Any) -> tuple[Any, Weights | None]:
    """Return what ``‖W‖²`` is kept by, and itself; None: the weight was written to or moved since."""
    state = (_address(layer, stored), stored._version)
    kept = layer.notes.get(_SQUARES)
    return state, kept[1] if kept is not None and kept[0] == state else None


class _Memory:
    """Tells the memory of a tensor from any other; memory that is freed and lent again is another."""

    def __init__(self, tensor: Tensor) -> None:
        self._place = (StorageWeakRef(tensor.untyped_storage()), tensor.storage_offset())  # type: ignore[no-untyped-call]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Memory) and self._place == other._place

    def __hash__(self) -> int:
        return hash(self._place)

    def __deepcopy__(self, memo: Any) -> None:
        """Return nothing: a copied weight has memory of its own."""

    def __reduce__(self) -> Any:
        return (type(None), ())


def _address(layer: Hosting, stored: Any) -> Any:
    weight = layer.stored if is_distributed(stored) else stored
    return _Memory(weight) if isinstance(weight, Tensor) else weight.data_ptr()


def _axes_of_terms(layer: Hosting, stored: Any) -> list[Axis]:
    """Return the axes over which this rank's outputs and their squared norms are divided."""
    site = layer.site
    if site is None and not is_distributed(stored):
        return []
    cut = None if site is None else site.layout.cut_of("in")
    held = storage_axes(stored, site)
    return [*([site.axes[cut.axis]] if site and cut else []), *(axis for _, axis in held)]


def _out_dim(op: Op) -> int:
    return op.roles_weight.index("out")


def _bias(layer: Hosting) -> Tensor | None:
    """Return what the output holds of the base layer's bias where adapters are added to it."""
    bias: Tensor | None = layer.op.bias_of(layer.base_layer)
    share = 1.0 if layer.site is None else layer.site.bias
    if bias is None or share == 0:
        return None
    local = bias.to_local() if is_distributed(bias) else bias
    return local if share == 1 else local * share


def _per_output(op: Op, values: Tensor) -> Tensor:
    """Shape one number per output so that it broadcasts over the layer's output."""
    assert op.roles_magnitude is not None
    behind = len(op.roles_magnitude) - op.roles_magnitude.index("out") - 1
    return values.view(-1, *[1] * behind) if behind else values
