"""The whole state of a run on disk: enough to go on as if it had never stopped, in safetensors and JSON only.

A checkpoint is a directory ``checkpoints/step-000123`` with the adapter in PEFT's files (so that it can be used as it
is), the optimiser's tensors by parameter name, the random states, and in ``state.json`` everything that is a number.
"""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lorica.errors import CheckpointError, RecipeError
from lorica.files import atomic
from lorica.train.collate import Batches
from lorica.train.recipe import Recipe, flatten

ADAPTER = "adapter_model.safetensors"
_TENSORS = "training_state.safetensors"
_NUMBERS = "state.json"
_NAME = re.compile(r"step-(\d{6,})")

# What may change between a run and its continuation, because no step depends on it. (That moved data are the same data
# is checked by their fingerprint.)
HARMLESS = (
    "output_dir",
    "data.train",
    "data.eval",
    "checkpoint.every",
    "checkpoint.keep",
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


def save(output: Path, live: Live, recipe: Recipe, data_fingerprint: str, keep: int) -> Path:
    """Write a checkpoint and drop the oldest beyond ``keep``; a kill at any moment leaves the one before usable."""
    final = directory_of(output) / f"step-{live.progress.step:06d}"
    if not atomic.is_complete(final):
        numbers, tensors = _collect(live)
        numbers |= {"recipe": recipe.model_dump(mode="json"), "data": data_fingerprint}
        with atomic.complete_directory(final) as temporary:
            live.model.save_pretrained(str(temporary))  # type: ignore[operator]
            atomic.write_tensors(temporary / _TENSORS, tensors, {"format": "pt"})
            atomic.write_json(temporary / _NUMBERS, numbers)
    prune(output, keep)
    return final


def prune(output: Path, keep: int) -> None:
    """Delete all but the newest ``keep`` checkpoints."""
    for path in complete(output)[:-keep]:
        # Without its marker it no longer counts, so a kill while it is deleted leaves no half that looks whole.
        (path / atomic.MARKER).unlink()
        shutil.rmtree(path)


def clean(output: Path) -> None:
    """Delete what a kill left of checkpoints that were being written or deleted."""
    for path in directory_of(output).glob("step-*"):
        if _NAME.fullmatch(path.name) and not atomic.is_complete(path):
            shutil.rmtree(path)
    atomic.remove_partial(directory_of(output))


def restore(checkpoint: Path, live: Live) -> None:
    """Put a checkpoint's state into freshly built objects.

    Raises:
        CheckpointError: a file is missing or damaged, or does not fit the model.
    """
    from lorica import set_peft_model_state_dict

    numbers = read_numbers(checkpoint)
    tensors = _read_tensors(checkpoint / _TENSORS)
    try:
        set_peft_model_state_dict(live.model, _read_tensors(checkpoint / ADAPTER), strict=True)
        _restore_optimizer(live, numbers["optimizer"], tensors)
        live.scheduler.load_state_dict(numbers["scheduler"])
        live.batches.load_state_dict(numbers["batches"])
        vars(live.progress).update(numbers["progress"])
        _restore_random(numbers["random"], tensors)
    except (KeyError, RuntimeError, TypeError) as error:
        raise CheckpointError(f"{checkpoint} does not fit this run: {error}") from error


def read_numbers(checkpoint: Path) -> dict[str, Any]:
    """The JSON part of a checkpoint.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    try:
        values: dict[str, Any] = json.loads((checkpoint / _NUMBERS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{checkpoint / _NUMBERS} cannot be read: {error}") from None
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
        if key not in HARMLESS and before.get(key) != now.get(key)
    ]
    if changed:
        listing = "".join(f"\n  {line}" for line in changed)
        raise RecipeError(
            f"--resume continues a run as if it had never stopped, but the recipe changed:{listing}\n"
            "Set it back, or start a new run in another output_dir."
        )


def _step_of(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    return int(match.group(1)) if match else -1


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    return tensors


def _collect(live: Live) -> tuple[dict[str, Any], dict[str, Tensor]]:
    tensors: dict[str, Tensor] = {}
    for name, parameter in _named_parameters(live.optimizer):
        for key, value in live.optimizer.state[parameter].items():
            tensors[f"optimizer/{name}/{key}"] = value.detach().cpu().contiguous()
    numbers = {
        "optimizer": [{"names": group["names"], "lr": group["lr"]} for group in live.optimizer.param_groups],
        "scheduler": live.scheduler.state_dict(),
        "batches": live.batches.state_dict(),
        "progress": asdict(live.progress),
        "random": _collect_random(tensors),
    }
    return numbers, tensors


def _restore_optimizer(live: Live, groups: list[dict[str, Any]], tensors: Mapping[str, Tensor]) -> None:
    ours = [group["names"] for group in live.optimizer.param_groups]
    if [group["names"] for group in groups] != ours:
        raise CheckpointError("the optimiser's parameters are not those of the checkpoint")
    by_name: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer/"):
            _, name, entry = key.split("/")
            by_name.setdefault(name, {})[entry] = value
    current = live.optimizer.state_dict()
    for group, saved in zip(current["param_groups"], groups, strict=True):
        group["lr"] = saved["lr"]
    # At step 0 the optimiser holds nothing yet.
    names = [name for name, _ in _named_parameters(live.optimizer)]
    current["state"] = {index: by_name[name] for index, name in enumerate(names) if name in by_name}
    live.optimizer.load_state_dict(current)


def _named_parameters(optimizer: Optimizer) -> Iterator[tuple[str, Tensor]]:
    for group in optimizer.param_groups:
        yield from zip(group["names"], group["params"], strict=True)


def _collect_random(tensors: dict[str, Tensor]) -> dict[str, Any]:
    tensors["random/torch"] = torch.get_rng_state()
    if torch.cuda.is_available():
        for index, state in enumerate(torch.cuda.get_rng_state_all()):
            tensors[f"random/cuda/{index}"] = state
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    version, words, next_gauss = random.getstate()
    return {
        "python": [version, list(words), next_gauss],
        "numpy": [str(kind), np.asarray(keys).tolist(), int(position), int(has_gauss), float(gauss)],
    }


def _restore_random(numbers: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    version, words, next_gauss = numbers["python"]
    random.setstate((version, tuple(words), next_gauss))
    kind, keys, position, has_gauss, gauss = numbers["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(tensors["random/torch"])
    cuda = sorted(key for key in tensors if key.startswith("random/cuda/"))
    if cuda and torch.cuda.is_available():
        for index in range(min(len(cuda), torch.cuda.device_count())):
            torch.cuda.set_rng_state(tensors[f"random/cuda/{index}"], index)
