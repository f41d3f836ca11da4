"""aLoRA: an adapter that sees a row only from its invocation on (https://arxiv.org/abs/2504.12397).

::

    tokens   the  prompt  so  far  │  <invocation>  the  answer …
    output   base model's          │  base + s·B·A

Before the invocation every hidden value is the base model's, bit for bit, so a cache of keys and values filled by the
base model (or by another such adapter) serves as it is. Where the invocation stands is worked out once per forward, by
the model (:mod:`lorica.model.rows`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from lorica.config.spec import AdapterSpec
from lorica.engines.native.collectives import lengths
from lorica.engines.stages import STAGES
from lorica.errors import AdapterError, TargetError
from lorica.init import Factors
from lorica.ops import Op
from lorica.variants.base import Hosting, Variant

_TOKENS = -2


class Alora(Variant):
    """Plain LoRA on the last tokens of each row; how many, the routed rows say.

    Nothing is sent, unless a layer that every rank has whole sees its rank's tokens only (sequence parallelism, outside
    of the blocks that are cut): there the ranks tell each other how many, in one small collective.
    """

    across: ClassVar[bool] = False  # its part depends on where in the row a token stands, which is known inside
    unmergeable: ClassVar[str] = "aLoRA does not support merging: tokens before the invocation keep the base weight"

    def check(self, op: Op, base: Any, spec: AdapterSpec, where: str) -> None:
        """Each token's output must be its own."""
        if not op.tokenwise:
            raise TargetError(f"{where}: alora_invocation_tokens is not supported for a layer of the kind {op.kind}")

    def add(self, y: Tensor, x: Tensor, layer: Hosting, factors: Factors, spec: AdapterSpec) -> Tensor:
        """Add the adapter's part to the tokens it sees: to none, where nobody said which (as in PEFT)."""
        offsets = _offsets(layer, spec)
        behind = _behind(layer, y)
        tokens = _tokens_per_row(y, len(offsets))
        reach = _reach(layer, spec, tokens, behind)
        if reach <= 0:
            return _nothing(y, x, layer, factors, spec)
        y_NTO = y.reshape(-1, tokens, y.shape[-1])
        x_NT = x.reshape(len(y_NTO), tokens, *(() if layer.op.lookup else x.shape[-1:]))
        seen_N = offsets.to(y.device).repeat_interleave(len(y_NTO) // len(offsets)) - behind
        before, after = y_NTO[:, : tokens - reach], y_NTO[:, tokens - reach :]
        part = layer.op.add(after, x_NT[:, tokens - reach :], layer, factors, spec)
        seen_NT = torch.arange(reach, 0, -1, device=y.device) <= seen_N.unsqueeze(1)
        part = torch.where(seen_NT.unsqueeze(-1), part, after)
        if torch.is_grad_enabled():
            return torch.cat([before, part], 1).view(y.shape)
        after.copy_(part)
        return y_NTO.view(y.shape)


def _reach(layer: Hosting, spec: AdapterSpec, tokens: int, behind: int) -> int:
    """Return how many of the last of these tokens hold all that the adapter sees.

    A compiled graph is made for all of them: how many it is stands in a tensor, on which no graph can be cut to size.
    """
    if layer.rows is None:
        return 0
    return tokens if torch.compiler.is_compiling() else min(layer.rows.reach(_name(layer, spec)) - behind, tokens)


def _name(layer: Hosting, spec: AdapterSpec) -> str:
    return next(name for name, known in layer.specs.items() if known is spec)


def _offsets(layer: Hosting, spec: AdapterSpec) -> Tensor:
    """Return for each row how many tokens the adapter sees: none, where nobody said."""
    if layer.rows is None:
        if _in_backward():
            raise AdapterError(
                f"{layer.target_name}: activation checkpointing ran this layer again without the rows of its batch. "
                "Checkpoint through the model's gradient_checkpointing_enable, or not at all"
            )
        if layer.site is not None and STAGES in layer.site.axes:
            raise AdapterError(
                f"{layer.target_name}: a pipeline's stages do not know which tokens activate an adapter; run the "
                "step inside `with lorica.route_rows(model, alora_offsets=…)`"
            )
        return torch.zeros(1, dtype=torch.long)
    return layer.rows.offsets[_name(layer, spec)]


def _in_backward() -> bool:
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _tokens_per_row(y: Tensor, rows: int) -> int:
    """Return how many tokens a row has: the length of the last dimension but one, or all there are of its tokens."""
    tokens = y.shape[_TOKENS] if y.dim() > 2 else y.shape[0] // rows
    if y.shape[:-1].numel() % (rows * tokens or 1):
        raise AdapterError(f"an output {tuple(y.shape)} cannot be divided among {rows} rows")
    return tokens


def _behind(layer: Hosting, y: Tensor) -> int:
    """Return how many of a row's tokens stand behind this rank's, on ranks that have tokens of their own."""
    count = 0
    for name in layer.site.layout.sequence if layer.site is not None else ():
        axis = layer.site.axes[name]  # type: ignore[union-attr]
        count += sum(lengths(y, axis, _TOKENS)[axis.rank + 1 :])
    return count


def _nothing(y: Tensor, x: Tensor, layer: Hosting, factors: Factors, spec: AdapterSpec) -> Tensor:
    """Return ``y``, with factors that get gradients of zero."""
    if not (torch.is_grad_enabled() and factors.a.requires_grad):
        return y
    empty = y.reshape(-1, y.shape[-1])[:0]
    none = x.reshape(-1)[:0] if layer.op.lookup else x.reshape(-1, x.shape[-1])[:0]
    part = layer.op.add(empty, none, layer, factors, replace(spec, dropout=0.0))
    return torch.cat([y.reshape(-1, y.shape[-1]), part]).view(y.shape)


__all__ = ["Alora"]
