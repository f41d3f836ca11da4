"""Hostile adapters, each a directory that ``python tests/attacks/make.py DIRECTORY`` makes.

They belong to the tiny Llama of ``models.tiny_llama``. A good one is written first, then one thing about it is spoilt.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from good_adapter import CONFIG, FIRST_A, FIRST_B, RANK, WEIGHTS, good_config, good_tensors, write_good
from hostile_headers import CONTENTS, good_header, many_tensors, pickled, torch_pickle
from safetensors.torch import save
from torch import Tensor


class Attack(NamedTuple):
    """Something wrong with an adapter.

    Attributes:
        spoil: makes a good adapter's directory hostile.
        says: regular expression for what the error has to say of it: the field, the tensor, the reason.
        file: the file that the error has to name.
        but: doors that it does not concern: they do not look at what is wrong.
    """

    spoil: Callable[[Path], None]
    says: str
    file: str
    but: frozenset[str] = frozenset()


_ALL = frozenset(
    {"first", "first, warned", "load", "load over another", "swap", "configuration", "weights alone", "peft's model"}
    | {"peft's load", "automatic class", "inspect", "convert", "merge", "export"}
)
#: One for each way of being wrong, for doors that lead where others lead.
SAMPLE = frozenset(
    {"cut to the header", "weights: NaN", "config: alpha NaN", "config: 64 MB", "rank 20,000,000", "the wrong prefix"}
    | {f"a link to a device as {WEIGHTS}", "a pickle as the weights", "config: an expression that never ends"}
    | {"nothing but adapter_model.bin", "a factor of whole numbers"}
)
#: Doors that do not read the weights.
_NO_WEIGHTS = frozenset({"configuration"})
#: Doors that do not read the configuration.
_NO_CONFIG = frozenset({"load over another", "weights alone"})
#: Doors that do not know the model.
_NO_MODEL = frozenset({"weights alone", "configuration", "inspect", "convert"})
#: Doors that do not look for targets in a model.
_NO_TARGETS = frozenset({"load over another", "swap", "configuration", "weights alone", "inspect", "convert"})
#: Doors that warn of missing and unexpected tensors, as PEFT's do.
_LENIENT = frozenset({"first, warned", "peft's model", "peft's load", "automatic class"})


# ---- the weights ----------------------------------------------------------------------------------------------------


def _cuts() -> Iterator[tuple[str, int]]:
    """Yield where a good file is cut: at each boundary of its structure, and beside it."""
    header, data = good_header()
    begin = len(save(good_tensors())) - len(data)
    yield from (("nothing", 0), ("half the length", 4), ("the length", 8), ("half the header", begin // 2))
    yield from (("all but the header's end", begin - 1), ("the header", begin))
    for number, end in enumerate(sorted(value["data_offsets"][1] for value in header.values())):
        if begin + end < begin + len(data):
            yield f"{number + 1} tensors", begin + end
    yield "all but a byte", begin + len(data) - 1


# ---- what fits one another ------------------------------------------------------------------------------------------


@dataclass
class Adapter:
    """An adapter before it is written."""

    config: dict[str, Any] = field(default_factory=good_config)
    tensors: dict[str, Tensor] = field(default_factory=good_tensors)


def _rank(r: int, **other: Any) -> Callable[[Adapter], None]:
    return lambda adapter: adapter.config.update(r=r, **other)


def _names(change: Callable[[str], str | None]) -> Callable[[Adapter], None]:
    def spoil(adapter: Adapter) -> None:
        adapter.tensors = {new: value for name, value in adapter.tensors.items() if (new := change(name)) is not None}

    return spoil


def _tensor(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Adapter], None]:
    return lambda adapter: adapter.tensors.update({name: change(adapter.tensors[name])})


#: Doors that refuse a variant for other reasons, and those that warn of what is missing.
_NO_VARIANT = _NO_CONFIG | _LENIENT | {"configuration", "swap", "inspect", "convert", "merge", "export"}
_FITS: dict[str, tuple[Callable[[Adapter], None], str, str, frozenset[str]]] = {
    # the file that is named is the one that is wrong, or of two that differ the one with tensors
    "rank 20,000,000": (_rank(20_000_000), "r=20000000|20,000,000", "", _NO_CONFIG),
    "rank 1,000,000 of one layer": (
        _rank(RANK, rank_pattern={"layers.1.self_attn.v_proj": 1_000_000}),
        "r=1000000|rank_pattern",
        "",
        _NO_CONFIG | {"swap", "configuration"},
    ),
    "another rank than the tensors'": (_rank(8), r"layers\.0\.self_attn\.q_proj.* r=8", WEIGHTS, _NO_CONFIG | {"swap"}),
    "another rank than a layer's": (
        _rank(RANK, rank_pattern={"layers.0.self_attn.q_proj": 2}),
        r"layers\.0\.self_attn\.q_proj.* r=2",
        WEIGHTS,
        _NO_CONFIG | {"swap"},
    ),
    "A and B of two ranks": (
        _tensor(FIRST_B, lambda b: b[:, :3].clone()),
        "q_proj",
        WEIGHTS,
        frozenset({"weights alone"}),
    ),
    "A of a wider layer": (_tensor(FIRST_A, lambda a: a.repeat(1, 2)), FIRST_A, WEIGHTS, _NO_MODEL),
    "a factor of three dimensions": (
        _tensor(FIRST_A, lambda a: a[None]),
        "q_proj",
        WEIGHTS,
        frozenset({"weights alone"}),
    ),
    "a factor without elements": (_tensor(FIRST_A, lambda a: a[:0]), "q_proj", WEIGHTS, frozenset({"weights alone"})),
    "the wrong prefix": (
        _names(lambda name: name.removeprefix("base_model.model.")),
        r"(missing|unexpected).*layers\.0",
        WEIGHTS,
        _NO_MODEL | _LENIENT,
    ),
    "half the tensors": (
        _names(lambda name: name if "lora_A" in name else None),
        "lora_B|pair",
        WEIGHTS,
        frozenset({"weights alone"}) | _LENIENT,
    ),
    "half the layers": (
        _names(lambda name: name if "layers.0" in name else None),
        r"missing.*layers\.1",
        WEIGHTS,
        _NO_MODEL | _LENIENT | {"swap"},  # a swap leaves the other layers without an adapter
    ),
    "finite as it is stored, infinite as it is used": (
        _tensor(FIRST_A, lambda a: a.double() * 1e300),
        f"{FIRST_A} holds NaN or infinity",
        WEIGHTS,
        frozenset(),
    ),
    "a factor of whole numbers": (_tensor(FIRST_A, Tensor.long), f"{FIRST_A} holds torch.int64", WEIGHTS, frozenset()),
    "a factor of truth values": (_tensor(FIRST_A, Tensor.bool), f"{FIRST_A} holds torch.bool", WEIGHTS, frozenset()),
    "a factor of bytes": (_tensor(FIRST_B, Tensor.byte), f"{FIRST_B} holds torch.uint8", WEIGHTS, frozenset()),
    "a factor of complex numbers": (
        _tensor(FIRST_A, lambda a: a.to(torch.complex64)),
        f"{FIRST_A} is stored as C64",
        WEIGHTS,
        frozenset(),
    ),
    "DoRA without magnitudes": (_rank(RANK, use_dora=True), "missing.*magnitude", WEIGHTS, _NO_VARIANT),
    "VeLoRA without its tensors": (_rank(RANK, velora_config={}), "missing", WEIGHTS, _NO_VARIANT),
    "MonteCLoRA without its tensors": (_rank(RANK, monteclora_config={}), "missing", WEIGHTS, _NO_VARIANT),
    "another variant than what it replaces": (
        _rank(RANK, use_dora=True),
        "for use_dora, False != True",
        CONFIG,
        _ALL - {"swap"},
    ),
    "many rows for another adapter's": (
        _rank(RANK, trainable_token_indices=[*range(30)] * 10_000),
        "trainable_token_indices",
        CONFIG,
        _ALL - {"swap"},
    ),
    "tensors of no layer": (
        lambda adapter: adapter.tensors.update({"base_model.model.model.layers.9.lora_A.weight": torch.ones(1)}),
        r"layers\.9",
        WEIGHTS,
        frozenset({"weights alone", "inspect"}) | _LENIENT,
    ),
    "a weight of the base model": (
        lambda adapter: adapter.tensors.update({"base_model.model.model.norm.weight": torch.ones(16)}),
        r"model\.norm\.weight",
        WEIGHTS,
        frozenset({"weights alone", "inspect"}) | _LENIENT,
    ),
}


# ---- the configuration ----------------------------------------------------------------------------------------------


def _text(**fields: str) -> Callable[[], bytes]:
    """Return a configuration with fields of any text."""

    def content() -> bytes:
        known = {name: json.dumps(value) for name, value in good_config().items()} | fields
        return ("{" + ", ".join(f'"{name}": {value}' for name, value in known.items()) + "}").encode()

    return content


_CONFIGS: dict[str, tuple[Callable[[], bytes], str]] = {
    "alpha NaN": (_text(lora_alpha="NaN"), "lora_alpha"),
    "alpha infinite": (_text(lora_alpha="Infinity"), "lora_alpha"),
    "alpha minus infinity": (_text(lora_alpha="-Infinity"), "lora_alpha"),
    "alpha 1e400": (_text(lora_alpha="1e400"), "lora_alpha"),
    "alpha 1e30": (_text(lora_alpha="1e30"), "lora_alpha"),
    "alpha -1e30": (_text(lora_alpha="-1e30"), "lora_alpha"),
    "alpha of 10,000 digits": (_text(lora_alpha="9" * 10_000), "lora_alpha"),
    "alpha in words": (_text(lora_alpha='"16"'), "lora_alpha"),
    "alpha of one layer NaN": (_text(alpha_pattern='{"q_proj": NaN}'), r"alpha_pattern\.q_proj"),
    "alpha of one layer 1e30": (_text(alpha_pattern='{"q_proj": 1e30}'), "alpha_pattern"),
    "rank 0": (_text(r="0"), "`?r`? "),
    "rank -1": (_text(r="-1"), "`?r`? "),
    "rank 4.0": (_text(r="4.5"), "r="),
    "rank true": (_text(r="true"), "r="),
    "rank NaN": (_text(r="NaN"), "r: NaN"),
    "rank of 10,000 digits": (_text(r="9" * 10_000), "r: 9999"),
    "rank of one layer in words": (_text(rank_pattern='{"q_proj": "4"}'), "rank_pattern"),
    "100,000 lists": (_text(target_modules="[" * 100_000 + "]" * 100_000), "nested too deeply"),
    "900 lists": (_text(target_modules="[" * 900 + "]" * 900), "nested too deeply"),
    "900 objects": (_text(auto_mapping='{"a":' * 900 + "{}" + "}" * 900), "nested too deeply"),
    "64 MB": (lambda: _text(target_modules='"' + "a" * 64_000_000 + '"')(), "64,000,.* bytes is too large"),
    "64 MB of spaces": (lambda: _text()() + b" " * 64_000_000, "64,000,.* bytes is too large"),
    "two million empty objects": (_text(auto_mapping="[" + "{}," * 2_000_000 + "{}]"), "more values"),
    "700,000 keys": (
        lambda: b'{"a":{' + b",".join(b'"%x":1' % number for number in range(700_000)) + b"}}",
        "more values",
    ),
    "a key twice": (_text(r='4, "r": 4'), "'r' stands twice"),
    "the last of many keys twice": (
        lambda: b'{"a":{' + b",".join(b'"%x":1' % (number % 100_000) for number in range(100_001)) + b"}}",
        "'0' stands twice",
    ),
    "a list": (lambda: b"[]", "expected a JSON object"),
    "nothing": (lambda: b"", "not valid JSON"),
    "no UTF-8": (lambda: b'{"r": "\xff"}', "not valid JSON"),
    "UTF-16": (lambda: json.dumps(good_config()).encode("utf-16"), "not valid JSON"),
    "NUL in a name": (_text(target_modules=r'["q_proj\u0000"]'), r"target_modules\[0\]: holds NUL"),
    "half a character in a name": (_text(target_modules=r'["q_proj\ud800"]'), r"target_modules\[0\]: .* half"),
    "half a character as a key": (_text(alpha_pattern=r'{"\ud800": 1}'), r"alpha_pattern\.\\ud800: .* half"),
    "another method": (_text(peft_type='"IA3"'), "peft_type|kind"),
    "a task that is none": (_text(task_type='"os.system"'), "task"),
    "an expression that is none": (_text(target_modules='"(((((("'), "target_modules"),
    "a dtype that is a function": (_text(lora_dtype='"compile"'), "lora_dtype"),
    "a dtype that is a module": (_text(lora_dtype='"distributed"'), "lora_dtype"),
    "a core that is a module": (_text(megatron_config="{}", megatron_core='"antigravity"'), "megatron_core"),
    "a start by a path": (_text(init_lora_weights='"os.system"'), "initialization"),
}
#: Configurations that not all doors refuse: content, what is said, the doors that do not look at it.
_TARGETS: dict[str, tuple[Callable[[], bytes], str, frozenset[str]]] = {
    "no method": (_text(peft_type="null"), "peft_type", _NO_CONFIG | {"configuration"}),
    "40,000 layers": (
        _text(layer_replication="[" + "[0,2]," * 20_000 + "[0,2]]"),
        "layer_replication",
        _NO_CONFIG,
    ),
    "an expression that never ends": (
        _text(target_modules=r'"((a|[a-z_.0-9])*)*!"'),
        "[Tt]arget.modules",
        _NO_TARGETS,
    ),
    "100,000 patterns": (
        lambda: _text(target_modules=json.dumps([f"*{number}*proj" for number in range(100_000)]))(),
        "target_modules",
        _NO_TARGETS,
    ),
    "modules that are not there": (
        _text(target_modules='["__class__", "os.system"]'),
        "[Tt]arget.modules",
        _NO_TARGETS,
    ),
    "layers that are not there": (
        _text(layer_replication="[[0, 9]]"),
        "layer_replication",
        _NO_TARGETS | {"load", "peft's load", "merge", "export"},  # which have no place for layer_replication at all
    ),
}


# ---- where things lie -----------------------------------------------------------------------------------------------


def _instead(name: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return spoil


def _link_out(path: Path) -> None:
    other = path.parent.parent / "elsewhere" / path.name
    other.parent.mkdir(exist_ok=True)
    other.write_bytes(save(good_tensors()) if path.name == WEIGHTS else json.dumps(good_config()).encode())
    path.symlink_to(other)


def _link_up(path: Path) -> None:
    _link_out(path)
    path.unlink()
    path.symlink_to(Path("..", "elsewhere", path.name))


_NO_FILE = "not a regular file|holds no adapter_config.json|Can't find 'adapter_config.json'"
_PLACED: dict[str, tuple[Callable[[Path], object], str]] = {
    "a link out": (_link_out, "leads out of"),
    "a link up": (_link_up, "leads out of"),
    "a link to a device": (lambda path: path.symlink_to("/dev/zero"), _NO_FILE),
    "a link to itself": (lambda path: path.symlink_to(path.name), _NO_FILE),
    "a link to nothing": (lambda path: path.symlink_to("nothing"), _NO_FILE),
    "a link to a directory": (lambda path: path.symlink_to("/"), _NO_FILE),
    "a pipe": (lambda path: os.mkfifo(path), _NO_FILE),
    "a directory": (lambda path: path.mkdir(), _NO_FILE),
}


# ---- all of them ----------------------------------------------------------------------------------------------------


def _content(name: str, content: Callable[[], bytes]) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content()) and None


def _configured(content: Callable[[], bytes]) -> Callable[[Path], None]:
    """Return what writes a configuration that names the base model which the good one names."""
    field = '"base_model_name_or_path": '

    def spoil(folder: Path) -> None:
        base = json.loads((folder / CONFIG).read_text())["base_model_name_or_path"]
        (folder / CONFIG).write_bytes(content().replace(f'{field}"base"'.encode(), (field + json.dumps(base)).encode()))

    return spoil


def _fitted(change: Callable[[Adapter], None]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        adapter = Adapter(json.loads((folder / CONFIG).read_text()))
        change(adapter)
        (folder / CONFIG).write_text(json.dumps(adapter.config))
        (folder / WEIGHTS).write_bytes(save(adapter.tensors))

    return spoil


def _cut(place: int) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / WEIGHTS, place)


def attacks() -> dict[str, Attack]:
    """Return every attack by its name."""
    found = {f"cut to {name}": Attack(_cut(place), "not a readable", WEIGHTS, _NO_WEIGHTS) for name, place in _cuts()}
    found |= {
        f"weights: {n}": Attack(_content(WEIGHTS, make), says, WEIGHTS, _NO_WEIGHTS)
        for n, (make, says) in CONTENTS.items()
    }
    found |= {
        f"config: {n}": Attack(_configured(make), says, CONFIG, _NO_CONFIG) for n, (make, says) in _CONFIGS.items()
    }
    found |= {
        n: Attack(_fitted(change), says, file, but | (_NO_WEIGHTS if file else frozenset()))
        for n, (change, says, file, but) in _FITS.items()
    }
    found |= {f"config: {n}": Attack(_configured(make), says, CONFIG, but) for n, (make, says, but) in _TARGETS.items()}
    found["100,000 empty tensors"] = Attack(
        _content(WEIGHTS, lambda: many_tensors(100_000, stem=f"{FIRST_A}.")),
        "missing|unexpected|factor",
        WEIGHTS,
        _NO_WEIGHTS
        | _LENIENT
        | {"weights alone", "load over another", "load", "convert", "export"},  # as long as the others
    )
    for name, but in ((WEIGHTS, _NO_WEIGHTS), (CONFIG, _NO_CONFIG)):
        found |= {
            f"{n} as {name}": Attack(_instead(name, make), says, name, but) for n, (make, says) in _PLACED.items()
        }
    found["a pickle as the weights"] = Attack(
        lambda folder: (folder / WEIGHTS).write_bytes(pickled(folder)) and None, "pickle", WEIGHTS, _NO_WEIGHTS
    )
    found["a file of torch.save as the weights"] = Attack(
        _instead(WEIGHTS, torch_pickle), "pickle", WEIGHTS, _NO_WEIGHTS
    )
    found["a pickle as the configuration"] = Attack(
        lambda folder: (folder / CONFIG).write_bytes(pickled(folder)) and None, "not valid JSON", CONFIG, _NO_CONFIG
    )
    for name in ("adapter_model.bin", "adapter_model.pt", "pytorch_model.bin"):
        found[f"nothing but {name}"] = Attack(
            lambda folder, name=name: _instead(WEIGHTS, lambda path: torch_pickle(path.with_name(name)))(folder),
            "a pickle can run code",
            name,
            _NO_WEIGHTS,
        )
    return found


def main(folder: Path) -> None:
    """Write every attack into a directory of its own."""
    for number, (name, attack) in enumerate(attacks().items()):
        place = folder / f"{number:03} {''.join(c if c.isalnum() else '-' for c in name)}" / "adapter"
        write_good(place)
        attack.spoil(place)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
