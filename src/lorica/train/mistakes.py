"""What is wrong with a recipe, said in the words of its settings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from lorica.errors import shown, suggest

# What other tools call a setting; only used to suggest ours.
_ALIASES = {
    "rank": "r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "lr": "learning_rate",
    "max_steps": "steps",
    "num_train_epochs": "epochs",
    "gradient_accumulation_steps": "gradient_accumulation",
    "max_seq_length": "max_length",
    "save_steps": "every",
    "save_total_limit": "keep",
    "tensor_parallel": "tp",
    "tp_size": "tp",
    "sequence_parallel": "sp",
    "pp_size": "pp",
    "ep_size": "ep",
    "fsdp_size": "fsdp",
    "dp_size": "dp",
    "async": "asynchronous",
}


def explain(recipe: type[BaseModel], item: Mapping[str, Any]) -> str:
    """Return one line for a mistake: where, what, and the nearest thing that would be right.

    Args:
        recipe: the model of a whole recipe.
        item: one of pydantic's errors, with its place in the recipe.
    """
    location = [part for part in item["loc"] if isinstance(part, str)]
    fields: Mapping[str, Any] = recipe.model_fields
    known = list(fields)
    path: list[str] = []
    for part in location:
        path.append(part)
        if part not in fields:
            break
        inner = fields[part].annotation
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            break
        fields = inner.model_fields
        known = list(fields)
    where = ".".join(path)
    if item["type"] == "extra_forbidden":
        return f"{where}: unknown key.{_near(recipe, path, known)}"
    if item["type"] == "missing":
        return f"{where}: missing; it has no default"
    message = str(item["msg"]).removeprefix("Value error, ").removeprefix("Input should be ")
    expected = message if item["type"] == "value_error" else f"expected {message}, got {shown(repr(item['input']))}"
    return f"{where}: {expected}" if where else expected


def _near(recipe: type[BaseModel], path: Sequence[str], known: Iterable[str]) -> str:
    """The nearest key in the same section, else the same key in another section, else all keys there are."""
    known = list(known)
    if _ALIASES.get(path[-1]) in known:
        return f" Did you mean {_ALIASES[path[-1]]!r}?"
    if hint := suggest(path[-1], known):
        return hint
    elsewhere = [key for key in _all_keys(recipe) if key.endswith(f".{path[-1]}")]
    if elsewhere:
        return f" Did you mean {', '.join(map(repr, elsewhere))}?"
    return f" Known here: {', '.join(known)}."


def _all_keys(recipe: type[BaseModel]) -> list[str]:
    keys = []
    for section, field in recipe.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            keys += [f"{section}.{name}" for name in inner.model_fields]
        else:
            keys.append(section)
    return keys


__all__ = ["explain"]
