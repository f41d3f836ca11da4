"""What a compiled step of each library takes, in graphs: one, without a break."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.measures import compiled
from benchmarks.suite import FROZEN, LORICA, MEASURES, PEFT, quiet
from lorica.bench import contest

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.mark.parametrize("fields", [{"tokens": 64}, {"tokens": 64, "lora_dropout": 0.05}, {"tokens": 1}], ids=str)
def test_a_step_and_a_token_are_one_graph_each(fields: dict[str, Any]) -> None:
    with quiet(), compiled.fresh_compiler():
        counts = compiled.graphs(True, **fields)
    for side in (FROZEN, PEFT, LORICA):
        assert counts[compiled.GRAPHS][side] == 1, side
        assert counts[compiled.BREAKS][side] == 0, side


class Broken(torch.nn.Module):
    """Two graphs with a break between them."""

    def forward(self, inputs_embeds: torch.Tensor, use_cache: bool) -> torch.Tensor:
        y = inputs_embeds + 1
        torch._dynamo.graph_break()
        return y + 1


def test_breaks_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "models", lambda quick: ({LORICA: Broken()}, 4))
    with quiet(), compiled.fresh_compiler():
        counts = compiled.graphs(True, tokens=1)
    assert (counts[compiled.GRAPHS][LORICA], counts[compiled.BREAKS][LORICA]) == (2, 1)


def test_its_case_has_times_and_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows of the table; compiled by nothing, so that this is no test of inductor."""
    plain = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: plain(model, backend="eager"))
    monkeypatch.setattr(contest, "QUICK_BUDGET", 0.0)
    measure = MEASURES["compiled"]
    case = next(case for case in measure.cases if case.name.startswith("one token"))
    figures = case.take(measure, quick=True)
    assert [figure.quantity for figure in figures] == ["time", compiled.GRAPHS, compiled.BREAKS]
    assert figures[1].ratio == 1.0
