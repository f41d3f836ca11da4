"""Embeddings cut by words or by features.

::

    words:     ids ─ to local ids ─ E_l[ids] ─ zero where not here ─ leave ─ y         features:  E_l[ids] ─ gather ─ y
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from lorica.engines.native.base import AxisLike, Native, axis_of, need_plain
from lorica.engines.native.collectives import gather, leave, sequence_reduce, sequence_swap
from lorica.errors import LayoutError
from lorica.layout import Layout, Roles, even


class ParallelEmbedding(Native, nn.Embedding):
    """A table of ``V`` rows of width ``d`` divided over an axis.

    Cut by words, ``product`` gets ids that count from this rank's first row, 0 for those of other ranks; what it
    returns for these is set to zero after it. So whatever is looked up there by the same ids needs no mask of its own.

    Args:
        num_embeddings: ``V``; the ranks need not divide it, but each has a row.
        embedding_dim: ``d``.
        padding_idx: id whose row gets no gradient.
        axis: over which to cut.
        shard_across_embedding: whether the width is divided rather than the words.
        sequence_parallel_enabled: whether each rank gets its tokens only (cut by words).
        sequence_dimension: the dimension of the tokens in the output.
        device: of the weight.
        dtype: of the weight.

    Raises:
        LayoutError: a rank would hold no row, or a cut by features is to be sequence-parallel.
    """

    roles: ClassVar[Mapping[str, Roles]] = {"weight": ("in", "out")}

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        axis: AxisLike,
        shard_across_embedding: bool = False,
        sequence_parallel_enabled: bool = False,
        sequence_dimension: int = -2,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if shard_across_embedding and sequence_parallel_enabled:
            raise LayoutError("sequence_parallel_enabled: an embedding cut by features has nothing to reduce")
        nn.Module.__init__(self)  # nn.Embedding's own would draw the piece as if it were the whole
        self.axis = axis_of(axis)
        self.axes = {self.axis.name: self.axis}
        dim, length = ("out", embedding_dim) if shard_across_embedding else ("in", num_embeddings)
        cut = even(self.axis.name, dim, length, self.axis.size)
        self.layout = Layout({"in": num_embeddings, "out": embedding_dim}, (cut,))
        self.vocabulary_size, self.width = num_embeddings, embedding_dim
        local = self.layout.local_shape(("in", "out"), (num_embeddings, embedding_dim), self.at)
        if any(cut.length(rank) == 0 for rank in range(cut.size)):
            raise LayoutError(f"{length} rows or features do not reach all of {cut.size} ranks")
        self.num_embeddings, self.embedding_dim = local
        self.start_index = 0 if shard_across_embedding else cut.held[self.axis.rank][0][0]
        self.padding_idx = None if padding_idx is None else padding_idx % num_embeddings
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False
        self.shard_across_embedding = shard_across_embedding
        self.sequence_parallel_enabled = sequence_parallel_enabled
        self.sequence_dimension = sequence_dimension
        self.weight = nn.Parameter(torch.empty(local, device=device, dtype=dtype))
        self.reset_parameters()

    @property
    def _padding(self) -> int | None:
        """The row of this rank's weight that is the padding token's."""
        place = -1 if self.padding_idx is None else self.padding_idx - self.start_index
        return place if 0 <= place < self.num_embeddings else None

    def reset_parameters(self) -> None:
        """Draw the whole table as ``nn.Embedding`` does and keep this rank's piece: the same on any layout."""
        if self.weight.is_meta:
            return
        whole = torch.empty(self.vocabulary_size, self.width, device=self.weight.device, dtype=self.weight.dtype)
        self.load_logical("weight", nn.init.normal_(whole))
        if self._padding is not None:
            with torch.no_grad():
                self.weight[self._padding] = 0

    @classmethod
    def from_embedding(cls, module: nn.Embedding, axis: AxisLike, **options: Any) -> Self:
        """Return this rank's piece of a whole embedding; a scale of its output (``embed_scale``) is kept.

        Args:
            module: the whole embedding, the same on every rank.
            axis: over which to cut.
            **options: arguments of the constructor.

        Raises:
            LayoutError: the embedding is not a plain ``nn.Embedding``, or it changes or counts the rows it looks up.
        """
        layer = cls.like(module, axis, **options)
        layer.adopt(module)
        return layer

    @classmethod
    def like(cls, whole: nn.Module, axis: AxisLike, **options: Any) -> Self:
        """Return the layer that a whole ``nn.Embedding`` becomes, without weights yet."""
        need_plain(whole, nn.Embedding)
        assert isinstance(whole, nn.Embedding)
        if whole.max_norm is not None or whole.scale_grad_by_freq:
            raise LayoutError("an embedding with max_norm or scale_grad_by_freq cannot be cut")
        sizes = (whole.num_embeddings, whole.embedding_dim, whole.padding_idx)
        layer = cls(*sizes, axis=axis, device="meta", dtype=whole.weight.dtype, **options)
        layer.sparse = whole.sparse
        return layer

    def adopt(self, whole: nn.Module) -> None:
        """Take this rank's piece of the weight, and the scale of the output."""
        super().adopt(whole)
        if isinstance(scale := getattr(whole, "embed_scale", None), Tensor):
            self.register_buffer("embed_scale", scale, persistent=False)
        elif scale is not None:
            self.embed_scale = scale

    def product(self, x: Tensor) -> Tensor:
        """Return the rows (or their features) that this rank has for the ids ``x``; zeros for what it has not."""
        place = x if self.shard_across_embedding else x - self.start_index
        elsewhere = (place < 0) | (place >= self.num_embeddings)
        rows = F.embedding(place.masked_fill(elsewhere, 0), self.weight, self._padding, sparse=self.sparse)
        rows = rows.masked_fill(elsewhere.unsqueeze(-1), 0)
        scale = getattr(self, "embed_scale", None)
        return rows if scale is None else rows * (scale.to(rows.dtype) if isinstance(scale, Tensor) else scale)

    def forward(self, input: Tensor) -> Tensor:
        """Return the rows, for all tokens or this rank's."""
        if self.shard_across_embedding:
            (cut,) = self.layout.cuts
            return gather(self.product(input), self.axis, -1, [cut.length(rank) for rank in range(cut.size)])
        return self.spanning(input)

    def spanning(self, x: Tensor) -> Tensor:
        """Return the rows under the ids ``x``, whichever rank has them, for all tokens or this rank's."""
        if self.sequence_parallel_enabled:
            return sequence_reduce(self.product(x), self.axis, self.sequence_dimension)
        return leave(self.product(x), self.axis)

    def carry(self, h: Tensor) -> Tensor:
        """Sum hidden values over the ranks, each of which keeps those of its tokens."""
        return sequence_swap(h, self.axis, self.sequence_dimension)

    def extra_repr(self) -> str:
        """Show the logical sizes and this rank's."""
        return (
            f"{self.vocabulary_size}, {self.width}, here {self.num_embeddings}, {self.embedding_dim}, "
            f"{self.axis.name}={self.axis.rank}/{self.axis.size}"
        )


__all__ = ["ParallelEmbedding"]
