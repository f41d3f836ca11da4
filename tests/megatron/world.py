"""Cases on Megatron-Core's real layers: one start of processes for all cases of a file that need as many ranks.

How to write a case: a function at the level of a test file, marked with how many ranks it needs, and one test::

    import pytest
    import world
    from gpt import Division, chunks, moe

    world.need_megatron()

    @world.case(ranks=4)
    def rows_are_summed_once() -> None:
        with world.divided(Division()):                       # every rank has the whole model
            whole = adapted(chunks(Division()))
            expected = world.train(whole, world.tokens(2))
        with world.divided(division := Division(tp=2, sp=True, pp=2)) as here:
            pieces = adapted(chunks(division))
            found = world.train(pieces, world.tokens(2))      # the loss, the same on every rank
        assert torch.allclose(found, expected)

    @pytest.mark.parametrize("ranks", world.sizes(__name__))
    def test_cases(ranks: int, request: pytest.FixtureRequest) -> None:
        world.run(__name__, ranks, request.config.getoption("--cases"))

``world.case(ranks=2, divisions=[...])`` makes a case of each division, which the function gets as its argument.
Inside a case the default process group is there, ``shim`` is installed, and megatron-core may be imported: not at the
top of the file, where pytest would import it. Cases follow one another in the same processes, each from the same
random state; when one fails the others go on in new processes, and the message says which case failed on which rank,
with every rank's traceback. ``pytest tests/megatron/test_x.py --cases rows,router`` runs the cases with these words.
"""

from __future__ import annotations

import faulthandler
import importlib
import importlib.util
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kept_groups
import pytest
import ranks as spawned
import torch
import torch.distributed as dist
from gpt import VOCABULARY, Division
from stand_ins import of_this_rank
from torch import Tensor, nn

#: Seconds after which a case, or a start, is taken to hang, many times what they need; it says where it is and leaves.
PATIENCE = START = spawned.PATIENCE
#: So many failures are told, and the cases after them not tried.
MOST = 4
#: The cases of each file, by its module's name.
CASES: dict[str, list[Case]] = {}


@dataclass(frozen=True)
class Case:
    """A function on so many ranks, perhaps with a division as its argument."""

    name: str
    ranks: int
    function: Callable[..., None]
    division: Division | None = None

    def __str__(self) -> str:
        return self.name if self.division is None else f"{self.name} [{self.division}]"


def need_megatron() -> None:
    """Skip the rest of a test file where megatron-core is not installed."""
    if importlib.util.find_spec("megatron.core") is None:
        pytest.skip("megatron-core is not installed", allow_module_level=True)


def case(*, ranks: int, divisions: Iterable[Division] = ()) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Mark a function as a case on so many ranks; with divisions, one case each."""

    def mark(function: Callable[..., None]) -> Callable[..., None]:
        made = [Case(function.__name__, ranks, function, division) for division in divisions]
        CASES.setdefault(function.__module__, []).extend(made or [Case(function.__name__, ranks, function)])
        return function

    return mark


def sizes(module: str) -> list[int]:
    """Return how many ranks the cases of a file need."""
    return sorted({found.ranks for found in CASES[module]})


def run(module: str, ranks: int, words: str = "") -> None:
    """Run the cases of a file that need so many ranks.

    Args:
        module: the file's ``__name__``.
        ranks: how many.
        words: only cases whose names hold one of these, divided by commas; empty: all.

    Raises:
        AssertionError: names each case that failed, with what every rank had to say.
    """
    wanted = [word.strip() for word in words.split(",") if word.strip()]
    left = [
        index
        for index, found in enumerate(CASES[module])
        if found.ranks == ranks and (not wanted or any(word in str(found) for word in wanted))
    ]
    failures = []
    while left:
        with tempfile.TemporaryDirectory(prefix="cases-") as folder:
            try:
                spawned.run(ranks, _run, module, left, folder, timeout=START + PATIENCE * len(left))
                break
            except spawned.RankError as error:
                done = min(_progress(folder, rank) for rank in range(ranks))
                failures.append(f"==== {CASES[module][left[done]]}\n{error}" if done >= 0 else str(error))
                left = left[done + 1 :] if done >= 0 and len(failures) < MOST else []
    assert not failures, "\n\n".join(failures)


def _run(module: str, indices: Sequence[int], folder: str) -> None:
    import shim

    shim.install()
    importlib.import_module(module)
    file = Path(folder, f"done-{dist.get_rank()}")
    for place, index in enumerate(indices):
        file.write_text(str(place))
        found = CASES[module][index]
        torch.manual_seed(0)
        faulthandler.dump_traceback_later(PATIENCE, exit=True)
        try:
            found.function(*([] if found.division is None else [found.division]))
        except BaseException as error:
            raise type("CaseFailed", (AssertionError,), {})(f"{found}: {type(error).__name__}: {error}") from error
        finally:
            sys.stdout.flush()
        dist.barrier()
        faulthandler.cancel_dump_traceback_later()


def _progress(folder: str, rank: int) -> int:
    """Return the place of the case that a rank has come to; -1: none yet."""
    file = Path(folder, f"done-{rank}")
    return int(file.read_text()) if file.exists() else -1


@contextmanager
def divided(division: Division) -> Iterator[Any]:
    """Let Megatron-Core's state be that of a division; gives ``megatron.core.parallel_state``.

    The ranks that the division does not need are data-parallel: ``Division()`` gives each the whole model.
    """
    from megatron.core import parallel_state, tensor_parallel

    with kept_groups.made():
        parallel_state.initialize_model_parallel(
            division.tp,
            division.pp,
            division.vpp,
            context_parallel_size=division.cp,
            expert_model_parallel_size=division.ep,
            expert_tensor_parallel_size=division.etp,
        )
    tensor_parallel.model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    torch.manual_seed(0)
    try:
        yield parallel_state
    finally:
        with kept_groups.not_destroyed():
            parallel_state.destroy_model_parallel()
    dist.barrier()  # not after an error: the others may not come here
    for group in [group for group in dist.distributed_c10d._world.pg_map if group is not dist.group.WORLD]:
        if not kept_groups.among(group):
            dist.destroy_process_group(group)  # each has threads


def tokens(batches: int, length: int = 8, rows: int = 2) -> Tensor:
    """Return microbatches of random tokens, ``[batches, rows, length + 1]``, the same on every rank."""
    return torch.randint(VOCABULARY, (batches, rows, length + 1), generator=torch.Generator().manual_seed(5))


def train(models: Sequence[nn.Module], batches: Tensor, *, forward_only: bool = False, alone: bool = False) -> Tensor:
    """Run Megatron-Core's own schedule, forward and backward, and return the mean loss, the same on every rank.

    Of the microbatches each data-parallel rank takes its share, so the loss is that of all of them and a gradient
    that is averaged over the data axis that of the loss. Nothing is done to gradients after the backward, unless the
    models' ``config.finalize_model_grads_func`` does it.

    Args:
        models: this rank's chunks, adapted or not.
        batches: from :func:`tokens`; the data-parallel size divides their number.
        forward_only: whether to leave the backward out.
        alone: let each rank take all of the microbatches, as one process does that has the whole model: the oracle,
            whose gradients nobody has to sum.
    """
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    data, place = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    own = batches if alone else batches[place::data]
    losses = get_forward_backward_func()(
        forward_step_func=_step,
        data_iterator=[iter(own) for _ in models],
        model=list(models),
        num_microbatches=len(own),
        seq_length=batches.shape[2] - 1,
        micro_batch_size=batches.shape[1],
        forward_only=forward_only,
    )
    total = torch.stack([one["loss"] for one in losses]).sum() if losses else torch.zeros(())
    if alone:
        return total / len(batches)
    # Only last stages have any; the others of a batch say the same, or what their own tokens say.
    replicas = dist.get_world_size() // data // parallel_state.get_pipeline_model_parallel_world_size()
    dist.all_reduce(total)
    return total / replicas / len(batches)


def _step(batches: Any, model: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
    from megatron.core import parallel_state

    batch = next(batches)
    ids, labels = batch[:, :-1].contiguous(), batch[:, 1:].contiguous()
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    ids, labels, positions = (of_this_rank(tensor, 1) for tensor in (ids, labels, positions))
    output = model(ids, positions, None, labels=labels)

    def loss(output: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        mean = output.mean()  # the schedule takes a loss for this rank's share of it, and multiplies it by cp
        return mean / parallel_state.get_context_parallel_world_size(), {"loss": mean.detach().clone()}

    return output, loss
