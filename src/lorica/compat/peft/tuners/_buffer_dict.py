"""peft.tuners._buffer_dict: a dictionary of buffers."""

from __future__ import annotations

from collections.abc import ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from typing import Any

from torch import Tensor, nn


class BufferDict(nn.Module):
    """A dictionary whose values are buffers of a module, as ``nn.ParameterDict`` is for parameters.

    Args:
        buffers: a mapping, or pairs of names and tensors.
        persistent: whether they are part of the ``state_dict``.
    """

    def __init__(
        self, buffers: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]] | None = None, persistent: bool = False
    ) -> None:
        super().__init__()
        self.persistent = persistent
        if buffers is not None:
            self.update(buffers)

    def __getitem__(self, key: str) -> Any:
        return self._buffers[key]

    def __setitem__(self, key: str, buffer: Tensor) -> None:
        self.register_buffer(key, buffer, persistent=self.persistent)

    def __delitem__(self, key: str) -> None:
        del self._buffers[key]
        self._non_persistent_buffers_set.discard(key)

    def __len__(self) -> int:
        return len(self._buffers)

    def __iter__(self) -> Iterator[str]:
        return iter(self._buffers)

    def __contains__(self, key: object) -> bool:
        return key in self._buffers

    def clear(self) -> None:
        """Remove all."""
        self._buffers.clear()
        self._non_persistent_buffers_set.clear()

    def pop(self, key: str) -> Any:
        """Remove one and return it."""
        value = self[key]
        del self[key]
        return value

    def keys(self) -> KeysView[str]:
        """The names, in the order in which they came."""
        return self._buffers.keys()

    def items(self) -> ItemsView[str, Tensor | None]:
        """Names and buffers."""
        return self._buffers.items()

    def values(self) -> ValuesView[Tensor | None]:
        """The buffers."""
        return self._buffers.values()

    def update(self, buffers: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> None:
        """Take in further buffers; those of the same name are replaced.

        Raises:
            TypeError: ``buffers`` is neither a mapping nor pairs.
            ValueError: an entry is no pair.
        """
        if not isinstance(buffers, Iterable):
            raise TypeError(
                "BuffersDict.update should be called with an iterable of key/value pairs, but got "
                + type(buffers).__name__
            )
        pairs: Any = buffers.items() if isinstance(buffers, Mapping | BufferDict) else buffers
        for number, pair in enumerate(pairs):
            if len(pair) != 2:
                raise ValueError(f"BufferDict update sequence element #{number} has length {len(pair)}; 2 is required")
            self[pair[0]] = pair[1]

    def extra_repr(self) -> str:
        """Show names and shapes."""
        return "\n".join(f"({name}): {tuple(b.shape)}" for name, b in self._buffers.items() if b is not None)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse: a dictionary computes nothing."""
        raise RuntimeError("BufferDict should not be called.")


__all__ = ["BufferDict"]
