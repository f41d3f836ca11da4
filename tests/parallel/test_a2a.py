"""``a2a_experimental``: hidden values travel, and everything else is as on one process."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import ranks
import torch
import torch.distributed as dist
from native.collective_counts import Collectives
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import lorica
from lorica import kernels
from lorica.checkpoint.names import adapter_entries
from lorica.checkpoint.pieces import piece_of
from lorica.engines.native import ColumnParallelLinear, ParallelEmbedding, RowParallelLinear
from lorica.engines.native.collectives import sequence_reduce, sequence_swap, shares
from lorica.engines.site import Axis
from lorica.layers import LoraLayer
from lorica.ops import base as ops_base
from lorica.ops import linear
from lorica.parallel import parallelize, sum_gradients

WORDS, WIDTH, INNER = 13, 8, 12
LAYERS = ["embed", "up", "down"]


class Small(nn.Module):
    """One layer of each kind that has a collective of tokens of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.up = nn.Linear(WIDTH, INNER)
        self.down = nn.Linear(INNER, WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return x + self.down(torch.tanh(self.up(x)))


def whole() -> Small:
    torch.manual_seed(5)
    return Small().requires_grad_(False)


def cut(axis: Axis) -> Small:
    """The same with each rank's tokens between the layers."""
    model = whole()
    tokens: dict[str, Any] = {"sequence_parallel_enabled": True}
    model.embed = ParallelEmbedding.from_embedding(model.embed, axis, **tokens)
    model.up = ColumnParallelLinear.from_linear(model.up, axis, gather_output=False, **tokens)
    model.down = RowParallelLinear.from_linear(model.down, axis, input_is_parallel=True, **tokens)
    return model


def tp() -> Axis:
    return Axis.of(init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",)), 0)


def own(x: Tensor, axis: Axis) -> Tensor:
    """This rank's tokens."""
    return x.split(list(shares(x.shape[1], axis.size)), 1)[axis.rank]


def adapt(model: nn.Module, *, a2a: bool = True, **fields: Any) -> Any:
    config = {"r": 3, "lora_alpha": 4, "target_modules": LAYERS, "init_lora_weights": False, **fields}
    torch.manual_seed(7)
    return lorica.get_peft_model(model, lorica.LoraConfig(a2a_experimental=a2a, **config))


def near(got: Tensor, wanted: Tensor, what: str) -> None:
    assert got.shape == wanted.shape, f"{what}: {tuple(got.shape)}, wanted {tuple(wanted.shape)}"
    off, size = float((got - wanted).detach().norm()), float(wanted.detach().norm())
    assert off <= 1e-5 * max(size, 1e-3), f"{what}: off by {off} of {size}"


def compare_gradients(model: Any, oracle: Any, adapter: str = "default") -> None:
    """Every factor has the slice of the oracle's gradient that it has of the oracle's factor."""
    sum_gradients(model)
    wanted = {n: e.tensor.grad for n, e in adapter_entries(oracle, adapter, oracle.peft_config[adapter]).items()}
    for name, entry in adapter_entries(model, adapter, model.peft_config[adapter]).items():
        piece = piece_of(name, entry)
        for box in piece.boxes:
            near(entry.tensor.grad[box.local], wanted[name][box.logical], f"{adapter}: gradient of {name}")


def step(model: nn.Module, ids: Tensor, of: Callable[[Tensor], Tensor] = lambda y: y) -> Tensor:
    """Forward and backward of a loss that is a sum over tokens; ``of`` takes this rank's."""
    weights = torch.randn(*ids.shape, WIDTH, generator=torch.Generator().manual_seed(1))
    y = model(ids)
    (y * of(weights)).sum().backward()
    return y


# ---- the collective -------------------------------------------------------------------------------------------------


def swapped() -> None:
    axis = tp()
    for length, dim in ((4, 0), (7, 1), (3, -2), (1, 1)):
        shape = [2, 2, 5]
        shape[dim] = length
        torch.manual_seed(axis.rank)
        x, seed = torch.randn(shape), torch.randn(shape)
        found = []
        for function in (sequence_swap, sequence_reduce):
            leaf = x.clone().requires_grad_()
            y = function(leaf, axis, dim)
            y.backward(seed.narrow(dim, 0, y.shape[dim]))
            found.append((y, leaf.grad))
        for mine, wanted in zip(*found, strict=True):
            near(mine, wanted, f"length {length}, dimension {dim}")


@pytest.mark.parametrize("size", [2, 4])
def test_the_exchange_is_a_reduce_scatter(size: int) -> None:
    ranks.run(size, swapped)


# ---- one process is the oracle --------------------------------------------------------------------------------------


def as_one_process(lengths: list[int], fields: dict[str, Any]) -> None:
    axis = tp()
    for length in lengths:
        ids = torch.randint(WORDS, (2, length), generator=torch.Generator().manual_seed(length))
        oracle, model = adapt(whole(), **fields), adapt(cut(axis), **fields)
        y, wanted = step(model, ids, lambda w: own(w, axis)), step(oracle, ids)
        near(y, own(wanted, axis), f"{length} tokens: the output")
        compare_gradients(model, oracle)
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    across = [layer.site_of(layer.specs["default"]) is layer.site.across for layer in layers]
    assert all(across) if not fields.get("use_dora") else not any(across)


@pytest.mark.parametrize(
    ("size", "fields"),
    [
        (2, {}),
        (4, {}),
        (2, {"lora_bias": True, "target_modules": LAYERS[1:]}),
        (2, {"use_dora": True}),
    ],
    ids=["2", "4", "bias", "dora"],
)
def test_outputs_and_gradients(size: int, fields: dict[str, Any]) -> None:
    """Tokens that the ranks do not divide, and fewer than ranks."""
    ranks.run(size, as_one_process, [8, 7, 3], fields)


def dropped(position: str) -> None:
    """The masks that the ranks drew, put together, are those that one process is given."""
    axis, ids = tp(), torch.randint(WORDS, (1, 7))
    fields = {"lora_dropout": 0.4, "dropout_position": position}
    oracle, model = adapt(whole(), **fields).train(), adapt(cut(axis), **fields).train()
    drop, masks = ops_base.drop, []

    def recorded(x: Tensor, spec: Any, at: str, site: Any, training: bool) -> Tensor:
        mask = drop(torch.ones_like(x), spec, at, site, training)
        if at == position:
            masks.append(mask)
        return x * mask

    with mock.patch.object(linear, "drop", recorded), mock.patch.object(ops_base, "drop", recorded):
        y = step(model, ids, lambda w: own(w, axis))
    every: list[Any] = [None] * axis.size
    dist.all_gather_object(every, masks)
    tokens = shares(7, axis.size)
    if position == "pre":  # of the layers in their order: which dimension the ranks divide
        whole_masks = [_joined(every, 0, 1, tokens), _joined(every, 1, 2, tokens)]
    else:
        whole_masks = [_joined(every, 0, 1, tokens), _joined(every, 1, 2, tokens), _joined(every, 2, 1, tokens)]
    given = iter(whole_masks)

    def replayed(x: Tensor, spec: Any, at: str, site: Any, training: bool) -> Tensor:
        return x * next(given).reshape(x.shape) if at == position else x

    plain = kernels.using("plain")  # where one process drops by the same function
    with plain, mock.patch.object(linear, "drop", replayed), mock.patch.object(ops_base, "drop", replayed):
        wanted = step(oracle, ids)
    near(y, own(wanted, axis), "the output")
    compare_gradients(model, oracle)
    assert 0.4 < float((torch.cat([mask.flatten() for mask in whole_masks]) > 0).float().mean()) < 0.8


def _joined(every: list[list[Tensor]], index: int, dim: int, tokens: tuple[int, ...]) -> Tensor:
    parts = [masks[index] for masks in every]
    lengths = tokens if dim == 1 else [7] * len(parts)
    parts = [part.reshape(1, length, part.shape[-1]) for part, length in zip(parts, lengths, strict=True)]
    shortest = [part.narrow(dim, 0, min(p.shape[dim] for p in parts)) for part in parts]
    assert not torch.equal(shortest[0], shortest[1]), "ranks with different values draw different masks"
    return torch.cat(parts, dim)


@pytest.mark.parametrize("position", ["pre", "post"])
def test_dropout(position: str) -> None:
    ranks.run(2, dropped, position)


def together() -> None:
    """Two adapters, one of each form; off; merged."""
    axis, ids = tp(), torch.randint(WORDS, (2, 5))
    oracle, model, bare = adapt(whole()), adapt(cut(axis)), cut(axis)
    for adapted in (oracle, model):
        torch.manual_seed(8)
        second = lorica.LoraConfig(r=2, target_modules=["up", "down"], init_lora_weights=False, lora_bias=True)
        adapted.add_adapter("second", second)
        adapted.base_model.set_adapter(["default", "second"])
    y, wanted = step(model, ids, lambda w: own(w, axis)), step(oracle, ids)
    near(y, own(wanted, axis), "both")
    for adapter in ("default", "second"):
        compare_gradients(model, oracle, adapter)
    with model.disable_adapter():
        assert torch.equal(model(ids), bare(ids)), "off"
    for adapted in (oracle, model):
        adapted.merge_adapter(["default"])
    near(model(ids), own(oracle(ids), axis), "one of them merged")
    model.merge_adapter(["second"])
    near(model(ids), own(wanted, axis), "both merged")
    model.unmerge_adapter()
    near(model(ids), own(wanted, axis), "unmerged")
    model.delete_adapter("second")
    model.delete_adapter("default")
    assert all("product" not in m.__dict__ and "spanning" not in m.__dict__ for m in model.modules())


def test_several_adapters_off_and_merged() -> None:
    ranks.run(2, together)


# ---- what is sent ---------------------------------------------------------------------------------------------------

ALL_TO_ALL = "alltoall_base_"


def sent(name: str) -> list[list[Counter[str]]]:
    axis, ids = tp(), torch.randint(WORDS, (2, 6))
    found = []
    for a2a in (None, False, True):
        model = cut(axis) if a2a is None else adapt(cut(axis), a2a=a2a, target_modules=[name])
        layer = model.get_submodule(name) if a2a is None else model.base_model.model.get_submodule(name)
        features = INNER // axis.size if name == "down" else WIDTH
        x = ids if name == "embed" else torch.randn(2, 6 if name == "down" else 3, features)
        if x.is_floating_point():
            x.requires_grad_()
        with Collectives() as forward:
            y = layer(x)
        with Collectives() as backward:
            if y.requires_grad:
                y.sum().backward()
        found.append([forward.counts, backward.counts])
    return found


@pytest.mark.parametrize(
    ("name", "forward", "backward"),
    [
        ("up", {"all_gather": 1}, {"reduce_scatter": 1}),
        ("down", {ALL_TO_ALL: 1}, {"all_gather": 1}),
        # Ids have no gradient: the base layer alone has no backward, LoRA's needs the gradient of all tokens.
        ("embed", {ALL_TO_ALL: 1}, {"all_gather": 1}),
    ],
)
def test_one_collective_more_each_way(name: str, forward: dict[str, int], backward: dict[str, int]) -> None:
    for frozen, default, a2a in ranks.run(2, sent, name):
        assert default[0] == frozen[0]
        assert a2a[0] - frozen[0] == forward
        assert a2a[1] - frozen[1] == backward
        if name != "embed":
            assert default == frozen


def flops(size: int) -> list[int]:
    from torch.utils.flop_counter import FlopCounterMode

    axis, found = tp(), []
    for a2a in (False, True):
        layer = adapt(cut(axis), a2a=a2a, target_modules=["down"]).base_model.model.down
        with FlopCounterMode(display=False) as counter:
            layer(torch.randn(2, 4 * size, INNER // size))
        found.append(counter.get_total_flops())
    return found


def test_b_works_on_its_ranks_tokens_only() -> None:
    size, tokens, r = 4, 2 * 16, 3
    for default, a2a in ranks.run(size, flops, size):
        assert default - a2a == 2 * r * WIDTH * (tokens - tokens // size)


# ---- where it does not apply ----------------------------------------------------------------------------------------


def llama() -> None:
    """Of a whole Llama the row-parallel layers take it; the others share their block's one collective."""
    from subjects import SUBJECTS, batch

    subject, found = SUBJECTS["llama"], []
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    for divided in (False, True):
        base = subject.build()
        base = parallelize(base, mesh, sequence_parallel=True) if divided else base
        model = adapt(base, **subject.fields)
        loss = model(input_ids=batch(2), labels=batch(2)).loss
        loss.backward()
        found.append((model, loss))
    (oracle, wanted), (model, loss) = found
    near(loss, wanted, "loss")
    compare_gradients(model, oracle)
    across = {n for n, m in model.named_modules() if isinstance(m, LoraLayer) and m.site.across is not None}
    assert {name.rpartition(".")[2] for name in across} == {"o_proj", "down_proj"}


def test_a_llama() -> None:
    ranks.run(2, llama)


def test_the_field_is_saved_only_where_it_is_set(tmp_path: Any) -> None:
    for value in (False, True):
        lorica.LoraConfig(a2a_experimental=value).save_pretrained(tmp_path)
        saved = json.loads((tmp_path / "adapter_config.json").read_text())
        assert ("a2a_experimental" in saved) is value
        assert lorica.LoraConfig.from_pretrained(tmp_path).a2a_experimental is value
    with pytest.raises(lorica.errors.ConfigError, match="a2a_experimental"):
        lorica.LoraConfig(a2a_experimental=1)


def no_way() -> None:
    axis = tp()
    model = Small()
    model.up = ColumnParallelLinear.from_linear(model.up, axis, gather_output=False)
    with pytest.warns(UserWarning, match="changes nothing: none of 1 adapted layers"):
        adapt(model, target_modules=["up"])


def test_a_layout_that_offers_no_way_is_named() -> None:
    ranks.run(2, no_way)
    adapt(whole())  # on one process there is nothing to be said
