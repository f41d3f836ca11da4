"""DoRA, PiSSA and OLoRA on the layers of Optimum Neuron's classes: of whole weights, against their formulas.

Norms of a rank's rows alone, and decompositions of a rank's shard, are what must not be there.
"""

from __future__ import annotations

from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import lorica.parallel as parallel
from lorica.compat import optimum_neuron as neuron
from lorica.engines.gather import gather
from lorica.parallel import Axis, sum_gradients

IN, OUT, R, HEAD, HEADS, KV = 12, 16, 3, 2, 16, 4


def near(got: Tensor | None, wanted: Tensor | None, what: str = "") -> None:
    assert got is not None, what
    assert wanted is not None, what
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5, msg=lambda message: f"{what}: {message}")


def tp() -> Axis:
    return Axis.of(init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",)), 0)


def wholes(layer: Any) -> list[Tensor]:
    """The logical factors of a layer, gathered: A, B and the magnitudes."""
    found = []
    for tensor, roles in zip(layer.factors("default").tensors(), layer.factor_roles("default"), strict=True):
        sizes = {str(role): size for role, size in layer.site.layout.sizes.items()}
        shape = [sizes.get(role, length) for role, length in zip(roles, tensor.shape, strict=True)]
        found.append(gather(tensor.detach(), layer.site.layout, roles, shape, layer.site.axes))
    return found


@torch.no_grad()
def other_magnitudes(layer: Any) -> list[Tensor]:
    """Give a layer magnitudes that are not its norms, and return the logical factors."""
    a, b, m = wholes(layer)
    m = m * torch.linspace(0.5, 2.0, len(m))
    site, roles = layer.site, layer.factor_roles("default")
    layer.factors("default").tensors()[2].copy_(site.layout.take(m, roles[2], site.at))
    return [tensor.requires_grad_() for tensor in (a, b, m)]


def gradients_are(layer: Any, wanted: list[Tensor]) -> None:
    tensors = zip(layer.factors("default").tensors(), layer.factor_roles("default"), wanted, strict=True)
    for factor, roles, whole in tensors:
        near(factor.grad, layer.site.layout.take(whole, roles, layer.site.at), f"gradient of {roles}")


# ---- starts of whole weights -----------------------------------------------------------------------------------------


def _starts(method: str) -> None:
    axis = tp()
    for kind in (parallel.ColumnParallelLinear, parallel.RowParallelLinear):
        torch.manual_seed(1)
        linear = nn.Linear(IN * 2, OUT)
        base = kind.from_linear(linear, axis).requires_grad_(False)
        layer = neuron.ParallelLinear(base, "default", R, 6, init_lora_weights=method)
        a, b = wholes(layer)
        first = delta_of(linear.weight.detach(), method)
        near(2.0 * b @ a, first, f"{kind.__name__}: the delta that it starts with")
        near(base.logical("weight"), linear.weight.detach() - first, f"{kind.__name__}: what is left")
    rows = [HEADS * HEAD, KV * HEAD, KV * HEAD]
    linears = [nn.Linear(IN, length, bias=False) for length in rows]
    wanted = [delta_of(linear.weight.detach(), method) for linear in linears]
    for fuse in (False, True):
        grouped = parallel.GQAQKVColumnParallelLinear.from_linears(*linears, axis, head_dim=HEAD, fuse_qkv=fuse)
        made = neuron.GQAQKVColumnParallelLinear(
            grouped.requires_grad_(False), "default", R, 6, init_lora_weights=method
        )
        inside = [wholes(module) for module in made.modules() if isinstance(module, neuron.ParallelLinear)]
        parts = [*zip(inside[0][0].split(R), inside[0][1].split(rows), strict=True)] if fuse else inside
        for (a, b), first in zip(parts, wanted, strict=True):
            near(2.0 * b @ a, first, f"fuse_qkv={fuse}: the delta that it starts with")


def delta_of(weight: Tensor, method: str) -> Tensor:
    """``s·B·A`` at the start: PiSSA's has s in it, OLoRA's is multiplied by it."""
    if method == "pissa":
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        return (u[:, :R] * s[:R]) @ v[:R]
    q, r = torch.linalg.qr(weight)
    return 2.0 * q[:, :R] @ r[:R]


@pytest.mark.parametrize("method", ["pissa", "olora"])
@pytest.mark.parametrize("size", [2, 4])
def test_starts_are_of_the_whole_weight(size: int, method: str) -> None:
    """Against the SVD and the QR decomposition of the weight in one piece, by torch."""
    ranks.run(size, _starts, method)


# ---- DoRA ------------------------------------------------------------------------------------------------------------


def _grouped(fuse: bool, order: Any, sequence_parallel: bool) -> None:
    axis = tp()
    torch.manual_seed(2)
    rows = [HEADS * HEAD, KV * HEAD, KV * HEAD]
    linears = [nn.Linear(IN, length, bias=False) for length in rows]
    base = parallel.GQAQKVColumnParallelLinear.from_linears(
        *linears,
        axis,
        head_dim=HEAD,
        fuse_qkv=fuse,
        order=order,
        sequence_parallel_enabled=sequence_parallel,
        sequence_dimension=1,
    ).requires_grad_(False)
    layer = neuron.GQAQKVColumnParallelLinear(base, "default", R, 6, init_lora_weights=False, use_dora=True)
    inside = [module for module in layer.modules() if isinstance(module, neuron.ParallelLinear)]
    leaves = [other_magnitudes(one) for one in inside]
    if fuse:
        a, b, m = leaves[0]
        parts = [*zip(a.split(R), b.split(rows), m.split(rows), strict=True)]
    else:
        parts = [(a, b, m) for a, b, m in leaves]
    x = torch.randn(2, 8, IN)
    wide = x.clone().requires_grad_()
    heads = (base.heads.query, base.heads.kv, base.heads.kv)
    copies = len(base.heads.kv[0]) * axis.size // KV
    x = (x.chunk(axis.size, 1)[axis.rank] if sequence_parallel else x).clone().requires_grad_()
    loss, mine = torch.zeros(()), torch.zeros(())
    for part, (linear, (a, b, m), held, got) in enumerate(zip(linears, parts, heads, layer(x), strict=True)):
        adapted = linear.weight.detach() + 2.0 * b @ a
        y = wide @ (m / adapted.detach().norm(dim=1)).unsqueeze(1).mul(adapted).T
        index = torch.tensor([row for head in held[axis.rank] for row in range(head * HEAD, (head + 1) * HEAD)])
        near(got, y[..., index], f"output {part}")
        weight = torch.randn_like(y)
        loss = loss + (y * weight).sum()
        mine = mine + (got * weight[..., index]).sum() / (copies if part else 1)
    loss.backward()
    mine.backward()
    sum_gradients(layer)
    assert wide.grad is not None
    near(x.grad, wide.grad.chunk(axis.size, 1)[axis.rank] if sequence_parallel else wide.grad, "input's gradient")
    for one, tensors in zip(inside, leaves, strict=True):
        gradients_are(one, [tensor.grad for tensor in tensors])  # type: ignore[misc]


def _all_grouped(order: str) -> None:
    for fuse in (True, False):
        for sequence_parallel in (False, True):
            _grouped(fuse, order, sequence_parallel)


@pytest.mark.parametrize(("size", "order"), [(2, "strided"), (8, "strided"), (8, "neighbours")])
def test_dora_on_grouped_queries(size: int, order: str) -> None:
    """Of 8 ranks two have each key head; its norms and magnitudes are the same on both."""
    ranks.run(size, _all_grouped, order)


def _embedding(dora: bool, **options: Any) -> None:
    axis = tp()
    torch.manual_seed(3)
    table = nn.Embedding(21, OUT)
    base = parallel.ParallelEmbedding.from_embedding(table, axis, **options)
    layer = neuron.ParallelEmbedding(
        base.requires_grad_(False), "default", R, 6, init_lora_weights=False, use_dora=dora
    )
    leaves = other_magnitudes(layer) if dora else [tensor.requires_grad_() for tensor in wholes(layer)]
    ids = torch.randint(0, 21, (2, 8))
    adapted = table.weight.detach() + 2.0 * (leaves[1] @ leaves[0]).T
    y = (adapted * (leaves[2] / adapted.detach().norm(dim=0)) if dora else adapted)[ids]
    y.square().sum().backward()
    wanted = y.detach().chunk(axis.size, 1)[axis.rank] if options.get("sequence_parallel_enabled") else y.detach()
    out = layer(ids)
    near(out, wanted, "output")
    out.square().sum().backward()
    sum_gradients(layer)
    gradients_are(layer, [tensor.grad for tensor in leaves])  # type: ignore[misc]
    before = base.weight.detach().clone()
    layer.merge(safe_merge=True)
    near(layer(ids), wanted, "merged output")
    layer.unmerge()
    near(base.weight, before, "unmerged shard")


def _embeddings() -> None:
    for dora in (False, True):
        _embedding(dora)
        _embedding(dora, shard_across_embedding=True)
        _embedding(dora, sequence_parallel_enabled=True, sequence_dimension=1)


@pytest.mark.parametrize("size", [2, 4])
def test_embeddings(size: int) -> None:
    """Cut by tokens, by features, and so that each rank gets its share of the sequence; LoRA, and DoRA, whose norm of a
    feature is over the whole vocabulary."""
    ranks.run(size, _embeddings)


# ---- merged and turned off -------------------------------------------------------------------------------------------


@torch.no_grad()
def _off() -> None:
    axis = tp()
    torch.manual_seed(4)
    table, linear = nn.Embedding(21, OUT), nn.Linear(IN, OUT)
    ids, x = torch.randint(0, 21, (2, 7)), torch.randn(2, 5, IN)
    for base, given in (
        (parallel.ColumnParallelLinear.from_linear(linear, axis), x),
        (parallel.RowParallelLinear.from_linear(linear, axis), x),
        (parallel.ParallelEmbedding.from_embedding(table, axis), ids),
    ):
        plain = base(given)
        made = neuron.ParallelEmbedding if given is ids else neuron.ParallelLinear
        layer: Any = made(base.requires_grad_(False), "default", R, 6, init_lora_weights=False)
        adapted = layer(given)
        assert not torch.allclose(adapted, plain, atol=1e-3)
        layer.merge()
        layer.enable_adapters(False)
        near(layer(given), plain, f"{type(base).__name__}, disabled while merged")
        layer.enable_adapters(True)
        near(layer(given), adapted, f"{type(base).__name__}, on again")


def test_off_means_off_at_once() -> None:
    """And not once more what was merged."""
    ranks.run(2, _off)
