"""Starts that look at base weights of which each rank has a piece: made by all ranks, or by none."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from torch import Tensor, nn

from lorica.engines import Site
from lorica.engines.gather import gather_parameter
from lorica.engines.rest import unshard
from lorica.engines.together import together
from lorica.init import Factors
from lorica.ops import Op
from lorica.storage import Packed, stored_weight
from lorica.targets.plan import Target


def logical_weight(op: Op, base: nn.Module, site: Site | None) -> Tensor:
    """Return the base weight as ``[out, in, …]``, gathered where it is cut."""
    stored = stored_weight(base, op.weight_name)
    if site is None or isinstance(stored, Packed):
        return unshard(op.logical_weight(base))
    return op.orient(gather_parameter(stored.detach(), site, op.roles_weight))


def made_by_all_ranks(
    model: nn.Module,
    targets: Sequence[Target],
    make: Callable[[Target, Tensor | None], Factors],
    in_pieces: Collection[str],
) -> dict[str, Factors]:
    """Return what is made of every target, by its name.

    A weight is gathered before anything is computed from it, and a rank on which a target fails goes on gathering for
    the others. So all come to the end, where those that succeeded learn of the one that did not.

    Args:
        model: the base model.
        targets: the same ones on all ranks that a weight lies over.
        make: given a target and its whole weight, or None where it is no matter or all here.
        in_pieces: names of the targets of which a weight is needed that lies over ranks.

    Raises:
        RankError: it failed on another rank; the message names it and has its error.
    """
    if not in_pieces:
        return {target.name: make(target, None) for target in targets}
    made: dict[str, Factors] = {}
    failed: list[Exception] = []
    with together(model, "making the factors"):
        for target in targets:
            weight = logical_weight(target.op, target.base, target.site) if target.name in in_pieces else None
            if not failed:
                _try(make, target, weight, made, failed)
        if failed:
            raise failed[0]
    return made


def _try(
    make: Callable[[Target, Tensor | None], Factors],
    target: Target,
    weight: Tensor | None,
    made: dict[str, Factors],
    failed: list[Exception],
) -> None:
    try:
        made[target.name] = make(target, weight)
    except Exception as error:
        failed.append(error)


__all__ = ["logical_weight", "made_by_all_ranks"]
