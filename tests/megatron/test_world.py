"""The harness itself: the same model under every division, and failures told case by case and rank by rank."""

from __future__ import annotations

import subprocess
import sys

import failing
import pytest
import torch
import world
from gpt import Division, chunks, moe
from torch import Tensor

world.need_megatron()

DENSE = [Division(tp=2), Division(tp=4, sp=True), Division(tp=2, pp=2), Division(tp=2, sp=True, pp=2, vpp=2)]
EXPERTS = [
    Division(ep=4),
    Division(tp=2, sp=True, ep=2),
    Division(tp=2, sp=True, ep=2, etp=1),
    Division(tp=2, sp=True, ep=2, pp=2, etp=1),
]


def _loss(division: Division, **fields: object) -> Tensor:
    with world.divided(division):
        return world.train(chunks(division, **fields), world.tokens(4), forward_only=True)  # type: ignore[arg-type]


@world.case(ranks=4, divisions=DENSE)
def dense(division: Division) -> None:
    torch.testing.assert_close(_loss(division), _loss(Division()), rtol=1e-5, atol=0)


@world.case(ranks=4, divisions=EXPERTS)
def experts(division: Division) -> None:
    """As modules, stacked, and beside shared ones, whose collectives may be the dispatcher's."""
    fields = moe(moe_shared_expert_intermediate_size=16)
    whole = _loss(Division(), **fields)
    for changes in ({}, {"moe_shared_expert_overlap": True}, {"moe_grouped_gemm": True}, {"grouped_layers": True}):
        torch.testing.assert_close(_loss(division, **fields | changes), whole, rtol=1e-5, atol=0)
    assert not torch.isclose(_loss(division, **moe()), whole, rtol=1e-5)


@pytest.mark.parametrize("ranks", world.sizes(__name__))
def test_cases(ranks: int, request: pytest.FixtureRequest) -> None:
    world.run(__name__, ranks, request.config.getoption("--cases"))


def test_a_case_that_fails_is_named_and_the_others_go_on() -> None:
    with pytest.raises(AssertionError) as caught:
        world.run(failing.__name__, 2)
    message = str(caught.value)
    assert "==== second_fails_on_one_rank" in message
    assert "rank 1 failed" in message
    assert "ValueError: of rank 1" in message
    assert "==== third_fails" in message
    assert "==== first_passes" not in message
    world.run(failing.__name__, 2, words="first")


def test_neither_megatron_nor_transformer_engine_is_imported_before_there_is_a_layer_of_theirs() -> None:
    code = """
import pkgutil, sys
import lorica, lorica.parallel, lorica.compat.megatron_bridge
import lorica.engines.megatron as engine
for found in pkgutil.iter_modules(engine.__path__):
    __import__(f"{engine.__name__}.{found.name}")
import torch
model = torch.nn.Sequential(torch.nn.Linear(4, 4))
lorica.get_peft_model(model, lorica.LoraConfig(target_modules=["0"]))(torch.ones(1, 4)).sum().backward()
print([name for name in sys.modules if name.partition(".")[0] in ("megatron", "transformer_engine")])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
