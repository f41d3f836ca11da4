"""Safetensors files as lorica reads and writes them: the bytes of the format's own library, and errors with names."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorica.checkpoint import bulk
from lorica.errors import CheckpointError
from lorica.files import tensors
from lorica.files.tensors import DTYPES, OpenTensors, TensorReader, write_tensors

META = {"format": "pt"}
WRITTEN = [*DTYPES.values(), torch.uint16, torch.uint32, torch.uint64, torch.complex64, torch.float8_e4m3fnuz]
FLOATS = [dtype for dtype in DTYPES.values() if dtype.is_floating_point]


def numbers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3
    return (drawn if dtype.is_floating_point or dtype.is_complex else drawn.abs()).to(dtype)


def several(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Tensors in the order of their names, which is that of the file."""
    shapes = {"a": (3, 5), "b": (7,), "c": (), "d": (0, 4), "e": (2, 3, 4), "f": (1,)}
    return {name: numbers(*shape, dtype=dtype, seed=number) for number, (name, shape) in enumerate(shapes.items())}


def written(folder: Path, tensors: dict[str, Tensor]) -> Path:
    save_file(tensors, folder / "file", metadata=META)
    return folder / "file"


def equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.reshape(-1).tolist() == b.reshape(-1).tolist()


# ---- writing --------------------------------------------------------------------------------------------------------


def assert_same_bytes(folder: Path, tensors: dict[str, Tensor], plain: dict[str, Tensor] | None = None) -> None:
    save_file(plain or tensors, folder / "theirs", metadata=META)
    write_tensors(folder / "ours", tensors, META)
    assert (folder / "ours").read_bytes() == (folder / "theirs").read_bytes()


@pytest.mark.parametrize("dtype", WRITTEN, ids=str)
def test_every_dtype_is_written_as_the_formats_library_writes_it(dtype, tmp_path):
    assert_same_bytes(tmp_path, several(dtype))


def test_all_dtypes_lie_in_the_order_of_the_formats_library(tmp_path):
    assert_same_bytes(tmp_path, {f"{len(WRITTEN) - i:02}": numbers(5, dtype=d) for i, d in enumerate(WRITTEN)})


def test_names_of_any_script_and_no_tensors_at_all_are_written_alike(tmp_path):
    assert_same_bytes(tmp_path, {"größe": torch.ones(2), 'a"b\\': torch.ones(1), "層": torch.zeros(3)})
    for name in ("ours", "theirs"):
        (tmp_path / name).unlink()
    assert_same_bytes(tmp_path, {})


def test_gaps_shared_memory_and_gradients_are_no_hindrance(tmp_path):
    whole = torch.arange(24.0).view(4, 6)
    tensors = {"a": whole, "b": whole, "c": whole.t(), "d": whole[:, 1:3], "e": torch.nn.Parameter(whole[1])}
    assert_same_bytes(tmp_path, tensors, {name: t.detach().clone().contiguous() for name, t in tensors.items()})


def test_a_dtype_without_a_word_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"second.*complex128"):
        write_tensors(tmp_path / "file", {"first": torch.ones(1), "second": torch.ones(1, dtype=torch.complex128)}, {})
    assert not (tmp_path / "file").exists()


# ---- reading many at once -------------------------------------------------------------------------------------------


@pytest.fixture(params=[8, 24, 2**20], ids="chunks of {} bytes".format)
def chunks(request, monkeypatch):
    monkeypatch.setattr(bulk, "_CHUNK_BYTES", request.param)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_what_is_read_is_what_was_written(dtype, tmp_path):
    path = written(tmp_path, several(dtype) | {"other": numbers(4, dtype=torch.float64)})
    reader = TensorReader(path)
    read = bulk.read_whole(reader, dict.fromkeys(reader.tensors))
    assert {name: equal(tensor, load_file(path)[name]) for name, tensor in read.items()} == dict.fromkeys(read, True)
    assert len(read) == len(reader.tensors)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("goal", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("source", FLOATS, ids=str)
def test_dtypes_are_changed_on_the_way(source, goal, tmp_path):
    path = written(tmp_path, several(source))
    read = bulk.read_whole(TensorReader(path), dict.fromkeys(several(), goal))
    assert all(equal(tensor, load_file(path)[name].to(goal)) for name, tensor in read.items())


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("wanted", ["a", "f", "bd", "ace", "bcef"])
def test_of_the_rest_of_a_file_nothing_is_read(wanted, tmp_path, monkeypatch):
    lengths, read_into = [], OpenTensors.read_into
    monkeypatch.setattr(OpenTensors, "read_into", lambda f, t, at: (lengths.append(t.nbytes), read_into(f, t, at)))
    others = {name: torch.full_like(tensor, math.nan) for name, tensor in several().items() if name not in wanted}
    path = written(tmp_path, several() | others)
    read = bulk.read_whole(TensorReader(path), {name: torch.bfloat16 if name == "e" else None for name in wanted})
    assert read.keys() == set(wanted)
    assert sum(lengths) == sum(several()[name].nbytes for name in wanted)
    for name, tensor in read.items():
        expected = several()[name]
        assert equal(tensor, expected.bfloat16() if name == "e" else expected)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("goal", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("name", "at"), [("a", 0), ("a", -1), ("b", 0), ("b", 3), ("c", 0), ("e", -1), ("f", 0)])
def test_what_is_not_finite_is_named_wherever_it_is(name, at, value, goal, tmp_path):
    tensors = several()
    tensors[name].view(-1)[at] = value
    with pytest.raises(CheckpointError, match=rf"file: {name} holds NaN or infinity"):
        bulk.read_whole(TensorReader(written(tmp_path, tensors)), dict.fromkeys(tensors, goal))


def test_the_largest_numbers_are_finite(tmp_path):
    largest = {str(d): torch.full((3,), torch.finfo(d).max).to(d) for d in (torch.float32, torch.float16)}
    reader = TensorReader(written(tmp_path, largest))
    assert len(bulk.read_whole(reader, dict.fromkeys(largest))) == 2


def test_each_tensor_has_a_storage_and_a_version_of_its_own(tmp_path):
    read = bulk.read_whole(TensorReader(written(tmp_path, several())), dict.fromkeys(several()))
    filled = [tensor for tensor in read.values() if tensor.numel()]
    assert len({tensor.untyped_storage().data_ptr() for tensor in filled}) == len(filled)
    assert [tensor.untyped_storage().nbytes() for tensor in filled] == [tensor.nbytes for tensor in filled]
    read["a"].add_(1)
    assert [tensor._version for name, tensor in read.items() if name != "a"] == [0] * (len(read) - 1)


# ---- files that change ----------------------------------------------------------------------------------------------


def test_a_file_that_became_shorter_is_refused(tmp_path):
    path = written(tmp_path, several())
    reader = TensorReader(path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match="end too early"):
        bulk.read_whole(reader, dict.fromkeys(several()))


def test_a_file_that_grows_keeps_what_was_checked(tmp_path):
    path = written(tmp_path, several())
    reader = TensorReader(path)
    with path.open("ab") as file:
        file.write(b"more")
    assert all(equal(bulk.read_all(reader)[name], tensor) for name, tensor in several().items())


# ---- rectangles -----------------------------------------------------------------------------------------------------


@pytest.fixture(params=[0, 2**20], ids=["some rows at a time", "kept"])
def kept(request, monkeypatch):
    monkeypatch.setattr(tensors, "_KEPT_BYTES", request.param)
    monkeypatch.setattr(tensors, "_COPY_BYTES", 64)


@pytest.mark.usefixtures("kept")
@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_rectangle_is_that_of_the_tensor(data, tmp_path):
    shape = data.draw(st.lists(st.integers(0, 5), max_size=4))
    whole = torch.arange(math.prod(shape), dtype=torch.int32).view(shape)
    path = tmp_path / "file"
    save_file({"before": torch.ones(3), "it": whole}, path)
    with TensorReader(path).opened() as file:
        part = file.slices("it")
        for _ in range(3):
            sides = [sorted(data.draw(st.tuples(st.integers(0, size), st.integers(0, size)))) for size in shape]
            index = tuple(slice(*side) for side in sides)[: data.draw(st.integers(0, len(shape)))]
            assert equal(part[index], whole[index])
        assert equal(part[...], whole)
        assert part.shape == whole.shape
        assert part.dtype is torch.int32


def test_a_rectangle_of_a_file_that_became_shorter_is_refused(tmp_path):
    path = written(tmp_path, {"a": numbers(8, 4)})
    with TensorReader(path).opened() as file:
        path.write_bytes(path.read_bytes()[:-9])
        with pytest.raises(CheckpointError, match="end too early"):
            file.slices("a")[6:]
