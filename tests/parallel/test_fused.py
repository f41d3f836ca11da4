"""q, k and v in one weight keep factors of their own: fused and apart are the same adapter, in the same file (I7)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from contract import adapt
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F

import lorica
from lorica.errors import TargetError
from lorica.parallel import GQAQKVColumnParallelLinear, RowParallelLinear, sum_gradients

WIDTH, HEADS, KV_HEADS, HEAD = 16, 8, 2, 4


class Attention(nn.Module):
    """Grouped-query attention in one piece."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(WIDTH, HEADS * HEAD)
        self.k_proj = nn.Linear(WIDTH, KV_HEADS * HEAD)
        self.v_proj = nn.Linear(WIDTH, KV_HEADS * HEAD)
        self.o_proj = nn.Linear(HEADS * HEAD, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.o_proj(attend(self.q_proj(x), self.k_proj(x), self.v_proj(x)))


class Cut(nn.Module):
    """The same over ranks."""

    def __init__(self, whole: Attention, *, fused: bool, order: Any) -> None:
        super().__init__()
        mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
        self.qkv = GQAQKVColumnParallelLinear.from_linears(
            whole.q_proj, whole.k_proj, whole.v_proj, mesh, head_dim=HEAD, fuse_qkv=fused, order=order
        )
        cut = self.qkv.heads.query_cut("tp", HEAD, dim="in")
        self.o_proj = RowParallelLinear.from_linear(whole.o_proj, mesh, cut=cut, input_is_parallel=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.o_proj(attend(*self.qkv(x)))


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.unflatten(-1, (-1, HEAD)).transpose(-2, -3) for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[-3] // k.shape[-3], dim=-3) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(-2, -3).flatten(-2)


def whole() -> Attention:
    torch.manual_seed(3)
    return Attention().requires_grad_(False)


def config(names: list[str], **fields: Any) -> lorica.LoraConfig:
    return lorica.LoraConfig(**{"r": 3, "init_lora_weights": False, "target_modules": names, **fields})


def _same(names: list[str], fused: bool, order: Any, fields: dict[str, Any], folder: str) -> None:
    oracle = adapt(whole(), config(names, **fields))
    model = adapt(Cut(whole(), fused=fused, order=order), config([*names], **fields))
    load(oracle, model)
    x = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(1))
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [model(inputs[0]), oracle(inputs[1])]
    for output, adapted in zip(outputs, (model, oracle), strict=True):
        (output.square().sum() + adapted._get_kasa_loss()).backward()  # type: ignore[operator]
    sum_gradients(model)
    near(outputs[0], outputs[1])
    near(inputs[0].grad, inputs[1].grad)
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], 0.01) for m in (model, oracle)]
    for optimizer in optimizers:
        optimizer.step()
    model.save_pretrained(f"{folder}/cut")  # type: ignore[operator]
    if dist.get_rank() == 0:
        oracle.save_pretrained(f"{folder}/whole")  # type: ignore[operator]
    with torch.no_grad():
        running = model(x)
        model.merge_adapter()  # type: ignore[operator]
        near(model(x), running)
        model.unmerge_adapter()  # type: ignore[operator]


def near(got: Any, wanted: Any) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def load(oracle: nn.Module, model: nn.Module) -> None:
    """Give both the same factors: names seed them, and the cut model's projections lie one module deeper."""
    tensors = lorica.get_peft_model_state_dict(oracle)
    renamed = {}
    for name, tensor in tensors.items():
        deeper = name if "o_proj" in name else name.replace("base_model.model.", "base_model.model.qkv.")
        renamed[deeper] = tensor
    lorica.set_peft_model_state_dict(model, renamed, strict=True)


@pytest.mark.parametrize("order", ["strided", "neighbours"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "apart"])
@pytest.mark.parametrize("size", [2, 4])
def test_the_same_as_in_one_piece(size: int, fused: bool, order: str, tmp_path: Path) -> None:
    ranks.run(size, _same, ["q_proj", "k_proj", "v_proj", "o_proj"], fused, order, {}, str(tmp_path))
    compare(tmp_path)


@pytest.mark.parametrize(
    ("names", "fields"),
    [
        (["q_proj", "v_proj"], {}),
        (["k_proj"], {"lora_bias": True}),
        (["q_proj", "k_proj", "v_proj"], {"use_rslora": True, "rank_pattern": {"_proj": 2}}),
    ],
    ids=str,
)
def test_some_of_the_fused(names: list[str], fields: dict[str, Any], tmp_path: Path) -> None:
    ranks.run(2, _same, names, True, "strided", fields, str(tmp_path))
    compare(tmp_path)


def compare(folder: Path) -> None:
    """The files hold the same tensors: nothing of what fused them is left."""
    mine, theirs = (load_file(folder / name / "adapter_model.safetensors") for name in ("cut", "whole"))
    assert {name.replace(".qkv.", ".") for name in mine} == set(theirs)
    for name, tensor in mine.items():
        near(tensor, theirs[name.replace(".qkv.", ".")])


def _alone() -> tuple[bool, str]:
    """On one rank: the factors start as unfused ones would, and what cannot be fused is refused."""
    model = adapt(Cut(whole(), fused=True, order="strided"), config(["q_proj", "v_proj"]))
    apart = adapt(Cut(whole(), fused=False, order="strided"), config(["q_proj", "v_proj"]))
    mine, theirs = lorica.get_peft_model_state_dict(model), lorica.get_peft_model_state_dict(apart)
    same = mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    try:
        adapt(Cut(whole(), fused=True, order="strided"), config(["q_proj", "v_proj"], rank_pattern={"v_proj": 2}))
    except TargetError as error:
        return same, str(error)
    return same, ""


def test_they_start_as_if_they_were_apart() -> None:
    [(same, message)] = ranks.run(1, _alone)
    assert same
    assert "v_proj" in message
    assert "r=2" in message


def _blocks_apart() -> str:
    blocks = {"target_modules_bd_a": ["q_proj"], "target_modules_bd_b": ["v_proj"], "nblocks": 2}
    with pytest.raises(TargetError) as error:
        adapt(Cut(whole(), fused=True, order="strided"), config(["q_proj", "v_proj"], r=4, use_bdlora=blocks))
    return str(error.value)


def test_blocks_of_different_factors_cannot_be_fused() -> None:
    [message] = ranks.run(1, _blocks_apart)
    assert "v_proj r=4, alpha=8, Blocks(factor='b', count=2)" in message
    assert "q_proj r=4, alpha=8, Blocks(factor='a', count=2)" in message
