"""``lorica inspect``: what an adapter does to each layer, from its factors alone.

No ``out × in`` matrix is formed: with ``B = Q_B R_B`` and ``Aᵀ = Q_A R_A`` the singular values of ``s·B A`` are those
of the ``r × r`` core ``s·R_B R_Aᵀ``.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorica.cli.errors import readable
from lorica.errors import CheckpointError, naming

if TYPE_CHECKING:
    from torch import Tensor

_A = re.compile(r"(?:base_model\.model\.)?(?P<target>.+)\.(?:lora_A\.weight|lora_embedding_A)")


_ENDS = ("lora_A.weight", "lora_embedding_A")


@dataclass(frozen=True)
class Delta:
    """One target's factors in numbers. Norms are Frobenius norms; ``singular_values`` are those of ``ΔW``, falling."""

    target: str
    rank: int
    alpha: float
    scale: float
    norm_a: float
    norm_b: float
    norm_delta: float
    effective_rank: float
    singular_values: tuple[float, ...]


@readable
def inspect(
    adapter: Annotated[str, typer.Argument(help="The adapter's directory.")],
    plot: Annotated[Path | None, typer.Option(help="Draw norms and effective ranks into this PNG file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show each target's rank, scale, norms and effective rank."""
    from lorica.checkpoint.loading import read_config
    from lorica.checkpoint.reading import Tensors, open_weights
    from lorica.config.expressions import one_search
    from lorica.train.models import check_adapter

    directory = check_adapter(adapter)
    config = read_config(directory, None, {}, is_trainable=False).to_dict()
    file = open_weights(directory)
    with one_search(), naming(file.path, CheckpointError), file.opened() as opened:
        found = measure(Tensors(opened), config)
    if not found:
        raise CheckpointError(f"{file.path} holds no LoRA factors")
    if as_json:
        print(json.dumps([asdict(delta) for delta in found]))
    else:
        _print(found, adapter)
    if plot is not None:
        draw(found, plot)


def measure(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> list[Delta]:
    """The numbers of every target in an adapter's file, in the order of their names (numbers as numbers).

    Raises:
        CheckpointError: a factor is missing, or the two do not fit together.
    """
    found = []
    for key in sorted((key for key in tensors if key.endswith(_ENDS)), key=_natural):
        match = _A.fullmatch(key)
        if match is None:
            continue
        partner = key.replace("lora_A", "lora_B").replace("lora_embedding_A", "lora_embedding_B")
        if partner not in tensors:
            raise CheckpointError(f"{match['target']}: the file has {key} but not {partner}")
        found.append(_delta(match["target"], tensors[key], tensors[partner], config))
    return found


def _delta(target: str, a: Tensor, b: Tensor, config: Mapping[str, Any]) -> Delta:
    import torch

    from lorica.config import AdapterSpec
    from lorica.targets.match import pattern_value

    # A convolution's A is [r, in, *kernel] and its B [out, r, 1, ...]: as matrices they multiply like a linear's.
    a_RI, b_OR = a.flatten(1).double(), b.flatten(1).double()
    rank = a_RI.shape[0]
    if b_OR.shape[1] != rank:
        raise CheckpointError(f"{target}: A has rank {rank}, B has rank {b_OR.shape[1]}")
    said = pattern_value(config.get("rank_pattern"), target, config.get("r", rank))
    stacked = bool(config.get("target_parameters") or config.get("fused_as_one"))  # several A's, one below the other
    if rank != said and not (stacked and rank % said == 0):
        raise CheckpointError(f"{target}: A has rank {rank}, adapter_config.json says r={said} (r or rank_pattern)")
    alpha = float(pattern_value(config.get("alpha_pattern"), target, config.get("lora_alpha", 8)))
    scale = AdapterSpec.scale(rank, alpha, rslora=bool(config.get("use_rslora")))
    core_RR = torch.linalg.qr(b_OR, mode="r").R @ torch.linalg.qr(a_RI.T, mode="r").R.T
    values = abs(scale) * torch.linalg.svdvals(core_RR)
    return Delta(
        target=target,
        rank=rank,
        alpha=alpha,
        scale=scale,
        norm_a=float(a_RI.norm()),
        norm_b=float(b_OR.norm()),
        norm_delta=float(values.norm()),
        effective_rank=effective_rank(values),
        singular_values=tuple(values.tolist()),
    )


def effective_rank(values: Tensor) -> float:
    """``exp`` of the entropy of the singular values as shares of their sum (Roy, Vetterli 2007); 0 for 0."""
    total = float(values.sum())
    if total == 0.0:
        return 0.0
    shares = values / total
    shares = shares[shares > 0]
    return float((-(shares * shares.log()).sum()).exp())


def draw(found: Sequence[Delta], path: Path) -> None:
    """Draw each target's ``‖ΔW‖`` and effective rank as bars, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from lorica.files import atomic

    figure = Figure(figsize=(10, max(2.5, 0.22 * len(found) + 1.2)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    places = range(len(found))
    left.barh(places, [delta.norm_delta for delta in found], color="tab:blue")
    left.set_yticks(list(places), [delta.target for delta in found], fontsize=6)
    left.invert_yaxis()
    left.set_xlabel("‖ΔW‖ (Frobenius)")
    right.barh(places, [delta.rank for delta in found], color="0.88", label="rank")
    right.barh(places, [delta.effective_rank for delta in found], color="tab:orange", label="effective rank")
    right.set_xlabel("rank")
    right.legend(loc="lower right")
    atomic.write_file(path, lambda temporary: figure.savefig(temporary, format="png"))


def _print(found: Sequence[Delta], title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    table.add_column("target", overflow="fold")
    for name in ("rank", "α", "scale", "‖A‖", "‖B‖", "‖ΔW‖", "effective rank"):
        table.add_column(name, justify="right")
    for delta in found:
        norms = (f"{value:.4g}" for value in (delta.norm_a, delta.norm_b, delta.norm_delta))
        table.add_row(
            delta.target,
            str(delta.rank),
            f"{delta.alpha:g}",
            f"{delta.scale:.4g}",
            *norms,
            f"{delta.effective_rank:.2f}",
        )
    # In a pipe there is no width to fit into.
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
