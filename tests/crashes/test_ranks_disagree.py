"""Ranks that are asked for different things, or find different things, stop before anything is written; all name the
rank and the field.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ranks
import torch
from rank_faults import SOON, TIMEOUT, Call, Outcome, attempt, prepare

import runs
from lorica.train import job, models, sources

ALIKE = Path("step-000001")


def other_seed() -> None:
    seed = job._seed
    job._seed = lambda number: seed(number + 1)


def fewer_rows() -> None:
    load = sources.load

    def loaded(*args: Any) -> sources.Loaded:
        found = load(*args)
        return sources.Loaded(found.training[:-1], found.held_out, found.notes)

    sources.load = loaded


def another_order() -> None:
    load = sources.load

    def loaded(*args: Any) -> sources.Loaded:
        found = load(*args)
        return sources.Loaded(found.training[::-1], found.held_out, found.notes)

    sources.load = loaded


def another_random_state() -> None:
    adapt = job.adapt

    def adapted(*args: Any, **options: Any) -> Any:
        model = adapt(*args, **options)
        torch.rand(1)
        return model

    job.adapt = adapted


def another_base_model() -> None:
    load = models.load_base

    def loaded(*args: Any, **options: Any) -> Any:
        base = load(*args, **options)
        with torch.no_grad():
            base.model.layers[1].mlp.down_proj.weight[3] += 1
        return base

    models.load_base = loaded


def a_checkpoint_of_its_own() -> None:
    job._place = lambda *args, **options: ALIKE


#: What a rank has of its own (settings, or what is done in it first) → what all ranks are told of.
SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "a setting of the adapter": ({"lora": {"r": 2}}, "lora.r: 2, not 4"),
    "the seed": ({"training": {"seed": 5}}, "training.seed: 5, not 0"),
    "the layout": ({"parallel": {"dp": 1, "tp": 2}}, "parallel.dp: 1, not 2"),
    "the directory": ({"output_dir": "elsewhere"}, "output_dir: elsewhere, not "),
}
FINDS: dict[str, tuple[Callable[[], None], str]] = {
    "the seed of the starts": (other_seed, "initial values of default/base_model.model"),
    "a row": (fewer_rows, "number of rows: [23, 6], not [24, 6]"),
    "the order of rows": (another_order, "tokens of the data: "),
    "the base model": (another_base_model, "weights of the base model: "),
    "the checkpoint": (a_checkpoint_of_its_own, "checkpoint to go on from: step-000001, not none"),
}


def merged(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    return values | {key: values[key] | new if isinstance(new, dict) else new for key, new in changes.items()}


def try_all(values: dict[str, Any], folder: Path) -> dict[str, tuple[list[Outcome], bool]]:
    """What became of the ranks, and whether anything was written."""
    prepare(values)
    output = Path(values["output_dir"])
    told = {}
    for name, (changes, _) in SETTINGS.items():
        own = [values, merged(values, changes)]
        told[name] = attempt(own, 2, folder / name), output.exists()
    for name, (change, _) in FINDS.items():
        odd = len(told) % 2

        def before(rank: int, change: Callable[[], None] = change, odd: int = odd) -> None:
            if rank == odd:
                change()

        told[f"{name}, rank {odd}"] = attempt(values, 2, folder / name, before=before), output.exists()
    cut = merged(values, {"parallel": {"dp": 1, "tp": 2}})
    masks = attempt(cut, 2, folder / "masks", before=lambda rank: another_random_state() if rank else None)
    told["the masks of dropout"] = masks, output.exists()
    four = merged(values, {"parallel": {"dp": 4}})
    own = [four, four, four, merged(four, {"lora": {"lora_alpha": 5}})]
    told["of four"] = attempt(own, 4, folder / "of four"), output.exists()
    return told


def test_ranks_that_differ_stop_before_anything_is_written(base: Path, data_file: Path, tmp_path: Path) -> None:
    values = runs.settings(base, data_file, tmp_path / "out", training__steps=1)
    values["training"]["batch_size"] = 4
    values["parallel"] = {"dp": 2, "timeout": TIMEOUT}
    (told,) = ranks.run(1, try_all, values, tmp_path / "tries", timeout=600)
    expected = {name: message for name, (_, message) in (SETTINGS | FINDS).items()} | {
        "the masks of dropout": "random state (dropout and sampling need the same one",
        "of four": "lora.lora_alpha: 5.0, not 8.0",
    }
    assert len(told) == len(expected)
    for name, (outcomes, written) in told.items():
        assert not written, name
        of = expected[name.partition(", rank")[0]]
        for outcome in outcomes:
            assert outcome.kind == "RankError", (name, outcomes)
            rank = "rank 3" if name == "of four" else "rank 1"
            assert f"{rank} differs from rank 0 in the " in outcome.said, (name, outcomes)
            assert _swapped(of, name) in outcome.said, (name, outcomes)


def stop_one(values: dict[str, Any], folder: Path) -> list[Outcome]:
    """What becomes of the ranks where one hangs in its first backward pass."""
    prepare(values)
    return attempt(values, 2, folder, victim=1, fault="stop", at=Call("torch.autograd", "backward"))


def test_a_rank_that_hangs_is_waited_for_as_long_as_the_recipe_says(
    base: Path, data_file: Path, tmp_path: Path
) -> None:
    values = runs.settings(base, data_file, tmp_path / "out", training__steps=1)
    values["parallel"] = {"dp": 2, "timeout": 8.0}
    ((waiting, hanging),) = ranks.run(1, stop_one, values, tmp_path / "tries", timeout=300)
    assert hanging.code == -signal.SIGKILL
    assert waiting.kind == "LostRankError", waiting
    assert "rank 1 gave no sign of life" in waiting.said, waiting
    assert 7 < waiting.late < 8 + SOON < TIMEOUT, waiting


def _swapped(message: str, name: str) -> str:
    """The message where it is rank 0 that has what is odd."""
    if not name.endswith(", rank 0") or ", not " not in message:
        return message
    field, _, values = message.partition(": ")
    odd, _, wanted = values.partition(", not ")
    return f"{field}: {wanted}, not {odd}"
