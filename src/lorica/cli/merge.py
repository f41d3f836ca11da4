"""``lorica merge``: an adapter and its base model as one plain model, without the model in memory where that can be."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorica.cli import rank, use
from lorica.cli.errors import note, noted, quiet, readable
from lorica.errors import RecipeError, suggest_path

if TYPE_CHECKING:
    from lorica.merge import Progress


@readable
def merge(
    adapter: Annotated[str, typer.Argument(help="The adapter's directory.")],
    output: Annotated[Path, typer.Argument(help="Where the merged model goes; must not exist yet.")],
    model: Annotated[str | None, typer.Option("--model", "-m", help="The base model, if not the one it names.")] = None,
    dtype: Annotated[
        str, typer.Option(help="Precision of the merged weights: auto (as they are), float32, bfloat16, float16.")
    ] = "auto",
    device: use.Device = "cpu",
    shard_ranks: Annotated[
        bool, typer.Option("--shard-ranks", help="Under torchrun: each process does some of the files.")
    ] = False,
    quietly: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """Write adapter and base model as one plain transformers model.

    Reads and writes the model's files tensor by tensor, so that a model of any size needs the memory of its largest
    tensor. The new directory appears once it is complete.
    """
    if output.exists():
        raise RecipeError(f"{output} already exists; choose another directory")
    if not output.absolute().parent.is_dir():
        raise RecipeError(f"There is no directory {output.absolute().parent}.{suggest_path(output.absolute().parent)}")
    if rank.is_rank() and not shard_ranks:
        raise RecipeError("several processes merge only with --shard-ranks; start one, or pass it")
    use.check_dtype(dtype)
    quiet()
    base, adapter_directory, revision = use.resolve(model or adapter, adapter)
    assert adapter_directory is not None
    import torch

    from lorica.merge import NotFollowedError, merge_files
    from lorica.train import models

    asked = None if dtype == "auto" else getattr(torch, dtype)
    where, files = models.device(device), models.files_of(base, revision)
    try:
        with _group(shard_ranks), noted():
            progress = None if quietly else _bar
            merge_files(adapter_directory, files, output, dtype=asked, device=where, progress=progress)
    except NotFollowedError as reason:
        if rank.is_rank():
            raise RecipeError(f"{reason}. Such a model has to be loaded: start one process") from None
        note(f"{reason}. So the whole model is loaded.")
        _load_and_merge(base, adapter_directory, output, dtype, device)
    print(f"merged model   {output}")


def _load_and_merge(base: str, adapter: str, output: Path, dtype: str, device: str) -> None:
    from lorica.files import atomic

    loaded, tokenizer = use.load(base, adapter, dtype, device)
    with noted():
        merged = loaded.merge_and_unload(safe_merge=True)
    with atomic.complete_directory(output, marker=False) as temporary:
        try:
            merged.save_pretrained(str(temporary))
        except NotImplementedError:
            raise RecipeError(
                f"{base} is quantised in a form that transformers reads and cannot write; give the model as it was "
                "before it was quantised with --model"
            ) from None
        tokenizer.save_pretrained(str(temporary))


@contextlib.contextmanager
def _group(wanted: bool) -> Iterator[None]:
    """A process group of all ranks, where there are several."""
    if not (wanted and rank.is_rank()):
        yield
        return
    import torch.distributed as dist

    from lorica.train import lost

    dist.init_process_group("gloo")
    try:
        with lost.answered() as company:
            company.met()
            yield
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def _bar(total: int) -> Iterator[Progress]:
    from tqdm import tqdm

    disable: Any = None if rank.is_first() else True  # None: where stderr is no terminal
    with tqdm(total=total, unit="B", unit_scale=True, desc="Merging", disable=disable) as bar:
        yield bar.update


__all__ = ["merge"]
