"""A quantised weight is another storage: the same laws as of a plain one, on every kind that can be had here."""

from __future__ import annotations

import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quantised_layers as layers
from lorica import LoraConfig, PeftModel, get_peft_model
from lorica.errors import AdapterError, TargetError
from lorica.storage import Packed, stored_weight

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
TOKENS = 7


def dtype_of(kind: str) -> torch.dtype:
    return torch.float16 if kind in layers.HALF else torch.float32


def made(kind: str, *, bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    return layers.KINDS[kind](layers.dense(bias=bias))


def inputs(kind: str) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(TOKENS, layers.IN, dtype=dtype_of(kind))


def packed(layer: nn.Module) -> Packed:
    stored = stored_weight(layer, "weight")
    assert isinstance(stored, Packed)
    return stored


def adapted(kind: str, **fields: Any) -> PeftModel:
    model = nn.Sequential(made(kind))
    torch.manual_seed(2)
    fields = {"r": 4, "lora_alpha": 6, "target_modules": ["0"], "init_lora_weights": False} | fields
    return get_peft_model(model, LoraConfig(**fields))


def the_layer(model: PeftModel) -> Any:
    return model.base_model.model[0]


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("kind", layers.KINDS)
def test_what_is_read_is_what_the_layer_multiplies_with(kind: str) -> None:
    layer = made(kind)
    x, stored = inputs(kind), packed(layer)
    with torch.no_grad():
        y = layer(x)
        assert stored.shape == (layers.OUT, layers.IN)
        values = stored.dequantize()
    assert values.dtype == torch.float32
    wanted = x.double() @ values.double().T + layer.bias.detach().double()
    assert error(y, wanted) < layers.ROUND_INPUTS.get(kind, 3e-3 if kind in layers.HALF else 1e-6)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", layers.KINDS)
def test_rows_are_the_rows_of_the_whole(kind: str, bias: bool) -> None:
    layer = made(kind, bias=bias)
    stored = packed(layer)
    with torch.no_grad():
        layer(inputs(kind))  # some layers move what they keep in their first forward
        whole = stored.dequantize()
        for rows in (slice(0, 1), slice(5, 6), slice(3, 50), slice(90, 200), slice(None)):
            assert torch.equal(stored[rows].dequantize(), whole[rows])
            assert len(stored[rows]) == len(whole[rows])


@pytest.mark.parametrize("columns", [50, 96])
def test_rows_that_begin_inside_a_block(columns: int) -> None:
    torch.manual_seed(0)
    layer = layers.bnb4(layers.dense(30, columns))  # blocks of 64 numbers lie across rows
    whole = packed(layer).dequantize()
    for start in range(30):
        assert torch.equal(packed(layer)[slice(start, start + 7)].dequantize(), whole[start : start + 7])
    with torch.no_grad():  # whatever the package's kernel makes of such rows, its layer multiplies with the same
        assert error(layer(torch.eye(columns)) - layer.bias, whole.T) < 1e-6


@pytest.mark.parametrize("kind", layers.KINDS)
@pytest.mark.parametrize("fields", [{}, {"use_rslora": True, "lora_bias": True}, {"use_dora": True}], ids=str)
def test_an_adapted_layer_is_the_sum_in_float64(kind: str, fields: dict[str, Any]) -> None:
    model = adapted(kind, **fields)
    layer, x = the_layer(model), inputs(kind)
    if fields.get("use_dora"):
        layer.lora_magnitude_vector["default"].weight.data.uniform_(0.5, 2)
    base = layer.base_layer(x).detach()
    y = model(x)
    y.float().square().sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients.values())
    y, factors, spec = y.detach(), layer.whole_factors("default"), layer.specs["default"]
    weight = packed(layer.base_layer).dequantize().double()
    delta = spec.scaling * factors.b.double() @ factors.a.double()
    part = x.double() @ delta.T + (spec.scaling * factors.bias.double() if factors.bias is not None else 0)
    wanted = base.double() + part
    if fields.get("use_dora"):
        bias = layer.base_layer.bias.detach().double()
        gain = layer.lora_magnitude_vector["default"].weight.detach().double() / (weight + delta).norm(dim=1)
        wanted = gain * (base.double() - bias + part) + bias
    assert error(y, wanted) < (3e-3 if kind in layers.HALF else 1e-6)


@pytest.mark.parametrize("kind", layers.KINDS)
def test_off_means_off_bit_for_bit(kind: str) -> None:
    model = adapted(kind, init_lora_weights=True)
    layer, x = the_layer(model), inputs(kind)
    with torch.no_grad():
        layer.base_layer(x)
        base = layer.base_layer(x)
        assert torch.equal(model(x), base)  # B = 0
        layer.lora_B["default"].weight.normal_()
        assert not torch.equal(model(x), base)
        with model.disable_adapter():
            assert torch.equal(model(x), base)
        assert torch.equal(model.unload()(x), base)


@pytest.mark.parametrize("kind", layers.WRITTEN)
@pytest.mark.parametrize("use_dora", [False, True])
def test_merging_is_as_near_as_quantising_the_wanted_weight_and_unmerging_gives_back_the_bits(
    kind: str, use_dora: bool
) -> None:
    model = adapted(kind, use_dora=use_dora)
    layer, x = the_layer(model), inputs(kind)
    if use_dora:
        layer.lora_magnitude_vector["default"].weight.data.uniform_(0.5, 2)
    factors = layer.whole_factors("default")
    with torch.no_grad():
        y, before = model(x), packed(layer.base_layer).dequantize()
        delta = layer.specs["default"].scaling * factors.b.double() @ factors.a.double()
        wanted = before.double() + delta
        if use_dora:
            gain = layer.lora_magnitude_vector["default"].weight.detach().double() / wanted.norm(dim=1)
            wanted = gain[:, None] * wanted
        with pytest.warns(UserWarning, match=r"stored as (bitsandbytes|torchao|HQQ).*off the wanted weight"):
            model.merge_adapter(safe_merge=True)
        after = packed(layer.base_layer).dequantize()
        fresh = nn.Linear(layers.IN, layers.OUT)
        fresh.weight.data, fresh.bias.data = wanted.float(), layer.base_layer.bias.detach().float()
        again = packed(layers.KINDS[kind](fresh)).dequantize()
        assert error(after, wanted) <= error(again, wanted) * 1.001 + 1e-7
        assert layer.merge_error.weight == pytest.approx(error(after, wanted), rel=1e-3)
        change = (wanted - before.double()).norm()
        assert layer.merge_error.delta == pytest.approx(float((after.double() - wanted).norm() / change), rel=1e-3)
        # What is written is also what the layer multiplies with.
        merged = x.double() @ after.double().T + layer.base_layer.bias.detach().double()
        assert error(model(x), merged) < layers.ROUND_INPUTS.get(kind, 1e-6)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.unmerge_adapter()
        assert torch.equal(packed(layer.base_layer).dequantize(), before)
        assert torch.equal(model(x), y)
        assert layer.merge_error is None


@pytest.mark.filterwarnings("ignore:Merged into")
@pytest.mark.parametrize("kind", layers.WRITTEN)
def test_errors_of_several_merges_do_not_add_up(kind: str) -> None:
    def two() -> PeftModel:
        model = adapted(kind)
        torch.manual_seed(3)
        model.add_adapter("other", LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
        return model

    one_by_one, at_once = two(), two()
    one_by_one.merge_adapter(["default"])
    one_by_one.merge_adapter(["other"])
    at_once.merge_adapter(["default", "other"])
    found, wanted = (packed(the_layer(model).base_layer).dequantize() for model in (one_by_one, at_once))
    assert torch.equal(found, wanted)
    # The norms of a DoRA adapter are those of the weight without what is merged into it.
    plain = the_layer(one_by_one).unmerged_weight()
    plain = plain.dequantize() if isinstance(plain, Packed) else plain
    one_by_one.unmerge_adapter()
    assert torch.equal(plain, packed(the_layer(one_by_one).base_layer).dequantize())


@pytest.mark.filterwarnings("ignore:Merged into")
@pytest.mark.parametrize("kind", layers.WRITTEN)
def test_merge_and_unload_leaves_a_layer_of_the_same_kind_and_keeps_nothing(kind: str) -> None:
    model = adapted(kind)
    layer = the_layer(model)
    cls, base = type(layer.base_layer), layer.base_layer
    merged = model.merge_and_unload()
    assert merged[0] is base
    assert type(merged[0]) is cls
    assert not layer._before
    packed(merged[0])
    with pytest.warns(UserWarning, match="Unmerged from"):
        layer.unmerge()  # by subtracting, since nothing was kept


@pytest.mark.parametrize("kind", layers.READ)
def test_forms_that_are_only_read_refuse_before_anything_is_touched(kind: str) -> None:
    model = adapted(kind)
    layer, x = the_layer(model), inputs(kind)
    with torch.no_grad():
        model(x)
        y = model(x)
        for merge in (model.merge_adapter, model.merge_and_unload, layer.merge):
            with pytest.raises(AdapterError, match=r"^0: a weight stored as (GPTQ|AWQ|AQLM|EETQ|Intel).*lorica merge"):
                merge()
        assert torch.equal(model(x), y)
    with pytest.raises(TargetError, match=r"0: init_lora_weights='pissa' changes the base weight, which is stored as"):
        get_peft_model(nn.Sequential(made(kind)), LoraConfig(target_modules=["0"], init_lora_weights="pissa"))


def test_norms_are_taken_of_rows_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    from lorica.storage.bitsandbytes import FourBit
    from lorica.variants import dora

    read, taken = FourBit.read, []

    def watched(self: Any, base: Any, name: str, rows: slice) -> Tensor:
        taken.append(len(values := read(self, base, name, rows)))
        return values

    monkeypatch.setattr(FourBit, "read", watched)
    monkeypatch.setattr(dora, "CHUNK_ELEMENTS", 8 * layers.IN)
    model = adapted("bitsandbytes nf4", use_dora=True)
    assert max(taken) == 8
    assert sum(taken) == layers.OUT
    taken.clear()
    model.train()
    for _ in range(2):
        model(inputs("bitsandbytes nf4")).sum().backward()
    assert sum(taken) == layers.OUT  # once; then they are known
    with torch.no_grad():
        the_layer(model).lora_B["default"].weight.add_(1)
    model(inputs("bitsandbytes nf4"))
    assert sum(taken) == 2 * layers.OUT


def test_dora_with_dropout_keeps_no_plain_weight_for_the_backward() -> None:
    model = adapted("bitsandbytes nf4", use_dora=True, lora_dropout=0.5).train()
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.dtype.is_floating_point:
            sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(inputs("bitsandbytes nf4").requires_grad_()).sum().backward()
    assert sizes
    assert max(sizes) < layers.OUT * layers.IN


@pytest.mark.parametrize("kind", layers.WRITTEN)
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_start_that_changes_the_weight_quantises_what_is_left_and_says_what_it_cost(
    kind: str, init: str, tmp_path: Any
) -> None:
    plain = packed(made(kind)).dequantize()
    with pytest.warns(UserWarning, match=r"quantised anew.*off the wanted weight"):
        model = adapted(kind, init_lora_weights=init, lora_alpha=4)
    layer = the_layer(model)
    whole = packed(layer.base_layer).dequantize() + layer.get_delta_weight("default")
    assert layer.start_error.weight < 0.15
    assert error(whole, plain) < 0.15
    model.save_pretrained(str(tmp_path))
    with pytest.warns(UserWarning, match="quantised anew"):
        again = PeftModel.from_pretrained(nn.Sequential(made(kind)), str(tmp_path))
    with torch.no_grad():
        assert torch.equal(again.eval()(inputs(kind)), model.eval()(inputs(kind)))


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("kind", layers.KINDS)
def test_a_file_is_the_one_of_a_plain_base_and_loads(kind: str, low_cpu_mem_usage: bool, tmp_path: Any) -> None:
    model = adapted(kind)
    model.save_pretrained(str(tmp_path))
    on_plain = PeftModel.from_pretrained(nn.Sequential(layers.dense()), str(tmp_path))
    again = PeftModel.from_pretrained(nn.Sequential(made(kind)), str(tmp_path), low_cpu_mem_usage=low_cpu_mem_usage)
    for name in ("lora_A", "lora_B"):
        factor = getattr(the_layer(model), name)["default"].weight
        assert factor.dtype == torch.float32
        assert torch.equal(factor, getattr(the_layer(on_plain), name)["default"].weight)
    with torch.no_grad():
        the_layer(again).base_layer(inputs(kind))
        the_layer(model).base_layer(inputs(kind))
        assert torch.equal(again.eval()(inputs(kind)), model.eval()(inputs(kind)))


@pytest.mark.parametrize("kind", layers.KINDS)
def test_all_linear_finds_them(kind: str) -> None:
    model = get_peft_model(nn.Sequential(made(kind), nn.ReLU()), LoraConfig(target_modules="all-linear"))
    assert model.targeted_module_names == ["0"]


def test_the_broken_are_found_before_the_weight_is_touched() -> None:
    model = adapted("bitsandbytes nf4")
    layer = the_layer(model)
    bits = layer.base_layer.weight.data.clone()
    layer.lora_B["default"].weight.data[0, 0] = torch.nan
    with pytest.raises(AdapterError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(layer.base_layer.weight.data, bits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_merged_layer_computes_in_the_dtype_it_had(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    base = layers.bnb4(layers.dense(dtype=dtype))
    model = get_peft_model(nn.Sequential(base), LoraConfig(target_modules=["0"], init_lora_weights=False))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    with pytest.warns(UserWarning, match="nf4"):
        merged = model.merge_and_unload()
    assert merged[0].weight.quant_state.dtype == dtype
    assert torch.equal(packed(merged[0]).dequantize(), packed(merged[0]).dequantize().to(dtype).float())


def test_eight_bits_beyond_float16() -> None:
    """Scales are found in float32: the package's own quantisation passes through float16, whose largest is 65504."""
    model = adapted("bitsandbytes int8")
    layer = the_layer(model)
    layer.lora_B["default"].weight.data.fill_(1e5)
    layer.lora_A["default"].weight.data.fill_(1)
    with pytest.warns(UserWarning, match="quantised anew"):
        model.merge_adapter()
    assert layer.merge_error.weight < 0.01


def test_rows_of_zeros_stay() -> None:
    layer = layers.dense(4, 64)
    layer.weight.data[2] = 0
    model = get_peft_model(nn.Sequential(layers.bnb8(layer)), LoraConfig(target_modules=["0"], init_lora_weights=True))
    with pytest.warns(UserWarning, match="quantised anew"):
        model.merge_adapter()
    values = the_layer(model).base_weight
    assert values.isfinite().all()
    assert not values[2].any()


def test_an_adapter_on_a_quantised_embedding() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    made = bnb.nn.EmbeddingNF4(32, 64)
    made.weight = bnb.nn.Params4bit(torch.randn(32, 64), quant_type="nf4", module=made)
    model = get_peft_model(
        nn.Sequential(made.to("cpu")), LoraConfig(target_modules=["0"], r=2, init_lora_weights=False, use_dora=True)
    )
    ids = torch.tensor([[1, 5, 5, 31]])
    y = model(ids)
    layer = the_layer(model)
    delta = layer.get_delta_weight("default")
    assert error(y.detach(), (layer.base_weight + delta)[ids].detach()) < 1e-6
    with pytest.warns(UserWarning, match="nf4"):
        model.merge_adapter()
    model.unmerge_adapter()
    assert torch.equal(model(ids), y)


def test_neither_importing_nor_adapting_a_plain_model_imports_a_quantiser() -> None:
    program = (
        "import sys, torch, lorica; m = lorica.get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), "
        "lorica.LoraConfig(target_modules=['0'], use_dora=True)); m(torch.ones(1, 4)); m.merge_and_unload(); "
        "print([n for n in ('bitsandbytes', 'torchao', 'hqq', 'gptqmodel', 'aqlm', 'eetq') if n in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_tensors_of_torchao_whose_grid_is_not_known_are_read_through_their_product_and_refused() -> None:
    utils = pytest.importorskip("torchao.utils")

    class Opaque(utils.TorchAOBaseTensor):
        """A weight packed for a kernel: it can be multiplied with, and nothing else."""

        @staticmethod
        def __new__(cls, numbers: Tensor) -> Opaque:
            return torch.Tensor._make_wrapper_subclass(cls, numbers.shape, dtype=numbers.dtype, device=numbers.device)

        def __init__(self, numbers: Tensor) -> None:
            super().__init__()
            self.numbers = numbers

        @classmethod
        def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function is nn.functional.linear:
                return nn.functional.linear(args[0], args[1].numbers, *args[2:])
            return super().__torch_function__(function, types, args, kwargs or {})

        def detach(self) -> Opaque:
            return self

        def dequantize(self) -> Tensor:
            raise NotImplementedError

    def opaque(layer: nn.Linear) -> nn.Linear:
        numbers = layer.weight.detach()
        del layer.weight
        layer.weight = Opaque(numbers)
        return layer

    torch.manual_seed(0)
    plain = layers.dense()
    wanted = plain.weight.detach().clone()
    first, second = (
        nn.Sequential(opaque(plain)),
        nn.Sequential(layers.bnb4(layers.dense()), opaque(layers.dense(64, 96))),
    )
    assert error(packed(first[0]).dequantize(), wanted) < 1e-6
    model = get_peft_model(second, LoraConfig(target_modules=["0", "1"], init_lora_weights=False, use_dora=True))
    bits = second[0].base_layer.weight.data.clone()
    with pytest.raises(AdapterError, match=r"^1: a weight stored as torchao Opaque cannot take a delta: only Float8"):
        model.merge_adapter()
    assert torch.equal(second[0].base_layer.weight.data, bits)  # the layer before it was not merged either


@pytest.mark.parametrize("name", ["linear.Linear", "layernorm_linear.LayerNormLinear"])
def test_layers_of_transformer_engine_are_found_by_name(name: str) -> None:
    module, _, cls = name.rpartition(".")

    class Engine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.in_features, self.out_features = layers.IN, layers.OUT
            self.weight = nn.Parameter(torch.randn(layers.OUT, layers.IN))
            self.bias = nn.Parameter(torch.randn(layers.OUT))

        def forward(self, x: Tensor) -> Tensor:
            x = nn.functional.layer_norm(x, x.shape[-1:]) if cls != "Linear" else x
            return nn.functional.linear(x, self.weight, self.bias)

    named = type(cls, (Engine,), {"__module__": f"transformer_engine.pytorch.module.{module}", "__qualname__": cls})
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(named()), LoraConfig(r=4, target_modules=["0"], init_lora_weights=False))
    x, layer = inputs("TransformerEngine"), the_layer(model)
    with torch.no_grad():
        y = model(x)
        factors, scale = layer.whole_factors("default"), layer.specs["default"].scaling
        part = y - layer.base_layer(x)
        assert error(part, scale * x.double() @ factors.a.double().T @ factors.b.double().T) < 1e-5
        if cls == "Linear":
            model.merge_adapter()
            assert error(model(x), y) < 1e-6
        else:
            with pytest.raises(TargetError, match="A sees the input before it is normalised"):
                model.merge_adapter()
            with pytest.raises(TargetError, match="use_dora"):
                get_peft_model(nn.Sequential(named()), LoraConfig(target_modules=["0"], use_dora=True))
