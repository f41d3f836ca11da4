"""Adapters on stacked experts keep the laws: off means off, the oracle, one file, nothing weight-sized, no silence."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import lorica
import mixtures
import models
from lorica.layers import LoraLayer

FIELDS: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": [], "target_parameters": mixtures.STACKS}


def adapt(base: nn.Module, **fields: Any) -> nn.Module:
    """A copy of ``base`` with an adapter of random factors."""
    model = lorica.get_peft_model(copy.deepcopy(base), lorica.LoraConfig(**FIELDS | fields))
    return randomise(model).eval()


def randomise(model: nn.Module, seed: int = 3) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def dense(base: nn.Module, model: nn.Module, batch: Tensor) -> Tensor:
    """The logits of the base model with the deltas added to its weights, differentiable."""
    weights = dict(base.named_parameters())
    changed = {name: weights[name] + delta for name, delta in mixtures.deltas(model).items()}
    return functional_call(base, changed, (batch,)).logits


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> bool:
    return float((actual - expected).detach().norm()) <= tolerance * float(expected.detach().norm())


def factors_of(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for name, parameter in model.named_parameters() if "lora_" in name]


def experts_of(model: nn.Module) -> nn.Module:
    """The adapted experts of the first layer."""
    return model.base_model.model.model.layers[0].mlp.experts


BATCH = models.ids(2, 7)
#: Tokens that are sent to two experts each.
ROUTED = models.floats(5, 16), torch.tensor([[0, 2], [1, 2], [2, 0], [0, 1], [1, 0]]), models.floats(5, 2).sigmoid()


@pytest.mark.parametrize("share", [False, True], ids=["own", "shared"])
@pytest.mark.parametrize("implementation", mixtures.IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", mixtures.KINDS)
def test_oracle(kind, implementation, share):
    """I1: outputs and gradients are those of the dense sum."""
    base = mixtures.moe(kind, implementation=implementation)
    model = adapt(base, share_expert_adapters=share)
    output, expected = model(BATCH).logits, dense(base, model, BATCH)
    assert close(output, expected)
    weights = torch.linspace(-1, 1, output.numel()).view(output.shape)
    ours, theirs = (torch.autograd.grad((y * weights).sum(), factors_of(model)) for y in (output, expected))
    for mine, other in zip(ours, theirs, strict=True):
        assert close(mine, other)


@pytest.mark.parametrize("implementation", mixtures.IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_off_means_off(kind, implementation):
    """I8: disabled, or with B = 0, the output is the base model's bit for bit."""
    base = mixtures.moe(kind, implementation=implementation)
    model = adapt(base)
    wanted = base(BATCH).logits
    assert not torch.equal(model(BATCH).logits, wanted)
    with model.disable_adapter():
        assert torch.equal(model(BATCH).logits, wanted)
    fresh = lorica.get_peft_model(copy.deepcopy(base), lorica.LoraConfig(**FIELDS))
    assert torch.equal(fresh(BATCH).logits, wanted)


@pytest.mark.parametrize("share", [False, True], ids=["own", "shared"])
@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_merging(kind, share):
    base = mixtures.moe(kind)
    model = adapt(base, share_expert_adapters=share)
    before = {name: parameter.detach().clone() for name, parameter in base.named_parameters()}
    output, deltas = model(BATCH).logits, mixtures.deltas(model)
    model.merge_adapter()
    assert close(model(BATCH).logits, output)
    changed = {name: before[name] + delta.detach() for name, delta in deltas.items()}
    inside = {layer.target_name: layer.base_weight for layer in model.modules() if isinstance(layer, LoraLayer)}
    for name in deltas:
        assert close(inside[name], changed[name], 1e-6)
    model.unmerge_adapter()
    for name, weight in inside.items():
        assert close(weight, before[name], 1e-6)
    plain = model.merge_and_unload()
    assert type(plain) is type(base)
    assert close(plain(BATCH).logits, output)
    assert [n for n, _ in plain.named_modules()] == [n for n, _ in base.named_modules()]


def test_merging_sixteen_bit_weights_rounds_once():
    base = mixtures.moe().to(torch.bfloat16)
    model = adapt(base)
    deltas = mixtures.deltas(model)
    exact = {name: dict(base.named_parameters())[name].float() + delta.float() for name, delta in deltas.items()}
    model.merge_adapter()
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            assert close(layer.base_weight.float(), exact[layer.target_name].to(torch.bfloat16).float(), 1e-4)


def test_nothing_weight_sized_is_saved_for_backward():
    """What a training step keeps grows with the tokens and the factors, not with the experts' weights."""
    base = mixtures.moe(num_hidden_layers=1, moe_intermediate_size=64)
    model = adapt(base, r=2)
    sizes: list[int] = []
    bases = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def note(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in bases:
            sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(models.ids(1, 2))
    stack = experts_of(model).down_proj.numel()
    assert max(sizes) < stack / 4
    assert sum(sizes) > 0


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    base = mixtures.moe()
    model = adapt(base).train()
    expected = torch.autograd.grad(mixtures.loss_of(model(BATCH)), factors_of(model))
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    mixtures.loss_of(model(BATCH)).backward()
    for parameter, gradient in zip(factors_of(model), expected, strict=True):
        assert close(parameter.grad, gradient, 1e-6)


def test_compiled_whole():
    base = mixtures.moe(num_hidden_layers=1)
    model = adapt(base)
    experts = experts_of(model)
    assert close(torch.compile(experts, backend="eager", fullgraph=True)(*ROUTED), experts(*ROUTED), 1e-6)


def test_autocast_and_sixteen_bits():
    base = mixtures.moe()
    model = adapt(base)
    wanted = experts_of(model)(*ROUTED)
    with torch.autocast("cpu", torch.bfloat16):
        assert close(experts_of(model)(*ROUTED).float(), wanted, 0.03)
    half = copy.deepcopy(base).to(torch.bfloat16)
    narrow = adapt(half)
    assert {parameter.dtype for parameter in factors_of(narrow)} == {torch.float32}
    x, index, weights = ROUTED
    output = experts_of(narrow)(x.bfloat16(), index, weights.bfloat16())
    assert output.dtype == torch.bfloat16
    assert close(output.float(), experts_of(model)(*ROUTED), 0.03)


# ---- adapters, names and files ---------------------------------------------------------------------------------------


def test_names_in_a_file_do_not_depend_on_other_adapters(tmp_path: Path):
    """Layers on two parameters stand around one another; an adapter on one of them leaves no trace of that."""
    base = mixtures.moe()
    one = {"target_parameters": ["mlp.experts.gate_up_proj"]}
    alone, both = adapt(base, **one), adapt(base, target_parameters=["mlp.experts.down_proj"])
    both.add_adapter("other", lorica.LoraConfig(**FIELDS | one))
    assert sorted(lorica.get_peft_model_state_dict(both, adapter_name="other")) == sorted(
        lorica.get_peft_model_state_dict(alone)
    )
    lorica.set_peft_model_state_dict(both, lorica.get_peft_model_state_dict(alone), "other", strict=True)
    both.set_adapter("other")
    assert torch.equal(both(BATCH).logits, alone(BATCH).logits)
    everywhere = adapt(base)
    both.add_adapter("third", lorica.LoraConfig(**FIELDS))
    lorica.set_peft_model_state_dict(both, lorica.get_peft_model_state_dict(everywhere), "third", strict=True)
    both.set_adapter("third")
    assert torch.equal(both(BATCH).logits, everywhere(BATCH).logits)
    both.set_adapter("other")
    both.delete_adapter("third")
    both.delete_adapter("default")
    assert torch.equal(both(BATCH).logits, alone(BATCH).logits)
    assert sum(isinstance(module, LoraLayer) for module in both.modules()) == 2
    both.save_pretrained(tmp_path, selected_adapters=["other"])
    loaded = lorica.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "other")
    assert torch.equal(loaded(BATCH).logits, alone(BATCH).logits)


@pytest.mark.parametrize("fields", [{"share_expert_adapters": True}, {"normalize_moe_lora": True}, {}])
def test_round_trip(fields, tmp_path: Path):
    base = mixtures.moe()
    model = adapt(base, **fields)
    model.save_pretrained(tmp_path)
    loaded = lorica.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.equal(loaded(BATCH).logits, model(BATCH).logits)
    text = (tmp_path / "adapter_config.json").read_text()
    for name in ("share_expert_adapters", "normalize_moe_lora"):
        assert (name in text) == (name in fields)


def test_one_adapter_for_all_experts_and_one_for_each_live_together():
    base = mixtures.moe()
    model = adapt(base)
    model.add_adapter("shared", lorica.LoraConfig(**FIELDS, share_expert_adapters=True))
    randomise(model)
    outputs = []
    for active in ("default", "shared", ["default", "shared"]):
        model.base_model.set_adapter(active)
        outputs.append(model(BATCH).logits)
    deltas, shared = mixtures.deltas(model), mixtures.deltas(model, "shared")
    weights = dict(base.named_parameters())
    both = {name: weights[name] + delta + shared[name] for name, delta in deltas.items()}
    assert close(outputs[2], functional_call(base, both, (BATCH,)).logits)
    model.delete_adapter("shared")
    model.set_adapter("default")
    assert torch.equal(model(BATCH).logits, outputs[0])


def test_same_seed_same_experts():
    """I2: an expert's factors depend on the seed and the parameter's name alone."""
    base = mixtures.moe()
    states = []
    for modules in ([], ["q_proj"]):
        torch.manual_seed(11)
        model = lorica.get_peft_model(copy.deepcopy(base), lorica.LoraConfig(**FIELDS | {"target_modules": modules}))
        states.append(lorica.get_peft_model_state_dict(model))
    for name, tensor in states[0].items():
        assert torch.equal(states[1][name], tensor)
    a = next(tensor for name, tensor in states[0].items() if "lora_A" in name)
    assert float(a.std()) == pytest.approx(a.shape[1] ** -0.5 / 3**0.5, rel=0.2)  # Kaiming of one expert's A


@pytest.mark.parametrize("init", [False, "gaussian", "orthogonal", "pissa", "olora"])
def test_initialisations_are_made_expert_by_expert(init):
    base = mixtures.moe()
    wanted = base(BATCH).logits
    model = lorica.get_peft_model(copy.deepcopy(base), lorica.LoraConfig(**FIELDS, init_lora_weights=init))
    a = experts_of(model).factors("default").a
    assert a.shape == (mixtures.EXPERTS, 4, 8)
    assert not torch.equal(a[0], a[1])
    if init is not False:
        assert close(model(BATCH).logits, wanted)


def test_a_rank_that_a_token_shares_among_its_experts():
    base = mixtures.moe()
    model = adapt(base, normalize_moe_lora=True, target_modules=["q_proj"], rank_pattern={"experts.down_proj": 6})
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    ranks = {layer.target_name.removeprefix("model.layers."): layer.specs["default"] for layer in layers}
    assert ranks["0.self_attn.q_proj"].r == 4
    assert (ranks["0.mlp.experts.gate_up_proj"].r, ranks["0.mlp.experts.gate_up_proj"].scaling) == (2, 4.0)
    assert ranks["1.mlp.experts.down_proj"].r == 3


def test_unloading_gives_the_model_back():
    base = mixtures.moe()
    model = adapt(base)
    plain = model.unload()
    assert torch.equal(plain(BATCH).logits, base(BATCH).logits)
    assert list(plain.state_dict()) == list(base.state_dict())
    copied = copy.deepcopy(adapt(base))
    assert close(copied(BATCH).logits, adapt(base)(BATCH).logits, 0)


# ---- I9: nothing silent ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"target_parameters": ["mlp.experts.gate_proj"]},
            r"no parameter is named 'mlp\.experts\.gate_proj'.*gate_up_",
        ),
        ({"target_parameters": [*mixtures.STACKS, "nowhere"]}, "no parameter is named 'nowhere'"),
        ({"target_parameters": ["norm.weight"]}, r"norm\.weight: a parameter of shape \(16,\)"),
        ({"target_parameters": ["embed_tokens.weight"]}, "cannot be adapted so"),
        ({"target_parameters": ["q_proj.weight"], "target_modules": ["q_proj"]}, "its module is a target already"),
        ({"modules_to_save": ["experts"]}, "its module trains fully"),
        ({"lora_bias": True}, "lora_bias=True is not supported for target_parameters"),
        ({"use_dora": True}, "use_dora"),
        ({"normalize_moe_lora": True, "r": 3}, "r=3 is not a multiple"),
        (
            {"share_expert_adapters": True, "target_parameters": None, "target_modules": ["q_proj"]},
            "no target is a stack",
        ),
        ({"share_expert_adapters": True, "init_lora_weights": "pissa"}, "from the base weight"),
        ({"target_parameters": "mlp.experts.gate_up_proj"}, "target_parameters"),
    ],
)
def test_refusals(fields, message):
    base = mixtures.moe()
    state = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        lorica.get_peft_model(base, lorica.LoraConfig(**FIELDS | fields))
    assert not any(isinstance(module, LoraLayer) for module in base.modules())
    assert all(torch.equal(tensor, state[name]) for name, tensor in base.state_dict().items())


def test_a_parameter_of_the_model_itself():
    model = nn.Linear(3, 3)
    with pytest.raises(lorica.errors.TargetError, match="a parameter of the model itself"):
        lorica.get_peft_model(model, lorica.LoraConfig(target_parameters=["weight"], target_modules=[]))


def test_a_kernel_that_reads_the_weights_by_itself(monkeypatch):
    base = mixtures.moe("gpt_oss")
    monkeypatch.setattr(type(base), "use_kernels", True)
    monkeypatch.setattr(type(base.model.layers[0].mlp), "kernel_layer_name", "MegaBlocksMoeMLP", raising=False)
    with pytest.raises(lorica.errors.TargetError, match="GptOssMLP runs a kernel"):
        lorica.get_peft_model(base, lorica.LoraConfig(**FIELDS))


def test_a_weight_that_is_replaced_during_the_forward():
    """A hook that loads weights (offloading) would pass the adapter over."""
    base = mixtures.moe()
    model = adapt(base)
    experts = experts_of(model).get_base_layer()

    def load(module: nn.Module, args: Any) -> None:
        module._parameters["down_proj"] = nn.Parameter(torch.zeros(4, 16, 8))

    experts.register_forward_pre_hook(load)
    with pytest.raises(RuntimeError, match=r"experts\.down_proj: something replaced the parameter"):
        model(BATCH)


def test_a_weight_that_trains_gets_its_gradient():
    base = mixtures.moe()
    model = adapt(base)
    weight = experts_of(model).get_base_layer().down_proj
    weight.requires_grad_(True)
    mixtures.loss_of(model(BATCH)).backward()
    assert weight.grad is not None
    assert float(weight.grad.norm()) > 0


class Odd(nn.Module):
    """Experts with a post norm, without a gate, and stored ``[in, out]``: three ways in which modules differ."""

    def __init__(self, norm: bool, gate: bool, turned: bool) -> None:
        super().__init__()
        from types import SimpleNamespace

        self.config = SimpleNamespace(_experts_implementation="grouped_mm")
        self.num_experts, self.has_gate, self.has_bias, self.is_transposed = 3, gate, False, turned
        self.has_post_expert_norm, self._is_expert_parallel = norm, False
        wide = 16 if gate else 8
        up = torch.randn(3, 12, wide) if turned else torch.randn(3, wide, 12)
        setattr(self, "gate_up_proj" if gate else "up_proj", nn.Parameter(up))
        self.down_proj = nn.Parameter(torch.randn(3, 8, 12) if turned else torch.randn(3, 12, 8))
        self.act_fn, self.post_expert_norm = nn.SiLU(), nn.LayerNorm(12)

    def _apply_gate(self, x: Tensor) -> Tensor:
        return x[..., ::2].clamp(max=1.0) * x[..., 1::2]

    def forward(self, *args: Any) -> Tensor:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

        return ALL_EXPERTS_FUNCTIONS[self.config._experts_implementation](self, *args)


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize(("norm", "gate", "turned"), [(True, True, False), (False, False, False), (True, False, True)])
def test_modules_differ(norm, gate, turned, implementation):
    base = nn.Sequential()
    base.add_module("experts", Odd(norm, gate, turned))
    base.experts.config._experts_implementation = implementation
    names = ["experts.gate_up_proj" if gate else "experts.up_proj", "experts.down_proj"]
    model = adapt(base, target_parameters=names)
    args = torch.randn(5, 12), torch.tensor([[0, 2], [1, 2], [2, 0], [0, 1], [1, 0]]), models.floats(5, 2).sigmoid()
    weights = dict(base.named_parameters())
    changed = {name: weights[name] + delta for name, delta in mixtures.deltas(model).items()}
    expected = functional_call(base.experts, {n.removeprefix("experts."): w for n, w in changed.items()}, args)
    assert close(model.base_model.model.experts(*args), expected)
