"""Many threads at once, with the interpreter changing between them as often as it can."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from meeting import Running
from torch import Tensor, nn

import lorica
from lorica.errors import AdapterError
from models import ids, randomise, tiny_llama

BATCH = ids(3, 5)
ROUNDS = 12
NEW_TOKENS = 3

#: What is computed for a batch with the adapters of its rows.
Task = Callable[[nn.Module, list[str]], list[Any]]


@pytest.fixture(autouse=True)
def _eager_switches() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def base() -> nn.Module:
    return tiny_llama().requires_grad_(False)


def config(seed: int) -> lorica.LoraConfig:
    fields = [{"use_dora": True}, {"lora_alpha": 3}, {"r": 4, "target_modules": ["q_proj", "down_proj"]}, {}]
    return lorica.LoraConfig(**{"r": 2, "target_modules": ["q_proj", "v_proj"], **fields[seed % 4]})


def saved(where: Path, seed: int) -> Path:
    folder = where / str(seed)
    randomise(lorica.get_peft_model(base(), config(seed)), seed).save_pretrained(folder)
    return folder


@torch.no_grad()
def logits(model: nn.Module, names: list[str]) -> list[Tensor]:
    return list(model(BATCH, adapter_names=names).logits)


@torch.no_grad()
def logits_in_block(model: nn.Module, names: list[str]) -> list[Tensor]:
    with lorica.route_rows(model, names):
        first, second = model(BATCH).logits, model.get_base_model()(BATCH).logits  # type: ignore[operator]
    assert torch.equal(first, second)
    return list(first)


def generated(model: nn.Module, names: list[str]) -> list[Tensor]:
    """The scores of what is generated: a mixture of versions shows in them sooner than in the tokens."""
    out = model.generate(  # type: ignore[operator]
        BATCH,
        adapter_names=names,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        output_scores=True,
        return_dict_in_generate=True,
        eos_token_id=None,
    )
    return list(torch.stack(out.scores, 1))


def test_every_row_is_one_version_of_its_adapter(tmp_path: Path) -> None:
    """``a`` rests, ``b`` is swapped, ``c`` is loaded and deleted, and another adapter is active every time."""
    versions = {"a": [0], "b": [1, 5], "c": [2, 6], "__base__": []}
    folders = {seed: saved(tmp_path, seed) for seeds in versions.values() for seed in seeds}
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "adapter_config.json").write_bytes((folders[1] / "adapter_config.json").read_bytes())
    weights = (folders[1] / "adapter_model.safetensors").read_bytes()
    (tmp_path / "broken" / "adapter_model.safetensors").write_bytes(weights[:-4])

    model = lorica.PeftModel.from_pretrained(base(), folders[0], "a").eval()
    model.load_adapter(folders[1], "b")
    tasks: list[Task] = [logits, logits_in_block, generated]
    wanted = {(task, name): outputs(task, name, seeds, folders) for task in tasks for name, seeds in versions.items()}
    stop = threading.Event()

    def read(task: Task, seed: int) -> None:
        dice, seen = random.Random(seed), 0
        while not (stop.is_set() and seen):
            names = dice.choices(list(versions), k=len(BATCH))
            try:
                rows = task(model, names)
            except AdapterError as error:
                if "c" not in names or "non-existing adapter(s): c" not in str(error):
                    raise
                continue
            of = {name: [which(wanted[task, name], row, rows[row]) for row in at(names, name)] for name in names}
            assert all(len(set(found)) == 1 for found in of.values()), of  # one version in all rows
            seen += 1

    def change() -> None:
        for step in range(ROUNDS):
            lorica.hotswap_adapter(model, folders[5 if step % 2 == 0 else 1], "b")
            model.load_adapter(folders[6 if step % 2 == 0 else 2], "c")
            with pytest.raises(lorica.errors.CheckpointError):
                lorica.hotswap_adapter(model, tmp_path / "broken", "b")
            model.set_adapter(["a", "b"] if step % 3 else "b")
            model.delete_adapter("c")

    readers = [Running(read, task, seed) for seed, task in enumerate([*tasks, logits])]
    try:
        Running(change).result()
    finally:
        stop.set()
    for reader in readers:
        reader.result()
    assert list(model.peft_config) == ["a", "b"]


def at(names: list[str], name: str) -> list[int]:
    return [row for row, other in enumerate(names) if other == name]


def outputs(task: Task, name: str, seeds: list[int], folders: dict[int, Path]) -> list[list[Tensor]]:
    """What each version of an adapter gives, alone on a model of its own."""
    if not seeds:
        model = lorica.get_peft_model(base(), config(0)).eval()
        return [task(model, ["__base__"] * len(BATCH))]
    models = [lorica.PeftModel.from_pretrained(base(), folders[seed], name).eval() for seed in seeds]
    return [task(model, [name] * len(BATCH)) for model in models]


def which(versions: list[list[Tensor]], row: int, found: Tensor) -> int:
    """Which version a row is of."""
    fitting = [n for n, rows in enumerate(versions) if torch.allclose(rows[row], found, atol=1e-4, rtol=1e-4)]
    assert len(fitting) == 1, "a row is of no version, or the versions are too much alike to tell"
    return fitting[0]
