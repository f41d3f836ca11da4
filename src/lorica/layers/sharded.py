"""``sharded_state_dict``: what Megatron-Core asks the modules of its models for its distributed checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lorica.engines.registry import Checkpoints, checkpoints
from lorica.errors import AdapterError
from lorica.layout import Roles

if TYPE_CHECKING:
    from lorica.layers.layer import LoraLayer
    from lorica.layers.saved import ModulesToSaveWrapper


class Sharded(nn.Module):
    """A module around another one: that one's tensors keep their names, its own are added.

    Attributes:
        inner: name of the module that was there before.
    """

    inner: str

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        """Return this module's part of a sharded state, by the names of the live tensors; those of the base layer
        without the levels that adapters add.

        Args:
            prefix: of the names.
            sharded_offsets: how the modules around this one divide a list of such modules.
            metadata: handed on.

        Raises:
            AdapterError: one adapter is on several parameters of the base layer, which have one name in a checkpoint,
                or Megatron-Core is not loaded.
        """
        state: dict[str, Any] = {}
        module: Any = self
        live = prefix
        while isinstance(module, Sharded):  # one around another: on several parameters, or in one pair and in parts
            own = module._own_state(prefix, sharded_offsets, metadata)
            _refuse_double(prefix, state, own)
            state |= {live + name.removeprefix(prefix): value for name, value in own.items()}
            live += f"{module.inner}."
            module = module._modules[module.inner]
        return _checkpoints().state_of(module, prefix, sharded_offsets, metadata) | state

    def _own_state(self, prefix: str, sharded_offsets: Any, metadata: Any) -> dict[str, Any]:
        raise NotImplementedError

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        if checkpoints() is not None:
            self._find_old_names(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _find_old_names(self, state: Any, prefix: str) -> None:
        """Put what a state has of the base layer, under the names from before it was adapted, where it is now."""
        for key in [key for key in state if key.startswith(prefix)]:
            rest = key.removeprefix(prefix)
            if rest.partition(".")[0] not in self._modules:
                state[f"{prefix}{self.inner}.{rest}"] = state.pop(key)


def _checkpoints() -> Checkpoints:
    if (found := checkpoints()) is None:
        raise AdapterError(
            "sharded_state_dict is what Megatron-Core asks modules for, and it is not loaded; write the adapter with "
            "save_pretrained, or import megatron.core first"
        )
    return found


def _refuse_double(prefix: str, state: dict[str, Any], more: dict[str, Any]) -> None:
    keys, others = ({str(value.key) for value in held.values() if hasattr(value, "key")} for held in (state, more))
    double = sorted(keys & others)
    if double:
        raise AdapterError(
            f"{prefix[:-1]}: one adapter is on several parameters of this module, and {double[0]!r} would be two "
            "tensors of a distributed checkpoint; write the adapter with save_pretrained"
        )


def state_of_factors(layer: LoraLayer, prefix: str, sharded_offsets: Any) -> dict[str, Any]:
    """Return the factors of all adapters of a layer for a sharded state."""
    level = prefix[:-1].rpartition(".")[2]
    state: dict[str, Any] = {}
    for adapter, spec in layer.specs.items():
        for live, tensor, roles in _tensors(layer, adapter):
            sizes: dict[str, int] = {} if layer.site is None else dict(layer.site.layout.sizes)
            shape = torch.Size(sizes.get(role, size) for role, size in zip(roles, tensor.shape, strict=True))
            windows = layer.op.windows(level, live, spec, layer.base_layer, shape, roles)
            ends = [(name.lstrip("."), window) for name, window in windows]
            end = f"{level}.{live}"
            state[prefix + live] = _checkpoints().sharded(
                tensor, prefix + live, end, ends, roles, layer.site, sharded_offsets
            )
    return state


def _tensors(layer: LoraLayer, adapter: str) -> Iterator[tuple[str, Tensor, Roles]]:
    """Yield live name, tensor and roles of what a layer holds for an adapter."""
    if adapter in layer.tied:
        return
    live = layer.factor_names(adapter).values()
    for name, roles in zip(live, layer.factor_roles(adapter), strict=True):
        owner, _, leaf = name.rpartition(".")
        yield name, getattr(layer.get_submodule(owner), leaf), roles


def state_of_copies(wrapper: ModulesToSaveWrapper, prefix: str, sharded_offsets: Any, metadata: Any) -> dict[str, Any]:
    """Return the copies that train fully for a sharded state."""
    state: dict[str, Any] = {}
    for adapter, copied in wrapper.modules_to_save.items():
        state |= _checkpoints().state_of(copied, f"{prefix}modules_to_save.{adapter}.", sharded_offsets, metadata)
    return state


__all__ = ["Sharded", "state_of_copies", "state_of_factors"]
