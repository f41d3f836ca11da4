"""What happens at the borders of blocks: one collective at each, with sequence parallelism or without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from lorica.engines.native.collectives import enter, gather, sequence_gather, shares, split
from lorica.engines.site import Axis

#: Dimension of the tokens in ``[batch, tokens, features]``.
TOKENS = 1


class Region:
    """The part of a model in which each rank of an axis has its tokens only: from the first decoder layer to the norm.

    Outside it everything is whole on every rank: positions, masks, embeddings, the last hidden state, logits. The
    length of the sequence is learnt at the first layer, and again by each attention block from the positions it is
    given, since activation checkpointing runs a layer again when other sequences have passed; so no rank has to ask.

    Args:
        axis: over which the tokens are divided: any number, also fewer than ranks.
    """

    def __init__(self, axis: Axis) -> None:
        self.axis = axis
        self.length = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Region:
        return self  # the hooks of a copied model are those of the first

    def begin(self, layer: nn.Module) -> None:
        """Divide the tokens before ``layer``."""
        layer.register_forward_pre_hook(self._divide, with_kwargs=True, prepend=True)

    def end(self, module: nn.Module) -> None:
        """Give every rank all tokens of what ``module`` returns."""
        module.register_forward_hook(self._gather)

    def learn(self, kwargs: dict[str, Any]) -> None:
        """Learn the length from the positions that a block is given, if it is."""
        positions = kwargs.get("position_ids")
        if isinstance(positions, Tensor):
            self.length = positions.shape[-1]

    def all_tokens(self, x: Tensor) -> Tensor:
        """Return all tokens, for a block that is cut."""
        return sequence_gather(x, self.axis, TOKENS, shares(self.length, self.axis.size))

    def _divide(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        def divided(x: Tensor) -> Tensor:
            self.length = x.shape[TOKENS]
            return split(x, self.axis, TOKENS)

        return on_first(args, kwargs, divided)

    def _gather(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return gather(output, self.axis, TOKENS, shares(self.length, self.axis.size))


def enter_block(block: nn.Module, axis: Axis, region: Region | None) -> None:
    """Put the one collective of a block's input before it: all of its column-parallel layers share it."""

    def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
        if region is None:
            return on_first(args, kwargs, lambda x: enter(x, axis))
        region.learn(kwargs)
        return on_first(args, kwargs, region.all_tokens)

    block.register_forward_pre_hook(hook, with_kwargs=True)


def on_first(args: tuple[Any, ...], kwargs: dict[str, Any], function: Callable[[Tensor], Tensor]) -> Any:
    """Return the arguments of a module with ``function`` applied to the first, the hidden states."""
    if args:
        return (function(args[0]), *args[1:]), kwargs
    name = "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs))
    return args, {**kwargs, name: function(kwargs[name])}


__all__ = ["TOKENS", "Region", "enter_block", "on_first"]
