"""The shape that a stack of factors has in a file.

PEFT keeps the factors of stacked experts in two dimensions (``lora.ParamWrapper``): A ``[E·r, in]``, expert by expert,
and B ``[out, r·E]``, whose columns go through the experts first. Live factors are ``[E, r, in]`` and ``[E, out, r]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from lorica.layout import Box, Roles


class Form(Protocol):
    """How a live tensor of three dimensions lies in a file's of two."""

    def shape(self, logical: Sequence[int]) -> torch.Size:
        """Return the shape in the file."""

    def saved(self, logical: Tensor) -> Tensor:
        """Return the tensor as it is in the file."""

    def view(self, local: Tensor) -> Tensor:
        """Return what a rank holds as a view that the boxes of :meth:`boxes` refer to."""

    def boxes(self, box: Box, logical: Sequence[int]) -> list[Box]:
        """Return the rectangles in the file of a rectangle of the live tensor.

        Args:
            box: in three dimensions.
            logical: the live tensor's logical shape.
        """


class _ExpertByExpert:
    """A: the rows of one expert after those of another."""

    def shape(self, logical: Sequence[int]) -> torch.Size:
        experts, rank, columns = logical
        return torch.Size((experts * rank, columns))

    def saved(self, logical: Tensor) -> Tensor:
        return logical.flatten(0, 1)

    def view(self, local: Tensor) -> Tensor:
        return local.view(-1, local.shape[2])

    def boxes(self, box: Box, logical: Sequence[int]) -> list[Box]:
        rank = logical[1]
        local, whole = (
            (slice(experts.start * rank, experts.stop * rank), columns)
            for experts, _, columns in (box.local, box.logical)
        )
        return [Box(local, whole)]


class _RankByRank:
    """B: one column of every expert after another column of every expert."""

    def shape(self, logical: Sequence[int]) -> torch.Size:
        experts, rows, rank = logical
        return torch.Size((rows, rank * experts))

    def saved(self, logical: Tensor) -> Tensor:
        return logical.permute(1, 2, 0).flatten(1)

    def view(self, local: Tensor) -> Tensor:
        return local.permute(1, 2, 0)

    def boxes(self, box: Box, logical: Sequence[int]) -> list[Box]:
        (mine, my_rows, _), (experts, rows, ranks) = box.local, box.logical
        return [
            Box(
                (my_rows, k, mine),  # type: ignore[arg-type]  # a number takes the dimension away, as an index does
                (rows, slice(k * logical[0] + experts.start, k * logical[0] + experts.stop)),
            )
            for k in range(ranks.start, ranks.stop)
        ]


#: Roles of a live tensor → its form in a file. Any other is saved as it is.
FORMS: dict[Roles, Form] = {
    ("expert", "rank", "in"): _ExpertByExpert(),
    ("expert", "out", "rank"): _RankByRank(),
    # Variants keep fewer columns.
    ("expert", "rank", "group"): _ExpertByExpert(),
    ("expert", "rank", "block"): _ExpertByExpert(),
    ("expert", "out", "block"): _RankByRank(),
}
