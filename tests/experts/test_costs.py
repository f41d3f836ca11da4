"""What adapters on stacked experts cost: products on the routed tokens, and memory of their factors and tokens only."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lorica
import mixtures
from lorica.bench.counting import count

R, TOKENS, TOP_K, WIDTH, INNER = 2, 6, 2, 16, 64
KINDS = ("qwen3_moe", "gpt_oss", "deepseek_v3")
#: So wide that anything of a weight's size is larger than all that belongs to tokens or factors.
SIZES = {
    "qwen3_moe": {"moe_intermediate_size": INNER},
    "gpt_oss": {"intermediate_size": INNER},
    "deepseek_v3": {"moe_intermediate_size": INNER},
}


def experts(kind: str, implementation: str) -> tuple[nn.Module, nn.Module]:
    """The first layer's experts of a base model and of its adapted copy."""
    base = mixtures.moe(kind, implementation=implementation, num_hidden_layers=1, **SIZES[kind])
    config = lorica.LoraConfig(
        r=R, target_modules=[], target_parameters=mixtures.STACKS, init_lora_weights=False, lora_dropout=0.0
    )
    model = lorica.get_peft_model(copy.deepcopy(base), config).base_model.model
    base.requires_grad_(False)
    return base.model.layers[0].mlp.experts, model.model.layers[0].mlp.experts


def routed() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    index = torch.tensor([[0, 2], [2, 0], [0, 3], [3, 2], [2, 3], [0, 2]])  # expert 1 gets no token
    return torch.randn(TOKENS, WIDTH, generator=generator).requires_grad_(), index, torch.rand(TOKENS, TOP_K)


class Made(TorchDispatchMode):
    """Counts the tensors that operations make, by their number of elements; views are not made."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: Counter[int] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in known:
                self.sizes[leaf.numel()] += 1
        return result


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("implementation", mixtures.IMPLEMENTATIONS)
def test_a_step_makes_nothing_of_a_weights_size(kind: str, implementation: str) -> None:
    """Beyond what the base model makes itself (``batched_mm`` copies a weight for each token)."""
    base, adapted = experts(kind, implementation)
    made = []
    for module in (base, adapted):
        with Made() as counted:
            module(*routed()).sum().backward()
        made.append(counted.sizes)
    extra = made[1] - made[0]
    of_tokens, of_factors = TOKENS * TOP_K * 2 * INNER, mixtures.EXPERTS * R * 2 * INNER
    weight = WIDTH * INNER  # of one expert
    if implementation == "batched_mm":
        of_factors = TOKENS * TOP_K * R * 2 * INNER  # chosen for each token, as the base model's weights are
    assert max(extra) <= max(of_tokens, of_factors)
    assert max(of_tokens, of_factors) < mixtures.EXPERTS * weight
    assert sum(count for size, count in extra.items() if size >= mixtures.EXPERTS * weight) == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
def test_products_are_of_the_routed_tokens_only(kind: str, implementation: str) -> None:
    """For S pairs of token and expert: ``2·S·r·(in + out)`` more for each stack, whatever the number of experts."""
    base, adapted = experts(kind, implementation)
    counts = []
    for module in (base, adapted):
        with torch.no_grad():
            counts.append(count(lambda module=module: module(*routed()))["FLOPs"])
    pairs = TOKENS * TOP_K
    assert counts[1] - counts[0] == 2 * pairs * R * ((WIDTH + 2 * INNER) + (INNER + WIDTH))


@pytest.mark.parametrize("implementation", mixtures.IMPLEMENTATIONS)
def test_forwards_leave_no_trace(implementation: str) -> None:
    """Two adapters on the same parameters, any number of forwards: the same output, and the weights as they were."""
    base = mixtures.moe("qwen3_moe", implementation=implementation)
    config = lorica.LoraConfig(
        r=R, target_modules=[], target_parameters=[*mixtures.STACKS, "mlp.gate.weight"], init_lora_weights=False
    )
    model = lorica.get_peft_model(base, config)
    model.add_adapter("other", copy.deepcopy(config))
    model.base_model.set_adapter(["default", "other"])
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    ids = torch.arange(14).view(2, 7)
    first = model(ids).logits
    for _ in range(3):
        assert torch.equal(model(ids).logits, first)
    model.train()
    model(ids).logits.sum().backward()
    model.eval()
    assert torch.equal(model(ids).logits, first)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_an_expert_without_tokens_gets_no_gradient() -> None:
    _, adapted = experts("qwen3_moe", "eager")
    adapted(*routed()).sum().backward()
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            used = parameter.grad.flatten(1).abs().sum(1) > 0
            assert used.tolist() == [True, False, True, True], name
