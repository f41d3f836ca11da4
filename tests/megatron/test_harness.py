"""The harness itself: the same model under every division, and failures told case by case and rank by rank."""

from __future__ import annotations

import pytest
import torch
import world
from gpt import Division, chunks, moe
from torch import Tensor

world.need_megatron()

DENSE = [
    Division(tp=2),
    Division(tp=2, sp=True),
    Division(tp=4, sp=True),
    Division(pp=2),
    Division(tp=2, pp=2),
    Division(tp=2, sp=True, pp=2, vpp=2),
]
EXPERTS = [
    Division(ep=2),
    Division(ep=4),
    Division(tp=2, sp=True, ep=2, etp=1),
    Division(tp=2, sp=True, ep=2),
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
    torch.testing.assert_close(_loss(division, **moe()), _loss(Division(), **moe()), rtol=1e-5, atol=0)


@world.case(ranks=4, divisions=EXPERTS)
def shared_experts(division: Division) -> None:
    fields = moe(moe_shared_expert_intermediate_size=16)
    whole = _loss(Division(), **fields)
    for overlap in (False, True):
        found = _loss(division, **fields, moe_shared_expert_overlap=overlap)
        torch.testing.assert_close(found, whole, rtol=1e-5, atol=0)


@world.case(ranks=4, divisions=EXPERTS)
def grouped_experts(division: Division) -> None:
    whole = _loss(Division(), **moe())
    found = _loss(division, **moe(moe_grouped_gemm=True))
    torch.testing.assert_close(found, whole, rtol=1e-5, atol=0)


@pytest.mark.parametrize("ranks", world.sizes(__name__))
def test_cases(ranks: int, request: pytest.FixtureRequest) -> None:
    world.run(__name__, ranks, request.config.getoption("--cases"))
