"""Distributed checkpoints are written as the engine says whose library is loaded."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import nn

from lorica import LoraConfig, inject_adapter_in_model
from lorica.engines import registry
from lorica.engines.native.base import NativeEngine
from lorica.errors import AdapterError


class Theirs:
    """What a library makes of its modules: the names."""

    def state_of(self, module: nn.Module, prefix: str, sharded_offsets: Any, metadata: Any) -> dict[str, Any]:
        return {prefix + name: "base" for name, _ in module.named_parameters()}

    def sharded(self, tensor: Any, key: str, *args: Any) -> Any:
        return tuple(tensor.shape)


class Engine(NativeEngine):
    def knows(self, cls: type[nn.Module]) -> bool:
        return False

    def checkpoints(self) -> Any:
        return Theirs()


def adapted() -> Any:
    return inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"]), nn.Sequential(nn.Linear(4, 3)))[0]


def test_the_library_that_is_loaded_is_asked(monkeypatch):
    monkeypatch.setattr(registry, "ENGINES", [Engine(), *registry.ENGINES])
    layer = adapted()
    state = layer.sharded_state_dict("0.")
    assert state == {
        "0.weight": "base",
        "0.bias": "base",
        "0.lora_A.default.weight": (2, 4),
        "0.lora_B.default.weight": (3, 2),
    }
    # What was written before there was an adapter is found under the names of then.
    layer.load_state_dict({"weight": torch.ones(3, 4), "bias": torch.zeros(3)}, strict=False)
    assert (layer.base_layer.weight == 1).all()


def test_without_such_a_library_nothing_asks_for_it(monkeypatch):
    monkeypatch.delitem(sys.modules, "megatron.core", raising=False)
    with pytest.raises(AdapterError, match="save_pretrained"):
        adapted().sharded_state_dict("0.")
