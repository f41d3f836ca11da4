"""``lorica bench``: what an adapter costs on a user's own model, beside peft and the frozen base."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorica.cli import use
from lorica.cli.errors import note, quiet, readable
from lorica.errors import RecipeError, suggest, suggest_path

if TYPE_CHECKING:
    from lorica.bench.report import Results

_ONLY = "step, decode, injection, files, merging"


@readable
def bench(
    model: Annotated[str, typer.Argument(help="A causal language model: a directory, or its name on the hub.")],
    r: Annotated[int, typer.Option("--r", min=1, help="The rank of the adapter.")] = 16,
    targets: Annotated[
        str, typer.Option("--target-modules", help="all-linear, or names with commas between.")
    ] = "all-linear",
    dropout: Annotated[float, typer.Option(min=0.0, max=0.99, help="The adapter's dropout in training.")] = 0.0,
    batch: Annotated[int, typer.Option(min=1, help="Rows of a batch.")] = 1,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of each row of a training step.")] = 128,
    only: Annotated[str, typer.Option(help=f"Only these, with commas between: {_ONLY}.")] = "",
    peft: Annotated[bool, typer.Option(help="Compare with peft; by default where it is installed.")] = True,
    dtype: use.Dtype = "auto",
    device: use.Device = "auto",
    output: Annotated[
        Path, typer.Option("--output", "--out", "-o", help="Directory for RESULTS.md, results.json and results.png.")
    ] = Path("bench"),
    quick: Annotated[bool, typer.Option("--quick", help="Few rounds: a first look.")] = False,
    quietly: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """Measure lorica on a model of yours: time, memory and bytes, beside peft and the model without an adapter.

    The sides run in turns in one process, with the same factors, and must give the same output. Counts (kernels, bytes
    moved, saved, peak) do not jitter; times do, on a machine that does something else as well.

    lorica bench my/model --r 16 --only step,decode

    lorica bench my/model --target-modules q_proj,v_proj --dtype bfloat16 --batch 4 --tokens 512 --out bench
    """
    from lorica.bench import machine, own, sides
    from lorica.bench.contest import take_all
    from lorica.bench.report import Results
    from lorica.train import models

    names = _names(only, list(own.KINDS))
    _check_output(output)
    use.check_dtype(dtype)
    quiet()
    where = models.device(device)
    base = models.load_base(model, dtype=dtype, where=where).eval()
    limit = getattr(base.config, "max_position_embeddings", None)
    if limit and tokens > limit:
        raise RecipeError(f"--tokens: {tokens} is more than the model's {limit} positions")
    compared = peft and sides.has_peft()
    if peft and not compared:
        note("peft is not installed, so lorica is compared with the frozen base: pip install 'lorica[bench]'")
    fields: dict[str, Any] = {
        "r": r,
        "lora_alpha": 2 * r,
        "lora_dropout": dropout,
        "target_modules": targets if targets == "all-linear" else [name for name in targets.split(",") if name],
        "task_type": "CAUSAL_LM",
    }
    subject = own.Own(base, fields, batch=batch, tokens=tokens, peft=compared)
    _ = subject.adapted  # what cannot be adapted is said before anything is measured
    machine.keep_freed_memory()
    options: dict[str, Any] = {"--r": r, "--target-modules": targets, "--batch": batch, "--tokens": tokens}
    options |= {"--dropout": dropout, "--dtype": dtype, "--device": device, "--only": ",".join(names)}
    words = ["lorica", "bench", model, *(str(word) for pair in options.items() for word in pair)]
    words += ["--quick"] if quick else []
    words += [] if peft else ["--no-peft"]
    facts = machine.describe(shlex.join(words)) | {"model": _described(base, where)}
    chosen = own.measures_of(subject, names)
    results = Results(facts, take_all(list(chosen.values()), quick=quick, progress=not quietly), chosen)
    show(results)
    write(output, results, model)
    note(f"written: RESULTS.md, results.json, results.png in {output}")


def show(results: Results) -> None:
    """Print a table for each measure."""
    from rich.console import Console
    from rich.table import Table

    from lorica.bench import report

    console = Console(width=None if sys.stdout.isatty() else 160)
    for name, rows in report.grouped(results.figures).items():
        head, *lines = report.cells(results.measures[name], rows)
        table = Table(title=results.measures[name].title)
        for index, title in enumerate(head):
            table.add_column(title, justify="left" if index < 2 else "right")
        for line in lines:
            table.add_row(*line)
        console.print(table)


def write(output: Path, results: Results, model: str) -> None:
    """Write the page, the numbers and the picture."""
    from lorica.bench import chart, report

    output.mkdir(exist_ok=True)
    against = next(iter(results.measures.values())).against
    report.write_json(output / "results.json", results)
    title = f"lorica on {model}"
    report.write_markdown(output / "RESULTS.md", results, "results.png", title=title)
    chart.draw(output / "results.png", results.figures, results.measures, title, against)


def _names(only: str, known: list[str]) -> list[str]:
    names = [name.strip() for name in only.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise RecipeError(f"--only: there is no measure {name!r}.{suggest(name, known)} There are: {_ONLY}")
    return names or known


def _check_output(output: Path) -> None:
    parent = output.absolute().parent
    if output.exists() and not output.is_dir():
        raise RecipeError(f"{output} is a file, not a directory")
    if not parent.is_dir():
        raise RecipeError(f"There is no directory {parent}.{suggest_path(parent)}")


def _described(base: Any, where: Any) -> str:
    count = sum(parameter.numel() for parameter in base.parameters())
    return f"{type(base).__name__}, {count / 1e6:,.1f} M parameters, {str(base.dtype).removeprefix('torch.')}, {where}"


__all__ = ["bench", "show", "write"]
