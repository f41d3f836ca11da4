"""A run goes on, on any other layout, as if it had never stopped; on the same one to the last bit."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import many
import pytest
import torch
from safetensors.torch import load_file, save_file

import runs
from lorica.checkpoint import sharded
from lorica.checkpoint.pieces import Piece
from lorica.checkpoint.shards import ShardReader, ShardWriter, read_index
from lorica.checkpoint.whole import consolidate
from lorica.errors import CheckpointError
from lorica.layout import Box
from lorica.train import state
from lorica.train.loop import Trainer

CHAIN = [(1, {}), (2, {"tp": 2, "sp": True}), (4, {"fsdp": 2, "tp": 2}), (2, {"pp": 2}), (1, {})]


def settings(base: Path, data: Path, output: Path, **changes: Any) -> dict[str, Any]:
    values = runs.settings(base, data, output, lora__lora_dropout=0.0, training__steps=5, **changes)
    values["checkpoint"] = {"every": 1, "keep": 10} | changes.get("checkpoint", {})
    values["training"] |= {"batch_size": 4, "learning_rate": 2e-3}
    values["training"]["eval_every"] = None
    values["log"] = {"every": 1}
    return values


def stop_at(output: Path, step: int) -> None:
    """Leave the run as a kill would have that came just before the next checkpoint after ``step``."""
    for checkpoint in state.complete(output):
        if checkpoint.name > f"step-{step:06d}":
            shutil.rmtree(checkpoint)


@pytest.fixture(scope="module")
def alone(base: Path, data_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("alone") / "out"
    many.run(1, settings(base, data_file, output))
    return output


def test_a_chain_of_layouts_gives_the_curve_of_the_uninterrupted_run(
    base: Path, data_file: Path, tmp_path: Path, alone: Path
) -> None:
    output = tmp_path / "out"
    shutil.copytree(alone, output)
    for number, (count, layout) in enumerate(CHAIN[1:], start=1):
        # What the layout before wrote at this step is all that this one has.
        stop_at(output, number)
        many.run(count, settings(base, data_file, output, parallel=layout), resume=True)
        many.assert_same_curve(many.records(output), many.records(alone), tolerance=1e-4)


@pytest.mark.parametrize(("count", "layout"), [(4, {"tp": 2, "dp": 2}), (2, {"pp": 2})], ids=["tp × dp", "pp"])
def test_on_the_same_layout_it_goes_on_bit_for_bit(
    count: int, layout: dict[str, Any], base: Path, data_file: Path, tmp_path: Path
) -> None:
    values = settings(base, data_file, tmp_path / "out", parallel=layout)
    values["lora"]["lora_dropout"] = 0.1
    values["training"]["steps"] = 3
    whole = many.run(count, values)
    last = state.complete(tmp_path / "out")[-1]
    assert last.name == "step-000003"
    expected = {path.name: load_file(path) for path in (last / "state").glob("*.safetensors")}
    stop_at(tmp_path / "out", 2)
    assert many.run(count, values, resume=True) == whole
    for name, tensors in expected.items():
        ours = load_file(last / "state" / name)
        assert ours.keys() == tensors.keys()
        assert all(torch.equal(value, ours[key]) for key, value in tensors.items())


def test_asynchronous_checkpoints_hold_the_same(base: Path, data_file: Path, tmp_path: Path, alone: Path) -> None:
    for count, layout in ((1, {}), (2, {"fsdp": 2})):
        values = settings(base, data_file, tmp_path / f"{count}", checkpoint={"asynchronous": True}, parallel=layout)
        many.run(count, values)
        ours, theirs = (state.complete(output) for output in (tmp_path / f"{count}", alone))
        assert [path.name for path in ours] == [path.name for path in theirs]
        for first, second in zip(ours, theirs, strict=True):
            wanted = load_file(second / state.ADAPTER)
            for name, value in load_file(first / state.ADAPTER).items():
                torch.testing.assert_close(value, wanted[name], rtol=0, atol=1e-4)
            assert consolidate(first / "state", tmp_path).read_bytes() == (first / state.ADAPTER).read_bytes()


def test_training_goes_on_while_a_checkpoint_is_written(
    base: Path, data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, waited = [], []
    step, write = Trainer.step, ShardWriter.write_data

    def counted(self: Trainer) -> Any:
        result = step(self)
        steps.append(result)
        return result

    def late(self: ShardWriter, plan: Any, planner: Any) -> Any:
        before, deadline = len(steps), time.monotonic() + 60
        while len(steps) == before < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        waited.append(len(steps) - before)
        return write(self, plan, planner)

    monkeypatch.setattr(Trainer, "step", counted)
    monkeypatch.setattr(ShardWriter, "write_data", late)
    values = settings(base, data_file, tmp_path / "out", checkpoint={"asynchronous": True})
    values["training"]["steps"] = 2
    many.run(1, values)
    assert waited == [1, 0]
    for checkpoint in state.complete(tmp_path / "out"):
        saved = (checkpoint / state.ADAPTER).read_bytes()
        assert consolidate(checkpoint / "state", tmp_path).read_bytes() == saved


def test_the_file_of_shards_of_all_dtypes_is_the_one_safetensors_writes(tmp_path: Path) -> None:
    dtypes = [torch.float32, torch.bfloat16, torch.int64, torch.float16, torch.uint8, torch.float64, torch.bool]
    tensors = {f"t{n}é": torch.arange(6).view(2, 3).to(dtype) for n, dtype in enumerate(dtypes)}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3)}
    halves = [
        Piece(f"factors/{name}", value.shape, boxes(value, Box), value, (True,) * len(boxes(value, Box)))
        for name, value in tensors.items()
    ]
    (tmp_path / "state").mkdir()
    sharded.save(tmp_path / "state", halves, finish=lambda: None)
    save_file(tensors, tmp_path / "expected.safetensors", metadata={"format": "pt"})
    assert len(read_index(tmp_path / "state")["factors/t0é"].shards) == 2
    assert consolidate(tmp_path / "state", tmp_path).read_bytes() == (tmp_path / "expected.safetensors").read_bytes()
    damaged = tmp_path / "state" / "index.json"
    whole = damaged.read_text()
    values = json.loads(whole)
    huge = [10**9, 10**9]
    values["tensors"]["factors/t0é"] |= {"shape": huge, "shards": [[[0, 0], huge, "shards-00000.safetensors"]]}
    for text, message in (
        (whole.replace("shards-00000", "../shards-00000"), "none of a tensor"),
        (json.dumps(values), "the index says"),
        (whole.replace("lorica.shards.1", "lorica.shards.9"), "expected 'lorica.shards.1'"),
        (whole.replace("[2, 3]", "[2, -3]"), "no lengths"),
    ):
        damaged.write_text(text)
        with pytest.raises(CheckpointError, match=message):
            consolidate(tmp_path / "state", tmp_path)


def test_what_no_rank_owns_is_an_error_and_not_a_hole(tmp_path: Path) -> None:
    value = torch.arange(6.0).view(2, 3)
    both = boxes(value, Box)
    piece = Piece("factors/a", value.shape, both, value, (True, False))
    with pytest.raises(CheckpointError, match="factors/a: the ranks hold 2 of its 6 elements"):
        sharded.save(tmp_path, [piece], finish=lambda: None)
    sharded.save(tmp_path, [replace(piece, owned=(True, True))], finish=lambda: None)
    other = replace(piece, tensor=torch.empty(2, 3, dtype=torch.float16))
    for wanted, message in ((replace(piece, name="factors/b"), "factors/b is missing"), (other, "needs .*float16")):
        with pytest.raises(CheckpointError, match=message):
            sharded.load(ShardReader(tmp_path), [wanted])
    index = tmp_path / "index.json"
    values = json.loads(index.read_text())
    values["tensors"]["factors/a"]["shards"].pop()
    index.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="the shards hold 2 of 6 elements"):
        ShardReader(tmp_path)


def boxes(value: torch.Tensor, box: Any) -> tuple[Any, ...]:
    """Two boxes by columns where there are some, else one."""
    if value.ndim < 2 or not value.numel():
        whole = tuple(slice(0, size) for size in value.shape)
        return (box(whole, whole),)
    rows = slice(0, value.shape[0])
    return tuple(box((rows, side), (rows, side)) for side in (slice(0, 1), slice(1, value.shape[1])))
