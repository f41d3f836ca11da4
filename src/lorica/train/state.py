"""The whole state of a run on disk: enough to go on as if it had never stopped, in safetensors and JSON only.

A checkpoint is a directory ``checkpoints/step-000123`` with the adapter in PEFT's files (so that it can be used as it
is), in ``state/`` all tensors as shards of logical ones, written by every rank and readable on any layout (factors,
the optimiser's state by factor, random states), and in ``state.json`` everything that is a number.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lorica.checkpoint import sharded
from lorica.checkpoint.shards import ShardReader
from lorica.engines.board import is_lost
from lorica.errors import CheckpointError, LoricaError, LostRankError, RecipeError
from lorica.files import atomic, marker
from lorica.files.json import read_json_object
from lorica.train import optim, tensors
from lorica.train.collate import Batches
from lorica.train.ranks import Ranks
from lorica.train.recipe import Recipe, flatten

ADAPTER = "adapter_model.safetensors"
_STATE = "state"
_NUMBERS = "state.json"
_FORMAT = 2
#: What the numbers of a checkpoint consist of.
_KINDS = {"step": int, "axes": dict, "batches": dict, "progress": dict, "random": dict, "recipe": dict, "data": str}
_LAUNCH = "launch"
# Of a checkpoint's adapter, what a run does not go on from: a model that moved may have got its new name there.
_EDITABLE = ("README.md", "adapter_config.json")
_NAME = re.compile(r"step-(\d{6,})")

# What may change between a run and its continuation, because no step depends on it. (That moved data are the same data
# is checked by their fingerprint. The layout, all of ``parallel``, may change too.)
HARMLESS = (
    "output_dir",
    "data.train",
    "data.eval",
    "model.fuse_mlp",
    "checkpoint.every",
    "checkpoint.keep",
    "checkpoint.asynchronous",
    "log.every",
    "log.tensorboard",
    "log.wandb",
    "log.trackio",
    "log.project",
    "log.run_name",
    "training.eval_every",
    "training.eval_batch_size",
)


@dataclass
class Progress:
    """How far a run is; ``window_*`` is what the next record of ``metrics.jsonl`` averages.

    ``tokens`` went through the model (no padding), of which ``learned`` count in the loss.
    """

    step: int = 0
    tokens: int = 0
    learned: int = 0
    seconds: float = 0.0
    window_loss: float = 0.0
    window_tokens: int = 0
    window_learned: int = 0
    window_seconds: float = 0.0

    def open_window(self) -> None:
        self.window_loss, self.window_tokens, self.window_learned, self.window_seconds = 0.0, 0, 0, 0.0


@dataclass
class Live:
    """The objects that a checkpoint is taken from and put back into."""

    model: nn.Module
    optimizer: Optimizer
    scheduler: LambdaLR
    batches: Batches
    progress: Progress


def directory_of(output: Path) -> Path:
    return output / "checkpoints"


def complete(output: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = directory_of(output).glob("step-*")
    return sorted((path for path in found if _NAME.fullmatch(path.name) and atomic.is_complete(path)), key=_step_of)


class UnsavedError(CheckpointError):
    """A checkpoint could not be written; those before are as they were."""

    exit_code = 1


class Saver:
    """Writes checkpoints, each by all ranks together, and drops the oldest beyond ``recipe.checkpoint.keep``.

    A kill at any moment leaves the one before usable, and so does an error, which leaves nothing else.
    """

    def __init__(self, live: Live, recipe: Recipe, data: str, ranks: Ranks | None = None) -> None:
        self._live, self._recipe, self._data, self._ranks = live, recipe, data, ranks or Ranks()
        self._later = recipe.checkpoint.asynchronous
        self._group = self._ranks.group() if self._later else self._ranks.control
        self._pending: tuple[Path, Callable[[], None]] | None = None

    def save(self) -> Path:
        """Write the state as it is now, or (``checkpoint.asynchronous``) copy it, to be written in the background.

        Raises:
            UnsavedError: it, or the one that was being written, cannot be written.
        """
        self.wait()
        live, output = self._live, self._recipe.output
        final = directory_of(output) / f"step-{live.progress.step:06d}"
        with self._whole_or_not_at_all(final):
            if not atomic.is_complete(final):
                self._write(final)
            elif self._ranks.first:
                prune(output, self._recipe.checkpoint.keep)
        return final

    def wait(self) -> None:
        """Let what is being written in the background be finished.

        Raises:
            UnsavedError: it could not be written.
        """
        if self._pending is not None:
            (final, finish), self._pending = self._pending, None
            with self._whole_or_not_at_all(final):
                finish()

    @contextmanager
    def _whole_or_not_at_all(self, final: Path) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if self._ranks.first:
                shutil.rmtree(atomic.temporary_of(final), ignore_errors=True)
            if isinstance(error, LostRankError) or not isinstance(error, OSError | LoricaError):
                raise
            raise UnsavedError(
                f"the checkpoint {final} could not be written: {_said(error)}. {_newest(self._recipe.output)}"
            ) from error

    def _write(self, final: Path) -> None:
        live, ranks, temporary = self._live, self._ranks, atomic.temporary_of(final)

        def begin() -> None:
            (atomic.begin_directory(final) / _STATE).mkdir()
            numbers = _numbers(live, ranks) | {"recipe": self._recipe.model_dump(mode="json"), "data": self._data}
            atomic.write_json(temporary / _NUMBERS, numbers)

        ranks.first_does(begin)
        live.model.save_pretrained(str(temporary))  # type: ignore[operator]
        pieces = tensors.pieces(live.model, live.optimizer, ranks.rank)

        def finish() -> None:
            atomic.finish_directory(final)
            prune(self._recipe.output, self._recipe.checkpoint.keep)

        if self._later:
            self._pending = final, sharded.save_later(temporary / _STATE, pieces, finish=finish, group=self._group)
        else:
            sharded.save(temporary / _STATE, pieces, finish=finish, group=self._group)


def note_launch(output: Path, name: str | None) -> None:
    """Write down which launch's run this is, so that ranks which replace lost ones know it for their own."""
    if name is not None:
        directory_of(output).mkdir(parents=True, exist_ok=True)
        atomic.write_bytes(directory_of(output) / _LAUNCH, name.encode())


def launched_by(output: Path) -> str | None:
    """What :func:`note_launch` wrote."""
    path = directory_of(output) / _LAUNCH
    return path.read_text() if path.exists() else None


def prune(output: Path, keep: int) -> None:
    """Delete all but the newest ``keep`` checkpoints."""
    for path in complete(output)[:-keep]:
        # Without its marker it no longer counts, so a kill while it is deleted leaves no half that looks whole.
        (path / atomic.MARKER).unlink()
    _remove_incomplete(output)


def clean(output: Path) -> None:
    """Delete what a kill left of checkpoints that were being written or deleted."""
    _remove_incomplete(output)
    atomic.remove_partial(directory_of(output))


def _remove_incomplete(output: Path) -> None:
    """Delete what has no marker. What somebody still has open may stay on a shared disk; it is tried again later."""
    for path in directory_of(output).glob("step-*"):
        if _NAME.fullmatch(path.name) and not atomic.is_complete(path):
            shutil.rmtree(path, ignore_errors=True)


def check(checkpoint: Path) -> None:
    """See that a checkpoint is as it was written.

    Raises:
        CheckpointError: a file is missing or damaged; says which, and how to go on without this checkpoint.
    """
    try:
        marker.check(checkpoint, but=_EDITABLE)
    except CheckpointError as error:
        before = [path for path in complete(checkpoint.parents[1]) if _step_of(path) < _step_of(checkpoint)]
        way = (
            f"To go on from {before[-1].name}, the one before, delete {checkpoint} and resume again"
            if before
            else "There is none before it: start again with --overwrite"
        )
        raise CheckpointError(f"{error}. {way}") from None


def restore(checkpoint: Path, live: Live, ranks: Ranks | None = None) -> None:
    """Put a checkpoint's state into freshly built objects, whatever the layout that wrote it.

    Raises:
        CheckpointError: a file is missing or damaged, or does not fit the model.
    """
    ranks = ranks or Ranks()
    numbers = read_numbers(checkpoint)
    reader = ShardReader(checkpoint / _STATE)
    try:
        known = tensors.entries(live.model)
        # Another layout draws other numbers in any case; all its ranks begin alike.
        author = ranks.rank if numbers["axes"] == dict(ranks.axes) else 0
        moments = tensors.put_moments(known, live.optimizer, reader.index)
        randoms = tensors.random_pieces(reader.index, author)
        sharded.load(reader, [*tensors.factors(known), *moments, *randoms], group=ranks.control)
        optim.resume(live.scheduler, int(numbers["step"]))
        live.batches.load_state_dict(numbers["batches"])
        vars(live.progress).update(numbers["progress"])
        tensors.put_random_states(randoms)
        tensors.put_random_numbers(numbers["random"])
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint}: {error}") from error
    except (KeyError, RuntimeError, TypeError, ValueError, OverflowError) as error:
        if is_lost(error):
            raise
        raise CheckpointError(f"{checkpoint} does not fit this run: {error}") from error


def read_numbers(checkpoint: Path) -> dict[str, Any]:
    """The JSON part of a checkpoint.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    path = checkpoint / _NUMBERS
    values = read_json_object(path)
    if values.get("format") != _FORMAT:
        raise CheckpointError(f"{checkpoint} was written by another version of lorica")
    for name, kind in _KINDS.items():
        if type(values.get(name)) is not kind:
            raise CheckpointError(f"{path}: {name} is no {kind.__name__}")
    for name, start in asdict(Progress()).items():
        if type(values["progress"].get(name)) not in (int, type(start)):
            raise CheckpointError(f"{path}: progress.{name} is no number")
    return values


def check_recipe(saved: Mapping[str, Any], recipe: Recipe) -> None:
    """Refuse to continue under a recipe that would not have led to the same state.

    Raises:
        RecipeError: names every key that changed, with both values.
    """
    before, now = flatten(saved), flatten(recipe.model_dump(mode="json"))
    changed = [
        f"{key}: was {before.get(key)!r}, is {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if key not in HARMLESS and not key.startswith("parallel.") and before.get(key) != now.get(key)
    ]
    if changed:
        listing = "".join(f"\n  {line}" for line in changed)
        raise RecipeError(
            f"--resume continues a run as if it had never stopped, but the recipe changed:{listing}\n"
            "Set it back, or start a new run in another output_dir."
        )


def _newest(output: Path) -> str:
    """What is left of a run that could not write a checkpoint."""
    if whole := complete(output):
        return f"The newest complete one is {whole[-1].name}: once the cause is gone, go on from it with --resume"
    return "There is no complete one: once the cause is gone, start again with --overwrite"


def _said(error: Exception) -> str:
    """What an error says, without the numbers of the system's."""
    if isinstance(error, OSError) and error.strerror:
        return ": ".join(filter(None, [error.filename and str(error.filename), error.strerror]))
    return str(error)


def _step_of(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    return int(match.group(1)) if match else -1


def _numbers(live: Live, ranks: Ranks) -> dict[str, Any]:
    return {
        "format": _FORMAT,
        "axes": dict(ranks.axes),
        "step": live.progress.step,
        "batches": live.batches.state_dict(),
        "progress": asdict(live.progress),
        "random": tensors.random_numbers(),
    }
