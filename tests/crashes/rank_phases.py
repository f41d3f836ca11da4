"""The phases of a run, as places where a rank can meet a fault, and runs that meet one after the other."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any, NamedTuple

from rank_faults import Call, Operation, Outcome, attempt, prepare, printed

from lorica.train import state

FAULTS = ("error", "kill", "term", "full", "int")


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


def chain(ranks: int, start: int = 0) -> list[Link]:
    """Every phase once, ranks and faults in turn; with ``start`` from 0 to ``5 * ranks`` every fault on every rank."""
    kinds, numbers = len(FAULTS), range(len(PHASES))
    faults = [FAULTS[(number + number // kinds + start) % kinds] for number in numbers]
    ranks_in_turn = [(number + start // kinds) % ranks for number in numbers]
    return [
        Link(phase, 0 if phase.first else rank, fault)
        for phase, rank, fault in zip(PHASES, ranks_in_turn, faults, strict=True)
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


def save_and_fail(values: dict[str, Any], ranks: int, folder: Path, every: int, faults: list[str]) -> list[Told]:
    """Let each rank in turn meet a fault at every ``every``-th operation on the file system of the second checkpoint.

    Each attempt begins with the first one.
    """
    prepare(values)
    output = Path(values["output_dir"])
    short = values | {"training": values["training"] | {"steps": 2}}
    attempt(short, ranks, folder / "clean", at=Call("lorica.train.state:Saver", "save", 2), victim=0, fault="error")
    begun = output.with_name("begun")
    output.rename(begun)
    told = []
    for victim in range(ranks):
        number, struck = 1 + victim % every, True
        while struck:
            shutil.rmtree(output, ignore_errors=True)
            shutil.copytree(begun, output)
            place, started = folder / f"{victim}-{number}", time.monotonic()
            fault = faults[len(told) % len(faults)]
            outcomes = attempt(short, ranks, place, resume=True, victim=victim, fault=fault, at=Operation(number))
            for checkpoint in state.complete(output):
                state.check(checkpoint)
            struck, seconds = (place / "struck").exists(), time.monotonic() - started
            link = Link(Phase(f"operation {number}", Call("", "")), victim, fault) if struck else None
            told.append(Told(link, outcomes, struck, _complete(begun), _complete(output), printed(place), seconds))
            number += every
    return told


def _complete(output: Path) -> list[str]:
    return [path.name for path in state.complete(output)]
