"""Optimum Neuron's files: what was cut by its formulas comes back bit for bit, and nothing in them can run."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import neuron_files as files
import pytest
import torch
from torch import Tensor

from lorica.checkpoint.neuron import find_shards, read_config, read_shards, write_shards
from lorica.errors import CheckpointError
from lorica.layout.specs import same

SOME = [(2, 1, False), (4, 2, True), (8, 2, False), (8, 1, True)]


def is_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not same(one[name], other[name])] == []


@pytest.mark.parametrize(("ranks", "stages", "fuse"), SOME)
def test_what_was_cut_comes_back(tmp_path: Path, ranks: int, stages: int, fuse: bool) -> None:
    whole = files.adapter_tensors()
    shards = files.save(tmp_path, whole, ranks, stages=stages, fuse=fuse)
    is_same(read_shards(shards, "default"), whole)


@pytest.mark.parametrize(("ranks", "stages", "fuse"), SOME)
def test_what_is_written_is_what_they_would_write(tmp_path: Path, ranks: int, stages: int, fuse: bool) -> None:
    whole = files.adapter_tensors()
    theirs = files.save(tmp_path, whole, ranks, stages=stages, fuse=fuse)
    parts = []
    for stage in range(stages):
        metadata = json.loads((theirs / f"mp_metadata_pp_rank_{stage}.json").read_text())
        mine = {name: t for name, t in whole.items() if stages == 1 or f"layers.{stage}." in name}
        parts.append((metadata, mine))
    write_shards(tmp_path / "again", parts, ranks, "default")
    for path in sorted((theirs / "model").iterdir()):
        is_same(torch.load(tmp_path / "again" / "model" / path.name), torch.load(path))
    assert {path.name for path in (tmp_path / "again").iterdir()} == {path.name for path in theirs.iterdir()}


def test_adapters_on_attention_only_are_consolidated(tmp_path: Path) -> None:
    """Optimum Neuron looks for the fused MLP's weights, which no adapter's shards have, and fails."""
    whole = files.adapter_tensors(targets=files.ATTENTION)
    is_same(read_shards(files.save(tmp_path, whole, 4), "default"), whole)


@pytest.mark.parametrize("adapter", ["a", "lora", "default", "my-adapter", "weight", "q_proj"])
def test_an_adapter_may_have_any_name(tmp_path: Path, adapter: str) -> None:
    """Names are not looked for inside of other names, where "a" and "lora" are found everywhere."""
    whole = files.adapter_tensors(seed=3)
    shards = files.save(tmp_path, whole, 4, adapter=adapter, others=("b", "lora_A"))
    assert find_shards(tmp_path) == {adapter: shards}
    is_same(read_shards(shards, adapter), whole)
    parts = [(json.loads((shards / "mp_metadata_pp_rank_0.json").read_text()), whole)]
    write_shards(tmp_path / "again", parts, 4, adapter)
    is_same(read_shards(tmp_path / "again", adapter), whole)


def test_several_adapters_and_folders_are_told_apart(tmp_path: Path) -> None:
    for number, name in enumerate(("default", "other")):
        files.save(tmp_path, files.adapter_tensors(seed=number), 2, adapter=name)
    assert [*find_shards(tmp_path)] == ["default", "other"]
    assert [*find_shards(tmp_path / "adapter_other")] == ["other"]
    assert [*find_shards(tmp_path / "adapter_other" / "adapter_shards")] == ["other"]
    with pytest.raises(CheckpointError, match="no adapter_shards"):
        find_shards(tmp_path / "elsewhere")


def test_ranks_that_differ_in_a_replica_are_told(tmp_path: Path) -> None:
    """Under sequence parallelism each rank trains an A of its own there, and the first one's is saved."""
    whole = files.adapter_tensors()
    shards = files.save(tmp_path, whole, 4)
    path = shards / "model" / "dp_rank_00_tp_rank_02_pp_rank_00.pt"
    state = torch.load(path)
    name = f"{files.PREFIX}model.layers.0.self_attn.qkv_proj.lora_A.weight"
    state[name] += 1
    torch.save(state, path)
    with pytest.raises(
        CheckpointError, match=r"qkv_proj.lora_A.weight: the copy at \{'tp': 2\} differs(?s:.*)first_copy"
    ):
        read_shards(shards, "default")
    is_same(read_shards(shards, "default", first_copy=True), whole)


def test_patterns_become_what_was_trained(tmp_path: Path) -> None:
    """Patterns name the projections, and the layers there are fused: they had no effect on those."""
    config = {"rank_pattern": {"q_proj": 7, "down_proj": 3}, "alpha_pattern": {"gate_proj": 1, "gate_up_proj": 9}}
    whole = files.adapter_tensors()
    shards = files.save(tmp_path, whole, 2, config=config)
    found = read_config(shards, read_shards(shards, "default"), "default")
    from lorica.targets.specs import spec_for

    for layer in range(2):
        specs = {
            name: spec_for(found, f"model.layers.{layer}.{name}")
            for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
        }
        assert {name: (spec.r, spec.alpha) for name, spec in specs.items()} == {
            "self_attn.q_proj": (3, 6),
            "self_attn.k_proj": (3, 6),
            "mlp.gate_proj": (3, 9),
            "mlp.up_proj": (3, 9),
            "mlp.down_proj": (3, 6),
        }


def test_tensors_that_are_files_of_their_own(tmp_path: Path) -> None:
    """``use_xser``, Optimum Neuron's default, without torch_xla."""
    whole = files.adapter_tensors()
    shards = files.save(tmp_path, whole, 2)
    module = type(pickle)("torch_xla.utils.serialization")

    class TensorReference:
        __slots__ = ("tid",)

        def __init__(self, tid: int) -> None:
            self.tid = tid

    TensorReference.__module__, TensorReference.__qualname__ = module.__name__, "TensorReference"
    module.TensorReference = TensorReference  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(__import__("sys").modules, "torch_xla", type(pickle)("torch_xla"))
        patch.setitem(__import__("sys").modules, module.__name__, module)
        for path in sorted((shards / "model").glob("*.pt")):
            state = torch.load(path)
            path.with_name(f"{path.name}.tensors").mkdir()
            for number, tensor in enumerate(state.values()):
                torch.save(tensor, path.with_name(f"{path.name}.tensors") / f"tensor_{number}.pt")
            torch.save({name: TensorReference(number) for number, name in enumerate(state)}, path)
            torch.save({}, path.with_name(f"{path.name}.info.pt"))
    is_same(read_shards(shards, "default"), whole)
    for path in (shards / "model").glob("*rank_01_pp*.tensors"):
        (path / "tensor_3.pt").unlink()
    with pytest.raises(CheckpointError, match=r"tensor_3\.pt"):
        read_shards(shards, "default")


class _Runs:
    def __reduce__(self) -> Any:
        return print, ("run",)


def test_nothing_in_a_file_is_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = files.save(tmp_path, files.adapter_tensors(), 2)
    torch.save({"x": _Runs()}, shards / "model" / "dp_rank_00_tp_rank_01_pp_rank_00.pt")
    with pytest.raises(CheckpointError, match="not a file of tensors and plain values"):
        read_shards(shards, "default")
    assert capsys.readouterr().out == ""


def test_what_is_broken_is_told(tmp_path: Path) -> None:
    def refused(says: str, spoil: Any) -> None:
        place = tmp_path / str(len([*tmp_path.iterdir()]))
        shards = files.save(place, files.adapter_tensors(), 4, stages=2)
        spoil(shards)
        with pytest.raises(CheckpointError, match=says):
            read_shards(shards, "default")

    file = "model/dp_rank_00_tp_rank_01_pp_rank_01.pt"
    refused("not finished, 'done' is missing", lambda s: (s / "done").unlink())
    refused("the shard of rank 1, stage 1, is missing", lambda s: (s / file).unlink())
    refused("mp_metadata_pp_rank_1.json is missing", lambda s: (s / "mp_metadata_pp_rank_1.json").unlink())
    refused("not a file of tensors", lambda s: (s / file).write_bytes(b"PK\x03\x04"))
    refused("expected a dictionary", lambda s: torch.save(torch.zeros(1), s / file))
    refused("'x' is a int, not a tensor", lambda s: torch.save({"x": 1}, s / file))
    refused("missing or without a place", lambda s: torch.save({"x": torch.zeros(1)}, s / file))
    refused("not valid JSON", lambda s: (s / "mp_metadata_pp_rank_0.json").write_text("{"))
    refused("does not say how", lambda s: (s / "mp_metadata_pp_rank_0.json").write_text('{"parameters": {}}'))

    def dora(shards: Path) -> None:
        for path in (shards / "model").glob("*pp_rank_00.pt"):
            magnitude = {f"{files.PREFIX}model.layers.0.mlp.down_proj.lora_magnitude_vector": torch.ones(files.HIDDEN)}
            torch.save(torch.load(path) | magnitude, path)

    refused("DoRA takes norms of shards", dora)


def test_different_as_are_not_averaged(tmp_path: Path) -> None:
    whole = files.adapter_tensors()
    shards = files.save(tmp_path, whole, 2)
    metadata = json.loads((shards / "mp_metadata_pp_rank_0.json").read_text())
    name = f"{files.PREFIX}model.layers.1.mlp.up_proj.lora_A.weight"
    with pytest.raises(CheckpointError, match=r"up_proj.lora_A.weight differs from(?s:.*)nothing is averaged"):
        write_shards(tmp_path / "again", [(metadata, whole | {name: whole[name] + 1})], 2, "default")
    assert not (tmp_path / "again").exists()
    with pytest.raises(CheckpointError, match="lacks"):
        write_shards(tmp_path / "again", [(metadata, {n: t for n, t in whole.items() if n != name})], 2, "default")
