"""Layers over Transformer Engine, by stand-ins: adapted as Megatron-Core's own layers with the same weights."""

from __future__ import annotations

import outcomes
import pytest
import te_layers
import world
from gpt import Division, chunks

from lorica.errors import LayoutError

world.need_megatron()

WHOLE = Division()


@world.case(ranks=2, divisions=[WHOLE, Division(tp=2), Division(tp=2, sp=True)])
def as_megatrons_own(division: Division) -> None:
    for wanted in (outcomes.config(), outcomes.config(use_dora=True), outcomes.config(fused_as_one=True)):
        own = outcomes.outcome(WHOLE, wanted)
        found = outcomes.outcome(division, wanted, rebuild=te_layers.rebuild)
        outcomes.expect_equal(found, own, exact=not wanted.use_dora)


@world.case(ranks=2, divisions=[Division(tp=2, sp=True)])
def merged_is_adapted(division: Division) -> None:
    with world.divided(division):
        models = chunks(division)
        te_layers.rebuild(models[0])
        model = outcomes.adapted(models, outcomes.config())
        loss = world.train(models, world.tokens(2), forward_only=True)
        merged = model.merge_and_unload()
        found = world.train([merged], world.tokens(2), forward_only=True)
        assert abs(found - loss) < 1e-5 * loss
        assert not any("forward" in module.__dict__ for module in merged.modules())


@world.case(ranks=2)
def what_cannot_be_opened_is_refused() -> None:
    with world.divided(Division(tp=2)):
        models = chunks(Division(tp=2))
        te_layers.rebuild(models[0])
        layer = models[0].decoder.layers[0].mlp.linear_fc2
        layer.use_bias = True
        with pytest.raises(LayoutError, match=r"decoder.layers.0.mlp.linear_fc2.*skip_bias_add"):
            outcomes.adapted(models, outcomes.config(target_modules=["linear_fc2"]))
        layer.use_bias = False
        layer.config.tp_comm_overlap = True
        with pytest.raises(LayoutError, match=r"decoder.layers.0.mlp.linear_fc2.*tp_comm_overlap"):
            outcomes.adapted(models, outcomes.config(target_modules=["linear_fc2"]))


@pytest.mark.parametrize("ranks", world.sizes(__name__))
def test_te(ranks: int, request: pytest.FixtureRequest) -> None:
    world.run(__name__, ranks, request.config.getoption("--cases"))
