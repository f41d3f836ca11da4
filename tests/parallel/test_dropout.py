"""Dropout masks agree on ranks that hold the same values, and only there."""

from __future__ import annotations

import pytest
import ranks
import torch
import torch.distributed as dist
from contract import adapt
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint

import lorica
from lorica.config.spec import AdapterSpec
from lorica.engines.site import Axis, Site
from lorica.layout import Layout, even
from lorica.ops.dropout import drop
from lorica.parallel import ColumnParallelLinear, RowParallelLinear

WIDTH = 64


def site(rank: int, *, cut: str | None = None, sequence: bool = False, data: bool = False) -> Site:
    axes = {name: Axis(name, 2, rank, None) for name in ("tp", "dp")}
    cuts = () if cut is None else (even("tp", cut, WIDTH, 2),)
    over = {"sequence": ("tp",) if sequence else (), "data": ("dp",) if data else ()}
    return Site(Layout({"out": WIDTH, "in": WIDTH}, cuts, **over), axes)


def mask(where: Site, position: str) -> Tensor:
    torch.manual_seed(5)
    spec = AdapterSpec(r=4, alpha=4, scaling=1.0, dropout=0.5, dropout_position=position)  # type: ignore[arg-type]
    return drop(torch.ones(8, WIDTH), spec, position, where, True)


@pytest.mark.parametrize(
    ("position", "fields", "equal"),
    [
        ("pre", {"cut": "out"}, True),  # a column layer: all ranks have the whole input
        ("pre", {"cut": "in"}, False),  # a row layer: each has its own features
        ("post", {"cut": "in"}, True),  # its partial sums must lose the same outputs
        ("post", {"cut": "out"}, False),
        ("pre", {"sequence": True}, False),
        ("pre", {"data": True}, False),
        ("pre", {}, True),
    ],
)
def test_by_what_a_rank_holds(position: str, fields: dict[str, object], equal: bool) -> None:
    first, second = (mask(site(rank, **fields), position) for rank in (0, 1))  # type: ignore[arg-type]
    assert torch.equal(first, second) is equal
    assert set(first.unique().tolist()) == {0.0, 2.0}


class Two(nn.Module):
    """A column layer and a row layer, whole or cut."""

    def __init__(self, *, cut: bool) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.up, self.down = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2))
        if cut:
            mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
            self.up = ColumnParallelLinear.from_linear(self.up, mesh, gather_output=True)  # type: ignore[assignment]
            self.down = RowParallelLinear.from_linear(self.down, mesh)  # type: ignore[assignment]
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x))


def _one_mask() -> None:
    """B shows the same dropped input in the rows of both ranks."""
    model = adapt(Two(cut=True), lorica.LoraConfig(r=WIDTH // 2, target_modules=["up"], lora_dropout=0.5, lora_alpha=1))
    layer = model.get_submodule("base_model.model.up")
    half = torch.eye(WIDTH // 2)
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(torch.cat([half, 0 * half], 1))  # type: ignore[index,union-attr]
        layer.lora_B["default"].weight.copy_(half)  # type: ignore[index,union-attr]
    model.train()
    x = torch.ones(6, WIDTH)
    torch.manual_seed(9)
    base = layer.base_layer.weight  # type: ignore[union-attr]
    gathered = [torch.empty_like(base) for _ in range(2)]
    dist.all_gather(gathered, base.detach())  # type: ignore[arg-type]
    seen = layer(x) - x @ torch.cat(gathered).T
    first, second = seen.chunk(2, dim=-1)
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)
    assert 0 < float((first.abs() > 1e-4).float().mean()) < 1


def test_ranks_drop_the_same_input() -> None:
    ranks.run(2, _one_mask)


def _checkpointed(reentrant: bool) -> None:
    gradients = []
    for kind in (None, reentrant):
        options = {"r": 4, "target_modules": ["up", "down"], "lora_dropout": 0.5, "init_lora_weights": False}
        model = adapt(Two(cut=True), lorica.LoraConfig(**options)).train()
        torch.manual_seed(3)
        x = torch.ones(6, WIDTH, requires_grad=True)
        y = model(x) if kind is None else checkpoint(model, x, use_reentrant=kind)
        y.square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.requires_grad])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_masks_are_the_same(reentrant: bool) -> None:
    ranks.run(2, _checkpointed, reentrant)


def _expected() -> None:
    """Over many draws the adapter's mean part is that without dropout."""
    options = {"r": 4, "target_modules": ["up", "down"], "init_lora_weights": False}
    model = adapt(Two(cut=True), lorica.LoraConfig(**options, lora_dropout=0.5)).train()
    x = torch.ones(1, WIDTH)
    with torch.no_grad():
        model.eval()
        wanted = model.base_model.model.up(x)
        model.train()
        mean = torch.stack([model.base_model.model.up(x) for _ in range(4000)]).mean(0)
    assert float((mean - wanted).norm() / wanted.norm()) < 0.05


def test_the_mean_is_right() -> None:
    ranks.run(2, _expected)
