"""A fault on any rank in any phase of a run: all ranks end soon and say which it was, and nothing is lost.

Each chain meets a fault in every phase, one after the other on one directory; in the end the run is that which met
none, bit for bit.
"""

from __future__ import annotations

import re
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
WORDS |= {"io": "Input/output error", "readonly": "Read-only file system"}


#: What may fail: removing an older checkpoint, of which some names are within open directories; making a directory that
#: is there.
NOT_NEEDED = re.compile("os.remove|os.rmdir|os.mkdir|.*/step-000001")

#: How four ranks divide the model and the rows; two have the rows between them.
LAYOUTS = {2: {"dp": 2}, 4: {"tp": 2, "dp": 2}}
#: Where ranks that divide the model do something else than ranks that have all of it.
DIVIDED = (
    *("the layout", "the comparison", "the sum of gradients", "the adapter's files", "the pieces of the state"),
    *("the plan of the shards", "the shards", "the old checkpoints", "the shards that are read", "the last files"),
)


def settings(base: Path, data: Path, output: Path, count: int, **checkpoint: Any) -> dict[str, Any]:
    values = runs.settings(base, data, output, training__steps=8)
    values["training"] |= {"batch_size": 4, "eval_every": None}
    values["checkpoint"] = {"every": 1, "keep": 2, **checkpoint}
    values["log"] = {"every": 1}
    values["parallel"] = LAYOUTS[count] | {"timeout": TIMEOUT}
    return values


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
    both = [settings(base, data_file, tmp_path / name, count, **checkpoint) for name in ("whole", "cut")]
    assert_chain(links, count, both, tmp_path)


@pytest.mark.parametrize(("layout", "start"), [({"fsdp": 2}, 5), ({"pp": 2}, 3)], ids=str)
def test_where_ranks_divide_the_model_a_fault_loses_nothing_either(
    layout: dict[str, int], start: int, base: Path, data_file: Path, tmp_path: Path
) -> None:
    links = rank_phases.chain(2, start, DIVIDED)
    both = [settings(base, data_file, tmp_path / name, 2) for name in ("whole", "cut")]
    for values in both:
        values["parallel"] = layout | {"timeout": TIMEOUT}
    assert_chain(links, 2, both, tmp_path)


def assert_chain(links: list[Link], count: int, both: list[dict[str, Any]], folder: Path) -> None:
    """A run that meets these faults is in the end that which met none; ``both`` are the settings of that and of it."""
    whole, cut = both
    (reference,) = ranks.run(1, rank_phases.run, whole, count, [], folder / "one try", timeout=600)
    assert [outcome.code for outcome in reference[-1].outcomes] == [0] * count, reference
    (told,) = ranks.run(1, rank_phases.run, cut, count, links, folder / "tries", timeout=1800)
    for each in told[:-1]:
        assert each.link is not None
        assert each.struck, each
        assert_victim(each.link, each)
        assert_others(each.link, each)
        assert_nothing_lost(each)
    assert [outcome.code for outcome in told[-1].outcomes] == [0] * count, told[-1]
    assert final_state(Path(cut["output_dir"])) == final_state(Path(whole["output_dir"]))


@pytest.mark.parametrize(("count", "most"), [(2, 20), (4, 2)], ids=["2 ranks", "4 ranks"])
def test_a_fault_at_operations_on_the_disk_leaves_the_checkpoint_before(
    count: int, most: int, base: Path, data_file: Path, tmp_path: Path
) -> None:
    told = assert_operations(settings(base, data_file, tmp_path / "out", count), count, most, tmp_path)
    struck = {(link.victim, link.phase.name.split()[0]) for each in told if (link := each.link)}
    assert {victim for victim, _ in struck} == set(range(count))
    if count == 2:
        every = {"open", "read", "faults.fsync", "os.rename"}
        assert every | {"os.mkdir", "os.remove", "os.rmdir"} == {kind for victim, kind in struck if victim == 0}
        assert every == {kind for victim, kind in struck if victim == 1}


def assert_operations(values: dict[str, Any], count: int, most: int | None, folder: Path) -> list[Told]:
    """A checkpoint that meets these faults is written or not, but that before it is there."""
    (found,) = ranks.run(1, rank_phases.save_and_fail, values, count, folder / "tries", most, timeout=1200)
    told: list[Told] = found
    for each in told:
        assert "step-000002" in each.after, each
        assert each.struck == (each.link is not None), each
        link, ended = each.link, [outcome.code for outcome in each.outcomes]
        if not any(ended):
            assert each.after[-1] == "step-000003", each
            assert link is None or NOT_NEEDED.match(link.phase.name), each
            continue
        assert link is not None, each
        assert_victim(link, each)
        assert_others(link, each)
        if link.fault in ("term", "int"):
            assert each.after == ["step-000002", "step-000003"], each
    return told
