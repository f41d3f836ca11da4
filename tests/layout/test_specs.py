"""Weight specs are exact both ways, for base weights and for factors, and survive being written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from drawn import law, layouts, orders, ranks
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lorica.errors import LayoutError
from lorica.layout import Layout, Roles, even, fused, grouped_heads
from lorica.layout.neuron import specs_from_neuron
from lorica.layout.specs import Spec, WeightSpecs, same

IN, HEAD = 3, 2


def draw_state(specs: WeightSpecs, sizes: dict[str, int]) -> dict[str, Tensor]:
    """A logical state for these specs; tied names have one tensor, under the first."""
    state: dict[str, Tensor] = {}
    for spec in specs:
        known = {**sizes, **{str(role): size for role, size in spec.layout.sizes.items()}}
        for name, length in spec.parts:
            shape = [length if role == spec.along and len(spec.parts) > 1 else known[role] for role in spec.roles]
            state[name] = torch.randn(shape)
        state |= dict.fromkeys(spec.also, state[spec.parts[0][0]])
    dropped = {name for group in specs.tied for name in group[1:]}
    return {name: tensor for name, tensor in state.items() if name not in dropped}


def check(specs: WeightSpecs, places: list[dict[str, int]], sizes: dict[str, int]) -> None:
    """There and back, directly and through JSON."""
    again = WeightSpecs.from_dict(json.loads(json.dumps(specs.to_dict())))
    assert again == specs
    state = draw_state(specs, sizes)
    local = [(at, again.to_local(state, at)) for at in places]
    back = specs.to_logical(local)
    assert back.keys() == state.keys()
    assert all(same(back[name], state[name]) for name in state)


@law
@given(layouts(), st.sampled_from([("out", "in"), ("in", "out"), ("out",), ("expert", "out", "in"), ()]))
def test_any_layout_goes_there_and_back(layout: Layout, roles: Roles):
    sizes = {"out": 5, "in": 4, "expert": 3}
    check(WeightSpecs((Spec("a.weight", (("b.weight", 0),), roles, layout),)), [*ranks(layout)], sizes)


def attention(order: Any, heads: int, kv_heads: int) -> WeightSpecs:
    """Fused q, k and v with a bias, and the output projection with its columns to match."""
    lengths = (heads * HEAD, kv_heads * HEAD, kv_heads * HEAD)
    parts = tuple(zip(("q", "k", "v"), lengths, strict=True))
    rows = Layout({"out": sum(lengths), "in": IN}, (order.qkv_cut("tp", HEAD),), parts)
    columns = Layout({"out": IN, "in": heads * HEAD}, (order.query_cut("tp", HEAD, dim="in"),))

    def named(leaf: str) -> tuple[tuple[str, int], ...]:
        return tuple((f"l.{name}.{leaf}", length) for name, length in parts)

    return WeightSpecs(
        (
            Spec("l.qkv.weight", named("weight"), ("out", "in"), rows),
            Spec("l.qkv.bias", named("bias"), ("out",), rows),
            Spec("l.o.weight", (("l.o.weight", 0),), ("out", "in"), columns),
            Spec("l.norm.weight", (("l.norm.weight", 0),), ("dim0",), Layout({})),
        )
    )


@law
@given(orders(), st.integers(1, 3), st.sampled_from([None, {"l.q"}, {"l.q", "l.v", "l.o"}]))
def test_heads_with_copies_and_their_factors(drawn: Any, rank: int, only: Any):
    order, heads, kv_heads, _ = drawn
    specs = attention(order, heads, kv_heads)
    places = [{"tp": place, "dp": data} for place in range(len(order.query)) for data in range(2)]
    check(specs, places, {"dim0": 4})
    factors = specs.factors(rank, only=only)
    state = draw_factors(factors, rank, heads, kv_heads)
    local = [(at, factors.to_local(state, at)) for at in places]
    assert {name: tensor for name, tensor in local[0][1].items() if "qkv.lora_A" in name}.popitem()[1].shape == (
        3 * rank,
        IN,
    )
    back = factors.to_logical(local)
    assert back.keys() == state.keys()
    assert all(same(back[name], state[name]) for name in state)


def draw_factors(factors: WeightSpecs, rank: int, heads: int, kv_heads: int) -> dict[str, Tensor]:
    rows = {"q": heads * HEAD, "k": kv_heads * HEAD, "v": kv_heads * HEAD, "o": IN}
    state = {}
    for spec in factors:
        for name in spec.names:
            owner = name.split(".")[3]
            columns = heads * HEAD if owner == "o" else IN
            state[name] = torch.randn((rank, columns) if "lora_A" in name else (rows[owner], rank))
    return state


def test_the_columns_of_the_output_projection_are_the_heads_of_the_rank():
    """neuronx-distributed's table for 8 ranks, 4 key/value and 32 query heads."""
    specs = attention(grouped_heads(8, 32, 4), 32, 4)
    state = draw_state(specs, {"dim0": 4})
    state["l.o.weight"] = torch.arange(64).div(HEAD, rounding_mode="floor").float().expand(IN, -1)
    local = specs.to_local(state, {"tp": 5})
    assert local["l.o.weight"][0, ::HEAD].tolist() == [12, 13, 14, 15]
    k = local["l.qkv.weight"][4 * HEAD : 5 * HEAD]
    assert torch.equal(k, state["l.k.weight"][HEAD : 2 * HEAD])


def gate_up(ranks_: int = 2) -> WeightSpecs:
    layout = Layout({"out": 12, "in": IN}, (fused("tp", "out", (6, 6), ranks_),), (("gate", 6), ("up", 6)))
    return WeightSpecs((Spec("m.gate_up.weight", (("m.gate.weight", 6), ("m.up.weight", 6)), ("out", "in"), layout),))


def test_strided_shards_and_tied_embeddings():
    check(gate_up(3), [{"tp": rank} for rank in range(3)], {})
    words = Layout({"in": 10, "out": 4}, (even("tp", "in", 10, 4),))
    rows = Layout({"out": 10, "in": 4}, (even("tp", "out", 10, 4),))
    specs = WeightSpecs(
        (
            Spec("e.weight", (("e.weight", 0),), ("in", "out"), words),
            Spec("h.weight", (("h.weight", 0),), ("out", "in"), rows),
        ),
        (("e.weight", "h.weight"),),
    )
    check(specs, [{"tp": rank} for rank in range(4)], {})
    local = specs.to_local({"e.weight": torch.randn(10, 4)}, {"tp": 1})
    assert torch.equal(local["e.weight"], local["h.weight"])
    names = {name for spec in specs.factors(2) for name in spec.names}
    assert "base_model.model.e.lora_embedding_A" in names
    assert "base_model.model.h.lora_B.weight" in names
    with pytest.raises(LayoutError, match="tied and differ"):
        specs.to_local({"e.weight": torch.randn(10, 4), "h.weight": torch.randn(10, 4)}, {"tp": 0})


def test_what_does_not_fit_is_refused(tmp_path: Path):
    specs = attention(grouped_heads(4, 8, 2), 8, 2)
    state = draw_state(specs, {"dim0": 4})
    local = [({"tp": rank}, specs.to_local(state, {"tp": rank})) for rank in range(4)]
    with pytest.raises(LayoutError, match=r"lacks \['l.k.weight'\]"):
        specs.to_local({name: tensor for name, tensor in state.items() if name != "l.k.weight"}, {"tp": 0})
    with pytest.raises(LayoutError, match="have no place"):
        specs.to_local({**state, "l.z.weight": torch.zeros(1)}, {"tp": 0})
    with pytest.raises(LayoutError, match=r"l.v.weight has the shape \(5, 3\)"):
        specs.to_local({**state, "l.v.weight": torch.zeros(5, IN)}, {"tp": 0})
    with pytest.raises(LayoutError, match=r"nothing from the rank at \{'tp': 2\}"):
        specs.to_logical([local[0], local[1], local[3]])
    with pytest.raises(LayoutError, match="missing or without a place"):
        specs.to_logical([local[0], ({"tp": 1}, {}), *local[2:]])
    changed = [(at, {name: tensor.clone() for name, tensor in tensors.items()}) for at, tensors in local]
    changed[3][1]["l.qkv.weight"][-1] += 1  # a value row that rank 1 has too
    with pytest.raises(LayoutError, match=r"the copy at .* differs"):
        specs.to_logical(changed)
    changed[3][1]["l.qkv.weight"] = torch.zeros(3, IN)
    with pytest.raises(LayoutError, match="has the shape"):
        specs.to_logical(changed)
    with pytest.raises(LayoutError, match="ranks"):
        specs.factors({"l.q": 2, "l.k": 3})
    with pytest.raises(LayoutError, match="more than one place"):
        WeightSpecs((*specs, *specs))
    specs.write(tmp_path / "specs.json")
    assert WeightSpecs.read(tmp_path / "specs.json") == specs
    values = specs.to_dict()
    for wrong in ({**values, "version": 2}, {**values, "specs": [{}]}, {**values, "layouts": []}, {"format": "x"}):
        with pytest.raises(LayoutError, match="not "):
            WeightSpecs.from_dict(wrong)


# ---- neuronx-distributed's metadata ----------------------------------------------------------------------------------

TP, HEADS, KV = 8, 16, 4


def neuron(fuse: bool, adapter: str = "default") -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """The metadata and one rank's shapes of a decoder layer with an adapter."""
    gqa = {
        "gqa_qkv_projection_name": "qkv_proj",
        "query_projection_name": "q_proj",
        "key_projection_name": "k_proj",
        "value_projection_name": "v_proj",
        "output_projection_name": "o_proj",
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV,
        "kv_size_multiplier": 2,
        "q_output_size_per_partition": HEADS * HEAD // TP,
        "kv_output_size_per_partition": 2 * KV * HEAD // TP,
        "fuse_qkv": fuse,
        "bias": False,
        "tp_size": TP,
        "peft_type": "lora",
    }
    mlp = {"fused_linear_name": "gate_up_proj", "linear_names": ["gate_proj", "up_proj"], "bias": False}
    mlp |= {"fuse_axis": 0, "original_dims": [24, 24], "tp_size": TP, "peft_type": "lora"}
    q, kv = HEADS * HEAD // TP, 2 * KV * HEAD // TP
    name = f".{adapter}" if adapter else ""
    shapes: dict[str, tuple[int, ...]] = {
        "a.qkv_proj.lora_A" + name + ".weight": (2, IN),
        "a.o_proj.base_layer.weight": (IN, q),
        "a.o_proj.lora_A" + name + ".weight": (2, q),
        "a.o_proj.lora_B" + name + ".weight": (IN, 2),
        "m.gate_up_proj.base_layer.weight": (6, IN),
        "m.gate_up_proj.lora_A" + name + ".weight": (2, IN),
        "m.gate_up_proj.lora_B" + name + ".weight": (6, 2),
        "m.down_proj.weight": (IN, 3),
        "n.weight": (IN,),
        "e.weight": (5, IN),
    }
    if fuse:
        shapes["a.qkv_proj.base_layer.weight_qkv"] = (q + 2 * kv, IN)
        shapes["a.qkv_proj.lora_B" + name + ".weight"] = (q + 2 * kv, 2)
    for letter, rows in zip("qkv", () if fuse else (q, kv, kv), strict=False):
        shapes[f"a.qkv_proj.base_layer.weight_{letter}"] = (rows, IN)
        shapes[f"a.qkv_proj.lora_B{name}.weight_{letter}"] = (rows, 2)
    cut = {"tensor_model_parallel": True, "partition_stride": 1, "num_partitions": TP}
    parameters: dict[str, Any] = {local: {"tensor_model_parallel": False} for local in shapes}
    parameters["m.down_proj.weight"] = {**cut, "partition_dim": 1}
    parameters["e.weight"] = {**cut, "partition_dim": 0}
    specs = [
        {"module_fully_qualified_name": "a", "specs": [["GQAQKVColumnParallelLinearSpec", gqa]]},
        {"module_fully_qualified_name": "m", "specs": [["FusedLinearsSpec", mlp]]},
    ]
    return {"parameters": parameters, "model_weight_transformation_specs": specs}, shapes


@pytest.mark.parametrize("adapter", ["default", "a", ""])
@pytest.mark.parametrize("fuse", [False, True])
def test_neuron_metadata_become_specs(fuse: bool, adapter: str):
    metadata, shapes = neuron(fuse, adapter)
    specs = specs_from_neuron(json.loads(json.dumps(metadata)), shapes)
    assert {spec.local for spec in specs} == shapes.keys()
    prefix = "base_model.model."
    q, kv = HEADS * HEAD, KV * HEAD
    state = {"n.weight": torch.randn(IN), "e.weight": torch.randn(40, IN), "m.down_proj.weight": torch.randn(IN, 24)}
    for module, rows in {"a.q_proj": q, "a.k_proj": kv, "a.v_proj": kv, "m.gate_proj": 24, "m.up_proj": 24}.items():
        state[f"{module}.weight"] = torch.randn(rows, IN)
        state[f"{prefix}{module}.lora_B.weight"] = torch.randn(rows, 2)
        state[f"{prefix}{module}.lora_A.weight"] = torch.full((2, IN), float(module.startswith("a")))
    state |= {"a.o_proj.weight": torch.randn(IN, q), f"{prefix}a.o_proj.lora_A.weight": torch.randn(2, q)}
    state[f"{prefix}a.o_proj.lora_B.weight"] = torch.randn(IN, 2)
    local = [({"tp": rank}, specs.to_local(state, {"tp": rank})) for rank in range(TP)]
    assert {name: tuple(tensor.shape) for name, tensor in local[3][1].items()} == shapes
    back = specs.to_logical(local)
    assert back.keys() == state.keys()
    assert all(same(back[name], state[name]) for name in state)
    rank, head = local[5][1], state["a.k_proj.weight"][HEAD : 2 * HEAD]
    k = (
        rank["a.qkv_proj.base_layer.weight_qkv"][2 * HEAD : 3 * HEAD]
        if fuse
        else rank["a.qkv_proj.base_layer.weight_k"]
    )
    assert torch.equal(k, head)  # rank 5 has key/value head 1, as its table says
    state[f"{prefix}a.k_proj.lora_A.weight"] = torch.zeros(2, IN)
    with pytest.raises(LayoutError, match="nothing is averaged"):
        specs.to_local(state, {"tp": 0})


def test_neuron_metadata_from_strangers_are_refused():
    def refused(says: str, change: Any) -> None:
        metadata, shapes = neuron(True)
        change(metadata, shapes)
        with pytest.raises(LayoutError, match=says):
            specs_from_neuron(metadata, shapes)

    def gqa(metadata: Any) -> Any:
        return metadata["model_weight_transformation_specs"][0]["specs"][0][1]

    refused(
        "not a known specification", lambda m, s: m["model_weight_transformation_specs"][0]["specs"].append(["os", {}])
    )
    refused("not a number from 1", lambda m, s: gqa(m).update(tp_size=10**9))
    refused("not a number from 1", lambda m, s: gqa(m).update(num_attention_heads="16"))
    refused("are not 16 heads", lambda m, s: gqa(m).update(kv_output_size_per_partition=7))
    refused("not the metadata", lambda m, s: gqa(m).pop("fuse_qkv"))
    refused("not the metadata", lambda m, s: m.update(parameters=[]))
    refused("not what the metadata says", lambda m, s: s.update({"a.qkv_proj.base_layer.weight_qkv": (9, IN)}))
    refused("does not say how", lambda m, s: s.update({"z.weight": (1,)}))
    refused("more than one place", lambda m, s: s.update({"m.gate_up_proj.lora_B.b.weight": (6, 2)}))
