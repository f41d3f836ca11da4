"""The specs of a live cut model say what its ranks have, of the base model and of adapters put on it."""

from __future__ import annotations

from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from torch import Tensor, nn

import models
from lorica import LoraConfig, get_peft_model, get_peft_model_state_dict
from lorica.errors import LayoutError
from lorica.layout.specs import WeightSpecs, same
from lorica.parallel import GQAQKVColumnParallelLinear, parallelize, specs_of

pytest.importorskip("transformers")
RANK = 2
TARGETS = {
    "llama": ["q_proj", "k_proj", "o_proj", "down_proj", "embed_tokens"],
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
}


def build(name: str) -> nn.Module:
    if name == "llama":
        return models.tiny_llama(tied=True, layers=1, attention_bias=True)
    from transformers import Phi3Config, Phi3ForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = Phi3Config(vocab_size=40, num_hidden_layers=1, pad_token_id=0, max_position_embeddings=32, **sizes)
    return Phi3ForCausalLM(config).eval()


def _cut(name: str, size: int) -> tuple[dict[str, Any], dict[str, int], dict[str, Tensor], dict[str, Tensor], Any]:
    mesh = dist.device_mesh.init_device_mesh("cpu", (size,), mesh_dim_names=("tp",))
    model = parallelize(build(name), mesh)
    specs = specs_of(model)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    torch.manual_seed(3)
    config = LoraConfig(r=RANK, target_modules=TARGETS[name], init_lora_weights=False)
    adapted = get_peft_model(model, config)
    factors = {
        key.replace(".default", "").removeprefix("base_model.model."): tensor.detach().clone()
        for key, tensor in adapted.state_dict().items()
        if "lora_" in key
    }
    with pytest.raises(LayoutError, match="is adapted"):
        specs_of(adapted)
    file = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    return specs.to_dict(), {"tp": dist.get_rank()}, state, factors, file


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize(("name", "size"), [("llama", 4), ("phi3", 2)])
def test_a_cut_model_has_what_its_specs_say(name: str, size: int):
    found = ranks.run(size, _cut, name, size)
    specs = WeightSpecs.from_dict(found[0][0])
    assert all(WeightSpecs.from_dict(values) == specs for values, *_ in found)
    whole = build(name).state_dict()
    wanted = {key: tensor for key, tensor in whole.items() if (key != "lm_head.weight" or name == "phi3")}
    back = specs.to_logical([(at, state) for _, at, state, *_ in found])
    assert back.keys() == wanted.keys()
    assert all(same(back[key], wanted[key]) for key in wanted)
    for _, at, state, *_ in found:
        local = specs.to_local(wanted, at)
        assert local.keys() == state.keys()
        assert all(same(local[key], state[key]) for key in state)
    file: dict[str, Tensor] = found[0][4]
    owners = {key.split(".lora_")[0].removeprefix("base_model.model.") for key in file}
    factors = specs.factors(RANK, only=owners)
    logical = factors.to_logical([(at, held) for _, at, _, held, _ in found])
    assert logical.keys() == file.keys()
    assert all(same(logical[key], file[key]) for key in file)
    assert all(
        same(tensor, held[key]) for _, at, _, held, _ in found for key, tensor in factors.to_local(file, at).items()
    )


class _Attention(nn.Module):
    def __init__(self, axis: Any, fuse: bool) -> None:
        super().__init__()
        self.qkv = GQAQKVColumnParallelLinear(6, (16, 4), axis=axis, head_dim=2, fuse_qkv=fuse)


def _grouped(fuse: bool) -> tuple[dict[str, Any], dict[str, int], dict[str, Tensor]]:
    mesh = dist.device_mesh.init_device_mesh("cpu", (4,), mesh_dim_names=("tp",))
    module = _Attention(mesh, fuse)
    return specs_of(module).to_dict(), {"tp": dist.get_rank()}, dict(module.state_dict())


@pytest.mark.parametrize("fuse", [True, False])
def test_what_a_grouped_query_layer_fuses_has_logical_names(fuse: bool):
    found = ranks.run(4, _grouped, fuse)
    specs = WeightSpecs.from_dict(found[0][0])
    back = specs.to_logical([(at, state) for _, at, state in found])
    shapes = {name: tuple(tensor.shape) for name, tensor in back.items() if name.endswith("weight")}
    assert shapes == {"q_proj.weight": (16, 6), "k_proj.weight": (4, 6), "v_proj.weight": (4, 6)}
    for _, at, state in found:
        assert all(same(tensor, state[name]) for name, tensor in specs.to_local(back, at).items())
