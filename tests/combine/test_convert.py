"""``convert_to_lora``: the nearest plain LoRA of whatever an adapter does to its weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from test_weighted import adapted
from torch import Tensor, nn

import lorica
from cases import OPS, Op
from lorica.adapt.inject import lora_layers
from lorica.combine import Conversion, convert_to_lora, save_as_lora
from mixtures import STACKS, deltas, moe
from models import MLP, floats

BY_NAME = {op.name: op for op in OPS}
PLAIN = "ignore:Converting a PEFT adapter to LoRA that is already a LoRA adapter"
pytestmark = pytest.mark.filterwarnings(PLAIN)


def run(model: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x).double()


def reloaded(base: nn.Module, model: Any, rank: Any, folder: Path, **arguments: Any) -> Any:
    save_as_lora(folder, model, rank, **arguments)
    return lorica.PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()


@pytest.mark.parametrize("op", [op for op in OPS if "attention" not in op.name], ids=lambda op: op.name)
@pytest.mark.parametrize("fields", [{}, {"use_rslora": True}], ids=["plain", "rslora"])
def test_enough_rank_gives_the_adapter_again(op: Op, fields: dict[str, Any], tmp_path: Path):
    base = op.build()
    model = adapted(copy.deepcopy(base), op.config(lorica, lora_bias=op.lora_bias, **fields))
    x = op.inputs()
    found = reloaded(base, model, 4, tmp_path)
    assert torch.allclose(run(found, x), run(model, x), atol=2e-5 * float(run(model, x).abs().max()))


@pytest.mark.parametrize("op", ["linear", "transformers-conv1d", "embedding", "conv2d"])
def test_dora_of_full_rank_is_exact_and_of_less_is_the_nearest(op: str, tmp_path: Path):
    case = BY_NAME[op]
    base = case.build()
    model = adapted(copy.deepcopy(base), case.config(lorica, use_dora=True))
    (layer,) = lora_layers(model)
    plain = layer.base_weight.clone()
    x, wanted = case.inputs(), run(model, case.inputs())
    side = min(plain.flatten(1).shape)
    assert torch.allclose(run(reloaded(base, model, side, tmp_path / "full"), x), wanted, atol=1e-4)
    reports: list[Conversion] = []
    loaded = reloaded(base, model, 3, tmp_path / "less", report=reports.append)
    layer.merge()
    change = (layer.base_weight - plain).flatten(1).double()
    u, s, v = torch.linalg.svd(change, full_matrices=False)
    found = lora_layers(loaded)[0].get_delta_weight("default").flatten(1).double()
    assert float((found - (u[:, :3] * s[:3]) @ v[:3]).norm() / change.norm()) < 2e-5
    assert reports[0].rank == 3
    assert reports[0].error == pytest.approx(float(s[3:].norm() / s.norm()), rel=1e-3)


@pytest.mark.parametrize("share", [0.3, 0.8, 0.999, 1.0])
def test_a_share_of_the_energy_gives_each_layer_its_least_rank(share: float, tmp_path: Path):
    fields = {"r": 6, "target_modules": ["lin0", "lin1"], "lora_alpha": 9}
    base = MLP().eval()
    model = adapted(copy.deepcopy(base), lorica.LoraConfig(**fields))
    reports: list[Conversion] = []
    loaded = reloaded(base, model, share, tmp_path, report=reports.append)
    for layer, new, told in zip(lora_layers(model), lora_layers(loaded), reports, strict=True):
        delta = layer.get_delta_weight("default").double()
        squares = torch.linalg.svdvals(delta).square()
        shares = squares.cumsum(0) / squares.sum()
        rank = new.specs["default"].r
        assert float(shares[rank - 1]) >= share - 1e-6
        assert rank == 1 or float(shares[rank - 2]) < share
        error = float((new.get_delta_weight("default").double() - delta).norm() / delta.norm())
        assert told.rank == rank
        assert told.error == pytest.approx(error, abs=2e-6)
        assert error**2 <= 1 - share + 1e-6


def test_experts_are_converted_one_by_one():
    fields = {"target_modules": ["q_proj"], "target_parameters": STACKS}
    model = adapted(moe(), lorica.LoraConfig(r=4, lora_alpha=6, normalize_moe_lora=True, **fields))
    config, tensors = convert_to_lora(model, 2)
    other = lorica.get_peft_model(moe(), config)
    assert not lorica.set_peft_model_state_dict(other, tensors).missing_keys
    for name, delta in deltas(model).items():
        u, s, v = torch.linalg.svd(delta.detach().double(), full_matrices=False)
        wanted = (u[..., :2] * s[..., None, :2]) @ v[..., :2, :]
        assert torch.allclose(deltas(other)[name].detach().double(), wanted, atol=1e-5)


def test_whole_modules_come_along_and_the_model_stays(tmp_path: Path):
    base = MLP().eval()
    model = adapted(copy.deepcopy(base), lorica.LoraConfig(r=4, target_modules=["lin0"], modules_to_save=["head"]))
    with torch.no_grad():
        model.base_model.model.head.modules_to_save["default"].weight.add_(1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    loaded = reloaded(base, model, 4, tmp_path)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert list(model.peft_config) == ["default"]
    x = floats(3, 10)
    assert torch.allclose(run(loaded, x), run(model, x), atol=1e-5)


@pytest.mark.parametrize(
    ("rank", "message"),
    [
        (0, "rank of 0 doesn't make sense"),
        (0.0, "between 0 and 1 but got 0.0"),
        (1.5, "between 0 and 1 but got 1.5"),
        (-2, "a positive whole number"),
        (11, "The chosen rank 11 is larger than the weight shape"),
    ],
)
def test_ranks_that_cannot_be_are_refused(rank: Any, message: str):
    model = adapted(MLP(), lorica.LoraConfig(r=4, target_modules=["lin0"]))
    with pytest.raises(ValueError, match=message):
        convert_to_lora(model, rank)


def test_what_cannot_be_converted_says_why(tmp_path: Path):
    with pytest.raises(TypeError, match="Could not detect any layer"):
        convert_to_lora(MLP(), 4)
    model = adapted(MLP(), lorica.LoraConfig(r=4, target_modules=["lin0"], bias="all"))
    with pytest.raises(ValueError, match="sets bias=all"):
        convert_to_lora(model, 4)
    model = adapted(MLP(), lorica.LoraConfig(r=4, target_modules=["lin0"], init_lora_weights="pissa"))
    with pytest.raises(ValueError, match="path_initial_model_for_weight_conversion"):
        convert_to_lora(model, 4)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="should be a directory, not a file"):
        save_as_lora(tmp_path / "file", model, 4)


@pytest.mark.filterwarnings(f"default:{PLAIN.partition(':')[2]}")
def test_plain_lora_gives_a_warning():
    model = adapted(MLP(), lorica.LoraConfig(r=4, target_modules=["lin0"]))
    with pytest.warns(UserWarning, match="already a LoRA adapter"):
        convert_to_lora(model, 4)
