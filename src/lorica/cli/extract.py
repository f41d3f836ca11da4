"""``lorica extract``: the LoRA of a fully fine-tuned model against its base, tensor by tensor from their files."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorica.cli import use
from lorica.cli.errors import noted, quiet, readable
from lorica.errors import RecipeError

if TYPE_CHECKING:
    from lorica.merge import Change, Progress


@readable
def extract(
    base: Annotated[str, typer.Argument(help="The base model: a directory, or its name on the hub.")],
    finetuned: Annotated[str, typer.Argument(help="The same model after training, all weights of it.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the adapter goes; must not exist yet.")],
    rank: Annotated[int | None, typer.Option(min=1, help="The rank of every layer.")] = None,
    energy: Annotated[
        float | None,
        typer.Option(help="Give each layer the least rank that explains this share of its change, such as 0.95."),
    ] = None,
    max_rank: Annotated[int | None, typer.Option("--max-rank", min=1, help="The largest rank with --energy.")] = None,
    exact: Annotated[bool, typer.Option("--exact", help="Decompose exactly, not by a sketch.")] = False,
    targets: Annotated[
        str, typer.Option("--targets", help="Layers that get factors: all-linear, or names with commas between.")
    ] = "all-linear",
    whole: Annotated[
        str,
        typer.Option(
            help="Modules to save whole: names with commas between, or 'changed': all that changed and have no "
            "factors, and layers of which --max-rank explains too little."
        ),
    ] = "",
    dtype: Annotated[str, typer.Option(help="Precision of the factors: float32, bfloat16, float16.")] = "float32",
    device: use.Device = "cpu",
    quietly: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """Write the LoRA that takes a base model to its fine-tuned form, and say how much of each change it explains.

    Reads both models' files tensor by tensor, so that neither has to fit into memory. Merging the adapter into the
    base model gives the fine-tuned one back to within the errors that are shown (and kept in extraction.json).

    lorica extract my/base my/finetuned -o my/adapter --rank 32

    lorica extract my/base my/finetuned -o my/adapter --energy 0.95 --max-rank 128 --whole changed
    """
    if output.exists():
        raise RecipeError(f"{output} already exists; choose another directory")
    if not output.absolute().parent.is_dir():
        raise RecipeError(f"There is no directory {output.absolute().parent}")
    use.check_dtype(dtype)
    quiet()
    import torch

    from lorica.merge import NotFollowedError, Wanted, extract_files
    from lorica.train import models

    wanted = Wanted(rank, energy, max_rank, exact)
    files, tuned = (models.files_of(path) for path in (base, finetuned))
    named = [name for name in targets.split(",") if name]
    try:
        with noted():
            changes = extract_files(
                files,
                tuned,
                output,
                wanted=wanted,
                target_modules=targets if targets == "all-linear" else named,
                whole=whole if whole == "changed" else [name for name in whole.split(",") if name],
                base_name=base,
                dtype=torch.float32 if dtype == "auto" else getattr(torch, dtype),
                device=models.device(device),
                progress=None if quietly else _bar,
            )
    except NotFollowedError as reason:
        raise RecipeError(f"{reason}. Such a model cannot be compared file by file") from None
    for line in table(changes):
        print(line)
    print(f"adapter   {output}")


def table(changes: Sequence[Change]) -> list[str]:
    """The lines that say what became of each parameter, and of all of them together."""
    width = max(len(change.name) for change in changes)
    lines = [f"{'parameter':<{width}}  {'change':>9}  {'rank':>5}  {'explained':>9}"]
    for change in changes:
        rank = str(change.rank) if change.rank else ("whole" if change.explained else "none")
        lines.append(f"{change.name:<{width}}  {change.change:>9.2e}  {rank:>5}  {change.explained:>9.4f}")
    left = [change for change in changes if not change.explained]
    if left:
        lines.append(f"{len(left)} of {len(changes)} changes are not in the adapter; --whole changed saves them whole")
    return lines


@contextlib.contextmanager
def _bar(total: int) -> Iterator[Progress]:
    from tqdm import tqdm

    disable: Any = None  # where stderr is no terminal
    with tqdm(total=total, unit=" parameters", unit_scale=True, desc="Extracting", disable=disable) as bar:
        yield bar.update


__all__ = ["extract", "table"]
