"""Linear layers cut by columns (of the output) or rows (of the input), after Megatron-LM.

::

    column:  x ─ enter ─ x W_lᵀ (+ b_l) ─ [gather] ─ y          row:  [split] ─ x_l W_lᵀ ─ leave ─ (+ b) ─ y

Weights are ``[out, in]`` as in ``nn.Linear``; ``in_features`` and ``out_features`` are this rank's, ``input_size``
and ``output_size`` the logical ones. For frozen weights only activations are sent, never anything of weight size.

Shoeybi et al., "Megatron-LM: Training Multi-Billion Parameter Language Models Using Model Parallelism", 2019, sec. 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from lorica.engines.native.base import AxisLike, Native, axis_of, held_order, need_plain
from lorica.engines.native.collectives import (
    enter,
    gather,
    leave,
    lengths,
    sequence_gather,
    sequence_reduce,
    sequence_swap,
    split,
)
from lorica.errors import LayoutError
from lorica.layout import Cut, Layout, Roles, even


class _ParallelLinear(Native, nn.Linear):
    """A linear layer with one of its dimensions cut."""

    roles: ClassVar[Mapping[str, Roles]] = {"weight": ("out", "in"), "bias": ("out",)}

    def _build(self, axis: AxisLike, layout: Layout, bias: bool, device: Any, dtype: torch.dtype | None) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would draw the piece as if it were the whole
        self.layout = layout
        self.axis = axis_of(axis)
        self.axes = {self.axis.name: self.axis}
        self.output_size, self.input_size = layout.sizes["out"], layout.sizes["in"]
        if layout.cuts[0].size != self.axis.size:
            raise LayoutError(f"a cut for {layout.cuts[0].size} ranks on an axis of {self.axis.size}")
        local = layout.local_shape(("out", "in"), (self.output_size, self.input_size), self.at)
        self.out_features, self.in_features = local
        self.weight = nn.Parameter(torch.empty(local, device=device, dtype=dtype))
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(local[0], device=device, dtype=dtype)) if bias else None
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the whole parameters as ``nn.Linear`` does and keep this rank's pieces: the same on any layout."""
        if self.weight.is_meta:
            return
        whole = nn.Linear(
            self.input_size, self.output_size, self.bias is not None, device=self.weight.device, dtype=self.weight.dtype
        )
        for name, parameter in whole.named_parameters():
            self.load_logical(name, parameter.detach())

    @classmethod
    def from_linear(cls, module: nn.Linear, axis: AxisLike, **options: Any) -> Self:
        """Return this rank's piece of a whole linear layer.

        Args:
            module: the whole layer, the same on every rank.
            axis: over which to cut.
            **options: arguments of the constructor.

        Raises:
            LayoutError: the layer is not a plain ``nn.Linear``.
        """
        layer = cls.like(module, axis, **options)
        layer.adopt(module)
        return layer

    @classmethod
    def like(cls, whole: nn.Module, axis: AxisLike, **options: Any) -> Self:
        """Return the layer that a whole ``nn.Linear`` becomes, without weights yet."""
        need_plain(whole, nn.Linear)
        make: Any = cls  # the two classes have constructors of their own
        bias, dtype = whole.bias is not None, whole.weight.dtype
        layer: Self = make(
            whole.in_features, whole.out_features, bias, axis=axis, device="meta", dtype=dtype, **options
        )
        return layer

    def extra_repr(self) -> str:
        """Show the logical sizes and this rank's."""
        return (
            f"{self.input_size} → {self.output_size}, here {self.in_features} → {self.out_features}, "
            f"bias={self.bias is not None}, {self.axis.name}={self.axis.rank}/{self.axis.size}"
        )


class ColumnParallelLinear(_ParallelLinear):
    """A linear layer whose output features are divided over an axis.

    Args:
        input_size: logical size of the input.
        output_size: logical size of the output; the ranks need not divide it.
        bias: whether there is one; it is cut like the output.
        axis: over which to cut.
        gather_output: whether every rank gets the whole output, in logical order.
        sequence_parallel_enabled: whether the input holds this rank's tokens only. They are gathered, and the input's
            gradient is reduce-scattered. The ranks tell each other their lengths first.
        sequence_dimension: the dimension of the tokens.
        disable_grad_reduce: whether the input's gradient is left partial because something before this layer sums it.
        cut: which rows each rank holds, if not the even cut: head orders, fused projections.
        parts: names and lengths of the projections fused in this layer, each adapted by itself.
        groups: lengths of the runs of rows that lie on different numbers of ranks, where it is adapted as one.
        device: of the parameters.
        dtype: of the parameters.

    Where the cut holds rows on several ranks (key/value heads on more ranks than heads), the gradient of a *trained*
    weight is partial over the axis (``layout.summed``): each copy has that of its own use. Nothing is sent for that
    here, and nothing has to be for a frozen one.

    Raises:
        LayoutError: the cut does not fit, or the output is to be gathered from several copies of a row.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        bias: bool = True,
        *,
        axis: AxisLike,
        gather_output: bool = True,
        sequence_parallel_enabled: bool = False,
        sequence_dimension: int = -2,
        disable_grad_reduce: bool = False,
        cut: Cut | None = None,
        parts: tuple[tuple[str, int], ...] = (),
        groups: tuple[int, ...] = (),
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        axis = axis_of(axis)
        cut = cut or even(axis.name, "out", output_size, axis.size)
        if gather_output and cut.copies > 1:
            raise LayoutError("gather_output: some rows lie on several ranks, and their gradients would count twice")
        layout = Layout({"out": output_size, "in": input_size}, (cut,), parts, groups=groups)
        self._build(axis, layout, bias, device, dtype)
        self.gather_output = gather_output
        self.sequence_parallel_enabled = sequence_parallel_enabled
        self.sequence_dimension = sequence_dimension
        self.disable_grad_reduce = disable_grad_reduce

    def product(self, x: Tensor) -> Tensor:
        """Return this rank's output features for the whole input."""
        return F.linear(x, self.weight, self.bias)

    def spanning(self, x: Tensor) -> Tensor:
        """Return this rank's output features for the input as it is here: what the product needs of it is gathered."""
        if self.sequence_parallel_enabled:
            self._lengths = lengths(x, self.axis, self.sequence_dimension)
            x = sequence_gather(x, self.axis, self.sequence_dimension, self._lengths)
        elif not self.disable_grad_reduce:
            x = enter(x, self.axis)
        return self.product(x)

    def carry(self, h: Tensor) -> Tensor:
        """Gather hidden values of this rank's tokens, as the last :meth:`spanning` gathered the input."""
        return sequence_gather(h, self.axis, self.sequence_dimension, self._lengths)

    def forward(self, input: Tensor) -> Tensor:
        """Return the output, whole or this rank's features."""
        output = self.spanning(input)
        return self._whole(output) if self.gather_output else output

    def _whole(self, output: Tensor) -> Tensor:
        (cut,) = self.layout.cuts
        output = gather(output, self.axis, -1, [cut.length(rank) for rank in range(cut.size)])
        order = held_order(cut, output.device)
        return output if order is None else output.index_select(-1, order.argsort())


class RowParallelLinear(_ParallelLinear):
    """A linear layer whose input features are divided over an axis; the outputs of the ranks are summed.

    Args:
        input_size: logical size of the input; the ranks need not divide it.
        output_size: logical size of the output.
        bias: whether there is one; every rank has all of it, and it is added once, after the sum. With
            ``sequence_parallel_enabled`` its gradient is partial: it sees this rank's tokens.
        axis: over which to cut.
        input_is_parallel: whether the input holds this rank's features only, in the order of the cut.
        sequence_parallel_enabled: whether each rank gets its tokens of the sum only.
        sequence_dimension: the dimension of the tokens.
        cut: which columns each rank holds, if not the even cut.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        LayoutError: the cut does not fit.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        bias: bool = True,
        *,
        axis: AxisLike,
        input_is_parallel: bool = False,
        sequence_parallel_enabled: bool = False,
        sequence_dimension: int = -2,
        cut: Cut | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        axis = axis_of(axis)
        cut = cut or even(axis.name, "in", input_size, axis.size)
        if cut.copies > 1:
            raise LayoutError("a column of a row-parallel weight lies on several ranks and would count twice")
        self._build(axis, Layout({"out": output_size, "in": input_size}, (cut,)), bias, device, dtype)
        self.input_is_parallel = input_is_parallel
        self.sequence_parallel_enabled = sequence_parallel_enabled
        self.sequence_dimension = sequence_dimension

    def product(self, x: Tensor) -> Tensor:
        """Return this rank's summand of the output, without the bias, for its own input features."""
        return F.linear(x, self.weight)

    def forward(self, input: Tensor) -> Tensor:
        """Return the output, for all tokens or this rank's."""
        if not self.input_is_parallel:
            input = self._own(input)
        output = self.spanning(input)
        return output if self.bias is None else output + self.bias

    def spanning(self, x: Tensor) -> Tensor:
        """Return the sum of all ranks' products, for all tokens or this rank's, without the bias."""
        if self.sequence_parallel_enabled:
            return sequence_reduce(self.product(x), self.axis, self.sequence_dimension)
        return leave(self.product(x), self.axis)

    def carry(self, h: Tensor) -> Tensor:
        """Sum hidden values over the ranks, each of which keeps those of its tokens."""
        return sequence_swap(h, self.axis, self.sequence_dimension)

    def _own(self, input: Tensor) -> Tensor:
        (cut,) = self.layout.cuts
        order = held_order(cut, input.device)
        if order is not None:
            input = input.index_select(-1, order)
        return split(input, self.axis, -1, [cut.length(rank) for rank in range(cut.size)])


__all__ = ["ColumnParallelLinear", "RowParallelLinear"]
