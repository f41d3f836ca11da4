"""Layers with small inputs record torch's own operators; all else is as with large ones."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from problems import IN, TOLERANCE, answers, assert_same, draw_x, item
from test_sharing import adapted, attention, inputs, nodes, run
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lorica.kernels import Dropped, kernel_for, plain, recorded, together, using
from lorica.kernels.dropout import keep_mask

SMALL = 2**13


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorded, "ELEMENTS", SMALL)


def test_size_and_device_decide() -> None:
    one = item()
    below, above = torch.randn(SMALL // IN, IN), torch.randn(SMALL // IN + 1, IN)
    assert kernel_for("projection", below, one) is recorded.projection
    assert kernel_for("projections", below, [one]) is recorded.projections
    assert kernel_for("projection", above, one) is not recorded.projection
    assert kernel_for("projections", above, [one]) is together.projections
    assert not recorded.fits(below.to("meta"), one)
    with torch.no_grad():
        assert kernel_for("projection", below, one) is not recorded.projection
    with using("plain"):
        assert kernel_for("projection", below, one) is plain.projection


def test_transformations_take_the_plain_form() -> None:
    one = item()
    found = torch.func.vmap(lambda x: kernel_for("projection", x, one)(x, one))(torch.randn(3, 2, IN))
    assert found.shape == (3, 2, 16)


@pytest.mark.parametrize("dropped", [None, Dropped(0.4, 5)], ids=["kept", "dropping"])
def test_derivatives(dropped: Dropped | None) -> None:
    one = item(5, 2, bias=True, dtype=torch.float64, dropped=dropped)
    x = draw_x(3, dtype=torch.float64)

    def run(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return recorded.projection(x, one._replace(a=a, b=b))

    assert torch.autograd.gradcheck(run, (x, one.a, one.b))
    assert torch.autograd.gradgradcheck(run, (x, one.a, one.b))


def test_a_group_has_one_mask_and_each_layer_its_own_where_they_differ() -> None:
    x = draw_x(6)
    drops = [Dropped(0.4, 5), Dropped(0.4, 6), Dropped(0.4, 5), None]
    items = [item(8, 2, dropped=drop, seed=seed) for seed, drop in enumerate(drops)]
    assert_same(answers(recorded.projections, x, items), answers(plain.projections, x, items), TOLERANCE[x.dtype])


def test_masks_are_those_of_large_inputs() -> None:
    """So a checkpoint that runs a part of a batch, or another release's bound, changes no draw."""
    dropped, x = Dropped(0.5, 11), torch.randn(7, IN)
    ones = torch.ones(7, IN, requires_grad=True)
    one = item(3, IN, dropped=dropped)
    one.a.data.copy_(torch.eye(IN))
    one.weight.zero_()
    y = recorded.projection(ones, one)
    expected = 2 * 2.0 * keep_mask(x, dropped).float() @ one.b.t()
    assert torch.allclose(y, expected, atol=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_layers_that_share_an_input(dropout: float) -> None:
    """They are the function's to rounding, masks included, and each has nodes of its own."""
    model = adapted(dropout)
    found = run(model)
    with using("function"):
        expected = run(model)
    assert_same(found, expected, TOLERANCE[torch.float32])
    made = nodes(model)
    assert len({made[name] for name in made}) == len(made)
    assert len(attention(model).q_proj.family.members) == 3


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("cross", [False, True])
def test_the_forward_that_finds_out_gives_the_same_digits(dropout: float, cross: bool) -> None:
    model = adapted(dropout)
    memory = inputs(2)
    call = (lambda x: model.base_model.model[1](model.base_model.model[0](x, memory))) if cross else None
    first, later = run(model, call), run(model, call)
    assert all(torch.equal(one, other) for one, other in zip(first, later, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing_changes_no_mask(reentrant: bool, dropout: float) -> None:
    model = adapted(dropout)
    blocks = model.base_model.model

    def call(x: Tensor) -> Tensor:
        for block in blocks:
            x = checkpoint(block, x, use_reentrant=reentrant)
        return x

    assert_same(run(model, call), run(model), TOLERANCE[torch.float32])


@pytest.mark.parametrize("scaling", [1.0, 2.0, 0.25, 1.7, -0.5, 0.0])
def test_an_evaluation_gives_the_digits_of_a_training_forward(scaling: float) -> None:
    one, x = item(40, 8, bias=True, scaling=scaling), torch.randn(9, IN)
    y = recorded.projection(x, one)
    with torch.no_grad():
        assert torch.equal(kernel_for("projection", x, one)(x, one), y)
    assert torch.equal(recorded.projections(x, [one])[0], y)


def test_whoever_gets_the_output_may_write_over_it() -> None:
    one, x = item(bias=True), draw_x(2, 5)
    expected = answers(lambda x, items: [plain.projection(x, each).relu() for each in items], x, [one])
    found = answers(lambda x, items: [recorded.projection(x, each).relu_() for each in items], x, [one])
    assert_same(found, expected, TOLERANCE[x.dtype])


def test_threads_draw_each_its_own_masks() -> None:
    """Each thread has a generator of its own, seeded anew for each mask."""
    x = torch.empty(64, 256)
    expected = [keep_mask(x, Dropped(0.3, seed)) for seed in range(8)]
    found: list[list[Any]] = [[] for _ in range(4)]

    def draw(made: list[Any]) -> None:
        made.extend([keep_mask(x, Dropped(0.3, seed)) for seed in range(8)] for _ in range(20))

    threads = [threading.Thread(target=draw, args=(made,)) for made in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for made in found:
        assert len(made) == 20
        assert all(torch.equal(ours, theirs) for masks in made for ours, theirs in zip(masks, expected, strict=True))
