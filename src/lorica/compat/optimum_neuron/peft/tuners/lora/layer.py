"""optimum.neuron.peft.tuners.lora.layer: the adapted layers of a cut model, told apart by what they adapt.

The mathematics is the core's, on any torch device: A of a column layer is whole and its B cut, A of a row layer is cut
and its B whole; q, k, v and gate, up keep an A each. Here each kind of layer has Optimum Neuron's class. A layer can be
made by itself, as there; in a model :func:`adopt` makes the adapted layers instances of these classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from lorica.adapt import merging
from lorica.adapt.inject import inject, lora_layers
from lorica.compat.optimum_neuron.peft.start import one_start
from lorica.compat.peft.tuners.lora import layer as peft
from lorica.config import LoraConfig, LoraRuntimeConfig
from lorica.engines import Engines
from lorica.engines.native import ColumnParallelLinear, RowParallelLinear
from lorica.engines.native import GQAQKVColumnParallelLinear as NativeQKV
from lorica.engines.native import ParallelEmbedding as NativeEmbedding
from lorica.engines.registry import qualified_names
from lorica.errors import AdapterError
from lorica.layers import LoraLayer as Core
from lorica.layers import Switch
from lorica.ops import op_of
from lorica.targets import make_plan

#: Classes of base layers, lorica's and (by their full names) neuronx-distributed's.
_NXD = "neuronx_distributed.parallel_layers.layers."
_LINEARS = frozenset(
    {
        *(f"{cls.__module__}.{cls.__qualname__}" for cls in (ColumnParallelLinear, RowParallelLinear)),
        f"{_NXD}ColumnParallelLinear",
        f"{_NXD}RowParallelLinear",
    }
)
_EMBEDDINGS = frozenset({f"{NativeEmbedding.__module__}.ParallelEmbedding", f"{_NXD}ParallelEmbedding"})
_NAME = "layer"


class _Holder(nn.Module):
    """A model of one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.add_module(_NAME, layer)


class _Updates(nn.Module):
    """A layer that takes further adapters by itself."""

    _fields: Mapping[str, Any] = MappingProxyType({})

    def update_layer(
        self,
        adapter_name: str,
        r: int,
        lora_alpha: float,
        lora_dropout: float,
        init_lora_weights: bool | str,
        use_rslora: bool,
        use_dora: bool = False,
        use_qalora: bool = False,
        lora_bias: bool = False,
        qalora_group_size: int = 32,
        **kwargs: Any,
    ) -> None:
        """Add an adapter; it becomes active if none is.

        Args:
            adapter_name: its name.
            r: its rank.
            lora_alpha: numerator of its scale.
            lora_dropout: probability.
            init_lora_weights: how its factors start, from the whole weight where they start from the weight.
            use_rslora: whether the scale is ``α/√r``.
            use_dora: whether it is DoRA, with norms of whole rows.
            use_qalora: whether it is QA-LoRA.
            lora_bias: whether B has a bias.
            qalora_group_size: of QA-LoRA.
            kwargs: further fields of a configuration.

        Raises:
            AdapterError: there is one of this name.
            ConfigError: a value is impossible.
            TargetError: the layer cannot have such an adapter.
        """
        fields: dict[str, Any] = {
            "r": r,
            "lora_alpha": lora_alpha,
            "lora_dropout": lora_dropout,
            "init_lora_weights": init_lora_weights,
            "use_rslora": use_rslora,
            "use_dora": use_dora,
            "use_qalora": use_qalora,
            "lora_bias": lora_bias,
            "qalora_group_size": qalora_group_size,
        }
        add_to(self, adapter_name, {**self._fields, **fields, **kwargs})


class NeuronLoraLayer(_Updates, peft.LoraLayer):
    """An adapted layer of a cut model; see :class:`lorica.layers.LoraLayer`.

    Args:
        base_layer: one of lorica's native parallel layers, or another layer that can be adapted.
        ephemeral_gpu_offload: move a weight to the accelerator while a start is computed from it.
        kwargs: further fields of a configuration, for every adapter that is added.

    Raises:
        NotImplementedError: such a layer cannot be adapted.
    """

    def __init__(self, base_layer: nn.Module, ephemeral_gpu_offload: bool = False, **kwargs: Any) -> None:
        op = op_of(base_layer)
        if op is None:
            raise NotImplementedError(
                f"LoRA is not supported for {type(base_layer).__name__} with optimum-neuron's layers: give one of "
                "lorica.parallel's"
            )
        site = op.place(Engines(_Holder(base_layer)), _NAME, base_layer)
        super().__init__(base_layer, op, Switch(), _NAME, site)
        self.training = base_layer.training
        self._fields = {**kwargs, "runtime_config": LoraRuntimeConfig(ephemeral_gpu_offload=ephemeral_gpu_offload)}


def add_to(layer: nn.Module, adapter: str, fields: Mapping[str, Any]) -> None:
    """Add an adapter to a layer that stands alone, or to the layers in it.

    The layer is then a model of its own: :func:`lorica.parallel.sum_gradients` takes it.

    Args:
        layer: adapted already or not.
        adapter: its name.
        fields: of its configuration.

    Raises:
        AdapterError: there is one of this name.
    """
    holder = _Holder(layer)
    if any(adapter in found.specs for found in lora_layers(holder)):
        raise AdapterError(f"the layer has an adapter {adapter!r} already")
    targets = r".*\.(q|k|v|qkv)_proj" if isinstance(layer, NativeQKV) else [_NAME]
    config = LoraConfig(target_modules=targets, **fields)
    switch = next((found.switch for found in lora_layers(holder)), None) or Switch()
    with one_start(holder):
        inject(holder, make_plan(holder, config), config, adapter, switch, autocast=False)
    if not switch.active:
        switch.active = (adapter,)
    for found in lora_layers(holder):
        found.let_train({adapter: adapter in switch.active})
    made: Any = holder.get_submodule(_NAME)
    made.__dict__["peft_config"] = {**made.__dict__.get("peft_config", {}), adapter: config}
    adopt(holder)


class ParallelLinear(NeuronLoraLayer, peft.Linear):
    """On a linear layer that is cut by columns or by rows.

    :meth:`get_delta_weight`, :meth:`merge` and :meth:`unmerge` are local: each rank has its own shard of them.

    Args:
        base_layer: the layer.
        adapter_name: the name of its first adapter.
        r: its rank.
        lora_alpha: numerator of its scale.
        lora_dropout: probability.
        fan_in_fan_out: accepted; such layers keep their weights ``[out, in]``.
        is_target_conv_1d_layer: accepted and not used.
        init_lora_weights: how its factors start.
        use_rslora: whether the scale is ``α/√r``.
        use_dora: whether it is DoRA.
        lora_bias: whether B has a bias.
        kwargs: further fields of a configuration.

    Raises:
        ConfigError: a value is impossible.
        TargetError: the layer cannot have such an adapter.
    """

    kinds: frozenset[str] = frozenset()  # membership is by class here, not by the op's kind

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        r: int = 0,
        lora_alpha: int = 1,
        lora_dropout: float = 0.0,
        fan_in_fan_out: bool = False,
        is_target_conv_1d_layer: bool = False,
        init_lora_weights: bool | str = True,
        use_rslora: bool = False,
        use_dora: bool = False,
        lora_bias: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(base_layer, **kwargs)
        self.fan_in_fan_out, self.is_target_conv_1d_layer = fan_in_fan_out, is_target_conv_1d_layer
        self.update_layer(
            adapter_name,
            r,
            lora_alpha,
            lora_dropout,
            init_lora_weights,
            use_rslora,
            use_dora=use_dora,
            lora_bias=lora_bias,
        )


class ParallelEmbedding(NeuronLoraLayer, peft.Embedding):
    """On an embedding that is cut by words or by features; arguments and methods as of :class:`ParallelLinear`.

    Args:
        base_layer: the embedding.
        adapter_name: the name of its first adapter.
        r: its rank.
        lora_alpha: numerator of its scale.
        lora_dropout: accepted; an embedding has no input to drop.
        fan_in_fan_out: accepted and not used.
        init_lora_weights: how its factors start.
        use_rslora: whether the scale is ``α/√r``.
        use_dora: whether it is DoRA.
        lora_bias: must be false.
        kwargs: further fields of a configuration.

    Raises:
        ConfigError: a value is impossible.
        TargetError: the layer cannot have such an adapter.
    """

    kinds: frozenset[str] = frozenset()  # membership is by class here, not by the op's kind

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        r: int = 0,
        lora_alpha: int = 1,
        lora_dropout: float = 0.0,
        fan_in_fan_out: bool = False,
        init_lora_weights: bool | str = True,
        use_rslora: bool = False,
        use_dora: bool = False,
        lora_bias: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(base_layer, **kwargs)
        self.fan_in_fan_out = fan_in_fan_out
        self.update_layer(
            adapter_name,
            r,
            lora_alpha,
            lora_dropout,
            init_lora_weights,
            use_rslora,
            use_dora=use_dora,
            lora_bias=lora_bias,
        )


class GQAQKVColumnParallelLinear(_Updates, NativeQKV):
    """On the query, key and value projections of one attention block.

    Made by itself it takes over all that ``base_layer`` has and stands for it: the adapters are on the layers inside,
    ``q_proj``, ``k_proj`` and ``v_proj``, or ``qkv_proj`` that is the three of them. Each projection has its own A.

    Args:
        base_layer: lorica's ``GQAQKVColumnParallelLinear``.
        adapter_name: the name of its first adapter.
        r: its rank.
        lora_alpha: numerator of its scale.
        lora_dropout: probability.
        fan_in_fan_out: accepted; such layers keep their weights ``[out, in]``.
        is_target_conv_1d_layer: accepted and not used.
        init_lora_weights: how its factors start.
        use_rslora: whether the scale is ``α/√r``.
        use_dora: whether it is DoRA.
        lora_bias: whether B has a bias.
        kwargs: further fields of a configuration.

    Raises:
        ConfigError: a value is impossible.
        TargetError: the layer cannot have such an adapter.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        r: int = 0,
        lora_alpha: int = 1,
        lora_dropout: float = 0.0,
        fan_in_fan_out: bool = False,
        is_target_conv_1d_layer: bool = False,
        init_lora_weights: bool | str = True,
        use_rslora: bool = False,
        use_dora: bool = False,
        lora_bias: bool = False,
        **kwargs: Any,
    ) -> None:
        if not isinstance(base_layer, NativeQKV):
            raise NotImplementedError(f"a {type(base_layer).__name__} is no GQAQKVColumnParallelLinear of lorica's")
        self.__dict__ = base_layer.__dict__  # one layer, two names of it
        self.update_layer(
            adapter_name,
            r,
            lora_alpha,
            lora_dropout,
            init_lora_weights,
            use_rslora,
            use_dora=use_dora,
            lora_bias=lora_bias,
            **kwargs,
        )

    def get_base_layer(self) -> nn.Module:
        """Return this layer: the adapters are on those inside."""
        return self

    def get_delta_weight(self, adapter: str) -> dict[str, Tensor]:
        """Return this rank's deltas ``{"q": …, "k": …, "v": …}``, or ``{"qkv": …}`` where the three are one weight.

        A projection that the adapter does not have is left out.

        Args:
            adapter: its name.

        Raises:
            AdapterError: none of them has it.
        """
        found = {name: layer.get_delta_weight(adapter) for name, layer in self._named() if adapter in layer.specs}
        if not found:
            raise AdapterError(f"there is no adapter {adapter!r} on these projections")
        return found

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the deltas of adapters to this rank's weights, in place: to all three, or on an error to none.

        Args:
            safe_merge: look for NaN and infinity before a weight is touched.
            adapter_names: which adapters; None: the active ones.

        Raises:
            AdapterError: a delta is not finite (``safe_merge``), or B has a bias and a projection has none.
        """
        wanted = self.active_adapters if adapter_names is None else adapter_names
        merging.merge(self, wanted, finite=safe_merge, keep=True)

    def unmerge(self) -> None:
        """Take every merged delta out of this rank's weights again."""
        merging.unmerge(self)

    # ---- what an adapted layer answers, by the first of the projections ----------------------------------------------

    @property
    def merged(self) -> bool:
        """Whether any adapter is merged."""
        return any(layer.merged for _, layer in self._named())

    @property
    def merged_adapters(self) -> list[str]:
        """The adapters that are merged."""
        return list(dict.fromkeys(name for _, layer in self._named() for name in layer.merged_adapters))

    @property
    def active_adapters(self) -> list[str]:
        """The active adapters."""
        return next((layer.active_adapters for _, layer in self._named()), [])

    @property
    def disable_adapters(self) -> bool:
        """Whether the adapters are turned off."""
        return any(layer.disable_adapters for _, layer in self._named())

    def enable_adapters(self, enabled: bool) -> None:
        """Turn the adapters of the model on or off."""
        for _, layer in self._named():
            layer.switch.enabled = enabled

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make the named adapters the active ones; their factors train unless ``inference_mode`` is true."""
        for _, layer in self._named():
            layer.set_adapter(adapter_names, inference_mode)

    @property
    def r(self) -> Mapping[str, int]:
        """The rank of each adapter."""
        return self._each("r")

    @property
    def lora_alpha(self) -> Mapping[str, float]:
        """The α of each adapter."""
        return self._each("lora_alpha")

    @property
    def scaling(self) -> Mapping[str, float]:
        """The scale of each adapter."""
        return self._each("scaling")

    def _each(self, what: str) -> Mapping[str, Any]:
        found: dict[str, Any] = {}
        for _, layer in self._named():
            found = {**getattr(layer, what), **found}
        return MappingProxyType(found)

    def _named(self) -> Iterator[tuple[str, Any]]:
        """Yield the adapted layers inside: ``q``, ``k``, ``v``, or ``qkv``."""
        for name, layer in self._modules.items():
            if isinstance(layer, Core):
                yield name.removesuffix("_proj"), layer

    def _get_name(self) -> str:
        return f"lora.{type(self).__name__}"


def adopt(model: nn.Module) -> None:
    """Make the adapted layers of a cut model instances of the classes above; they stay the same objects."""
    for module in [*model.modules()]:
        if isinstance(module, Core):
            names = set(qualified_names(type(module.get_base_layer())))
            if names & (_LINEARS | _EMBEDDINGS):
                _become(module, ParallelLinear if names & _LINEARS else ParallelEmbedding)
        elif isinstance(module, NativeQKV) and any(isinstance(inner, Core) for inner in module.children()):
            _become(module, GQAQKVColumnParallelLinear)


def _become(module: nn.Module, cls: type) -> None:
    if not issubclass(type(module), cls):
        module.__class__ = cls


__all__ = ["GQAQKVColumnParallelLinear", "NeuronLoraLayer", "ParallelEmbedding", "ParallelLinear", "adopt"]
