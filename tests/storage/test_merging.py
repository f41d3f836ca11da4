"""A delta goes into a weight in row chunks, computed in float32, rounded once."""

from __future__ import annotations

import pytest
import torch

from lorica import storage
from lorica.errors import AdapterError
from lorica.storage import Term, add_low_rank_, storage_of

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
    monkeypatch.setattr(storage, "CHUNK_ELEMENTS", chunk_rows * COLS)
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
    monkeypatch.setattr(storage, "CHUNK_ELEMENTS", 4 * COLS)
    sizes = []
    weight = torch.zeros(ROWS, COLS, dtype=torch.bfloat16)

    class Watched(storage.Dense):
        def dequantize(self, stored: torch.Tensor) -> torch.Tensor:
            sizes.append(stored.shape[0])
            return super().dequantize(stored)

    add_low_rank_(weight, terms(1), Watched(torch.float32, exact=False))
    assert max(sizes) == 4
    assert sum(sizes) == ROWS


def test_a_transposed_weight_is_written_through_its_view():
    weight, added = torch.randn(COLS, ROWS), terms(1)
    wanted = expected(weight.T, added)
    add_low_rank_(weight.T, added, storage_of(weight, "here"))
    assert torch.allclose(weight.T.double(), wanted, atol=1e-5)


@pytest.mark.parametrize("gain", [(ROWS, 1), (1, COLS)], ids=["rows", "columns"])
@pytest.mark.parametrize("chunk_rows", [1, 5, 100])
def test_gains_are_multiplied_in_turn_and_divided_out_backwards(monkeypatch, chunk_rows, gain):
    monkeypatch.setattr(storage, "CHUNK_ELEMENTS", chunk_rows * COLS)
    weight, added = torch.randn(ROWS, COLS), [*terms(2, gain), *terms(1)]
    before, wanted = weight.clone(), expected(weight, added)
    add_low_rank_(weight, added, storage_of(weight, "here"))
    assert torch.allclose(weight.double(), wanted, atol=2e-5)
    add_low_rank_(weight, added, storage_of(weight, "here"), undo=True)
    assert torch.allclose(weight, before, atol=2e-5)


def test_an_unknown_storage_names_the_module():
    with pytest.raises(AdapterError, match=r"layers\.0\.q_proj.*int8"):
        storage_of(torch.zeros(2, 2, dtype=torch.int8), "layers.0.q_proj")
