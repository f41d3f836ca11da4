"""What a way to store a base weight answers, and what stands for a weight that is no tensor of plain numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from lorica.engines.kinds import is_distributed
from lorica.errors import AdapterError, LayoutError

_ALL = slice(None)


class Room:
    """Memory for one chunk of a weight in the dtype that is computed in, which chunk after chunk is copied into."""

    def __init__(self) -> None:
        self._memory: Tensor | None = None
        self._chunk: Tensor | None = None  # the part of it that was used last

    def copy(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """Return a copy in a dtype; it lasts until the next one is made."""
        if self._chunk is None or not _is_alike(self._chunk, tensor.shape, dtype, tensor.device):
            self._chunk = None
            self._chunk = self._part(tensor.shape, dtype, tensor.device)
        return self._chunk.copy_(tensor)

    def _part(self, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
        size = shape.numel()
        if self._memory is None or not _is_alike(self._memory[:size], torch.Size((size,)), dtype, device):
            self._memory = None  # the old goes before the new comes
            self._memory = torch.empty(size, dtype=dtype, device=device)
        return self._memory[:size].view(shape)


def _is_alike(tensor: Tensor, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> bool:
    return tensor.shape == shape and tensor.dtype == dtype and tensor.device == device


class Storage(Protocol):
    """What merging needs to know of a way to store a weight ``[rows, cols]``.

    ``stored`` is a tensor, or the rows of a quantised weight (:class:`Packed`).

    Attributes:
        compute: the dtype in which deltas are added.
        exact: whether a merged delta can be taken out again up to the rounding of float32.
        whole: whether all rows are written at once, since what a row is stored as depends on the others.
    """

    compute: torch.dtype
    exact: bool
    whole: bool

    def dequantize(self, stored: Any, room: Room | None = None) -> Tensor:
        """Return the values as float32 (float64 stays). May share memory with ``stored``, or lie in ``room``."""

    def requantize(self, stored: Any, values: Tensor) -> None:
        """Write ``values`` over ``stored``, rounding once."""


class Packed:
    """Rows of a base layer's quantised weight ``[rows, cols]``; it answers where a tensor is asked what it is.

    Nothing is dequantised before :meth:`to` or :meth:`dequantize` is called, and then these rows alone, where the
    storage can do that.

    Args:
        base: the base layer.
        name: its attribute that a delta belongs to.
        storage: how it is stored.
        rows: which rows.
    """

    ndim: ClassVar[int] = 2

    def __init__(self, base: Any, name: str, storage: Quantised, rows: slice = _ALL) -> None:
        self.base = base
        self.name = name
        self.storage = storage
        self.rows = rows

    @property
    def shape(self) -> torch.Size:
        """``[rows, cols]`` as the layer computes with, whatever the packed tensor's own shape is."""
        rows, cols = self.storage.shape(self.base, self.name)
        return torch.Size((len(range(*self.rows.indices(rows))), cols))

    @property
    def kind(self) -> str:
        """The name of the format, for messages."""
        return self.storage.title(self.base, self.name)

    @property
    def refusal(self) -> str:
        """Why values cannot be written; empty: they can."""
        return self.storage.refusal(self.base, self.name)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the packed numbers, as the layer's own parameter says."""
        return self._tensor.dtype

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self._tensor.device

    @property
    def is_meta(self) -> bool:
        """Whether it has no memory yet."""
        return self._tensor.is_meta

    @property
    def _version(self) -> int:
        return self._tensor._version

    @property
    def _tensor(self) -> Tensor:
        tensor: Tensor = getattr(self.base, self.storage.fields[0])
        return tensor

    @property
    def divided(self) -> bool:
        """Whether ranks hold parts of it between forwards."""
        return is_distributed(self._tensor)

    def check_whole(self, where: str) -> None:
        """Refuse a quantised weight that is divided over ranks: which numbers a shard stands for, its format knows.

        Raises:
            LayoutError: names the module.
        """
        if self.divided and not self.storage.sharded:
            raise LayoutError(
                f"{where}: its weight is stored as {self.kind} and divided over ranks; "
                "adapters need each rank to hold all of a quantised weight. Divide batches (DDP) instead, or load the "
                "model without quantisation"
            )

    def is_inference(self) -> bool:
        """Whether the packed numbers are an inference tensor."""
        return self._tensor.is_inference()

    def is_floating_point(self) -> bool:
        """Its values are, whatever they are packed in."""
        return True

    def data_ptr(self) -> int:
        """Return a number that another weight does not have."""
        return id(self._tensor)

    def dim(self) -> int:
        """Two."""
        return self.ndim

    def detach(self) -> Packed:
        """A quantised weight is in no graph."""
        return self

    def flatten(self, start: int = 0) -> Packed:
        """It is a matrix already."""
        return self

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> Packed:
        """Return some of all rows."""
        assert self.rows == _ALL, "rows of rows"
        return Packed(self.base, self.name, self.storage, rows)

    @property
    def T(self) -> Tensor:
        """The values, transposed."""
        return self.dequantize().T

    def to(self, dtype: torch.dtype) -> Tensor:
        """Return the values in a dtype."""
        return self.dequantize().to(dtype)

    def dequantize(self) -> Tensor:
        """Return the values of these rows, as float32."""
        return self.storage.dequantize(self)

    def kept(self) -> Packed:
        """Return the weight as it is now, for :meth:`restore`: it holds the packed numbers and copies nothing."""
        shadow = object.__new__(type(self.base))
        shadow.__dict__.update(self.base.__dict__)
        for name in ("_parameters", "_buffers"):
            shadow.__dict__[name] = dict(self.base.__dict__[name])
        self.storage.part(shadow)
        return Packed(shadow, self.name, self.storage)

    @torch.no_grad()
    def restore(self, kept: Packed) -> None:
        """Become what :meth:`kept` returned, bit for bit."""
        for field in self.storage.fields:
            value, now = getattr(kept.base, field), getattr(self.base, field)
            if isinstance(value, Tensor) and value.device != now.device:
                value = value.to(now.device)
            setattr(self.base, field, value)


class Quantised:
    """A quantised form. A kind says how its rows become numbers, and how numbers become it.

    Kinds hold no state; there is one object of each. None of them imports the package whose layers it knows until a
    layer of that package is there.

    Attributes:
        fields: attributes of the base layer in which the weight is stored; the first is a tensor. Writing replaces
            them and changes none in place.
        chunked: whether some rows can be dequantised without the others.
        sharded: whether ``fully_shard`` can shard it.
    """

    fields: ClassVar[tuple[str, ...]] = ("weight",)
    chunked: ClassVar[bool] = True
    sharded: ClassVar[bool] = False
    compute: torch.dtype = torch.float32
    exact: bool = False
    whole: bool = True

    def holds(self, base: Any, name: str) -> bool:
        """Whether the layer's weight is quantised now; it can still be, or again, one of plain numbers."""
        return True

    def title(self, base: Any, name: str) -> str:
        """Return what the form is called."""
        raise NotImplementedError

    def refusal(self, base: Any, name: str) -> str:
        """Return why values cannot be written; empty: they can."""
        return ""

    def shape(self, base: Any, name: str) -> torch.Size:
        """Return ``[rows, cols]``."""
        return torch.Size((base.out_features, base.in_features))

    def read(self, base: Any, name: str, rows: slice) -> Tensor:
        """Return the values of rows, in any floating dtype."""
        raise NotImplementedError

    def write(self, base: Any, name: str, values: Tensor) -> None:
        """Put the weight with these values, float32, in the place of the one that is there."""
        raise NotImplementedError

    def part(self, shadow: Any) -> None:
        """Give a shallow copy of a base layer its own of what :meth:`write` changes in place."""

    def dequantize(self, stored: Packed, room: Room | None = None) -> Tensor:
        """Return the values of rows as float32."""
        return self.read(stored.base, stored.name, stored.rows).to(torch.float32)

    def requantize(self, stored: Packed, values: Tensor) -> None:
        """Write the values of all rows.

        Raises:
            AdapterError: the form cannot take new values; it says why.
        """
        if stored.refusal:
            raise AdapterError(f"a weight stored as {stored.kind} cannot take a delta: {stored.refusal}")
        self.write(stored.base, stored.name, values)


@torch.no_grad()
def seen_through(base: nn.Module, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the weight ``[rows, columns]`` of a linear layer that offers no other way: its outputs for unit vectors.

    Args:
        base: the layer, of whose weight nothing else is asked.
        columns: its inputs.
        dtype: of the vectors; the layer computes in it.
        device: where the layer is.
    """
    found = []
    for start, count in _pieces(columns):
        units = torch.zeros(count, columns, dtype=dtype, device=device)
        units[torch.arange(count), start + torch.arange(count)] = 1
        found.append(base(units))
    bias = getattr(base, "bias", None)
    outputs = torch.cat(found)
    return (outputs if bias is None else outputs - bias.detach()).T


def _pieces(length: int, most: int = 1024) -> Iterator[tuple[int, int]]:
    for start in range(0, length, most):
        yield start, min(most, length - start)
