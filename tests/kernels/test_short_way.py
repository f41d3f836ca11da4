"""The short way through a linear layer is taken where nothing comes in between, and left as soon as something does."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from problems import IN, assert_same
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.nn.modules import module as torch_modules
from torch.nn.utils import parametrize, prune

import lorica
from lorica.kernels import using
from lorica.layers import lean
from lorica.ops.linear import TransposedLinear

OUT = 12


class Doubled(nn.Linear):
    """A linear layer with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Named(nn.Linear):
    """A linear layer in all but its name."""


def model_of(base: nn.Module | None = None, **fields: Any) -> nn.Module:
    """A model of one adapted layer, with random factors."""
    torch.manual_seed(0)
    fields = {"r": 4, "lora_alpha": 8, "init_lora_weights": False} | fields
    net = nn.ModuleDict({"proj": base or nn.Linear(IN, OUT)})
    return lorica.get_peft_model(net, lorica.LoraConfig(target_modules=["proj"], **fields))


def layer_of(model: nn.Module) -> Any:
    return model.base_model.model["proj"]


@pytest.fixture
def model() -> nn.Module:
    return model_of()


@pytest.fixture
def layer(model: nn.Module) -> Any:
    return layer_of(model)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, IN, generator=torch.Generator().manual_seed(7))


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> Callable[..., bool]:
    """Tell whether a call takes the short way."""
    taken: list[str] = []
    find = lean.kernel_for
    monkeypatch.setattr(lean, "kernel_for", lambda op, *args: taken.append(op) or find(op, *args))

    def ask(layer: Any, *args: Any, **kwargs: Any) -> bool:
        taken.clear()
        layer(*args, **kwargs)
        return bool(taken)

    return ask


def formula(layer: Any, x: Tensor, names: tuple[str, ...] = ("default",)) -> Tensor:
    """The output by the formula, from what the layer holds at this moment."""
    base = layer.base_layer
    y = x @ base.weight.t() + (0 if base.bias is None else base.bias)
    for name in names:
        y = y + layer.scaling[name] * (x @ layer.lora_A[name].weight.t()) @ layer.lora_B[name].weight.t()
    return y.detach()


def assert_formula(layer: Any, x: Tensor, *names: str) -> None:
    assert torch.allclose(layer(x), formula(layer, x, names or ("default",)), atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_it_is_taken(short: Callable[..., bool], x: Tensor, training: bool, recorded: bool, bias: bool) -> None:
    layer = layer_of(model_of(nn.Linear(IN, OUT, bias=bias))).train(training)
    with torch.set_grad_enabled(recorded):
        assert short(layer, x)
        assert short(layer, x.view(1, 5, IN))
        assert_formula(layer, x)


def test_it_is_taken_by_a_subclass_without_a_forward_of_its_own(short: Callable[..., bool], x: Tensor) -> None:
    assert short(layer_of(model_of(Named(IN, OUT))), x)


# ---- hooks


def seen(result: Any) -> Callable[..., Any]:
    """A hook that returns what is made of its last argument, and notes that it was called."""

    def hook(*args: Any) -> Any:
        hook.calls += 1
        return result(*args)

    hook.calls = 0
    return hook


HOOKS = {
    "forward_pre_hook": lambda module, args: (args[0] + 1,),
    "forward_hook": lambda module, args, output: output + 1,
    "full_backward_hook": lambda module, ins, outs: (ins[0] + 1,),
    "full_backward_pre_hook": lambda module, outs: (outs[0] + 1,),
}


def answers(layer: Any, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = layer(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *layer.lora_A.parameters()])]


@pytest.mark.parametrize("kind", HOOKS)
def test_a_hook_on_the_base_layer(short: Callable[..., bool], layer: Any, x: Tensor, kind: str) -> None:
    hook, before = seen(HOOKS[kind]), answers(layer, x)
    handle = getattr(layer.base_layer, f"register_{kind}")(hook)
    assert not short(layer, x.clone().requires_grad_())
    with using("plain"):
        expected = answers(layer, x)
    hook.calls = 0
    found = answers(layer, x)
    assert hook.calls == 1
    assert_same(found, expected, 1e-6)
    assert any(not torch.allclose(ours, theirs) for ours, theirs in zip(found, before, strict=True))
    handle.remove()
    assert short(layer, x)
    assert_same(answers(layer, x), before, 0.0)


@pytest.mark.parametrize("kind", ["forward_pre_hook", "forward_hook"])
def test_hooks_with_keywords_and_hooks_called_always(
    short: Callable[..., bool], layer: Any, x: Tensor, kind: str
) -> None:
    called: list[int] = []
    register = getattr(layer.base_layer, f"register_{kind}")
    register(lambda *args: called.append(1), with_kwargs=True, **({"always_call": True} if "pre" not in kind else {}))
    assert not short(layer, x)
    assert called


@pytest.mark.parametrize("kind", HOOKS)
def test_a_hook_on_all_modules(short: Callable[..., bool], layer: Any, x: Tensor, kind: str) -> None:
    modules: list[Any] = []
    register = getattr(torch_modules, f"register_module_{kind}")
    handle = register(lambda module, *args: modules.append(module))
    try:
        assert not short(layer, x.clone().requires_grad_())
        answers(layer, x)
    finally:
        handle.remove()
    assert layer.base_layer in modules
    assert short(layer, x)


@pytest.mark.parametrize("kind", HOOKS)
def test_a_hook_on_the_adapted_layer_needs_no_other_way(
    short: Callable[..., bool], layer: Any, x: Tensor, kind: str
) -> None:
    hook = seen(HOOKS[kind])
    getattr(layer, f"register_{kind}")(hook)
    assert short(layer, x.clone().requires_grad_())
    hook.calls = 0
    found = answers(layer, x)
    assert hook.calls == 1
    with using("plain"):
        assert_same(found, answers(layer, x), 1e-5)


# ---- the base layer is not a plain linear


def test_a_forward_of_the_object(short: Callable[..., bool], layer: Any, x: Tensor) -> None:
    before = layer(x)
    layer.base_layer.forward = lambda x: torch.zeros(5, OUT)
    assert not short(layer, x)
    assert torch.allclose(layer(x), before - layer.base_layer.__class__.forward(layer.base_layer, x), atol=1e-5)
    del layer.base_layer.forward
    assert short(layer, x)


def test_a_forward_put_into_torchs_class(
    short: Callable[..., bool], layer: Any, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    delta = layer(x) - layer.base_layer(x)
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: torch.zeros(5, OUT))
    assert not short(layer, x)
    assert torch.allclose(layer(x), delta, atol=1e-5)
    assert not short(layer_of(model_of()), x)


def test_a_class_with_a_forward_of_its_own(short: Callable[..., bool], x: Tensor) -> None:
    layer = layer_of(model_of(Doubled(IN, OUT)))
    assert not short(layer, x)
    delta = formula(layer, x) - nn.functional.linear(x, layer.base_layer.weight, layer.base_layer.bias)
    assert torch.allclose(layer(x), layer.base_layer(x) + delta, atol=1e-5)


def test_a_class_that_is_changed_later(short: Callable[..., bool], layer: Any, x: Tensor) -> None:
    expected = layer(x) + layer.base_layer(x)
    layer.base_layer.__class__ = Doubled
    assert not short(layer, x)
    assert torch.allclose(layer(x), expected, atol=1e-5)


class Twice(nn.Module):
    """A parametrisation."""

    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_parametrised_base(short: Callable[..., bool], layer: Any, x: Tensor, name: str) -> None:
    before = layer(x)
    parametrize.register_parametrization(layer.base_layer, name, Twice())
    assert not short(layer, x)
    assert_formula(layer, x)
    assert not torch.allclose(layer(x), before)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_pruned_base(short: Callable[..., bool], layer: Any, x: Tensor, name: str) -> None:
    before = layer(x)
    prune.random_unstructured(layer.base_layer, name, 0.5)
    assert not short(layer, x)
    assert_formula(layer, x)
    assert not torch.allclose(layer(x), before)


class Coded(Tensor):
    """A tensor of a class of its own, as quantisers use."""


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_weight_of_a_class_of_its_own(short: Callable[..., bool], layer: Any, x: Tensor, name: str) -> None:
    value = getattr(layer.base_layer, name).detach()
    setattr(layer.base_layer, name, nn.Parameter(value.as_subclass(Coded), requires_grad=False))
    assert not short(layer, x)
    assert torch.allclose(layer(x).as_subclass(Tensor), formula(layer, x).as_subclass(Tensor), atol=1e-5)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_base_that_trains(short: Callable[..., bool], layer: Any, x: Tensor, name: str) -> None:
    assert short(layer, x)
    trained = getattr(layer.base_layer, name).requires_grad_()
    assert not short(layer, x)
    layer(x).sum().backward()
    assert trained.grad is not None
    assert trained.grad.any()
    trained.requires_grad_(False)
    assert short(layer, x)


def test_a_bias_that_is_gone_or_comes(short: Callable[..., bool], layer: Any, x: Tensor) -> None:
    layer.base_layer.bias = None
    assert short(layer, x)
    assert_formula(layer, x)
    layer.base_layer.bias = nn.Parameter(torch.ones(OUT), requires_grad=False)
    assert_formula(layer, x)


def test_another_base_layer(short: Callable[..., bool], layer: Any, x: Tensor) -> None:
    layer(x)
    layer.base_layer = nn.Linear(IN, OUT).requires_grad_(False)
    assert_formula(layer, x)
    layer.base_layer = Doubled(IN, OUT).requires_grad_(False)
    assert not short(layer, x)


@pytest.mark.parametrize("kind", ["dtype", "device"])
def test_a_base_that_moves(short: Callable[..., bool], model: nn.Module, layer: Any, x: Tensor, kind: str) -> None:
    layer(x)
    model.to(torch.float64) if kind == "dtype" else model.to("meta").to_empty(device="cpu")
    for each in model.parameters():
        nn.init.normal_(each.data)
    wide = x.to(layer.base_layer.weight.dtype)
    assert short(layer, wide)
    assert layer(wide).dtype == wide.dtype
    assert_formula(layer, wide)


def test_an_input_of_another_dtype_is_the_general_ways_to_refuse(short: Callable[..., bool], layer: Any) -> None:
    with pytest.raises(RuntimeError, match="dtype"):
        layer(torch.randn(5, IN, dtype=torch.float64))
    layer.to(torch.bfloat16)
    with pytest.raises(RuntimeError, match="dtype"):
        layer(torch.randn(5, IN))


def test_state_dicts_that_are_assigned(short: Callable[..., bool], model: nn.Module, layer: Any, x: Tensor) -> None:
    layer(x)
    state = {name: torch.randn_like(value) for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    model.requires_grad_(False)
    assert short(layer, x)
    assert_formula(layer, x)
    assert torch.equal(layer.base_layer.weight, state["base_model.model.proj.base_layer.weight"])


def test_a_functional_call(layer: Any, x: Tensor) -> None:
    weight, b = torch.randn(OUT, IN), torch.randn(OUT, 4, requires_grad=True)
    y = torch.func.functional_call(layer, {"base_layer.weight": weight, "lora_B.default.weight": b}, (x,))
    low_rank = layer.scaling["default"] * (x @ layer.lora_A["default"].weight.t()) @ b.t()
    assert torch.allclose(y, x @ weight.t() + layer.base_layer.bias + low_rank, atol=1e-5)
    assert torch.autograd.grad(y.sum(), b)[0].any()


# ---- the adapters


def test_merged(short: Callable[..., bool], model: nn.Module, layer: Any, x: Tensor) -> None:
    expected = layer(x)
    model.merge_adapter()
    assert not short(layer, x)
    assert torch.allclose(layer(x), expected, atol=1e-5)
    model.unmerge_adapter()
    assert short(layer, x)


def test_disabled(short: Callable[..., bool], model: nn.Module, layer: Any, x: Tensor) -> None:
    layer(x)
    with model.disable_adapter():
        assert not short(layer, x)
        assert torch.equal(layer(x), layer.base_layer(x))
    assert short(layer, x)


def config(**fields: Any) -> lorica.LoraConfig:
    return lorica.LoraConfig(target_modules=["proj"], init_lora_weights=False, **({"r": 3} | fields))


def test_several_adapters(short: Callable[..., bool], model: nn.Module, layer: Any, x: Tensor) -> None:
    layer(x)
    model.add_adapter("other", config())
    assert short(layer, x)
    assert_formula(layer, x)
    model.set_adapter("other")
    assert short(layer, x)
    assert_formula(layer, x, "other")
    model.base_model.set_adapter(["default", "other"])
    assert not short(layer, x)
    assert_formula(layer, x, "default", "other")
    model.delete_adapter("default")
    assert_formula(layer, x, "other")


def test_an_adapter_of_the_same_name(short: Callable[..., bool], model: nn.Module, layer: Any, x: Tensor) -> None:
    model.add_adapter("other", config())
    layer(x)
    model.set_adapter("other")
    model.delete_adapter("default")
    model.add_adapter("default", config(r=7, lora_alpha=3))
    model.set_adapter("default")
    assert short(layer, x)
    assert_formula(layer, x)


def test_no_adapter_is_active(short: Callable[..., bool], model: nn.Module, layer: Any, x: Tensor) -> None:
    layer(x)
    model.base_model.set_adapter([])
    assert not short(layer, x)
    assert torch.equal(layer(x), layer.base_layer(x))


def test_rows_of_several_adapters(short: Callable[..., bool], model: nn.Module, layer: Any, x: Tensor) -> None:
    model.add_adapter("other", config())
    names = ["default", "other", "__base__", "default", "other"]
    assert not short(layer.eval(), x, adapter_names=names)
    y = layer(x, adapter_names=names)
    assert torch.allclose(y[1], formula(layer, x, ("other",))[1], atol=1e-5)
    assert torch.allclose(y[2], layer.base_layer(x)[2], atol=1e-5)
    assert short(layer, x)


def test_scales(short: Callable[..., bool], layer: Any, x: Tensor) -> None:
    layer(x)
    for change in (
        lambda: layer.set_scale("default", 3.0),
        lambda: layer.scale_layer(0.5),
        lambda: layer.unscale_layer(),
        lambda: layer.set_scale("default", 0.0),
    ):
        before = layer.scaling["default"]
        change()
        assert layer.scaling["default"] != before
        assert_formula(layer, x)
        layer(x)
        assert short(layer, x), "a new scale is no reason to go the long way for good"


@pytest.mark.parametrize(
    "fields",
    [{"lora_bias": True}, {"lora_dropout": 0.5, "dropout_position": "post"}],
    ids=["bias of B", "dropout behind B"],
)
def test_what_is_not_plain(short: Callable[..., bool], x: Tensor, fields: dict[str, Any]) -> None:
    assert not short(layer_of(model_of(**fields)).train(), x)


def test_an_op_with_a_mathematics_of_its_own(layer: Any, x: Tensor) -> None:
    assert lean.forward(layer, x) is not None
    layer.op, layer.lean = TransposedLinear(), None
    assert lean.forward(layer, x) is None


def test_factors_that_are_not_plain(short: Callable[..., bool], layer: Any, x: Tensor) -> None:
    before = layer(x)
    parametrize.register_parametrization(layer.lora_A["default"], "weight", Twice())
    assert not short(layer, x)
    assert_formula(layer, x)
    assert not torch.allclose(layer(x), before)


def test_factors_that_are_replaced(layer: Any, x: Tensor) -> None:
    layer(x)
    layer.lora_A["default"].weight = nn.Parameter(torch.randn(4, IN))
    assert_formula(layer, x)
    layer.lora_B["default"] = nn.Linear(4, OUT, bias=False)
    assert_formula(layer, x)
    layer.lora_A = nn.ModuleDict({"default": nn.Linear(IN, 4, bias=False)})
    assert_formula(layer, x)


def test_factors_of_a_class_of_their_own(short: Callable[..., bool], layer: Any, x: Tensor) -> None:
    value = layer.lora_A["default"].weight.detach()
    layer.lora_A["default"].weight = nn.Parameter(value.as_subclass(Coded))
    assert not short(layer, x)


# ---- copies


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "copy of a copy"])
def test_copies_have_a_life_of_their_own(
    short: Callable[..., bool], model: nn.Module, layer: Any, x: Tensor, way: str
) -> None:
    layer(x)
    if way == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        twin = copy.deepcopy(copy.deepcopy(model) if way == "copy of a copy" else model)
    before = layer(x).detach()
    for each in twin.parameters():
        nn.init.normal_(each.data)
    assert short(layer_of(twin), x)
    assert_formula(layer_of(twin), x)
    assert torch.equal(layer(x), before)


# ---- inputs


def test_inputs_of_a_class_of_their_own(short: Callable[..., bool], layer: Any, x: Tensor) -> None:
    assert not short(layer, x.as_subclass(Coded))
    assert type(layer(x.as_subclass(Coded))) is Coded


def test_fake_inputs(layer: Any, x: Tensor) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = mode.from_tensor(x)
        assert lean.forward(layer, fake) is None
        assert layer(fake).shape == (5, OUT)


@pytest.fixture
def mesh() -> Iterator[Any]:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield torch.distributed.init_device_mesh("cpu", (2,))
    torch.distributed.destroy_process_group()


def test_distributed_inputs(mesh: Any, layer: Any, x: Tensor) -> None:
    from torch.distributed.tensor import DTensor, Replicate

    whole = DTensor.from_local(x, mesh, [Replicate()])
    assert lean.forward(layer, whole) is None


def test_keywords_take_the_general_way(short: Callable[..., bool], layer: Any, x: Tensor) -> None:
    assert not short(layer, input=x)
    assert torch.allclose(layer(input=x), layer(x), atol=1e-5)


def test_compiled(short: Callable[..., bool], layer: Any, x: Tensor) -> None:
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert not short(compiled, x)
    assert torch.allclose(compiled(x), layer(x), atol=1e-5)
