"""``lorica convert``: an adapter from the files of one system to those of another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorica.cli.errors import note, quiet, readable
from lorica.errors import RecipeError, suggest_path


@readable
def convert(
    adapter: Annotated[str, typer.Argument(metavar="SRC", help="The adapter's directory.")],
    output: Annotated[Path, typer.Argument(metavar="DST", help="Where it goes; must not exist yet.")],
    source: Annotated[str, typer.Option("--from", help="Whose files they are: peft, megatron-bridge or neuron.")],
    target: Annotated[str, typer.Option("--to", help="Whose files are wanted: likewise.")],
    model: Annotated[
        str | None, typer.Option(help="The model's directory or config.json, of which only sizes are read.")
    ] = None,
    form: Annotated[str, typer.Option(help="For megatron-bridge: fused (LoRA), canonical, or auto.")] = "auto",
    experts: Annotated[str, typer.Option(help="For peft: stacked experts, separate ones, or auto.")] = "auto",
    names: Annotated[
        str, typer.Option(help="For peft: transformers, or megatron, for lorica on Megatron's layers.")
    ] = "transformers",
    rank: Annotated[
        int | None, typer.Option(min=1, help="Cut layers that have to be fused to this rank; says what is lost.")
    ] = None,
    rounding: Annotated[
        bool, typer.Option("--rounding", help="Where only one scale can be said, multiply the others into B.")
    ] = False,
    tensor_parallel: Annotated[int | None, typer.Option(min=1, help="Ranks that the files are for.")] = None,
    pipeline_parallel: Annotated[int | None, typer.Option(min=1, help="Stages that the files are for.")] = None,
    expert_parallel: Annotated[
        int | None, typer.Option(min=1, help="Ranks by which megatron-bridge saved experts that share an adapter.")
    ] = None,
    first_copy: Annotated[
        bool, typer.Option("--first-copy", help="Of neuron's ranks that differ where they should not, take the first.")
    ] = False,
) -> None:
    """Move an adapter between PEFT, Megatron Bridge and Optimum Neuron; no model is loaded, no code of a file is run.

    lorica convert checkpoints/iter_0000100 my/adapter --from megatron-bridge --to peft

    lorica convert my/adapter for/megatron --from peft --to megatron-bridge --model my/base
    """
    if output.exists():
        raise RecipeError(f"{output} already exists; choose another directory")
    if not output.absolute().parent.is_dir():
        raise RecipeError(f"There is no directory {output.absolute().parent}.{suggest_path(output.absolute().parent)}")
    where = Path(adapter).expanduser()
    if not where.is_dir():
        raise RecipeError(f"There is no directory {where}.{suggest_path(where)}")
    quiet()
    from lorica.convert import convert_adapter

    done = convert_adapter(
        where,
        output,
        source=source,
        target=target,
        model=model,
        form=form,
        experts=experts,
        names=names,
        rank=rank,
        rounding=rounding,
        tensor_parallel=tensor_parallel,
        pipeline_parallel=pipeline_parallel,
        expert_parallel=expert_parallel,
        first_copy=first_copy,
    )
    for said in done.notes:
        note(said)
    for name, error in done.errors.items():
        print(f"{name}  relative error {error:.3e}")
    print(f"converted      {output}  ({done.layers} layers, rank {done.rank})")


__all__ = ["convert"]
