"""``lorica export``: an adapter in the form that another program takes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorica.cli.errors import note, quiet, readable
from lorica.errors import RecipeError, suggest_path


@readable
def export(
    adapter: Annotated[str, typer.Argument(help="The adapter's directory.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the export goes; must not exist yet.")],
    target: Annotated[str, typer.Option("--target", "-t", help="Who is to read it: peft, vllm or sglang.")],
    base: Annotated[
        str | None,
        typer.Option("--base", "-b", help="The base model, if not the one it names; only its configuration."),
    ] = None,
    experts: Annotated[
        str, typer.Option(help="Stacked experts: auto, separate (a pair for each) or fused (one for a layer).")
    ] = "auto",
    as_lora: Annotated[
        float | None,
        typer.Option(help="Make a variant (DoRA, ...) the nearest LoRA of this rank first, or of this share of it."),
    ] = None,
    initial: Annotated[
        Path | None, typer.Option(help="The adapter before training, if its start came out of the base (PiSSA, ...).")
    ] = None,
) -> None:
    """Write an adapter with the names, the orientation and the form that another program's loader takes.

    What that program would refuse, or lose without a word, is refused here, with the reason.
    """
    if output.exists():
        raise RecipeError(f"{output} already exists; choose another directory")
    if not output.absolute().parent.is_dir():
        raise RecipeError(f"There is no directory {output.absolute().parent}.{suggest_path(output.absolute().parent)}")
    quiet()
    from lorica.export import export_adapter
    from lorica.train import models

    models.check_adapter(adapter)
    rank = int(as_lora) if as_lora is not None and as_lora > 1 and as_lora.is_integer() else as_lora
    options = {"base": base, "experts": experts, "as_lora": rank, "initial": initial}
    for said in export_adapter(Path(adapter).expanduser(), output, target, **options):  # type: ignore[arg-type]
        note(said)
    print(f"exported       {output}")


__all__ = ["export"]
