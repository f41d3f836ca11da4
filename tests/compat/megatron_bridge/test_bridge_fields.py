"""Every field of Megatron Bridge's methods, without Megatron: each has its effect, and the default is theirs."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorica.adapt.found import lora_layers
from lorica.compat.megatron_bridge import PEFT, CanonicalLoRA, DoRA, LoRA, ModuleMatcher, VLMLoRA
from lorica.errors import ConfigError, TargetError
from models import floats, ids, mlp, randomise, tiny_llama

METHODS = [LoRA, VLMLoRA, CanonicalLoRA, DoRA]


def targets(model: nn.Module) -> set[str]:
    return {layer.target_name for layer in lora_layers(model)}


def factors(model: nn.Module, name: str) -> tuple[Tensor, Tensor]:
    layer = next(layer for layer in lora_layers(model) if layer.target_name == name)
    found = layer.factors("default")
    return found.a.detach(), found.b.detach()


def wide(**fields: Any) -> tuple[Tensor, Tensor]:
    """The factors that start on one large linear layer."""
    model = nn.Sequential(nn.Linear(400, 300))
    LoRA(target_modules=["0"], dim=64, **fields)(model)
    return factors(model, "0")


def test_the_defaults_are_the_pages() -> None:
    found = {field.name: getattr(VLMLoRA(), field.name) for field in dataclasses.fields(VLMLoRA) if field.repr}
    assert found == {
        "target_modules": ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"],
        "exclude_modules": [],
        "canonical_mapping": {},
        "dim": 32,
        "alpha": 32,
        "dropout": 0.0,
        "dropout_position": "pre",
        "lora_A_init_method": "xavier",
        "lora_B_init_method": "zero",
        "a2a_experimental": False,
        "lora_dtype": None,
        "normalize_moe_lora": False,
        "share_expert_adapters": True,
        "freeze_vision_model": True,
        "freeze_vision_projection": True,
        "freeze_language_model": True,
    }
    assert DoRA().alpha == 64
    assert CanonicalLoRA().target_modules == [
        *("linear_q", "linear_k", "linear_v", "linear_proj", "linear_fc1_up", "linear_fc1_gate", "linear_fc2")
    ]
    assert all(issubclass(method, PEFT) and issubclass(method, ModuleMatcher) for method in METHODS)


@pytest.mark.parametrize(
    ("names", "layers", "projections"),
    [
        (["q_proj"], range(12), {"q_proj"}),
        (["*.layers.1.*.q_proj"], [1], {"q_proj"}),  # and not 10 and 11
        (["*.layers.0.*_proj", "up_proj"], [0], {"q_proj", "k_proj", "v_proj", "o_proj", "down_proj", "gate_proj"}),
        (["model.layers.3.self_attn.k_proj"], [3], {"k_proj"}),
    ],
)
def test_target_modules_are_names_or_wildcards_for_whole_names(names, layers, projections) -> None:
    model = tiny_llama(layers=12)
    LoRA(target_modules=names, dim=2)(model)
    found = {(int(name.split(".")[2]), name.rpartition(".")[2]) for name in targets(model)}
    wanted = {(layer, projection) for layer in layers for projection in projections}
    assert found == wanted | ({(layer, "up_proj") for layer in range(12)} if "up_proj" in names else set())


def test_exclude_modules_are_left_out_of_all_linear_layers() -> None:
    model = tiny_llama()
    every = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    LoRA(target_modules=[], exclude_modules=["q_proj", "*.1.mlp.*"], dim=2)(model)
    assert targets(model) == {name for name in every if not name.endswith("q_proj") and "1.mlp" not in name}
    assert "lm_head" in targets(model)  # a linear layer like any other, to Megatron Bridge
    model = tiny_llama()
    LoRA(target_modules=None, dim=2)(model)
    assert targets(model) == every


def test_targets_and_exclusions_together_are_refused() -> None:
    with pytest.raises(ConfigError, match="names some"):
        LoRA(exclude_modules=["q_proj"])(tiny_llama())


def test_a_name_that_means_nothing_is_refused_before_anything_is_changed() -> None:
    model = tiny_llama()
    with pytest.raises(TargetError, match=r"LoRA: no module of the model is meant by \['\*\.9\.\*', 'q_prj'\]"):
        LoRA(target_modules=["k_proj", "q_prj", "*.9.*"])(model)
    assert not targets(model)


def test_matching_one_module() -> None:
    linear, path = nn.Linear(2, 2), "decoder.layers.0.mlp"
    assert LoRA().match(linear, "linear_fc1", path) == ("linear_fc1", f"{path}.linear_fc1")
    assert LoRA().match(linear, "linear", path) is None
    assert LoRA().match(linear) is None
    assert LoRA(target_modules=["*.0.*_fc1"]).match(linear, "linear_fc1", path) == ("*.0.*_fc1", f"{path}.linear_fc1")
    assert LoRA(target_modules=["*.0.*_fc"]).match(linear, "linear_fc1", path) is None  # from beginning to end
    free = LoRA(target_modules=[], exclude_modules=["router"])
    assert free.match(linear, "anything", None) == ("anything", "anything")
    assert free.match(linear, "router", path) is None
    assert free.match(nn.LayerNorm(2), "norm", path) is None
    assert LoRA(canonical_mapping={"linear_v": set()}).match(linear, "linear_v", path) is not None
    found = CanonicalLoRA(target_modules=["*.0.*.linear_q", "linear_k", "linear_fc1_up", "linear_fc2"])
    assert found.canonical_mapping == {
        "*.0.*.linear_qkv": {"linear_q"},
        "linear_qkv": {"linear_k"},
        "linear_fc1": {"linear_fc1_up"},
        "linear_fc2": {"linear_fc2"},
    }
    assert found.match(linear, "linear_fc1", path) == ("linear_fc1", f"{path}.linear_fc1")
    found.target_modules = ["linear_v"]  # as recipes do
    assert found.match(linear, "linear_fc1", path) is None


def test_a_mapping_stands_in_for_target_modules() -> None:
    model = tiny_llama()
    LoRA(canonical_mapping={"v_proj": set()}, dim=2)(model)
    assert {name.rpartition(".")[2] for name in targets(model)} == {"v_proj"}


@pytest.mark.parametrize("name", ["linear_qkv", "*.linear_fc1", "decoder.layers.0.mlp.linear_fc1"])
def test_the_canonical_form_names_projections(name: str) -> None:
    with pytest.raises(ConfigError, match="one by one"):
        CanonicalLoRA(target_modules=[name])


@pytest.mark.parametrize("method", METHODS)
def test_rank_and_scale(method: Any) -> None:
    model = nn.Sequential(nn.Linear(10, 20))
    kinds = {VLMLoRA: {"freeze_model": lambda *args, **kwargs: None}}
    made = method(target_modules=["0"], dim=5, alpha=30, lora_B_init_method="normal")
    for name, value in kinds.get(method, {}).items():
        setattr(made, name, value)
    made(model)
    a, b = factors(model, "0")
    assert (a.shape, b.shape) == ((5, 10), (20, 5))
    [layer] = lora_layers(model)
    assert layer.specs["default"].scaling == 6
    if method is not DoRA:
        x, base = floats(4, 10), layer.base_layer
        torch.testing.assert_close(model(x), base(x) + 6 * x @ a.T @ b.T)


def dropped(**fields: Any) -> Tensor:
    """The adapter's part, in training, where nothing dropped would make it 1 everywhere."""
    model = nn.Sequential(nn.Linear(64, 500, bias=False))
    method = LoRA(target_modules=["0"], dim=1, alpha=1, **fields)
    method(model)
    [layer] = lora_layers(model)
    with torch.no_grad():
        layer.base_layer.weight.zero_()
        layer.factors("default").a.fill_(1 / 64)
        layer.factors("default").b.fill_(1.0)
    torch.testing.assert_close(model.eval()(torch.ones(3, 64)), torch.ones(3, 500))
    return model.train()(torch.ones(3, 64)).detach()


def test_dropout_before_the_factors_and_after_them() -> None:
    torch.testing.assert_close(dropped(), torch.ones(3, 500))
    before = dropped(dropout=0.25)
    assert (before == before[:, :1]).all()  # the same input for all outputs
    assert len(before.unique()) > 1
    after = dropped(dropout=0.25, dropout_position="post")
    kept = after != 0
    torch.testing.assert_close(after[kept], torch.full_like(after[kept], 1 / 0.75))
    assert abs(float(kept.float().mean()) - 0.75) < 0.05


@pytest.mark.parametrize("which", ["lora_A_init_method", "lora_B_init_method"])
def test_methods_of_initialisation(which: str) -> None:
    """Standard deviations of the four methods, for each factor from its own shape."""
    place = 0 if which == "lora_A_init_method" else 1
    rows, columns = wide()[place].shape
    other = {"lora_A_init_method": "normal"} if place else {"lora_B_init_method": "normal"}
    bound = 1 / math.sqrt(columns)
    wanted = {"xavier": math.sqrt(2 / (rows + columns)), "kaiming": bound / math.sqrt(3), "normal": 0.2, "zero": 0.0}
    for method, deviation in wanted.items():
        drawn = wide(**other | {which: method})
        assert abs(float(drawn[place].std()) - deviation) <= 0.02 * deviation, method
        assert abs(float(drawn[1 - place].std()) - 0.2) < 0.004
    uniform = wide(**other | {which: "kaiming"})[place]
    assert 0.99 * bound < float(uniform.abs().max()) <= bound
    assert float(wide(**other | {which: "xavier"})[place].abs().max()) > 3 * wanted["xavier"]  # normal, not uniform
    with pytest.raises(ConfigError, match=f"{which}='xavjer'.*Did you mean 'xavier'"):
        wide(**{which: "xavjer"})


def test_the_default_start_changes_nothing_and_two_zeros_are_refused() -> None:
    a, b = wide()
    assert a.any()
    assert not b.any()
    with pytest.raises(ConfigError, match="never learn"):
        wide(lora_A_init_method="zero")


def test_lora_dtype() -> None:
    for given, base, wanted in (
        (None, torch.float32, torch.float32),
        (None, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32, torch.bfloat16),
        (torch.float32, torch.bfloat16, torch.float32),
    ):
        model = nn.Sequential(nn.Linear(4, 4)).to(base)
        LoRA(target_modules=["0"], dim=2, lora_dtype=given)(model)
        assert {tensor.dtype for tensor in factors(model, "0")} == {wanted}


def test_dora_is_dora() -> None:
    model = mlp()
    DoRA(target_modules=["lin0"], dim=2)(model)
    [layer] = lora_layers(model)
    assert layer.specs["default"].variant == "use_dora"
    with pytest.raises(ConfigError, match="use 'pre'"):
        DoRA(dropout_position="post")


def test_a2a_reaches_the_layers_and_says_where_it_changes_nothing() -> None:
    for asked in (False, True):
        model = tiny_llama()
        LoRA(target_modules=["q_proj"], dim=2, a2a_experimental=asked)(model)
        assert {layer.specs["default"].a2a for layer in lora_layers(model)} == {asked}


def test_a_call_freezes_the_base_and_trains_the_adapters() -> None:
    model = tiny_llama()
    method = LoRA(target_modules=["q_proj"], dim=2)
    assert method(model) is model
    assert model.training
    assert all(parameter.requires_grad == ("lora_" in name) for name, parameter in model.named_parameters())
    method.set_params_to_save(model)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert method.params_to_save == trained
    assert all(map(method.adapter_key_filter, trained))
    assert not method.adapter_key_filter("model.norm.weight")
    name, parameter = next(iter(model.named_parameters()))
    assert method.adapter_key_filter((name, parameter)) is parameter.requires_grad


def test_chunks_are_adapted_as_one_model() -> None:
    first, second = mlp(), mlp(seed=1)
    method = LoRA(target_modules=["lin0", "lin1"], dim=2, lora_B_init_method="normal")
    given = [first, second]
    assert method(given) is given
    x = floats(3, 10)
    outputs = [chunk(x) for chunk in given]
    a, b = factors(first, "0.lin0"), factors(second, "1.lin0")
    assert not torch.equal(a[0], b[0])
    with method.disable_adapter(given):
        assert all(not torch.equal(chunk(x), was) for chunk, was in zip(given, outputs, strict=True))
    assert all(torch.equal(chunk(x), was) for chunk, was in zip(given, outputs, strict=True))


def test_wrappers_are_looked_through() -> None:
    class Float16Module(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    wrapped = Float16Module(mlp())
    assert LoRA(target_modules=["lin0"], dim=2)(wrapped) is wrapped
    assert targets(wrapped) == {"lin0"}


def test_transform_adapts_one_module() -> None:
    method = LoRA(target_modules=["*.lin0"], dim=2, alpha=6, lora_B_init_method="normal")
    net, x = mlp(), floats(3, 10)
    plain = net(x)
    assert method.transform(net.lin1, "lin1", "net") is net.lin1
    base = net.lin0
    net.lin0 = method.transform(base, "lin0", "net")
    assert targets(net) == {"net.lin0"}
    a, b = factors(net, "net.lin0")
    torch.testing.assert_close(net.lin0(x), base(x) + 3 * x @ a.T @ b.T)
    assert method.transform(net.lin0, "lin0", "net") is net.lin0  # it has its adapter
    other = method.transform(net.lin1, "lin0", "other")
    method.disable_adapter_layers(net)
    assert torch.equal(net(x), plain)  # all that one method made are switched together
    assert torch.equal(other(floats(3, 20)), net.lin1(floats(3, 20)))


def test_a_method_of_ones_own_is_walked_over_the_model() -> None:
    class Twice(PEFT):
        def transform(self, module: nn.Module, name: str | None = None, prefix: str | None = None) -> nn.Module:
            seen.append(f"{prefix}.{name}" if prefix else str(name))
            return LoRA(target_modules=["q_proj"], dim=2).transform(module, name, prefix)

    seen: list[str] = []
    model = tiny_llama()
    Twice()(model)
    randomise(model)
    assert targets(model) == {f"model.layers.{layer}.self_attn.q_proj" for layer in range(2)}
    assert "model.layers.1.mlp.up_proj" in seen
    model(ids(1, 4)).logits.sum().backward()
    assert all((p.grad is not None) == ("lora_" in name) for name, p in model.named_parameters())
