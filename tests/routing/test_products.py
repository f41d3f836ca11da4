"""Many adapters' parts: both forms add the same, whatever the order, the ranks, the scales and the biases."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lorica.layers import products
from lorica.layers.products import Pair
from lorica.routing import BASE, Rows

IN, OUT = 12, 20
BATCHES = {
    "each its own": ["a", "b", "c", "d"],
    "repeated": ["a", "a", "b", "b", "c", "c"],
    "mixed up": ["c", "a", BASE, "b", "a", "c", "b", "d"],
    "with others before": [BASE, BASE, "a", "b", "c", "d", BASE],
    "uneven": ["a", "a", "a", "b", "c", "c", "d"],
}


def pairs(names: list[str], *, bias: bool, scales: tuple[float, ...], dtype: torch.dtype) -> dict[str, Pair]:
    """Factors of rank 2 and, for one adapter, 3; in float32 whatever the dtype of the output."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for index, name in enumerate(n for n in dict.fromkeys(names) if n != BASE):
        a, b, c = (torch.randn(*shape, generator=generator) for shape in ((2 + (name == "c"), IN), (OUT, 2), (OUT,)))
        b = torch.randn(OUT, len(a), generator=generator)
        found[name] = Pair(a, b, c.to(dtype) if bias else None, scales[index % len(scales)])
    return found


def added(form: str, names: list[str], made: dict[str, Pair], items: int, tokens: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(items, tokens, size, generator=generator).to(dtype) for size in (IN, OUT))
    rows = Rows(names)
    if form == "runs":
        products._add_runs(y, x, rows.runs(items), made)
    else:
        for stack in products._stacks(made, rows, items, y.device):
            (stack.copied(dtype) if form == "kept" else stack).add(y, x)
    return y


@pytest.mark.parametrize("piece", [1, 400, 2**19], ids=["one at a time", "some at a time", "all at once"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("scales", [(0.5,), (2.0, 0.0, -1.0), (0.0,)], ids=["one scale", "several", "none"])
@pytest.mark.parametrize("batch", BATCHES)
def test_both_forms_add_the_same(batch, scales, bias, piece, monkeypatch):
    monkeypatch.setattr(products, "PIECE", piece)
    names = BATCHES[batch]
    made = pairs(names, bias=bias, scales=scales, dtype=torch.float32)
    for each, tokens in ((1, 1), (2, 3)):
        wanted = added("runs", names, made, each * len(names), tokens, torch.float32)
        for form in ("copied", "kept"):
            got = added(form, names, made, each * len(names), tokens, torch.float32)
            torch.testing.assert_close(got, wanted)


def test_factors_follow_the_dtype_of_the_output():
    names = BATCHES["mixed up"]
    made = pairs(names, bias=True, scales=(0.5,), dtype=torch.bfloat16)
    wanted = added("runs", names, made, len(names), 1, torch.float32)
    for form in ("runs", "copied", "kept"):
        got = added(form, names, made, len(names), 1, torch.bfloat16)
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.float(), wanted, atol=0.1, rtol=0.05)


class Largest(TorchDispatchMode):
    """The most bytes that one operation allocated."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {leaf.data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.data_ptr() not in known:
                self.nbytes = max(self.nbytes, leaf.untyped_storage().nbytes())
        return out


def test_copies_of_factors_do_not_grow_with_the_adapters(monkeypatch):
    monkeypatch.setattr(products, "PIECE", 2**12)
    names = [f"a{index}" for index in range(200)]
    made = {name: Pair(torch.randn(2, IN), torch.randn(OUT, 2), None, 1.0) for name in names}
    with Largest() as largest:
        added("copied", names, made, len(names), 1, torch.float32)
    output = len(names) * OUT * 4
    assert sum(pair.nbytes for pair in made.values()) > 3 * output
    assert largest.nbytes <= output


def pays(names: list[str], *, tokens: int, width: int, r: int = 8, kept: bool = False) -> bool:
    meta = torch.device("meta")
    x = torch.empty(len(names), tokens, width, device=meta)
    pair = Pair(torch.empty(r, width, device=meta), torch.empty(width, r, device=meta), None, 1.0)
    rows = Rows(names)
    stacks = products._stacks(dict.fromkeys(rows.adapters, pair), rows, len(names), torch.device("cpu"))
    return products._batching_pays(stacks, x, x, rows.runs(len(names)), kept=kept)


def test_what_moves_less_is_taken():
    """Small factors are copied and large ones are not; rows that are mixed up are only put in order if they are few."""
    each, few = [f"a{i}" for i in range(64)], [f"a{i % 4}" for i in range(64)]
    assert pays(each, tokens=1, width=256)
    assert not pays(each, tokens=1, width=4096)
    assert pays(each, tokens=1, width=4096, kept=True)
    assert pays(few, tokens=1, width=4096)
    assert not pays(few, tokens=64, width=256)
    assert not pays(["a0"] * 32 + ["a1"] * 32, tokens=64, width=1024)
