"""What a run reports: ``metrics.jsonl`` always, other trackers on request, and a picture of the loss."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TextIO

from lorica.errors import CheckpointError, require_extra
from lorica.files import atomic
from lorica.train.recipe import LogSection

Record = dict[str, Any]
"""``kind`` (``train`` or ``eval``), ``step``, ``loss`` and more numbers."""

_Sink = Callable[[Record], None]


class Metrics:
    """Appends records to ``metrics.jsonl`` and hands them to the trackers that the recipe names."""

    def __init__(self, path: Path, settings: LogSection, recipe: Mapping[str, Any]) -> None:
        self._path = path
        self._file: TextIO = path.open("a", encoding="utf-8")
        self._close: list[Callable[[], None]] = [self._file.close]
        self._sinks: list[_Sink] = []
        for name, opener in _TRACKERS.items():
            if getattr(settings, name):
                sink, close = opener(path.parent, settings, recipe)
                self._sinks.append(sink)
                self._close.append(close)

    def write(self, record: Record) -> None:
        with atomic.naming_path(self._path):
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        for sink in self._sinks:
            sink(record)

    def sync(self) -> None:
        """Put the records on the disk; a checkpoint must not be ahead of them."""
        with atomic.naming_path(self._path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        with atomic.naming_path(self._path), ExitStack() as last:
            for close in self._close:
                last.callback(close)


def require(settings: LogSection) -> None:
    """See that every tracker asked for is installed, before anything is written.

    Raises:
        MissingExtraError: one is not.
    """
    for name in _TRACKERS:
        if getattr(settings, name):
            require_extra(name, name)


def read(path: Path) -> list[Record]:
    """All records; a last line that was cut off by a crash is dropped.

    Raises:
        CheckpointError: another line is damaged.
    """
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [record for number, line in enumerate(lines, start=1) for record in _parse(path, number, line, len(lines))]


def rewind(path: Path, step: int) -> None:
    """Drop what a run wrote after its checkpoint at ``step`` (which is taken before that step's evaluation)."""
    kept = [r for r in read(path) if r["step"] < step or (r["step"] == step and r["kind"] == "train")]
    atomic.write_bytes(path, "".join(json.dumps(record) + "\n" for record in kept).encode())


def plot(records: Sequence[Record], path: Path) -> None:
    """Draw training and held-out loss over the steps, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for kind, label, style in (("train", "training", "-"), ("eval", "held out", "o-")):
        points = [(record["step"], record["loss"]) for record in records if record["kind"] == kind]
        if points:
            axes.plot([x for x, _ in points], [y for _, y in points], style, label=label, linewidth=1.5, markersize=4)
    drawn = [record["loss"] for record in records if record["kind"] in ("train", "eval")]
    if drawn and min(drawn) > 0 and max(drawn) > 10 * min(drawn):
        axes.set_yscale("log")  # or everything after the first steps would lie on the axis
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("loss (nats per completion token)")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    atomic.write_file(path, lambda temporary: figure.savefig(temporary, format="png"))


def _parse(path: Path, number: int, line: str, last: int) -> list[Record]:
    try:
        return [json.loads(line)]
    except json.JSONDecodeError:
        if number == last:
            return []
        raise CheckpointError(f"{path}, line {number} is not JSON") from None


def _numbers(record: Record) -> dict[str, float]:
    return {
        f"{record['kind']}/{key}": value
        for key, value in record.items()
        if key != "step" and not isinstance(value, str)
    }


def _tensorboard(directory: Path, settings: LogSection, recipe: Mapping[str, Any]) -> tuple[_Sink, Callable[[], None]]:
    require_extra("tensorboard", "tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(directory / "tensorboard"))

    def sink(record: Record) -> None:
        for name, value in _numbers(record).items():
            writer.add_scalar(name, value, record["step"])

    return sink, writer.close


def _wandb(directory: Path, settings: LogSection, recipe: Mapping[str, Any]) -> tuple[_Sink, Callable[[], None]]:
    return _hosted(require_extra("wandb", "wandb"), settings, recipe, dir=str(directory))


def _trackio(directory: Path, settings: LogSection, recipe: Mapping[str, Any]) -> tuple[_Sink, Callable[[], None]]:
    return _hosted(require_extra("trackio", "trackio"), settings, recipe)


def _hosted(
    tracker: Any, settings: LogSection, recipe: Mapping[str, Any], **options: Any
) -> tuple[_Sink, Callable[[], None]]:
    """W&B's interface, which trackio shares."""
    tracker.init(project=settings.project, name=settings.run_name, config=dict(recipe), **options)

    def sink(record: Record) -> None:
        tracker.log(_numbers(record), step=record["step"])

    return sink, tracker.finish


_TRACKERS: dict[str, Callable[[Path, LogSection, Mapping[str, Any]], tuple[_Sink, Callable[[], None]]]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "trackio": _trackio,
}
