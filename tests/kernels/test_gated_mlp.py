"""A gated MLP computed as one is the block itself: outputs, gradients, masks, files. It falls back where it must."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import DTYPES, IN, TOLERANCE, assert_same, draw_x, item
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules
from torch.utils.checkpoint import checkpoint
from transformers import (
    GemmaConfig,
    GemmaModel,
    LlamaConfig,
    LlamaModel,
    MistralConfig,
    MistralModel,
    Phi3Config,
    Phi3Model,
    Qwen2Config,
    Qwen2Model,
)

import lorica
from lorica.kernels import Dropped, kernel_for, using
from lorica.kernels.gated import ACTIVATIONS, Gated, function_mlp, inference_mlp, plain_mlp
from lorica.layers import gated

INNER, OUT = 20, 16
DROPS = [None, 0.3, 0.999, 1.0]
FORMS = ["two", "one", "one, up first", "two, up first"]


# ---- the kernel


def block(
    form: str = "two",
    activation: str = "silu",
    *,
    p: float | None = None,
    bias: bool = False,
    dtype: torch.dtype = torch.float32,
    factors: torch.dtype | None = None,
) -> Gated:
    def layer(size: int, out: int, r: int, seed: int, dropped: Dropped | None) -> Any:
        wide = item(out, r, bias=bias, dtype=dtype, factors=factors, seed=seed, dropped=dropped, scaling=-1.5)
        if size == IN:
            return wide
        generator = torch.Generator().manual_seed(seed)
        weight = (torch.randn(out, size, generator=generator) / 4).to(dtype)
        a = (torch.randn(r, size, generator=generator) / 4).to(factors or dtype).requires_grad_()
        return wide._replace(weight=weight, a=a)

    first, second = (None if p is None else Dropped(p, seed) for seed in (5, 6))
    if form.startswith("two"):
        into = (layer(IN, INNER, 4, 1, first), layer(IN, INNER, 3, 2, first))
    else:
        into = (layer(IN, 2 * INNER, 4, 1, first),)
    return Gated(into, layer(INNER, OUT, 5, 3, second), activation, form.endswith("up first"))


def leaves(x: Tensor, one: Gated) -> list[Tensor]:
    return [x, *(factor for each in (*one.into, one.down) for factor in (each.a, each.b))]


def answers(run: Callable[..., Tensor], x: Tensor, one: Gated) -> list[Tensor | None]:
    y = run(x, one)
    if not y.requires_grad:
        return [y]
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y.dtype)
    wanted = [leaf for leaf in leaves(x, one) if leaf.requires_grad]
    found = iter(torch.autograd.grad(y, wanted, g, allow_unused=True))
    return [y.detach(), *(next(found) if leaf.requires_grad else None for leaf in leaves(x, one))]


def check(x: Tensor, one: Gated) -> None:
    expected = answers(plain_mlp, x, one)
    assert_same(answers(function_mlp, x, one), expected, TOLERANCE[x.dtype])
    with torch.no_grad():
        assert_same(answers(inference_mlp, x, one), expected[:1], TOLERANCE[x.dtype])


@pytest.mark.parametrize("p", DROPS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("form", FORMS)
def test_the_function_is_the_plain_form(form: str, activation: str, p: float | None) -> None:
    for shape in ((7,), (2, 3), (), (0,), (200,)):
        check(draw_x(*shape), block(form, activation, p=p, bias=p is None))


@pytest.mark.parametrize(("dtype", "factors"), DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS[:2])
def test_dtypes(form: str, dtype: torch.dtype, factors: torch.dtype) -> None:
    check(draw_x(6, dtype=dtype), block(form, dtype=dtype, factors=factors, bias=True))
    check(draw_x(6, dtype=dtype), block(form, dtype=dtype, factors=factors, p=0.3))


@pytest.mark.parametrize("p", [None, 0.4])
@pytest.mark.parametrize("form", FORMS[:2])
def test_what_does_not_train(form: str, p: float | None) -> None:
    for frozen in range(1, 2 ** (2 * (3 if form == "two" else 2) + 1), 2 if p else 1):
        x, one = draw_x(4), block(form, p=p)
        for place, leaf in enumerate(leaves(x, one)):
            leaf.requires_grad_(not frozen >> place & 1)
        check(x, one)


@pytest.mark.parametrize("p", [None, 0.4])
@pytest.mark.parametrize(("form", "activation"), [("two", "silu"), ("one", "gelu_tanh"), ("one", "gelu")])
def test_derivatives(form: str, activation: str, p: float | None) -> None:
    x, one = draw_x(2, dtype=torch.float64), block(form, activation, p=p, dtype=torch.float64)

    def of(x: Tensor, *factors: Tensor) -> Tensor:
        items = [each._replace(a=factors[2 * i], b=factors[2 * i + 1]) for i, each in enumerate((*one.into, one.down))]
        return function_mlp(x, one._replace(into=tuple(items[:-1]), down=items[-1]))

    assert torch.autograd.gradcheck(of, leaves(x, one), fast_mode=True)
    assert torch.autograd.gradgradcheck(of, leaves(x, one), fast_mode=True)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_transformations_take_the_plain_form() -> None:
    x, one = torch.randn(3, 4, IN), block()
    for recorded in (True, False):
        with torch.set_grad_enabled(recorded):
            found = torch.func.vmap(lambda x: kernel_for("gated", x, one)(x, one))(x)
        assert torch.allclose(found, plain_mlp(x, one), atol=1e-6)
    (y, along), expected = (
        torch.func.jvp(lambda x, run=run: run(x), (x,), (x,))
        for run in (lambda x: kernel_for("gated", x, one)(x, one), lambda x: plain_mlp(x, one))
    )
    assert_same([y, along], expected, 1e-6)


@pytest.mark.parametrize("p", [None, 0.4])
@pytest.mark.parametrize("form", FORMS[:2])
def test_kept_are_x_gate_up_and_the_hidden(form: str, p: float | None) -> None:
    x, one = draw_x(50), block(form, p=p, bias=True)
    own = {t.data_ptr() for each in (*one.into, one.down) for t in each[:4]}
    found: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        if t.data_ptr() not in own:
            found[t.data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = function_mlp(x, one)
    ranks = 4 + 3 + 5 if form == "two" else 4 + 5
    assert sum(found.values()) == 4 * 50 * (IN + 2 * INNER + ranks)
    assert y.requires_grad


def test_an_input_that_nobody_needs_is_not_kept() -> None:
    x, one = draw_x(50), block()
    for each in one.into:
        each.a.requires_grad_(False)
    found: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: found.append(t.data_ptr()) or t, lambda t: t):
        function_mlp(x, one)
    assert x.data_ptr() not in found


def test_neither_what_is_kept_nor_the_gradient_is_written_to() -> None:
    x, one = draw_x(5), block()
    y = function_mlp(x, one)
    g = torch.randn_like(y)
    before = g.clone()
    first = torch.autograd.grad(y, leaves(x, one), g, retain_graph=True)
    assert torch.equal(g, before)
    assert_same(torch.autograd.grad(y, leaves(x, one), g), first, 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_backward_under_an_autocast_that_forward_did_not_see(dtype: torch.dtype) -> None:
    x, one = draw_x(5, dtype=dtype), block(dtype=dtype)
    expected = answers(plain_mlp, x, one)
    y = function_mlp(x, one)
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same([y, *torch.autograd.grad(y, leaves(x, one), g)], expected, TOLERANCE[dtype])


# ---- whole models

MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaModel, LlamaConfig, {}),
    "llama with biases": (LlamaModel, LlamaConfig, {"mlp_bias": True}),
    "mistral": (MistralModel, MistralConfig, {}),
    "qwen2": (Qwen2Model, Qwen2Config, {}),
    "gemma": (GemmaModel, GemmaConfig, {"head_dim": 8}),
    "phi3": (Phi3Model, Phi3Config, {}),
    "llama with relu": (LlamaModel, LlamaConfig, {"hidden_act": "relu"}),
}


def base_of(kind: str, **more: Any) -> nn.Module:
    cls, config, fields = MODELS[kind]
    sizes = {
        "vocab_size": 40,
        "hidden_size": 32,
        "intermediate_size": 88,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "use_cache": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    torch.manual_seed(0)
    return cls(config(**(sizes | fields | more)))


def adapted(kind: str = "llama", *, base: nn.Module | None = None, **fields: Any) -> nn.Module:
    base = base_of(kind) if base is None else base
    fields = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False} | fields
    return lorica.get_peft_model(base, lorica.LoraConfig(**fields)).train()


IDS = torch.arange(18).view(2, 9)


def step(model: nn.Module, seed: int = 5) -> list[Tensor]:
    """Output, and gradients of all that trains."""
    torch.manual_seed(seed)
    y = model(IDS).last_hidden_state
    trained = [each for each in model.parameters() if each.requires_grad]
    return [y.detach(), *torch.autograd.grad(y.float().square().sum(), trained)]


def mlp(model: nn.Module) -> Any:
    return model.base_model.model.layers[0].mlp


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], int]:
    """How many blocks a call computes as one."""
    calls: list[str] = []
    find = gated.kernel_for
    monkeypatch.setattr(gated, "kernel_for", lambda op, *args: calls.append(op) or find(op, *args))

    def ask(run: Callable[[], object]) -> int:
        calls.clear()
        run()
        return len(calls)

    return ask


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("kind", MODELS)
def test_models_are_what_they_were(taken: Callable[..., int], kind: str, p: float) -> None:
    model = adapted(kind, lora_dropout=p)
    names = [name for name, _ in model.named_parameters()]
    expected = [step(model), step(model)][1]  # layers find out in the first who shares an input
    assert len(lorica.fuse_mlps(model)) == 2
    found: list[Tensor] = []
    assert taken(lambda: found.extend(step(model))) == 2
    assert_same(found, expected, 1e-5)
    assert [name for name, _ in model.named_parameters()] == names
    with torch.no_grad():
        assert taken(lambda: model(IDS)) == 2
    assert lorica.unfuse_mlps(model) == ["base_model.model.layers.0.mlp", "base_model.model.layers.1.mlp"]
    assert taken(lambda: step(model)) == 0
    assert lorica.unfuse_mlps(model) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_in_16_bits(dtype: torch.dtype) -> None:
    model = adapted(base=base_of("llama").to(dtype))
    expected = [step(model), step(model)][1]
    lorica.fuse_mlps(model)
    assert_same(step(model), expected, TOLERANCE[dtype])


@pytest.mark.parametrize("kind", ["llama", "gemma", "phi3"])
def test_autocast(taken: Callable[..., int], kind: str) -> None:
    model = adapted(kind)

    def run() -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            return step(model)

    expected = [run(), run()][1]
    lorica.fuse_mlps(model)
    assert taken(run) == 2
    assert_same(run(), expected, TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_checkpointing(p: float, reentrant: bool) -> None:
    block = mlp(adapted(lora_dropout=p))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lorica.fuse_mlps(nn.ModuleDict({"mlp": block}))
    x = torch.randn(5, 32, requires_grad=True)
    found = []
    for run in (block, lambda x: checkpoint(block, x, use_reentrant=reentrant)):
        torch.manual_seed(5)
        y = run(x)
        torch.manual_seed(6)
        found.append(
            [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *wanted(block)])]
            if not reentrant
            else gradients_of(y, x, block)
        )
    assert_same(found[1], found[0], 0.0)


def wanted(block: nn.Module) -> list[Tensor]:
    return [each for each in block.parameters() if each.requires_grad]


def gradients_of(y: Tensor, x: Tensor, block: nn.Module) -> list[Tensor]:
    y.square().sum().backward()  # a reentrant checkpoint knows no other way
    grads = [y.detach(), *(each.grad for each in [x, *wanted(block)])]
    for each in [x, *wanted(block)]:
        each.grad = None
    return grads


def test_each_step_has_its_own_masks() -> None:
    model = adapted(lora_dropout=0.5)
    lorica.fuse_mlps(model)
    block, x = mlp(model), torch.randn(5, 32)
    assert not torch.equal(block(x), block(x))
    block.eval()
    assert torch.equal(block(x), block(x))


# ---- falling back

CHANGES: dict[str, Callable[[Any, Any], object]] = {
    "disabled": lambda model, block: model.base_model.disable_adapter_layers(),
    "merged": lambda model, block: model.merge_adapter(),
    "no active adapter": lambda model, block: model.base_model.set_adapter([]),
    "several adapters": lambda model, block: (
        model.add_adapter("other", lorica.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)),
        model.base_model.set_adapter(["default", "other"]),
    ),
    "an adapter on a part": lambda model, block: (
        model.add_adapter("other", lorica.LoraConfig(r=2, target_modules=["up_proj"], init_lora_weights=False)),
        model.set_adapter("other"),
    ),
    "training base weight": lambda model, block: block.up_proj.base_layer.weight.requires_grad_(),
    "dropout of one": lambda model, block: block.up_proj.train(False),
    "hook on a layer": lambda model, block: block.up_proj.register_forward_hook(lambda m, args, y: y + 1),
    "hook before a layer": lambda model, block: block.down_proj.register_forward_pre_hook(
        lambda m, args: (args[0] + 1,)
    ),
    "backward hook on a layer": lambda model, block: block.down_proj.register_full_backward_hook(lambda *args: None),
    "hook on a base layer": lambda model, block: block.gate_proj.base_layer.register_forward_hook(
        lambda m, a, y: y + 1
    ),
    "hook on the activation": lambda model, block: block.act_fn.register_forward_hook(lambda m, args, y: y + 1),
    "another activation": lambda model, block: setattr(block, "act_fn", nn.ReLU()),
    "forward of the activation": lambda model, block: setattr(block.act_fn, "forward", torch.relu),
    "another layer": lambda model, block: setattr(block, "up_proj", nn.Linear(32, 88)),
    "another base layer": lambda model, block: setattr(block.up_proj, "base_layer", Halved(32, 88)),
    "forward of a layer": lambda model, block: setattr(block.up_proj, "forward", lambda x: torch.ones(5, 88)),
    "one module more": lambda model, block: block.add_module("more", nn.Identity()),
    "another class": lambda model, block: setattr(block, "__class__", Negative),
}


class Halved(nn.Linear):
    """A linear layer with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2


class Negative(type(base_of("llama").layers[0].mlp)):
    """A block with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return -super().forward(x)


@pytest.mark.parametrize("change", CHANGES)
def test_falling_back(taken: Callable[..., int], change: str) -> None:
    torch.manual_seed(0)
    model = adapted(lora_dropout=0.3 if change == "dropout of one" else 0.0)
    lorica.fuse_mlps(model)
    block, x = mlp(model), torch.randn(5, 32)
    assert taken(lambda: block(x)) == 1
    CHANGES[change](model, block)
    assert taken(lambda: block(x)) == 0
    torch.manual_seed(1)
    found = block(x)
    lorica.unfuse_mlps(model)
    torch.manual_seed(1)
    assert torch.equal(found, block(x))


def test_hooks_on_all_modules(taken: Callable[..., int]) -> None:
    model, called = adapted(), []
    lorica.fuse_mlps(model)
    handle = torch_modules.register_module_forward_hook(lambda module, args, y: called.append(module))
    try:
        assert taken(lambda: model(IDS)) == 0
    finally:
        handle.remove()
    assert mlp(model).up_proj in called
    assert taken(lambda: model(IDS)) == 2


def test_hooks_on_the_block_itself(taken: Callable[..., int]) -> None:
    model = adapted()
    lorica.fuse_mlps(model)
    block, x = mlp(model), torch.randn(5, 32)
    y = block(x)
    block.register_forward_hook(lambda module, args, y: 2 * y)
    assert taken(lambda: block(x)) == 1
    assert torch.equal(block(x), 2 * y)


def test_rows_of_several_adapters(taken: Callable[..., int]) -> None:
    model = adapted().eval()
    model.add_adapter("other", lorica.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    names = ["default", "other"]
    expected = model(IDS, adapter_names=names).last_hidden_state
    lorica.fuse_mlps(model)
    assert taken(lambda: model(IDS, adapter_names=names)) == 0
    assert torch.equal(model(IDS, adapter_names=names).last_hidden_state, expected)
    assert taken(lambda: model(IDS)) == 2


def test_changes_that_need_no_fallback(taken: Callable[..., int]) -> None:
    model = adapted()
    lorica.fuse_mlps(model)
    block, x = mlp(model), torch.randn(5, 32)
    for change in (
        lambda: block.up_proj.set_scale("default", 3.0),
        lambda: model.add_adapter(
            "other", lorica.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
        ),
        lambda: model.set_adapter("other"),
        lambda: nn.init.normal_(block.up_proj.base_layer.weight),
        lambda: model.delete_adapter("default"),
        lambda: block.requires_grad_(False),
    ):
        change()
        block(x)
        assert taken(lambda: block(x)) == 1
        with using("plain"):
            expected = block(x)
        assert torch.allclose(block(x), expected, atol=1e-5)


def test_the_plain_way_is_the_modules_own(taken: Callable[..., int]) -> None:
    model = adapted()
    lorica.fuse_mlps(model)
    with using("plain"):
        assert taken(lambda: model(IDS)) == 0


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_compiled_blocks(taken: Callable[..., int]) -> None:
    model = adapted()
    lorica.fuse_mlps(model)
    block, x = mlp(model), torch.randn(5, 32)
    compiled = torch.compile(block, backend="eager", fullgraph=True)
    assert taken(lambda: compiled(x)) == 0
    assert torch.allclose(compiled(x), block(x), atol=1e-5)


# ---- life of a fused model


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies(taken: Callable[..., int], way: str) -> None:
    model = adapted()
    lorica.fuse_mlps(model)
    twin = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert mlp(twin).forward.block is None  # what it computes where it is now, it finds out there
    assert_same(step(twin), step(model), 1e-6)
    before = model(IDS).last_hidden_state.detach()
    with torch.no_grad():
        for each in mlp(twin).parameters():
            each.normal_()
    assert torch.equal(model(IDS).last_hidden_state, before)
    assert taken(lambda: twin(IDS)) == 2
    assert mlp(twin).forward.module is mlp(twin)
    with using("plain"):
        expected = twin(IDS).last_hidden_state
    assert torch.allclose(twin(IDS).last_hidden_state, expected, atol=1e-4)


def test_files_and_state_dicts(tmp_path: Path) -> None:
    model = adapted()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path / "before")
    lorica.fuse_mlps(model)
    model.save_pretrained(tmp_path / "after")
    assert_same(list(model.state_dict().values()), list(state.values()), 0.0)
    assert list(model.state_dict()) == list(state)
    first, second = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("before", "after"))
    assert first == second


@pytest.mark.parametrize("way", ["unload", "merge_and_unload"])
def test_unloading(way: str) -> None:
    twin, model = adapted().eval(), adapted().eval()
    lorica.fuse_mlps(model)
    expected, plain = (getattr(each, way)() for each in (twin, model))
    assert torch.equal(plain(IDS).last_hidden_state, expected(IDS).last_hidden_state)
    assert not any("forward" in module.__dict__ for module in plain.modules())


def test_merging_and_unmerging() -> None:
    model = adapted().eval()
    lorica.fuse_mlps(model)
    expected = model(IDS).last_hidden_state
    model.merge_adapter()
    assert torch.allclose(model(IDS).last_hidden_state, expected, atol=1e-4)
    model.unmerge_adapter()
    assert torch.allclose(model(IDS).last_hidden_state, expected, atol=1e-4)


# ---- which blocks are recognised


class Block(nn.Module):
    """``down(act(gate(x)) · up(x))`` under names that say nothing."""

    def __init__(self, order: tuple[str, str, str] = ("w1", "w3", "w2")) -> None:
        super().__init__()
        for name in sorted(order):
            setattr(self, name, nn.Linear(6, 12) if name != order[-1] else nn.Linear(12, 6))
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = (getattr(self, name) for name in self.order)
        return down(nn.functional.silu(gate(x)) * up(x))


class Clamped(Block):
    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.w1(x).clamp(max=7), self.w3(x)
        return self.w2(nn.functional.silu(gate) * up)


class Dropping(Block):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(x), 0.1, self.training)


class Widened(Block):
    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.w1(x), self.w3(x)
        return self.w2(nn.functional.silu(gate.float()).to(up.dtype) * up)


class Residual(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Shaped(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.view(-1, 5, 6))


class Holding(Block):
    def __init__(self) -> None:
        super().__init__()
        self.activate = nn.functional.silu


class Modules(Block):
    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.1)
        self.norm = nn.LayerNorm(6)


class Normed(Block):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)


class Scaled(Block):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))


def adapt(block: nn.Module) -> nn.Module:
    config = lorica.LoraConfig(r=2, target_modules=["w1", "w2", "w3"], init_lora_weights=False)
    return lorica.get_peft_model(nn.ModuleDict({"mlp": block}), config)


@pytest.mark.parametrize("order", [("w1", "w3", "w2"), ("w3", "w1", "w2"), ("w2", "w1", "w3")])
def test_names_do_not_matter(taken: Callable[..., int], order: tuple[str, str, str]) -> None:
    model, x = adapt(Block(order)), torch.randn(3, 6)
    block = model.base_model.model["mlp"]
    expected = block(x)
    assert lorica.fuse_mlps(model) == ["base_model.model.mlp"]
    assert taken(lambda: block(x)) == 1
    assert torch.allclose(block(x), expected, atol=1e-6)


@pytest.mark.parametrize("kind", [Clamped, Dropping, Widened, Residual, Shaped, Holding, Modules, Normed, Scaled])
def test_what_is_something_else_is_left_alone(kind: type[nn.Module]) -> None:
    model = adapt(kind())
    with (
        pytest.warns(UserWarning, match="base_model.model.mlp: the MLP is left as it is"),
        pytest.warns(UserWarning, match="no MLP is fused"),
    ):
        assert lorica.fuse_mlps(model) == []
    assert "forward" not in model.base_model.model["mlp"].__dict__


def test_a_block_with_a_forward_of_its_own_object_is_left_alone() -> None:
    model = adapted()
    mlp(model).forward = lambda x: x
    with pytest.warns(UserWarning, match=r"layers.0.mlp: .* the object has a forward of its own"):
        assert lorica.fuse_mlps(model) == ["base_model.model.layers.1.mlp"]


@pytest.mark.parametrize("model", [nn.Linear(3, 3), adapted(target_modules=["q_proj"])], ids=["plain", "attention"])
def test_nothing_to_fuse_is_said(model: nn.Module) -> None:
    with pytest.warns(UserWarning, match="no MLP is fused"):
        assert lorica.fuse_mlps(model) == []


def test_looking_draws_no_random_number() -> None:
    model = adapted()
    before = torch.get_rng_state()
    lorica.fuse_mlps(model)
    assert torch.equal(before, torch.get_rng_state())


def test_fusing_twice_is_fusing_once() -> None:
    model = adapted()
    assert lorica.fuse_mlps(model) == lorica.fuse_mlps(model)
    lorica.unfuse_mlps(model)
    assert "forward" not in mlp(model).__dict__


@pytest.mark.parametrize("fields", [{"use_dora": True}, {"lora_bias": True}], ids=["dora", "bias of B"])
def test_an_adapter_that_is_not_plain_is_said(fields: dict[str, Any]) -> None:
    model = adapted(**fields)
    with (
        pytest.warns(UserWarning, match="what is active on gate_proj is not one adapter of plain LoRA"),
        pytest.warns(UserWarning, match="no MLP is fused"),
    ):
        assert lorica.fuse_mlps(model) == []
