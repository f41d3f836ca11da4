"""``lorica consolidate``: from the sharded state of a run to the one file, on one process."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

from lorica.cli.errors import readable
from lorica.errors import RecipeError, suggest_path

Source = Annotated[Path, typer.Argument(help="A run's directory (its newest complete checkpoint), or a checkpoint.")]
Quietly = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")]


@readable
def consolidate(
    directory: Source,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where the adapter goes; by default into a run's adapter/.")
    ] = None,
    quietly: Quietly = False,
) -> None:
    """Make the one adapter file of a checkpoint that any number of ranks wrote.

    Needs neither the model nor the ranks, and memory for one tensor.
    """
    from tqdm import tqdm

    from lorica.checkpoint.shards import read_index
    from lorica.checkpoint.whole import FACTORS
    from lorica.checkpoint.whole import consolidate as write

    checkpoint = find_checkpoint(directory)
    output = output or (directory / "adapter" if checkpoint != directory else directory)
    output.mkdir(parents=True, exist_ok=True)
    total = sum(name.startswith(FACTORS) for name in read_index(checkpoint / "state"))
    with tqdm(total=total, unit="tensor", disable=quietly) as bar:
        write(checkpoint / "state", output, each=lambda _: bar.update())
    config = checkpoint / "adapter_config.json"
    if config.is_file() and output.resolve() != checkpoint.resolve():
        shutil.copyfile(config, output / config.name)
    print(f"adapter        {output}")


def find_checkpoint(directory: Path) -> Path:
    """The checkpoint that is meant.

    Raises:
        RecipeError: there is none.
    """
    from lorica.train import state

    if not directory.is_dir():
        raise RecipeError(f"There is no directory {directory}.{suggest_path(directory)}")
    if (directory / "state").is_dir():
        return directory
    found = state.complete(directory)
    if not found:
        raise RecipeError(f"{directory} is no checkpoint, and holds no complete one in {state.directory_of(directory)}")
    return found[-1]
