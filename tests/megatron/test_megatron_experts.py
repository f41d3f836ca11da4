"""Mixtures of experts of Megatron-Core, adapted: every division equals one process (I1, I2, I3, I6)."""

from __future__ import annotations

import outcomes
import pytest
import torch
import world
from gpt import Division, chunks, moe
from outcomes import Outcome

from lorica.parallel import clip_grad_norm_, get_total_norm, verify

world.need_megatron()

WHOLE = Division()
EXPERTS = ["linear_fc1", "linear_fc2"]
#: Experts divided in every way: among ranks, by their own tensor parallelism, by neither of them under that of others.
DIVISIONS = [
    Division(ep=2),
    Division(tp=2, sp=True, etp=1),
    Division(tp=2, sp=True),
    Division(tp=2, sp=True, ep=2, etp=1),
]
MORE = [
    Division(ep=4),
    Division(ep=2, etp=2),
    Division(tp=2, sp=True, ep=2),
    Division(cp=2, ep=2),
    Division(tp=2, sp=True, ep=2, etp=1, pp=2),
    Division(tp=4, sp=True, ep=2, etp=2),
    Division(tp=4, sp=True, ep=2, etp=1),
]


def _equal(division: Division, names: list[str], **changes: object) -> None:
    wanted = outcomes.config(target_modules=names)

    def found(division: Division) -> Outcome:
        return outcomes.outcome(division, wanted, **moe(**changes))  # type: ignore[arg-type]

    outcomes.expect_equal(found(division), found(WHOLE))


@world.case(ranks=2, divisions=DIVISIONS)
def experts(division: Division) -> None:
    _equal(division, EXPERTS)


@world.case(ranks=2, divisions=DIVISIONS)
def grouped_experts(division: Division) -> None:
    """Stacked experts start, train and are saved as those that are modules: of one process, here."""
    wanted = outcomes.config(target_modules=EXPERTS)
    whole = outcomes.outcome(WHOLE, wanted, **moe())
    for kind in ({"moe_grouped_gemm": True}, {"grouped_layers": True}):
        outcomes.expect_equal(outcomes.outcome(division, wanted, **moe(**kind)), whole)


@world.case(ranks=2, divisions=DIVISIONS)
def router(division: Division) -> None:
    """Each rank has logits of its tokens only, of which every router's factors see a part of the gradient."""
    _equal(division, ["router"])


@world.case(ranks=4, divisions=MORE)
def everything(division: Division) -> None:
    """Experts, the router under a loss that balances it, and shared experts, which are dense layers."""
    changes = {"moe_shared_expert_intermediate_size": 16, "moe_router_load_balancing_type": "aux_loss"}
    _equal(division, [*EXPERTS, "router", "linear_qkv"], **changes, moe_aux_loss_coeff=0.1)


@world.case(ranks=4, divisions=MORE[:3])
def shared_experts_that_overlap(division: Division) -> None:
    """The collectives around a shared expert's layers are the dispatcher's."""
    _equal(division, EXPERTS, moe_shared_expert_intermediate_size=16, moe_shared_expert_overlap=True)


@world.case(ranks=2, divisions=[Division(ep=2), Division(tp=2, sp=True, etp=1), Division(tp=2, sp=True)])
def the_global_norm(division: Division) -> None:
    """Each logical element counts once, whichever ranks have the expert."""
    norms = []
    for place in (WHOLE, division):
        with world.divided(place):
            models = chunks(place, **moe())
            model = outcomes.adapted(models, outcomes.config(target_modules=[*EXPERTS, "router", "linear_proj"]))
            world.train(models, world.tokens(4), alone=place == WHOLE)
            if place == WHOLE:
                gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
                norms.append(torch.linalg.vector_norm(torch.stack([g.norm() for g in gradients])))
            else:
                norms.append(clip_grad_norm_(model, 1.0))
                torch.testing.assert_close(get_total_norm(model), torch.tensor(1.0), rtol=1e-4, atol=0)
    assert norms[0] > 1.1
    torch.testing.assert_close(norms[1], norms[0], rtol=1e-5, atol=0)


@world.case(ranks=4, divisions=[Division(tp=2, sp=True, ep=2, etp=1), Division(ep=2, etp=2), Division(tp=4, sp=True)])
def replicas_stay_equal(division: Division) -> None:
    """After steps of torch's optimiser on batches of their own, with dropout, ranks with the same piece agree (I5)."""
    for kind in ({}, {"moe_grouped_gemm": True}):
        with world.divided(division):
            models = chunks(division, **moe(**kind))
            wanted = outcomes.config(target_modules=[*EXPERTS, "router", "linear_qkv"], lora_dropout=0.1)
            model = outcomes.adapted(models, wanted)
            before = outcomes.logical(model)
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
            for step in range(3):
                world.train(models, world.tokens(4 * (step + 1))[-4:])
                optimizer.step()
                optimizer.zero_grad()
            verify(model)
            after = outcomes.logical(model)
            assert not any(torch.equal(after[name], tensor) for name, tensor in before.items())


@world.case(
    ranks=4,
    divisions=[
        Division(tp=2, sp=True, etp=1),
        Division(ep=2, etp=2),
        Division(tp=2, sp=True, ep=2, etp=1, pp=2),
        Division(tp=4, sp=True, ep=2, etp=1),
        Division(cp=2, ep=2),
    ],
)
def megatrons_own_loop(division: Division) -> None:
    """Its DDP, its finalisation, its clipping by the global norm, both of its optimisers."""
    wanted = outcomes.config(target_modules=[*EXPERTS, "router", "linear_proj"])
    expected = outcomes.trained(WHOLE, wanted, **moe())
    for distributed in (False, True):
        found = outcomes.trained(division, wanted, distributed=distributed, **moe())
        outcomes.close(found, expected, 1e-4)


@pytest.mark.parametrize("ranks", world.sizes(__name__))
def test_experts(ranks: int, request: pytest.FixtureRequest) -> None:
    world.run(__name__, ranks, request.config.getoption("--cases"))
