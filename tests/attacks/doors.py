"""Every way into lorica for a saved adapter, and what must be as before when it was refused."""

from __future__ import annotations

import gc
import os
import random
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from costs import MIB, bounded
from torch import nn
from typer.testing import CliRunner

import lorica
import models
from lorica.cli.app import app
from lorica.compat import peft
from lorica.errors import LoricaError


class World:
    """A base model's files, that model, and it with an adapter: made once, since no attack may change them.

    Args:
        folder: for what commands write.
        base: where the model's files are.
        good: an adapter of it.
    """

    def __init__(self, folder: Path, base: Path, good: Path) -> None:
        self.base = base
        self.plain = models.tiny_llama()
        self.adapted = lorica.PeftModel.from_pretrained(models.tiny_llama(), good)
        self.others = peft.PeftModel.from_pretrained(models.tiny_llama(), str(good))
        self.outputs = folder / "outputs"
        self.outputs.mkdir(parents=True)

    def state(self) -> dict[str, Any]:
        """Return everything that must stay."""
        return {
            "plain": _state(self.plain),
            "adapted": _state(self.adapted),
            "peft": _state(self.others),
            "random": (torch.get_rng_state().tolist(), random.getstate()),
            "outputs": os.listdir(self.outputs),
            "modules": [*sys.modules],
        }


def _state(model: nn.Module) -> dict[str, Any]:
    tuner: Any = getattr(model, "base_model", None)
    switch = getattr(tuner, "switch", None)
    configs = getattr(model, "peft_config", {})
    return {
        "tensors": {n: (id(t), t.dtype, t.clone()) for n, t in model.state_dict(keep_vars=True).items()},
        "trains": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "modules": [(name, id(module), _own(module)) for name, module in model.named_modules()],
        "configs": {name: config.to_dict() for name, config in configs.items()},
        "active": None if switch is None else (switch.active, switch.enabled),
    }


def _own(module: nn.Module) -> tuple[Any, ...]:
    """Return what a module has besides tensors and modules: hooks, whether it trains, the names of its attributes."""
    hooks = [len(value) for name, value in vars(module).items() if name.endswith("_hooks") and value]
    return hooks, module.training, sorted(vars(module))


def differences(before: Any, after: Any, where: str = "") -> list[str]:
    """Return where two states differ."""
    if isinstance(before, torch.Tensor) and isinstance(after, torch.Tensor):
        return [] if torch.equal(before, after) else [where]
    if isinstance(before, dict) and isinstance(after, dict):
        found = [f"{where}/{key}" for key in before.keys() ^ after.keys()]
        return found + [
            d for key in before.keys() & after for d in differences(before[key], after[key], f"{where}/{key}")
        ]
    if isinstance(before, tuple) and isinstance(after, tuple) and len(before) == len(after):
        return [d for n, pair in enumerate(zip(before, after, strict=True)) for d in differences(*pair, f"{where}/{n}")]
    return [] if before == after else [where]


# ---- the doors ------------------------------------------------------------------------------------------------------


def _run(*arguments: object) -> None:
    """Run a command; what it refuses is raised here as it says it."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exit_code == 0:
        return
    if result.exit_code != 2 or not result.stderr.startswith("error: "):
        raise AssertionError(f"exit code {result.exit_code}: {result.stderr[-2000:]}") from result.exception
    raise LoricaError(result.stderr)


Door = Callable[[World, Path], object]
DOORS: dict[str, Door] = {
    "first": lambda world, folder: lorica.PeftModel.from_pretrained(world.plain, folder),
    "first, warned": lambda world, folder: lorica.PeftModel.from_pretrained(world.plain, folder, strict=False),
    "load": lambda world, folder: world.adapted.load_adapter(folder, "other"),
    "load over another": lambda world, folder: world.adapted.load_adapter(folder, "default"),
    "swap": lambda world, folder: lorica.hotswap_adapter(world.adapted, folder, "default"),
    "configuration": lambda world, folder: lorica.LoraConfig.from_pretrained(folder),
    "weights alone": lambda world, folder: peft.load_peft_weights(str(folder), device="cpu"),
    "peft's model": lambda world, folder: peft.PeftModel.from_pretrained(world.plain, str(folder)),
    "peft's load": lambda world, folder: world.others.load_adapter(str(folder), "other"),
    "automatic class": lambda world, folder: peft.AutoPeftModelForCausalLM.from_pretrained(folder),
    "inspect": lambda world, folder: _run("inspect", folder),
    "convert": lambda world, folder: _run(
        *("convert", folder, world.outputs / "converted", "--from", "peft", "--to", "neuron", "--model", world.base)
    ),
    "merge": lambda world, folder: _run("merge", folder, world.outputs / "merged", "--model", world.base, "--quiet"),
    "export": lambda world, folder: _run(
        *("export", folder, "--output", world.outputs / "exported", "--target", "vllm", "--base", world.base)
    ),
}
#: Doors that lead where others lead too; they are tried by ``make.SAMPLE``.
MORE_DOORS: dict[str, Door] = {
    "subfolder": lambda world, folder: lorica.PeftModel.from_pretrained(
        world.plain, folder.parent, "lora_A", subfolder=folder.name
    ),
    "load from a subfolder": lambda world, folder: world.adapted.load_adapter(
        folder.parent, "lora", subfolder=folder.name
    ),
    "generate": lambda world, folder: _run(
        *("generate", world.base, "a", "--adapter", folder, "--max-new-tokens", 1, "--device", "cpu")
    ),
    "eval": lambda world, folder: _run(
        *("eval", world.base, "--data", world.base / "rows.jsonl", "--adapter", folder, "--device", "cpu")
    ),
}


# ---- what an attempt costs ------------------------------------------------------------------------------------------


class Attempt(NamedTuple):
    """What came of knocking at a door.

    Attributes:
        error: what was raised.
        excess: what it took too much of, at each of some attempts.
    """

    error: BaseException | None
    excess: str


def attempt(run: Callable[[], object]) -> Attempt:
    """Do what is to be refused with no more address space than may be taken; again where it takes too long."""

    def once() -> BaseException | None:
        with _little_space(), _watched():
            try:
                run()
            except BaseException as caught:
                return caught
        return None

    return Attempt(*bounded(once))


def refused(read: Callable[[], object], *says: str, error: type[Exception] = LoricaError) -> None:
    """Read what is to be refused: quickly, with little memory, and with an error that says these words."""
    raised, excess = attempt(read)
    assert isinstance(raised, error), repr(raised)[:2000]
    assert all(word in str(raised) for word in says), str(raised)[:2000]
    assert len(str(raised)) < 5000
    assert not excess, excess


def _space() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmSize:")[1].split()[0]) * 1024


@contextmanager
def _little_space() -> Iterator[None]:
    """Refuse memory, also what is never touched, beyond what there is and as much again as a refusal may take."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_space() + 400 * MIB, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


# ---- what nobody may do ---------------------------------------------------------------------------------------------

_seen: list[str] | None = None
_FORBIDDEN = ("import", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.connect")


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _seen is not None and event in _FORBIDDEN:
        _seen.append(f"{event} {arguments[:1]}")


sys.addaudithook(_audit)


@contextmanager
def _watched() -> Iterator[None]:
    """Fail where something was imported, started, or connected to."""
    global _seen
    gc.collect(0)
    _seen = []
    try:
        yield
    finally:
        seen, _seen = _seen, None
        assert not seen, seen
