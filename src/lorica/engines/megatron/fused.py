"""What is fused in a Megatron layer, which only the block that it is in knows.

``linear_qkv`` holds, query group after query group, the group's query heads, its key head and its value head;
``linear_fc1`` of a gated MLP holds on each rank its rows of the gate, then its rows of the up projection. In the
logical weight, and so in files, the rows are in the order of the parts: q, k, v and gate, up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from lorica.engines.megatron.models import inside_adapters, is_megatron
from lorica.engines.megatron.te import logical_sizes
from lorica.engines.placed import Kinds, describe_anew
from lorica.layout import Cut, fused
from lorica.layout.cuts import Held, joined

#: The blocks that know what is fused, by the full names of their classes.
ATTENTION = "megatron.core.transformer.attention.SelfAttention"
MLP = "megatron.core.transformer.mlp.MLP"
#: It computes with the weights of its layers, and never calls them.
TE_FUSED = "megatron.core.extensions.transformer_engine.TEFusedMLP"
_KINDS = Kinds((ATTENTION, TE_FUSED, MLP))

_MARK = "lorica_fused"


@dataclass(frozen=True)
class Fused:
    """The parts of a fused layer and how its rows lie.

    Attributes:
        parts: name and number of rows of each projection, one after the other in the logical weight.
        order: intervals of the logical rows in Megatron's order, which ranks cut evenly; empty: each part is cut evenly
            on its own.
        refusal: why the layer cannot be adapted; empty: it can.
    """

    parts: tuple[tuple[str, int], ...]
    order: Held = ()
    refusal: str = ""

    def cut(self, axis: str, ranks: int) -> Cut:
        """Return the cut of the rows over the tensor-parallel ranks."""
        lengths = tuple(length for _, length in self.parts)
        if not self.order:
            return fused(axis, "out", lengths, ranks)
        each = sum(lengths) // ranks
        return Cut(axis, "out", tuple(_between(self.order, rank * each, (rank + 1) * each) for rank in range(ranks)))


def _between(order: Held, first: int, last: int) -> Held:
    """Return the positions from ``first`` to ``last`` of a sequence of intervals, as intervals."""
    found, place = [], 0
    for start, stop in order:
        low, high = max(first, place), min(last, place + stop - start)
        if low < high:
            found.append((start + low - place, start + high - place))
        place += stop - start
    return joined(found)


def qkv(config: Any) -> Fused:
    """Return what ``linear_qkv`` holds.

    Args:
        config: of the transformer: ``num_attention_heads``, ``num_query_groups``, ``kv_channels``.
    """
    if getattr(config, "attention_output_gate", False):
        return Fused((), refusal="with attention_output_gate linear_qkv holds gates too, which cannot be told apart")
    heads, groups, width = config.num_attention_heads, config.num_query_groups, config.kv_channels
    query, kv, share = heads * width, groups * width, heads // groups * width
    order: list[tuple[int, int]] = []
    for group in range(groups):
        order.append((group * share, (group + 1) * share))
        order += [(start + group * width, start + (group + 1) * width) for start in (query, query + kv)]
    return Fused((("linear_q", query), ("linear_k", kv), ("linear_v", kv)), joined(order))


def gate_and_up(rows: int) -> Fused:
    """Return what ``linear_fc1`` of a gated MLP with so many rows holds."""
    return Fused((("linear_fc1_gate", rows // 2), ("linear_fc1_up", rows // 2)))


def tell(block: nn.Module) -> None:
    """Tell the layers of a block what is fused in them, if it is one that knows."""
    kind = _KINDS.of(type(block))
    if kind is None:
        return
    if kind == TE_FUSED:
        _refuse(block, "TEFusedMLP never calls its layers; build the model without use_te_op_fuser to adapt them")
        return
    config: Any = getattr(block, "config", None)
    name = "linear_qkv" if kind == ATTENTION else "linear_fc1"
    layer = inside_adapters(block._modules.get(name))
    if layer is not None and _MARK not in layer.__dict__:
        _tell(layer, name, config)


def _refuse(block: nn.Module, why: str) -> None:
    for name in ("linear_fc1", "linear_fc2"):
        if (layer := inside_adapters(block._modules.get(name))) is not None:
            note(layer, Fused((), refusal=why))


def tell_alone(layer: nn.Module, name: str) -> None:
    """Tell a layer what is fused in it by the name that it has in its block, where the block itself is not at hand.

    Args:
        layer: any module.
        name: the last word of its name.
    """
    if is_megatron(layer) and name in ("linear_qkv", "linear_fc1") and _MARK not in layer.__dict__:
        _tell(layer, name, layer.config)


def _tell(layer: Any, name: str, config: Any) -> None:
    if name == "linear_fc1" and not config.gated_linear_unit:
        return
    layer.__dict__[_MARK] = qkv(config) if name == "linear_qkv" else gate_and_up(logical_sizes(layer)[0])
    describe_anew(layer)


def note(layer: nn.Module, inside: Fused) -> None:
    """Note what is fused in a layer."""
    layer.__dict__[_MARK] = inside


def told(module: nn.Module) -> Fused | None:
    """Return what is fused in a layer, if its block has told it."""
    found: Fused | None = module.__dict__.get(_MARK)
    return found


__all__ = ["Fused", "gate_and_up", "note", "qkv", "tell", "tell_alone", "told"]
