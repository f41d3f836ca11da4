"""peft.tuners.lora.layer: the adapted layers, told apart by what they adapt.

lorica has one class of layers and one mathematics (op) for each kind of base layer. Here each kind has PEFT's class,
and :func:`adopt` makes the layers of a model instances of theirs.
"""

from __future__ import annotations

from abc import ABCMeta
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from types import MappingProxyType
from typing import Any, ClassVar

from torch import Tensor, nn

from lorica.adapt.inject import adapter_modules
from lorica.compat.peft._library import beneath
from lorica.compat.peft.tuners.lora.variants import variants_of
from lorica.compat.peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from lorica.compat.peft.tuners.tuners_utils import BaseTunerLayer
from lorica.compat.peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from lorica.layers import LoraLayer as Core
from lorica.layers import TrainableTokensWrapper as CoreTokens


class _ByKind(ABCMeta):
    """The type of classes to which a layer of the core belongs by its op's kind."""

    kinds: frozenset[str]

    def __instancecheck__(cls, instance: object) -> bool:
        return super().__instancecheck__(instance) or (isinstance(instance, Core) and instance.op.kind in cls.kinds)


class LoraLayer(BaseTunerLayer, Core, *beneath("tuners.lora.layer.LoraLayer")):  # type: ignore[misc]
    """An adapted layer; see :class:`lorica.layers.LoraLayer`."""

    adapter_layer_names: ClassVar[tuple[str, ...]] = (
        "lora_A",
        "lora_B",
        "lora_embedding_A",
        "lora_embedding_B",
        "lora_magnitude_vector",
    )
    other_param_names: ClassVar[tuple[str, ...]] = (
        "r",
        "lora_alpha",
        "scaling",
        "lora_dropout",
        "use_dora",
        "use_rslora",
        "lora_bias",
    )

    @property
    def weight(self) -> Tensor:
        """The base layer's weight."""
        base: Any = self.get_base_layer()
        found: Tensor = base.qweight if hasattr(base, "qweight") else base.weight
        return found

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias."""
        base: Any = self.get_base_layer()
        found: Tensor | None = base.bias
        return found

    @property
    def scaling(self) -> MutableMapping[str, float]:
        """The scale ``s`` of each adapter; may be written."""
        return _Scaling(self)

    @property
    def lora_dropout(self) -> Mapping[str, nn.Module]:
        """A module for each adapter that drops as the adapter does; for reading, it takes no part in a forward."""
        return self._each(lambda spec: nn.Dropout(spec.dropout) if spec.dropout else nn.Identity())

    @property
    def use_dora(self) -> Mapping[str, bool]:
        """Whether each adapter is DoRA."""
        return self._each(lambda spec: spec.variant == "use_dora")

    @property
    def use_rslora(self) -> Mapping[str, bool]:
        """Whether each adapter's scale is ``α/√r``."""
        return self._each(lambda spec: spec.r > 1 and spec.natural_scaling * spec.r != spec.alpha)

    @property
    def lora_bias(self) -> Mapping[str, bool]:
        """Whether B of each adapter has a bias."""
        return self._each(lambda spec: spec.bias)

    @property
    def lora_variant(self) -> Mapping[str, Any]:
        """An object of PEFT's class of the variant, for each adapter that is not plain LoRA."""
        return MappingProxyType(variants_of(self))

    def get_base_weight(self) -> Tensor:
        """Return the base weight as plain numbers, whatever it is stored as."""
        return self.base_weight

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether :meth:`get_delta_weight` is all that the adapter does."""
        return self.specs[adapter_name].variant == ""

    def _get_available_adapters(self) -> set[str]:
        return set(self.specs)

    def _forget(self, adapter_name: str) -> None:
        self.remove_adapter(adapter_name)

    def _each(self, answer: Callable[[Any], Any]) -> Mapping[str, Any]:
        return MappingProxyType({name: answer(spec) for name, spec in self.specs.items()})


class _Scaling(MutableMapping[str, float]):
    """The scales of a layer's adapters."""

    def __init__(self, layer: Core) -> None:
        self._layer = layer

    def __getitem__(self, name: str) -> float:
        return self._layer.specs[name].scaling

    def __setitem__(self, name: str, value: float) -> None:
        self._layer._rescale(name, value)

    def __delitem__(self, name: str) -> None:
        raise TypeError("an adapter always has a scale; delete the adapter instead")

    def __iter__(self) -> Iterator[str]:
        return iter(self._layer.specs)

    def __len__(self) -> int:
        return len(self._layer.specs)

    def __repr__(self) -> str:
        return repr(dict(self))


class Linear(LoraLayer, metaclass=_ByKind):
    """On a linear layer, also one that is quantised, cut or fused, and transformers' ``Conv1D``."""

    kinds = frozenset({"Linear"})


class Embedding(LoraLayer, metaclass=_ByKind):
    """On an embedding."""

    kinds = frozenset({"Embedding"})


class Conv1d(LoraLayer, metaclass=_ByKind):
    """On a one-dimensional convolution."""

    kinds = frozenset({"Conv1d"})


class Conv2d(LoraLayer, metaclass=_ByKind):
    """On a two-dimensional convolution."""

    kinds = frozenset({"Conv2d"})


class Conv3d(LoraLayer, metaclass=_ByKind):
    """On a three-dimensional convolution."""

    kinds = frozenset({"Conv3d"})


class MultiheadAttention(LoraLayer, metaclass=_ByKind):
    """On torch's attention."""

    kinds = frozenset({"MultiheadAttention"})


class ParamWrapper(LoraLayer, metaclass=_ByKind):
    """On a bare parameter, such as the stacked weights of experts."""

    kinds = frozenset({"ParamWrapper"})

    @property
    def parameter_name(self) -> str:
        """Name of the parameter in its module."""
        return str(self.op.weight_name)

    def get_param(self) -> Tensor:
        """Return the parameter."""
        found: Tensor = getattr(self.get_base_layer(), self.parameter_name)
        return found


_KINDS: list[type[LoraLayer]] = [Linear, Embedding, Conv1d, Conv2d, Conv3d, MultiheadAttention, ParamWrapper]
_BY_KIND = {kind: cls for cls in _KINDS for kind in cls.kinds}


def adopt(model: nn.Module) -> None:
    """Make the adapted modules of a model instances of this package's classes; they stay the same objects."""
    for _, module in adapter_modules(model):
        if isinstance(module, Core):
            _become(module, _BY_KIND.get(module.op.kind, LoraLayer))
        elif isinstance(module, CoreTokens):
            _become(module, TrainableTokensWrapper)
            _become(module.token_adapter, TrainableTokensLayer)
        else:
            _become(module, ModulesToSaveWrapper)


def _become(module: nn.Module, cls: type) -> None:
    if not issubclass(type(module), cls):  # sharding gives modules classes of their own, made of theirs
        module.__class__ = cls


__all__ = ["Conv1d", "Conv2d", "Conv3d", "Embedding", "Linear", "LoraLayer", "MultiheadAttention", "ParamWrapper"]
