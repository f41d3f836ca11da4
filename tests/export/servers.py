"""What vLLM and SGLang do with the files of an adapter, written again from their sources: from file to deltas.

vLLM (https://github.com/vllm-project/vllm): ``vllm/lora/utils.py`` (``parse_fine_tuned_lora_name``),
``vllm/lora/lora_model.py`` at 0306474e (``check_unexpected_modules``), ``vllm/lora/peft_helper.py`` of 0.30,
``vllm/lora/model_manager.py`` at 01533aa8 (``_stack_moe_lora_weights``), ``vllm/lora/lora_weights.py`` (``pack_moe``).

SGLang (https://github.com/sgl-project/sglang): ``python/sglang/srt/lora/lora.py``, ``lora_config.py`` at 0ceb81fe,
``mem_pool.py`` at 00639c4d, ``utils.py`` at 01235a16.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

_PREFIX = "base_model.model."


def config_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "adapter_config.json").read_text())


class Vllm:
    """Loads an adapter as vLLM does.

    Args:
        linear: last parts of the names of a model's linear layers and embeddings.
        experts: how many there are in a layer, and their projections (``w1``, ``w2``, ``w3`` in that order).
        fused: whether the model's class says ``is_3d_moe_weight``.
    """

    def __init__(self, linear: set[str], experts: tuple[int, tuple[str, ...]] | None = None, *, fused: bool = False):
        self.linear, self.experts, self.fused = linear, experts, fused
        self.expected = set(linear)
        if experts is not None and not fused:
            self.expected |= {f"experts.{e}.{name}" for e in range(experts[0]) for name in experts[1]}
        if experts is not None:
            self.expected.add("experts")

    def config(self, directory: Path, max_rank: int) -> float:
        """The one scale of all modules."""
        config = config_of(directory)
        for field in ("r", "lora_alpha", "target_modules"):
            assert field in config
        assert not config["modules_to_save"]
        assert not config["use_dora"]
        assert config["bias"] == "none"
        assert config["r"] <= max_rank
        return config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"])

    @staticmethod
    def parse(name: str) -> tuple[str, bool]:
        start = 2 if name.startswith(_PREFIX) else 0
        parts = name.split(".")
        if parts[-1] == "weight" and parts[-2] in ("lora_A", "lora_B"):
            return ".".join(parts[start:-2]), parts[-2] == "lora_A"
        if parts[-1] in ("lora_embedding_A", "lora_embedding_B"):
            return ".".join(parts[start:-1]), parts[-1] == "lora_embedding_A"
        raise ValueError(f"{name} is unsupported LoRA weight")

    def check(self, name: str) -> None:
        if name.endswith((".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")) or "base_layer" in name:
            return
        module, _ = self.parse(name)
        suffix = module[module.find(".experts") + 1 :] if ".experts" in module else module.rsplit(".", 1)[-1]
        assert suffix in self.expected, f"{module} is not expected"

    def load(self, directory: Path, max_rank: int = 16) -> dict[str, Tensor]:
        """Module → delta, as its weight in a checkpoint lies; experts of a fused layer ``[E, out, in]``."""
        scale = self.config(directory, max_rank)
        loras: dict[str, dict[bool, Tensor]] = {}
        for name, tensor in load_file(directory / "adapter_model.safetensors").items():
            self.check(name)
            module, is_a = self.parse(name)
            assert tensor.shape[0 if is_a else 1] <= max_rank or ".experts" in module
            loras.setdefault(module, {})[is_a] = tensor * (1 if is_a else scale)
            if name.endswith("lora_embedding_B"):  # rows of the embedding are columns of A
                loras[module] = {True: loras[module][False].T, False: loras[module][True].T}
        self._need_all_projections(loras)
        deltas = {}
        for module, pair in loras.items():
            if module.endswith((".experts", ".experts.base_layer")):
                assert self.fused
                assert module.removesuffix(".base_layer") in loras
                assert module.removesuffix(".base_layer") + ".base_layer" in loras
                deltas[module] = self._stack(pair)
            else:
                deltas[module] = pair[False] @ pair[True]
        return deltas

    def _need_all_projections(self, loras: dict[str, Any]) -> None:
        if self.experts is None or self.fused:
            return
        count, names = self.experts
        for place in {name[: name.rindex(".experts.")] for name in loras if ".experts." in name}:
            for e in range(count):
                for name in names:
                    assert f"{place}.experts.{e}.{name}" in loras

    def _stack(self, pair: dict[bool, Tensor]) -> Tensor:
        count = self.experts[0]
        a = pair[True].reshape(count, -1, pair[True].shape[-1])
        b = pair[False].reshape(pair[False].shape[0], -1, count).permute(2, 0, 1)
        return b @ a


#: What SGLang calls the modules it has room for → how many projections are stacked in them.
_ROOM = {
    "qkv_proj": 3,
    **dict.fromkeys(("gate_up_proj", "fused_qkv_a_proj_with_mqa"), 2),
    **dict.fromkeys(("o_proj", "out_proj", "down_proj", "q_b_proj", "kv_b_proj", "embed_tokens", "lm_head"), 1),
}
_STACKED = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj"),
    **dict.fromkeys(("gate_proj", "up_proj"), "gate_up_proj"),
    **dict.fromkeys(("q_a_proj", "kv_a_proj_with_mqa"), "fused_qkv_a_proj_with_mqa"),
}
_PARTS = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj_with_mqa": ("q_a_proj", "kv_a_proj_with_mqa"),
}


class Sglang:
    """Loads an adapter as SGLang does.

    Args:
        layers: how many the model has.
    """

    def __init__(self, layers: int) -> None:
        self.layers = layers

    def load(self, directory: Path) -> dict[str, Tensor]:
        """``<layer>.<stacked module>`` (of an expert ``<layer>.<expert>.<stacked module>``) → delta."""
        config = config_of(directory)
        assert isinstance(config["target_modules"], list)
        wanted = {_STACKED.get(name.split(".")[-1], name.split(".")[-1]) for name in config["target_modules"]}
        assert wanted <= set(_ROOM), wanted
        rank, scale = config["r"], config["lora_alpha"] / config["r"]
        layers: list[dict[str, Tensor]] = [{} for _ in range(self.layers)]
        ends: dict[str, Tensor] = {}
        dropped = []
        for name, tensor in load_file(directory / "adapter_model.safetensors").items():
            found = re.search(r"layers\.(\d+)\.", name)
            if found:
                layers[int(found[1])][name] = tensor
            elif ("embed_tokens" in name and "embed_tokens" in wanted) or ("lm_head" in name and "lm_head" in wanted):
                ends[name] = tensor
            else:
                dropped.append(name)
        assert dropped == []
        deltas: dict[str, Tensor] = {}
        for number, weights in enumerate(layers):
            self._stack(weights)
            for place, pair in self._pairs(weights, wanted).items():
                deltas[f"{number}.{place}"] = self._delta(place.rpartition(".")[2], pair, rank, scale)
        for end in ("embed_tokens", "lm_head"):
            of_end = {name.rpartition(f"{end}.")[2]: tensor for name, tensor in ends.items() if f".{end}." in name}
            if of_end:
                a = of_end.get("lora_embedding_A", of_end.get("lora_A.weight"))
                b = of_end.get("lora_embedding_B", of_end.get("lora_B.weight"))
                assert a.shape[0] == b.shape[1] == rank
                deltas[end] = scale * (b @ a).T if end == "embed_tokens" else scale * (b @ a)
        return deltas

    @classmethod
    def _stack(cls, weights: dict[str, Tensor]) -> None:
        """``_normalize_weights``: what is missing is what it would fail at."""
        cls._stack_qkv(weights)
        for old, new in (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")):
            for name in [name for name in weights if f".{old}." in name]:
                weights[name.replace(f".{old}.", f".{new}.")] = weights.pop(name)
        for name in list(weights):
            if "gate_proj" in name:
                up = weights.pop(name.replace("gate_proj", "up_proj"), torch.zeros_like(weights[name]))
                weights[name.replace("gate_proj", "gate_up_proj")] = torch.cat((weights.pop(name), up))
            elif "gate_up_proj" in name and "lora_A" in name:
                weights[name] = weights[name].repeat(2, 1)
        for name in [name for name in weights if "q_a_proj" in name]:
            other = weights.pop(name.replace("q_a_proj", "kv_a_proj_with_mqa"))
            weights[name.replace("q_a_proj", "fused_qkv_a_proj_with_mqa")] = torch.cat((weights.pop(name), other))

    @staticmethod
    def _stack_qkv(weights: dict[str, Tensor]) -> None:
        for name in list(weights):
            if "q_proj" in name:
                k, v = (name.replace("q_proj", other) for other in ("k_proj", "v_proj"))
                has_k = any("k_proj" in other for other in weights)
                middle = weights[k] if has_k else torch.zeros_like(weights[v])
                weights[name.replace("q_proj", "qkv_proj")] = torch.cat((weights.pop(name), middle, weights.pop(v)))
                weights.pop(k, None)
            elif "qkv_proj" in name and "lora_A" in name:
                weights[name] = weights[name].repeat(3, 1)

    @staticmethod
    def _pairs(weights: dict[str, Tensor], wanted: set[str]) -> dict[str, dict[bool, Tensor]]:
        pairs: dict[str, dict[bool, Tensor]] = {}
        for name, tensor in weights.items():
            module = max((target for target in wanted if target in name), key=len)  # get_target_module_name
            expert = re.search(r"experts\.(\d+)\.", name)
            place = f"{expert[1]}.{module}" if expert else module
            side = "lora_A" in name
            assert side not in pairs.setdefault(place, {}), f"two weights for {place}: {name}"
            pairs[place][side] = tensor
        return pairs

    @staticmethod
    def _delta(module: str, pair: dict[bool, Tensor], rank: int, scale: float) -> Tensor:
        count = _ROOM[module]
        a, b = pair[True], pair[False]
        assert a.shape[0] == rank * count, f"buffer shape of {module}: {rank * count}, weight {tuple(a.shape)}"
        assert b.shape[1] == rank
        if count == 1:
            return scale * (b @ a)
        return a, b * scale  # type: ignore[return-value]  # taken apart by the caller, who knows the parts' sizes


def parts_of(module: str, pair: tuple[Tensor, Tensor], sizes: list[int]) -> dict[str, Tensor]:
    """The deltas of the projections stacked in a module."""
    a, b = pair
    names = _PARTS[module]
    split = zip(names, a.chunk(len(names)), b.split(sizes), strict=True)
    return {name: b_part @ a_part for name, a_part, b_part in split}


def stacked_in(module: str) -> tuple[str, ...]:
    return _PARTS.get(module, ())
