"""The phases of a run, as places where a rank can meet a fault, and runs that meet one after the other."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

from rank_faults import Call, Operation, Outcome, attempt, operations_file, prepare, printed

from lorica.train import state

FAULTS = ("error", "kill", "term", "full", "int")
#: At operations on the disk.
OPERATION_FAULTS = ("io", "kill", "readonly", "term", "full", "int")


class Phase(NamedTuple):
    """A place in a run.

    Attributes:
        first: whether the first rank alone comes there.
        noted: whether a signal is noted there, and obeyed by all ranks between two steps. Elsewhere it ends a process.
    """

    name: str
    at: Call
    first: bool = False
    noted: bool = False


#: In the order in which a chain meets them: nothing is saved before the end of the saving is reached.
PHASES = (
    Phase("the tokenizer", Call("lorica.train.models", "load_tokenizer")),
    Phase("the data", Call("lorica.train.sources", "load")),
    Phase("the base model", Call("lorica.train.models", "load_base")),
    Phase("the layout", Call("lorica.train.layouts", "lay_out")),
    Phase("the targets", Call("lorica.model.lora_model", "make_plan")),
    Phase("the starts", Call("lorica.adapt.inject", "_start", 3)),
    Phase("the optimiser", Call("lorica.train.optim", "optimizer")),
    Phase("the comparison", Call("lorica.ranks.agreement", "_description")),
    Phase("the output directory", Call("lorica.train.job", "_open_output"), first=True),
    Phase("the first forward", Call("lorica.train.evaluate", "token_losses"), noted=True),
    Phase("the backward", Call("torch.autograd", "backward"), noted=True),
    Phase("the sum of gradients", Call("lorica.parallel", "sum_gradients"), noted=True),
    Phase("their norm", Call("lorica.parallel", "clip_grad_norm_"), noted=True),
    Phase("the optimiser's step", Call("lorica.optim:AdamW", "step"), noted=True),
    Phase("a record", Call("lorica.train.metrics:Metrics", "write"), first=True, noted=True),
    Phase("the adapter's files", Call("lorica.model.peft_model:PeftModel", "save_pretrained"), noted=True),
    Phase("the pieces of the state", Call("lorica.train.tensors", "pieces"), noted=True),
    Phase("the plan of the shards", Call("lorica.checkpoint.sharded:_SavePlanner", "create_local_plan"), noted=True),
    Phase("the shards", Call("lorica.checkpoint.shards:ShardWriter", "write_data"), noted=True),
    Phase("the index", Call("lorica.checkpoint.shards", "write_index"), first=True, noted=True),
    Phase("the directory's name", Call("lorica.files.atomic", "finish_directory"), first=True, noted=True),
    Phase("the old checkpoints", Call("lorica.train.state", "prune", 2), first=True, noted=True),
    Phase("the shards that are read", Call("lorica.checkpoint.shards:ShardReader", "read_data")),
    Phase("the last files", Call("lorica.train.job", "_finish")),
    Phase("the picture", Call("lorica.train.metrics", "plot"), first=True),
)


class Link(NamedTuple):
    """One fault of a chain."""

    phase: Phase
    victim: int
    fault: str


class Told(NamedTuple):
    """What became of an attempt.

    Attributes:
        link: its fault; None: there was none.
        before: names of the complete checkpoints.
        after: likewise.
        printed: by all ranks.
    """

    link: Link | None
    outcomes: list[Outcome]
    struck: bool
    before: list[str]
    after: list[str]
    printed: str
    seconds: float


def chain(ranks: int, start: int = 0, names: Collection[str] = ()) -> list[Link]:
    """Every phase once, ranks and faults in turn; with ``start`` from 0 to ``5 * ranks`` every fault on every rank.

    Args:
        names: of phases; empty: all.
    """
    phases, kinds = [phase for phase in PHASES if not names or phase.name in names], len(FAULTS)
    assert len(phases) == len(names or PHASES)
    return [
        Link(
            phase,
            0 if phase.first else (number + start // kinds) % ranks,
            FAULTS[(number + number // kinds + start) % kinds],
        )
        for number, phase in enumerate(phases)
    ]


def run(values: dict[str, Any], ranks: int, links: list[Link], folder: Path) -> list[Told]:
    """Go through the links, each run going on from where the one before was ended; then to the end without a fault."""
    prepare(values)
    output = Path(values["output_dir"])
    told = []
    for number, link in enumerate([*links, None]):
        place = folder / f"attempt-{number}"
        fault = {} if link is None else {"victim": link.victim, "fault": link.fault, "at": link.phase.at}
        before, started = _complete(output), time.monotonic()
        outcomes = attempt(values, ranks, place, resume=output.exists() and any(output.iterdir()), **fault)
        for checkpoint in state.complete(output):
            state.check(checkpoint)
        struck, seconds = (place / "struck").exists(), time.monotonic() - started
        told.append(Told(link, outcomes, struck, before, _complete(output), printed(place), seconds))
    return told


def save_and_fail(values: dict[str, Any], ranks: int, folder: Path, most: int | None = None) -> list[Told]:
    """Let each rank in turn meet a fault at operations on the file system of the third checkpoint.

    Each attempt begins with the first two, of which the third takes the place of the first.

    Args:
        most: at so many operations of a rank, evenly among those that :func:`telling` names; None: at all there are.
    """
    prepare(values)
    output = Path(values["output_dir"])
    short = values | {"training": values["training"] | {"steps": 3}}
    attempt(short, ranks, folder / "clean", at=Call("lorica.train.state:Saver", "save", 3), victim=0, fault="error")
    begun = output.with_name("begun")
    output.rename(begun)
    told: list[Told] = []

    def hit(name: str, victim: int = -1, fault: str = "", number: int | None = None) -> None:
        shutil.rmtree(output, ignore_errors=True)
        shutil.copytree(begun, output)
        place, started = folder / name, time.monotonic()
        at = Operation(number)
        note = (lambda rank: at.arm("")) if number is None else (lambda rank: None)
        outcomes = attempt(short, ranks, place, resume=True, victim=victim, fault=fault, at=at, before=note)
        for checkpoint in state.complete(output):
            state.check(checkpoint)
        link = None if number is None else Link(Phase(done[victim][number], Call("", ""), noted=True), victim, fault)
        struck, seconds = (place / "struck").exists(), time.monotonic() - started
        told.append(Told(link, outcomes, struck, _complete(begun), _complete(output), printed(place), seconds))

    hit("noted")
    done = [operations_file(folder / "noted", rank).read_text().splitlines() for rank in range(ranks)]
    for victim in range(ranks):
        chosen = list(range(len(done[victim]))) if most is None else telling(done[victim])
        step = 1 if most is None else max(1, math.ceil(len(chosen) / most))
        for number in chosen[::step]:
            hit(f"{victim}-{number}", victim, OPERATION_FAULTS[len(told) % len(OPERATION_FAULTS)], number)
    return told


def telling(operations: list[str]) -> list[int]:
    """The first and the last operation of each kind, as numbers in order."""
    kinds = [operation.split()[0] for operation in operations]
    ends = {(kinds.index(kind), len(kinds) - 1 - kinds[::-1].index(kind)) for kind in kinds}
    return sorted({number for pair in ends for number in pair})


def _complete(output: Path) -> list[str]:
    return [path.name for path in state.complete(output)]
