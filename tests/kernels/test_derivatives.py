"""Derivatives of any order, transformations of functions, tracers, autocast, and what is kept for backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import IN, TOLERANCE, answers, assert_same, draw_x, implementations, item
from torch import Tensor, nn
from torch.autograd import forward_ad

import lorica
from lorica.kernels import KERNELS, Dropped, Kernel, Projection, function, kernel_for, plain, together, using

FUNCTIONS = [kernel for kernel in implementations("projection") if kernel.name == "function"]
DROPS = [None, Dropped(0.4, 5)]
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")


def named(value: Any) -> str:
    return "dropping" if isinstance(value, Dropped) else "kept" if value is None else str(value)


def function_for(x: Tensor, one: Projection) -> Any:
    return next(kernel.run for kernel in FUNCTIONS if kernel.fits(x, one))


def small(dropped: Dropped | None, *, bias: bool = True, seed: int = 0) -> Projection:
    return item(5, 2, bias=bias, scaling=-1.5, dtype=torch.float64, dropped=dropped, seed=seed)


@pytest.mark.parametrize("dropped", DROPS, ids=named)
@pytest.mark.parametrize("shape", [(3,), (2, 2)], ids=str)
def test_derivatives_of_one_layer(shape: tuple[int, ...], dropped: Dropped | None) -> None:
    one, x = small(dropped), draw_x(*shape, dtype=torch.float64)
    run = function_for(x, one)

    def of(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        y: Tensor = run(x, one._replace(a=a, b=b))
        return y

    assert torch.autograd.gradcheck(of, (x, one.a, one.b))
    assert torch.autograd.gradgradcheck(of, (x, one.a, one.b))


@pytest.mark.parametrize("dropped", DROPS, ids=named)
def test_derivatives_of_a_group(dropped: Dropped | None) -> None:
    items = [small(dropped, seed=1), small(dropped, bias=False, seed=2)]
    x = draw_x(3, dtype=torch.float64)
    kernel = next(each for each in KERNELS["projections"] if each.fits(x, items))
    assert kernel.name == "function"

    def of(x: Tensor, *factors: Tensor) -> Any:
        return tuple(kernel.run(x, [items[i]._replace(a=factors[2 * i], b=factors[2 * i + 1]) for i in range(2)]))

    factors = [factor for each in items for factor in (each.a, each.b)]
    assert torch.autograd.gradcheck(of, (x, *factors))
    assert torch.autograd.gradgradcheck(of, (x, *factors))


@pytest.mark.parametrize("dropped", DROPS, ids=named)
def test_a_penalty_on_gradients(dropped: Dropped | None) -> None:
    one, found = small(dropped), []
    for run in (plain.projection, None):
        x = draw_x(4, dtype=torch.float64)
        run = run or function_for(x, one)
        (dx,) = torch.autograd.grad(run(x, one).square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(dx.square().sum(), [x, one.a, one.b]))
    assert_same(found[1], found[0], 1e-10)


def test_a_second_derivative_of_what_was_not_kept_says_so() -> None:
    one = small(None)
    one.a.requires_grad_(False)
    x = draw_x(3, dtype=torch.float64)
    y = function_for(x, one)(x, one)
    with pytest.raises(RuntimeError, match="using\\('plain'\\)"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


# ---- transformations of functions, which take the plain way


@pytest.fixture(params=["kernel", "layer"])
def call(request: pytest.FixtureRequest) -> Any:
    """A layer as a function of its input and factors: through the registry, or as a module."""
    torch.manual_seed(0)
    base = nn.ModuleDict({"proj": nn.Linear(IN, 5).double()})
    config = lorica.LoraConfig(r=2, target_modules=["proj"], init_lora_weights=False)
    layer = lorica.get_peft_model(base, config).base_model.model["proj"]
    names = {"a": "lora_A.default.weight", "b": "lora_B.default.weight"}
    first, second = (layer.get_parameter(name).data.double() for name in names.values())
    one = Projection(layer.base_layer.weight, layer.base_layer.bias, first, second, layer.scaling["default"])

    def through_registry(x: Tensor, a: Tensor = first, b: Tensor = second) -> Tensor:
        each = one._replace(a=a, b=b)
        y: Tensor = kernel_for("projection", x, each)(x, each)
        return y

    def through_layer(x: Tensor, a: Tensor = first, b: Tensor = second) -> Tensor:
        y: Tensor = torch.func.functional_call(layer, {names["a"]: a, names["b"]: b}, (x,))
        return y

    def oracle(x: Tensor, a: Tensor = first, b: Tensor = second) -> Tensor:
        return plain.projection(x, one._replace(a=a, b=b))

    run: Any = through_registry if request.param == "kernel" else through_layer
    return run, oracle, first, second


@pytest.mark.parametrize("recorded", [True, False])
def test_vmap_over_inputs(call: Any, recorded: bool) -> None:
    run, oracle, _, _ = call
    x = torch.randn(3, 4, IN, dtype=torch.float64)
    with torch.set_grad_enabled(recorded):
        assert torch.allclose(torch.func.vmap(run)(x), oracle(x), atol=1e-12)


@pytest.mark.parametrize("recorded", [True, False])
def test_vmap_over_factors(call: Any, recorded: bool) -> None:
    run, oracle, a, b = call
    x, stack = torch.randn(4, IN, dtype=torch.float64), torch.randn(3, *a.shape, dtype=torch.float64)
    with torch.set_grad_enabled(recorded):
        found = torch.func.vmap(run, in_dims=(None, 0))(x, stack)
    assert torch.allclose(found, torch.stack([oracle(x, each) for each in stack]), atol=1e-12)
    with torch.set_grad_enabled(recorded):
        found = torch.func.vmap(lambda b: run(x, a, b))(torch.stack([b, -b]))
    assert torch.allclose(found, torch.stack([oracle(x, a, b), oracle(x, a, -b)]), atol=1e-12)


@pytest.mark.parametrize("recorded", [True, False])
def test_jvp(call: Any, recorded: bool) -> None:
    run, oracle, a, b = call
    x = torch.randn(4, IN, dtype=torch.float64)
    values, along = (x, a, b), tuple(torch.randn_like(each) for each in (x, a, b))
    with torch.set_grad_enabled(recorded):
        found = torch.func.jvp(run, values, along)
    for ours, theirs in zip(found, torch.func.jvp(oracle, values, along), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-12)
    with torch.set_grad_enabled(recorded):
        found = torch.func.jvp(lambda b: run(x, a, b), (b,), (along[2],))
    assert torch.allclose(found[1], torch.func.jvp(lambda b: oracle(x, a, b), (b,), (along[2],))[1], atol=1e-12)


@pytest.mark.parametrize("recorded", [True, False])
def test_forward_mode(call: Any, recorded: bool) -> None:
    run, oracle, a, b = call
    x, along = torch.randn(4, IN, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    with torch.set_grad_enabled(recorded), forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(run(x, a, forward_ad.make_dual(b, along))).tangent
    assert torch.allclose(tangent, torch.func.jvp(lambda b: oracle(x, a, b), (b,), (along,))[1], atol=1e-12)


def test_functional_gradients(call: Any) -> None:
    run, oracle, a, b = call
    x = torch.randn(4, IN, dtype=torch.float64)
    ours, theirs = (
        torch.func.grad(lambda *args, of=of: of(*args).square().sum(), argnums=(0, 1, 2))(x, a, b)
        for of in (run, oracle)
    )
    assert_same(ours, theirs, 1e-12)
    each = torch.func.vmap(torch.func.grad(lambda x: run(x).square().sum()))(x)
    assert torch.allclose(each, torch.func.grad(lambda x: oracle(x).square().sum())(x), atol=1e-12)


def test_hessians(call: Any) -> None:
    run, oracle, a, b = call
    x = torch.randn(2, IN, dtype=torch.float64)
    ours, theirs = (torch.func.hessian(lambda b, of=of: of(x, a, b).square().sum())(b) for of in (run, oracle))
    assert torch.allclose(ours, theirs, atol=1e-12)


@pytest.mark.parametrize("recorded", [True, False])
def test_a_traced_kernel(recorded: bool) -> None:
    one, x = item(bias=True), draw_x(3).detach()
    one = one._replace(a=one.a.detach(), b=one.b.detach())
    with torch.set_grad_enabled(recorded):
        traced = torch.jit.trace(lambda x: kernel_for("projection", x, one)(x, one), x)
    other = draw_x(7, seed=2).detach()
    assert torch.allclose(traced(other), plain.projection(other, one), atol=1e-5)


@pytest.mark.parametrize("recorded", [True, False])
def test_a_traced_layer(cast_layer: nn.Module, recorded: bool) -> None:
    with torch.set_grad_enabled(recorded):
        traced = torch.jit.trace(cast_layer, torch.randn(3, IN))
    other = torch.randn(7, IN)
    assert torch.allclose(traced(other), cast_layer(other), atol=1e-5)


# ---- dropout under transformations: torch's own, which knows them


def dropping_layer() -> nn.Module:
    base = nn.ModuleDict({"proj": nn.Linear(IN, 5)})
    nn.init.zeros_(base["proj"].weight)
    config = lorica.LoraConfig(r=2, target_modules=["proj"], lora_dropout=0.5, init_lora_weights=False)
    return lorica.get_peft_model(base, config).base_model.model["proj"].train()


@pytest.mark.parametrize("recorded", [True, False])
def test_vmap_decides_on_randomness(recorded: bool) -> None:
    layer, x = dropping_layer(), torch.randn(IN).expand(8, 4, IN)
    with torch.set_grad_enabled(recorded):
        different = torch.func.vmap(layer, randomness="different")(x)
        same = torch.func.vmap(layer, randomness="same")(x)
        assert not torch.allclose(different[0], different[1])
        assert torch.allclose(same[0], same[1])
        with pytest.raises(RuntimeError, match="randomness"):
            torch.func.vmap(layer)(x)


@pytest.mark.filterwarnings("ignore:Trace had nondeterministic nodes")
@pytest.mark.parametrize("recorded", [True, False])
def test_a_traced_layer_draws_anew(recorded: bool) -> None:
    layer, x = dropping_layer(), torch.randn(6, IN)
    with torch.set_grad_enabled(recorded):
        traced = torch.jit.trace(layer, x, check_trace=False)
        assert not torch.allclose(traced(x), traced(x))
    assert traced(torch.randn(9, IN)).shape == (9, 5)


# ---- autocast


@pytest.fixture
def cast_layer() -> nn.Module:
    base = nn.ModuleDict({"proj": nn.Linear(IN, 40)})
    config = lorica.LoraConfig(r=4, target_modules=["proj"], init_lora_weights=False)
    return lorica.get_peft_model(base, config).base_model.model["proj"]


def cast_step(layer: nn.Module, x: Tensor, *, inside: bool) -> list[Tensor]:
    leaves = [x, *(each for each in layer.parameters() if each.requires_grad)]
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        if inside:
            return [y.detach(), *torch.autograd.grad(y.float().square().sum(), leaves)]
    return [y.detach(), *torch.autograd.grad(y.float().square().sum(), leaves)]


@pytest.mark.parametrize("inside", [False, True], ids=["backward outside", "backward inside"])
@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factors", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_autocast_is_the_general_way(
    cast_layer: nn.Module,
    x_dtype: torch.dtype,
    factors: torch.dtype,
    bias_dtype: torch.dtype,
    base_dtype: torch.dtype,
    inside: bool,
) -> None:
    layer = cast_layer.to(factors)
    layer.base_layer.weight.data = layer.base_layer.weight.data.to(base_dtype)
    layer.base_layer.bias.data = layer.base_layer.bias.data.to(bias_dtype)
    x = torch.randn(3, 5, IN).to(x_dtype).requires_grad_()
    found = cast_step(layer, x, inside=inside)
    with using("plain"):
        expected = cast_step(layer, x, inside=inside)
    assert_same(found, expected, TOLERANCE[torch.bfloat16])
    assert found[0].dtype == torch.bfloat16


@pytest.mark.parametrize("dropped", DROPS, ids=named)
def test_a_group_under_an_autocast_that_forward_did_not_see(dropped: Dropped | None) -> None:
    items, x = [item(dropped=dropped, seed=seed) for seed in (1, 2)], draw_x(4)
    run = next(kernel.run for kernel in KERNELS["projections"] if kernel.fits(x, items))
    leaves = [x, *(factor for each in items for factor in (each.a, each.b))]
    expected = torch.autograd.grad(sum(y.square().sum() for y in plain.projections(x, items)), leaves)
    total = sum(y.square().sum() for y in run(x, items))
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(torch.autograd.grad(total, leaves), expected, TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dropped", DROPS, ids=named)
def test_backward_under_an_autocast_that_forward_did_not_see(dropped: Dropped | None, dtype: torch.dtype) -> None:
    one, x = item(dtype=dtype, bias=True, dropped=dropped), draw_x(4, dtype=dtype)
    leaves = [x, one.a, one.b]
    total = plain.projection(x, one).square().sum()
    expected = torch.autograd.grad(total, leaves)
    total = function_for(x, one)(x, one).square().sum()
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(total, leaves)
    assert_same(found, expected, TOLERANCE[torch.bfloat16])


def test_autocast_leaves_double_precision_alone(cast_layer: nn.Module) -> None:
    layer, x = cast_layer.double(), torch.randn(4, IN, dtype=torch.float64)
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), expected)


# ---- what is kept


def kept(run: Any) -> list[Tensor]:
    found: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: found.append(t) or t, lambda t: t):
        run()
    return found


def activations(run: Any, tensors: list[Tensor | None]) -> dict[str, int]:
    """Bytes kept besides the tensors of the layer, by shape."""
    own = {each.untyped_storage().data_ptr() for each in tensors if each is not None}
    others = {each.data_ptr(): each for each in kept(run) if each.untyped_storage().data_ptr() not in own}
    return {str(tuple(each.shape)): each.untyped_storage().nbytes() for each in others.values()}


@pytest.mark.parametrize("dropped", DROPS, ids=named)
@pytest.mark.parametrize(("dtype", "factors"), [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)])
def test_kept_are_x_and_h(dtype: torch.dtype, factors: torch.dtype, dropped: Dropped | None) -> None:
    one, x = item(40, 3, bias=True, dtype=dtype, factors=factors, dropped=dropped), draw_x(50, dtype=dtype)
    width = dtype.itemsize
    run = function_for(x, one)
    assert activations(lambda: run(x, one), [*one[:4]]) == {
        f"(50, {IN})": 50 * IN * width,
        "(50, 3)": 50 * 3 * width,
    }


@pytest.mark.parametrize("dropped", DROPS, ids=named)
def test_nothing_is_kept_for_a_factor_that_does_not_train(dropped: Dropped | None) -> None:
    one, x = item(40, 3, dropped=dropped), draw_x(50)
    run = function_for(x, one)
    one.a.requires_grad_(False)
    assert list(activations(lambda: run(x, one), [*one[:4]])) == ["(50, 3)"]
    one.a.requires_grad_(True)
    one.b.requires_grad_(False)
    assert list(activations(lambda: run(x, one), [*one[:4]])) == [f"(50, {IN})"]


@pytest.mark.parametrize("dropped", DROPS, ids=named)
def test_a_group_keeps_its_input_once(dropped: Dropped | None) -> None:
    items = [item(out, r, dropped=dropped, seed=out) for out, r in ((16, 4), (8, 2), (40, 7))]
    x = draw_x(50)
    run = next(kernel.run for kernel in KERNELS["projections"] if kernel.fits(x, items))
    own = [tensor for each in items for tensor in each[:4]]
    total = sum(activations(lambda: run(x, items), own).values())
    assert total == (50 * IN + 50 * (4 + 2 + 7)) * 4


def test_autocast_keeps_nothing_of_the_weights_size(cast_layer: nn.Module) -> None:
    layer, x = cast_layer, torch.randn(50, IN, requires_grad=True)

    def run() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y: Tensor = layer(x)
            return y

    found = activations(run, list(layer.parameters()))
    assert sum(found.values()) <= 50 * (IN + 4) * 2
    assert not any("40" in shape for shape in found)


def test_without_a_graph_nothing_is_kept(cast_layer: nn.Module) -> None:
    x = torch.randn(50, IN)
    with torch.no_grad():
        assert not kept(lambda: cast_layer(x))
    one = item()
    with torch.inference_mode():
        assert not cast_layer(x).requires_grad
        kernel: Kernel = next(each for each in KERNELS["projection"] if each.fits(x, one))
    assert kernel.name == "inference"


def test_inputs_made_in_inference_mode() -> None:
    one = item()
    with torch.inference_mode():
        x = torch.randn(4, IN)
        expected = plain.projection(x, one)
    with torch.no_grad():
        assert torch.allclose(kernel_for("projection", x, one)(x, one), expected, atol=1e-5)


def test_answers_of_the_oracle_are_those_of_the_formula() -> None:
    one, x = item(bias=True, dtype=torch.float64), draw_x(6, dtype=torch.float64)
    y, dx, da, db = answers(plain.projections, x, [one], [torch.ones(6, 16, dtype=torch.float64)])
    ones = torch.ones(6, 16, dtype=torch.float64)
    delta = one.scaling * one.b @ one.a
    assert_same(
        [y, dx, da, db],
        [
            (x @ (one.weight + delta).t() + one.bias).detach(),
            (ones @ (one.weight + delta)).detach(),
            (one.scaling * (ones @ one.b).t() @ x).detach(),
            (one.scaling * ones.t() @ (x @ one.a.t())).detach(),
        ],
        1e-12,
    )


@pytest.mark.parametrize("used", ["alone", "in a group"])
def test_a_layer_that_runs_twice_has_the_right_second_derivatives(used: str) -> None:
    """Its second input was made from its own factors."""
    torch.manual_seed(0)
    a, b = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 4), (4, 2)))
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 4, dtype=torch.float64)

    def twice(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        one = Projection(weight, None, a, b, 0.7)
        if used == "alone":
            return function.projection(function.projection(x, one), one)
        return sum(together.projections(together.projections(x, (one, one))[0], (one, one)))

    assert torch.autograd.gradcheck(twice, (x, a, b))
    assert torch.autograd.gradgradcheck(twice, (x, a, b))
    once = torch.autograd.grad(twice(x, a, b).square().sum(), (x, a, b))
    again = torch.autograd.grad(twice(x, a, b).square().sum(), (x, a, b), create_graph=True)
    for first, second in zip(once, again, strict=True):
        torch.testing.assert_close(first, second.detach())
