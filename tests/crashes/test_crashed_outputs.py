"""What commands make of adapters is whole under its name or not there; an adapter that is saved over is old or new.

Each change of the file system that the work makes is hit in turn: by a kill, by a full disk and by Ctrl-C.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import faults
import pytest
import torch

import runs
from lorica import LoraConfig, PeftConfig, PeftModel, get_peft_model
from lorica.combine.convert import save_as_lora
from lorica.convert import convert_adapter
from lorica.errors import CheckpointError
from lorica.export import export_adapter
from lorica.merge import Wanted, extract_files, merge_files

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

FULL = faults.error(errno.ENOSPC)


def llama() -> Any:
    return runs.llama(num_hidden_layers=1)


def adapted(seed: int, **fields: Any) -> Any:
    """A model with an adapter whose every factor does something."""
    config = LoraConfig(**{"target_modules": ["q_proj", "v_proj"], "r": 2, "init_lora_weights": False, **fields})
    model = llama()
    torch.manual_seed(seed)
    return get_peft_model(model, config)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, one whose weights are others, and an adapter."""
    folder = tmp_path_factory.mktemp("made")
    llama().save_pretrained(folder / "base")
    adapted(1, task_type="CAUSAL_LM").save_pretrained(folder / "adapter")
    tuned = llama()
    with torch.no_grad():
        tuned.model.layers[0].self_attn.q_proj.weight += 0.1
    tuned.save_pretrained(folder / "tuned")
    return folder


def to_megatron(made: Path, output: Path) -> None:
    convert_adapter(made / "adapter", output, source="peft", target="megatron-bridge", model=made / "base")


def to_neuron(made: Path, output: Path) -> None:
    convert_adapter(made / "adapter", output, source="peft", target="neuron", model=made / "base")


COMMANDS: dict[str, Callable[[Path, Path], object]] = {
    "merge": lambda made, output: merge_files(made / "adapter", made / "base", output),
    "extract": lambda made, output: extract_files(made / "base", made / "tuned", output, wanted=Wanted(rank=1)),
    "export": lambda made, output: export_adapter(made / "adapter", output, "vllm", base=str(made / "base")),
    "convert to Megatron Bridge": to_megatron,
    "convert to Optimum Neuron": to_neuron,
}


def tree(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_size for p in folder.rglob("*") if p.is_file()}


def interrupted(root: Path, number: int, act: Callable[[str], None], work: Callable[[], object]) -> list[str]:
    """Do the work, in which something happens; return what it was about to do then."""
    with faults.at(root, number, act) as hit:
        try:
            work()
        except OSError as error:
            assert act is FULL
            assert error.filename  # noqa: PT017 (a success is as good)
        except KeyboardInterrupt:
            assert act is not FULL
    return hit


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("command", COMMANDS)
def test_an_output_is_whole_or_not_there(command: str, made: Path, tmp_path: Path) -> None:
    def work() -> None:
        COMMANDS[command](made, tmp_path / "output")

    work()
    whole, seen = tree(tmp_path / "output"), set()
    shutil.rmtree(tmp_path / "output")
    for number in count():
        if number % 3 == 0:
            ended = not faults.killed_at(tmp_path, number, work)
        else:
            ended = not interrupted(tmp_path, number, FULL if number % 3 == 1 else faults.interrupt(), work)
            assert tree(tmp_path).keys() <= {f"output/{name}" for name in whole}, number
        there = (tmp_path / "output").exists()
        assert not there or tree(tmp_path / "output") == whole, number
        shutil.rmtree(tmp_path / "output", ignore_errors=True)
        if ended:
            break
        seen.add(there)
    assert number > 8
    assert seen == {False, True}
    work()
    assert [entry.name for entry in tmp_path.iterdir()] == ["output"]  # and what was left is gone


def factors(folder: Path) -> tuple[int, float, list[torch.Tensor]]:
    """Rank, alpha and factors of a saved adapter, as a model gets them."""
    config = PeftConfig.from_pretrained(folder)
    assert isinstance(config, LoraConfig)
    model = PeftModel.from_pretrained(llama(), folder)
    return config.r, config.lora_alpha, [p.detach() for n, p in model.named_parameters() if "lora_" in n]


def same(one: tuple[int, float, list[torch.Tensor]], other: tuple[int, float, list[torch.Tensor]]) -> bool:
    return one[:2] == other[:2] and all(map(torch.equal, one[2], other[2]))


SAVED: dict[str, Callable[[Any, Path], object]] = {
    "save_pretrained": lambda model, folder: model.save_pretrained(folder),
    "save_as_lora": lambda model, folder: save_as_lora(folder, model, 2),
}


@pytest.mark.filterwarnings(
    "ignore:Converting a PEFT adapter to LoRA that is already", "ignore:.*saving was interrupted"
)
@pytest.mark.parametrize("save", SAVED)
def test_an_adapter_that_is_saved_over_another_is_one_of_them(save: str, tmp_path: Path) -> None:
    # Of the same shapes, so that nothing but the configuration would tell them apart.
    folder, old, new = tmp_path / "adapter", adapted(1, lora_alpha=16), adapted(2, lora_alpha=64)
    SAVED[save](new, tmp_path / "new")
    old.save_pretrained(tmp_path / "old")
    wanted, seen = [factors(tmp_path / name) for name in ("old", "new")], set()
    for number in count():
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "old", folder)
        if number % 3 == 0:
            ended = not faults.killed_at(folder, number, lambda: SAVED[save](new, folder))
        else:
            act = FULL if number % 3 == 1 else faults.interrupt()
            ended = not interrupted(folder, number, act, lambda: SAVED[save](new, folder))
        found = factors(folder)
        which = [same(found, each) for each in wanted]
        assert sum(which) == 1, number
        if ended:
            break
        seen.add(which[1])
    assert number > 8
    assert seen == {False, True}
    assert which[1]


def test_a_reader_that_knows_no_journal_refuses_what_is_half_there(tmp_path: Path) -> None:
    old, new = adapted(1, lora_alpha=2), adapted(2, lora_alpha=64)
    refused = 0
    for number in count():
        shutil.rmtree(tmp_path / "a", ignore_errors=True)
        old.save_pretrained(tmp_path / "a")
        if not faults.killed_at(tmp_path / "a", number, lambda: new.save_pretrained(tmp_path / "a")):
            break
        (tmp_path / "a" / ".partial-journal.json").unlink(missing_ok=True)  # as if it were not known
        try:
            rank, alpha, found = factors(tmp_path / "a")
        except CheckpointError:
            refused += 1
        else:
            assert alpha in (2, 64), rank
            of = old if alpha == 2 else new
            assert all(map(torch.equal, found, [p for n, p in of.named_parameters() if "lora_" in n])), number
    assert refused
