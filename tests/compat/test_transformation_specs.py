"""The specifications of fused layers: their JSON, what they do to configurations, and tensors both ways."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import neuron_files as files
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import lorica
from lorica.compat.optimum_neuron import (
    FusedLinearsSpec,
    GQAQKVColumnParallelLinearSpec,
    ModelWeightTransformationSpecs,
    consolidate_model_parallel_checkpoints_to_unified_checkpoint,
)
from lorica.errors import ConfigError, LayoutError
from lorica.layout.specs import same

HIDDEN, HEAD, HEADS, KV = files.HIDDEN, files.HEAD, files.HEADS, files.KV


def serialised(
    ranks: int, fuse: bool = False, prefix: str = "", layer: int = 0, bias: bool = False
) -> list[dict[str, Any]]:
    """A layer's specifications as Optimum Neuron writes them."""
    written: list[dict[str, Any]] = json.loads(json.dumps(files.specs(prefix, layer, ranks, fuse, bias)))
    return written


def read(ranks: int, **options: Any) -> list[ModelWeightTransformationSpecs]:
    return [ModelWeightTransformationSpecs.from_metadata(one) for one in serialised(ranks, **options)]


@pytest.mark.parametrize("ranks", [2, 8])
@pytest.mark.parametrize("fuse", [False, True])
def test_their_json_is_read_and_written(ranks: int, fuse: bool) -> None:
    for values, specs in zip(serialised(ranks, fuse), read(ranks, fuse=fuse), strict=True):
        assert json.loads(json.dumps(specs.to_metadata())) == values
    gqa = next(iter(read(8)[0]))
    assert isinstance(gqa, GQAQKVColumnParallelLinearSpec)
    assert gqa.peft_type == "lora"
    gqa.kv_order = "neighbours"
    again = ModelWeightTransformationSpecs.from_metadata(ModelWeightTransformationSpecs("a", gqa).to_metadata())
    assert [*again] == [gqa]


def test_json_from_strangers_is_refused() -> None:
    def refused(says: str, change: Any) -> None:
        values = serialised(2)[0]
        change(values)
        with pytest.raises(LayoutError, match=says):
            ModelWeightTransformationSpecs.from_metadata(values)

    refused("'os' is not a known", lambda v: v["specs"].append(["os", {}]))
    refused("not the specifications", lambda v: v["specs"][0][1].update(other=1))
    refused("not the specifications", lambda v: v["specs"][0][1].pop("fuse_qkv"))
    refused("not the specifications", lambda v: v.pop("specs"))
    with pytest.raises(NotImplementedError, match="PEFT type ia3"):
        read(2)[0].specs[0].peft_type = "ia3"  # type: ignore[index]
    with pytest.raises(TypeError, match="must be of type"):
        ModelWeightTransformationSpecs("a").add_spec(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must be set"):
        ModelWeightTransformationSpecs().to_metadata()


def test_only_those_of_a_stage_are_written() -> None:
    attention, mlp = read(2)
    stage = {"model.layers.0.self_attn.qkv_proj.lora_B.default.weight_q", "model.layers.0.mlp.other.weight"}
    assert len(attention.to_metadata(stage)["specs"]) == 1
    assert mlp.to_metadata(stage)["specs"] == []
    assert {"model.layers.0.mlp.gate_up_proj.weight", "model.layers.0.mlp.up_proj.lora_B.weight"} <= next(
        iter(mlp)
    ).get_relevant_parameter_names("model.layers.0.mlp")


# ---- tensors ---------------------------------------------------------------------------------------------------------


def base_weights(bias: bool = False) -> dict[str, Tensor]:
    place = "model.layers.0"
    rows = {"self_attn.q_proj": HEADS * HEAD, "self_attn.k_proj": KV * HEAD, "self_attn.v_proj": KV * HEAD}
    rows |= {"mlp.gate_proj": files.MLP, "mlp.up_proj": files.MLP}
    state = {f"{place}.{name}.weight": torch.randn(length, HIDDEN) for name, length in rows.items()}
    if bias:
        state |= {f"{place}.{name}.bias": torch.randn(length) for name, length in rows.items()}
        state[f"{place}.self_attn.o_proj.bias"] = torch.randn(HIDDEN)  # which every rank has
    return state | {f"{place}.self_attn.o_proj.weight": torch.randn(HIDDEN, HEADS * HEAD), "n.weight": torch.randn(3)}


def cut_by_hand(state: dict[str, Tensor], ranks: int, rank: int, fuse: bool) -> dict[str, Tensor]:
    place = "model.layers.0"
    output = f"{place}.self_attn.o_proj"
    found = {f"{output}.weight": files.o_columns(state[f"{output}.weight"], ranks, rank), "n.weight": state["n.weight"]}
    if biased := f"{output}.bias" in state:
        found[f"{output}.bias"] = state[f"{output}.bias"]
    for leaf in ("weight", "bias") if biased else ("weight",):
        q, k, v = (
            state[f"{place}.self_attn.{name}_proj.{leaf}"].view(-1, HIDDEN if leaf == "weight" else 1) for name in "qkv"
        )
        three = [files.q_rows(q, ranks, rank), *(files.kv_rows(w, ranks, rank) for w in (k, v))]
        three = [tensor if leaf == "weight" else tensor.flatten() for tensor in three]
        named = {"qkv": torch.cat(three)} if fuse else dict(zip("qkv", three, strict=True))
        found |= {f"{place}.self_attn.qkv_proj.{leaf}_{name}": tensor for name, tensor in named.items()}
        halves = [state[f"{place}.mlp.{name}_proj.{leaf}"].chunk(ranks)[rank] for name in ("gate", "up")]
        found[f"{place}.mlp.gate_up_proj.{leaf}"] = torch.cat(halves)
    return found


def adapted(specs: list[ModelWeightTransformationSpecs], state: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
    names = {name for one in specs for spec in one for name in spec.get_relevant_parameter_names(one._module)}
    found: Any = dict(state)
    for one in specs:
        found = one.adapt_state_dict({}, found, {}, names, tp_rank=rank)
    return dict(found)


def is_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not same(one[name], other[name])] == []


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_base_weights_go_there_and_back(ranks: int, fuse: bool, bias: bool) -> None:
    state, specs = base_weights(bias), read(ranks, fuse=fuse, bias=bias)
    held = [adapted(specs, state, rank) for rank in range(ranks)]
    for rank, mine in enumerate(held):
        is_same(mine, cut_by_hand(state, ranks, rank, fuse))
    sharded = {name: [mine[name] for mine in held] for name in held[0]}
    whole = ("n.weight", "model.layers.0.self_attn.o_proj.bias")
    back: dict[str, Tensor] = {name: state[name] for name in whole if name in state}
    removed: list[str] = []
    for one in specs:
        weights, names = one.to_original_weights(sharded, {})
        back |= weights
        removed += names
    is_same(back, state)
    assert sorted(removed) == sorted(name for name in sharded if name not in whole)


@pytest.mark.parametrize("ranks", [2, 8])
@pytest.mark.parametrize("fuse", [False, True])
def test_a_base_model_with_fused_layers_is_consolidated(ranks: int, fuse: bool, tmp_path: Path) -> None:
    """Of ``weight_qkv`` neuronx-distributed does not say that it is cut: the specification does."""
    state, shards = base_weights(bias=True), tmp_path / "shards"
    (shards / "model").mkdir(parents=True)
    held = [cut_by_hand(state, ranks, rank, fuse) for rank in range(ranks)]
    for rank, tensors in enumerate(held):
        torch.save(tensors, shards / "model" / f"dp_rank_00_tp_rank_{rank:02d}_pp_rank_00.pt")
    sharded = {"tensor_model_parallel": True, "partition_stride": 1, "num_partitions": ranks}
    about: dict[str, Any] = {name: {"tensor_model_parallel": False} for name in held[0]}
    for name in held[0]:
        if "qkv_proj" in name and not fuse:
            about[name] = {**sharded, "partition_dim": 0}
        elif name.endswith("_proj.weight"):
            about[name] = {**sharded, "partition_dim": int("o_proj" in name)}
    metadata = {"parameters": about, "model_weight_transformation_specs": serialised(ranks, fuse, bias=True)}
    (shards / "mp_metadata_pp_rank_0.json").write_text(json.dumps(metadata))
    (shards / "done").write_text("1")
    consolidate_model_parallel_checkpoints_to_unified_checkpoint(tmp_path, tmp_path / "out")
    is_same(load_file(tmp_path / "out" / "model.safetensors"), state)


@pytest.mark.parametrize("fuse", [False, True])
def test_adapters_go_there_and_back(fuse: bool) -> None:
    ranks, whole = 8, files.adapter_tensors(layers=1)
    specs = read(ranks, fuse=fuse, prefix=files.PREFIX)
    held = [adapted(specs, whole, rank) for rank in range(ranks)]
    for rank, mine in enumerate(held):
        theirs = files.rank_tensors(whole, 0, ranks, rank, fuse)
        theirs = {name: t for name, t in theirs.items() if "down_proj" not in name}  # which no specification is about
        is_same({name: t for name, t in mine.items() if "down_proj" not in name}, theirs)
    sharded = {name: [mine[name] for mine in held] for name in held[0]}
    metadata = files.metadata([*sharded], [0], ranks, fuse, ("lora",))["parameters"]
    back: dict[str, Tensor] = {}
    for one in specs:
        weights, names = one.to_original_weights(sharded, metadata)
        assert all(".lora." in name for name in names if ".lora_" in name)  # as the adapted model names them
        back |= weights
    outside = {name for name in whole if "down_proj" in name or "o_proj.lora_B" in name}
    is_same(back, {name: tensor for name, tensor in whole.items() if name not in outside})


def test_as_that_differ_are_not_averaged() -> None:
    whole = files.adapter_tensors(layers=1)
    name = f"{files.PREFIX}model.layers.0.self_attn.k_proj.lora_A.weight"
    with pytest.raises(LayoutError, match="nothing is averaged"):
        adapted(read(2, prefix=files.PREFIX), whole | {name: whole[name] * 2}, 0)


def test_tensors_may_come_one_after_the_other() -> None:
    state, specs = base_weights(), read(4)
    names = {name for one in specs for spec in one for name in spec.get_relevant_parameter_names(one._module)}
    waiting: dict[str, Tensor] = {}
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        part: Any = {name: tensor}
        for one in specs:
            part = one.adapt_state_dict({}, part, waiting, names, inplace=True, tp_rank=2)
        found |= part
    assert waiting == {}
    is_same(found, cut_by_hand(state, 4, 2, fuse=False))


def test_layers_fused_along_their_inputs() -> None:
    """One B, and an A of each."""
    spec = FusedLinearsSpec("both", ["x", "y"], False, "row", [8, 4], tp_size=2)
    assert spec.fuse_axis == 1
    specs = [ModelWeightTransformationSpecs("m", spec)]
    state = {"m.x.weight": torch.randn(5, 8), "m.y.weight": torch.randn(5, 4)}
    b = torch.randn(5, 2)
    for name, columns in (("x", 8), ("y", 4)):
        state[f"{files.PREFIX}m.{name}.lora_A.weight"] = torch.randn(2, columns)
        state[f"{files.PREFIX}m.{name}.lora_B.weight"] = b
    held = [adapted(specs, state, rank) for rank in range(2)]
    x, y = (state[f"m.{name}.weight"] for name in "xy")
    assert torch.equal(held[1]["m.both.weight"], torch.cat([x[:, 4:], y[:, 2:]], 1))
    assert torch.equal(held[0][f"{files.PREFIX}m.both.lora_B.weight"], b)
    back, _ = specs[0].to_original_weights({name: [one[name] for one in held] for name in held[0]}, {})
    is_same(back, state)


@pytest.mark.parametrize(("order", "wanted"), [("strided", [[0, 1], [4, 5]]), ("neighbours", [[0, 1], [2, 3]])])
def test_both_orders_of_copies(order: Any, wanted: list[list[int]]) -> None:
    """4 ranks of 2 key/value heads and 8 query heads: two copies of each."""
    fields = (4, 8, 2, 2)
    queries = [
        GQAQKVColumnParallelLinearSpec.compute_query_indices_for_rank(4, rank, *fields[1:], order).tolist()
        for rank in range(2)
    ]
    assert queries == wanted
    spec = GQAQKVColumnParallelLinearSpec(
        *("qkv", "q", "k", "v", "o"), 8, 2, 2, 4, 2, fuse_qkv=False, bias=False, tp_size=4, kv_order=order
    )
    rows = torch.arange(16.0).unsqueeze(1)
    state = {"m.q.weight": rows, "m.k.weight": rows[:4], "m.v.weight": rows[4:8], "m.o.weight": rows.T.clone()}
    held = [adapted([ModelWeightTransformationSpecs("m", spec)], state, rank) for rank in range(4)]
    heads = [mine["m.qkv.weight_q"].flatten()[::2].div(2).int().tolist() for mine in held]
    assert heads[:2] == wanted
    assert [mine["m.o.weight"].flatten()[::2].div(2).int().tolist() for mine in held] == heads
    kv = [int(mine["m.qkv.weight_k"][0] / 2) for mine in held]
    assert kv == ([0, 1, 0, 1] if order == "strided" else [0, 0, 1, 1])
    assert all(head // 4 == kv[rank] for rank, of in enumerate(heads) for head in of)  # queries lie with their keys


def test_the_table_of_eight_ranks() -> None:
    """8 ranks, 4 key/value heads, 32 query heads."""
    found = [GQAQKVColumnParallelLinearSpec.compute_query_indices_for_rank(8, r, 32, 4, 2).tolist() for r in range(8)]
    assert found == [[*range(start, start + 4)] for start in (0, 8, 16, 24, 4, 12, 20, 28)]


# ---- configurations --------------------------------------------------------------------------------------------------


def config(**fields: Any) -> lorica.LoraConfig:
    return lorica.LoraConfig(**{"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], **fields})


def test_configurations_name_the_fused_layers_and_back() -> None:
    attention, mlp = (next(iter(one)) for one in read(2))
    patterns = {"rank_pattern": {"q_proj": 4, "k_proj": 4, "v_proj": 4, "o_proj": 2}}
    first = config(**patterns, alpha_pattern={"layers.1.self_attn.q_proj": 16})
    made = attention.adapt_peft_config(config(**patterns))
    assert made.target_modules == {"qkv_proj", "o_proj"}
    assert made.rank_pattern == {"qkv_proj": 4, "o_proj": 2}  # which Optimum Neuron leaves as it is, without effect
    assert mlp.adapt_peft_config(made).target_modules == {"qkv_proj", "o_proj"}
    back = attention.to_original_peft_config(made)
    assert back.target_modules == first.target_modules
    assert back.rank_pattern == first.rank_pattern
    assert made.target_modules == {"qkv_proj", "o_proj"}  # a copy was changed
    word = config(target_modules="all-linear")
    assert attention.adapt_peft_config(word).target_modules == "all-linear"
    assert attention.adapt_peft_config(word, inplace=True) is word
    with pytest.raises(ConfigError, match="several values"):
        attention.adapt_peft_config(first)
    with pytest.raises(ConfigError, match="missing: k_proj"):
        attention.adapt_peft_config(config(target_modules=["q_proj", "v_proj"]))
    with pytest.raises(ConfigError, match="several values"):
        attention.adapt_peft_config(config(rank_pattern={"q_proj": 4}))


def test_whether_a_module_is_adapted() -> None:
    attention = next(iter(read(2)[0]))
    model = nn.ModuleDict({"a": nn.ModuleDict({"qkv_proj": nn.Linear(2, 2), "o_proj": nn.Linear(2, 2)})})
    assert attention.guess_peft_type(model, "a") is None
    lorica.get_peft_model(model, lorica.LoraConfig(target_modules=["qkv_proj"], r=1))
    assert attention.guess_peft_type(model, "a") == "lora"
