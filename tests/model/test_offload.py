"""``ephemeral_gpu_offload``: what is computed from a weight visits the accelerator, and nothing else changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorica
from lorica.adapt import inject
from lorica.config.lora import LoraRuntimeConfig
from lorica.init import borrow
from lorica.variants import dora

CASES = [{"use_dora": True}, {"init_lora_weights": "pissa"}, {"init_lora_weights": "olora", "use_dora": True}]


def base() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 8))


def adapted(fields: dict[str, Any], *, offload: bool) -> lorica.PeftModel:
    torch.manual_seed(1)
    runtime = LoraRuntimeConfig(ephemeral_gpu_offload=offload)
    config = lorica.LoraConfig(r=2, target_modules=["0", "2"], runtime_config=runtime, **fields)
    return lorica.get_peft_model(base(), config)


@pytest.fixture
def visits(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of what was sent to an accelerator, which is a CPU that says it is none."""
    seen: list[tuple[int, ...]] = []

    def there(tensor: Tensor) -> Tensor:
        if borrow._BORROWED.get() is not None:
            seen.append(tuple(tensor.shape))
        return tensor

    monkeypatch.setattr(borrow, "accelerator", lambda: torch.device("cpu"))
    for module in (inject, dora):
        monkeypatch.setattr(module, "there", there)
    return seen


@pytest.mark.parametrize("fields", CASES, ids=str)
def test_weights_visit_while_a_start_is_computed_and_not_in_a_forward(
    fields: dict[str, Any], visits: list[tuple[int, ...]], tmp_path: Path
) -> None:
    adapted(fields, offload=False)
    assert not visits
    model = adapted(fields, offload=True)
    assert {(12, 16), (8, 12)} <= set(visits)
    visits.clear()
    model(torch.randn(3, 16)).sum().backward()
    assert not visits
    model.save_pretrained(str(tmp_path))
    assert "ephemeral" not in (tmp_path / "adapter_config.json").read_text()
    lorica.PeftModel.from_pretrained(base(), str(tmp_path))
    assert not visits
    loaded = lorica.PeftModel.from_pretrained(base(), str(tmp_path), ephemeral_gpu_offload=True, low_cpu_mem_usage=True)
    subtracts = "init_lora_weights" in fields
    assert bool(visits) == subtracts  # a file has the magnitudes; what a start took out is computed again
    visits.clear()
    if not subtracts:
        loaded.load_adapter(str(tmp_path), "more", ephemeral_gpu_offload=True)
        assert "more" in loaded.peft_config


@pytest.mark.parametrize("fields", CASES, ids=str)
def test_without_an_accelerator_nothing_changes(fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(borrow, "accelerator", lambda: None)
    plain, offloaded = adapted(fields, offload=False), adapted(fields, offload=True)
    for (name, one), (_, two) in zip(plain.state_dict().items(), offloaded.state_dict().items(), strict=True):
        assert torch.equal(one, two), name


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")
@pytest.mark.parametrize("fields", CASES, ids=str)
def test_with_an_accelerator_all_is_back_on_the_cpu_and_nearly_the_same(fields: dict[str, Any]) -> None:
    plain, offloaded = adapted(fields, offload=False), adapted(fields, offload=True)
    for (name, one), (_, two) in zip(plain.state_dict().items(), offloaded.state_dict().items(), strict=True):
        assert two.device.type == "cpu"
        assert torch.allclose(one, two, atol=1e-4), name


def test_a_context_that_fails_gives_back() -> None:
    with pytest.raises(RuntimeError), borrow.borrowing(True):
        raise RuntimeError
    assert borrow._BORROWED.get() is None
