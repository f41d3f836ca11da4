"""A fault on any rank in any phase of a run: all ranks end soon and say which it was, and nothing is lost.

Each chain meets a fault in every phase, one after the other on one directory; in the end the run is that which met
none, bit for bit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import rank_phases
import ranks
from rank_faults import SOON, TIMEOUT
from rank_phases import Link, Told
from safetensors.torch import load_file

import runs
from lorica.train import metrics, state

SPEEDS = ("seconds", "tokens_per_second")
WORDS = {"error": "struck", "full": "No space left on device", "int": "KeyboardInterrupt"}


#: How four ranks divide the model and the rows; two have the rows between them.
LAYOUTS = {2: {"dp": 2}, 4: {"tp": 2, "dp": 2}}


def settings(base: Path, data: Path, output: Path, count: int, **checkpoint: Any) -> dict[str, Any]:
    values = runs.settings(base, data, output, training__steps=8)
    values["training"] |= {"batch_size": 4, "eval_every": None}
    values["checkpoint"] = {"every": 1, "keep": 2, **checkpoint}
    values["log"] = {"every": 1}
    values["parallel"] = LAYOUTS[count] | {"timeout": TIMEOUT}
    return values


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def data_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.write_jsonl(tmp_path_factory.mktemp("data") / "sums.jsonl", runs.sums(30))


def assert_victim(link: Link, told: Told) -> None:
    """The rank with the fault ends by it."""
    outcome, context = told.outcomes[link.victim], (link, told)
    if link.fault == "kill":
        assert outcome.code == -9, context
    elif link.fault in ("term", "int") and link.phase.noted:
        assert outcome.kind == "Interrupted", context
    elif link.fault == "term":
        assert outcome.code == -15, context
    elif link.fault == "int":
        assert outcome.kind == "KeyboardInterrupt", context
    else:
        assert outcome.kind, context
        assert WORDS[link.fault] in outcome.said, context


def assert_others(link: Link, told: Told) -> None:
    """The other ranks end soon, and name that rank and what it had."""
    for rank, outcome in enumerate(told.outcomes):
        context = link, rank, outcome, told.printed
        assert outcome.late < SOON, context
        if rank == link.victim:
            continue
        if link.fault in ("term", "int") and link.phase.noted:
            assert outcome.kind == "Interrupted", context
            continue
        assert outcome.kind in ("LostRankError", "RankError", "CheckpointError", "UnsavedError"), context
        assert f"rank {link.victim}" in outcome.said.partition("got no answer from another rank:")[2] or (
            f"rank {link.victim}:" in outcome.said
        ), context
        assert WORDS.get(link.fault, "gave no sign of life") in outcome.said, context


def assert_nothing_lost(told: Told) -> None:
    """The newest checkpoint is the one that was, or a newer; one more is there if it was. The chain looks at each."""
    assert told.after[-1:] >= told.before[-1:], told
    assert len(told.after) >= min(2, len(told.before)), told


def final_state(output: Path) -> dict[str, Any]:
    """What a run leaves, but for the times that things took."""
    records = metrics.read(output / "metrics.jsonl")
    files = sorted((state.complete(output)[-1] / "state").glob("*.safetensors"))
    return {
        "records": [{key: value for key, value in record.items() if key not in SPEEDS} for record in records],
        "adapter": (output / "adapter" / state.ADAPTER).read_bytes(),
        "state": {path.name: {name: value.tolist() for name, value in load_file(path).items()} for path in files},
    }


@pytest.mark.parametrize(
    ("count", "start", "checkpoint"), [(2, 0, {}), (4, 1, {"asynchronous": True})], ids=["2 ranks", "4 ranks, later"]
)
def test_a_fault_in_every_phase_and_the_run_is_the_uninterrupted_one(
    count: int, start: int, checkpoint: dict[str, Any], base: Path, data_file: Path, tmp_path: Path
) -> None:
    links = rank_phases.chain(count, start)
    assert {link.victim for link in links} == set(range(count))
    assert_chain(links, count, checkpoint, base, data_file, tmp_path)


def assert_chain(
    links: list[Link], count: int, checkpoint: dict[str, Any], base: Path, data_file: Path, folder: Path
) -> None:
    """A run that meets these faults is in the end that which met none."""
    whole, cut = (settings(base, data_file, folder / name, count, **checkpoint) for name in ("whole", "cut"))
    (reference,) = ranks.run(1, rank_phases.run, whole, count, [], folder / "one try", timeout=200)
    assert [outcome.code for outcome in reference[-1].outcomes] == [0] * count, reference
    (told,) = ranks.run(1, rank_phases.run, cut, count, links, folder / "tries", timeout=600)
    for each in told[:-1]:
        assert each.link is not None
        assert each.struck, each
        assert_victim(each.link, each)
        assert_others(each.link, each)
        assert_nothing_lost(each)
    assert [outcome.code for outcome in told[-1].outcomes] == [0] * count, told[-1]
    assert final_state(folder / "cut") == final_state(folder / "whole")


def test_a_fault_at_operations_on_the_disk_leaves_the_checkpoint_before(
    base: Path, data_file: Path, tmp_path: Path
) -> None:
    for count, every in ((2, 6), (4, 13)):
        place = tmp_path / f"{count}"
        values = settings(base, data_file, place / "out", count)
        arguments = values, count, place / "tries", every, ["kill", "full", "term", "int"]
        (told,) = ranks.run(1, rank_phases.save_and_fail, *arguments, timeout=600)
        struck = [each for each in told if each.link is not None]
        assert {each.link.victim for each in struck if each.link} == set(range(count))
        for each in struck:
            assert each.link is not None
            assert "step-000001" in each.after, each
            assert all(outcome.late < SOON for outcome in each.outcomes), each
        for each in told:
            ended = [outcome.code for outcome in each.outcomes]
            if each.link is not None and any(ended):
                assert ended[each.link.victim] == (-9 if each.link.fault == "kill" else 3), each
            else:  # no fault any more, or one in what could wait: what is left of older checkpoints
                assert [outcome.code for outcome in each.outcomes] == [0] * count, each
                assert each.after == ["step-000001", "step-000002"], each
            if each.link is not None and each.link.fault in ("term", "int"):
                assert {outcome.kind for outcome in each.outcomes} == {"Interrupted"}, each
                assert each.after == ["step-000001", "step-000002"], each
