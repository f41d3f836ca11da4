"""Directories that lorica reads, each with a good one, a way in, and what must be true of what comes out."""

from __future__ import annotations

import json
import shutil
import warnings
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

import lorica
import models
from lorica.checkpoint.whole import consolidate
from lorica.convert import SYSTEMS, convert_adapter, read_adapter
from lorica.layout.specs import same
from lorica.train import optim, recipe, state
from lorica.train.collate import Batches, Collator
from lorica.train.data import Example

DENSE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Victim(NamedTuple):
    """Files of one kind.

    Attributes:
        make: fills a directory with good ones.
        read: reads them, into a second directory where it writes something; what it returns was checked.
    """

    make: Callable[[Path], object]
    read: Callable[[Path, Path], object]


def all_finite(tensors: Iterable[Tensor]) -> None:
    """Fail if a load gave numbers that it should have refused."""
    for tensor in tensors:
        assert bool(tensor.float().isfinite().all()), "a load gave NaN or infinity"


# ---- adapters --------------------------------------------------------------------------------------------------------


def _config(**fields: Any) -> lorica.LoraConfig:
    given = {"r": 2, "lora_alpha": 6, "target_modules": ["lin0", "lin1"], "init_lora_weights": False}
    return lorica.LoraConfig(**given | fields)


def make_adapter(folder: Path) -> None:
    """Save an adapter with patterns, a module that trains fully, and a bias."""
    torch.manual_seed(1)
    config = _config(rank_pattern={"lin1": 3}, alpha_pattern={"lin1": 5}, lora_bias=True)
    lorica.get_peft_model(models.mlp(), config).save_pretrained(str(folder))


class Adapters:
    """A model whose adapters come and go; nothing of it may change when one is refused."""

    def __init__(self) -> None:
        torch.manual_seed(2)
        self.model = lorica.get_peft_model(models.mlp(), _config())
        self.before = self._state()

    def read(self, folder: Path, _: Path) -> None:
        """Load an adapter, compare it with its file, and take it out again."""
        try:
            self.model.load_adapter(folder, "other")
            self._compare(folder)
            self.model.delete_adapter("other")
        finally:
            after = self._state()
            assert after.keys() == self.before.keys(), "a model was changed"
            assert [n for n, value in self.before.items() if not _alike(after[n], value)] == [], "a model was changed"

    def _compare(self, folder: Path) -> None:
        found = lorica.get_peft_model_state_dict(self.model, adapter_name="other")
        said = load_file(folder / "adapter_model.safetensors")
        assert found.keys() == said.keys()
        for name, tensor in said.items():
            assert torch.equal(found[name], tensor.to(found[name].dtype)), name
        all_finite(found.values())

    def _state(self) -> dict[str, Any]:
        names: Any = {n: (id(t), t.clone()) for n, t in self.model.state_dict(keep_vars=True).items()}
        names["configs"] = {name: json.dumps(config.to_dict(), default=str) for name, config in self.configs.items()}
        names["active"], names["trains"] = (
            self.model.active_adapters,
            [p.requires_grad for p in self.model.parameters()],
        )
        return dict(names)

    @property
    def configs(self) -> Any:
        """The configurations of its adapters."""
        return self.model.peft_config


def _alike(one: Any, other: Any) -> bool:
    if isinstance(one, tuple):
        return one[0] == other[0] and torch.equal(one[1], other[1])
    return bool(one == other)


# ---- adapters of other systems ---------------------------------------------------------------------------------------


def make_peft(folder: Path) -> None:
    """Save an adapter of a small Llama, with the model's configuration beside it."""
    torch.manual_seed(1)
    model = models.tiny_llama()
    config = _config(target_modules=DENSE, task_type="CAUSAL_LM")
    lorica.get_peft_model(model, config).save_pretrained(str(folder), save_embedding_layers=False)


def _converted(target: str, **options: Any) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        saved = folder.with_name(f"{folder.name}-peft")
        make_peft(saved)
        models.tiny_llama().config.save_pretrained(saved / "model")
        shutil.rmtree(folder, ignore_errors=True)
        convert_adapter(saved, folder, source="peft", target=target, model=saved / "model", **options)
        shutil.rmtree(saved)

    return make


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def _read_as(source: str) -> Callable[[Path, Path], None]:
    model = models.tiny_llama().config

    def read(folder: Path, output: Path) -> None:
        found = read_adapter(folder, source)
        for name, value in found.tensors():
            tensor = value.read()
            assert (tuple(tensor.shape), tensor.dtype) == (value.shape, value.dtype), name
            all_finite([tensor])
        target = SYSTEMS[zlib.crc32(b"".join(path.read_bytes() for path in _files(folder))) % len(SYSTEMS)]
        convert_adapter(folder, output / target, source=source, target=target, model=model, rounding=True)
        all_finite(tensor for path in output.rglob("*.safetensors") for tensor in load_file(path).values())

    return read


# ---- runs ------------------------------------------------------------------------------------------------------------

_RECIPE = {"model": {"path": "base"}, "data": {"train": "rows.jsonl"}}


class Runs:
    """A run that is saved and goes on."""

    def __init__(self) -> None:
        self.recipe = recipe.parse(_RECIPE)

    def live(self) -> state.Live:
        """Return a run of a small model after one step."""
        torch.manual_seed(3)
        model = lorica.get_peft_model(models.mlp(), _config())
        optimizer = optim.optimizer(model, self.recipe.training)
        model(torch.ones(2, 10)).sum().backward()
        optimizer.step()
        example = Example(torch.arange(4, dtype=torch.int32), torch.arange(4, dtype=torch.int32))
        batches = Batches([[example]] * 4, Collator(0), 2, 0)
        schedule = optim.schedule(optimizer, self.recipe.training, 10)
        return state.Live(model, optimizer, schedule, batches, state.Progress())

    def make(self, folder: Path) -> None:
        """Save the first checkpoint of a run."""
        output = folder.with_name(f"{folder.name}-run")
        wanted = recipe.parse(_RECIPE | {"output_dir": str(output)})
        saved = state.Saver(self.live(), wanted, "data").save()
        shutil.rmtree(folder, ignore_errors=True)
        shutil.move(saved, folder)
        shutil.rmtree(output)

    def read(self, folder: Path, output: Path) -> None:
        """Go on from a checkpoint whose files are what they are said to be, and make its adapter one file."""
        live, randoms = self.live(), torch.get_rng_state()
        try:
            numbers = state.read_numbers(folder)
            state.check_recipe(numbers["recipe"], recipe.parse(_RECIPE | {"output_dir": "other"}))
            state.restore(folder, live)
            said = load_file(folder / "state" / "shards-00000.safetensors")
            for name, tensor in lorica.get_peft_model_state_dict(live.model).items():
                assert same(tensor, said[f"factors/{name}@0,0"]), name  # NaN too: a run may have come to it
        finally:
            torch.set_rng_state(randoms)
        for name, tensor in load_file(consolidate(folder / "state", output)).items():
            assert same(tensor, said[f"factors/{name}@0,0"]), name


def make_recipe(folder: Path) -> None:
    """Write a recipe."""
    text = recipe.dump_yaml(recipe.parse(_RECIPE))
    (folder / "recipe.yaml").write_text(text + "\n".join(f"# {line}" for line in text.splitlines()))


def read_recipe(folder: Path, _: Path) -> None:
    """Read a recipe."""
    assert isinstance(recipe.load(folder / "recipe.yaml"), recipe.Recipe)


def victims() -> dict[str, Victim]:
    """Return everything that is mutated, by name."""
    adapters, runs = Adapters(), Runs()
    return {
        "adapter": Victim(make_adapter, adapters.read),
        "peft": Victim(make_peft, _read_as("peft")),
        "bridge": Victim(_converted("megatron-bridge"), _read_as("megatron-bridge")),
        "neuron": Victim(_converted("neuron", tensor_parallel=2), _read_as("neuron")),
        "run": Victim(runs.make, runs.read),
        "recipe": Victim(make_recipe, read_recipe),
    }


def quietly(read: Callable[[Path, Path], object], folder: Path, output: Path) -> None:
    """Read without the warnings that a file may deserve."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        read(folder, output)
