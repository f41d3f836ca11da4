"""Real models and texts for the tests of trainers, and the libraries that are compared on them."""

from __future__ import annotations

import importlib
import itertools
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from models import randomise

LIBRARIES = ["peft", "lorica.compat.peft"]
DEMO = Path(__file__).resolve().parents[2] / "demo"
SHARED = Path(os.environ.get("LORICA_SHARED", Path(__file__).resolve().parents[3] / "shared"))
STORIES, SHAKESPEARE = SHARED / "models" / "stories260K", SHARED / "data" / "tinyshakespeare.txt"

#: The small Llama and the plays where they are, else what is shipped.
HERE = STORIES.is_dir() and SHAKESPEARE.is_file()


def library(name: str) -> Any:
    """Return peft, or lorica in its place: the one line that changes."""
    return importlib.import_module(name)


def demo_model() -> nn.Module:
    """The demonstration's base model."""
    return _model(DEMO / "base_model")


def small_llama() -> nn.Module:
    """A small Llama that was trained on TinyStories, or the demonstration's."""
    return _model(STORIES if HERE else DEMO / "base_model")


def tokenizer() -> Any:
    """The demonstration's tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(DEMO / "base_model")


def demo_rows(count: int) -> list[dict[str, str]]:
    """The first rows of the demonstration's training data: ``prompt`` and ``completion``."""
    with open(DEMO / "data" / "train.jsonl") as file:
        return [json.loads(line) for line, _ in zip(file, range(count), strict=False)]


def preferences(count: int) -> list[dict[str, str]]:
    """Prompts with the right record and with that of another order."""
    rows = demo_rows(count + 1)
    return [
        {"prompt": row["prompt"], "chosen": row["completion"], "rejected": other["completion"]}
        for row, other in itertools.pairwise(rows)
    ]


def pieces(count: int, length: int) -> list[dict[str, list[int]]]:
    """Pieces of Shakespeare's plays, or of the demonstration's data, as token ids of :func:`small_llama`."""
    from transformers import AutoTokenizer

    text = SHAKESPEARE.read_text() if HERE else "\n".join(row["prompt"] + row["completion"] for row in demo_rows(200))
    ids = AutoTokenizer.from_pretrained(STORIES if HERE else DEMO / "base_model")(text[: count * length * 8])[
        "input_ids"
    ]
    parts = [ids[start : start + length] for start in range(0, count * length, length)]
    return [{"input_ids": part, "labels": part} for part in parts]


def start(model: nn.Module) -> nn.Module:
    """Give an adapted model the factors that it has in the other library too."""
    return randomise(model, seed=5, scale=0.02)


def losses(trainer: Any) -> list[float]:
    """The losses that a trainer logged, step by step."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def assert_same_losses(ours: list[float], theirs: list[float], tolerance: float = 1e-5) -> None:
    """As many, finite, not all equal, and within ``tolerance`` of each other, relative to their size."""
    assert len(ours) == len(theirs) > 1
    assert len(set(theirs)) > 1
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=tolerance, atol=tolerance)


def _model(path: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model: nn.Module = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model
