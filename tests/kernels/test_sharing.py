"""Layers that share their input are computed together, found by the input itself; nothing else changes."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lorica
from lorica import kernels

NAMES = ("q_proj", "k_proj", "v_proj", "o_proj")
WIDTH = 16


class Attention(nn.Module):
    """As many heads as features; keys and values see ``memory`` where there is one."""

    def __init__(self) -> None:
        super().__init__()
        for name in NAMES:
            self.add_module(name, nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        seen = x if memory is None else memory
        q, k, v = self.q_proj(x), self.k_proj(seen), self.v_proj(seen)
        return self.o_proj(torch.softmax(q @ k.mT, -1) @ v)


def adapted(dropout: float = 0.0, names: tuple[str, ...] = NAMES) -> Any:
    torch.manual_seed(0)
    config = lorica.LoraConfig(r=4, target_modules=list(names), init_lora_weights=False, lora_dropout=dropout)
    return lorica.get_peft_model(nn.Sequential(Attention(), Attention()), config)


def inputs(seed: int = 1) -> Tensor:
    return torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(seed))


def attention(model: Any) -> Any:
    return model.base_model.model[0]


def run(model: Any, call: Any = None, seed: int = 3) -> list[Tensor]:
    """Output, gradient of the input, gradients of the factors."""
    torch.manual_seed(seed)
    x = inputs().requires_grad_()
    model.zero_grad()
    y = (call or model)(x)
    y.square().sum().backward()
    factors = [p for p in model.parameters() if p.requires_grad]
    return [y.detach(), x.grad, *(p.grad.clone() for p in factors if p.grad is not None)]


def assert_near(found: list[Tensor], wanted: list[Tensor]) -> None:
    assert len(found) == len(wanted)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def nodes(model: Any, call: Any = None) -> dict[str, Any]:
    """The autograd node that made each layer's output, in one forward."""
    made: dict[str, Any] = {}
    layers = [(name, attention(model).get_submodule(name)) for name in NAMES]
    handles = [
        layer.register_forward_hook(lambda _, __, y, name=name: made.__setitem__(name, y.grad_fn))
        for name, layer in layers
    ]
    (call or model)(inputs())
    for handle in handles:
        handle.remove()
    return made


def test_q_k_and_v_are_one_node_and_o_is_not() -> None:
    model = adapted()
    for _ in range(2):
        made = nodes(model)
        assert made["q_proj"] is made["k_proj"] is made["v_proj"]
        assert made["o_proj"] is not made["q_proj"]
    assert attention(model).o_proj.family is None
    assert len(attention(model).q_proj.family.members) == 3


def test_the_result_is_that_of_the_plain_way() -> None:
    model = adapted()
    with kernels.using("plain"):
        wanted = run(model)
    assert_near(run(model), wanted)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("cross", [False, True])
def test_the_forward_that_finds_out_gives_the_same_digits(dropout: float, cross: bool) -> None:
    model = adapted(dropout)
    memory = inputs(2)
    call = (lambda x: model.base_model.model[1](model.base_model.model[0](x, memory))) if cross else None
    first, later = run(model, call), run(model, call)
    for one, other in zip(first, later, strict=True):
        assert torch.equal(one, other)
    made = nodes(model, call)
    assert made["k_proj"] is made["v_proj"]
    assert (made["q_proj"] is made["k_proj"]) != cross


def test_a_layer_that_is_passed_over_leaves() -> None:
    model = adapted()
    block = attention(model)

    def without_v(x: Tensor) -> Tensor:
        return block.q_proj(x) + block.k_proj(x)

    with kernels.using("plain"):
        wanted = run(model, without_v)
    for _ in range(2):
        assert_near(run(model, without_v), wanted)
    assert len(block.q_proj.family.members) == 2


def test_hooks_of_every_layer_run_and_may_change_its_input() -> None:
    model = adapted()
    model(inputs())
    calls = []
    block = attention(model)
    block.k_proj.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    block.v_proj.register_forward_hook(lambda module, args, y: calls.append("v") or 3 * y)
    with kernels.using("plain"):
        wanted = run(model)
    for _ in range(2):
        assert_near(run(model), wanted)
    assert calls == ["v"] * 3


def test_an_input_written_to_in_between_is_another_input() -> None:
    block = attention(adapted())
    x = inputs()
    block.q_proj(x)
    x.mul_(2)
    with torch.no_grad():
        wanted = block.k_proj(x)
    torch.testing.assert_close(block.k_proj(x).detach(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_around_one_of_them(reentrant: bool) -> None:
    model = adapted()
    block = attention(model)

    def call(x: Tensor) -> Tensor:
        k = checkpoint(block.k_proj, x, use_reentrant=reentrant)
        return block.o_proj(torch.softmax(block.q_proj(x) @ k.mT, -1) @ block.v_proj(x))

    with kernels.using("plain"):
        wanted = run(model, call)
    for _ in range(3):
        assert_near(run(model, call), wanted)
        run(model)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_checkpoint_around_the_block(reentrant: bool, dropout: float) -> None:
    model = adapted(dropout)
    block = attention(model)
    for _ in range(2):
        found = run(model, lambda x: checkpoint(block, x, use_reentrant=reentrant))
        wanted = run(model, block) if not dropout else found
        assert_near(found, wanted)


def test_copies_find_out_for_themselves() -> None:
    model = adapted()
    wanted = run(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not attention(other).q_proj.family.members
        assert attention(other).q_proj.masks is not attention(model).q_proj.masks
        assert attention(other).q_proj.masks is attention(other).k_proj.masks
        for _ in range(2):
            assert_near(run(other), wanted)
        made = nodes(other)
        assert made["q_proj"] is made["k_proj"] is made["v_proj"]
        mine = {id(module) for module in other.modules()}
        assert {id(ref()) for ref in attention(other).q_proj.family.members} <= mine
    alone = copy.deepcopy(attention(model).k_proj)
    torch.testing.assert_close(alone(inputs()), attention(model).k_proj(inputs()))


def test_threads_do_not_take_each_others_outputs() -> None:
    model = adapted()
    model(inputs())
    with torch.no_grad():
        wanted = [model(inputs(seed)) for seed in range(8)]
    barrier = threading.Barrier(2)
    failed: list[int] = []

    def work(which: int) -> None:
        barrier.wait()
        for _ in range(30):
            for seed in range(which, 8, 2):
                near = torch.allclose(model(inputs(seed)), wanted[seed], rtol=1e-5, atol=1e-6)
                failed.extend([] if near else [seed])

    threads = [threading.Thread(target=work, args=(which,)) for which in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def test_layers_of_a_second_adapter_join() -> None:
    model = adapted(names=("q_proj", "k_proj"))
    model(inputs())
    model.add_adapter("other", lorica.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    model.set_adapter("other")
    with kernels.using("plain"):
        wanted = run(model)
    for _ in range(2):
        assert_near(run(model), wanted)
    made = nodes(model)
    assert made["q_proj"] is made["v_proj"]


def test_items_of_a_list_are_no_family() -> None:
    model = lorica.get_peft_model(
        nn.Sequential(*(nn.Linear(8, 8) for _ in range(3))), lorica.LoraConfig(target_modules="all-linear")
    )
    assert all(module.family is None for module in model.base_model.model)
