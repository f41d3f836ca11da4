"""The description of neuronx-distributed's layers, on stand-ins of the same names and calls; see there."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import neuronx_stand_in as nxd
import pytest
import ranks
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import lorica
from lorica.compat import optimum_neuron as neuron
from lorica.engines.native.collectives import shares
from lorica.errors import LayoutError, TargetError
from lorica.layout import grouped_heads
from lorica.parallel import sum_gradients

WIDTH, HEAD, HEADS, KV, MLP, WORDS, RANK = 16, 2, 16, 4, 24, 24, 3
TARGETS = ["embed", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "head"]


class Whole(nn.Module):
    """One block: an embedding, attention without rotations, a gated MLP, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        sizes = {"q_proj": HEADS * HEAD, "k_proj": KV * HEAD, "v_proj": KV * HEAD}
        self.attn = nn.ModuleDict({name: nn.Linear(WIDTH, rows, bias=False) for name, rows in sizes.items()})
        self.attn["o_proj"] = nn.Linear(HEADS * HEAD, WIDTH)
        self.mlp = nn.ModuleDict({name: nn.Linear(WIDTH, MLP, bias=False) for name in ("gate_proj", "up_proj")})
        self.mlp["down_proj"] = nn.Linear(MLP, WIDTH)
        self.head = nn.Linear(WIDTH, WORDS)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        q, k, v = (self.attn[f"{name}_proj"](x) for name in "qkv")
        x = x + self.attn["o_proj"](attend(q, k, v, HEADS // KV))
        return self.head(x + self.mlp["down_proj"](F.silu(self.mlp["gate_proj"](x)) * self.mlp["up_proj"](x)))


def attend(q: Tensor, k: Tensor, v: Tensor, group: int) -> Tensor:
    q, k, v = (t.unflatten(-1, (-1, HEAD)).transpose(1, 2) for t in (q, k, v))
    k, v = (t.repeat_interleave(group, dim=1) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


class Custom(nn.Module):
    """A module with specifications, as Optimum Neuron's are."""

    def __init__(self, specs: Any) -> None:
        super().__init__()
        self.specs = specs


class Cut(nn.Module):
    """The same of neuronx-distributed's layers; tokens along the second dimension."""

    def __init__(self, whole: Any, sequence_parallel: bool, fuse: bool = True) -> None:
        super().__init__()
        group = dist.group.WORLD
        rank, size = dist.get_rank(), dist.get_world_size()
        place = (group, sequence_parallel, 1)
        multiplier = max(1, size // KV)
        order = grouped_heads(size, HEADS, KV)
        q_rows, kv_rows = (
            [row for head in held[rank] for row in range(head * HEAD, (head + 1) * HEAD)]
            for held in (order.query, order.kv)
        )
        self.embed = nxd.ParallelEmbedding(whole.embed.weight.detach(), group, False, False)
        self.attn = Custom(
            neuron.ModelWeightTransformationSpecs(
                specs=neuron.GQAQKVColumnParallelLinearSpec(
                    *("qkv_proj", "q_proj", "k_proj", "v_proj", "o_proj", HEADS, KV, multiplier),
                    *(len(q_rows), len(kv_rows), fuse, False, size),
                )
            )
        )
        rows = zip("qkv", (q_rows, kv_rows, kv_rows), strict=True)
        qkv = torch.cat([whole.attn[f"{name}_proj"].weight.detach()[held] for name, held in rows])
        sizes, local = (HEADS * HEAD, KV * HEAD), (len(q_rows), len(kv_rows))
        self.attn.qkv_proj = nxd.GQAQKVColumnParallelLinear(qkv, sizes, local, fuse, *place)
        o = whole.attn["o_proj"]
        columns = o.weight.detach()[:, q_rows].clone()
        self.attn.o_proj = nxd.RowParallelLinear(columns, o.bias.detach(), (WIDTH, HEADS * HEAD), *place)
        self.mlp = Custom(
            neuron.ModelWeightTransformationSpecs(
                specs=neuron.FusedLinearsSpec("gate_up_proj", ["gate_proj", "up_proj"], False, 0, [MLP, MLP], size)
            )
        )
        halves = [whole.mlp[f"{name}_proj"].weight.detach().chunk(size)[rank] for name in ("gate", "up")]
        self.mlp.gate_up_proj = nxd.ColumnParallelLinear(torch.cat(halves), None, (2 * MLP, WIDTH), False, *place)
        down = whole.mlp["down_proj"]
        columns = down.weight.detach().chunk(size, 1)[rank].contiguous()
        self.mlp.down_proj = nxd.RowParallelLinear(columns, down.bias.detach(), (WIDTH, MLP), *place)
        head = whole.head.weight.detach().chunk(size)[rank].clone()
        self.head = nxd.ColumnParallelLinear(head, whole.head.bias.detach(), (WORDS, WIDTH), True, group, False, 1)
        self.sequence_parallel = sequence_parallel

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        group = dist.group.WORLD
        if self.sequence_parallel:
            parts = list(shares(x.shape[1], dist.get_world_size()))
            x = nxd.collectives.split(x, nxd._axis(group), 1, parts)
        q, k, v = self.attn.qkv_proj(x)
        x = x + self.attn.o_proj(attend(q, k, v, q.shape[-1] // k.shape[-1]))
        gate, up = self.mlp.gate_up_proj(x).chunk(2, -1)
        x = x + self.mlp.down_proj(F.silu(gate) * up)
        if self.sequence_parallel:
            x = nxd.collectives.gather(x, nxd._axis(group), 1)
        return self.head(x)


def whole() -> Whole:
    torch.manual_seed(3)
    return Whole().double().requires_grad_(False)


def near(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def config(**fields: Any) -> lorica.LoraConfig:
    return lorica.LoraConfig(**{"r": RANK, "init_lora_weights": False, "target_modules": TARGETS, **fields})


def _same(sequence_parallel: bool, fields: dict[str, Any], folder: str) -> None:
    nxd.put_in_place()
    model = neuron.get_peft_model(Cut(whole(), sequence_parallel).requires_grad_(False), config(**fields))
    assert type(model) is neuron.NeuronPeftModel
    kinds = {type(module) for module in model.modules() if isinstance(module, neuron.NeuronLoraLayer)}
    assert neuron.ParallelLinear in kinds
    assert kinds <= {neuron.ParallelLinear, neuron.ParallelEmbedding}
    oracle = lorica.get_peft_model(whole(), config(**fields))
    model.save_pretrained(f"{folder}/start")
    lorica.set_peft_model_state_dict(oracle, load_file(f"{folder}/start/adapter_model.safetensors"), strict=True)
    ids = torch.randint(0, WORDS, (2, 9), generator=torch.Generator().manual_seed(1))
    outputs = [model(ids), oracle(ids)]
    near(outputs[0], outputs[1])
    for output, adapted in zip(outputs, (model, oracle), strict=True):
        output.square().mean().backward()
        sum_gradients(adapted)
        torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], 1.0).step()
    model.save_pretrained(f"{folder}/cut")
    with torch.no_grad():
        running = model(ids)
        model.merge_adapter()
        near(model(ids), running)
        model.unmerge_adapter()
        base = model.unload()
        near(base(ids), whole()(ids))  # every layer has its own function back
    if dist.get_rank() == 0:
        oracle.save_pretrained(f"{folder}/whole")


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["", "sp"])
@pytest.mark.parametrize("size", [2, 4, 8])
def test_the_same_as_in_one_piece(size: int, sequence_parallel: bool, tmp_path: Path) -> None:
    ranks.run(size, _same, sequence_parallel, {}, str(tmp_path))
    compare(tmp_path)


def test_dora_too(tmp_path: Path) -> None:
    ranks.run(4, _same, True, {"use_dora": True, "target_modules": TARGETS[1:-1]}, str(tmp_path))
    compare(tmp_path)


def compare(folder: Path) -> None:
    """One file, under the names of the model before it was fused."""
    mine, theirs = (load_file(folder / name / "adapter_model.safetensors") for name in ("cut", "whole"))
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        near(tensor, theirs[name])


def _marks() -> dict[str, tuple[Any, ...]]:
    nxd.put_in_place(trainer=True)
    model = neuron.get_peft_model(Cut(whole(), True).requires_grad_(False), config())
    names = ("tensor_model_parallel", "partition_dim", "num_partitions", "sequence_parallel_enabled")
    return {
        name.removeprefix("base_model.model.").replace(".default", ""): tuple(getattr(p, mark) for mark in names)
        for name, p in model.named_parameters()
        if "lora_" in name
    }


def test_factors_have_the_marks_that_its_optimiser_reads() -> None:
    """Under sequence parallelism replicated factors are marked, so that their gradients are summed."""
    for marks in ranks.run(2, _marks):
        assert marks == {
            "embed.lora_embedding_A": (True, 1, 2, False),
            "embed.lora_embedding_B": (False, -1, 1, False),
            "attn.qkv_proj.lora_A.weight": (False, -1, 1, True),
            "attn.qkv_proj.lora_B.weight": (True, 0, 2, False),
            "attn.o_proj.lora_A.weight": (True, 1, 2, False),
            "attn.o_proj.lora_B.weight": (False, -1, 1, True),
            "mlp.gate_up_proj.lora_A.weight": (False, -1, 1, True),
            "mlp.gate_up_proj.lora_B.weight": (True, 0, 2, False),
            "mlp.down_proj.lora_A.weight": (True, 1, 2, False),
            "mlp.down_proj.lora_B.weight": (False, -1, 1, True),
            "head.lora_A.weight": (False, -1, 1, False),
            "head.lora_B.weight": (True, 0, 2, False),
        }


def _their_sum(folder: str) -> None:
    """Their optimiser sums what is marked over tensor-parallel ranks; lorica then sums nothing of that again."""
    nxd.put_in_place(trainer=True)
    gradients = []
    for theirs in (True, False):
        torch.manual_seed(0)
        if not theirs:
            del sys.modules["neuronx_distributed.trainer"]
        model = neuron.get_peft_model(Cut(whole(), True).requires_grad_(False), config(target_modules=TARGETS[1:-1]))
        ids = torch.randint(0, WORDS, (2, 9), generator=torch.Generator().manual_seed(1))
        model(ids).square().mean().backward()
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        for parameter in trained.values() if theirs else ():
            if getattr(parameter, "sequence_parallel_enabled", False):
                dist.all_reduce(parameter.grad)
        sum_gradients(model)
        gradients.append({name: p.grad for name, p in trained.items()})
    for name, gradient in gradients[0].items():
        near(gradient, gradients[1][name])


def test_what_its_optimiser_sums_is_not_summed_again(tmp_path: Path) -> None:
    ranks.run(4, _their_sum, str(tmp_path))


def _refused() -> None:
    nxd.put_in_place()
    with pytest.raises(TargetError, match=r"attn\.qkv_proj: .*fuse_qkv=True"):
        lorica.get_peft_model(Cut(whole(), False, fuse=False), config(target_modules=["qkv_proj"]))
    model = Cut(whole(), False)
    model.attn.specs = None
    with pytest.raises(TargetError, match="which says the heads of a rank"):
        lorica.get_peft_model(model, config(target_modules=["qkv_proj"]))
    model = Cut(whole(), False)
    model.mlp.down_proj.pad, model.mlp.down_proj.pad_size = True, 2
    with pytest.raises(LayoutError, match="padded layer"):
        lorica.get_peft_model(model, config(target_modules=["down_proj"]))
    model = Cut(whole(), False)
    next(iter(model.mlp.specs)).original_dims = [MLP, 2 * MLP]
    with pytest.raises(LayoutError, match="not what its specification says"):
        lorica.get_peft_model(model, config(target_modules=["gate_up_proj"]))


def test_what_cannot_be_described_is_refused() -> None:
    ranks.run(2, _refused)
