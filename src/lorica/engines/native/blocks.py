"""The parts of a Llama-like transformers model, found by their structure, and how each is to be cut."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lorica.engines.native.base import Native, need_plain
from lorica.engines.native.embedding import ParallelEmbedding
from lorica.engines.native.gqa import NAMES
from lorica.engines.native.layers import ColumnParallelLinear, RowParallelLinear
from lorica.engines.site import Axis
from lorica.errors import LayoutError
from lorica.layout import Cut, HeadOrder, fused, grouped_heads


@dataclass
class Change:
    """One module that a cut layer will stand in for.

    Attributes:
        name: its full name.
        parent: the module it is in.
        whole: it.
        cut: the layer, without its weights yet.
    """

    name: str
    parent: nn.Module
    whole: nn.Module
    cut: Native

    def apply(self) -> None:
        """Take the weights and take the place."""
        self.cut.adopt(self.whole)
        setattr(self.parent, self.name.rpartition(".")[2], self.cut)


@dataclass
class Block:
    """An attention or MLP block that is cut.

    Attributes:
        module: it.
        changes: its layers.
        heads: the heads of every rank, of an attention block.
        inside: modules with parameters that each rank uses for its own heads only.
    """

    module: nn.Module
    changes: list[Change]
    heads: HeadOrder | None = None
    inside: list[nn.Module] = field(default_factory=list)


def decoder_of(model: nn.Module) -> tuple[str, nn.Module]:
    """Return the name and the module that has the decoder ``layers`` and the final ``norm``.

    Raises:
        LayoutError: there is none, or several.
    """
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(layers := getattr(module, "layers", None), nn.ModuleList)
        and isinstance(getattr(module, "norm", None), nn.Module)
        and any(hasattr(layer, "self_attn") for layer in layers)
    ]
    if len(found) != 1:
        raise LayoutError(
            f"a {type(model).__name__} has {len(found)} modules with decoder layers (of a self_attn and an mlp) and a "
            "norm after them; one is needed"
        )
    return found[0]


def children_with_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the direct children that have parameters."""
    for name, child in module.named_children():
        if any(True for _ in child.parameters()):
            yield name, child


class Cutter:
    """Plans the cut of each part over one axis.

    Args:
        axis: over which to cut.
        sequence_parallel: whether what leaves a block is this rank's tokens.
    """

    def __init__(self, axis: Axis, *, sequence_parallel: bool) -> None:
        self.axis = axis
        self.sequence_parallel = sequence_parallel

    def column(self, parent: nn.Module, name: str, **options: Any) -> Change:
        """Plan a column-parallel layer behind a collective that its block has.

        A weight that is fused in the whole model too has no parts: it is one target with one pair of factors.
        """
        return self._change(
            ColumnParallelLinear, parent, name, gather_output=False, disable_grad_reduce=True, **options
        )

    def row(self, parent: nn.Module, name: str, cut: Cut | None = None) -> Change:
        """Plan a row-parallel layer at the end of a block."""
        return self._change(
            RowParallelLinear,
            parent,
            name,
            cut=cut,
            input_is_parallel=True,
            sequence_parallel_enabled=self.sequence_parallel,
        )

    def head(self, parent: nn.Module, name: str) -> Change:
        """Plan a head that gives every rank all its outputs."""
        return self._change(ColumnParallelLinear, parent, name)

    def embedding(self, parent: nn.Module, name: str) -> Change:
        """Plan an embedding divided by words."""
        return self._change(ParallelEmbedding, parent, name)

    def _change(self, cls: type[Native], parent: nn.Module, name: str, **options: Any) -> Change:
        short = name.rpartition(".")[2]
        whole = parent.get_submodule(short)
        try:
            return Change(name, parent, whole, cls.like(whole, self.axis, **options))
        except LayoutError as error:
            raise LayoutError(f"{name}: {error}") from error

    def attention(self, name: str, module: Any, config: Any, multiplier: int | None, order: Any) -> Block:
        """Plan an attention block with ``q_proj``, ``k_proj``, ``v_proj`` (or ``qkv_proj``) and ``o_proj``.

        Raises:
            LayoutError: it has something else, or its heads cannot be divided.
        """
        children = dict(children_with_parameters(module))
        joined = "qkv_proj" in children
        projections = {"qkv_proj"} if joined else {*NAMES}
        self._expect(name, module, {*projections, "o_proj"}, {"q_norm", "k_norm"})
        head_dim: int = getattr(module, "head_dim", None) or config.hidden_size // config.num_attention_heads
        need_plain(module.o_proj, nn.Linear, f"{name}.o_proj")
        query, kv = module.o_proj.in_features, _kv_size(name, module, config, head_dim, joined)
        try:
            heads = grouped_heads(self.axis.size, query // head_dim, kv // head_dim, multiplier=multiplier, order=order)
        except LayoutError as error:
            raise LayoutError(f"{name}: {error}") from error
        for norm in children.keys() - projections - {"o_proj"}:
            if any(parameter.shape != (head_dim,) for parameter in children[norm].parameters()):
                raise LayoutError(f"{name}.{norm} works across heads, which lie on different ranks")
        axis = self.axis.name
        if joined:
            cut = heads.qkv_cut(axis, head_dim)
            changes = [self.column(module, f"{name}.qkv_proj", cut=cut, groups=(query, kv, kv))]
        else:
            cuts = (heads.query_cut(axis, head_dim), *2 * (heads.kv_cut(axis, head_dim),))
            changes = [self.column(module, f"{name}.{part}", cut=cut) for part, cut in zip(NAMES, cuts, strict=True)]
        changes.append(self.row(module, f"{name}.o_proj", heads.query_cut(axis, head_dim, dim="in")))
        return Block(module, changes, heads, [children[norm] for norm in ("q_norm", "k_norm") if norm in children])

    def mlp(self, name: str, module: nn.Module) -> Block:
        """Plan an MLP of ``gate_proj`` and ``up_proj`` (or ``gate_up_proj``, or ``up_proj`` alone) and ``down_proj``.

        Raises:
            LayoutError: it has something else.
        """
        children = dict(children_with_parameters(module))
        if "gate_up_proj" in children:
            self._expect(name, module, {"gate_up_proj", "down_proj"}, set())
            need_plain(children["gate_up_proj"], nn.Linear, f"{name}.gate_up_proj")
            half = children["gate_up_proj"].weight.shape[0] // 2  # type: ignore[index]
            cut = fused(self.axis.name, "out", (half, half), self.axis.size)
            changes = [self.column(module, f"{name}.gate_up_proj", cut=cut)]
        else:
            self._expect(name, module, {"up_proj", "down_proj"}, {"gate_proj"})
            changes = [self.column(module, f"{name}.{part}") for part in ("gate_proj", "up_proj") if part in children]
        return Block(module, [*changes, self.row(module, f"{name}.down_proj")])

    def _expect(self, name: str, module: nn.Module, needed: set[str], allowed: set[str]) -> None:
        found = {child for child, _ in children_with_parameters(module)}
        found |= {own for own, _ in module.named_parameters(recurse=False)}
        if not needed <= found <= needed | allowed:
            raise LayoutError(
                f"{name}: {sorted(found)} is not {sorted(needed)} (with or without {sorted(allowed)}), so what it "
                "computes is not known; name it in `whole` to leave it as it is on every rank"
            )


def _kv_size(name: str, module: Any, config: Any, head_dim: int, joined: bool) -> int:
    """Return the rows of the key projection, checked against those of the others."""
    query = module.o_proj.in_features
    if joined:
        need_plain(module.qkv_proj, nn.Linear, f"{name}.qkv_proj")
        kv: int = (module.qkv_proj.out_features - query) // 2
        right = query + 2 * kv == module.qkv_proj.out_features
    else:
        for part in NAMES:
            need_plain(getattr(module, part), nn.Linear, f"{name}.{part}")
        kv = module.k_proj.out_features
        right = module.q_proj.out_features == query and module.v_proj.out_features == kv
    stated = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    if not right or math.gcd(query, kv) % head_dim or kv != stated * head_dim:
        raise LayoutError(f"{name}: {query} query and {kv} key/value rows are not heads of {head_dim}")
    return kv


class LocalConfig:
    """A configuration seen from one attention block: its own head counts, everything else as in the model's.

    Args:
        config: the model's.
        **own: what differs.
    """

    def __init__(self, config: Any, **own: Any) -> None:
        self.__dict__.update(own, _whole=config)

    def __getattr__(self, name: str) -> Any:
        """Look in the model's configuration."""
        if name.startswith("__") or "_whole" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self._whole, name)


def set_heads(module: Any, query: int, kv: int) -> None:
    """Tell an attention block how many heads it has on this rank."""
    module.num_key_value_groups = query // kv
    for name in ("num_heads", "num_attention_heads"):
        if hasattr(module, name):
            setattr(module, name, query)
    if hasattr(module, "num_key_value_heads"):
        module.num_key_value_heads = kv
    if hasattr(module, "config"):
        module.config = LocalConfig(module.config, num_attention_heads=query, num_key_value_heads=kv)


__all__ = ["Block", "Change", "Cutter", "LocalConfig", "children_with_parameters", "decoder_of", "set_heads"]
