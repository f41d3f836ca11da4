"""An embedding that is the output layer too: on one stage one weight, on several a copy at each end."""

from __future__ import annotations

import outcomes
import pytest
import world
from gpt import Division, chunks

from lorica.errors import AdapterError, TargetError

world.need_megatron()

WHOLE = Division()


@world.case(ranks=2, divisions=[Division(tp=2), Division(tp=2, sp=True), Division(pp=2)])
def both_ends_have_factors_of_their_own(division: Division) -> None:
    whole = outcomes.outcome(WHOLE, outcomes.config(), tied=True)
    outcomes.expect_equal(outcomes.outcome(division, outcomes.config(), tied=True), whole)


@world.case(ranks=2, divisions=[WHOLE, Division(pp=2)])
def nothing_is_merged_into_a_weight_of_two_layers(division: Division) -> None:
    with world.divided(division):
        model = outcomes.adapted(chunks(division, tied=True), outcomes.config())
        with pytest.raises(AdapterError, match=r"(word_embeddings|output_layer).*share this weight"):
            model.merge_adapter()


@world.case(ranks=2)
def nothing_is_taken_out_of_a_weight_of_two_layers() -> None:
    with world.divided(WHOLE):
        wanted = outcomes.config(target_modules=["output_layer"], init_lora_weights="pissa")
        with pytest.raises(TargetError, match=r"output_layer.*pissa.*share this weight"):
            outcomes.adapted(chunks(WHOLE, tied=True), wanted)


@world.case(ranks=4, divisions=[Division(tp=2, pp=2)])
def megatrons_own_loop_with_a_tied_embedding(division: Division) -> None:
    """Its finalisation looks for the gradient of the shared weight, which is frozen."""
    wanted = outcomes.trained(WHOLE, outcomes.config(), tied=True)
    outcomes.close(outcomes.trained(division, outcomes.config(), tied=True), wanted, 1e-4)


@pytest.mark.parametrize("ranks", world.sizes(__name__))
def test_tied(ranks: int, request: pytest.FixtureRequest) -> None:
    world.run(__name__, ranks, request.config.getoption("--cases"))
