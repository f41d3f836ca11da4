"""Batches of several adapters: every row is what it would be alone, on every layer, and nothing stays behind."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lorica
import mixtures
import models
from cases import OPS, Op
from lorica.layers import LoraLayer, products

NAMES = ["b", "default", "__base__", "c", "b", "default", "c"]


def adapted(base: nn.Module, configs: dict[str, Any]) -> nn.Module:
    """A model with random adapters."""
    (first, config), *rest = configs.items()
    model = lorica.get_peft_model(base, config, adapter_name=first)
    for name, more in rest:
        model.add_adapter(name, more)
    return models.randomise(model).eval()


def alone(model: nn.Module, run: Any, names: list[str], batch: Tensor) -> Tensor:
    """Each row by itself, with its adapter."""
    active, rows = model.active_adapter, []
    for index, name in enumerate(names):
        row = batch[index : index + 1]
        if name == "__base__":
            with model.disable_adapter():
                rows.append(run(model, row))
        else:
            model.set_adapter(name)
            rows.append(run(model, row))
    model.set_adapter(active)
    return torch.cat(rows)


def logits(model: nn.Module, batch: Tensor, **kwargs: Any) -> Tensor:
    output = model(batch, **kwargs)
    return output if isinstance(output, Tensor) else output.logits


def same(got: Tensor, wanted: Tensor, tolerance: float = 2e-6) -> None:
    assert got.shape == wanted.shape
    assert (got - wanted).norm() <= tolerance * wanted.norm()


def rows_of(op: Op, count: int) -> Tensor:
    """A batch of an operation, of as many rows as there are names."""
    one = op.inputs()[:1]
    if one.is_floating_point():
        return torch.randn(count, *one.shape[1:], generator=torch.Generator().manual_seed(5))
    return models.ids(count, *one.shape[1:])


VARIANTS = [
    {},
    {"lora_bias": True},
    {"use_dora": True},
    {"use_rslora": True, "lora_dropout": 0.5},
]


@pytest.mark.parametrize("fields", VARIANTS, ids=str)
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "grad"])
def test_every_row_is_what_it_is_alone(op: Op, fields: dict[str, Any], grad: bool) -> None:
    if op.name.startswith("attention"):
        pytest.skip("its rows stand in another dimension; see below")
    configs = {
        name: op.config(lorica, r=r, **{**fields, **({"lora_bias": False} if not op.lora_bias else {})})
        for name, r in (("default", 4), ("b", op.ranks[-1]), ("c", 4))
    }
    configs["c"].use_dora = False  # so that variants meet in one batch
    try:
        model = adapted(op.build(), configs)
    except (lorica.errors.TargetError, lorica.errors.ConfigError) as refusal:
        pytest.skip(str(refusal))
    batch = rows_of(op, len(NAMES))
    with torch.set_grad_enabled(grad):
        same(model(batch, adapter_names=NAMES), alone(model, logits, NAMES, batch))
    assert model.base_model.switch.rows is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 20])
def test_tokens_and_prompts_of_any_length(tokens: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 10)).to(dtype).eval()
    fields = {
        "default": {"r": 4, "lora_alpha": 6, "lora_bias": True},
        "b": {"r": 2, "lora_alpha": 1},
        "c": {"r": 4, "lora_alpha": 20, "use_dora": True},
    }
    configs = {name: lorica.LoraConfig(target_modules=["0"], **given) for name, given in fields.items()}
    model = adapted(net, configs)
    x = models.floats(7, tokens, 12).to(dtype)
    with torch.no_grad():
        same(model(x, adapter_names=NAMES), alone(model, logits, NAMES, x), 2e-6 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("first", [True, False], ids=["rows first", "rows second"])
@pytest.mark.parametrize("masked", ["", "padding", "causal", "heads"])
def test_attention_wherever_its_rows_stand(first: bool, masked: str) -> None:
    torch.manual_seed(0)
    net = nn.ModuleDict({"attention": nn.MultiheadAttention(12, 3, batch_first=first)}).eval()
    config = {"target_modules": ["attention"], "r": 4, "init_lora_weights": False}
    model = adapted(net, {name: lorica.LoraConfig(**config) for name in ("default", "b", "c")})
    attention, count = model.base_model.model.attention, len(NAMES)
    x = models.floats(count, count, 12)  # as many tokens as rows, so that nothing tells the dimensions apart

    def run(model: nn.Module, x: Tensor, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        masks: dict[str, Any] = {}
        if masked == "padding":
            masks["key_padding_mask"] = (torch.arange(count) > torch.arange(1, count + 1).unsqueeze(1))[rows]
        elif masked == "causal":
            masks["attn_mask"] = torch.ones(count, count, dtype=torch.bool).triu(1)
        elif masked == "heads":
            masks["attn_mask"] = models.floats(count, 3, count, count)[rows].flatten(0, 1)
        turned = x if first else x.transpose(0, 1)
        values, weights = attention(turned, turned, turned, **masks)
        return (values if first else values.transpose(0, 1)), weights

    with torch.no_grad():
        with lorica.route_rows(model, NAMES):
            got = run(model, x)
        for index, name in enumerate(NAMES):
            model.base_model.switch.enabled = name != "__base__"
            model.set_adapter("b" if name == "__base__" else name)
            for part, wanted in zip(got, run(model, x[index : index + 1], slice(index, index + 1)), strict=True):
                same(part[index : index + 1], wanted)


@pytest.mark.parametrize("kind", mixtures.KINDS)
@pytest.mark.parametrize("tokens", [1, 6])
def test_experts_and_routers_see_the_tokens_of_one_adapter_at_a_time(kind: str, tokens: int) -> None:
    router = {"gpt_oss": ["mlp.router.weight"], "deepseek_v3": []}.get(kind, ["mlp.gate.weight"])
    configs = {
        "default": {"r": 4, "target_parameters": [*mixtures.STACKS, *router]},
        "b": {"r": 2, "target_parameters": mixtures.STACKS[:1], "target_modules": ["o_proj"]},
        "c": {"r": 4, "target_parameters": mixtures.STACKS, "share_expert_adapters": True},
    }
    model = adapted(
        mixtures.moe(kind, implementation="eager"),
        {
            name: lorica.LoraConfig(**{"target_modules": [], "lora_alpha": 6, **fields})
            for name, fields in configs.items()
        },
    )
    batch = models.ids(7, tokens)
    with torch.no_grad():
        same(logits(model, batch, adapter_names=NAMES), alone(model, logits, NAMES, batch), 1e-5)


def test_whole_copies_of_modules_are_each_rows_own() -> None:
    config = {"target_modules": ["q_proj"], "init_lora_weights": False}
    model = adapted(
        models.tiny_llama(),
        {
            "default": lorica.LoraConfig(**config, modules_to_save=["lm_head", "mlp"]),
            "b": lorica.LoraConfig(**config, modules_to_save=["lm_head"]),
            "c": lorica.LoraConfig(**config),
        },
    )
    batch = models.ids(7, 4)
    with torch.no_grad():
        same(logits(model, batch, adapter_names=NAMES), alone(model, logits, NAMES, batch))


@pytest.mark.parametrize("tokens", [1, 4, 12])
def test_gradients_of_a_mixed_batch_are_those_of_its_rows(tokens: int) -> None:
    config = {"target_modules": ["v_proj", "down_proj", "embed_tokens"], "init_lora_weights": False}
    model = adapted(models.tiny_llama(), {name: lorica.LoraConfig(**config) for name in ("default", "b", "c")})
    model.set_requires_grad(["default", "b", "c"])
    batch, found = models.ids(7, tokens), []
    weights = torch.linspace(-1, 1, 7 * tokens * models.VOCABULARY).view(7, tokens, -1)
    for output in (logits(model, batch, adapter_names=NAMES), alone(model, logits, NAMES, batch)):
        model.set_requires_grad(["default", "b", "c"])
        factors = [p for n, p in model.named_parameters() if "lora_" in n]
        found.append(torch.autograd.grad((output * weights).sum(), factors))
    for mixed, single in zip(*found, strict=True):
        same(mixed, single, 1e-5)


def test_beams_and_samples_repeat_the_rows() -> None:
    config = {"target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}
    model = adapted(models.tiny_llama(), {name: lorica.LoraConfig(**config) for name in ("default", "b", "c")})
    batch = models.ids(7, 4)
    options = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 5, "do_sample": False}

    def run(model: nn.Module, row: Tensor, **names: Any) -> Tensor:
        return model.generate(input_ids=row, attention_mask=torch.ones_like(row), min_new_tokens=5, **options, **names)

    assert torch.equal(run(model, batch, adapter_names=NAMES), alone(model, run, NAMES, batch))
    assert model.base_model.switch.rows is None


def test_a_model_without_a_wrapper_is_routed_by_a_block() -> None:
    base = models.tiny_llama()
    config = lorica.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    lorica.inject_adapter_in_model(config, base, "default")
    lorica.inject_adapter_in_model(config, base, "b")
    models.randomise(base).eval()
    batch = models.ids(3, 4)
    with torch.no_grad():
        with lorica.route_rows(base, ["b", "__base__", "default"]):
            got = base(batch).logits
            again = base(batch[:, :1]).logits
        plain = models.tiny_llama()(batch[1:2]).logits
        assert torch.equal(got[1:2], plain)
        (active,) = next(module for module in base.modules() if isinstance(module, LoraLayer)).active_adapters
        for row, name in ((0, "b"), (2, "default")):
            apart = (got[row] - base(batch).logits[row]).norm() / got[row].norm()
            assert (apart < 1e-5) == (name == active)
    assert again.shape == (3, 1, models.VOCABULARY)


def test_nothing_stays_behind_when_a_forward_raises() -> None:
    model = adapted(models.tiny_llama(), {"default": lorica.LoraConfig(target_modules=["q_proj"])})
    batch = models.ids(2, 3)
    before = logits(model, batch)

    def fail(*args: Any) -> None:
        raise RuntimeError("in the middle")

    hook = model.get_base_model().model.layers[1].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        model(batch, adapter_names=["__base__", "default"])
    hook.remove()
    assert model.base_model.switch.rows is None
    assert torch.equal(logits(model, batch), before)


def test_names_of_a_model_that_is_turned_off_mean_nothing() -> None:
    model = adapted(models.tiny_llama(), {"default": lorica.LoraConfig(target_modules=["q_proj"])})
    batch = models.ids(2, 3)
    with model.disable_adapter():
        assert torch.equal(logits(model, batch, adapter_names=["default"] * 2), models.tiny_llama()(batch).logits)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["default"], "Length of `adapter_names` should be the same as the number of inputs, but got 1 and 2"),
        (["default", "defualt"], "non-existing adapter.*defualt.*Did you mean 'default'"),
        ("ab", "expected a list of str"),
    ],
)
def test_rows_that_cannot_be_meant_are_refused(names: Any, message: str) -> None:
    model = adapted(models.tiny_llama(), {"default": lorica.LoraConfig(target_modules=["q_proj"])})
    with pytest.raises((ValueError, TypeError), match=message):
        model(models.ids(2, 3), adapter_names=names)
    assert model.base_model.switch.rows is None


def test_merged_adapters_and_training_are_refused() -> None:
    model = adapted(models.tiny_llama(), {"default": lorica.LoraConfig(target_modules=["q_proj"])})
    model.train()
    with pytest.raises(ValueError, match="training mode"):
        model(models.ids(2, 3), adapter_names=["default"] * 2)
    model.eval()
    model.merge_adapter()
    with pytest.raises(ValueError, match="when there are merged adapters, please call `unmerge_adapter` first"):
        model(models.ids(2, 3), adapter_names=["default"] * 2)


class Sizes(TorchDispatchMode):
    """How often a product of some width is computed, and over how many rows."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.rows = width, []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        names = ("mm", "addmm", "addmm_", "bmm", "baddbmm_")
        if func.overloadpacket.__name__ in names and out.shape[-1] == self.width:
            self.rows.append(out.numel() // self.width)
        return out


@pytest.mark.parametrize("batched", [False, True])
def test_the_base_layer_runs_once_and_each_adapter_on_its_rows_only(batched: bool, monkeypatch: Any) -> None:
    monkeypatch.setattr(products, "RUN", 2**30 if batched else 0)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 33, bias=False)).eval()
    configs = {name: lorica.LoraConfig(target_modules=["0"], r=2, init_lora_weights=False) for name in ("default", "b")}
    model = adapted(net, configs)
    x = torch.randn(6, 20, 8)
    with torch.no_grad(), Sizes(33) as seen:
        model(x, adapter_names=["b", "b", "__base__", "default", "default", "__base__"])
    assert seen.rows[0] == 6 * 20
    assert sum(seen.rows[1:]) == 4 * 20


def test_the_factors_of_a_block_are_stacked_once() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8)).eval()
    configs = {name: lorica.LoraConfig(target_modules=["0"], r=2, init_lora_weights=False) for name in ("default", "b")}
    model = adapted(net, configs)
    (layer,) = (module for module in model.modules() if isinstance(module, LoraLayer))
    asked, matrices = [], type(layer.op).matrices

    class Counting(type(layer.op)):
        def matrices(self, *args: Any) -> Any:
            asked.append(args)
            return matrices(self, *args)

    layer.op = Counting()
    x = torch.randn(4, 1, 8)
    with torch.no_grad(), lorica.route_rows(model, ["b", "default", "b", "__base__"]):
        first = model(x)
        assert len(asked) == 2
        assert torch.equal(model(x), first)
        assert len(asked) == 2
    with torch.no_grad():
        model.base_model.model[0].lora_B["b"].weight.add_(1)
        assert not torch.equal(model(x, adapter_names=["b", "default", "b", "__base__"]), first)


def test_a_copy_of_a_model_has_rows_of_its_own() -> None:
    model = adapted(models.tiny_llama(), {"default": lorica.LoraConfig(target_modules=["q_proj"])})
    with lorica.route_rows(model, ["default", "__base__"]):
        twin = copy.deepcopy(model)
    assert model.base_model.switch.rows is None
    assert twin.base_model.switch is not model.base_model.switch
