"""The training loop: forward, backward, clip, step; log, evaluate and save when it is time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from lorica import parallel
from lorica.errors import LayoutError, LoricaError
from lorica.train import evaluate, layouts
from lorica.train.collate import Batch, Sight
from lorica.train.data import Example
from lorica.train.metrics import Record
from lorica.train.pipeline import Pipelines
from lorica.train.ranks import Ranks
from lorica.train.recipe import TrainingSection
from lorica.train.state import Live, Progress
from lorica.variants import variant_of
from lorica.variants.losses import WITH_LOSS


class DivergedError(LoricaError):
    """The loss is no longer a number."""


@dataclass(frozen=True)
class Schedule:
    """When a run of ``steps`` does what."""

    steps: int
    log_every: int
    eval_every: int | None
    checkpoint_every: int | None

    def due(self, every: int | None, step: int) -> bool:
        return step == self.steps or (every is not None and step % every == 0)


@dataclass(frozen=True)
class Step:
    """What one optimiser step saw: the summed loss over ``learned`` of ``tokens`` tokens, and the gradient's norm."""

    loss: Tensor
    learned: int
    tokens: int
    norm: Tensor


@dataclass
class Trainer:
    """One optimiser step at a time over :class:`~lorica.train.state.Live`; owns no files and no signals."""

    live: Live
    settings: TrainingSection
    held_out: Sequence[Example]
    pad_id: int
    ranks: Ranks = field(default_factory=Ranks)
    sight: Sight | None = None

    def __post_init__(self) -> None:
        self._stream: Iterator[Batch] = iter(self.live.batches)
        self._device = next(self.live.model.parameters()).device
        stages = layouts.stages(self.live.model)
        self._pipelines = Pipelines(self.live.model, stages, self.pad_id) if stages is not None else None
        if self._pipelines is not None:
            adapters = getattr(self.live.model, "peft_config", {})
            found = [name for config in adapters.values() if (name := variant_of(config)) in WITH_LOSS]
            if found:
                raise LayoutError(
                    f"{found[0]}: its loss is summed over all layers, and a pipeline stage has only its own"
                )

    def step(self) -> Step:
        """One optimiser step, over ``gradient_accumulation`` batches."""
        batches = list(islice(self._stream, self.settings.gradient_accumulation))
        learned = count_learned(batches)
        # Each token weighs the same, whichever of the accumulated batches and on whichever rank it is in. (Ranks that
        # share a batch average their gradients.)
        total = self._backward(batches, self.ranks.share[1], max(1, learned))
        parallel.sum_gradients(self.live.model)
        norm = parallel.clip_grad_norm_(self.live.model, self.settings.max_grad_norm or math.inf)
        self.live.optimizer.step()
        self.live.scheduler.step()
        self.live.optimizer.zero_grad(set_to_none=True)
        return Step(total, learned, sum(int(batch["tokens"]) for batch in batches), norm)

    def _backward(self, batches: Sequence[Batch], shares: int, learned: int) -> Tensor:
        """Add the gradients of ``shares / learned`` times the summed loss; return the sum."""
        if self._pipelines is not None:
            with self._autocast():
                return self._pipelines.train(batches, shares / learned)
        total = torch.zeros((), device=self._device)
        for batch in batches:
            with self._autocast():
                summed, _ = evaluate.token_losses(self.live.model, batch)
            torch.autograd.backward(summed * shares / learned + self._added() / len(batches))
            total += summed.detach()
        return total

    def _added(self) -> Tensor | float:
        """The loss that the adapter's variant adds to the task's: 0 for most. It is no part of what is reported."""
        model: Any = self.live.model
        added: Tensor | float = model._get_kasa_loss() + model._get_monteclora_loss()
        return added

    def evaluate(self, stop: Callable[[], bool]) -> float:
        """The held-out loss; NaN if asked to stop meanwhile."""
        size = self.settings.eval_batch_size or self.settings.batch_size
        with self._autocast():
            return evaluate.loss(
                self.live.model,
                self.held_out,
                batch_size=size,
                pad_id=self.pad_id,
                stop=stop,
                ranks=self.ranks,
                measure=self._pipelines.evaluate if self._pipelines is not None else None,
                sight=self.sight,
            )

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self._device.type, torch.bfloat16) if self.settings.bf16 else nullcontext()


def count_learned(batches: Sequence[Batch]) -> int:
    """The tokens that are learned in these batches, of which the loss is the mean."""
    return sum(int(batch["learned"]) for batch in batches)


def train(
    trainer: Trainer,
    schedule: Schedule,
    *,
    stop: Callable[[], bool],
    record: Callable[[Record], None],
    save: Callable[[], None],
    on_step: Callable[[int, float], None],
) -> None:
    """Go from where ``trainer.live.progress`` stands to ``schedule.steps``; if ``stop`` says so, save and return.

    On several ranks ``stop`` has to say the same on all of them.

    The checkpoint of a step is taken before its evaluation, which therefore happens again after a resume. ``on_step``
    is told the tokens and seconds of each step.

    Raises:
        DivergedError: the loss is not finite; nothing of that state is saved.
    """
    live, progress, ranks = trainer.live, trainer.live.progress, trainer.ranks
    before = progress.window_loss if ranks.share[0] == 0 else 0.0
    window = torch.tensor(before, device=next(live.model.parameters()).device)
    live.model.train()
    while not stop():
        if progress.step == 0 or schedule.due(schedule.eval_every, progress.step):
            _evaluate(trainer, stop, record)
        if progress.step >= schedule.steps or stop():
            break
        started = time.perf_counter()
        rate = float(live.scheduler.get_last_lr()[0])
        step = trainer.step()
        window += step.loss
        elapsed = time.perf_counter() - started
        progress.step += 1
        progress.tokens += step.tokens
        progress.learned += step.learned
        progress.window_tokens += step.tokens
        progress.window_learned += step.learned
        progress.seconds += elapsed
        progress.window_seconds += elapsed
        logged = schedule.due(schedule.log_every, progress.step)
        due = schedule.due(schedule.checkpoint_every, progress.step)
        on_step(step.tokens, elapsed)
        if logged or due:
            progress.window_loss = _finite(ranks.total(window), progress.step)
        if logged:
            record(_train_record(progress, rate, step.norm))
            window.zero_()
            progress.open_window()
        if due:
            save()
    if stop():
        progress.window_loss = _finite(ranks.total(window), progress.step)
        save()


def _train_record(progress: Progress, rate: float, norm: Tensor) -> Record:
    return {
        "kind": "train",
        "step": progress.step,
        "loss": progress.window_loss / max(1, progress.window_learned),
        "learning_rate": rate,
        "grad_norm": float(norm),
        "tokens": progress.tokens,
        "learned_tokens": progress.learned,
        "tokens_per_second": progress.window_tokens / max(1e-9, progress.window_seconds),
        "seconds": progress.seconds,
    }


def _evaluate(trainer: Trainer, stop: Callable[[], bool], record: Callable[[Record], None]) -> None:
    if not trainer.held_out:
        return
    loss = trainer.evaluate(stop)
    if not stop():
        step = trainer.live.progress.step
        record({"kind": "eval", "step": step, "loss": loss, "perplexity": math.exp(min(loss, 700.0))})


def _finite(window: Tensor, step: int) -> float:
    value = float(window)
    if not math.isfinite(value):
        raise DivergedError(
            f"The loss is {value} at step {step}. A lower training.learning_rate, more warm-up, "
            "or model.dtype=float32 may help; the last checkpoint is from before."
        )
    return value
