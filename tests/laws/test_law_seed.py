"""Same seed, same adapter: a factor depends on the seed and its target's name, and on nothing else."""

from __future__ import annotations

import math

import pytest
import torch
from harness import ALL_OPS, adapt, by_name
from torch import Tensor, nn

import lorica
from cases import Op
from models import embedding_net, mlp, tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore:.*groups.*")

INITS = [True, False, "gaussian", "orthogonal", "xavier", "kaiming", "normal", "xavier+normal", "kaiming+xavier"]
#: From the base weight: the seed says nothing, since a file must find the same start again.
FROM_WEIGHTS = ["pissa", "pissa_niter_4", "olora"]


def factors(seed: int = 5, model: nn.Module | None = None, **fields: object) -> dict[str, Tensor]:
    """The factors that a seed gives on a Llama."""
    model = tiny_llama() if model is None else model
    torch.manual_seed(seed)
    config = lorica.LoraConfig(**{"init_lora_weights": False, "r": 4, **fields})
    return lorica.get_peft_model_state_dict(lorica.get_peft_model(model, config), save_embedding_layers=False)


def assert_agree(some: dict[str, Tensor], more: dict[str, Tensor]) -> None:
    common = set(some) & set(more)
    assert common
    for name in common:
        assert torch.equal(some[name], more[name]), name


@pytest.mark.parametrize("init", [*INITS, *FROM_WEIGHTS], ids=str)
def test_other_targets_do_not_matter(init: object) -> None:
    alone = factors(target_modules=["q_proj"], init_lora_weights=init)
    for targets in (["q_proj", "v_proj"], ["v_proj", "down_proj", "q_proj"], "all-linear", r".*\.1\..*q_proj"):
        assert_agree(alone, factors(target_modules=targets, init_lora_weights=init))


@pytest.mark.parametrize("init", INITS, ids=str)
def test_the_seed_matters(init: object) -> None:
    first, again, other = (factors(seed, target_modules=["q_proj"], init_lora_weights=init) for seed in (5, 5, 6))
    assert_agree(first, again)
    assert not torch.equal(
        first["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"],
        other["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"],
    )


def test_every_target_has_its_own_factors() -> None:
    tensors = factors(target_modules=["q_proj", "o_proj"])
    drawn = [tensor for name, tensor in tensors.items() if "lora_A" in name]
    assert len({tuple(t.flatten().tolist()) for t in drawn}) == len(drawn) == 4


def after(*adapters: dict) -> Tensor:
    """The next value of the default generator after adapters were made."""
    model = tiny_llama()
    torch.manual_seed(5)
    model = lorica.get_peft_model(model, lorica.LoraConfig(**adapters[0]))
    for index, fields in enumerate(adapters[1:]):
        model.add_adapter(f"more{index}", lorica.LoraConfig(**fields))
    return torch.rand(4)


@pytest.mark.parametrize("init", FROM_WEIGHTS)
def test_the_seed_does_not_matter(init: str) -> None:
    assert_agree(*(factors(seed, target_modules=["q_proj"], init_lora_weights=init) for seed in (5, 6)))


@pytest.mark.parametrize("init", [*INITS, *FROM_WEIGHTS], ids=str)
def test_an_adapter_takes_one_draw(init: object) -> None:
    """However many targets there are, and however large, the generator moves as far."""
    small = {"target_modules": ["model.layers.0.self_attn.q_proj"], "r": 2, "init_lora_weights": init}
    large = {"target_modules": "all-linear", "r": 8, "init_lora_weights": init}
    torch.manual_seed(5)
    untouched = torch.rand(4)
    one = after(small)
    assert torch.equal(one, after(large))
    assert not torch.equal(one, untouched)
    two = after(small, large)
    assert torch.equal(two, after(large, small))
    assert not torch.equal(two, one)


def test_a_second_adapter_differs_from_the_first() -> None:
    torch.manual_seed(5)
    model = lorica.get_peft_model(mlp(), lorica.LoraConfig(target_modules=["lin0"], init_lora_weights=False))
    model.add_adapter("other", lorica.LoraConfig(target_modules=["lin0"], init_lora_weights=False))
    layer = model.base_model.model.lin0
    assert not torch.equal(layer.lora_A["default"].weight, layer.lora_A["other"].weight)


@pytest.mark.parametrize("op", ALL_OPS, ids=by_name)
def test_every_operation(op: Op) -> None:
    base, drawn = op.build(), []
    for _ in range(2):
        torch.manual_seed(9)
        drawn.append(lorica.get_peft_model_state_dict(adapt(base, op, init_lora_weights=False)))
    assert_agree(*drawn)
    assert all(bool(tensor.abs().sum() > 0) for tensor in drawn[0].values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_base_dtype_does_not_matter(dtype: torch.dtype) -> None:
    """Factors in float32 are the same whatever the base is stored in."""
    assert_agree(factors(target_modules=["q_proj"]), factors(model=tiny_llama().to(dtype), target_modules=["q_proj"]))


def wide(init: object) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.ModuleDict({"target": nn.Linear(400, 300)})
    config = lorica.LoraConfig(target_modules=["target"], r=16, init_lora_weights=init)
    layer = lorica.get_peft_model(model, config).base_model.model["target"]
    return layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()


def test_the_default_is_kaiming_uniform_and_zero() -> None:
    a, b = wide(True)
    bound = 1 / math.sqrt(400)
    assert bool((a.abs() <= bound).all())
    assert a.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert not b.any()


def test_false_makes_both_random() -> None:
    a, b = wide(False)
    assert a.std().item() == pytest.approx(1 / math.sqrt(3 * 400), rel=0.05)
    assert b.std().item() == pytest.approx(1 / math.sqrt(3 * 16), rel=0.05)


def test_gaussian_is_scaled_by_the_rank() -> None:
    a, b = wide("gaussian")
    assert a.std().item() == pytest.approx(1 / 16, rel=0.05)
    assert not b.any()


def test_orthogonal_factors_start_without_a_delta() -> None:
    """Each is built on half of one orthogonal matrix: ``B·A`` is zero though neither factor is."""
    a, b = wide("orthogonal")
    assert bool(a.any())
    assert bool(b.any())
    assert float((b @ a).norm()) <= 1e-5 * float(a.norm() * b.norm())
    assert int(torch.linalg.matrix_rank(a)) == int(torch.linalg.matrix_rank(b)) == 8


@pytest.mark.parametrize("init", ["xavier", "kaiming", "normal"])
def test_further_initialisations_start_at_zero(init: str) -> None:
    a, b = wide(init)
    assert bool(a.any())
    assert not b.any()
    assert bool(torch.isfinite(a).all())


def test_an_embedding_starts_with_zero_a() -> None:
    model = lorica.get_peft_model(embedding_net(), lorica.LoraConfig(target_modules=["emb"]))
    layer = model.base_model.model.emb
    assert not layer.lora_embedding_A["default"].any()
    assert layer.lora_embedding_B["default"].std().item() == pytest.approx(1, rel=0.3)


@pytest.mark.parametrize("init", ["unheard-of", "kaimimg", 3])
def test_an_unknown_initialisation_is_refused(init: object) -> None:
    with pytest.raises((ValueError, TypeError), match=r"(?i)init"):
        lorica.get_peft_model(mlp(), lorica.LoraConfig(target_modules=["lin0"], init_lora_weights=init))
