"""How the tensors of several adapters become one: plain sums, and sums of what pruning and votes on the sign leave.

TIES (https://arxiv.org/abs/2306.01708): prune by magnitude, elect a sign for every entry, average those that have it.
DARE (https://arxiv.org/abs/2311.03099): prune at random and rescale, so that the expectation stays.

A dense delta is given by a function that makes rows of it, so that there is a chunk of it at a time.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorica.errors import AdapterError

#: What is done to the tensors → how they are pruned, and whether signs are elected.
RULES: dict[str, tuple[str, bool]] = {
    "linear": ("", False),
    "ties": ("magnitude", True),
    "dare_linear": ("random", False),
    "dare_ties": ("random", True),
    "magnitude_prune": ("magnitude", False),
}
METHODS = ("total", "frequency")

#: Gives rows of a matrix.
Rows = Callable[[slice], Tensor]

#: Elements of a chunk of rows of all tensors that are combined.
CHUNK_ELEMENTS = 4 * 1024 * 1024


@dataclass(frozen=True)
class Rule:
    """One way to combine tensors.

    Attributes:
        prune: ``"magnitude"``, ``"random"`` or, for nothing, empty.
        elect: whether entries against the majority's sign are left out, and the others averaged.
        density: the share of entries that pruning keeps.
        method: the majority is that of the sum of the entries (``"total"``) or of their signs (``"frequency"``).
    """

    prune: str
    elect: bool
    density: float = 1.0
    method: str = "total"

    @classmethod
    def of(cls, name: str, density: float | None, method: str) -> Rule:
        """Return the rule ``name`` of :data:`RULES`.

        Raises:
            AdapterError: it prunes and there is no density, or a negative one, or the method is unknown.
        """
        prune, elect = RULES[name]
        if method not in METHODS:
            raise AdapterError(
                f'majority_sign_method={method!r}: Unimplemented mask method "{method}"; use one of {METHODS}'
            )
        if not prune:
            return cls("", elect)
        if density is None or isinstance(density, bool) or not isinstance(density, int | float):
            raise AdapterError(f"combination_type with {name!r} prunes and needs density, a number, got {density!r}")
        if density < 0:
            raise AdapterError(f"Density should be >= 0, got {density}")
        if density >= 1:
            warnings.warn(
                f"The density {density} is greater than or equal to 1, no pruning will be performed.", stacklevel=4
            )
            return cls("", elect, method=method)
        return cls(prune, elect, float(density), method)

    def combine(self, tensors: Sequence[Tensor], weights: Sequence[float], generator: torch.Generator) -> Tensor:
        """Return one tensor of several of the same shape.

        Args:
            tensors: one of each adapter.
            weights: theirs.
            generator: of the random masks, on the CPU.
        """
        if self.prune == "magnitude":
            tensors = [_largest(tensor, self.density) for tensor in tensors]
        elif self.prune == "random":
            tensors = [self._dropped(tensor, generator) for tensor in tensors]
        return self._sum(torch.stack(list(tensors)), weights)

    def combine_rows(
        self, parts: Sequence[Rows], weights: Sequence[float], like: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Return one matrix ``[out, in]`` of several that are given as rows when they are asked for.

        In memory there is the result, where magnitudes are pruned one matrix more, and a chunk of rows of each.

        Args:
            parts: one of each adapter; the same rows give the same values.
            weights: theirs.
            like: of the result's shape and type; it is written to.
            generator: of the random masks, on the CPU.
        """
        chunks = _chunks(like.shape[0], like.shape[1] * len(parts))  # the same ones each time: so are the roundings
        least = [self._threshold(part, like, chunks) for part in parts]
        for rows in chunks:
            values = [part(rows) for part in parts]
            if self.prune == "magnitude":
                kept = zip(values, least, strict=True)
                values = [torch.where(value.abs() >= smallest, value, 0) for value, smallest in kept]
            elif self.prune == "random":
                values = [self._dropped(value, generator) for value in values]
            like[rows] = self._sum(torch.stack(values), weights)
        return like

    def _threshold(self, part: Rows, like: Tensor, chunks: Sequence[slice]) -> float:
        """Return the least magnitude that is kept."""
        if self.prune != "magnitude":
            return 0.0
        kept = int(self.density * like.numel())
        if kept == 0:
            return float("inf")
        magnitudes = torch.empty_like(like)
        for rows in chunks:
            torch.abs(part(rows), out=magnitudes[rows])
        return float(magnitudes.flatten().kthvalue(like.numel() - kept + 1).values)

    def _dropped(self, tensor: Tensor, generator: torch.Generator) -> Tensor:
        if self.density == 0:
            return torch.zeros_like(tensor)  # PEFT divides by it
        mask = torch.empty(tensor.shape).bernoulli_(self.density, generator=generator)
        return tensor * mask.to(tensor) / self.density

    def _sum(self, tensors: Tensor, weights: Sequence[float]) -> Tensor:
        weighted = tensors * tensors.new_tensor(weights).view(-1, *[1] * (tensors.dim() - 1))
        if not self.elect:
            return weighted.sum(0)
        signs = tensors.sign()
        votes = (tensors if self.method == "total" else signs).sum(0)
        with_majority = signs == torch.where(votes >= 0, 1, -1)
        return (weighted * with_majority).sum(0) / with_majority.sum(0).clamp_min(1)


def _largest(tensor: Tensor, density: float) -> Tensor:
    """Return a tensor of which only the largest entries are left."""
    kept = tensor.abs().flatten().topk(int(density * tensor.numel())).indices
    result = torch.zeros_like(tensor).flatten()
    result[kept] = tensor.flatten()[kept]
    return result.view(tensor.shape)


def _chunks(rows: int, width: int) -> list[slice]:
    step = max(1, CHUNK_ELEMENTS // max(1, width))
    return [slice(start, start + step) for start in range(0, rows, step)]


def clamped(left: Tensor, right: Tensor, quantile: float) -> tuple[Tensor, Tensor]:
    """Return both with every entry cut to the ``quantile`` of all entries of the two, and its negative."""
    highest = _quantile(torch.cat([left.flatten(), right.flatten()]), quantile)
    return left.clamp(-highest, highest), right.clamp(-highest, highest)


def _quantile(values: Tensor, q: float) -> float:
    # As torch.quantile interpolates, which takes no more than 2**24 values.
    place = q * (len(values) - 1)
    low = int(place)
    found = values.kthvalue(low + 1).values
    above = values.kthvalue(min(low + 1, len(values) - 1) + 1).values
    return float(found + (above - found) * (place - low))


__all__ = ["RULES", "Rule", "clamped"]
