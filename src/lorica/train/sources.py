"""Where rows come from: local files and hub datasets, read by ``datasets``; and what is held out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lorica.errors import RecipeError, suggest, suggest_path
from lorica.train import data
from lorica.train.data import Example, Format
from lorica.train.paths import meant_as_path
from lorica.train.recipe import DataSection
from lorica.train.vision import Sight

_BUILDERS = {
    ".jsonl": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".txt": "text",
}


def rows(path: str, *, name: str | None = None, split: str = "train") -> Any:
    """Read a file or a hub dataset as a ``datasets.Dataset``.

    Raises:
        RecipeError: it is not there, of no known type, damaged, empty, or has no such split.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        raise RecipeError(f"{path} is a directory; name one file in it{suggest_path(file / 'train.jsonl')}")
    if not file.exists() and (file.suffix.lower() in _BUILDERS or meant_as_path(path)):
        raise RecipeError(f"There is no data file {path}.{suggest_path(file)}")
    found = _load_file(file, split) if file.exists() else _load_hub(path, name, split)
    if len(found) == 0:
        raise RecipeError(f"{path} holds no rows")
    return found


def form_of(table: Any, section: DataSection) -> Format:
    """The format in which ``table`` is to be read."""
    return Format.detect(list(table.column_names), section.format, section.columns)


@dataclass
class Loaded:
    """The examples to learn from, those held out (none if the recipe wants none), and what the user should know."""

    training: list[Example]
    held_out: list[Example]
    notes: list[str]


def load(section: DataSection, tokenizer: Any, max_length: int, seed: int, sight: Sight | None = None) -> Loaded:
    """Read and tokenise what the recipe names.

    A share that is held out is a seeded choice of rows; of a single long text, its end.
    ``sight`` reads rows with images.

    Raises:
        RecipeError: the data cannot be read, does not fit its format, or leaves nothing to learn.
    """
    table = rows(section.train, name=section.name, split=section.split)
    held = _held_out(section)
    share = 0.0 if held is not None else section.eval_fraction
    chosen: list[int] = []
    if share and len(table) > 1:
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(table), generator=generator).tolist()
        chosen = sorted(order[: max(1, round(share * len(table)))])
    kept = sorted(set(range(len(table))) - set(chosen))
    notes: list[str] = []

    def tokenised(part: Any, source: str) -> list[Example]:
        if sight is not None:
            return _told(sight.examples(part, form_of(part, section), max_length), part, max_length, source, notes)
        found = data.examples(part, form_of(part, section), tokenizer, max_length)
        return _told(found, part, max_length, source, notes)

    training = tokenised(table.select(kept) if chosen else table, section.train)
    if chosen:
        return Loaded(training, tokenised(table.select(chosen), section.train), notes)
    if held is not None:
        return Loaded(training, tokenised(held, section.eval or section.train), notes)
    cut = len(training) - (max(1, round(share * len(training))) if share and len(training) > 1 else 0)
    return Loaded(training[:cut], training[cut:], notes)


def check(section: DataSection) -> Format:
    """Read the table's columns, without tokenising, and see that they fit; for ``lorica validate``."""
    form = form_of(rows(section.train, name=section.name, split=section.split), section)
    held = _held_out(section)
    if held is not None:
        form_of(held, section)
    return form


def _held_out(section: DataSection) -> Any:
    if section.eval is None and section.eval_split is None:
        return None
    return rows(section.eval or section.train, name=section.name, split=section.eval_split or "train")


def _told(made: tuple[list[Example], int], table: Any, max_length: int, source: str, notes: list[str]) -> list[Example]:
    found, left_out = made
    if not found:
        raise RecipeError(f"{source}: no example has anything to learn within data.max_length = {max_length} tokens")
    within = f"within data.max_length = {max_length} tokens"
    if left_out:
        notes.append(f"{source}: {left_out} of {len(table)} rows have nothing to learn {within} and are left out.")
    if cut := sum(example.cut for example in found):
        notes.append(f"{source}: {cut} of {len(found)} examples do not end {within} and are cut.")
    return found


def _load_file(file: Path, split: str) -> Any:
    import datasets

    builder = _BUILDERS.get(file.suffix.lower())
    if builder is None:
        raise RecipeError(f"{file}: data files end in {', '.join(_BUILDERS)}.{suggest(file.suffix.lower(), _BUILDERS)}")
    # A plain text is one document; cutting it into lines would lose what connects them.
    options: dict[str, Any] = {"sample_by": "document"} if builder == "text" else {}
    try:
        return datasets.load_dataset(builder, data_files=str(file), split=split, **options)
    except Exception as error:
        raise RecipeError(f"{file} cannot be read as {builder}: {_first_line(error)}") from None


def _load_hub(path: str, name: str | None, split: str) -> Any:
    import datasets

    try:
        return datasets.load_dataset(path, name, split=split)
    except Exception as error:
        raise RecipeError(
            f"{path} is neither a file here nor a dataset that can be read: {_first_line(error)}"
        ) from None


def _first_line(error: BaseException) -> str:
    """The innermost cause, which is the one that says what is wrong with the file."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines: Sequence[str] = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
