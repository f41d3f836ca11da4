"""Experts whose weights are stacked: each of them made a layer of its own, so that it is adapted like any other.

``GroupedMLP`` has the weights of all its experts in two parameters, Transformer Engine's ``TEGroupedMLP`` in two layers
of many weights. Beside them stand ``local_experts.<number>.linear_fc1`` and ``linear_fc2``, as in ``SequentialMLP``:
modules without parameters of their own, each of which shows its piece of a stack. So names, starts, files and merging
are the same for all three. The block multiplies all tokens at once, as ever; an adapted expert's layer is then given
its tokens and their product, and returns the product with its part added.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lorica.engines.megatron.fused import gate_and_up, note
from lorica.engines.placed import Kinds
from lorica.engines.registry import in_pieces

_EXPERTS = "megatron.core.transformer.moe.experts."
GROUPED, TE_GROUPED = _EXPERTS + "GroupedMLP", _EXPERTS + "TEGroupedMLP"


class _Stack:
    """Where the weights of one layer of all experts of a block are.

    Args:
        holder: the block, or the layer of many weights.
        name: of the parameter; of each of the parameters, without the number.
        count: how many experts there are here.
    """

    def __init__(self, holder: Any, name: str, count: int) -> None:
        self.holder, self.name, self.count = holder, name, count

    def weight(self, index: int) -> Tensor:
        """Return an expert's ``[out, in]``, a view."""
        weight: Tensor = getattr(self.holder, f"{self.name}{index}")
        return weight


class _Columns(_Stack):
    """The first weights of a ``GroupedMLP``: in memory ``[experts, in, out]``, whatever the parameter's shape says."""

    def stacked(self) -> Tensor:
        """Return ``[experts, in, out]``, a view."""
        parameter: Tensor = getattr(self.holder, self.name)
        return parameter.view(self.count, self.holder.config.hidden_size, -1)

    def weight(self, index: int) -> Tensor:
        """Return an expert's ``[out, in]``, a view."""
        return self.stacked()[index].mT


class _Rows(_Columns):
    """The second weights: ``[experts, in, out]`` too."""

    def stacked(self) -> Tensor:
        """Return ``[experts, in, out]``, a view."""
        parameter: Tensor = getattr(self.holder, self.name)
        return parameter.view(self.count, -1, self.holder.config.hidden_size)


class ExpertLinear(nn.Module):
    """One layer of one expert, whose weight is a piece of a stack.

    Args:
        stack: where it is.
        index: which expert of those here.
        block: the experts.
    """

    is_expert = True
    bias = None
    #: The dimension of the weight that the expert-tensor-parallel ranks divide.
    divided = 0

    def __init__(self, stack: _Stack, index: int, block: Any) -> None:
        super().__init__()
        self._stack, self._index = stack, index
        self.config, self.tp_group = block.config, block.tp_group
        sizes = list(self.weight.shape)
        sizes[self.divided] *= 1 if self.tp_group is None else self.tp_group.size()
        self.output_size, self.input_size = sizes

    @property
    def stack(self) -> object:
        """What the experts' layers of one stack have in common."""
        return self._stack

    @property
    def weight(self) -> Tensor:
        """``[out, in]`` of this rank, sharing the stack's memory."""
        return self._stack.weight(self._index).detach()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return ``y``, the product that the block has worked out for the tokens ``x``."""
        return y

    def extra_repr(self) -> str:
        """Show the logical sizes."""
        return f"{self.input_size}, {self.output_size}"


class ExpertColumn(ExpertLinear):
    """The first layer of an expert, cut by its outputs."""


class ExpertRow(ExpertLinear):
    """The second one, cut by its inputs."""

    divided = 1


class _Expert(nn.Module):
    """The layers of one expert."""

    def __init__(self, first: ExpertColumn, second: ExpertRow) -> None:
        super().__init__()
        self.linear_fc1, self.linear_fc2 = first, second


class _Parts:
    """Adds the parts of adapted experts to products for the tokens of all experts."""

    def __init__(self, block: Any, name: str) -> None:
        self._block, self._name = block, name

    def layers(self) -> list[nn.Module]:
        """Return the layer of each expert."""
        return [getattr(expert, self._name) for expert in self._block.local_experts]

    @property
    def some(self) -> bool:
        """Whether any expert's layer is adapted."""
        return any(not isinstance(layer, ExpertLinear) for layer in self.layers())

    def added(self, x: Tensor, y: Tensor, counts: list[int]) -> Tensor:
        """Return products with the parts of their experts.

        Args:
            x: ``[tokens, in]``, those of the first expert first.
            y: ``[tokens, out]``.
            counts: tokens of each expert.
        """
        if not self.some:
            return y
        pieces = zip(self.layers(), torch.split(x, counts), torch.split(y, counts), strict=True)
        return torch.cat([layer(x_e, y_e) for layer, x_e, y_e in pieces])


class _Grouped:
    """In the place of ``GroupedMLP.forward``, which multiplies, activates and multiplies in one."""

    def __init__(self, block: Any, first: _Columns, second: _Rows) -> None:
        self._block, self._own = block, block.forward
        self._first = first, _Parts(block, "linear_fc1")
        self._second = second, _Parts(block, "linear_fc2")

    def __call__(self, hidden: Tensor, tokens_per_expert: Tensor, probs: Tensor) -> Any:
        if not (self._first[1].some or self._second[1].some):
            return self._own(hidden, tokens_per_expert, probs)
        block: Any = self._block
        if block.config.moe_apply_probs_on_input:  # of the one expert that a token goes to
            hidden, probs = (probs.unsqueeze(-1) * hidden).to(hidden.dtype), torch.ones_like(probs)
        first = self._product(hidden, tokens_per_expert, *self._first)
        if not block.activation_recompute:
            inner = block.activation_func_with_probs(first, probs.unsqueeze(-1))
            return self._product(inner, tokens_per_expert, *self._second), None
        from megatron.core.tensor_parallel.random import CheckpointWithoutOutput

        checkpoint = block.activation_checkpoint = CheckpointWithoutOutput()
        inner = checkpoint.checkpoint(block.activation_func_with_probs, first, probs.unsqueeze(-1))
        second = self._product(inner, tokens_per_expert, *self._second)
        checkpoint.discard_output_and_register_recompute(second)
        return second, None

    def _product(self, x: Tensor, tokens_per_expert: Tensor, stack: _Columns, parts: _Parts) -> Tensor:
        from megatron.core.transformer.moe import grouped_gemm_util

        weights = stack.stacked()
        if x.shape[0]:
            y = grouped_gemm_util.ops.gmm(x, weights, tokens_per_expert, trans_b=False)
        else:
            y = x @ weights[0]  # of no tokens; the kernel needs some
        return parts.added(x, y, tokens_per_expert.tolist())


class _Around:
    """In the place of the forward of a layer of many weights."""

    def __init__(self, linear: Any, block: Any, name: str) -> None:
        self._own, self._parts = linear.forward, _Parts(block, name)

    def __call__(self, x: Tensor, splits: Any, *args: Any, **kwargs: Any) -> Any:
        y, *rest = self._own(x, splits, *args, **kwargs)
        return (self._parts.added(x, y, [int(count) for count in splits]), *rest)


class _State:
    """In the place of a block's ``sharded_state_dict``, which knows of nothing but the stacks.

    Factors of experts are where ``SequentialMLP`` would have them, so that either kind reads what the other wrote.
    """

    def __init__(self, block: Any) -> None:
        self._block, self._own = block, block.sharded_state_dict

    def __call__(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        block: Any = self._block
        experts = block._modules.pop("local_experts")
        try:
            state: dict[str, Any] = self._own(prefix, sharded_offsets, metadata)
        finally:
            block._modules["local_experts"] = experts
        for place, expert in enumerate(experts):
            for name, layer in expert.named_children():
                if not isinstance(layer, ExpertLinear):
                    state |= self._of(place, name, layer, prefix, sharded_offsets, metadata)
        return state

    def _of(
        self, place: int, name: str, layer: Any, prefix: str, sharded_offsets: Any, metadata: Any
    ) -> dict[str, Any]:
        from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding

        block: Any = self._block
        count, ranks = block.num_local_experts, block.ep_group.size()
        number = block.ep_group.rank() * count + place
        apart = bool((metadata or {}).get("singleton_local_shards", False))
        offsets = sharded_offsets if apart else (*sharded_offsets, (len(sharded_offsets), number, count * ranks))
        here = f"{prefix}local_experts.{place}."
        state: dict[str, Any] = layer.sharded_state_dict(f"{here}{name}.", offsets, metadata)
        replace_prefix_for_sharding(state, here, f"{prefix}experts.{number}." if apart else f"{prefix}experts.")
        return state


def unpack(block: nn.Module) -> None:
    """Give experts whose weights are stacked layers of their own; what the block computes stays the same."""
    if "local_experts" in block._modules or (kind := _KINDS.of(type(block))) is None:
        return
    block.local_experts = nn.ModuleList()
    block.__dict__["sharded_state_dict"] = _State(block)
    for first, second in _MADE_BY[kind](block):
        if block.config.gated_linear_unit:  # type: ignore[union-attr]
            note(first, gate_and_up(first.output_size))
        block.local_experts.append(_Expert(first, second))


def _of_parameters(block: Any) -> Iterator[tuple[ExpertColumn, ExpertRow]]:
    count = block.num_local_experts
    first, second = _Columns(block, "weight1", count), _Rows(block, "weight2", count)
    block.__dict__["forward"] = _Grouped(block, first, second)
    yield from ((ExpertColumn(first, e, block), ExpertRow(second, e, block)) for e in range(count))


def _of_layers(block: Any) -> Iterator[tuple[ExpertColumn, ExpertRow]]:
    count, stacks = block.num_local_experts, []
    for name in ("linear_fc1", "linear_fc2"):
        linear = getattr(block, name)
        in_pieces(linear)
        linear.__dict__["forward"] = _Around(linear, block, name)
        stacks.append(_Stack(linear, "weight", count))
    yield from ((ExpertColumn(stacks[0], e, block), ExpertRow(stacks[1], e, block)) for e in range(count))


#: How the experts of each class of blocks are made layers.
_MADE_BY: dict[str, Callable[[Any], Iterator[tuple[ExpertColumn, ExpertRow]]]] = {
    GROUPED: _of_parameters,
    TE_GROUPED: _of_layers,
}
_KINDS = Kinds(_MADE_BY)

__all__ = ["GROUPED", "TE_GROUPED", "ExpertColumn", "ExpertLinear", "ExpertRow", "unpack"]
