"""``lorica consolidate`` and ``lorica reshard``: from sharded state to the one file and back, on one process."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

from lorica.cli.errors import quiet, readable
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
    from lorica.files import atomic

    checkpoint = find_checkpoint(directory)
    _check(checkpoint)
    output = output or (directory / "adapter" if checkpoint != directory else directory)
    output.mkdir(parents=True, exist_ok=True)
    total = sum(name.startswith(FACTORS) for name in read_index(checkpoint / "state"))
    config = checkpoint / "adapter_config.json"
    with tqdm(total=total, unit="tensor", disable=quietly) as bar, atomic.at_once():
        write(checkpoint / "state", output, each=lambda _: bar.update())
        if config.is_file() and output.resolve() != checkpoint.resolve():
            atomic.write_bytes(output / config.name, config.read_bytes())
    print(f"adapter        {output}")


@readable
def reshard(
    directory: Annotated[Path, typer.Argument(help="A run, a checkpoint, or an adapter.")],
    output: Annotated[Path, typer.Argument(help="Where the new checkpoint goes; must not exist yet.")],
    parallel: Annotated[str, typer.Option(help="The layout, as in a recipe: tp=2,fsdp=2.")],
    model: Annotated[str | None, typer.Option("--model", "-m", help="The base model, if not the one it names.")] = None,
    quietly: Quietly = False,
) -> None:
    """Lay a checkpoint's state out as the ranks of another layout would have written it.

    Needs the base model's configuration, not its weights, and memory for one rank's share.
    """
    from tqdm import tqdm
    from transformers import AutoConfig

    from lorica import LoraConfig
    from lorica.errors import LayoutError
    from lorica.files import atomic
    from lorica.parallel.plan import Division
    from lorica.parallel.reshard import reshard as write
    from lorica.parallel.reshard import source_of
    from lorica.train import models
    from lorica.train.recipe import parse_parallel

    section = parse_parallel(parallel)
    if output.exists():
        raise RecipeError(f"{output} already exists; choose another directory")
    checkpoint = find_checkpoint(directory, adapter=True)
    _check(checkpoint)
    base, revision = (model, None) if model is not None else models.base_of(str(checkpoint))
    models.max_length(base, revision, None)  # says what is wrong with the path
    division = Division(**section.axes, ep=section.ep, sp=section.sp, engine=section.cut_by)
    config = LoraConfig.from_pretrained(str(checkpoint))
    assert isinstance(config, LoraConfig)
    quiet()
    outline = AutoConfig.from_pretrained(base, revision=revision, trust_remote_code=False)
    with source_of(checkpoint) as source, atomic.complete_directory(output) as temporary:
        for file in sorted(path for path in checkpoint.iterdir() if path.is_file() and path.name != atomic.MARKER):
            shutil.copyfile(file, temporary / file.name)
        (temporary / "state").mkdir()
        try:
            with tqdm(total=division.ranks, unit="rank", disable=quietly) as bar:
                write(source, temporary / "state", outline, config, division, each=lambda _: bar.update())
        except LayoutError as error:
            raise RecipeError(f"--parallel: {error}") from error
    print(f"checkpoint     {output}")


def _check(checkpoint: Path) -> None:
    """Refuse a checkpoint that has changed since it was written; that its adapter's file is gone is no harm here."""
    from lorica.files import marker
    from lorica.train.state import ADAPTER

    if marker.is_there(checkpoint):
        gone = () if (checkpoint / ADAPTER).exists() else (ADAPTER,)
        marker.check(checkpoint, but=("README.md", "adapter_config.json", *gone))


def find_checkpoint(directory: Path, *, adapter: bool = False) -> Path:
    """The checkpoint that is meant; with ``adapter``, also an adapter's directory.

    Raises:
        RecipeError: there is none.
    """
    from lorica.train import state

    if not directory.is_dir():
        raise RecipeError(f"There is no directory {directory}.{suggest_path(directory)}")
    if (directory / "state").is_dir() or (adapter and (directory / "adapter_config.json").is_file()):
        return directory
    found = state.complete(directory)
    if not found:
        raise RecipeError(f"{directory} is no checkpoint, and holds no complete one in {state.directory_of(directory)}")
    return found[-1]
