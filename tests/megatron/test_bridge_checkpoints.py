"""Checkpoints as Megatron Bridge saves them, by Megatron-Core's own layers and writer on real ranks, read and written.

The layers below are Megatron Bridge's as its ``ParallelLinearAdapter`` builds them: ``linear_in`` a column-parallel
layer (of a row-parallel base layer: a row-parallel one), ``linear_out`` a column-parallel one whose B of fc1 goes
through Megatron-Core's own factory. What is saved and loaded is then Megatron-Core's word, not this file's.
"""

from __future__ import annotations

import multiprocessing
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import world
from gpt import EXPERTS, FFN, GROUPS, HEADS, HIDDEN, LAYERS, Division, config, moe
from torch import Tensor

from lorica.convert.adapter import Adapter, Lazy, Pair
from lorica.convert.geometry import Geometry
from lorica.convert.megatron import read_bridge_adapter
from lorica.convert.to_megatron import write_bridge_adapter
from lorica.layout.specs import same

world.need_megatron()

RANK, ALPHA = 4, 8
HEAD = HIDDEN // HEADS
GEOMETRY = Geometry(LAYERS, HEADS, GROUPS, HEAD, experts=EXPERTS, top_k=2)
SIZES = {"q_proj": HIDDEN, "k_proj": GROUPS * HEAD, "v_proj": GROUPS * HEAD, "o_proj": HIDDEN}
SIZES |= {"gate_proj": FFN, "up_proj": FFN, "down_proj": HIDDEN}
FUSED = {"linear_qkv": ("q_proj", "k_proj", "v_proj"), "linear_fc1": ("gate_proj", "up_proj")}
ROW = {"linear_proj": "o_proj", "linear_fc2": "down_proj"}


def drawn(name: str, *shape: int) -> Tensor:
    """Return the numbers that a name seeds."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(map(ord, name)) * 31 + len(name)))


def pair(layer: str, names: tuple[str, ...], width: int) -> Pair:
    """Return the logical factors of a layer."""
    rows = tuple(SIZES[name.rpartition(".")[2]] for name in names)
    a, b = drawn(f"{layer}.a", RANK, width), drawn(f"{layer}.b", sum(rows), RANK)
    return Pair(names, rows, Lazy.of(a), Lazy.of(b), ALPHA / RANK)


def logical(*, routed: bool = False) -> dict[str, Pair]:
    """Return the logical factors of all layers, by Megatron's names."""
    found = {}
    for layer in range(LAYERS):
        ours, theirs = f"decoder.layers.{layer}", f"model.layers.{layer}"
        attention = f"{ours}.self_attention"
        qkv = tuple(f"{theirs}.self_attn.{name}" for name in FUSED["linear_qkv"])
        found[f"{attention}.linear_qkv"] = pair(f"{attention}.linear_qkv", qkv, HIDDEN)
        found[f"{attention}.linear_proj"] = pair(f"{attention}.linear_proj", (f"{theirs}.self_attn.o_proj",), HIDDEN)
        for expert in range(EXPERTS) if routed else ("",):
            mlp = f"{ours}.mlp.experts.{expert}" if routed else f"{ours}.mlp"
            hf = f"{theirs}.mlp.experts.{expert}" if routed else f"{theirs}.mlp"
            names = tuple(f"{hf}.{name}" for name in FUSED["linear_fc1"])
            found[f"{mlp}.linear_fc1"] = pair(f"{mlp}.linear_fc1", names, HIDDEN)
            found[f"{mlp}.linear_fc2"] = pair(f"{mlp}.linear_fc2", (f"{hf}.down_proj",), FFN)
    return found


def in_megatron(name: str, one: Pair) -> Tensor:
    """Return B with its rows in Megatron's order: query group by query group."""
    b = one.b.read()
    if not name.endswith("linear_qkv"):
        return b
    q, k, v = b.split(one.rows)
    parts = (part.view(GROUPS, -1, RANK) for part in (q, k, v))
    return torch.cat(list(parts), 1).flatten(0, 1)


def shard(whole: Tensor, dim: int, rank: int, size: int, *, halves: bool = False) -> Tensor:
    """Return a rank's piece; of gate and up, that of each."""
    parts = whole.chunk(2, dim) if halves else (whole,)
    return torch.cat([part.chunk(size, dim)[rank] for part in parts], dim)


def layers(division: Division, factors: dict[str, Pair], *, empty: bool = False) -> Any:
    """Return the sharded state of this rank's adapters, as Megatron Bridge gives it, and what each should be."""
    from megatron.core import parallel_state
    from megatron.core.dist_checkpointing.mapping import ShardedTensor
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import apply_swiglu_sharded_factory

    settings = config(division, **moe(num_layers=LAYERS) if division.ep > 1 else {})
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    tp, rank = division.tp, parallel_state.get_tensor_model_parallel_rank()
    stage, each = parallel_state.get_pipeline_model_parallel_rank(), LAYERS // division.pp
    state: dict[str, Any] = {}
    expected: dict[str, Tensor] = {}
    for name, one in factors.items():
        layer = int(name.split(".")[2])
        if layer // each != stage or ".experts." in name:
            continue
        leaf = name.rpartition(".")[2]
        width, out = one.a.shape[1], one.b.shape[0]
        common = {"config": settings, "bias": False, "init_method": torch.nn.init.zeros_}
        if leaf in ROW:
            inner: Any = RowParallelLinear(width, RANK, input_is_parallel=True, skip_bias_add=True, **common)
        else:
            inner = ColumnParallelLinear(width, RANK, gather_output=True, **common)
        outer = ColumnParallelLinear(RANK, out, gather_output=leaf in ROW, **common)
        pieces = {
            "linear_in": shard(one.a.read(), 1 if leaf in ROW else 0, rank, tp),
            "linear_out": shard(in_megatron(name, one), 0, rank, tp, halves=leaf == "linear_fc1"),
        }
        key = name.replace(f".{layer}.", ".", 1) + ".adapter."
        for word, module in (("linear_in", inner), ("linear_out", outer)):
            if not empty:
                module.weight.data.copy_(pieces[word])
            own = module.sharded_state_dict(f"{key}{word}.", ((0, layer, LAYERS),), metadata)
            if leaf == "linear_fc1" and word == "linear_out":
                weight = f"{key}{word}.weight"
                own[weight] = apply_swiglu_sharded_factory(own[weight], ((0, layer, LAYERS),))
            for inner_key, value in own.items():
                if "_extra_state" not in inner_key:
                    state[f"{layer}.{inner_key}"] = value
                    expected[f"{layer}.{inner_key}"] = pieces[word]
    _experts(division, factors, state, expected, ShardedTensor, empty)
    return state, expected


def _experts(
    division: Division, factors: dict[str, Pair], state: Any, expected: Any, sharded: Any, empty: bool
) -> None:
    """Add the grouped experts' factors ``[local experts, …]``: a global axis of experts after that of layers."""
    from megatron.core import parallel_state

    rank, data = parallel_state.get_expert_model_parallel_rank(), parallel_state.get_expert_data_parallel_rank()
    count = EXPERTS // division.ep
    for layer in range(LAYERS):
        for leaf in ("linear_fc1", "linear_fc2"):
            names = [f"decoder.layers.{layer}.mlp.experts.{rank * count + e}.{leaf}" for e in range(count)]
            if names[0] not in factors:
                return
            for word, letter in (("linear_in", "a"), ("linear_out", "b")):
                piece = torch.stack([getattr(factors[name], letter).read() for name in names])
                key = f"decoder.layers.mlp.experts.experts.{leaf}.adapter.{word}.weight"
                data_of = torch.zeros_like(piece) if empty else piece
                offsets = ((0, layer, LAYERS), (1, rank, division.ep))
                state[f"{layer}.{key}"] = sharded.from_rank_offsets(
                    key, data_of, *offsets, replica_id=(0, 0, data), prepend_axis_num=1
                )
                expected[f"{layer}.{key}"] = piece


@contextmanager
def as_it_is() -> Iterator[None]:
    """Let Megatron-Core use what torch calls old, and start the processes in which it writes."""
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # a rank here is one
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Please use DTensor instead", FutureWarning)
        yield


def together(work: Callable[[Path], Any]) -> Path:
    """Return a folder that all ranks know, filled by ``work`` on the first or by all."""
    folder = [tempfile.mkdtemp(prefix="checkpoint-") if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(folder)
    work(Path(folder[0]))
    dist.barrier()
    return Path(folder[0])


def assert_same(found: Adapter, expected: dict[str, Pair]) -> None:
    """Compare factors bit for bit."""
    read = {one.names: one for one in found.pairs}
    assert read.keys() == {one.names for one in expected.values()}
    for one in expected.values():
        mine = read[one.names]
        assert same(mine.a.read(), one.a.read()), one.names
        assert same(mine.b.read(), one.b.read()), one.names
        assert mine.scale == one.scale


RUN = f"""peft:
  _target_: megatron.bridge.peft.lora.LoRA
  dim: {RANK}
  alpha: {ALPHA}
  target_modules: [linear_qkv, linear_proj, linear_fc1, linear_fc2]
model:
  _target_: megatron.bridge.models.llama.llama_provider.LlamaModelProvider
  num_layers: {LAYERS}
  num_attention_heads: {HEADS}
  num_query_groups: {GROUPS}
  hidden_size: {HIDDEN}
  gated_linear_unit: true
  num_moe_experts: {EXPERTS}
"""


@world.case(ranks=4, divisions=[Division(tp=2, pp=2), Division(tp=1, ep=2), Division(tp=2, sp=True)])
def what_megatron_saves_is_read(division: Division) -> None:
    from megatron.core import dist_checkpointing

    factors = logical(routed=division.ep > 1)
    with world.divided(division):
        state, _ = layers(division, factors)
        with as_it_is():
            folder = together(lambda path: dist_checkpointing.save({"model": state}, str(path)))
    if dist.get_rank() == 0:
        (folder / "run_config.yaml").write_text(RUN)
        assert_same(read_bridge_adapter(folder), factors)
        shutil.rmtree(folder)
    dist.barrier()


@world.case(ranks=4, divisions=[Division(tp=2, pp=2), Division(tp=4), Division(tp=1, ep=2)])
def what_is_written_megatron_loads(division: Division) -> None:
    from megatron.core import dist_checkpointing

    factors = logical(routed=division.ep > 1)
    adapter = Adapter("memory", tuple(factors.values()))

    def write(path: Path) -> None:
        if dist.get_rank() == 0:
            write_bridge_adapter(adapter, path, GEOMETRY)

    with world.divided(division):
        folder = together(write)
        state, expected = layers(division, factors, empty=True)
        with as_it_is():
            loaded = dist_checkpointing.load({"model": state}, str(folder / "iter_0000000"))["model"]
    assert loaded.keys() == expected.keys()
    assert expected
    for name, piece in expected.items():
        assert same(loaded[name], piece), name
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder)


def pieces_of_fc1(division: Division) -> tuple[Any, dict[str, Tensor], dict[str, Tensor]]:
    """Return what depends on the number of ranks: gate's and up's own B, and DoRA's magnitude of both.

    Megatron Bridge gives both B's to the factory for a fused gate and up, since their layer's name is ``linear_fc1``,
    and the magnitude to none.
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import ColumnParallelLinear
    from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
    from megatron.core.utils import make_tp_sharded_tensor_for_checkpoint

    rank, tp = parallel_state.get_tensor_model_parallel_rank(), division.tp
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    common = {"config": config(division), "bias": False, "init_method": torch.nn.init.zeros_}
    state: dict[str, Any] = {}
    expected: dict[str, Tensor] = {}
    whole: dict[str, Tensor] = {}
    offsets = ((0, 0, 1),)
    for part in ("gate", "up"):
        key = f"decoder.layers.mlp.linear_fc1.adapter.adapter_{part}."
        for word, shape, width in (("linear_in", (RANK, HIDDEN), HIDDEN), ("linear_out", (FFN, RANK), RANK)):
            whole[f"{part}.{word}"] = drawn(f"{part}.{word}", *shape)
            module = ColumnParallelLinear(width, shape[0], gather_output=False, **common)
            module.weight.data.copy_(shard(whole[f"{part}.{word}"], 0, rank, tp))
            own = module.sharded_state_dict(f"{key}{word}.", offsets, metadata)
            weight = f"{key}{word}.weight"
            value = own[weight]
            state[weight] = apply_swiglu_sharded_factory(value, offsets) if word == "linear_out" else value
            expected[weight] = module.weight.data.clone()
    whole["magnitude"] = drawn("magnitude", 2 * FFN)
    key = "decoder.layers.mlp.linear_fc1.adapter.weight_magnitude"
    piece = shard(whole["magnitude"], 0, rank, tp, halves=True)
    expected[key] = piece
    state[key] = make_tp_sharded_tensor_for_checkpoint(piece.clone(), key, 0, prepend_offsets=offsets)
    return state, expected, whole


@world.case(ranks=4, divisions=[Division(tp=2), Division(tp=4)])
def what_depends_on_the_number_of_ranks(division: Division) -> None:
    """Gate and up apart, and DoRA's magnitudes: read as they were saved, and written as they are loaded."""
    from megatron.core import dist_checkpointing

    geometry = Geometry(1, HEADS, GROUPS, HEAD, ranks=division.tp)
    names = tuple(f"model.layers.0.mlp.{name}" for name in FUSED["linear_fc1"])
    with world.divided(division):
        state, expected, whole = pieces_of_fc1(division)
        apart = {key: value for key, value in state.items() if "magnitude" not in key}
        with as_it_is():
            folder = together(lambda path: dist_checkpointing.save({"model": apart}, str(path)))
    factors = [(Lazy.of(whole[f"{part}.linear_in"]), Lazy.of(whole[f"{part}.linear_out"])) for part in ("gate", "up")]
    pairs = [Pair((name,), (FFN,), a, b, 2.0) for name, (a, b) in zip(names, factors, strict=True)]
    if dist.get_rank() == 0:
        (folder / "run_config.yaml").write_text(f"{RUN}  tensor_model_parallel_size: {division.tp}\n")
        assert_same(read_bridge_adapter(folder), {pair.name: pair for pair in pairs})
        shutil.rmtree(folder)
    fused = Pair(names, (FFN, FFN), factors[0][0], Lazy.of(torch.cat([b.read() for _, b in factors])), 2.0)
    dora = replace(fused, magnitude=Lazy.of(whole["magnitude"]))

    def write(path: Path) -> None:
        if dist.get_rank() == 0:
            for name, mine in (("canonical", pairs), ("dora", [dora])):
                (path / name).mkdir()
                write_bridge_adapter(Adapter("memory", tuple(mine)), path / name, geometry)
            [found] = read_bridge_adapter(path / "dora").pairs
            assert found.magnitude is not None
            assert same(found.magnitude.read(), whole["magnitude"])

    with world.divided(division):
        folder = together(write)
        state, expected, _ = pieces_of_fc1(division)
        for name in ("canonical", "dora"):
            wanted = {key: value for key, value in state.items() if ("magnitude" in key) == (name == "dora")}
            for value in wanted.values():
                value.data.detach().zero_()
            with as_it_is():
                loaded = dist_checkpointing.load({"model": wanted}, str(folder / name / "iter_0000000"))["model"]
            assert all(same(loaded[key].data, expected[key]) for key in wanted), name
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder)


@pytest.mark.parametrize("ranks", world.sizes(__name__))
def test_bridge_checkpoints(ranks: int, request: pytest.FixtureRequest) -> None:
    world.run(__name__, ranks, request.config.getoption("--cases"))
