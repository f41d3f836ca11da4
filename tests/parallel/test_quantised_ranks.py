"""Quantised bases on several ranks: batches can be divided, weights cannot, and whoever tries is told why."""

from __future__ import annotations

from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import lorica
import quantised_layers as layers
from lorica.errors import AdapterError, LayoutError
from lorica.parallel import sum_gradients
from lorica.storage import stored_weight

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
    "ignore:Merged into",
    "ignore:FSDP2-wrapped module .* returned a view tensor",
)
KINDS = ["bitsandbytes int8", "bitsandbytes nf4", "torchao int8"]
ROWS = 8


def base(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(layers.KINDS[kind](layers.dense(96, 128)), nn.Tanh(), layers.KINDS[kind](layers.dense(64, 96)))


def adapted(kind: str, **fields: Any) -> nn.Module:
    model = base(kind)
    torch.manual_seed(1)
    config = {"r": 4, "target_modules": ["0", "2"], "init_lora_weights": False, **fields}
    return lorica.get_peft_model(model, lorica.LoraConfig(**config))


def batch() -> Tensor:
    return torch.randn(ROWS, 128, generator=torch.Generator().manual_seed(2))


def steps(kind: str, fields: dict[str, Any]) -> tuple[list[float], dict[str, Tensor], Tensor]:
    """Three steps on this rank's rows; the losses of all rows, the factors, the merged weight."""
    model = adapted(kind, **fields)
    ranked = dist.get_world_size() > 1
    # DDP would send the frozen weights too when it starts, and torchao's tensors cannot be sent.
    sync = not kind.startswith("torchao")
    run: nn.Module = DistributedDataParallel(model, init_sync=sync) if ranked else model
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.01)
    x, losses = batch().chunk(dist.get_world_size())[dist.get_rank()], []
    for _ in range(3):
        loss = run(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        if not ranked:
            assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        optimizer.step()
        loss = loss.detach()
        dist.all_reduce(loss)
        losses.append(float(loss) / dist.get_world_size())
    factors = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    model.merge_adapter()
    merged = stored_weight(model.base_model.model[0].base_layer, "weight").dequantize()
    return losses, factors, merged


@pytest.mark.parametrize("fields", [{}, {"use_dora": True}], ids=["plain", "DoRA"])
@pytest.mark.parametrize("kind", KINDS)
def test_replicas_train_as_one_process_and_stay_equal(kind: str, fields: dict[str, Any]) -> None:
    (losses, factors, merged), *_ = ranks.run(1, steps, kind, fields)
    found = ranks.run(2, steps, kind, fields)
    for ours, mine, weight in found:
        assert ours == pytest.approx(losses, rel=1e-5)
        for name, factor in mine.items():
            assert torch.equal(factor, found[0][1][name]), name  # I5
            assert (factor - factors[name]).norm() <= 1e-5 * factors[name].norm(), name
        assert (weight - merged).norm() <= 1e-3 * merged.norm()


def sharded(kind: str, fields: dict[str, Any]) -> Any:
    """Three steps of an adapter on fully-sharded layers: losses, factors, and what merging says."""
    first, activation, second = base(kind)
    model = nn.Sequential(nn.Sequential(first, activation), nn.Sequential(second))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if dist.get_world_size() > 1:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("fsdp",))
        for block in model:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    torch.manual_seed(1)
    config = lorica.LoraConfig(r=4, target_modules=["0.0", "1.0"], init_lora_weights=False, **fields)
    adapted = lorica.get_peft_model(model, config)
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], 0.01)
    x, losses = batch().chunk(dist.get_world_size())[dist.get_rank()], []
    for _ in range(3):
        loss = adapted(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        sum_gradients(adapted)
        optimizer.step()
        dist.all_reduce(loss := loss.detach())
        losses.append(float(loss) / dist.get_world_size())
    factors = {name: p.detach().clone() for name, p in adapted.named_parameters() if p.requires_grad}
    said = ""
    try:
        adapted.merge_adapter()
    except AdapterError as error:
        said = str(error)
    return losses, factors, said


@pytest.mark.parametrize("fields", [{}, {"use_dora": True}], ids=["plain", "DoRA"])
@pytest.mark.parametrize("kind", ["bitsandbytes nf4", "bitsandbytes nf4 in bfloat16"])
def test_four_bits_that_are_fully_sharded_train_as_one_process(kind: str, fields: dict[str, Any]) -> None:
    (losses, factors, _), *_ = ranks.run(1, sharded, kind, fields)
    found = ranks.run(2, sharded, kind, fields)
    for ours, mine, said in found:
        assert ours == pytest.approx(losses, rel=1e-5)
        for name, factor in mine.items():
            assert torch.equal(factor, found[0][1][name]), name
            assert (factor - factors[name]).norm() <= 1e-5 * factors[name].norm(), name
        assert said.startswith("0.0: a weight stored as bitsandbytes nf4 cannot take a delta: ranks hold shards")


def refused(kind: str) -> str:
    """What is said to an adapter on fully-sharded layers."""
    model = base(kind)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    try:
        fully_shard(model, mesh=init_device_mesh("cpu", (2,), mesh_dim_names=("fsdp",)))
    except NotImplementedError:
        return "torch"
    try:
        lorica.get_peft_model(model, lorica.LoraConfig(r=4, target_modules=["0", "2"]))
    except LayoutError as error:
        return str(error)
    return "accepted"


def test_other_quantised_weights_that_are_divided_are_refused_by_name() -> None:
    """What bitsandbytes' 8-bit layers need beside their numbers is lost when those are sharded."""
    for said in ranks.run(2, refused, "bitsandbytes int8"):
        assert said.startswith("0: its weight is stored as bitsandbytes int8 and divided over ranks; adapters need")
    assert ranks.run(2, refused, "torchao int8") == ["torch", "torch"]
