"""A traced tensor's pieces say, element by element, where a real tensor's values came from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lorica.merge.traced import NotFollowedError, Traced

law = settings(deadline=None, derandomize=True, max_examples=200)


#: What may be done to a list of tensors of one shape, along a dimension, with a number.
MOVES: dict[str, Callable[[list[Any], int, int], list[Any]]] = {
    "stack": lambda all_, dim, number: [torch.stack(all_, dim=dim)],
    "cat": lambda all_, dim, number: [torch.cat(all_, dim=dim)],
    "chunk": lambda all_, dim, number: [*torch.chunk(all_[0], number, dim=dim)][:1] * 2,
    "split": lambda all_, dim, number: [torch.split(all_[0], [1, all_[0].shape[dim] - 1], dim=dim)[1].contiguous()],
    "transpose": lambda all_, dim, number: [torch.transpose(one, dim0=0, dim1=dim).contiguous() for one in all_],
    "unbind": lambda all_, dim, number: [*torch.unbind(all_[0], dim=dim)],
    "narrow": lambda all_, dim, number: [one.narrow(dim, min(number, one.shape[dim] - 1), 1) for one in all_],
    "squeeze": lambda all_, dim, number: [one.squeeze(dim) for one in all_],
}


def moved(tensors: list[Any], steps: list[tuple[str, int, int]]) -> list[Any]:
    """What becomes of the tensors; a step that does not fit is left out."""
    for kind, dim, number in steps:
        ndim = tensors[0].ndim
        if 1 < ndim < 5 and -ndim <= dim < ndim and tensors[0].shape[dim] > (kind == "split"):
            tensors = MOVES[kind](tensors, dim, number)
    return tensors


steps = st.lists(st.tuples(st.sampled_from([*MOVES]), st.integers(-3, 3), st.integers(1, 3)), min_size=2, max_size=6)


@law
@example([("cat", 0, 1), ("transpose", 1, 1), ("chunk", 1, 2)], [3, 4], 3)
@given(steps, st.lists(st.integers(3, 5), min_size=2, max_size=3), st.integers(1, 4))
def test_the_pieces_of_what_was_moved_are_views_of_what_it_came_from(steps, shape, count):
    real = [torch.arange(torch.Size(shape).numel()).view(shape) + 1000 * (i + 1) for i in range(count)]
    stored = {f"t{i}": tensor for i, tensor in enumerate(real)}
    traced = moved([Traced.stored(key, tensor.shape) for key, tensor in stored.items()], steps)
    for wanted, found in zip(moved(real, steps), traced, strict=True):
        assert found.shape == wanted.shape
        built = torch.zeros_like(wanted)
        for piece in found.pieces:
            view = piece.view(stored[piece.key])
            assert view.untyped_storage().data_ptr() == stored[piece.key].untyped_storage().data_ptr()
            assert tuple(view.shape) == piece.shape
            assert not built[piece.box].any()  # no overlap
            built[piece.box] = view
        assert torch.equal(built, wanted)


@pytest.mark.parametrize(
    "what",
    [
        lambda t: t.view(-1),
        lambda t: t.reshape(4),
        lambda t: t * 2,
        lambda t: torch.flip(t, [0]),
        lambda t: t[0],
        lambda t: t.to(torch.float32),
        lambda t: torch.cat([t, Traced.stored("b", (3, 3))]),
    ],
)
def test_what_does_more_than_that_is_refused(what):
    with pytest.raises((NotFollowedError, TypeError)):
        what(Traced.stored("a", (2, 2)))
