"""``add_weighted_adapter``, conversions and intruder dimensions as PEFT has them, where PEFT is right."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import twins
from safetensors.torch import load_file
from torch import Tensor, nn
from twins import peft

import lorica
from cases import OPS, Op
from models import MLP, floats, tiny_llama

BY_NAME = {op.name: op for op in OPS}
WEIGHTS = [0.7, -1.3]
NAMES = ["default", "second"]
DETERMINISTIC = ["svd", "cat", "linear", "ties", "magnitude_prune", "ties_svd", "magnitude_prune_svd"]
#: Layers on which PEFT's own combination works.
LAYERS = ["linear", "transformers-conv1d", "embedding", "conv2d", "conv2d-1x1"]


def pair_of(op: Op, second: dict[str, Any] | None = None, **fields: Any) -> twins.Twins:
    first = {"target_modules": ["target"], "init_lora_weights": False, "r": 4, "lora_alpha": 6, **op.fields, **fields}
    pair = twins.adapt(op.build(), first)
    twins.add(pair, "second", {**first, "lora_alpha": 10, **(second or {})})
    twins.share_factors(pair)
    return pair


def combine(pair: twins.Twins, *arguments: Any, **named: Any) -> None:
    with twins.quiet():
        pair[0].add_weighted_adapter(*arguments, **named)
    pair[1].add_weighted_adapter(*arguments, **named)


def deltas(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight(adapter).detach()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight") and hasattr(module, "base_layer")
    }


def assert_same_deltas(pair: twins.Twins, adapter: str, tolerance: float = 1e-5) -> None:
    # PEFT decomposes in float32, and its result is no nearer to the true one (tests/combine holds ours to 1e-6 of it).
    theirs, ours = (deltas(model, adapter) for model in pair)
    assert theirs.keys() == ours.keys()
    for name, delta in theirs.items():
        twins.assert_close(ours[name], delta, tolerance, name)


@pytest.mark.parametrize("kind", DETERMINISTIC)
@pytest.mark.parametrize("layer", LAYERS)
def test_the_same_deltas_and_the_same_form(layer: str, kind: str):
    pair = pair_of(BY_NAME[layer])
    combine(pair, NAMES, WEIGHTS, "new", kind, density=0.4)
    assert_same_deltas(pair, "new")
    shapes = [
        {name: p.shape for name, p in model.named_parameters() if ".new" in name and "original" not in name}
        for model in pair
    ]
    assert shapes[0] == shapes[1]
    theirs, ours = (model.peft_config["new"] for model in pair)
    assert (ours.r, ours.lora_alpha, ours.target_modules) == (theirs.r, theirs.lora_alpha, theirs.target_modules)


@pytest.mark.parametrize("kind", ["cat", "linear", "ties", "magnitude_prune"])
@pytest.mark.parametrize("layer", LAYERS)
def test_the_same_factors_where_nothing_is_decomposed(layer: str, kind: str):
    pair = pair_of(BY_NAME[layer])
    combine(pair, NAMES, WEIGHTS, "new", kind, density=0.4, majority_sign_method="frequency")
    with twins.quiet():
        theirs = peft.get_peft_model_state_dict(pair[0], adapter_name="new")
    twins.assert_same_tensors(lorica.get_peft_model_state_dict(pair[1], adapter_name="new"), theirs, 1e-6)


@pytest.mark.parametrize("method", ["total", "frequency"])
@pytest.mark.parametrize("density", [0.05, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("kind", ["ties", "ties_svd", "magnitude_prune", "magnitude_prune_svd"])
@pytest.mark.filterwarnings("ignore:The density 1.0 is greater than or equal to 1")
def test_every_density_and_both_ways_to_elect_a_sign(kind: str, density: float, method: str):
    pair = twins.adapt(MLP(), mlp())
    for number in range(3):
        twins.add(pair, f"n{number}", mlp(lora_alpha=3 + number))
    twins.share_factors(pair)
    names = ["default", "n0", "n1", "n2"]
    combine(pair, names, [1.0, 0.5, -2.0, 0.0], "new", kind, density=density, majority_sign_method=method)
    assert_same_deltas(pair, "new")


def mlp(**fields: Any) -> dict[str, Any]:
    return {"r": 4, "lora_alpha": 6, "target_modules": ["lin0", "lin1"], "init_lora_weights": False, **fields}


@pytest.mark.parametrize("weights", [[1.0], [-1.0], [0.3], [0.0]], ids=str)
@pytest.mark.parametrize("kind", DETERMINISTIC)
def test_one_adapter(kind: str, weights: list[float]):
    pair = twins.adapted(MLP(), mlp())
    combine(pair, ["default"], weights, "new", kind, density=0.5)
    assert_same_deltas(pair, "new")


@pytest.mark.parametrize("rank", [None, 1, 6])
@pytest.mark.parametrize("full", [True, False])
def test_svd_of_unequal_ranks_on_a_whole_model(rank: int | None, full: bool):
    fields = {"target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    pair = twins.adapt(tiny_llama(), {"r": 3, "lora_alpha": 6, "rank_pattern": {"v_proj": 5}, **fields})
    twins.add(pair, "second", {**fields, "r": 2, "target_modules": ["v_proj", "o_proj"]})
    twins.share_factors(pair)
    combine(pair, NAMES, WEIGHTS, "new", "svd", svd_rank=rank, svd_full_matrices=full)
    assert_same_deltas(pair, "new")
    assert pair[1].peft_config["new"].r == pair[0].peft_config["new"].r


def test_dare_has_the_same_law():
    # Of 20·20 entries each is kept with the chance of the density, and divided by it.
    pair = pair_of(BY_NAME["linear"])
    found = []
    for model in pair:
        torch.manual_seed(3)
        kept = []
        for number in range(60):
            with twins.quiet():
                model.add_weighted_adapter(NAMES, [1.0, 1.0], f"n{number}", "dare_linear", density=0.5)
            state = peft if model is pair[0] else lorica
            with twins.quiet():
                tensors = state.get_peft_model_state_dict(model, adapter_name=f"n{number}")
            kept.append(torch.cat([tensor.flatten() for tensor in tensors.values()]))
        found.append(torch.stack(kept))
    theirs, ours = found
    assert abs(float((ours == 0).float().mean() - (theirs == 0).float().mean())) < 0.02
    values = [sorted({round(float(v), 4) for v in sample[:, 5]}) for sample in found]
    assert values[0] == values[1]  # each entry takes the same values: none, one, the other, or both


@pytest.mark.parametrize("kind", ["svd", "cat", "linear"])
def test_files_of_combinations_are_read_by_peft(kind: str, tmp_path: Path):
    base = MLP().eval()
    pair = twins.adapt(base, mlp(use_rslora=True))
    twins.add(pair, "second", mlp(lora_alpha=3, use_rslora=True))
    twins.share_factors(pair)
    pair[1].add_weighted_adapter(NAMES, WEIGHTS, "new", kind)
    pair[1].save_pretrained(tmp_path, selected_adapters=["new"])
    pair[1].set_adapter("new")
    with twins.quiet():
        loaded = peft.PeftModel.from_pretrained(MLP().eval(), tmp_path / "new")
        loaded.load_state_dict(base.state_dict(), strict=False)
    for mine, theirs in zip(
        base.parameters(), (p for n, p in loaded.named_parameters() if "lora_" not in n), strict=True
    ):
        theirs.data.copy_(mine.data)
    twins.assert_close(pair[1](floats(3, 10)).detach(), loaded(floats(3, 10)).detach())


ERRORS: dict[str, Callable[[Any], None]] = {
    "unknown adapter": lambda model: model.add_weighted_adapter(["default", "gone"], WEIGHTS, "new"),
    "unequal ranks": lambda model: model.add_weighted_adapter(["default", "third"], WEIGHTS, "new", "linear"),
    "unknown type": lambda model: model.add_weighted_adapter(NAMES, WEIGHTS, "new", "average"),
    "mixed targets": lambda model: model.add_weighted_adapter(["default", "regex"], WEIGHTS, "new", "svd"),
    "negative density": lambda model: model.add_weighted_adapter(NAMES, WEIGHTS, "new", "ties", density=-1.0),
    "two copies": lambda model: model.add_weighted_adapter(["saves", "saves too"], WEIGHTS, "new", "svd"),
}


@pytest.mark.parametrize("wrong", ERRORS)
def test_the_same_errors(wrong: str):
    pair = twins.adapt(MLP(), mlp())
    for name, fields in {
        "second": {},
        "third": {"r": 5},
        "regex": {"target_modules": ".*lin0"},
        "saves": {"modules_to_save": ["head"]},
        "saves too": {"modules_to_save": ["head"]},
    }.items():
        twins.add(pair, name, mlp(**fields))
    with twins.quiet(), pytest.raises(ValueError) as theirs:  # noqa: PT011
        ERRORS[wrong](pair[0])
    with pytest.raises(ValueError) as ours:  # noqa: PT011
        ERRORS[wrong](pair[1])
    assert str(ours.value).startswith(str(theirs.value).rstrip("."))


# ---- the start taken away ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize(
    "fields", [{}, {"use_rslora": True}, {"rank_pattern": {"lin1": 3}, "alpha_pattern": {"lin0": 5}}]
)
def test_the_same_file_without_the_start(init: str, fields: dict[str, Any], tmp_path: Path):
    pair = twins.adapt(MLP(), mlp(init_lora_weights=init, **fields))
    with twins.quiet():
        pair[0].save_pretrained(tmp_path / "initial")
    twins.share_factors(pair)
    for model, side in zip(pair, ("theirs", "ours"), strict=True):
        with twins.quiet():
            model.save_pretrained(tmp_path / side, path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    theirs, ours = (load_file(tmp_path / side / "adapter_model.safetensors") for side in ("theirs", "ours"))
    twins.assert_same_tensors(ours, theirs, 1e-6)
    expected, found = (json.loads((tmp_path / side / "adapter_config.json").read_text()) for side in ("theirs", "ours"))
    for key in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "init_lora_weights", "use_rslora"):
        assert found[key] == expected[key], key
    with twins.quiet():
        loaded = peft.PeftModel.from_pretrained(MLP().eval(), tmp_path / "ours")
    assert loaded.peft_config["default"].r == 8


# ---- conversions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 3, 4, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], r".*\.(q_proj|down_proj)"], ids=["list", "expression"])
def test_the_same_conversion(rank: Any, targets: Any, tmp_path: Path):
    fields = {"r": 4, "lora_alpha": 6, "target_modules": targets, "init_lora_weights": False}
    pair = twins.adapted(tiny_llama(), fields)
    with twins.quiet():
        expected_config, expected = peft.convert_to_lora(pair[0], rank)
    with pytest.warns(UserWarning, match="already a LoRA adapter"):
        config, found = lorica.convert_to_lora(pair[1], rank)
    assert found.keys() == expected.keys()
    for name in (name for name in found if "lora_A" in name):
        other = name.replace("lora_A", "lora_B")
        assert (found[name].shape, found[other].shape) == (expected[name].shape, expected[other].shape), name
        twins.assert_close(found[other] @ found[name], expected[other] @ expected[name], 1e-5, name)
    assert (config.r, config.lora_alpha) == (expected_config.r, expected_config.lora_alpha)
    with twins.quiet():
        lorica.save_as_lora(tmp_path, pair[1], rank)
        loaded = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path)
        read = peft.get_peft_model_state_dict(loaded)
    twins.assert_same_tensors(found, read)


@pytest.mark.parametrize("rank", [0, 0.0, 1.2, 17])
def test_the_same_refusals_of_ranks(rank: Any):
    fields = {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": False}
    pair = twins.adapted(tiny_llama(), fields)
    with twins.quiet(), pytest.raises(ValueError) as theirs:  # noqa: PT011
        peft.convert_to_lora(pair[0], rank)
    with twins.quiet(), pytest.raises(ValueError) as ours:  # noqa: PT011
        lorica.convert_to_lora(pair[1], rank)
    assert str(theirs.value) in str(ours.value)


# ---- intruder dimensions -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [{}, {"top_k": 4, "threshold_epsilon": 0.9, "mitigation_lambda": 0.2}], ids=str)
def test_the_same_intruders_and_the_same_reduced_adapter(arguments: dict[str, Any]):
    pair = twins.adapted(MLP(), mlp())
    intruders = importlib.import_module("peft.tuners.lora.intruders")
    said: list[list[str]] = [[], []]
    with twins.quiet():
        intruders.reduce_intruder_dimension(pair[0], logging_sink=said[0].append, **arguments)
    lorica.reduce_intruder_dimension(pair[1], logging_sink=said[1].append, **arguments)
    assert said[1] == said[0]
    assert any("Intruders: " in line for line in said[1])
    assert_same_deltas(pair, "intruder_reduced", 2e-5)
    assert pair[1].active_adapters == pair[0].active_adapters
