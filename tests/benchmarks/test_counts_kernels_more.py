"""Kernels of DoRA, of small layers and of one token, and how often operators are called from Python for them.

Counts of operators include views, which cost as much as arithmetic where tensors are small.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.measures import dora, layers
from benchmarks.suite import FROZEN, LORICA, PEFT, count_sides, quiet
from lorica.kernels import Dropped, Projection, keep_mask, kernel_for, recorded

LAYERS = 8
# Kernels of one small linear, forward and backward: peft, lorica. Beside the frozen linear's 2: two products and the
# scale in forward; four products, the scale and a sum of two gradients of the input in backward. With dropout a seed
# (2), its mask (2, and a cast), and that the mask is multiplied with, both ways.
SMALL = {"fp32": (12, 11), "dropout": (16, 18)}


class Operators(TorchDispatchMode):
    """Note every operator that reaches a backend, views included."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let small inputs be taken as such."""
    monkeypatch.setattr(recorded, "ELEMENTS", 2**13)


def counted(dropout: float) -> dict[str, dict[str, int]]:
    with quiet():
        return count_sides(layers.build_chain(True, layers=LAYERS, width=256, tokens=8, dropout=dropout))


@pytest.mark.parametrize("kind", SMALL)
def test_kernels_of_a_small_layer(kind: str, small: None) -> None:
    counts = counted(0.05 if kind == "dropout" else 0.0)
    relu = 2
    peft, ours = SMALL[kind]
    assert counts[FROZEN]["kernels"] == LAYERS * (2 + relu)
    assert counts[PEFT]["kernels"] == LAYERS * (peft + relu), "peft is pinned"
    assert counts[LORICA]["kernels"] <= LAYERS * (ours + relu)
    assert counts[LORICA]["saved bytes"] <= counts[PEFT]["saved bytes"]
    assert counts[LORICA]["bytes moved"] < counts[PEFT]["bytes moved"]


def test_a_small_layer_calls_no_python_in_backward(small: None) -> None:
    """Which is what recording wins over a function."""
    x = torch.randn(2, 4, 16, requires_grad=True)
    a, b = torch.randn(2, 16, requires_grad=True), torch.randn(8, 2, requires_grad=True)
    one = Projection(torch.randn(8, 16), None, a, b, 2.0)
    pending = [kernel_for("projection", x, one)(x, one).grad_fn]
    seen = set()
    while pending:
        node = pending.pop()
        if node is not None and node not in seen:
            seen.add(node)
            pending += [each for each, _ in node.next_functions]
    assert len(seen) > 5
    assert not any(isinstance(node, torch.autograd.function.BackwardCFunction) for node in seen)


def test_operators_of_a_mask() -> None:
    """Memory, its numbers, seen as bytes, and a comparison with a tensor, which spares it a conversion."""
    for shape in ((8, 256), (2, 3, 16), (40,)):
        with Operators() as operators:
            keep_mask(torch.empty(shape, device="cpu"), Dropped(0.05, 3))
        made = [name for name in operators.names[1:] if name != "detach"]
        assert made == ["empty", "random_", "view", "ge"]


@pytest.mark.parametrize("shape", [(1, 256), (1, 1, 256)])
def test_operators_of_one_token(shape: tuple[int, ...]) -> None:
    """Three products; of each matrix but the input one transposition; two views of what has more than one row of it."""
    one = Projection(torch.randn(64, 256), None, torch.randn(16, 256), torch.randn(64, 16), 2.0)
    x = torch.randn(shape)
    with torch.no_grad(), Operators() as operators:
        y = kernel_for("projection", x, one)(x, one)
    assert y.shape == (*shape[:-1], 64)
    assert sorted(operators.names) == sorted(["t"] * 3 + ["mm", "mm", "addmm_"] + ["view"] * (2 * (len(shape) - 2)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_of_dora_beyond_plain_lora(dtype: torch.dtype) -> None:
    """The norms: three products, five passes over few numbers, and one answer to whether terms cancel; a root and the
    gain. Its product; three in backward, and the magnitude's gradient."""
    with quiet():
        counts = count_sides(dora.build(True, whole_model=False, dtype=dtype))
    assert counts[LORICA]["kernels"] - counts[dora.PLAIN]["kernels"] <= (16 if dtype == torch.float32 else 17)
    assert counts[LORICA]["kernels"] <= counts[PEFT]["kernels"] - 4
