"""A dense GPT of Megatron-Core's own layers, adapted: every division equals one process (I1, I2, I3, I6)."""

from __future__ import annotations

import outcomes
import pytest
import world
from gpt import Division

world.need_megatron()

WHOLE = Division()


@world.case(ranks=2, divisions=[Division(tp=2), Division(tp=2, sp=True), Division(pp=2), Division(cp=2)])
def every_layer(division: Division) -> None:
    outcomes.expect_equal(outcomes.outcome(division, outcomes.config()), outcomes.outcome(WHOLE, outcomes.config()))


@world.case(
    ranks=4,
    divisions=[
        Division(tp=4),
        Division(tp=4, sp=True),
        Division(tp=2, pp=2),
        Division(tp=2, sp=True, pp=2, vpp=2),
        Division(tp=2, sp=True, cp=2),
    ],
)
def every_layer_on_four(division: Division) -> None:
    every_layer(division)


@world.case(ranks=2, divisions=[Division(tp=2, sp=True), Division(pp=2)])
def activations_computed_again(division: Division) -> None:
    """With a frozen embedding nothing that enters the layers would require a gradient."""
    wanted = outcomes.config(target_modules=["linear_fc1", "linear_fc2"])
    plain = outcomes.outcome(WHOLE, wanted)
    full = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    for again in (full, {"recompute_granularity": "selective", "recompute_modules": ["mlp"]}):
        for place in (WHOLE, division):
            outcomes.expect_equal(outcomes.outcome(place, wanted, **again), plain)


@world.case(
    ranks=4, divisions=[Division(tp=2), Division(tp=2, sp=True, pp=2), Division(tp=4, sp=True), Division(tp=2, cp=2)]
)
def megatrons_own_loop(division: Division) -> None:
    """Its DDP, its finalisation, its clipping by the global norm, both of its optimisers."""
    wanted = outcomes.trained(WHOLE, outcomes.config())
    for distributed in (False, True):
        found = outcomes.trained(division, outcomes.config(), distributed=distributed)
        outcomes.close(found, wanted, 1e-4)
    if division.tp > 2 or division.cp > 1:
        return
    saved = outcomes.config(target_modules=["linear_qkv"], modules_to_save=["final_layernorm", "output_layer"])
    outcomes.close(outcomes.trained(division, saved), outcomes.trained(WHOLE, saved), 1e-4)


@pytest.mark.parametrize("ranks", world.sizes(__name__))
def test_dense(ranks: int, request: pytest.FixtureRequest) -> None:
    world.run(__name__, ranks, request.config.getoption("--cases"))
