"""Linear layers with factors, in plain tensors, and what an implementation makes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lorica.kernels import KERNELS, Dropped, Kernel, Projection

IN = 24

#: How far two implementations may lie apart, relative to the largest element. In 16 bits each rounds at other places.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}

#: A frozen weight's dtype and its factors'.
DTYPES = [
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
    (torch.float32, torch.bfloat16),
]


def implementations(op: str) -> list[Kernel]:
    """All implementations of an op but the plain one, which is the last."""
    return KERNELS[op][:-1]


def item(
    out: int = 16,
    r: int = 4,
    *,
    bias: bool = False,
    scaling: float = 2.0,
    dtype: torch.dtype = torch.float32,
    factors: torch.dtype | None = None,
    dropped: Dropped | None = None,
    seed: int = 0,
) -> Projection:
    """A layer with random factors that train."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64) / IN**0.5

    weight, shift, a, b = draw(out, IN), draw(out), draw(r, IN), draw(out, r)
    of = factors or dtype
    return Projection(
        weight.to(dtype),
        shift.to(dtype) if bias else None,
        a.to(of).requires_grad_(),
        b.to(of).requires_grad_(),
        scaling,
        dropped,
    )


def draw_x(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 9) -> Tensor:
    """An input ``[…, IN]`` that gets a gradient."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, IN, generator=generator, dtype=torch.float64)
    return x.to(dtype).requires_grad_()


def answers(
    run: Callable[..., Any], x: Tensor, items: Sequence[Projection], gradients: Sequence[Tensor | None] | None = None
) -> list[Tensor | None]:
    """Outputs, and gradients by the input and by all factors; None for those that get none.

    Args:
        run: takes the input and several layers.
        x: the input.
        items: the layers.
        gradients: of the outputs, None for one that has no part in the loss; without it, drawn.
    """
    leaves = [x, *(factor for each in items for factor in (each.a, each.b))]
    outputs = run(x, items)
    if not any(y.requires_grad for y in outputs):
        return [y.detach() for y in outputs]
    if gradients is None:
        generator = torch.Generator().manual_seed(3)
        gradients = [torch.randn(y.shape, generator=generator).to(y.dtype) for y in outputs]
    pairs = [(y, g) for y, g in zip(outputs, gradients, strict=True) if g is not None and y.requires_grad]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    found = iter(
        torch.autograd.grad([y for y, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True) if pairs else ()
    )
    return [*(y.detach() for y in outputs), *(next(found, None) if leaf.requires_grad else None for leaf in leaves)]


def assert_same(found: Sequence[Tensor | None], expected: Sequence[Tensor | None], tolerance: float) -> None:
    """The same tensors to rounding: shapes, dtypes, and values relative to the largest."""
    assert len(found) == len(expected)
    for place, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        if ours is None or theirs is None:
            # No gradient and a gradient of zeros mean the same to whoever adds them up.
            some = theirs if ours is None else ours
            assert some is None or not some.any(), place
            continue
        assert ours.shape == theirs.shape, place
        assert ours.dtype == theirs.dtype, place
        assert ours.isfinite().all(), place
        if ours.numel():
            apart = (ours.double() - theirs.double()).abs().max()
            assert apart <= tolerance * max(1.0, theirs.double().abs().max().item()), place
