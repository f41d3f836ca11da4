"""``lorica plan``: what a run needs on many ranks, and which layouts fit, without any of them."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorica.cli.errors import quiet, readable
from lorica.errors import RecipeError, suggest_path

if TYPE_CHECKING:
    from lorica.parallel.plan import Division, Plan, Refused

_GIB, _MIB = 2**30, 2**20
_EXPERTS = ("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts")
_SHOWN = 12

NOTES = (
    "Weights, factors, gradients and AdamW's two moments are counted from the tensors a rank has.",
    "Activations: what autograd saves in a forward that is run on tensors without values: an estimate.",
    "Working: what is alive besides at the highest point: an estimate, as devices differ in their kernels.",
    "With --checkpointing activations are what goes from layer to layer, and all of one layer.",
    "Gathered (fully-sharded storage): what stays whole after the forward, and two layers: an estimate.",
    "Not counted: the allocator's reserve, buffers of the communication library, the device's context.",
    "Sent: bytes of the collectives that run, by ring algorithms; scalars for the norm of the gradients left out.",
)
ROUTED = "Tokens are taken to be routed to all experts evenly: an estimate."
QUANTISED = "The configuration's quantisation is not applied: weights are counted in the dtype above."

_Size = Annotated[int | None, typer.Option(min=1, help="Ranks on this axis; left out: every number is tried.")]


@readable
def plan(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A transformers config.json, or a model's directory.")],
    world: Annotated[int, typer.Option(min=1, help="How many ranks there are.")],
    tp: _Size = None,
    sp: Annotated[bool | None, typer.Option("--sp/--no-sp", help="Sequence parallelism; left out: both.")] = None,
    fsdp: _Size = None,
    ep: Annotated[int | None, typer.Option(min=1, help="Experts over so many of the fsdp × tp ranks.")] = None,
    pp: _Size = None,
    dp: _Size = None,
    r: Annotated[int, typer.Option("-r", "--rank", min=1, help="Rank of the adapter.")] = 16,
    target: Annotated[list[str] | None, typer.Option(help="Name of target modules; may be repeated.")] = None,
    target_parameter: Annotated[list[str] | None, typer.Option(help="Name of target parameters (experts).")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Rows per forward pass of each data-parallel rank.")] = 1,
    sequence: Annotated[int, typer.Option(min=1, help="Tokens of a row.")] = 4096,
    passes: Annotated[int, typer.Option(min=1, help="Forward passes per optimiser step (microbatches).")] = 1,
    checkpointing: Annotated[bool, typer.Option(help="Compute activations again in backward.")] = False,
    dtype: Annotated[str, typer.Option(help="Of the base weights; auto: the configuration's, or bfloat16.")] = "auto",
    memory: Annotated[float | None, typer.Option(min=0.0, help="GiB of a rank; left out: no limit.")] = None,
    node: Annotated[int, typer.Option(min=1, help="Ranks of a machine: most for tp where that is open.")] = 8,
    engine: Annotated[str, typer.Option(help="Who cuts: native, transformers or auto.")] = "auto",
    plot: Annotated[Path | None, typer.Option(help="Draw memory by layout into this PNG file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what training an adapter takes on WORLD ranks: memory, bytes sent, and which layouts fit.

    lorica plan config.json --world 512 --memory 80

    lorica plan my/model --world 16 --tp 8 --sp --fsdp 2 --json
    """
    if engine not in ("auto", "native", "transformers"):
        raise RecipeError(f"--engine {engine}: one of auto, native, transformers")
    quiet()
    from lorica import LoraConfig
    from lorica.parallel.plan import Outline, Planner, Work, divisions, empty_model, search

    config = _read(model)
    adapter = LoraConfig(r=r, target_modules=_targets(target), target_parameters=target_parameter)
    base = _dtype(config, dtype)
    outline = Outline(empty_model(config, base), adapter)
    planner = Planner(outline, adapter, Work(batch, sequence, passes, checkpointing))
    experts = next((n for name in _EXPERTS if (n := getattr(config, name, None))), 0)
    given = {"tp": tp, "sp": sp, "fsdp": fsdp, "ep": ep, "pp": pp, "dp": dp}
    asked = {name: value for name, value in given.items() if value is not None}
    cutter: Any = "transformers" if engine == "transformers" else "native"
    tried = [d for d in divisions(world, experts=experts, engine=cutter, **asked) if tp or d.tp <= node]
    if not tried:
        raise RecipeError(f"no layout of {world} ranks has {', '.join(f'{k}={v}' for k, v in asked.items())}")
    limit = None if memory is None else round(memory * _GIB)
    with _Progress(len(tried)) as progress:
        fitting, refused = search(planner, tried, limit=limit, either=engine == "auto", tried=progress)
    if len(tried) == 1:
        fitting = [planner.compared(one) for one in fitting]
    if len(tried) == 1 and refused and refused[0].plan is None:
        raise RecipeError(f"{tried[0]}: {refused[0].reason}")
    notes = [*NOTES, *([ROUTED] if experts else []), *([QUANTISED] if hasattr(config, "quantization_config") else [])]
    head = f"{Path(model).name}: {outline.parameters / 1e9:.2f}·10⁹ parameters in {str(base).removeprefix('torch.')}"
    if as_json:
        print(json.dumps(_values(model, outline.parameters, world, fitting, refused, notes)))
    elif len(tried) == 1:
        _show([*fitting, *(one.plan for one in refused if one.plan)][0], head, memory)
    else:
        _list(fitting, refused, head, world)
    if not as_json:
        print("\n" + "\n".join(f"· {note}" for note in notes))
    if plot is not None:
        draw([*fitting, *(one.plan for one in refused if one.plan)][:_SHOWN], plot, memory)
    if not fitting:
        raise typer.Exit(1)


def _read(model: str) -> Any:
    from transformers import AutoConfig

    path = Path(model).expanduser()
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise RecipeError(f"There is no configuration {file}.{suggest_path(file)}")
    try:
        return AutoConfig.from_pretrained(str(file), trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise RecipeError(f"{file} is no configuration of a model: {str(error).strip().splitlines()[0]}") from None


def _targets(named: Sequence[str] | None) -> str | list[str]:
    return "all-linear" if not named or list(named) == ["all-linear"] else list(named)


def _dtype(config: Any, name: str) -> Any:
    import torch

    if name == "auto":
        return getattr(config, "dtype", None) or torch.bfloat16
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise RecipeError(f"--dtype {name} is no dtype of torch")
    return found


class _Progress:
    """A bar on a terminal's stderr, nothing elsewhere."""

    def __init__(self, total: int) -> None:
        from rich.console import Console
        from rich.progress import Progress

        self._bar = Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())
        self._task = self._bar.add_task("layouts", total=total)

    def __call__(self, division: Division) -> None:
        self._bar.update(self._task, advance=1, description=str(division))

    def __enter__(self) -> _Progress:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()


def _values(
    model: str, parameters: int, world: int, fitting: list[Plan], refused: list[Refused], notes: list[str]
) -> dict[str, Any]:
    return {
        "model": model,
        "parameters": parameters,
        "world": world,
        "plans": [one.as_json() for one in fitting],
        "refused": [
            {"layout": str(one.division), "reason": one.reason, "plan": one.plan and one.plan.as_json()}
            for one in refused
        ],
        "notes": notes,
    }


# ---- tables ----------------------------------------------------------------------------------------------------------


def _show(plan: Plan, head: str, memory: float | None) -> None:
    """One layout in full."""
    over = memory is not None and plan.total > memory * _GIB
    verdict = "" if memory is None else f" · {'does not fit' if over else 'fits'} {memory:g} GiB"
    stage = f", stage {plan.stage}" if plan.division.pp > 1 else ""
    _table(
        f"{head}\n{plan.division}: memory of a rank{stage}{verdict}",
        ("part", "GiB"),
        [*((part, _gib(size)) for part, size in plan.memory.items() if size), ("total", _gib(plan.total))],
    )
    rows = [
        ("base" if what == "base" else "LoRA's gradients", axis, name, f"{size / _MIB:,.1f}")
        for (what, axis, name), size in sorted(plan.sent.items())
    ]
    own = [
        (f"LoRA: {name}", "tp", "in forward and backward", f"{size / _MIB:,.1f}") for name, size in plan.others.items()
    ]
    _table("sent by a rank in a step", ("what", "axis", "collective", "MiB"), [*rows, *own])
    if own:
        print("In forward and backward, beside the base model: lorica's figure is of what runs, with and without the")
        print("adapter; the other two are what their forms would send there, and were not run.")
    writers = ", ".join(f"rank {rank} {size / _MIB:,.1f} MiB" for rank, (_, size) in [*plan.written.items()][:4])
    print(f"trainable: {plan.trainable[0]:,} in all, {plan.trainable[1]:,} on a rank")
    print(
        f"file:      {plan.tensors} tensors, {plan.file / _MIB:,.1f} MiB, from {len(plan.written)} ranks ({writers} …)"
    )
    print(f"tokens:    {plan.tokens:,} a step, {plan.per_token / 1e3:,.1f} kB sent for each")
    if plan.idle:
        print(f"pipeline:  waits {plan.idle:.0%} of the time")


def _list(fitting: list[Plan], refused: list[Refused], head: str, world: int) -> None:
    """Many layouts: those that fit, and why the others do not."""
    rows = []
    for plan in fitting[:_SHOWN]:
        memory = plan.memory
        adapter = memory["factors"] + memory["gradients"] + memory["optimiser"]
        run = memory["activations"] + memory["working"]
        sent = plan.sent_by
        rows.append(
            (
                f"{plan.division}",
                "lorica" if plan.division.engine == "native" else "transformers",
                *(_gib(size) for size in (memory["weights"], adapter, memory["gathered"], run, plan.total)),
                f"{sent['base'] / _GIB:,.2f}",
                f"{sent['lora'] / _MIB:,.1f}",
                f"{plan.per_token / 1e3:,.1f}",
                f"{plan.idle:.0%}" if plan.idle else "",
            )
        )
    names = ("layout", "cut by", "weights", "adapter", "gathered", "run", "total GiB")
    sent_names = ("sent GiB", "LoRA MiB", "kB/token", "waits")
    if rows:
        _table(f"{head}\n{len(fitting)} layouts of {world} ranks fit, best first", (*names, *sent_names), rows)
        first = fitting[0]
        print(f"trainable: {first.trainable[0]:,}; file: {first.tensors} tensors, {first.file / _MIB:,.1f} MiB")
        print("Best: the shortest pipeline, then the fewest bytes sent for each token, then the least memory.")
    else:
        print(f"{head}\nno layout of {world} ranks fits")
    _explain(refused)


def _explain(refused: list[Refused]) -> None:
    too_large = sorted((one for one in refused if one.plan), key=lambda one: one.plan.total if one.plan else 0)
    if too_large:
        shown = "; ".join(f"{one.division}: {one.reason}" for one in too_large[:6])
        more = f"; and {len(too_large) - 6} that need more" if len(too_large) > 6 else ""
        print(f"\ntoo large: {shown}{more}")
    reasons: dict[str, list[str]] = {}
    for one in refused:
        if one.plan is None:
            reasons.setdefault(one.reason, []).append(str(one.division))
    for reason, names in reasons.items():
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        print(f"\nimpossible: {', '.join(names[:4])}{more}: {reason}")


def _gib(size: int) -> str:
    return f"{size / _GIB:,.2f}"


def _table(title: str, names: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    print(f"\n{title}")
    table = Table()
    for name in names:
        numbers = rows and all(row[names.index(name)][:1].isdigit() or not row[names.index(name)] for row in rows)
        table.add_column(name, justify="right" if numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    # In a pipe there is no width to fit into.
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def draw(plans: Sequence[Plan], path: Path, memory: float | None) -> None:
    """Draw the memory of each layout as a stacked bar, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from lorica.files import atomic
    from lorica.parallel.plan import PARTS

    figure = Figure(figsize=(10, max(2.5, 0.4 * len(plans) + 1.5)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    places = range(len(plans))
    left = [0.0] * len(plans)
    for part in PARTS:
        sizes = [_part(plan.memory, part) for plan in plans]
        axes.barh(places, sizes, left=left, label=part)
        left = [start + size for start, size in zip(left, sizes, strict=True)]
    if memory is not None:
        axes.axvline(memory, color="black", linestyle="--", label=f"{memory:g} GiB")
    axes.set_yticks(list(places), [str(plan.division) for plan in plans], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("GiB of a rank")
    axes.legend(fontsize=7)
    atomic.write_file(path, lambda temporary: figure.savefig(temporary, format="png"))


def _part(memory: Mapping[str, int], part: str) -> float:
    return memory.get(part, 0) / _GIB
