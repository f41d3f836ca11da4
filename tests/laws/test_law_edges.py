"""Odd shapes, layouts, names and neighbours: nothing about them is special."""

from __future__ import annotations

import copy

import pytest
import torch
from harness import MERGEABLE, OPS, adapt, assert_close, assert_unchanged, base_tensors, by_name, dense, state_of
from torch import Tensor, nn

import lorica
from cases import Op
from models import ids, mlp, randomise, tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore:.*groups.*")

BY_NAME = {op.name: op for op in OPS}
# The Conv1D of transformers itself takes contiguous inputs only.
CONTIGUOUS_OR_NOT = [op for op in MERGEABLE if op.differentiable_input and op.name != "transformers-conv1d"]
SHAPES = {
    "linear": [(12,), (1, 12), (0, 12), (2, 0, 12), (2, 1, 3, 12)],
    "transformers-conv1d": [(12,), (0, 12), (2, 1, 3, 12)],
    "conv1d": [(4, 9), (1, 4, 9)],
    "conv2d": [(3, 8, 9), (1, 3, 8, 9)],
    "conv2d-grouped": [(4, 6, 6), (1, 4, 6, 6)],
    "conv3d": [(2, 4, 5, 3)],
    "attention-batch-first": [(5, 12), (1, 1, 12)],
}


@pytest.mark.parametrize(("name", "shape"), [(n, s) for n, shapes in SHAPES.items() for s in shapes], ids=str)
def test_shapes(name: str, shape: tuple[int, ...]) -> None:
    """A vector, no batch, an empty batch."""
    op = BY_NAME[name]
    base = op.build()
    model, x = adapt(base, op), torch.randn(shape)
    out = model(x)
    assert out.shape == base(x).shape
    if op.mergeable:
        assert torch.allclose(out, dense(base, model, 6 / 4)(x), atol=1e-5)
    model.train()(x).sum().backward()


def test_shapes_of_token_ids() -> None:
    op = BY_NAME["embedding"]
    base = op.build()
    model = adapt(base, op)
    for batch in (torch.tensor(3), torch.tensor([], dtype=torch.long), ids(4), ids(1, 2, 3), ids(2, 3).int()):
        assert torch.allclose(model(batch), dense(base, model, 6 / 4)(batch), atol=1e-5)


@pytest.mark.parametrize("op", CONTIGUOUS_OR_NOT, ids=by_name)
def test_strides_of_the_input_do_not_matter(op: Op) -> None:
    model, x = adapt(op.build(), op), op.inputs()
    odd = x.transpose(0, -1).contiguous().transpose(0, -1)
    assert_close(model(odd), model(x), 1e-6)
    assert_close(model(torch.stack([x, x], -1)[..., 0]), model(x), 1e-6)
    assert_close(model(x[:1].expand_as(x)), model(x[:1].expand_as(x).contiguous()), 1e-6)


@pytest.mark.parametrize("name", ["conv2d", "conv2d-same", "conv2d-1x1", "conv2d-no-bias"])
def test_channels_last(name: str) -> None:
    op = BY_NAME[name]
    base = op.build().to(memory_format=torch.channels_last)
    x = op.inputs().to(memory_format=torch.channels_last)
    model = adapt(base, op)
    expected = dense(op.build(), model, 6 / 4)(op.inputs())
    assert_close(model(x), expected, 1e-5)
    before = base_tensors(model)
    model.merge_adapter()
    assert_close(model(x), expected, 1e-5)
    model.unmerge_adapter()
    assert_close(base_tensors(model)["target.weight"], before["target.weight"], 1e-6)
    assert_close(model.merge_and_unload()(x), expected, 1e-5)


def test_a_weight_that_is_a_transposed_view_merges() -> None:
    base = mlp()
    base.lin0.weight = nn.Parameter(base.lin0.weight.detach().T.contiguous().T)
    config = lorica.LoraConfig(target_modules=["lin0"], init_lora_weights=False)
    model, x = lorica.get_peft_model(base, config).eval(), torch.randn(3, 10)
    expected = model(x)
    assert_close(model.merge_and_unload()(x), expected, 1e-5)


class Exponential(nn.Linear):
    """A linear whose output is kept by autograd."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).exp()


def test_an_output_that_autograd_keeps_is_not_overwritten() -> None:
    base = nn.ModuleDict({"target": Exponential(6, 5)})
    model = lorica.get_peft_model(base, lorica.LoraConfig(target_modules=["target"], init_lora_weights=False))
    layer = model.base_model.model["target"]
    x = torch.randn(4, 6, requires_grad=True)
    kept: list[Tensor] = []
    layer.base_layer.register_forward_hook(lambda module, args, out: kept.append(out))
    layer(x).sum().backward()
    assert torch.equal(kept[0], nn.functional.linear(x, layer.base_layer.weight, layer.base_layer.bias).exp())
    assert bool(torch.isfinite(x.grad).all())


@pytest.mark.parametrize("op", OPS, ids=by_name)
def test_inference_mode(op: Op) -> None:
    model = adapt(op.build(), op)
    expected = model(op.inputs())
    with torch.inference_mode():
        assert_close(model(op.inputs()), expected, 1e-5)


@pytest.mark.parametrize("name", ["weight", "lin0", "lora_A", "default2", "base_layer", "model", "ä-ö", "a b", "0"])
def test_any_name_that_is_accepted_works(name: str, tmp_path) -> None:
    """A name may look like a part of a key; it is refused before anything changes, or it works throughout."""
    base = mlp()
    before = state_of(base)
    config = lorica.LoraConfig(target_modules=["lin0"], modules_to_save=["head"], init_lora_weights=False)
    try:
        model = lorica.get_peft_model(base, config, adapter_name=name)
    except ValueError:
        assert_unchanged(base, before)
        return
    randomise(model).eval()
    x = torch.ones(1, 10)
    model.save_pretrained(str(tmp_path))
    again = lorica.PeftModel.from_pretrained(mlp(), str(tmp_path / name), adapter_name="other").eval()
    assert torch.equal(again(x), model(x))
    assert sorted(lorica.get_peft_model_state_dict(model, adapter_name=name)) == [
        "base_model.model.head.bias",
        "base_model.model.head.weight",
        "base_model.model.lin0.lora_A.weight",
        "base_model.model.lin0.lora_B.weight",
    ]


@pytest.mark.parametrize("name", ["keys", "pop", "forward", "training", "items", "type"])
def test_names_that_torch_keeps_for_itself_are_refused_at_once(name: str) -> None:
    base = mlp()
    before = state_of(base)
    with pytest.raises(ValueError, match=name):
        lorica.get_peft_model(base, lorica.LoraConfig(target_modules=["lin0", "lin1"]), adapter_name=name)
    assert_unchanged(base, before)


@pytest.mark.parametrize(
    "fields",
    [
        {"init_lora_weights": "orthogonal", "r": 4, "rank_pattern": {"down_proj": 3}},
        {"modules_to_save": ["layers"]},
        {"modules_to_save": ["lm_head", "layers"]},
        {"lora_bias": True, "target_modules": ["q_proj", "embed_tokens"]},
    ],
    ids=str,
)
def test_a_late_failure_leaves_no_half_adapted_model(fields: dict) -> None:
    base = tiny_llama()
    before, flags = state_of(base), [p.requires_grad for p in base.parameters()]
    config = lorica.LoraConfig(**{"target_modules": ["q_proj", "down_proj"], **fields})
    with pytest.raises((ValueError, TypeError)):
        lorica.get_peft_model(base, config)
    assert_unchanged(base, before)
    assert [p.requires_grad for p in base.parameters()] == flags
    model = lorica.get_peft_model(base, lorica.LoraConfig(target_modules=["q_proj"]))
    before = state_of(model)
    with pytest.raises((ValueError, TypeError)):
        model.add_adapter("other", config)
    assert_unchanged(model, before)
    assert list(model.peft_config) == ["default"]


def test_unloading_leaves_nothing_of_lorica_behind() -> None:
    """No hook, no attribute, no class: a plain torch model again."""
    for build, targets in ((tiny_llama, ["q_proj"]), (encoder, ["linear1", "self_attn"])):
        for name in ("unload", "merge_and_unload"):
            base = build()
            attributes = {key: set(vars(module)) for key, module in base.named_modules()}
            model = lorica.get_peft_model(copy.deepcopy(base), lorica.LoraConfig(target_modules=targets))
            plain = getattr(model, name)()
            assert {key: set(vars(module)) for key, module in plain.named_modules()} == attributes
            for module in plain.modules():
                assert not type(module).__module__.startswith("lorica")
                assert not module._forward_pre_hooks
                assert not module._forward_hooks


def encoder() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.TransformerEncoderLayer(16, 2, 24, batch_first=True, dropout=0.0)).eval()


def test_the_size_of_a_merging_chunk_does_not_matter(monkeypatch) -> None:
    from lorica.storage import deltas

    for op in MERGEABLE:
        base, results = op.build(), []
        for elements in (deltas.CHUNK_ELEMENTS, 1, 25):
            monkeypatch.setattr(deltas, "CHUNK_ELEMENTS", elements)
            results.append(adapt(base, op).merge_and_unload().state_dict())
        for name, tensor in results[0].items():
            assert_close(results[1][name], tensor, 1e-6)
            assert_close(results[2][name], tensor, 1e-6)


def test_two_adapters_in_low_precision_are_rounded_once() -> None:
    """Deltas that are exact in float32, merged in one call."""
    op = BY_NAME["linear"]
    base = op.build().bfloat16()
    model = lorica.get_peft_model(copy.deepcopy(base), op.config(lorica, lora_alpha=2))
    model.add_adapter("other", op.config(lorica, lora_alpha=2))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randint(-7, 8, parameter.shape, generator=generator) / 16)
    layer = model.base_model.model.target
    delta = sum(0.5 * layer.lora_B[name].weight @ layer.lora_A[name].weight for name in ("default", "other"))
    expected = (base.target.weight.float() + delta).bfloat16()
    merged = model.merge_and_unload(adapter_names=["default", "other"])
    assert torch.equal(merged.target.weight, expected)


def test_a_module_that_stands_in_two_places_is_adapted_in_both() -> None:
    base = nn.Module()
    base.first = nn.Linear(5, 5)
    base.second = base.first
    base.forward = lambda x: base.second(base.first(x))  # type: ignore[method-assign]
    model = lorica.get_peft_model(base, lorica.LoraConfig(target_modules=["first"], init_lora_weights=False))
    inner = model.base_model.model
    assert inner.first is inner.second
    x = torch.randn(2, 5)
    expected = inner.second(inner.first(x))
    plain = model.merge_and_unload()
    assert plain.first is plain.second
    assert_close(plain.second(plain.first(x)), expected, 1e-5)


@pytest.mark.parametrize("op", [op for op in OPS if not op.dropout], ids=by_name)
def test_a_dropout_that_has_no_place_is_not_silent(op: Op) -> None:
    """Where nothing can be dropped, asking for it is refused, said, or has an effect."""
    base = op.build()
    if op.name.startswith("attention"):
        with pytest.warns(UserWarning, match="lora_dropout"):
            adapt(base, op, lora_dropout=0.5)
        return
    model = adapt(base, op, lora_dropout=0.5, dropout_position="post").train()
    assert not torch.equal(model(op.inputs()), model(op.inputs()))
