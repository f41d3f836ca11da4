"""Optimum Neuron's classes on lorica's parallel layers are the same adapter as on one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from subjects import SUBJECTS, batch, logits_of, loss_of
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import lorica
import lorica.parallel as parallel
from lorica.compat import optimum_neuron as neuron
from lorica.compat.peft import PeftModel
from lorica.engines.native.collectives import shares
from lorica.parallel import Axis, sum_gradients

LLAMA = SUBJECTS["llama"]
IN, OUT, R, HEAD = 12, 16, 3, 2


def near(got: Tensor | None, wanted: Tensor | None, what: str = "") -> None:
    assert got is not None, what
    assert wanted is not None, what
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5, msg=lambda message: f"{what}: {message}")


def tp() -> Axis:
    return Axis.of(init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",)), 0)


def own_tokens(x: Tensor, axis: Axis) -> Tensor:
    return torch.split(x, list(shares(x.shape[1], axis.size)), 1)[axis.rank].detach().clone()


def whole_factors(layer: Any, adapter: str = "default") -> tuple[Tensor, Tensor]:
    """The logical factors of a layer, gathered."""
    from lorica.engines.gather import gather

    found = []
    for tensor, roles in zip(layer.factors(adapter).tensors(), layer.factor_roles(adapter), strict=False):
        sizes = {str(role): size for role, size in layer.site.layout.sizes.items()}
        shape = [sizes.get(role, length) for role, length in zip(roles, tensor.shape, strict=True)]
        found.append(gather(tensor.detach(), layer.site.layout, roles, shape, layer.site.axes))
    return found[0], found[1]


def _linears(sequence_parallel: bool, init: Any) -> None:
    axis = tp()
    for kind in (parallel.ColumnParallelLinear, parallel.RowParallelLinear):
        torch.manual_seed(1)
        linear = nn.Linear(IN * 2, OUT)
        options: dict[str, Any] = {"sequence_parallel_enabled": sequence_parallel, "sequence_dimension": 1}
        base = kind.from_linear(linear, axis, **options).requires_grad_(False)
        layer = neuron.ParallelLinear(base, "default", R, 6, init_lora_weights=init, use_rslora=True)
        assert isinstance(layer, neuron.NeuronLoraLayer)
        a, b = whole_factors(layer)
        scale = 6 / R**0.5
        w = base.logical("weight")  # what the start left of it
        x = torch.randn(2, 9, IN * 2)
        wide = (x.clone().requires_grad_(), a.clone().requires_grad_(), b.clone().requires_grad_())
        y = wide[0] @ w.T + linear.bias.detach() + scale * (wide[0] @ wide[1].T) @ wide[2].T
        g = torch.randn_like(y)
        (y * g).sum().backward()
        gathers = sequence_parallel and kind is parallel.ColumnParallelLinear
        leaves = sequence_parallel and kind is parallel.RowParallelLinear
        mine = (own_tokens(x, axis) if gathers else x.clone()).requires_grad_()
        out = layer(mine)
        near(out, own_tokens(y, axis) if leaves else y.detach(), f"{kind.__name__} output")
        (out * (own_tokens(g, axis) if leaves else g)).sum().backward()
        sum_gradients(layer)
        near(mine.grad, own_tokens(wide[0].grad, axis) if gathers else wide[0].grad, "input's gradient")  # type: ignore[arg-type]
        for factor, roles, gradient in zip(
            layer.factors("default").tensors(),
            layer.factor_roles("default"),
            (wide[1].grad, wide[2].grad),
            strict=False,
        ):
            near(factor.grad, layer.site.layout.take(gradient, roles, layer.site.at), f"{kind.__name__} {roles}")
        at, layout = layer.site.at, layer.site.layout
        delta = layer.get_delta_weight("default")
        near(delta, layout.take(scale * b @ a, ("out", "in"), at), "delta")
        before = base.weight.detach().clone()
        with torch.no_grad():
            running = layer(mine)
            layer.merge(safe_merge=True)
            near(base.weight, before + delta, "merged shard")
            near(layer(mine), running, "merged output")
            layer.unmerge()
        near(base.weight, before, "unmerged shard")


def _all_linears() -> None:
    for sequence_parallel in (False, True):
        for init in (False, "pissa"):
            _linears(sequence_parallel, init)


@pytest.mark.parametrize("size", [2, 4])
def test_parallel_linear_is_the_whole_one(size: int) -> None:
    """PiSSA's start is that of the whole weight, and not of each shard by itself."""
    ranks.run(size, _all_linears)


def _embeddings(features: bool) -> None:
    axis = tp()
    table = nn.Embedding(21, OUT)
    base = parallel.ParallelEmbedding.from_embedding(table, axis, shard_across_embedding=features)
    base.requires_grad_(False)
    layer = neuron.ParallelEmbedding(base, "default", R, 6, init_lora_weights=False)
    a, b = whole_factors(layer)
    ids = torch.randint(0, 21, (2, 7))
    wide = (a.clone().requires_grad_(), b.clone().requires_grad_())
    y = table(ids).detach() + 2.0 * wide[0].T[ids] @ wide[1].T
    y.square().sum().backward()
    out = layer(ids)
    near(out, y.detach(), "output")
    out.square().sum().backward()
    sum_gradients(layer)
    factors = zip(layer.factors("default").tensors(), layer.factor_roles("default"), wide, strict=False)
    for factor, roles, whole in factors:
        near(factor.grad, layer.site.layout.take(whole.grad, roles, layer.site.at), str(roles))
    delta = layer.get_delta_weight("default")
    near(delta, layer.site.layout.take(2.0 * (b @ a).T, ("in", "out"), layer.site.at), "delta")
    before = base.weight.detach().clone()
    layer.merge()
    near(base.weight, before + delta, "merged shard")
    near(layer(ids), y.detach(), "merged output")
    layer.unmerge()
    near(base.weight, before, "unmerged shard")


def _all_embeddings() -> None:
    _embeddings(features=False)
    _embeddings(features=True)


@pytest.mark.parametrize("size", [2, 4])
def test_parallel_embedding_is_the_whole_one(size: int) -> None:
    ranks.run(size, _all_embeddings)


def _grouped(fuse: bool, order: Any, sequence_parallel: bool) -> None:
    axis, heads, kv = tp(), 16, 4
    torch.manual_seed(2)
    linears = [nn.Linear(IN, rows * HEAD, bias=False) for rows in (heads, kv, kv)]
    base = parallel.GQAQKVColumnParallelLinear.from_linears(
        *linears,
        axis,
        head_dim=HEAD,
        fuse_qkv=fuse,
        order=order,
        sequence_parallel_enabled=sequence_parallel,
        sequence_dimension=1,
    ).requires_grad_(False)
    layer = neuron.GQAQKVColumnParallelLinear(base, "default", R, 6, init_lora_weights=False)
    assert dict(layer.r) == {"default": R}
    assert dict(layer.scaling) == {"default": 2.0}
    inside = [module for module in layer.modules() if isinstance(module, neuron.ParallelLinear)]
    assert len(inside) == (1 if fuse else 3)
    a, b = zip(*(whole_factors(one) for one in inside), strict=True)
    a, b = ([*a[0].split(R)], [*b[0].split([heads * HEAD, kv * HEAD, kv * HEAD])]) if fuse else (a, b)
    assert not torch.equal(a[0], a[1])  # each projection has an A of its own
    x = torch.randn(2, 9, IN)
    wide = x.clone().requires_grad_()
    leaves = [(left.clone().requires_grad_(), right.clone().requires_grad_()) for left, right in zip(a, b, strict=True)]
    whole = [
        wide @ linear.weight.detach().T + 2.0 * (wide @ left.T) @ right.T
        for linear, (left, right) in zip(linears, leaves, strict=True)
    ]
    order_of = base.heads
    held = [order_of.query[axis.rank], order_of.kv[axis.rank], order_of.kv[axis.rank]]

    def mine_of(tensor: Tensor, part: int, dim: int = -1) -> Tensor:
        rows = [row for head in held[part] for row in range(head * HEAD, (head + 1) * HEAD)]
        return tensor.index_select(dim, torch.tensor(rows))

    # Of keys and values each copy answers for the queries that it is used with: an equal share of the whole here.
    weights, mine_weights, copies = [], [], len(order_of.kv[0]) * axis.size // kv
    for part, y in enumerate(whole):
        weight = torch.randn_like(y)
        weights.append(weight)
        mine_weights.append(mine_of(weight, part) / (copies if part else 1))
    sum((y * weight).sum() for y, weight in zip(whole, weights, strict=True)).backward()
    mine = (own_tokens(x, axis) if sequence_parallel else x.clone()).requires_grad_()
    outputs = layer(mine)
    for part, (got, y) in enumerate(zip(outputs, whole, strict=True)):
        near(got, mine_of(y.detach(), part), f"output {part}")
    sum((y * weight).sum() for y, weight in zip(outputs, mine_weights, strict=True)).backward()
    sum_gradients(layer)
    near(mine.grad, own_tokens(wide.grad, axis) if sequence_parallel else wide.grad, "input's gradient")  # type: ignore[arg-type]
    gradients = [[left.grad for left, _ in leaves], [right.grad for _, right in leaves]]
    if fuse:
        gradients = [[torch.cat(gradients[0])], [torch.cat(gradients[1])]]  # type: ignore[arg-type]
    for number, one in enumerate(inside):
        for factor, roles, whole_gradient in zip(
            one.factors("default").tensors(), one.factor_roles("default"), gradients, strict=False
        ):
            near(factor.grad, one.site.layout.take(whole_gradient[number], roles, one.site.at), str(roles))
    _merges(layer, fuse, mine, [mine_of(y.detach(), part) for part, y in enumerate(whole)])
    wanted = [mine_of(2.0 * right @ left, part, 0) for part, (left, right) in enumerate(zip(a, b, strict=True))]
    deltas = layer.get_delta_weight("default")
    assert list(deltas) == (["qkv"] if fuse else ["q", "k", "v"])
    for delta, one in zip(deltas.values(), [torch.cat(wanted)] if fuse else wanted, strict=True):
        near(delta, one, "delta")


@torch.no_grad()
def _merges(layer: Any, fuse: bool, x: Tensor, adapted: list[Tensor]) -> None:
    inside = [module for module in layer.modules() if isinstance(module, neuron.ParallelLinear)]
    before = [one.base_layer.weight.detach().clone() for one in inside]
    layer.enable_adapters(False)
    plain = layer(x)
    layer.enable_adapters(True)
    layer.merge(safe_merge=True)
    assert layer.merged_adapters == ["default"]
    for one, start, delta in zip(inside, before, layer.get_delta_weight("default").values(), strict=True):
        near(one.base_layer.weight, start + delta, "merged shard")
    for got, wanted in zip(layer(x), adapted, strict=True):
        near(got, wanted, "merged output")
    layer.enable_adapters(False)  # off means off at once, and not once more what was merged
    for got, wanted in zip(layer(x), plain, strict=True):
        near(got, wanted, "disabled while merged")
    assert not layer.merged
    layer.enable_adapters(True)
    layer.merge(adapter_names=["default"])
    assert layer.merged
    layer.unmerge()
    for one, start in zip(inside, before, strict=True):
        near(one.base_layer.weight, start, "unmerged shard")


def _all_grouped(order: Any) -> None:
    for fuse in (True, False):
        for sequence_parallel in (False, True):
            _grouped(fuse, order, sequence_parallel)


@pytest.mark.parametrize(("size", "order"), [(2, "strided"), (4, "strided"), (8, "strided"), (8, "neighbours")])
def test_grouped_queries_are_the_whole_projections(size: int, order: str) -> None:
    """Fused and apart, with sequence parallelism and without; 8 ranks have two copies of each key/value head."""
    ranks.run(size, _all_grouped, order)


# ---- a model ---------------------------------------------------------------------------------------------------------


def _model(folder: str, sequence_parallel: bool) -> None:
    # No rank was seeded like another one: the start has to be agreed on all the same.
    config = neuron.TrainingNeuronConfig(
        tensor_parallel_size=dist.get_world_size(),
        sequence_parallel_enabled=sequence_parallel,
        device_type="cpu",
        backend="gloo",
    )
    fields = {**LLAMA.fields, "task_type": "CAUSAL_LM", "r": R, "rank_pattern": {"q_proj": 2}}
    model = neuron.get_peft_model(config.parallelize(LLAMA.build()), lorica.LoraConfig(**fields))
    assert type(model) is neuron.NeuronPeftModelForCausalLM
    assert isinstance(model.base_model, neuron.NeuronLoraModel)
    assert {type(m) for m in model.modules() if isinstance(m, neuron.NeuronLoraLayer)} == {neuron.ParallelLinear}
    torch.manual_seed(0)
    oracle = lorica.get_peft_model(LLAMA.build(), lorica.LoraConfig(**fields))
    model.save_pretrained(f"{folder}/start")
    lorica.set_peft_model_state_dict(oracle, load_file(f"{folder}/start/adapter_model.safetensors"), strict=True)
    ids = batch(2)
    for _ in range(3):
        losses = []
        for one in (model, oracle):
            optimizer = torch.optim.SGD(lorica.parallel.parameter_groups(one), 0.5)
            loss = loss_of(logits_of(one(input_ids=ids)), ids)
            loss.backward()
            sum_gradients(one)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        near(*losses, "loss")  # type: ignore[misc]
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            continue
        layer: Any = model.get_submodule(name.partition(".lora_")[0])
        if not layer.site.layout.sharded(layer.factor_roles("default")["lora_B" in name]):
            first = parameter.detach().clone()
            dist.broadcast(first, 0)
            assert torch.equal(parameter, first), name  # replicas stay equal bit for bit
    model.save_pretrained(f"{folder}/cut")
    if dist.get_rank() == 0:
        oracle.save_pretrained(f"{folder}/whole")


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["", "sp"])
@pytest.mark.parametrize("size", [2, 4, 8])
def test_a_model_trains_as_on_one_process(size: int, sequence_parallel: bool, tmp_path: Path) -> None:
    """Gradients of factors that all ranks have are whole under sequence parallelism; one file is saved."""
    ranks.run(size, _model, str(tmp_path), sequence_parallel)
    mine, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("cut", "whole"))
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        near(tensor, theirs[name], name)
    start = load_file(tmp_path / "start" / "adapter_model.safetensors")
    assert start["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"].shape[0] == 2  # the pattern's rank
    back = PeftModel.from_pretrained(LLAMA.build(), tmp_path / "cut")
    assert back.peft_config["default"].rank_pattern == {"q_proj": 2}


def _unseeded() -> None:
    torch.manual_seed(100 + dist.get_rank())  # what a launcher that seeds nothing amounts to
    layer = neuron.ParallelLinear(
        parallel.ColumnParallelLinear(IN, OUT, axis=tp()).requires_grad_(False), "default", R, 6
    )
    first = layer.factors("default").a.detach().clone()
    dist.broadcast(first, 0)
    assert torch.equal(layer.factors("default").a, first)


def test_ranks_that_were_not_seeded_alike_start_alike() -> None:
    ranks.run(4, _unseeded)
