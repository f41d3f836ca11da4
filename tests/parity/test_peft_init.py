"""New factors follow PEFT's distributions."""

from __future__ import annotations

import pytest
import torch
import twins
from torch import Tensor, nn
from twins import lorica, peft

from models import transformers_conv1d

LAYERS = {
    "linear": (lambda: nn.Linear(300, 200), {}),
    "transformers-conv1d": (lambda: transformers_conv1d(200, 300), {"fan_in_fan_out": True}),
    "embedding": (lambda: nn.Embedding(300, 200), {}),
    "conv1d": (lambda: nn.Conv1d(60, 80, 3), {}),
    "conv2d": (lambda: nn.Conv2d(40, 60, 3), {}),
    "conv3d": (lambda: nn.Conv3d(20, 40, 3), {}),
    "attention": (lambda: nn.MultiheadAttention(96, 4), {}),
}


def drawn(library, layer: str, **fields: object) -> dict[str, Tensor]:
    build, needed = LAYERS[layer]
    torch.manual_seed(0)
    config = library.LoraConfig(target_modules=["target"], r=16, **needed, **fields)
    with twins.quiet():
        model = library.get_peft_model(nn.ModuleDict({"target": build()}), config)
        return library.get_peft_model_state_dict(model)


def assert_same_distribution(actual: Tensor, expected: Tensor, name: str) -> None:
    """Equal mean, spread, extent and fourth moment, as far as so many values can tell."""
    if not expected.any():
        assert not actual.any(), name
        return
    scale, n = expected.std().item(), expected.numel()
    assert actual.mean().item() == pytest.approx(expected.mean().item(), abs=6 * scale / n**0.5), name
    assert actual.std().item() == pytest.approx(scale, rel=6 / n**0.5), name
    kurtosis = [float(((t - t.mean()) / t.std()).pow(4).mean()) for t in (actual, expected)]
    assert kurtosis[0] == pytest.approx(kurtosis[1], rel=60 / n**0.5), name


@pytest.mark.parametrize("init", [True, False, "gaussian"], ids=str)
@pytest.mark.parametrize("layer", LAYERS)
def test_distributions(layer: str, init: object) -> None:
    theirs, ours = (drawn(library, layer, init_lora_weights=init) for library in (peft, lorica))
    assert sorted(ours) == sorted(theirs)
    for name, expected in theirs.items():
        assert_same_distribution(ours[name], expected, name)


@pytest.mark.parametrize("layer", ["linear", "transformers-conv1d"])
def test_orthogonal(layer: str) -> None:
    """Factors of half the rank, of PEFT's size, whose product is zero."""
    theirs, ours = (drawn(library, layer, init_lora_weights="orthogonal") for library in (peft, lorica))
    for name, expected in theirs.items():
        assert int(torch.linalg.matrix_rank(ours[name])) == int(torch.linalg.matrix_rank(expected)) == 8
        assert float(ours[name].norm()) == pytest.approx(float(expected.norm()), rel=0.1), name
    delta = [
        t["base_model.model.target.lora_B.weight"] @ t["base_model.model.target.lora_A.weight"] for t in (ours, theirs)
    ]
    assert float(delta[0].norm()) == pytest.approx(float(delta[1].norm()), abs=1e-4)


@pytest.mark.parametrize("init", [True, False], ids=str)
@pytest.mark.parametrize("layer", ["linear", "transformers-conv1d", "conv1d", "conv2d", "conv3d"])
def test_the_bias_of_b(layer: str, init: object) -> None:
    theirs, ours = (drawn(library, layer, init_lora_weights=init, lora_bias=True) for library in (peft, lorica))
    name = "base_model.model.target.lora_B.bias"
    assert_same_distribution(ours[name], theirs[name], name)
