"""The page of layers and features is what the checks say today, and no layer, variant or start is missing in it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import checks
import pytest
import table
from checks import FEATURES, Feature, NoMeaning
from layers import LAYERS

from lorica.errors import TargetError
from lorica.init import INITS
from lorica.ops import OPS
from lorica.storage import KINDS
from lorica.variants import VARIANTS

pytest.importorskip("transformers")

#: Layers that engines divide are no rows of the page: they are tried on ranks, in tests/megatron and tests/parallel.
ENGINES = ("megatron.", "neuronx_distributed.", "transformer_engine.", "lorica.engines.")


@pytest.fixture(scope="module")
def cells() -> dict[tuple[str, str], tuple[str, str]]:
    return table.run()


def test_the_page_is_what_the_checks_say(cells: Any) -> None:
    """Where other packages are installed than where the page was written, it has other rows and numbers of notes."""
    written = table.DOCUMENT.read_text(encoding="utf-8")
    page, now = table.read(written), table.read(table.render(cells))
    assert len(now) > len(cells)  # and those of the layouts
    assert {name: page.get(name) for name in now} == now, "run python docs/make_features.py"
    absent = {layer.name for layer in LAYERS if not layer.there}
    assert {row for _, row in page.keys() - now.keys()} <= absent, "run python docs/make_features.py"


def test_every_cell_says_why(cells: Any) -> None:
    assert {mark for mark, _ in cells.values()} <= {table.YES, table.NO, table.NONE}
    assert all(note for mark, note in cells.values() if mark != table.YES)
    assert {feature for feature, _ in cells} == {feature.name for feature in FEATURES}


def test_every_feature_works_somewhere(cells: Any) -> None:
    for feature in FEATURES:
        assert any(cells[feature.name, layer.name][0] == table.YES for layer in LAYERS if layer.there), feature.name


def test_everything_that_is_registered_is_in_it() -> None:
    covered = {thing for layer in LAYERS for thing in layer.stands_for}
    left = {key if isinstance(key, str) else key.__qualname__ for key in {*OPS, *KINDS} - covered}
    left = {key for key in left if not key.startswith(ENGINES)}
    assert {f"`{key}`" for key in left} <= set(table.missing())
    names = {feature.name for feature in FEATURES}
    assert {f"`{name}`" for name in [*filter(None, VARIANTS), *INITS]} <= names


def test_a_check_that_fails_is_seen() -> None:
    def fails(layer: Any) -> None:
        base, model = checks.filled(layer)
        checks.close(layer.run(model), layer.run(base), 1e-3)

    def crashes(layer: Any) -> None:
        raise KeyError("gone")

    def refuses(layer: Any) -> None:
        raise TargetError("target: not on a layer of the kind Linear, whose weight is (3, 4)")

    def no_sense(layer: Any) -> None:
        raise NoMeaning("why")

    linear = LAYERS[0]
    marks = {
        check.__name__: table.cell(Feature("x", "x", check), linear) for check in (fails, crashes, refuses, no_sense)
    }
    assert marks["fails"][0] == marks["crashes"][0] == table.FAULT
    assert marks["refuses"] == (table.NO, "not on a layer of this kind, whose weight is (…)")
    assert marks["no_sense"] == (table.NONE, "why")
    with pytest.raises(AssertionError, match=r"x on `nn\.Linear`: KeyError"):
        table.run([linear], [Feature("x", "x", crashes)])


def test_a_wrong_oracle_is_seen() -> None:
    """The check of plain LoRA compares numbers."""
    first = FEATURES[0]
    wrong = replace(LAYERS[0], expected=lambda base, model, batch, scale: base(batch))
    assert table.cell(first, LAYERS[0])[0] == table.YES
    assert table.cell(first, wrong)[0] == table.FAULT
