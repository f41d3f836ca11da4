"""A delta goes into a weight in row chunks, computed in float32, rounded once."""

from __future__ import annotations

import math
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lorica import storage
from lorica.errors import AdapterError
from lorica.storage import Term, add_low_rank_, first_not_finite, storage_of

ROWS, COLS, R = 37, 24, 3


def terms(count: int, gain: tuple[int, int] | None = None) -> list[Term]:
    return [
        Term(torch.randn(ROWS, R), torch.randn(R, COLS), 0.5 + index, None if gain is None else torch.rand(gain) + 0.5)
        for index in range(count)
    ]


def expected(weight: torch.Tensor, added: list[Term]) -> torch.Tensor:
    wide = weight.double()
    for left, right, scale, gain in added:
        wide = wide + scale * left.double() @ right.double()
        wide = wide if gain is None else wide * gain.double()
    return wide


@pytest.mark.parametrize("chunk_rows", [1, 5, ROWS, 100])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [1, 2])
def test_float32_factors_into_any_weight_are_rounded_once(monkeypatch, chunk_rows, dtype, count):
    monkeypatch.setattr("lorica.storage.deltas.CHUNK_ELEMENTS", chunk_rows * COLS)
    weight, added = torch.randn(ROWS, COLS).to(dtype), terms(count)
    wanted = expected(weight, added)
    add_low_rank_(weight, added, storage_of(weight, "here"))
    if dtype.itemsize == 2:
        # One rounding is half a unit in the last place; products in the weight's own dtype would be off by many.
        unit = torch.finfo(dtype).eps * wanted.abs()
        assert ((weight.double() - wanted).abs() <= 0.5 * unit + 1e-5).all()
        assert (
            torch.equal(weight, (wanted.float()).to(dtype))
            or (weight != wanted.float().to(dtype)).float().mean() < 0.01
        )
    else:
        assert torch.allclose(weight.double(), wanted, atol=1e-5 if dtype == torch.float32 else 1e-12, rtol=0)


def test_only_one_chunk_is_held_in_float32(monkeypatch):
    monkeypatch.setattr("lorica.storage.deltas.CHUNK_ELEMENTS", 4 * COLS)
    sizes, places = [], set()
    weight = torch.zeros(ROWS, COLS, dtype=torch.bfloat16)

    class Watched(storage.Dense):
        def dequantize(self, stored: torch.Tensor, room: storage.Room | None = None) -> torch.Tensor:
            sizes.append(stored.shape[0])
            values = super().dequantize(stored, room)
            places.add(values.data_ptr())
            return values

    add_low_rank_(weight, terms(1), Watched(torch.float32, exact=False))
    assert max(sizes) == 4
    assert sum(sizes) == ROWS
    assert len(places) == 1  # and every chunk is in the same memory


def test_a_transposed_weight_is_written_through_its_view():
    weight, added = torch.randn(COLS, ROWS), terms(1)
    wanted = expected(weight.T, added)
    add_low_rank_(weight.T, added, storage_of(weight, "here"))
    assert torch.allclose(weight.T.double(), wanted, atol=1e-5)


@pytest.mark.parametrize("gain", [(ROWS, 1), (1, COLS)], ids=["rows", "columns"])
@pytest.mark.parametrize("chunk_rows", [1, 5, 100])
def test_gains_are_multiplied_in_turn_and_divided_out_backwards(monkeypatch, chunk_rows, gain):
    monkeypatch.setattr("lorica.storage.deltas.CHUNK_ELEMENTS", chunk_rows * COLS)
    weight, added = torch.randn(ROWS, COLS), [*terms(2, gain), *terms(1)]
    before, wanted = weight.clone(), expected(weight, added)
    add_low_rank_(weight, added, storage_of(weight, "here"))
    assert torch.allclose(weight.double(), wanted, atol=2e-5)
    add_low_rank_(weight, added, storage_of(weight, "here"), undo=True)
    assert torch.allclose(weight, before, atol=2e-5)


def test_an_unknown_storage_names_the_module():
    with pytest.raises(AdapterError, match=r"layers\.0\.q_proj.*int8"):
        storage_of(torch.zeros(2, 2, dtype=torch.int8), "layers.0.q_proj")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("turned", [False, True])
def test_a_weight_that_is_computed_in_its_own_dtype_needs_no_memory_and_one_kernel(dtype, turned):
    weight, added = torch.randn(ROWS, COLS, dtype=dtype), [term.to(torch.empty(0), dtype) for term in terms(1)]
    matrix = weight if not turned else torch.randn(COLS, ROWS, dtype=dtype).T
    with Allocations() as seen:
        add_low_rank_(matrix, added, storage_of(weight, "here"))
    assert (seen.kernels, seen.allocated) == (["addmm_"], 0)


def test_weights_of_several_sizes_share_one_chunk(monkeypatch):
    monkeypatch.setattr("lorica.storage.deltas.CHUNK_ELEMENTS", 4 * COLS)
    room, weight, added = storage.Room(), torch.zeros(ROWS, COLS, dtype=torch.bfloat16), terms(1)
    add_low_rank_(weight, added, storage_of(weight, "here"), room=room)
    with Allocations() as seen:
        add_low_rank_(weight, added, storage_of(weight, "here"), room=room)
        add_low_rank_(weight[: ROWS // 2], [term_of(added[0], ROWS // 2)], storage_of(weight, "here"), room=room)
    assert seen.allocated == 0


def term_of(term: Term, rows: int) -> Term:
    return term._replace(left=term.left[:rows])


class Allocations(TorchDispatchMode):
    """The names of the kernels that run, and the bytes of storages that appear."""

    def __init__(self):
        super().__init__()
        self.kernels, self.allocated = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.kernels.append(func.overloadpacket.__name__)
            if isinstance(out, torch.Tensor) and all(out is not arg for arg in args):
                self.allocated += out.untyped_storage().nbytes()
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk_rows", [1, 5, 100])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e6])
def test_the_first_term_that_breaks_a_weight_is_found_and_nothing_is_written(monkeypatch, dtype, chunk_rows, bad):
    monkeypatch.setattr("lorica.storage.deltas.CHUNK_ELEMENTS", chunk_rows * COLS)
    weight, added = torch.randn(ROWS, COLS).to(dtype), terms(3)
    before, form = weight.clone(), storage_of(weight, "here")
    assert first_not_finite(weight, added, form) is None
    added[1].left[ROWS - 2] = bad
    added[1].right[:, 3] = 1.0
    broken = dtype == torch.float16 or not math.isfinite(bad)  # 1e6 overflows in float16 alone
    assert first_not_finite(weight, added, form) == (1 if broken else None)
    stack = torch.stack([weight, weight])
    assert first_not_finite(stack, added, form) == (1 if broken else None)
    assert torch.equal(weight, before)
    assert first_not_finite(weight[:0], [term_of(term, 0) for term in added], form) is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("chunk", [COLS, ROWS * COLS, 2 * ROWS * COLS, 100 * ROWS * COLS])
@pytest.mark.parametrize("undo", [False, True])
def test_a_stack_is_changed_as_its_weights_one_by_one(monkeypatch, dtype, shared, chunk, undo):
    monkeypatch.setattr("lorica.storage.deltas.CHUNK_ELEMENTS", chunk)
    stack = torch.randn(5, ROWS, COLS).to(dtype)
    shapes = ((ROWS, R), (R, COLS)) if shared else ((5, ROWS, R), (5, R, COLS))
    added = [Term(torch.randn(shapes[0]), torch.randn(shapes[1]), 0.5) for _ in range(2)]
    one_by_one = stack.clone()
    for e, weight in enumerate(one_by_one):
        add_low_rank_(weight, [term.of(e) for term in added], storage_of(stack, "here"), undo=undo)
    turned = stack.clone().transpose(1, 2).contiguous().transpose(1, 2)
    for given in (stack, turned):
        add_low_rank_(given, added, storage_of(stack, "here"), undo=undo)
        torch.testing.assert_close(given, one_by_one, atol=1e-5, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5)


def test_the_memory_for_chunks_grows_without_holding_two():
    room, live = storage.Room(), []
    for rows in (2, 5, 3):
        chunk = room.copy(torch.full((rows, 4), float(rows)), torch.float64)
        assert torch.equal(chunk, torch.full((rows, 4), float(rows), dtype=torch.float64))
        live.append(weakref.ref(chunk.untyped_storage()))
        del chunk
    assert [storage is not None for storage in (ref() for ref in live)] == [False, True, True]
    assert room.copy(torch.zeros(2), torch.float32).dtype == torch.float32
