"""accelerate prepares, saves and loads lorica's models as it does peft's, on one rank and on two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft", reason="the comparison is with peft")
pytest.importorskip("accelerate", reason="it is about accelerate")

import ranks
import real

import models

pytestmark = pytest.mark.filterwarnings("ignore")

FIELDS = {"r": 4, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}


def adapted(name: str) -> Any:
    lib = real.library(name)
    return models.randomise(lib.get_peft_model(models.tiny_llama(), lib.LoraConfig(**FIELDS)), scale=0.1)


def batches() -> Any:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(0, models.VOCABULARY, (32, 9), generator=generator)
    return torch.utils.data.DataLoader(list(rows), batch_size=4)


class Run:
    """A training loop as accelerate's guides write it."""

    def __init__(self, name: str) -> None:
        from accelerate import Accelerator

        self.accelerator = Accelerator(cpu=True)
        model = adapted(name).train()
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
        self.model, self.optimizer, self.loader = self.accelerator.prepare(model, optimizer, batches())

    def steps(self, first: int, last: int) -> list[float]:
        losses = []
        for number, batch in enumerate(self.loader):
            if first <= number < last:
                loss = self.model(input_ids=batch, labels=batch).loss
                self.accelerator.backward(loss)
                self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
                self.optimizer.step()
                self.optimizer.zero_grad()
                losses.append(self.accelerator.reduce(loss.detach(), "mean").item())
        return losses

    def save(self, folder: Path) -> None:
        plain = self.accelerator.unwrap_model(self.model)
        state = self.accelerator.get_state_dict(self.model)
        plain.save_pretrained(folder, state_dict=state, is_main_process=self.accelerator.is_main_process)
        self.accelerator.wait_for_everyone()


def test_the_losses_are_pefts():
    found = {name: Run(name).steps(0, 6) for name in real.LIBRARIES}
    real.assert_same_losses(found["lorica.compat.peft"], found["peft"])


def test_saved_state_goes_on_where_it_was(tmp_path):
    whole = Run("lorica.compat.peft").steps(0, 6)
    run = Run("lorica.compat.peft")
    run.steps(0, 3)
    run.accelerator.save_state(str(tmp_path))
    other = Run("lorica.compat.peft")
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter.mul_(0.5)
    other.accelerator.load_state(str(tmp_path))
    assert other.steps(3, 6) == whole[3:]


@pytest.mark.parametrize("reader", real.LIBRARIES)
def test_what_is_saved_through_it_loads_in_either_library(tmp_path, reader):
    run = Run("lorica.compat.peft")
    run.steps(0, 3)
    run.save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    read = real.library(reader).PeftModel.from_pretrained(models.tiny_llama(), tmp_path)
    expected = models.logits(run.accelerator.unwrap_model(run.model).eval(), models.ids(2, 7))
    torch.testing.assert_close(models.logits(read.eval(), models.ids(2, 7)), expected)


def test_it_sees_an_adapted_model():
    """Where accelerate asks, which decides what it saves of a sharded model."""
    from accelerate.utils import is_peft_model
    from accelerate.utils.fsdp_utils import _get_model_state_dict, _set_model_state_dict

    import lorica

    model = adapted("lorica.compat.peft")
    assert is_peft_model(model)
    assert not is_peft_model(lorica.get_peft_model(models.tiny_llama(), lorica.LoraConfig(**FIELDS)))
    state = _get_model_state_dict(model, adapter_only=True)
    expected = lorica.get_peft_model_state_dict(model)
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], tensor) for key, tensor in expected.items())
    other = adapted("lorica.compat.peft")
    with torch.no_grad():
        for key, parameter in other.named_parameters():
            if "lora_" in key:
                parameter.zero_()
    _set_model_state_dict(other, state, adapter_only=True)
    assert torch.equal(models.logits(other, models.ids(2, 7)), models.logits(model, models.ids(2, 7)))


def on_a_rank(name: str, folder: str) -> tuple[list[float], torch.Tensor]:
    run = Run(name)
    assert type(run.model).__name__ == "DistributedDataParallel"
    losses = run.steps(0, 3)
    run.save(Path(folder))
    plain = run.accelerator.unwrap_model(run.model)
    return losses, torch.cat([p.detach().flatten() for p in plain.parameters() if p.requires_grad])


@pytest.mark.slow
def test_two_ranks_train_as_with_peft(tmp_path):
    found = {name: ranks.run(2, on_a_rank, name, str(tmp_path / name)) for name in real.LIBRARIES}
    (theirs, _), _ = found["peft"]
    (ours, first), (_, second) = found["lorica.compat.peft"]
    assert torch.equal(first, second)
    real.assert_same_losses(ours, theirs)
    folder = tmp_path / "lorica.compat.peft"
    read = real.library("peft").PeftModel.from_pretrained(models.tiny_llama(), folder)
    values = torch.cat([p.detach().flatten() for key, p in read.named_parameters() if "lora_" in key])
    torch.testing.assert_close(values, first)
