"""The table layer × feature: every cell from a check that ran."""

from __future__ import annotations

import contextlib
import itertools
import re
import warnings
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path

import layouts
import torch
import torch.distributed as dist
from checks import FEATURES, Feature, NoMeaning
from layers import LAYERS, Layer

from lorica.errors import AdapterError, ConfigError, TargetError
from lorica.ops import OPS
from lorica.storage import KINDS

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "features.md"
YES, NO, NONE, FAULT = "✓", "✗", "–", "!"
_REFUSALS = (AdapterError, ConfigError, TargetError, NotImplementedError)
_HEAD = """# Layers and features

Every cell is the result of a check that ran (`tests/features/`); this page is written by `python
docs/make_features.py`, and a test compares it with what the checks say today. ✓: works, judged by dense float64
arithmetic where the layer can be had so. ✗: refused by name. –: has no meaning there. A number leads to the reason, or
to a remark.

The last table is of layouts: what the contract (`tests/parallel/test_contract.py`) tries there on ranks of their own,
against one process: factors, outputs, gradients, steps, merged weights and files.
"""


def cell(feature: Feature, layer: Layer) -> tuple[str, str]:
    """What a check says: a mark, and a reason or a remark, or what went wrong."""
    torch.default_generator.manual_seed(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return YES, words(feature.check(layer) or "")
    except NoMeaning as why:
        return NONE, str(why)
    except _REFUSALS as refusal:
        return NO, words(str(refusal))
    except Exception as error:
        return FAULT, f"{type(error).__name__}: {error}"


def words(text: str) -> str:
    """What a refusal or a remark says, without the names of the module and of the adapter."""
    text = " ".join(text.split())
    text = re.sub(r"(?:(?<=^)|(?<=is not merged: ))(?:[\w.]*\b(?:target|qkv_proj|gate|experts)\b[\w.]*: )+", "", text)
    text = text.replace("adapter 'default'", "this")
    text = re.sub(r"\b(?:model\.layers\.0\.)[\w.]+", "the parameter", text)
    text = re.sub(r"\bof the kind \w+", "of this kind", text)
    text = re.sub(r" \(\w*Linear\)", "", text)
    text = re.sub(r"\bstored as [\w. ]*?(?=:| already| cannot)", "stored so", text)
    text = re.sub(r"\binit_lora_weights='\w+'", "this start", text)
    text = re.sub(r"\(\d+(?:, \d+)*,?\)", "(…)", text)
    text = text.replace("|", "\\|")
    return text if len(text) <= 300 else f"{text[:297].rsplit(' ', 1)[0]} …"


def run(
    layers: Iterable[Layer] = LAYERS, features: Iterable[Feature] = FEATURES
) -> dict[tuple[str, str], tuple[str, str]]:
    """All cells, by the names of feature and layer.

    Raises:
        AssertionError: checks fail; all of them are named.
    """
    found, faults = {}, []
    there = [layer for layer in layers if layer.there]
    with one_rank():
        for feature, layer in itertools.product(features, there):
            mark, note = cell(feature, layer)
            if mark == FAULT:
                faults.append(f"{feature.name} on {layer.name}: {note}")
            found[feature.name, layer.name] = mark, note
    assert not faults, "\n".join(faults)
    return found


@contextlib.contextmanager
def one_rank() -> Iterator[None]:
    """A process group of this process alone, for what native layers would send."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def render(cells: dict[tuple[str, str], tuple[str, str]]) -> str:
    """The page."""
    notes: dict[str, int] = {}
    lines = [_HEAD]
    names = list(dict.fromkeys(layer for _, layer in cells))
    groups = dict.fromkeys(feature.group for feature in FEATURES)
    for group in groups:
        rows = [feature.name for feature in FEATURES if feature.group == group]
        lines += [f"## {group}", ""]
        lines.append("| layer | " + " | ".join(rows) + " |")
        lines.append("|---|" + ":-:|" * len(rows))
        for name in names:
            marks = [_mark(*cells[row, name], notes) for row in rows]
            lines.append(f"| {name} | " + " | ".join(marks) + " |")
        lines.append("")
    lines += _of_layouts(notes)
    lines += ["## Reasons and remarks", ""]
    lines += [f"{number}. {note}" for note, number in notes.items()]
    lines += ["", "## Not run", ""]
    lines.append(f"What needs a package that is not installed where this page was written: {', '.join(missing())}.")
    return "\n".join(lines) + "\n"


def _of_layouts(notes: dict[str, int]) -> list[str]:
    cases = layouts.names()
    lines = ["## Layouts: what the contract tries", ""]
    lines.append(f"| layout | ranks | {' | '.join(name.removeprefix('variant ') for name in cases)} | starts |")
    lines.append("|---|:-:|" + ":-:|" * (len(cases) + 1))
    for name, division in layouts.DIVISIONS.items():
        marks = []
        for case in cases:
            tried, why = layouts.cell(name, case)
            marks.append(YES if tried else _mark(NONE, words(why), notes))
        lines.append(f"| {name} | {division.ranks} | {' | '.join(marks)} | {layouts.starts(name)} |")
    return [*lines, ""]


def read(page: str) -> dict[tuple[str, str], tuple[str, str]]:
    """The cells of a page, by the names of column and row: a mark, and its reason or remark."""
    notes = dict(re.findall(r"^(\d+)\. (.*)$", page, re.MULTILINE))
    found = {}
    for group in re.findall(r"(?:^\|.*\n)+", page, re.MULTILINE):
        names, _, *rows = ([cell.strip() for cell in line[2:-2].split(" | ")] for line in group.splitlines())
        for name, *marks in rows:
            for column, cell in zip(names[1:], marks, strict=True):
                mark, _, note = cell.partition(" ")
                found[column, name] = mark, notes[note] if note else ""
    return found


def missing() -> list[str]:
    """Layers and registered classes whose package is not installed."""
    covered = {thing for layer in LAYERS for thing in layer.stands_for}
    names = [key for key in (*OPS, *KINDS) if isinstance(key, str) and key not in covered]
    absent = [f"`{name}`" for name in dict.fromkeys(names) if find_spec(name.partition(".")[0]) is None]
    return sorted([*(layer.name for layer in LAYERS if not layer.there), *absent])


def _mark(mark: str, note: str, notes: dict[str, int]) -> str:
    if not note:
        assert mark == YES
        return mark
    return f"{mark} {notes.setdefault(note, len(notes) + 1)}"
