"""``lorica train``, ``validate`` and ``schema``, and the list of all commands."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated

import typer

from lorica._version import __version__
from lorica.cli import bench, convert, export, extract, inspect, launch, merge, plan, state, use
from lorica.cli.errors import note, quiet, readable

app = typer.Typer(
    name="lorica",
    help="LoRA fine-tuning: train, evaluate, merge, export and look into low-rank adapters.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"lorica {__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    pass


@app.command()
@readable
def train(
    recipe: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RECIPE.yaml] [KEY=VALUE]...", help="A recipe, and settings that go before its own."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in output_dir.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run that is in output_dir.")] = False,
    quietly: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """Fine-tune a causal language model with LoRA.

    lorica train recipe.yaml lora.r=16 training.learning_rate=1e-4

    lorica train model.path=my/model data.train=examples.jsonl output_dir=runs/first
    """
    from lorica.train import recipe as recipes

    arguments = list(recipe or [])
    loaded = recipes.load(*_split(arguments))
    launch.spread(loaded.parallel, loaded.training.device)
    quiet()
    from lorica.train.job import run
    from lorica.train.signals import Interrupted

    try:
        result = run(loaded, resume=resume, overwrite=overwrite, progress=not quietly, notify=note)
    except Interrupted as stopped:
        note(str(stopped))
        note(f"Continue with: lorica train {shlex.join(arguments)} --resume")
        raise typer.Exit(stopped.exit_code) from None
    before, after = result.eval_loss_before, result.eval_loss_after
    if before is not None and after is not None:
        print(f"held-out loss  {before:.4f} → {after:.4f}")
    print(f"adapter        {result.adapter}")
    print(f"loss curve     {result.plot}")


@app.command()
@readable
def validate(
    recipe: Annotated[
        list[str], typer.Argument(metavar="RECIPE.yaml [KEY=VALUE]...", help="A recipe, and settings on top of it.")
    ],
) -> None:
    """Check a recipe, the paths in it and the columns of its data; train nothing, write nothing."""
    from lorica.train import recipe as recipes

    loaded = recipes.load(*_split(recipe))
    quiet()
    from lorica.train import metrics, models, sources

    metrics.require(loaded.log)
    models.max_length(loaded.model.path, loaded.model.revision, loaded.data.max_length)
    form = sources.check(loaded.data)
    print(f"{recipe[0]}: valid; {loaded.data.train} is read as {form.name}.")


@app.command()
@readable
def schema(
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write to this file instead.")] = None,
) -> None:
    """Print the JSON schema of recipes, with which editors complete and check them."""
    from lorica.train.recipe import Recipe

    text = json.dumps(Recipe.model_json_schema(), indent=2)
    if output is None:
        print(text)
        return
    from lorica.files import atomic

    atomic.write_bytes(output, f"{text}\n".encode())


def _split(arguments: list[str]) -> tuple[str | None, list[str]]:
    """A first argument without ``=`` is the recipe file; the rest are overrides."""
    if arguments and "=" not in arguments[0]:
        return arguments[0], arguments[1:]
    return None, arguments


app.command()(use.generate)
app.command("eval")(use.evaluate)
app.command()(merge.merge)
app.command()(extract.extract)
app.command()(export.export)
app.command()(convert.convert)
app.command("inspect")(inspect.inspect)
app.command()(plan.plan)
app.command()(bench.bench)
app.command()(state.consolidate)
app.command()(state.reshard)
