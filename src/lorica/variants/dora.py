"""DoRA: the adapted weight's direction and its magnitude are learned apart (https://arxiv.org/abs/2402.09353).

::

    y = m / ‖W + s·B·A‖ · (x Wᵀ + s·(x Aᵀ) Bᵀ) + b        one magnitude m and one norm for every output

The norms are constants for the gradient (section 4.3 of the paper).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from lorica.config.spec import AdapterSpec
from lorica.engines.kinds import is_distributed
from lorica.engines.rest import storage_axes
from lorica.engines.site import Axis, Site
from lorica.errors import TargetError
from lorica.init import Factors
from lorica.init.borrow import there
from lorica.ops import Op
from lorica.ops.base import autocast_off
from lorica.ops.dropout import drop
from lorica.storage import Packed, stored_weight
from lorica.variants.base import Extra, Hosting, Variant

#: Name of the magnitudes in a file, below the layer.
MAGNITUDE = "lora_magnitude_vector"
#: Elements of a chunk of rows while norms are taken: the only extra memory is that many float32 values.
CHUNK_ELEMENTS = 4 * 1024 * 1024
#: Where ``‖W + ΔW‖²`` is less than this part of ``‖W‖² + ‖ΔW‖²``, its three terms cancel and it is taken anew.
CANCELLATION = 1 / 4
#: Whether norms are kept from one forward to the next (:class:`lorica.helpers.DoraCaching`).
keeps_norms = True


class Dora(Variant):
    """One magnitude for every output of the layer.

    On a layer that is cut by its outputs, magnitudes and norms are cut alike and nothing is sent. Where it is cut by
    its inputs (row and vocabulary layers), every rank has all magnitudes, and the squared norms are summed over the
    axis: one ``all_reduce`` of ``out`` numbers, in the first forward after the factors or the weight changed.
    """

    across = False  # it computes the base product again

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
        outputs = factors.b.shape[layer.op.roles_b.index("out")]
        shape = torch.Size(outputs if role == "out" else 1 for role in roles)
        return [Extra(MAGNITUDE, MAGNITUDE, "weight", roles, shape)]

    def start(self, layer: Hosting, factors: Factors, spec: AdapterSpec, seed: int) -> dict[str, Tensor]:
        """The norms, so that the layer starts as plain LoRA would."""
        return {MAGNITUDE: norms(layer, factors, spec)}

    def add(self, y: Tensor, x: Tensor, layer: Hosting, factors: Factors, spec: AdapterSpec) -> Tensor:
        """Add the adapter's part, then multiply all but the base layer's bias by ``m / ‖W + s·B·A‖``.

        That is ``gain·y + (1 - gain)·b``, in float32 or wider: a gain of 1 leaves ``y`` bit for bit, and one that is
        near 1 is not rounded to it. The base product is not computed again, unless dropout comes before A: then the
        part that is multiplied sees the dropped input, as in PEFT.
        """
        gain = _gain(layer, factors, spec, _kept_norms(layer, factors, spec))
        op = layer.op
        if spec.dropout and layer.training and spec.dropout_position == "pre" and not op.lookup:
            x, spec = drop(x.to(y.dtype), spec, "pre", layer.site, True), replace(spec, dropout=0.0)
            product = op.product(x, layer)
            part, rest = op.add(product, x, layer, factors, spec), y - product
        else:
            part, bias = op.add(y, x, layer, factors, spec), _bias(layer)
            rest = torch.zeros_like(gain) if bias is None else (1 - gain) * bias
            rest = _per_output(op, rest)
        return torch.addcmul(rest, part, _per_output(op, gain)).to(y.dtype)

    def gain(self, layer: Hosting, factors: Factors, spec: AdapterSpec) -> Tensor:
        """``m / ‖W + s·B·A‖``."""
        return _gain(layer, factors, spec, norms(layer, factors, spec))[layer.share_at_rest()[_out_dim(layer.op)]]


def _gain(layer: Hosting, factors: Factors, spec: AdapterSpec, norm: Tensor) -> Tensor:
    free = norm > 0  # a row of zeros stays one, whatever multiplies it
    if spec.parts and layer.site is not None:
        free = free & _adapted(layer.site, spec, norm)
    return torch.where(free, factors.extras[MAGNITUDE].flatten().to(norm.dtype) / torch.where(free, norm, 1), 1)


def _adapted(site: Site, spec: AdapterSpec, norm: Tensor) -> Tensor:
    """Tell which outputs belong to those of several fused projections that are adapted."""
    mine = torch.zeros(len(norm), dtype=torch.bool, device=norm.device)
    for (name, _), rows in zip(site.layout.parts, site.layout.part_rows(site.at), strict=True):
        for start, stop in rows:
            mine[start:stop] = name in spec.parts
    return mine


def norms(layer: Hosting, factors: Factors, spec: AdapterSpec) -> Tensor:
    """Return ``‖W + s·B·A‖`` of every output that this rank computes, detached, in float32 (float64 stays).

    Collective over the axes that cut the layer's inputs and, between forwards, over those that shard the weight.
    """
    with torch.inference_mode(False), torch.no_grad(), autocast_off(factors.b.device.type):
        held = layer.share_at_rest()
        plain = Factors(factors.a.detach(), factors.b.detach())
        left, right = layer.op.delta(layer.base_layer, plain)
        weight: Any = layer.unmerged_weight().flatten(1)
        if isinstance(weight, Packed) and torch.compiler.is_compiling():
            weight = weight.dequantize()  # a graph's nodes pass tensors only
        matrices = (weight, left[held[0]], right[:, held[1]])
        outputs, kept = (left.shape[0], held[0])
        if _out_dim(layer.op) == 1:
            matrices = (matrices[0].T, matrices[2].T, matrices[1].T)
            outputs, kept = (right.shape[1], held[1])
        squares = (_traced if torch.compiler.is_compiling() else row_squares)(*matrices, spec.scaling)
        if axes := _axes_of_terms(layer):
            part, squares = squares, squares.new_zeros(outputs)
            squares[kept] = part
            for axis in axes:
                dist.all_reduce(squares, group=axis.group)
        return squares.sqrt()


def row_squares(weight_OI: Tensor, b_OR: Tensor, a_RI: Tensor, scale: float) -> Tensor:
    """Return ``‖W + s·B·A‖²`` of every row, without a second matrix of the weight's size.

    ``‖W‖² + 2s·⟨W Aᵀ, B⟩ + s²·⟨B (A Aᵀ), B⟩``, and row by row as it stands where these terms cancel, so that the result
    is good to a few roundings.
    """
    wide = torch.promote_types(weight_OI.dtype, torch.float32)
    b_OR, a_RI = there(b_OR).to(wide) * scale, there(a_RI).to(wide)
    delta_O = ((b_OR @ (a_RI @ a_RI.T)) * b_OR).sum(1)
    step = max(1, CHUNK_ELEMENTS // max(1, weight_OI.shape[1]))
    found = [torch.zeros(0, dtype=wide, device=b_OR.device)]
    for start in range(0, len(weight_OI), step):
        chunk = slice(start, start + step)
        w_OI, b = there(weight_OI[chunk].to(wide)), b_OR[chunk]
        parts_O = torch.einsum("oi,oi->o", w_OI, w_OI) + delta_O[chunk]
        squares_O = parts_O + 2 * ((w_OI @ a_RI.T) * b).sum(1)
        cancelled = squares_O < CANCELLATION * parts_O
        if cancelled.any():
            squares_O[cancelled] = torch.addmm(w_OI[cancelled], b[cancelled], a_RI).square().sum(1)
        found.append(squares_O)
    return torch.cat(found).to(weight_OI.device)


@torch.library.custom_op("lorica::row_squares", mutates_args=())
def _traced(weight_OI: Tensor, b_OR: Tensor, a_RI: Tensor, scale: float) -> Tensor:
    """One node in a compiled graph: what happens inside depends on the numbers."""
    return row_squares(weight_OI, b_OR, a_RI, scale)


@_traced.register_fake
def _(weight_OI: Tensor, b_OR: Tensor, a_RI: Tensor, scale: float) -> Tensor:
    return weight_OI.new_empty(weight_OI.shape[0], dtype=torch.promote_types(weight_OI.dtype, torch.float32))


_steps = 0


def _count_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    global _steps
    _steps += 1


register_optimizer_step_post_hook(_count_step)


def _kept_norms(layer: Hosting, factors: Factors, spec: AdapterSpec) -> Tensor:
    """Return the norms of the last forward, as long as nothing was written to what they depend on.

    Writes are seen through torch's version counters and, since fully-sharded parallelism hides them there, through the
    steps of any optimiser. A write through ``.data`` moves neither.

    Where norms are collective, all ranks have to come to the same answer. So it depends there on nothing that is a
    rank's own, such as where in memory a gathered weight happens to lie.
    """
    weight: Any = stored_weight(layer.base_layer, layer.op.weight_name)
    sources: tuple[Tensor, ...] = (weight, factors.a, factors.b)
    if not keeps_norms or torch.compiler.is_compiling() or any(tensor.is_inference() for tensor in sources):
        return norms(layer, factors, spec)
    adapter = next(name for name, known in layer.specs.items() if known is spec)
    place: tuple[int, ...] = ()
    if not _axes_of_terms(layer):
        # Engines hand the forward a new object around the same memory.
        place = (layer.stored.data_ptr(), id(factors.a), id(factors.b))
    state = (_steps, spec.scaling, place, *(tensor._version for tensor in sources))
    kept = layer.notes.get(adapter)
    if kept is None or kept[0] != state:
        kept = layer.notes[adapter] = (state, norms(layer, factors, spec))
    norm: Tensor = kept[1]
    return norm


def _axes_of_terms(layer: Hosting) -> list[Axis]:
    """Return the axes over which this rank's outputs and their squared norms are divided."""
    site = layer.site
    cut = None if site is None else site.layout.cut_of("in")
    weight: Any = stored_weight(layer.base_layer, layer.op.weight_name)
    stored = storage_axes(weight, site)
    return [*([site.axes[cut.axis]] if site and cut else []), *(axis for _, axis in stored)]


def _out_dim(op: Op) -> int:
    return op.roles_weight.index("out")


def _bias(layer: Hosting) -> Tensor | None:
    """Return what the output holds of the base layer's bias where adapters are added to it."""
    bias: Tensor | None = getattr(layer.base_layer, layer.op.bias_name, None)
    share = 1.0 if layer.site is None else layer.site.bias
    if bias is None or share == 0:
        return None
    local = bias.to_local() if is_distributed(bias) else bias
    return local if share == 1 else local * share


def _per_output(op: Op, values: Tensor) -> Tensor:
    """Shape one number per output so that it broadcasts over the layer's output."""
    assert op.roles_magnitude is not None
    behind = len(op.roles_magnitude) - op.roles_magnitude.index("out") - 1
    return values.view(-1, *[1] * behind)
