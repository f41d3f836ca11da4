"""A file is used whole or not at all: what is wrong with it is named, and the model stays as it was."""

from __future__ import annotations

import copy
import json
import struct
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from harness import assert_unchanged, state_of
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lorica
from models import mlp, randomise

BATCH = torch.linspace(-1, 1, 30).view(3, 10)
WEIGHTS = "adapter_model.safetensors"
A = "base_model.model.lin0.lora_A.weight"
B = "base_model.model.lin1.lora_B.weight"
HEAD = "base_model.model.head.weight"
Tensors = dict[str, Tensor]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A directory with a good adapter."""
    config = lorica.LoraConfig(target_modules=["lin0", "lin1"], r=4, modules_to_save=["head"])
    randomise(lorica.get_peft_model(mlp(), config)).save_pretrained(str(tmp_path))
    return tmp_path


def rewrite(path: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(path / WEIGHTS)
    change(tensors)
    save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})


def set_value(name: str, value: float) -> Callable[[Tensors], object]:
    return lambda tensors: tensors[name].view(-1).__setitem__(-1, value)


DAMAGE: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "missing A": (lambda t: t.pop(A), "lin0.*lora_A"),
    "missing B": (lambda t: t.pop(B), "lin1.*lora_B"),
    "missing saved module": (lambda t: t.pop(HEAD), "head"),
    "unexpected": (lambda t: t.update({"base_model.model.lin7.lora_A.weight": torch.ones(4, 10)}), "lin7"),
    "unexpected base weight": (lambda t: t.update({"base_model.model.lin9.weight": torch.ones(4)}), "lin9"),
    "no prefix": (lambda t: t.update({"lin0.lora_A.weight": t.pop(A)}), "lin0.*lora_A"),
    "rank too large": (lambda t: t.update({A: torch.ones(5, 10)}), "lin0.*lora_A"),
    "transposed": (lambda t: t.update({A: torch.ones(10, 4)}), "lin0.*lora_A"),
    "flattened": (lambda t: t.update({B: torch.ones(80)}), "lin1.*lora_B"),
    "empty": (lambda t: t.update({B: torch.ones(0, 4)}), "lin1.*lora_B"),
    "saved module mis-shaped": (lambda t: t.update({HEAD: torch.ones(3, 20)}), "head"),
    "not a number": (set_value(A, torch.nan), "lin0.*lora_A"),
    "infinite": (set_value(B, -torch.inf), "lin1.*lora_B"),
    "saved module not finite": (set_value(HEAD, torch.inf), "head"),
}
LENIENT = ["missing A", "missing B", "missing saved module", "unexpected", "unexpected base weight"]


def model_with_adapter() -> nn.Module:
    config = lorica.LoraConfig(target_modules=["lin0"], init_lora_weights=False)
    return lorica.get_peft_model(mlp(), config).eval()


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_refused_by_a_model_that_stays_as_it_was(damage: str, saved: Path) -> None:
    change, names = DAMAGE[damage]
    rewrite(saved, change)
    model = model_with_adapter()
    before, out, configs = state_of(model), model(BATCH), list(model.peft_config)
    with pytest.raises(ValueError, match=names):
        model.load_adapter(str(saved), adapter_name="other")
    assert_unchanged(model, before)
    assert list(model.peft_config) == configs
    assert model.active_adapters == ["default"]
    assert torch.equal(model(BATCH), out)


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_damaged_file_leaves_the_base_model_alone(damage: str, low_cpu_mem_usage: bool, saved: Path) -> None:
    change, names = DAMAGE[damage]
    rewrite(saved, change)
    base = mlp()
    before = state_of(base)
    flags = [p.requires_grad for p in base.parameters()]
    with pytest.raises(ValueError, match=names):
        lorica.PeftModel.from_pretrained(base, str(saved), low_cpu_mem_usage=low_cpu_mem_usage)
    assert_unchanged(base, before)
    assert [p.requires_grad for p in base.parameters()] == flags
    assert not hasattr(base, "peft_config")


@pytest.mark.parametrize("damage", sorted(set(DAMAGE) - {"no prefix"}))
def test_leniency_is_for_missing_and_unexpected_only(damage: str, saved: Path) -> None:
    change, names = DAMAGE[damage]
    rewrite(saved, change)
    if damage in LENIENT:
        for low in (False, True):
            with pytest.warns(UserWarning, match=names):
                model = lorica.PeftModel.from_pretrained(mlp(), str(saved), strict=False, low_cpu_mem_usage=low)
            assert not any(p.is_meta for p in model.parameters())
            assert bool(torch.isfinite(model(BATCH)).all())
        with pytest.warns(UserWarning, match=names):
            model_with_adapter().load_adapter(str(saved), adapter_name="other", strict=False)
    else:
        with pytest.raises(ValueError, match=names):
            lorica.PeftModel.from_pretrained(mlp(), str(saved), strict=False)


def header(path: Path, change: Callable[[dict], object]) -> None:
    """Rewrite the JSON header of a safetensors file, and leave the data alone."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    fields = json.loads(data[8 : 8 + length])
    change(fields)
    text = json.dumps(fields).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


BYTES: dict[str, Callable[[Path], object]] = {
    "empty": lambda p: p.write_bytes(b""),
    "truncated header": lambda p: p.write_bytes(p.read_bytes()[:20]),
    "truncated data": lambda p: p.write_bytes(p.read_bytes()[:-7]),
    "trailing data": lambda p: p.write_bytes(p.read_bytes() + b"more"),
    "absurd header length": lambda p: p.write_bytes(struct.pack("<Q", 2**62) + p.read_bytes()[8:]),
    "no json": lambda p: p.write_bytes(p.read_bytes()[:8] + b"x" * len(p.read_bytes()[8:])),
    "a pickle": lambda p: torch.save({A: torch.ones(4, 10)}, p),
    "absurd shape": lambda p: header(p, lambda h: h[A].update(shape=[2**40, 2**40])),
    "negative shape": lambda p: header(p, lambda h: h[A].update(shape=[-4, -10])),
    "offsets outside": lambda p: header(p, lambda h: h[A].update(data_offsets=[0, 2**50])),
    "unknown type": lambda p: header(p, lambda h: h[A].update(dtype="Q99")),
}


@pytest.mark.parametrize("damage", BYTES)
def test_bytes_that_are_not_safetensors_are_refused(damage: str, saved: Path) -> None:
    BYTES[damage](saved / WEIGHTS)
    model = model_with_adapter()
    before = state_of(model)
    with pytest.raises(ValueError, match=WEIGHTS.replace(".", r"\.")):
        model.load_adapter(str(saved), adapter_name="other")
    assert_unchanged(model, before)
    with pytest.raises(ValueError, match=WEIGHTS.replace(".", r"\.")):
        lorica.PeftModel.from_pretrained(mlp(), str(saved))


CONFIGS = {
    "no json": "{",
    "a list": "[]",
    "not lora": json.dumps({"peft_type": "PREFIX_TUNING", "task_type": None}),
    "no type": json.dumps({"r": 3, "target_modules": ["lin0"]}),
    "rank zero": json.dumps({"peft_type": "LORA", "task_type": None, "r": 0, "target_modules": ["lin0"]}),
    "rank a word": json.dumps({"peft_type": "LORA", "task_type": None, "r": "many", "target_modules": ["lin0"]}),
}


@pytest.mark.parametrize("damage", CONFIGS)
@pytest.mark.filterwarnings("ignore")
def test_a_damaged_config_is_refused(damage: str, saved: Path) -> None:
    (saved / "adapter_config.json").write_text(CONFIGS[damage])
    base = mlp()
    before = state_of(base)
    with pytest.raises((ValueError, TypeError), match=r"config|peft_type|\br\b|rank"):
        lorica.PeftModel.from_pretrained(base, str(saved))
    assert_unchanged(base, before)


def test_a_pickled_adapter_is_refused(saved: Path) -> None:
    """Nothing that is loaded can run code."""
    torch.save(load_file(saved / WEIGHTS), saved / "adapter_model.bin")
    (saved / WEIGHTS).unlink()
    base = mlp()
    before = state_of(base)
    with pytest.raises(ValueError, match=r"safetensors"):
        lorica.PeftModel.from_pretrained(base, str(saved))
    assert_unchanged(base, before)
    model = model_with_adapter()
    with pytest.raises(ValueError, match=r"safetensors"):
        model.save_pretrained(str(saved), safe_serialization=False)


@pytest.mark.parametrize("missing", [WEIGHTS, "adapter_config.json"])
def test_a_missing_file_is_named(missing: str, saved: Path) -> None:
    (saved / missing).unlink()
    base = mlp()
    before = state_of(base)
    with pytest.raises((ValueError, OSError), match=missing.replace(".", r"\.")):
        lorica.PeftModel.from_pretrained(base, str(saved))
    assert_unchanged(base, before)


def test_a_rank_that_disagrees_with_its_config_is_refused(saved: Path) -> None:
    path = saved / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "r": 2}))
    with pytest.raises(ValueError, match=r"lin0|lin1"):
        lorica.PeftModel.from_pretrained(mlp(), str(saved))


def test_saving_what_is_not_finite_is_not_silent(tmp_path: Path) -> None:
    """A broken adapter is found when it is written, or at the latest when it is read."""
    model = model_with_adapter()
    with torch.no_grad():
        model.base_model.model.lin0.lora_A["default"].weight[0, 0] = torch.nan
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.save_pretrained(str(tmp_path))
    except (ValueError, UserWarning):
        return
    with pytest.raises(ValueError, match="lin0"):
        lorica.PeftModel.from_pretrained(mlp(), str(tmp_path))


def test_saving_again_replaces_the_file_whole(saved: Path) -> None:
    """No temporary file is left behind, and what was there is gone."""
    names = sorted(p.name for p in saved.iterdir())
    model = randomise(lorica.PeftModel.from_pretrained(mlp(), str(saved)), seed=8)
    model.save_pretrained(str(saved))
    assert sorted(p.name for p in saved.iterdir()) == names
    again = lorica.PeftModel.from_pretrained(mlp(), str(saved))
    assert torch.equal(again(BATCH), model(BATCH))


def test_a_model_card_keeps_what_a_person_wrote(saved: Path) -> None:
    card = saved / "README.md"
    card.write_text(card.read_text() + "\n## My own words\n")
    lorica.PeftModel.from_pretrained(mlp(), str(saved)).save_pretrained(str(saved))
    assert "## My own words" in card.read_text()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("autocast", [True, False])
def test_values_survive_a_round_trip(dtype: torch.dtype, autocast: bool, tmp_path: Path) -> None:
    base = mlp().to(dtype)
    config = lorica.LoraConfig(target_modules=["lin0"], init_lora_weights=False)
    model = lorica.get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=autocast).eval()
    model.save_pretrained(str(tmp_path))
    again = lorica.PeftModel.from_pretrained(base, str(tmp_path), autocast_adapter_dtype=autocast).eval()
    for name, tensor in model.state_dict().items():
        assert again.state_dict()[name].dtype == tensor.dtype, name
        assert torch.equal(again.state_dict()[name], tensor), name
    assert torch.equal(again(BATCH.to(dtype)), model(BATCH.to(dtype)))


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32", "float64"])
def test_factors_have_the_dtype_that_was_asked_for(name: str, tmp_path: Path) -> None:
    config = lorica.LoraConfig(target_modules=["lin0"], lora_dtype=name, init_lora_weights=False)
    model = lorica.get_peft_model(mlp(), config).eval()
    factors = [p for n, p in model.named_parameters() if "lora_" in n]
    assert {p.dtype for p in factors} == {getattr(torch, name)}
    assert model(BATCH).dtype == torch.float32
    model.save_pretrained(str(tmp_path))
    again = lorica.PeftModel.from_pretrained(mlp(), str(tmp_path)).eval()
    assert {p.dtype for n, p in again.named_parameters() if "lora_" in n} == {getattr(torch, name)}
    assert torch.equal(again(BATCH), model(BATCH))
