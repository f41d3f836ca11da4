"""An adapter of Megatron's layers answers alike on transformers', and one of transformers' alike on Megatron's."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import outcomes
import pytest
import torch
import torch.distributed as dist
import world
from gpt import EXPERTS, FFN, GROUPS, HEADS, HIDDEN, LAYERS, POSITIONS, VOCABULARY, Division, chunks, moe
from torch import Tensor

from lorica import LoraConfig, PeftModel, convert_adapter, get_peft_model
from lorica.convert.geometry import Geometry
from lorica.parallel import sum_gradients

world.need_megatron()

WHOLE = Division()
EXPERT_LAYERS = ["linear_qkv", "linear_proj", "router", "linear_fc1", "linear_fc2"]
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "max_position_embeddings": POSITIONS,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attn_implementation": "eager",
}


def counterpart(model: Any, *, routed: bool = False) -> Any:
    """Return transformers' model with the weights of a whole model of Megatron's: Llama, or Mixtral."""
    from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

    if routed:
        sizes = SIZES | {"intermediate_size": FFN // 2, "num_local_experts": EXPERTS, "num_experts_per_tok": 2}
        found: Any = MixtralForCausalLM(MixtralConfig(**sizes))
    else:
        found = LlamaForCausalLM(LlamaConfig(**SIZES))
    weights = {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
    found.load_state_dict(renamed(weights, routed=routed))
    return found.eval()


def renamed(weights: dict[str, Tensor], *, routed: bool) -> dict[str, Tensor]:
    """Return weights under transformers' names."""
    order = Geometry(LAYERS, HEADS, GROUPS, HIDDEN // HEADS).interleaved()
    result = {
        "model.embed_tokens.weight": weights["embedding.word_embeddings.weight"],
        "model.norm.weight": weights["decoder.final_layernorm.weight"],
        "lm_head.weight": weights["output_layer.weight"],
    }
    for layer in range(LAYERS):
        ours, theirs = f"decoder.layers.{layer}", f"model.layers.{layer}"
        fused = weights[f"{ours}.self_attention.linear_qkv.weight"]
        plain = torch.empty_like(fused)
        plain[order] = fused
        half = GROUPS * HIDDEN // HEADS
        for name, part in zip("qkv", plain.split([HIDDEN, half, half]), strict=True):
            result[f"{theirs}.self_attn.{name}_proj.weight"] = part
        result[f"{theirs}.self_attn.o_proj.weight"] = weights[f"{ours}.self_attention.linear_proj.weight"]
        result[f"{theirs}.input_layernorm.weight"] = weights[f"{ours}.input_layernorm.weight"]
        result[f"{theirs}.post_attention_layernorm.weight"] = weights[f"{ours}.pre_mlp_layernorm.weight"]
        if routed:
            inner = [f"{ours}.mlp.experts.local_experts.{expert}" for expert in range(EXPERTS)]
            for leaf, word in (("linear_fc1", "gate_up_proj"), ("linear_fc2", "down_proj")):
                result[f"{theirs}.mlp.experts.{word}"] = torch.stack([weights[f"{e}.{leaf}.weight"] for e in inner])
            result[f"{theirs}.mlp.gate.weight"] = weights[f"{ours}.mlp.router.weight"]
            continue
        gate, up = weights[f"{ours}.mlp.linear_fc1.weight"].chunk(2)
        result |= {f"{theirs}.mlp.gate_proj.weight": gate, f"{theirs}.mlp.up_proj.weight": up}
        result[f"{theirs}.mlp.down_proj.weight"] = weights[f"{ours}.mlp.linear_fc2.weight"]
    return result


def shared_folder() -> Path:
    """Return a folder that all ranks know."""
    made = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(made)
    return Path(made[0])


@torch.no_grad()
def loss_of(model: Any) -> Tensor:
    """Return transformers' mean loss on the tokens that :func:`world.train` has."""
    losses = []
    for batch in world.tokens(4):
        logits = model(input_ids=batch[:, :-1]).logits
        losses.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()))
    return torch.stack(losses).mean()


@torch.no_grad()
def logits_of(model: Any) -> Tensor:
    """Return the logits of a whole model of Megatron's."""
    ids = world.tokens(1)[0][:, :-1].contiguous()
    found: Tensor = model(ids, torch.arange(ids.shape[1]).expand_as(ids), None)
    return found


def train(model: Any, models: list[Any], steps: int = 3) -> None:
    """Train the adapter on the ranks that there are."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        world.train(models, world.tokens(4))
        sum_gradients(model)
        optimizer.step()


def from_megatron(division: Division, wanted: LoraConfig, *, routed: bool = False) -> None:
    """Adapt Megatron's model, train, save, convert, load on transformers' model, and compare answers."""
    folder = shared_folder()
    changes: dict[str, Any] = moe(num_layers=LAYERS) if routed else {}
    with world.divided(division):
        models = chunks(division, **changes)
        model = outcomes.adapted(models, wanted)
        before = world.train(models, world.tokens(4), forward_only=True)
        train(model, models)
        loss = world.train(models, world.tokens(4), forward_only=True)
        assert loss < before, "nothing was learned"
        model.save_pretrained(folder / "saved", save_embedding_layers=False)
    with world.divided(WHOLE):
        [whole] = chunks(WHOLE, **changes)
        base = counterpart(whole, routed=routed)
        plain = loss_of(base)
        PeftModel.from_pretrained(whole, folder / "saved")
        logits = logits_of(whole)
    assert not torch.isclose(loss, plain, rtol=1e-3), "the adapter changes nothing, so nothing is compared"
    if dist.get_rank() == 0:
        config = base.config.to_dict()
        convert_adapter(folder / "saved", folder / "moved", source="megatron-bridge", target="peft", model=config)
        adapted = PeftModel.from_pretrained(base, folder / "moved").eval()
        torch.testing.assert_close(loss_of(adapted), loss, rtol=1e-5, atol=0)
        found = adapted(input_ids=world.tokens(1)[0][:, :-1]).logits
        torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-5)
        shutil.rmtree(folder)
    dist.barrier()


@world.case(ranks=4, divisions=[Division(tp=2, sp=True, pp=2), Division(tp=2)])
def a_dense_adapter(division: Division) -> None:
    from_megatron(division, outcomes.config())


@world.case(ranks=4, divisions=[Division(tp=2, sp=True)])
def one_pair_for_a_fused_layer(division: Division) -> None:
    from_megatron(division, outcomes.config(fused_as_one=True))


@world.case(ranks=4, divisions=[Division(tp=2)])
def magnitudes(division: Division) -> None:
    layers = ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]
    from_megatron(division, outcomes.config(use_dora=True, target_modules=layers))


@world.case(ranks=4, divisions=[Division(ep=2), Division(tp=2, sp=True, ep=2)])
def an_adapter_of_experts(division: Division) -> None:
    from_megatron(division, outcomes.config(target_modules=EXPERT_LAYERS, lora_alpha=200), routed=True)


@world.case(ranks=4, divisions=[Division(tp=2, sp=True, pp=2)])
def an_adapter_of_transformers(division: Division) -> None:
    """The other way: trained on transformers, loaded by lorica on Megatron's layers."""
    folder = shared_folder()
    with world.divided(WHOLE):
        base = counterpart(chunks(WHOLE)[0])
    torch.manual_seed(3)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens", "lm_head"]
    adapted = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=names, init_lora_weights=False))
    loss = loss_of(adapted)
    if dist.get_rank() == 0:
        adapted.save_pretrained(str(folder / "saved"), save_embedding_layers=False)
        convert_adapter(folder / "saved", folder / "moved", source="peft", target="peft", names="megatron")
    dist.barrier()
    with world.divided(division):
        models = chunks(division)
        holder = models[0] if len(models) == 1 else torch.nn.ModuleList(models)
        PeftModel.from_pretrained(holder, folder / "moved")
        found = world.train(models, world.tokens(4), forward_only=True)
    torch.testing.assert_close(found, loss, rtol=1e-5, atol=0)
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder)


@pytest.mark.parametrize("ranks", world.sizes(__name__))
def test_moved_to_transformers(ranks: int, request: pytest.FixtureRequest) -> None:
    world.run(__name__, ranks, request.config.getoption("--cases"))
