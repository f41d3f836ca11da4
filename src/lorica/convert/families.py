"""Names: which of transformers' layers are which of Megatron's. Data, and the few lines that look it up.

Megatron's decoder is one class for Llama, Mistral, Qwen and their like, so one table serves them; what differs between
their classes in transformers is how some layers are spelled.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from lorica.errors import ExportError


@dataclass(frozen=True)
class Slot:
    """One linear layer of a Megatron decoder layer.

    Attributes:
        module: its name inside the layer; of an expert's, without the expert.
        hf: the layers of transformers that it is, in the order of its logical rows; ``{e}`` is an expert's number.
        parts: what Megatron Bridge calls each of them (``adapter_q``); empty: it is one.
    """

    module: str
    hf: tuple[str, ...]
    parts: tuple[str, ...] = ()

    @property
    def is_expert(self) -> bool:
        """Whether there is one for each routed expert."""
        return "{e}" in self.hf[0]

    def part_module(self, part: str) -> str:
        """Return the name that lorica gives one of its projections on Megatron's layers."""
        head, _, leaf = self.module.rpartition(".")
        return f"{head}.linear_{part}" if leaf == "linear_qkv" else f"{head}.{leaf}_{part}"


def _mlp(module: str, hf: str, *, gated: bool) -> list[Slot]:
    fc1 = Slot(f"{module}.linear_fc1", (f"{hf}.gate_proj", f"{hf}.up_proj"), ("gate", "up"))
    plain = Slot(f"{module}.linear_fc1", (f"{hf}.up_proj",))
    return [fc1 if gated else plain, Slot(f"{module}.linear_fc2", (f"{hf}.down_proj",))]


@cache
def slots(*, gated: bool = True) -> tuple[Slot, ...]:
    """Return the linear layers of a Megatron decoder layer."""
    projections = tuple(f"self_attn.{letter}_proj" for letter in "qkv")
    return (
        Slot("self_attention.linear_qkv", projections, ("q", "k", "v")),
        Slot("self_attention.linear_proj", ("self_attn.o_proj",)),
        Slot("mlp.router", ("mlp.gate",)),
        *_mlp("mlp.experts", "mlp.experts.{e}", gated=gated),
        *_mlp("mlp.shared_experts", "mlp.shared_expert", gated=gated),
        *_mlp("mlp", "mlp", gated=gated),
    )


#: Layers outside of the decoder's: Megatron's name → transformers', with the prefix of the language model.
_OUTSIDE = {"output_layer": "lm_head", "embedding.word_embeddings": "{root}embed_tokens"}
#: Where the language model stands: Megatron's prefix → transformers'.
_ROOTS = {"": "model.", "language_model.": "model.language_model."}
#: How files of some architectures spell what others call by the table's names.
SPELLINGS: dict[str, dict[str, str]] = {
    "mixtral": {
        "block_sparse_moe.experts.{e}.w1": "mlp.experts.{e}.gate_proj",
        "block_sparse_moe.experts.{e}.w3": "mlp.experts.{e}.up_proj",
        "block_sparse_moe.experts.{e}.w2": "mlp.experts.{e}.down_proj",
        "block_sparse_moe.gate": "mlp.gate",
    },
    "shared_experts": {
        f"mlp.shared_experts.{leaf}": f"mlp.shared_expert.{leaf}" for leaf in ("gate_proj", "up_proj", "down_proj")
    },
}
_SHARED_EXPERTS = frozenset({"deepseek_v2", "deepseek_v3", "glm4_moe", "ernie4_5_moe"})


def spelling_of(names: Iterable[str]) -> str:
    """Return how these names spell experts; empty: as the table does."""
    names = list(names)
    for spelling in SPELLINGS:
        if any(respelled(name, spelling) != name for name in names):
            return spelling
    return ""


def spelling_for(model_type: str) -> str:
    """Return how an architecture spells its experts."""
    return "shared_experts" if model_type in _SHARED_EXPERTS else ""


def respelled(name: str, spelling: str, *, back: bool = False) -> str:
    """Return a name in the table's spelling, or (``back``) a name of the table's in that of an architecture."""
    for theirs, ours in SPELLINGS.get(spelling, {}).items():
        known, wanted = (ours, theirs) if back else (theirs, ours)
        if match := _template(known).fullmatch(name):
            return match["before"] + wanted.format(e=match.groupdict().get("e"))
    return name


@cache
def _template(name: str) -> re.Pattern[str]:
    return re.compile(r"(?P<before>(?:.*\.)?)" + re.escape(name).replace(r"\{e\}", r"(?P<e>\d+)"))


class Place(NamedTuple):
    """Where a layer is in a Megatron model.

    Attributes:
        root: prefix of the language model.
        layer: global number of the decoder layer; None: outside of them.
        expert: global number of the expert; None: not of one.
        module: the slot's module, or the name of a layer outside.
    """

    root: str
    layer: int | None
    expert: int | None
    module: str


def in_megatron(name: str, *, gated: bool = True) -> tuple[Place, int]:
    """Return where one of transformers' layers is in Megatron's model, and which of the slot's projections it is.

    Raises:
        ExportError: the table does not have it.
    """
    for root, prefix in _ROOTS.items():
        for module, outside in _OUTSIDE.items():
            if name == outside.format(root=prefix):
                return Place(root, None, None, module), 0
        match = re.fullmatch(rf"{re.escape(prefix)}layers\.(\d+)\.(.+)", name)
        found = None if match is None else _slot_of(match[2], gated)
        if match is not None and found is not None:
            slot, part, expert = found
            return Place(root, int(match[1]), expert, slot.module), part
    raise ExportError(f"{name}: not known which of Megatron's layers this is")


@cache
def _patterns(gated: bool) -> list[tuple[re.Pattern[str], Slot, int]]:
    return [
        (re.compile(re.escape(name).replace(r"\{e\}", r"(\d+)")), slot, part)
        for slot in slots(gated=gated)
        for part, name in enumerate(slot.hf)
    ]


def _slot_of(name: str, gated: bool) -> tuple[Slot, int, int | None] | None:
    for pattern, slot, part in _patterns(gated):
        if match := pattern.fullmatch(name):
            return slot, part, int(match[1]) if slot.is_expert else None
    return None


def in_transformers(place: Place, *, gated: bool = True) -> tuple[str, ...]:
    """Return the names of transformers' layers that a layer of Megatron's is, in the order of its logical rows.

    Raises:
        ExportError: the table does not have it.
    """
    prefix = _ROOTS.get(place.root)
    if prefix is not None and place.layer is None and place.module in _OUTSIDE:
        return (_OUTSIDE[place.module].format(root=prefix),)
    slot = slot_named(place.module, gated=gated)
    if prefix is None or slot is None or place.layer is None or slot.is_expert != (place.expert is not None):
        raise ExportError(f"{place.root}{place.module}: not known which of transformers' layers this is")
    return tuple(f"{prefix}layers.{place.layer}.{name.format(e=place.expert)}" for name in slot.hf)


def slot_named(module: str, *, gated: bool = True) -> Slot | None:
    """Return the slot of a module, or None."""
    return next((slot for slot in slots(gated=gated) if slot.module == module), None)


_ON_MEGATRON = re.compile(
    r"(?P<root>(?:language_model\.)?)(?:decoder\.layers\.(?P<layer>\d+)\.(?P<module>.+)"
    r"|(?P<outside>output_layer|embedding\.word_embeddings))"
)
_EXPERT = re.compile(r"mlp\.experts\.(?:local_)?experts\.(?P<expert>\d+)\.(?P<leaf>.+)")


def from_lorica_on_megatron(name: str, *, gated: bool = True) -> tuple[str, ...] | None:
    """Return transformers' names of a layer that lorica adapted in Megatron's model; None: it is named otherwise.

    A projection of a fused layer (``…self_attention.linear_q``) is one layer, the fused one as a whole several.
    """
    match = _ON_MEGATRON.fullmatch(name)
    if match is None:
        return None
    if match["outside"]:
        return in_transformers(Place(match["root"], None, None, match["outside"]))
    module, expert = match["module"], None
    if inner := _EXPERT.fullmatch(module):
        module, expert = f"mlp.experts.{inner['leaf']}", int(inner["expert"])
    for slot in slots(gated=gated):
        names = [slot.module, *(slot.part_module(part) for part in slot.parts)]
        if module in names and slot.is_expert == (expert is not None):
            found = in_transformers(Place(match["root"], int(match["layer"]), expert, slot.module), gated=gated)
            number = names.index(module)
            return found if number == 0 else (found[number - 1],)
    return None


def on_megatron(name: str, *, gated: bool = True) -> str:
    """Return the name that lorica gives one of transformers' layers in Megatron's model.

    Raises:
        ExportError: the table does not have it.
    """
    place, part = in_megatron(name, gated=gated)
    if place.layer is None:
        return f"{place.root}{place.module}"
    slot = slot_named(place.module, gated=gated)
    assert slot is not None
    module = slot.part_module(slot.parts[part]) if slot.parts else slot.module
    if place.expert is not None:
        module = module.replace("mlp.experts.", f"mlp.experts.local_experts.{place.expert}.", 1)
    return f"{place.root}decoder.layers.{place.layer}.{module}"


__all__ = [
    "Place",
    "Slot",
    "from_lorica_on_megatron",
    "in_megatron",
    "in_transformers",
    "on_megatron",
    "respelled",
    "slot_named",
    "slots",
    "spelling_for",
    "spelling_of",
]
