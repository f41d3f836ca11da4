"""What state an adapted model is in: per layer and as a whole, in PEFT's terms."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from lorica.adapt.inject import AdapterModule, adapter_modules, adapters_of, base_of, tuner_of
from lorica.errors import AdapterError
from lorica.layers import ModulesToSaveWrapper, TrainableTokensWrapper


@dataclass(frozen=True)
class TunerLayerStatus:
    """The state of one adapted layer, or of one module that is saved whole."""

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | Literal["irregular"]]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None = None


@dataclass(frozen=True)
class TunerModelStatus:
    """The state of an adapted model; ``"irregular"`` where its layers differ."""

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool | Literal["irregular"]
    active_adapters: list[str] | Literal["irregular"]
    merged_adapters: list[str] | Literal["irregular"]
    requires_grad: dict[str, bool | Literal["irregular"]]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None = None


def get_layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """Return the state of every adapted layer and of every module that is saved whole.

    Raises:
        AdapterError: nothing in the model is adapted.
    """
    layers = [_layer_status(name, module) for name, module in adapter_modules(tuner_of(model) or model)]
    if not layers:
        raise AdapterError("No adapter layers found in the model, please ensure that it's a PEFT model or inject one.")
    return layers


def get_model_status(model: nn.Module) -> TunerModelStatus:
    """Return the state of the model as a whole.

    Raises:
        AdapterError: nothing in the model is adapted.
    """
    layers = get_layer_status(model)
    tuner, base = tuner_of(model), base_of(model)
    configs: Mapping[str, Any] = getattr(model, "peft_config", None) or {}
    trainable, total = count_parameters(model)
    adapted = [status for status in layers if status.module_type != "ModulesToSaveWrapper"]
    available = sorted({name for status in layers for name in status.available_adapters})
    return TunerModelStatus(
        base_model_type="other" if tuner is None and not hasattr(base, "config") else type(base).__name__,
        adapter_model_type="None" if tuner is None else type(tuner).__name__,
        peft_types={name: str(getattr(config.peft_type, "value", "LORA")) for name, config in configs.items()},
        trainable_params=trainable,
        total_params=total,
        num_adapter_layers=len(layers),
        enabled=_common(status.enabled for status in layers),
        active_adapters=_common(status.active_adapters for status in layers),
        # An adapter need not have factors in every layer; only layers that could have merged it count.
        merged_adapters=_merged(adapted),
        requires_grad={
            name: _common(status.requires_grad[name] for status in layers if name in status.requires_grad)
            for name in available
        },
        available_adapters=available,
        devices={
            name: sorted({device for status in layers for device in status.devices.get(name, [])}) for name in available
        },
    )


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Return how many parameters train, and how many there are."""
    trainable = total = 0
    for parameter in _parameters_of(model):
        # Four-bit weights are packed two to a byte; count what they stand for.
        count = parameter.numel() * (2 if type(parameter).__name__ == "Params4bit" else 1)
        total += count
        trainable += count if parameter.requires_grad else 0
    return trainable, total


def _parameters_of(model: nn.Module) -> Iterable[nn.Parameter]:
    """Return what ``model.parameters()`` yields, in another order: their names, which take most of the time, are not
    made."""
    seen: set[int] = set()
    found: dict[int, nn.Parameter] = {}
    stack: list[nn.Module | None] = [model]
    while stack:
        module = stack.pop()
        if module is None or id(module) in seen:
            continue
        seen.add(id(module))
        for parameter in module._parameters.values():
            if parameter is not None:
                found[id(parameter)] = parameter
        if module._modules:
            stack += module._modules.values()
    return found.values()


def _layer_status(name: str, module: AdapterModule) -> TunerLayerStatus:
    own = {adapter: _parameters(module, adapter) for adapter in adapters_of(module)}
    merges = module.token_adapter if isinstance(module, TrainableTokensWrapper) else module
    return TunerLayerStatus(
        name=name if merges is module else f"{name}.token_adapter",
        module_type=merges._get_name(),
        enabled=module.switch.enabled,
        active_adapters=[*module.switch.active],
        merged_adapters=list(merges.merged_adapters) if not isinstance(merges, ModulesToSaveWrapper) else [],
        requires_grad={a: _common(p.requires_grad for p in parameters) for a, parameters in own.items() if parameters},
        available_adapters=sorted(own),
        devices={a: sorted({p.device.type for p in parameters}) for a, parameters in own.items()},
    )


def _parameters(module: AdapterModule, adapter: str) -> list[nn.Parameter]:
    if isinstance(module, ModulesToSaveWrapper):
        return list(module.modules_to_save[adapter].parameters())
    if isinstance(module, TrainableTokensWrapper):
        return [module.token_adapter.trainable_tokens_delta[adapter]]
    source = module.tied.get(adapter, module)
    return [tensor for tensor in source.factors(adapter).tensors() if isinstance(tensor, nn.Parameter)]


def _common(values: Iterable[Any]) -> Any:
    found: list[Any] = []
    for value in values:
        if value not in found:
            found.append(value)
    return found[0] if len(found) == 1 else "irregular"


def _merged(layers: list[TunerLayerStatus]) -> list[str] | Literal["irregular"]:
    merged = sorted({name for status in layers for name in status.merged_adapters})
    for name in merged:
        if any(name in status.available_adapters and name not in status.merged_adapters for status in layers):
            return "irregular"
    return merged
