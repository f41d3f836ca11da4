"""DoRA: norms without a second weight, kept while nothing changed, and nothing that is not a number."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lorica
from cases import OPS, Op
from lorica import kernels
from lorica.variants import dora
from models import mlp, randomise, tiny_llama

DORA = [op for op in OPS if op.mergeable and op.peft_exact]


def by_name(op: Op) -> str:
    return op.name


def adapt(op: Op, **fields: object) -> nn.Module:
    return lorica.get_peft_model(op.build(), op.config(lorica, use_dora=True, **fields))


def layer_of(model: nn.Module) -> lorica.layers.LoraLayer:
    return model.base_model.model.target


# ---- norms ----------------------------------------------------------------------------------------------------------


def exact(weight: Tensor, b: Tensor, a: Tensor, scale: float) -> Tensor:
    return (weight.double() + scale * b.double() @ a.double()).square().sum(1)


@pytest.mark.parametrize("chunk_rows", [1, 3, 100])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("turned", [False, True])
def test_squares_are_right_to_a_few_roundings(monkeypatch, chunk_rows, dtype, turned) -> None:
    monkeypatch.setattr(dora, "CHUNK_ELEMENTS", chunk_rows * 24)
    weight = torch.randn(24, 17).to(dtype).T if turned else torch.randn(17, 24).to(dtype)
    a, b = torch.randn(3, 24), torch.randn(17, 3)
    wide = torch.promote_types(dtype, torch.float32)
    found = dora.row_squares(weight, b, a, 1.5).squares
    assert found.dtype == wide
    assert torch.allclose(found.double(), exact(weight, b, a, 1.5), rtol=8 * torch.finfo(wide).eps, atol=0)


@pytest.mark.parametrize("left", [0.0, 1e-4, 1e-2, 0.5])
def test_rows_whose_delta_cancels_the_weight(left: float) -> None:
    """What is left of a row is known to float32's precision relative to the roundings of the row itself."""
    a, b = torch.randn(4, 64), torch.randn(10, 4)
    weight = -2.0 * b @ a * (1 - left)
    found, wanted = dora.row_squares(weight, b, a, 2.0).squares, exact(weight, b, a, 2.0)
    assert (found >= 0).all()
    roundings = 4 * torch.finfo(torch.float32).eps * weight.double().norm(dim=1)
    assert ((found.double().sqrt() - wanted.sqrt()).abs() <= roundings + 1e-6 * wanted.sqrt()).all()


class Largest(TorchDispatchMode):
    """Remember the largest tensor that was made."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and not any(
            isinstance(arg, Tensor) and arg.untyped_storage()._cdata == out.untyped_storage()._cdata for arg in args
        ):
            self.numel = max(self.numel, out.numel())
        return out


def test_no_second_matrix_of_the_weights_size_is_made(monkeypatch) -> None:
    monkeypatch.setattr(dora, "CHUNK_ELEMENTS", 4 * 64)
    weight, a, b = torch.randn(256, 64), torch.randn(2, 64), torch.randn(256, 2) * 0.01
    with Largest() as largest:
        dora.row_squares(weight, b, a, 1.0)
    assert largest.numel <= 256 * 2


def test_zero_rows_and_zero_columns_are_numbers() -> None:
    op = DORA[0]
    base = op.build()
    with torch.no_grad():
        base.target.weight[2:5] = 0
        base.target.weight[:, 3] = 0
    model = lorica.get_peft_model(base, op.config(lorica, use_dora=True, init_lora_weights=True))
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    assert torch.equal(model(op.inputs()), op.build().tail(base.target(op.inputs())))
    model.merge_adapter()
    model.unmerge_adapter()
    assert bool(base.target.weight.isfinite().all())
    for _ in range(3):
        optimiser.zero_grad()
        model(op.inputs()).square().sum().backward()
        optimiser.step()
        assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
    assert bool(model(op.inputs()).isfinite().all())


def test_a_magnitude_of_zero_cannot_be_merged() -> None:
    op = DORA[0]
    model = randomise(adapt(op))
    weight = layer_of(model).get_base_layer().weight
    with torch.no_grad():
        layer_of(model).factors("default").extras[dora.MAGNITUDE][3] = 0
    before = weight.clone()
    with pytest.raises(lorica.errors.AdapterError, match=r"target.*magnitudes of zero"):
        model.merge_adapter()
    assert torch.equal(weight, before)


# ---- nothing learned, nothing changed -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", DORA, ids=by_name)
def test_a_fresh_adapter_changes_no_bit(op: Op, dtype: torch.dtype) -> None:
    base = op.build().to(dtype)
    batch = op.inputs().to(dtype) if op.differentiable_input else op.inputs()
    expected = base(batch)
    model = lorica.get_peft_model(base, op.config(lorica, use_dora=True, init_lora_weights=True))
    assert torch.equal(model(batch), expected)
    randomise(model)
    assert not torch.equal(model(batch), expected)
    with model.disable_adapter():
        assert torch.equal(model(batch), expected)


def test_several_in_one_model_and_deletion() -> None:
    op = DORA[0]
    model = adapt(op)
    model.add_adapter("plain", op.config(lorica))
    randomise(model)
    out = model(op.inputs())
    model.set_adapter("plain")
    assert not torch.equal(model(op.inputs()), out)
    model.set_adapter("default")
    assert torch.equal(model(op.inputs()), out)
    model.delete_adapter("plain")
    assert torch.equal(copy.deepcopy(model)(op.inputs()), out)
    model.add_adapter("plain", op.config(lorica, use_dora=True, r=2))
    assert "magnitude" in "".join(n for n, _ in model.named_parameters() if ".plain." in n)
    model.delete_adapter("plain")
    assert not any(".plain." in n for n, _ in model.named_parameters())


# ---- norms are kept while nothing changed ---------------------------------------------------------------------------


@pytest.fixture
def counted(monkeypatch):
    """Count how often norms are taken."""
    calls: list[int] = []
    real = dora.row_squares

    def count(*args):
        calls.append(1)
        return real(*args)

    monkeypatch.setattr(dora, "row_squares", count)
    return calls


def took(calls: list[int], model: nn.Module, op: Op) -> int:
    before = len(calls)
    out = model(op.inputs())
    fresh = copy.deepcopy(model)
    layer_of(fresh).notes.clear()
    between = len(calls)
    assert torch.equal(fresh(op.inputs()), out), "kept norms are not those of the present factors"
    return between - before


def test_norms_are_taken_once_for_each_state_of_the_factors(counted) -> None:
    op = DORA[0]
    model = randomise(adapt(op))
    layer = layer_of(model)
    assert took(counted, model, op) == 1
    assert took(counted, model, op) == 0
    with torch.no_grad():
        layer.factors("default").b.mul_(1.1)
    assert took(counted, model, op) == 1
    with torch.no_grad():
        layer.factors("default").extras[dora.MAGNITUDE].mul_(1.1)
    assert took(counted, model, op) == 0
    layer.set_scale("default", 0.5)
    assert took(counted, model, op) == 1
    with torch.no_grad():
        layer.get_base_layer().weight.mul_(1.1)
    assert took(counted, model, op) == 1


def test_an_optimiser_that_torch_does_not_see_through(counted) -> None:
    """Fully-sharded parallelism writes to what a forward sees without a trace in its version counter."""
    op = DORA[0]
    model = randomise(adapt(op))

    class Hidden(torch.optim.Optimizer):
        def __init__(self, parameters) -> None:
            super().__init__(parameters, {})

        def step(self, closure=None) -> None:
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.data.mul_(1.1)

    optimiser = Hidden([p for p in model.parameters() if p.requires_grad])
    assert took(counted, model, op) == 1
    optimiser.step()
    assert took(counted, model, op) == 1


def test_loading_forgets_kept_norms(counted) -> None:
    op = DORA[0]
    model, other = randomise(adapt(op)), randomise(adapt(op), seed=8)
    model(op.inputs())
    lorica.set_peft_model_state_dict(model, lorica.get_peft_model_state_dict(other))
    assert torch.equal(model(op.inputs()), other(op.inputs()))


def test_what_is_kept_of_the_weight_follows_it() -> None:
    """``‖W‖²`` outlives an optimiser's steps, and no write to the weight, no other weight and no other dtype."""
    op = DORA[0]
    model = randomise(adapt(op))
    layer = layer_of(model)
    weight = layer.get_base_layer().weight
    factor = layer.factors("default").b

    def is_right() -> bool:
        with torch.no_grad():
            factor.mul_(1.1)
        out = model(op.inputs())
        layer.notes.clear()
        return torch.equal(model(op.inputs()), out)

    assert is_right()
    with torch.no_grad():
        weight[2:4] *= 3
    assert is_right()
    layer.get_base_layer().weight = nn.Parameter(weight.detach() * 2, requires_grad=False)
    assert is_right()
    model.bfloat16().float()
    assert is_right()
    for _ in range(20):  # the allocator lends the same memory again
        model.bfloat16().float()
        assert is_right()
        layer.get_base_layer().weight.data = layer.get_base_layer().weight.data * 1.5
        assert is_right()
    copied = copy.deepcopy(model)
    assert torch.equal(copied(op.inputs()), model(op.inputs()))
    layer.get_base_layer().weight.requires_grad_()
    assert is_right()
    layer.get_base_layer().weight.data.mul_(2)  # as sharded optimisers write; their step is what is seen
    dora._steps += 1
    assert is_right()


@pytest.mark.parametrize("bias", [True, False])
def test_with_dropout_only_the_input_of_a_is_dropped(bias: bool) -> None:
    """Output and all gradients are those of the dense formula, the norm a constant."""
    model = nn.ModuleDict({"target": nn.Linear(12, 9, bias=bias)}).double()
    config = lorica.LoraConfig(
        target_modules=["target"], r=3, lora_alpha=6, lora_dropout=0.4, use_dora=True, init_lora_weights=False
    )
    adapted = randomise(lorica.get_peft_model(model, config, autocast_adapter_dtype=False)).double().train()
    layer = adapted.base_model.model["target"]
    factors, base = layer.factors("default"), layer.get_base_layer()
    leaves = [torch.randn(2, 5, 12, dtype=torch.float64).requires_grad_(), factors.a, factors.b]
    leaves.append(factors.extras[dora.MAGNITUDE])
    g = torch.randn(2, 5, 9, dtype=torch.float64)

    torch.manual_seed(5)
    y = layer(leaves[0])
    torch.manual_seed(5)
    x, a, b, magnitude = leaves
    kept = x * kernels.keep_mask(x, kernels.Dropped(0.4, kernels.draw_seed())) / 0.6
    norm = (base.weight + 2 * b @ a).detach().norm(dim=1)
    expected = magnitude / norm * (x @ base.weight.T + 2 * kept @ a.T @ b.T)
    expected = expected if base.bias is None else expected + base.bias
    assert torch.allclose(y, expected, rtol=1e-12, atol=1e-12)
    for ours, wanted in zip(torch.autograd.grad(y, leaves, g), torch.autograd.grad(expected, leaves, g), strict=True):
        assert torch.allclose(ours, wanted, rtol=1e-12, atol=1e-12)


def test_inference_mode_first_and_training_after() -> None:
    op = DORA[0]
    model = randomise(adapt(op))
    with torch.inference_mode():
        out = model(op.inputs())
    trained = model(op.inputs())
    trained.sum().backward()
    assert torch.equal(trained, out)


# ---- other ways to run ----------------------------------------------------------------------------------------------


def test_under_autocast_norms_stay_float32() -> None:
    op = DORA[0]
    model = randomise(adapt(op))
    layer = layer_of(model)
    factors, spec = layer.factors("default"), layer.specs["default"]
    with torch.no_grad():
        factors.extras[dora.MAGNITUDE].copy_(dora.norms(layer, factors, spec))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fresh = dora.norms(layer, factors, spec)
        out = model(op.inputs())
    assert torch.equal(fresh, factors.extras[dora.MAGNITUDE])
    assert torch.allclose(out.float(), model(op.inputs()), atol=0.05)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.filterwarnings("ignore::FutureWarning:torch")
@pytest.mark.parametrize("op", [op for op in DORA if op.name in ("linear", "embedding", "conv2d")], ids=by_name)
def test_one_compiled_graph(op: Op) -> None:
    torch.compiler.reset()
    model = randomise(adapt(op))
    grads = []
    for forward in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad(set_to_none=True)
        out = forward(op.inputs())
        out.square().sum().backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(grads[0]) == 3
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(*grads, strict=True))
    torch.compiler.reset()


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["conv2d-grouped", "attention"])
def test_layers_without_a_row_for_each_output(name: str) -> None:
    op = next(op for op in OPS if op.name == name)
    base = op.build()
    before = {key: value.clone() for key, value in base.state_dict().items()}
    with pytest.raises(lorica.errors.TargetError, match=r"target.*use_dora"):
        lorica.get_peft_model(base, op.config(lorica, use_dora=True))
    assert all(torch.equal(value, before[key]) for key, value in base.state_dict().items())


def test_tied_factors_cannot_have_two_magnitudes() -> None:
    config = lorica.LoraConfig(target_modules=["embed_tokens"], ensure_weight_tying=True, use_dora=True)
    with pytest.raises(lorica.errors.TargetError, match=r"lm_head.*ensure_weight_tying"):
        lorica.get_peft_model(tiny_llama(tied=True), config)


def test_the_adapter_counts_its_magnitudes() -> None:
    model = lorica.get_peft_model(mlp(), lorica.LoraConfig(target_modules=["lin0"], r=2, use_dora=True))
    trainable, _ = model.get_nb_trainable_parameters()
    assert trainable == 2 * 10 + 20 * 2 + 20


def test_a_fused_mlp_whose_layers_turn_to_dora() -> None:
    """A block that was fused for plain LoRA is its own again while DoRA is active on it."""
    names = ["gate_proj", "up_proj", "down_proj"]
    model = lorica.get_peft_model(tiny_llama(), lorica.LoraConfig(target_modules=names, init_lora_weights=False))
    model.add_adapter("scaled", lorica.LoraConfig(target_modules=names, init_lora_weights=False, use_dora=True))
    model = randomise(model)
    batch = torch.tensor([[1, 2, 3]])
    assert lorica.fuse_mlps(model)
    model.set_adapter("scaled")
    fused = model(batch).logits
    lorica.unfuse_mlps(model)
    assert torch.equal(fused, model(batch).logits)
