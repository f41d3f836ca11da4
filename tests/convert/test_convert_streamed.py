"""A conversion has a few tensors in memory at a time, however many an adapter has.

Counted are the bytes of all tensors that are alive after each operation. What is mapped from a file is not in memory.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conversions import move
from safetensors.torch import save_file
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lorica import LoraConfig

LAYERS, HIDDEN, MLP, KV, RANK = 24, 32, 64, 16, 4
#: Rows and columns of each projection.
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KV, HIDDEN),
    "self_attn.v_proj": (KV, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (MLP, HIDDEN),
    "mlp.up_proj": (MLP, HIDDEN),
    "mlp.down_proj": (HIDDEN, MLP),
}


class Counted(TorchDispatchMode):
    """Counts the bytes of tensors in memory; ``most`` is the most that there were."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.most = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self._mapped: list[tuple[StorageWeakRef, int, int]] = []
        mapping = torch.UntypedStorage.from_file

        def mapped(*args: Any, **options: Any) -> torch.UntypedStorage:
            whole = mapping(*args, **options)  # slices of it, as torch.load takes them, do not say where they are from
            self._mapped.append((StorageWeakRef(whole), whole.data_ptr(), whole.data_ptr() + whole.nbytes()))
            return whole

        patch.setattr(torch.UntypedStorage, "from_file", mapped)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self._alive = {key: one for key, one in self._alive.items() if not one[0].expired()}
        for tensor in tree_leaves((args, found)):
            if isinstance(tensor, Tensor) and self._in_memory(storage := tensor.untyped_storage()):
                self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.most = max(self.most, sum(size for _, size in self._alive.values()))
        return found

    def _in_memory(self, storage: torch.UntypedStorage) -> bool:
        self._mapped = [one for one in self._mapped if not one[0].expired()]
        inside = any(start <= storage.data_ptr() < stop for _, start, stop in self._mapped)
        return storage.filename is None and not inside


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``peft/``, an adapter of many layers, and ``model/``, whose it is."""
    from transformers import LlamaConfig

    folder = tmp_path_factory.mktemp("many")
    sizes = {"hidden_size": HIDDEN, "intermediate_size": MLP, "num_hidden_layers": LAYERS, "vocab_size": 40}
    LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, head_dim=8).save_pretrained(folder / "model")
    LoraConfig(target_modules=[name.partition(".")[2] for name in SHAPES], r=RANK).save_pretrained(folder / "peft")
    tensors = {}
    for layer in range(LAYERS):
        for name, (rows, columns) in SHAPES.items():
            place = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{place}.lora_A.weight"] = torch.randn(RANK, columns)
            tensors[f"{place}.lora_B.weight"] = torch.randn(rows, RANK)
    save_file(tensors, folder / "peft" / "adapter_model.safetensors", {"format": "pt"})
    return folder


#: The largest tensor there can be: the B of gate and up as one, with their ranks added up.
LARGEST = 4 * 2 * MLP * 2 * RANK
WHOLE = 4 * RANK * LAYERS * sum(rows + columns for rows, columns in SHAPES.values())


@pytest.mark.parametrize("ranks", [1, 4])
@pytest.mark.parametrize("system", ["neuron", "megatron-bridge"])
def test_a_few_tensors_are_in_memory(
    saved: Path, system: str, ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there, back = Counted(monkeypatch), Counted(monkeypatch)
    with there:
        move(saved / "peft", tmp_path / "there", ("peft", system), model=saved / "model", tensor_parallel=ranks)
    with back:
        move(tmp_path / "there", tmp_path / "back", (system, "peft"))
    for counted in (there, back):
        assert LARGEST // 4 <= counted.most <= 6 * LARGEST < WHOLE / 5
