"""Stacked experts over ranks, as transformers lays them: outputs, gradients, merged weights and files of one process.

The contract tries one architecture on every division; here are the others, each way in which tokens reach the experts,
and experts that bring several batches together.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from torch import Tensor, nn

import lorica
import mixtures
import models
from lorica.checkpoint.names import adapter_entries
from lorica.checkpoint.pieces import collect, pieces
from lorica.parallel import sum_gradients

TP2 = {"tp_size": 2}
EP2 = {"tp_size": 2, "ep_size": 2}
EP2_DATA = {"fsdp_size": 2, "ep_size": 2}
EP4 = {"tp_size": 2, "fsdp_size": 2, "ep_size": 4}


def load(folder: str, implementation: str, division: dict[str, Any] | None = None) -> nn.Module:
    """The saved model, whole or laid over ranks."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    options = {} if division is None else {"distributed_config": DistributedConfig(**division)}
    model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation=implementation, **options)
    return model.eval()


def adapt(base: nn.Module, fields: dict[str, Any]) -> nn.Module:
    torch.manual_seed(5)
    config = lorica.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_parameters": mixtures.STACKS, **fields})
    return lorica.get_peft_model(base, config)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """The logical gradients by the factors' names in a file, on rank 0."""
    from dataclasses import replace

    entries = adapter_entries(model, "default", model.peft_config["default"])
    found = {name: replace(entry, tensor=entry.tensor.grad) for name, entry in entries.items()}
    if dist.is_initialized():
        return collect(pieces(found))
    return {name: entry.saved(entry.tensor).clone() for name, entry in found.items()}


def one_process(folder: str, fields: dict[str, Any], batches: Tensor, saved: str) -> dict[str, Any]:
    """What one process gives for every batch, the gradients of the mean loss, and the adapter's file."""
    model = adapt(load(folder, "eager"), fields)
    start = {name: tensor.clone() for name, tensor in lorica.get_peft_model_state_dict(model).items()}
    generator = torch.Generator().manual_seed(3)
    state = {name: 0.3 * torch.randn(tensor.shape, generator=generator) for name, tensor in start.items()}
    lorica.set_peft_model_state_dict(model, state, strict=True)
    model.save_pretrained(saved)
    outputs = []
    for batch in batches:
        output = model(batch)
        outputs.append(output.logits.detach())
        (mixtures.loss_of(output) / len(batches)).backward()
    return {"start": start, "state": state, "outputs": outputs, "gradients": gradients(model)}


def on_ranks(
    folder: str, implementation: str, division: dict[str, Any], fields: dict[str, Any], batches: Tensor, saved: str
) -> dict[str, Any]:
    """The same on many ranks; logical tensors on rank 0."""
    model = adapt(load(folder, implementation, division), fields)
    start = {name: tensor.clone() for name, tensor in lorica.get_peft_model_state_dict(model).items()}
    model.load_adapter(saved, "default")
    share = batches[dist.get_rank() // division.get("tp_size", 1)]
    output = model(share)
    mixtures.loss_of(output).backward()
    sum_gradients(model)
    found = {"start": start, "trained": output.logits.detach(), "gradients": gradients(model)}
    model.save_pretrained(Path(saved).with_name("again"))
    with torch.no_grad():
        found["inferred"] = model(share).logits
        model.merge_adapter()
        found["merged"] = model(share).logits
    return found


def close(actual: Tensor, expected: Tensor) -> bool:
    return float((actual - expected).detach().norm()) <= 1e-5 * float(expected.detach().norm())


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view")  # transformers' own experts do
@pytest.mark.parametrize(
    ("kind", "division", "fields", "implementation"),
    [
        ("gpt_oss", EP2, {}, "grouped_mm"),
        ("mixtral", TP2, {"r": 3}, "grouped_mm"),
        ("qwen3_moe", EP2 | {"ep_implementation": "all_reduce"}, {"r": 3}, "grouped_mm"),
        ("qwen3_moe", EP2 | {"ep_implementation": "all_reduce"}, {"share_expert_adapters": True}, "batched_mm"),
        ("deepseek_v3", EP2_DATA, {"share_expert_adapters": True}, "eager"),
        ("qwen3_moe", EP4, {}, "grouped_mm"),
        ("qwen3_moe", EP4, {"share_expert_adapters": True, "target_modules": ["q_proj", "o_proj"]}, "grouped_mm"),
    ],
    ids=["gpt-oss ep", "mixtral tp", "all-reduce", "all-reduce shared", "deepseek data", "ep4", "ep4 shared"],
)
def test_as_on_one_process(kind, division, fields, implementation, tmp_path):
    folder, saved = str(tmp_path / "model"), str(tmp_path / "adapter")
    mixtures.moe(kind).save_pretrained(folder)
    fields = {"target_modules": []} | fields
    groups, tensor_parallel = division.get("fsdp_size", 1), division.get("tp_size", 1)
    batches = models.ids(2 * groups, 7).view(groups, 2, 7)
    wanted = one_process(folder, fields, batches, saved)
    found = ranks.run(groups * tensor_parallel, on_ranks, folder, implementation, division, fields, batches, saved)
    for rank, own in enumerate(found):
        for what in ("trained", "inferred", "merged"):
            assert close(own[what], wanted["outputs"][rank // tensor_parallel]), (what, rank)
    assert sorted(found[0]["gradients"]) == sorted(wanted["gradients"])
    for name, gradient in wanted["gradients"].items():
        assert close(found[0]["gradients"][name], gradient), name
        assert torch.equal(found[0]["start"][name], wanted["start"][name]), name
    again = lorica.PeftModel.from_pretrained(load(folder, "eager"), tmp_path / "again")
    for name, tensor in lorica.get_peft_model_state_dict(again).items():
        assert torch.equal(tensor, wanted["state"][name]), name


def refused(folder: str) -> str:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    model = load(folder, "eager")
    router = model.model.layers[0].mlp.gate
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    router.weight = nn.Parameter(distribute_tensor(router.weight.detach(), mesh, [Shard(0)]))
    with pytest.raises(lorica.errors.TargetError) as caught:
        adapt(model, {"target_parameters": ["model.layers.0.mlp.gate.weight"], "target_modules": []})
    return str(caught.value)


def test_a_matrix_that_is_cut_is_refused(tmp_path):
    mixtures.moe().save_pretrained(tmp_path)
    assert all(
        "mlp.gate.weight: a parameter [out, in] that is cut" in said for said in ranks.run(2, refused, str(tmp_path))
    )


def cut_later(fields: dict[str, Any]) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    from lorica.parallel import cutting, parallelize

    whole, model = (adapt(mixtures.moe(), fields | {"init_lora_weights": False}) for _ in range(2))
    with cutting(model) as base:
        parallelize(base, init_device_mesh("cpu", (2,), mesh_dim_names=("tp",)), sequence_parallel=True)
    batch = models.ids(2, 8)
    outputs = [each(batch) for each in (whole, model)]
    for output in outputs:
        mixtures.loss_of(output).backward()
    sum_gradients(model)
    assert close(outputs[1].logits, outputs[0].logits)
    wanted = {name: p.grad for name, p in whole.named_parameters() if ".experts." in name and p.requires_grad}
    found = {name: p.grad for name, p in model.named_parameters() if name in wanted}
    assert len(found) == len(wanted) == 8
    for name, gradient in wanted.items():
        assert close(found[name], gradient), name


@pytest.mark.parametrize(
    "fields", [{"target_modules": ["q_proj"]}, {"target_modules": [], "share_expert_adapters": True}]
)
def test_a_model_that_is_cut_around_its_experts(fields):
    ranks.run(2, cut_later, fields)


def random_states(folder: str, position: str) -> Tensor:
    model = adapt(load(folder, "eager", EP2), {"lora_dropout": 0.5, "dropout_position": position, "r": 3}).train()
    mixtures.loss_of(model(models.ids(1, 3))).backward()
    return torch.get_rng_state()


@pytest.mark.parametrize("position", ["pre", "post"])
def test_dropout_leaves_the_generators_in_step(position, tmp_path):
    """However many experts of a rank get tokens: what follows draws the same masks on all ranks that share a batch."""
    mixtures.moe().save_pretrained(tmp_path)
    states = ranks.run(2, random_states, str(tmp_path), position)
    assert torch.equal(*states)
