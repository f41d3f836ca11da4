"""From examples to batches: the order of the data, packing, padding.

A batch never needs an attention mask. Padding is on the right, where a causal model cannot see it; packed documents are
told apart by positions that start again, from which transformers derives the block-diagonal mask of whatever attention
is used (:func:`documents_are_separate` makes sure that the model at hand really does).
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lorica.train.data import IGNORE, Example

Batch = dict[str, Tensor]
"""``input_ids``, ``labels`` and ``position_ids``, each ``[B, T]``; ``tokens``: how many of them are no padding.

Of rows with images also what the processor made of these.

Where ranks share a batch, ``tokens`` and ``learned`` (how many tokens the loss is over) are those of the whole batch.
"""

_OF_TEXT = ("input_ids", "labels", "position_ids", "tokens", "learned")


class Sight(Protocol):
    """Makes pixels of images."""

    def together(self, examples: Sequence[Example], ids_BT: Tensor) -> dict[str, Tensor]:
        """Return what the model takes besides tokens, for a batch of examples in the order of its rows."""


@dataclass(frozen=True)
class Collator:
    """Lay packs of examples (a pack of one: no packing) side by side.

    ``flatten`` makes one long row of them, which is the only form in which flash attention tells documents apart.
    ``sight`` makes pixels of the images of examples (one in each pack).
    """

    pad_id: int
    flatten: bool = False
    sight: Sight | None = None

    def __call__(self, packs: Sequence[Sequence[Example]]) -> Batch:
        if self.flatten:
            packs = [[example for pack in packs for example in pack]]
        width = max(sum(map(len, pack)) for pack in packs)
        ids_BT = torch.full((len(packs), width), self.pad_id, dtype=torch.long)
        labels_BT = torch.full((len(packs), width), IGNORE, dtype=torch.long)
        positions_BT = torch.arange(width).repeat(len(packs), 1)
        for row, pack in enumerate(packs):
            start = 0
            for example in pack:
                end = start + len(example)
                ids_BT[row, start:end] = example.ids
                labels_BT[row, start:end] = example.labels
                labels_BT[row, start] = IGNORE  # the document before must not predict it
                if len(pack) > 1:
                    positions_BT[row, start:end] = torch.arange(len(example))
                start = end
            if len(pack) > 1:
                positions_BT[row, start:] = torch.arange(width - start)
        found = {"input_ids": ids_BT, "labels": labels_BT, "position_ids": positions_BT}
        examples = [example for pack in packs for example in pack]
        if self.sight is not None:
            found |= self.sight.together(examples, ids_BT)
        return found | count(examples)


def count(examples: Sequence[Example]) -> Batch:
    """``tokens`` and ``learned`` of a batch of these examples."""
    learned = sum(int((example.labels[1:] != IGNORE).sum()) for example in examples)
    return {"tokens": torch.tensor(sum(map(len, examples))), "learned": torch.tensor(learned)}


def seen(batch: Batch) -> dict[str, Tensor]:
    """What a batch holds of images."""
    return {name: tensor for name, tensor in batch.items() if name not in _OF_TEXT}


def shared(packs: Sequence[Sequence[Example]], share: tuple[int, int]) -> Sequence[Sequence[Example]]:
    """Every ``share[1]``-th pack from ``share[0]`` on; where there is none left, one that teaches nothing."""
    index, shares = share
    if index < len(packs):
        return packs[index::shares]
    # All ranks have to go forward and backward together, so one without rows goes with a row that counts for nothing.
    return [[replace(example, labels=torch.full_like(example.labels, IGNORE)) for example in packs[0]]]


def pack(examples: Sequence[Example], max_length: int) -> list[list[Example]]:
    """Fill rows of ``max_length`` tokens, longest first, each example into the fullest row that still takes it."""
    packs: list[list[Example]] = []
    room: list[tuple[int, int]] = []  # (free tokens, pack), sorted
    for example in sorted(examples, key=len, reverse=True):
        place = bisect.bisect_left(room, (len(example), -1))
        if place < len(room):
            free, index = room.pop(place)
        else:
            free, index = max_length, len(packs)
            packs.append([])
        packs[index].append(example)
        bisect.insort(room, (free - len(example), index))
    return packs


class Batches:
    """An endless stream of batches: every epoch a new seeded permutation, and one number to say where it stands.

    ``share`` is which share of each batch's rows this rank has, of how many. The batches themselves are the same
    however many ranks share them.
    """

    def __init__(
        self,
        packs: Sequence[Sequence[Example]],
        collate: Collator,
        batch_size: int,
        seed: int,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        self._packs = packs
        self._collate = collate
        self._batch_size = batch_size
        self._seed = seed
        self._share = share
        self.position = 0

    @property
    def per_epoch(self) -> int:
        return math.ceil(len(self._packs) / self._batch_size)

    def __iter__(self) -> Iterator[Batch]:
        while True:
            epoch, first = divmod(self.position, self.per_epoch)
            order = self._order(epoch)
            for index in range(first, self.per_epoch):
                chosen = [
                    self._packs[item] for item in order[index * self._batch_size : (index + 1) * self._batch_size]
                ]
                self.position += 1
                whole = count([example for pack in chosen for example in pack])
                yield self._collate(shared(chosen, self._share)) | whole

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        position = state["position"]
        if type(position) is not int or not 0 <= position < 2**40:
            raise ValueError(f"{position!r} is no position among the batches")
        self.position = position

    def _order(self, epoch: int) -> list[int]:
        # A generator of its own: the order depends on nothing but the seed and the epoch.
        generator = torch.Generator().manual_seed((self._seed << 20) + epoch)
        return torch.randperm(len(self._packs), generator=generator).tolist()


@torch.no_grad()
def documents_are_separate(model: nn.Module, batch: Batch) -> bool:
    """Whether a packed row's later documents are blind to its first one, tried on the model itself.

    The first document's tokens are changed; if any logit of a later document moves, the model mixes documents (state
    space models do, and those that take no ``position_ids``).
    """
    ids_BT, positions_BT = batch["input_ids"], batch["position_ids"]
    starts = (positions_BT == 0).nonzero()[1:]
    later = [(int(row), int(column)) for row, column in starts if column > 0]
    if not later:
        return True
    row, start = later[0]
    changed_BT = ids_BT.clone()
    vocabulary = int(ids_BT.max()) + 1
    changed_BT[row, :start] = (changed_BT[row, :start] + 1) % vocabulary
    was_training = model.training
    model.eval()
    try:
        before = forward(model, ids_BT, positions_BT)[row, start:].float()
        after = forward(model, changed_BT, positions_BT)[row, start:].float()
    finally:
        model.train(was_training)
    # Other routing or kernels may round differently; another document's influence is far larger.
    return bool(torch.allclose(before, after, atol=1e-3 * float(before.std()), rtol=0.0))


def forward(model: nn.Module, ids_BT: Tensor, positions_BT: Tensor, seen: Mapping[str, Tensor] | None = None) -> Tensor:
    """The logits ``[B, T, V]`` of a causal language model; with ``seen`` of one that sees, which counts positions."""
    arguments: dict[str, Any] = {"input_ids": ids_BT, "use_cache": False, **(seen or {})}
    if not seen and takes_positions(model):
        arguments["position_ids"] = positions_BT
    logits: Tensor = model(**arguments).logits
    return logits


def takes_positions(model: nn.Module) -> bool:
    """Whether the (possibly adapted) model's own forward has ``position_ids``."""
    import inspect

    unwrap: Any = getattr(model, "get_base_model", None)
    base = unwrap() if unwrap is not None else model
    return "position_ids" in inspect.signature(base.forward).parameters
