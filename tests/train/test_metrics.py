"""Records, trackers and the picture."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorica.errors import CheckpointError, MissingExtraError
from lorica.train import metrics
from lorica.train.recipe import LogSection

RECORDS = [
    {"kind": "eval", "step": 0, "loss": 3.0},
    {"kind": "train", "step": 2, "loss": 2.5},
    {"kind": "eval", "step": 2, "loss": 2.6},
    {"kind": "train", "step": 4, "loss": 2.0},
]


def write(path: Path, settings: LogSection) -> None:
    log = metrics.Metrics(path, settings, {})
    for record in RECORDS:
        log.write(record)
    log.sync()
    log.close()


def test_records_read_back_and_rewind_to_a_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, LogSection())
    assert metrics.read(path) == RECORDS
    metrics.rewind(path, 2)
    assert metrics.read(path) == RECORDS[:2]


def test_a_cut_last_line_is_dropped_and_another_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st')
    assert metrics.read(path) == [{"step": 1}]
    path.write_text('{"st\n{"step": 1}\n')
    with pytest.raises(CheckpointError, match="line 1"):
        metrics.read(path)


@pytest.mark.parametrize("records", [RECORDS, [], RECORDS[:1]])
def test_the_picture_is_a_png(tmp_path: Path, records: list[metrics.Record]) -> None:
    metrics.plot(records, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_tensorboard_gets_the_same_numbers(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    write(tmp_path / "metrics.jsonl", LogSection(tensorboard=True))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(2, 2.5), (4, 2.0)]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_hosted_trackers_get_the_numbers_or_are_asked_for(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = LogSection.model_validate({name: True, "run_name": "first"})
    monkeypatch.setitem(__import__("sys").modules, name, None)
    with pytest.raises(MissingExtraError, match=rf"pip install 'lorica\[{name}\]'"):
        metrics.require(settings)

    calls: list[object] = []

    class Tracker:
        init = staticmethod(lambda **options: calls.append(options["name"]))
        log = staticmethod(lambda numbers, step: calls.append((step, numbers)))
        finish = staticmethod(lambda: calls.append("end"))

    monkeypatch.setitem(__import__("sys").modules, name, Tracker)
    write(tmp_path / "metrics.jsonl", settings)
    assert calls[0] == "first"
    assert (2, {"train/loss": 2.5}) in calls
    assert calls[-1] == "end"
