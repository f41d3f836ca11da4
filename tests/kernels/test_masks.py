"""Masks of dropout that are drawn again from a seed: how many elements they drop, and that all see the same ones."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from problems import IN, answers, assert_same, draw_x, item
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lorica
from lorica.kernels import KERNELS, Dropped, draw_seed, keep_mask, plain, scale_of, using

P = [0.0, 0.05, 0.1, 0.3, 0.5, 0.75, 0.9, 0.99, 0.997, 0.999, 1.0]


def assert_share(kept: Tensor, p: float) -> None:
    """The share of dropped elements lies within five standard deviations of a binomial's mean."""
    n = kept.numel()
    assert (~kept).sum().item() == pytest.approx(p * n, abs=5 * math.sqrt(p * (1 - p) * n) + 1e-9)


@pytest.mark.parametrize("p", P)
@pytest.mark.parametrize("shape", [(2000, 8), (20000, 1), (100, 1000), (50, 10, 33)], ids=str)
def test_the_share_that_is_dropped(p: float, shape: tuple[int, ...]) -> None:
    # What a byte cannot say is decided for a mask: it drops whole 256ths, the one below p or the one above.
    masks = 64
    kept = torch.stack([keep_mask(torch.empty(shape), Dropped(p, draw_seed())).flatten() for _ in range(masks)])
    for mask in kept:
        slack = 5 * math.sqrt(0.25 / mask.numel())
        assert (~mask).float().mean().item() == pytest.approx(p, abs=1 / 256 + slack)
    n = kept.numel()
    slack = 5 * math.sqrt(p * (1 - p) / n + (1 / 512) ** 2 / masks)
    assert (~kept).float().mean().item() == pytest.approx(p, abs=slack + 1e-9)


@pytest.mark.parametrize("p", P)
def test_each_element_is_dropped_as_often(p: float) -> None:
    kept = torch.stack([keep_mask(torch.empty(4, 16), Dropped(p, seed)) for seed in range(4000)])
    for place in range(4):
        for column in range(16):
            assert_share(kept[:, place, column], p)


def test_neighbours_are_dropped_independently() -> None:
    kept = keep_mask(torch.empty(4000, 32), Dropped(0.3, 1))
    p = (~kept).float().mean().item()
    for both in (kept[:, 1:] & kept[:, :-1], kept[1:] & kept[:-1], kept[:, ::2] & kept[:, 1::2]):
        n, q = both.numel(), (1 - p) ** 2
        assert both.sum().item() == pytest.approx(q * n, abs=8 * math.sqrt(q * (1 - q) * n))


@pytest.mark.parametrize("p", [0.05, 0.3, 0.5, 0.999])
def test_masks_of_neighbouring_seeds_have_nothing_in_common(p: float) -> None:
    x = torch.empty(500, 64)
    first, second = (keep_mask(x, Dropped(p, seed)) for seed in (7, 8))
    n, q = first.numel(), (first.float().mean() * second.float().mean()).item()
    assert (first & second).sum().item() == pytest.approx(q * n, abs=8 * math.sqrt(q * (1 - q) * n) + 3)


def test_the_extremes() -> None:
    x = torch.empty(50, 70)
    assert keep_mask(x, Dropped(0.0, 3)).all()
    assert not keep_mask(x, Dropped(1.0, 3)).any()
    assert scale_of(1.0) == 0.0
    assert scale_of(0.5) == 2.0


@pytest.mark.parametrize("shape", [(), (3,), (0, 4), (2, 0), (5, 7), (2, 3, 5)], ids=str)
def test_a_mask_has_the_shape_of_the_input(shape: tuple[int, ...]) -> None:
    assert keep_mask(torch.empty(shape), Dropped(0.3, 1)).shape == shape


def test_a_mask_depends_on_seed_shape_and_p_alone() -> None:
    dropped = Dropped(0.3, 42)
    first = keep_mask(torch.zeros(6, 10), dropped)
    torch.manual_seed(99)
    assert torch.equal(first, keep_mask(torch.ones(6, 10, dtype=torch.bfloat16), dropped))
    assert torch.equal(first, keep_mask(torch.randn(10, 6).t(), dropped))
    assert torch.equal(first.view(2, 3, 10), keep_mask(torch.zeros(2, 3, 10), dropped))


def test_drawing_a_mask_leaves_the_default_generator_alone() -> None:
    before = torch.get_rng_state()
    keep_mask(torch.zeros(6, 10), Dropped(0.3, 42))
    assert torch.equal(before, torch.get_rng_state())
    assert draw_seed() >= 0
    assert not torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("p", [0.0, 0.05, 0.3, 0.999, 1.0])
@pytest.mark.parametrize("name", ["function", "plain"])
def test_backward_sees_the_mask_of_forward(name: str, p: float) -> None:
    """With B the identity and W zero the delta is ``drop(x) Aᵀ``, so that the Jacobian by x is A times the mask."""
    x = torch.randn(5, IN, dtype=torch.float64, requires_grad=True)
    mask = keep_mask(x, Dropped(p, 17)).double() * scale_of(p)
    one = item(3, 3, dtype=torch.float64, scaling=1.0, dropped=Dropped(p, 17))
    one = one._replace(weight=torch.zeros(3, IN, dtype=torch.float64), b=torch.eye(3, dtype=torch.float64))
    run = next(kernel.run for kernel in KERNELS["projection"] if kernel.name == name and kernel.fits(x, one))
    y = run(x, one)
    assert torch.allclose(y, (x * mask) @ one.a.t(), atol=1e-12)
    g = torch.randn_like(y)
    dx, da = torch.autograd.grad(y, [x, one.a], g)
    assert torch.allclose(dx, (g @ one.a) * mask, atol=1e-12)
    assert torch.allclose(da, g.t() @ (x * mask), atol=1e-12)


# ---- whole layers


def adapted(p: float, *, copies: int = 1) -> nn.Module:
    """A model whose layers all see the same input; random factors."""
    base = nn.ModuleDict({f"proj{place}": nn.Linear(IN, 16, bias=False) for place in range(copies)})
    for each in base.values():
        nn.init.zeros_(each.weight)
    config = lorica.LoraConfig(r=4, target_modules=list(base), lora_dropout=p, init_lora_weights=False)
    return lorica.get_peft_model(base, config).base_model.model.train()


def layer(p: float) -> nn.Module:
    return adapted(p)["proj0"]


def test_torchs_seed_governs_a_layer() -> None:
    one, x = layer(0.3), torch.randn(8, IN)
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(one(x))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])
    assert not torch.equal(one(x), one(x))


@pytest.mark.parametrize("gradients", [False, True])
def test_layers_that_share_an_input_share_its_mask(gradients: bool) -> None:
    model, x = adapted(0.5, copies=3), torch.randn(64, IN)
    with torch.no_grad():
        for each in list(model.values())[1:]:
            for name in ("lora_A", "lora_B"):
                getattr(each, name)["default"].weight.copy_(getattr(model["proj0"], name)["default"].weight)
    with torch.set_grad_enabled(gradients):
        for _ in range(3):
            outs = [each(x) for each in model.values()]
            assert torch.allclose(outs[0], outs[1])
            assert torch.allclose(outs[1], outs[2])
            again = [each(x) for each in model.values()]
            assert not torch.allclose(outs[0], again[0]), "the next forward has a mask of its own"
            other = model["proj1"](x.clone())
            assert not torch.allclose(outs[1], other), "another input has a mask of its own"


@pytest.mark.parametrize("p", [0.0, 0.05, 0.3, 0.999, 1.0])
def test_the_mean_over_masks_is_what_the_general_way_gives(p: float) -> None:
    model, x = layer(p), torch.randn(4, IN)
    with torch.no_grad(), using("plain"):
        expected = model.eval()(x)
    model.train()
    with torch.no_grad():
        draws = torch.stack([model(x) for _ in range(3000)])
    if p == 1.0:
        assert not draws.any()
        return
    few = 4 * expected.abs().max() if p == 0.999 else 1e-5  # at most three in a thousand draws let anything through
    assert ((draws.mean(0) - expected).abs() <= 5 * draws.std(0) / 3000**0.5 + few).all()


WAYS = {
    "none": lambda run, x: run(x),
    "reentrant": partial(checkpoint, use_reentrant=True),
    "non-reentrant": partial(checkpoint, use_reentrant=False),
}


def one_step(model: nn.Module, way: str) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The loss of all layers, in whatever way they are checkpointed; the leaves that it is linear in; and the sum of
    its gradients times each of them, which must be the loss again."""

    def run(x: Tensor) -> Tensor:
        return sum(each(x) for each in model.values())

    x = torch.randn(6, IN, generator=torch.Generator().manual_seed(1)).requires_grad_()
    factors = {"A": [], "B": []}
    for name, each in model.named_parameters():
        if each.requires_grad:
            factors["A" if "lora_A" in name else "B"].append(each)
    torch.manual_seed(5)
    y = WAYS[way](run, x)
    loss = (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum()
    torch.manual_seed(77)  # whatever happens between forward and backward
    loss.backward()
    sums = [sum((each * each.grad).sum() for each in group) for group in ([x], *factors.values())]
    for each in (x, *factors["A"], *factors["B"]):
        each.grad = None
    return y.detach(), loss.detach(), sums


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("p", [0.05, 0.3, 0.9])
@pytest.mark.parametrize("copies", [1, 3])
def test_backward_sees_the_mask_of_forward_whatever_is_checkpointed(copies: int, p: float, way: str) -> None:
    """With W zero the loss is linear in x, in the A's and in the B's, so that each gradient times its tensor is it."""
    model = adapted(p, copies=copies)
    for _ in range(3):
        _, loss, sums = one_step(model, way)
        for found in sums:
            assert found.item() == pytest.approx(loss.item(), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("way", ["reentrant", "non-reentrant"])
@pytest.mark.parametrize("copies", [1, 3])
def test_checkpointing_changes_no_mask(copies: int, way: str) -> None:
    model = adapted(0.3, copies=copies)
    assert torch.equal(one_step(model, "none")[0], one_step(model, way)[0])


@pytest.mark.parametrize("copies", [1, 3])
def test_the_seed_governs_every_step_alike(copies: int) -> None:
    model = adapted(0.3, copies=copies)
    first, second, third = (one_step(model, "none")[0] for _ in range(3))
    assert torch.equal(first, second)
    assert torch.equal(second, third)


def test_the_plain_way_draws_by_torchs_own_dropout() -> None:
    model = layer(0.3)
    x = torch.randn(6, IN)
    torch.manual_seed(5)
    expected = nn.functional.dropout(x, 0.3)
    torch.manual_seed(5)
    with using("plain"):
        y = model(x)
    a, b = (getattr(model, name)["default"].weight for name in ("lora_A", "lora_B"))
    assert torch.allclose(y, model.scaling["default"] * (expected @ a.t()) @ b.t(), atol=1e-5)


def test_a_group_and_its_layers_alone_see_the_same_masks() -> None:
    items = [item(8, 3, dropped=Dropped(0.5, seed), seed=seed) for seed in (1, 2, 3)]
    x = draw_x(4, 5)
    together = next(kernel for kernel in KERNELS["projections"] if kernel.fits(x, items))
    alone = answers(lambda x, items: [plain.projection(x, each) for each in items], x, items)
    assert_same(answers(together.run, x, items), alone, 1e-5)
