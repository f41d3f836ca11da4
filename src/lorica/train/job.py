"""A whole training run: from a recipe to an adapter, with its checkpoints, metrics and picture.

Everything that can be wrong is found before the first file is written.
"""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from lorica import parallel
from lorica.errors import CheckpointError, LoricaError, RecipeError
from lorica.files import atomic
from lorica.train import calibrate, evaluate, layouts, metrics, models, optim, ranks, sources, state, vision
from lorica.train.claim import Claim
from lorica.train.collate import Batches, Collator, documents_are_separate, pack
from lorica.train.data import fingerprint
from lorica.train.loop import Schedule, Trainer, train
from lorica.train.metrics import Metrics, Record
from lorica.train.ranks import Ranks
from lorica.train.recipe import LoraSection, Recipe, check_rows, dump_yaml, flatten
from lorica.train.signals import Interrupted, StopRequest

# What a run writes into its output directory, and all that --overwrite removes from it.
_FILES = ("recipe.yaml", "metrics.jsonl", "loss.png")
_DIRECTORIES = ("checkpoints", "adapter", "tensorboard", calibrate.START)


# Seconds that ranks which replace others wait for those to be gone.
_PATIENCE = 30.0


@dataclass(frozen=True)
class Result:
    """What a run gave. Losses are nats per learned token; None where there was no record."""

    output_dir: Path
    adapter: Path
    metrics: Path
    plot: Path
    steps: int
    train_loss: float | None
    eval_loss_before: float | None
    eval_loss_after: float | None
    seconds: float


@dataclass
class _Run:
    recipe: Recipe
    trainer: Trainer
    schedule: Schedule
    data: str
    notes: list[str]


def run(
    recipe: Recipe,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    notify: Callable[[str], None] = tqdm.write,
) -> Result:
    """Train as ``recipe`` says. Under torchrun, every rank calls this; files, bar and sentences are the first one's.

    Args:
        resume: go on from the newest complete checkpoint in ``output_dir`` as if the run had never stopped.
        overwrite: remove an earlier run from ``output_dir``.
        progress: show a bar.
        notify: told, in sentences, what the user should know.

    Raises:
        RecipeError: something in the recipe is wrong, or ``output_dir`` is taken; nothing was written.
        CheckpointError: the checkpoint to resume from is damaged, or (UnsavedError) one could not be written.
        Interrupted: SIGINT or SIGTERM; the state is saved.
        DivergedError: the loss is not finite.
        RankError: ranks differ in what they are about to train.
        LostRankError: another rank died, or did not answer within ``parallel.timeout``.
    """
    metrics.require(recipe.log)
    where = ranks.device(recipe.training.device)
    with (
        ranks.together(recipe.parallel, where, _wanted(recipe, resume=resume, overwrite=overwrite)) as joined,
        _claim(recipe) as claim,
    ):
        check_rows(recipe.training.batch_size, joined.share[1])
        if not joined.first:
            progress, notify = False, _say_nothing
        if ranks.restarted() and state.launched_by(recipe.output) == ranks.launch():
            resume, overwrite = True, False
        joined.first_does(claim.take_if_used)
        present = _present(recipe.output)
        checkpoint = _place(recipe.output, resume=resume, overwrite=overwrite, notify=notify)
        joined.compare({"checkpoint to go on from": "none" if checkpoint is None else checkpoint.name})
        if checkpoint is not None:
            joined.first_does(lambda: state.check(checkpoint))
            state.check_recipe(state.read_numbers(checkpoint).get("recipe", {}), recipe)
        prepared = _prepare(recipe, joined)
        for note in prepared.notes:
            notify(note)
        if checkpoint is not None:
            _continue(checkpoint, prepared, notify)
        parallel.verify(prepared.trainer.live.model, timeout=recipe.parallel.timeout, also=_place_in_run(prepared))
        step = prepared.trainer.live.progress.step
        joined.first_does(lambda: _open_output(recipe, claim, present, fresh=checkpoint is None, step=step))
        if checkpoint is None and calibrate.keeps_start(recipe.lora.init_lora_weights):
            prepared.trainer.live.model.save_pretrained(str(calibrate.start_of(recipe.output)))  # type: ignore[operator]
        joined.wait()
        _train(prepared, progress=progress, notify=notify)
        return _finish(prepared)


def _claim(recipe: Recipe) -> Claim:
    return Claim(recipe.output, patience=_PATIENCE if ranks.restarted() else 0.0)


def _say_nothing(message: str) -> None:
    pass


def _wanted(recipe: Recipe, **options: bool) -> dict[str, Any]:
    """What every rank has to be asked for, by name; each may have the data at a place of its own."""
    asked = flatten(recipe.model_dump(mode="json")) | {f"--{name}": value for name, value in options.items()}
    return {name: value for name, value in asked.items() if name not in ("data.train", "data.eval")}


def _place_in_run(prepared: _Run) -> dict[str, Any]:
    """Where a rank stands before its first step, by name."""
    live = prepared.trainer.live
    return {
        "steps that are done": live.progress.step,
        "number of steps": prepared.schedule.steps,
        "place in the data": live.batches.state_dict(),
        "learning rates": live.scheduler.get_last_lr(),
    }


def adapt(base: nn.Module, section: LoraSection, data: calibrate.Data | None = None, *, progress: bool = False) -> Any:
    """Put the recipe's adapter on a base model.

    Args:
        base: the model.
        section: of the recipe.
        data: what an initialisation may look at.
        progress: show a bar, where that takes its time.

    Raises:
        RecipeError: the settings contradict each other or fit nothing in the model.
    """
    from lorica import LoraConfig, TaskType, get_peft_model

    fields = section.model_dump()
    if calibrate.from_data(section.init_lora_weights):
        name = f"{section.init_lora_weights}_config"
        fields[name] = fields[name] or {}
    try:
        config = LoraConfig(task_type=TaskType.CAUSAL_LM, **fields)
        if data is not None:
            data.before(base, config)
        model = get_peft_model(base, config)
        if data is not None:
            data.after(model, config, progress=progress)
        return model
    except (ValueError, TypeError, NotImplementedError, LoricaError) as error:
        raise RecipeError(f"lora: {error}") from error


def _fuse_mlps(model: nn.Module) -> None:
    from lorica import fuse_mlps

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        fused = fuse_mlps(model)
    if not fused:
        raise RecipeError(f"model.fuse_mlp: {said[0].message}")
    for each in said:
        warnings.warn(each.message, stacklevel=2)


def _prepare(recipe: Recipe, joined: Ranks | None = None) -> _Run:
    """Load and build everything, from the cheapest to the most expensive; writes nothing."""
    model, training = recipe.model, recipe.training
    joined, where = joined or Ranks(), ranks.device(training.device)
    sight = None
    if recipe.vision is not None:
        sight = vision.Sight(*models.load_processor(model.path, model.revision), recipe.vision.images)
    tokenizer = models.load_tokenizer(model.path, model.revision) if sight is None else sight.processor.tokenizer
    length = models.max_length(model.path, model.revision, recipe.data.max_length)
    if joined.size > 1:
        with joined.first_goes_first():  # it may fill a cache on the disk that the others then find
            sources.check(recipe.data)
    loaded = sources.load(recipe.data, tokenizer, length, training.seed, sight)
    hashed = fingerprint([*loaded.training, *loaded.held_out])
    joined.compare({"tokens of the data": hashed, "number of rows": [len(loaded.training), len(loaded.held_out)]})
    base = layouts.load_base(
        recipe.parallel,
        joined,
        where,
        model.path,
        dtype=model.dtype,
        revision=model.revision,
        attn_implementation=model.attn_implementation,
        quantization=model.quantization,
        sees=sight is not None,
    )
    section = recipe.lora
    if recipe.vision is not None:
        section, notes = vision.divide(base, recipe.vision, recipe.lora)
        loaded.notes.extend(notes)
    pad = evaluate.pad_id(tokenizer)
    packs = pack(loaded.training, length) if recipe.data.packing else [[example] for example in loaded.training]
    flash = "flash" in str(getattr(base.config, "_attn_implementation", ""))
    collate = Collator(pad, flatten=flash and recipe.data.packing, sight=sight)
    seen = recipe.data.calibration_batches
    data = calibrate.Data(packs, collate, training.batch_size, seen, training.seed, pad, joined)
    _seed(training.seed)
    adapted = adapt(base, section, data)
    _checkpoint_gradients(adapted, training.gradient_checkpointing)
    if model.fuse_mlp:
        _fuse_mlps(adapted)
    batches = Batches(packs, collate, training.batch_size, training.seed, joined.share)
    if recipe.data.packing:
        _check_packing(adapted, packs, Collator(pad, flatten=flash), where)
    steps = training.steps or math.ceil(batches.per_epoch * training.epochs / training.gradient_accumulation)
    optimizer = optim.optimizer(adapted, training)
    live = state.Live(adapted, optimizer, optim.schedule(optimizer, training, steps), batches, state.Progress())
    schedule = Schedule(steps, recipe.log.every, training.eval_every, recipe.checkpoint.every)
    trainer = Trainer(live, training, loaded.held_out, pad, joined, sight)
    return _Run(recipe, trainer, schedule, hashed, loaded.notes)


def _train(prepared: _Run, *, progress: bool, notify: Callable[[str], None]) -> None:
    recipe, trainer = prepared.recipe, prepared.trainer
    live, joined = trainer.live, trainer.ranks
    log = Metrics(recipe.output / "metrics.jsonl", recipe.log, recipe.model_dump(mode="json")) if joined.first else None
    shown: dict[str, str] = {}

    def record(entry: Record) -> None:
        if log is not None:
            log.write(entry)
        shown["loss" if entry["kind"] == "train" else "held out"] = f"{entry['loss']:.4f}"
        bar.set_postfix(shown, refresh=False)

    def on_step(tokens: int, seconds: float) -> None:
        shown["tokens/s"] = f"{tokens / max(1e-9, seconds):.0f}"
        bar.set_postfix(shown, refresh=False)
        bar.update()

    def save() -> None:
        if log is not None:
            log.sync()
        saved.append(saver.save())

    saver = state.Saver(live, recipe, prepared.data, joined)
    saved: list[Path] = []
    total, done = prepared.schedule.steps, live.progress.step
    agree = joined.most if joined.size > 1 else None
    with StopRequest(agree) as stop, tqdm(total=total, initial=done, unit="step", disable=not progress) as bar:
        try:
            train(trainer, prepared.schedule, stop=stop, record=record, save=save, on_step=on_step)
            saver.wait()
        except BaseException:
            try:
                saver.wait()
            except Exception as late:  # besides what ended the training, which is raised
                notify(str(late))
            raise
        finally:
            if log is not None:
                log.close()
    if stop.signum is not None:
        raise Interrupted(stop.signum, live.progress.step, saved[-1])


def _finish(prepared: _Run) -> Result:
    output, live, joined = prepared.recipe.output, prepared.trainer.live, prepared.trainer.ranks
    adapter, plot = output / "adapter", output / "loss.png"
    # Its start came out of the base weights and depends on data: what is saved is plain LoRA for the model as it was.
    start = str(calibrate.start_of(output)) if calibrate.keeps_start(prepared.recipe.lora.init_lora_weights) else None
    live.model.save_pretrained(  # type: ignore[operator]
        str(adapter), path_initial_model_for_weight_conversion=start
    )
    records = metrics.read(output / "metrics.jsonl")
    if joined.first:
        metrics.plot(records, plot)
    joined.wait()
    learned = [record["loss"] for record in records if record["kind"] == "train"]
    held_out = [record["loss"] for record in records if record["kind"] == "eval"]
    return Result(
        output_dir=output,
        adapter=adapter,
        metrics=output / "metrics.jsonl",
        plot=plot,
        steps=live.progress.step,
        train_loss=learned[-1] if learned else None,
        eval_loss_before=held_out[0] if held_out else None,
        eval_loss_after=held_out[-1] if held_out else None,
        seconds=live.progress.seconds,
    )


def _place(output: Path, *, resume: bool, overwrite: bool, notify: Callable[[str], None]) -> Path | None:
    """The checkpoint to start from, or None for a new run; refuses a directory that holds what would be lost."""
    if resume and overwrite:
        raise RecipeError("--resume continues the run in output_dir and --overwrite removes it: give one of them")
    nearest = next(path for path in (output, *output.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise RecipeError(f"output_dir: {nearest} is a file")
    present = _present(output)
    if resume:
        found = state.complete(output)
        if found:
            return found[-1]
        if not present:
            raise RecipeError(f"--resume: there is no run in {output}; leave --resume away to start one")
        notify(f"{output} holds no complete checkpoint: starting from the beginning.")
        return None
    if present and not overwrite:
        raise RecipeError(
            f"{output} already holds a run ({', '.join(present)}). Continue it with --resume, replace it with "
            "--overwrite, or choose another output_dir"
        )
    return None


def _continue(checkpoint: Path, prepared: _Run, notify: Callable[[str], None]) -> None:
    numbers = state.read_numbers(checkpoint)
    if numbers.get("data") != prepared.data:
        raise CheckpointError(
            f"{checkpoint} was trained on other data: the tokens that the recipe's data give now are not the same"
        )
    state.restore(checkpoint, prepared.trainer.live, prepared.trainer.ranks)
    done = prepared.trainer.live.progress.step
    notify(f"Resuming after step {done} of {prepared.schedule.steps} from {checkpoint}.")


def _open_output(recipe: Recipe, claim: Claim, present: list[str], *, fresh: bool, step: int) -> None:
    output = recipe.output
    try:
        output.mkdir(parents=True, exist_ok=True)
        if not claim.held:
            claim.take()
            if _present(output) != present:
                raise RecipeError(f"output_dir: another run was in {output} while this one was prepared")
        if fresh:
            for name in _DIRECTORIES:
                atomic.remove_directory(output / name)
            for name in _FILES:
                (output / name).unlink(missing_ok=True)
        atomic.write_bytes(output / "recipe.yaml", dump_yaml(recipe).encode())
        state.note_launch(output, ranks.launch())
        for folder in (output, output / "adapter"):
            atomic.remove_partial(folder)
        state.clean(output)
        if not fresh:
            state.prune(output, recipe.checkpoint.keep)
            metrics.rewind(output / "metrics.jsonl", step)
    except OSError as error:
        raise RecipeError(f"output_dir: {error.filename or output} cannot be written: {error.strerror}") from None


def _present(output: Path) -> list[str]:
    """What a run has left in the directory."""
    return [name for name in (*_FILES, *_DIRECTORIES) if (output / name).exists()]


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _checkpoint_gradients(model: Any, kind: bool | str) -> None:
    if kind:
        # The argument's name differs between releases of transformers, its place does not.
        model.gradient_checkpointing_enable({"use_reentrant": kind == "reentrant"})


def _check_packing(model: nn.Module, packs: list[Any], collate: Collator, where: torch.device) -> None:
    full = next((found for found in packs if len(found) > 1), None)
    if full is None:
        return
    batch = {key: value.to(where) for key, value in collate([full[:2]]).items()}
    if not documents_are_separate(model, batch):
        raise RecipeError(
            "data.packing: this model (with its attention) lets packed examples see each other; "
            "set data.packing=false, or try another model.attn_implementation"
        )
