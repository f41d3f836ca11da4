"""Which parameters train: factors and whole modules of the active adapters, and the biases their configs name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from lorica.adapt.found import AdapterModule, adapted, adapter_modules, parameters_of
from lorica.config import LoraConfig
from lorica.errors import AdapterError
from lorica.layers import LoraLayer, ModulesToSaveWrapper, TrainableTokensWrapper
from lorica.targets.walk import every_module
from lorica.variants import VARIANTS, variant_of


def freeze_base(model: nn.Module) -> None:
    """Freeze every parameter of the base model."""
    for module in every_module(model):
        for parameter in module._parameters.values():
            if parameter is not None and parameter.requires_grad:
                parameter.requires_grad_(False)


def set_requires_grad(model: nn.Module, adapter_names: str | Iterable[str], requires_grad: bool = True) -> None:
    """Let the parameters of the named adapters train, or freeze them.

    Args:
        model: an adapted model.
        adapter_names: one name or several.
        requires_grad: whether they train.
    """
    names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
    let_train(adapted(model), dict.fromkeys(names, requires_grad))


def let_train(modules: Iterable[AdapterModule], wanted: Mapping[str, bool]) -> None:
    """Let the parameters of adapters in some modules train or not.

    Args:
        modules: adapted ones.
        wanted: adapter → whether its parameters train.
    """
    for module in modules:
        if isinstance(module, LoraLayer):
            module.let_train(wanted)
            continue
        for name, trains in wanted.items():
            for parameter in parameters_of(module, name):
                parameter.requires_grad_(trains)


def train_only(
    model: nn.Module,
    modules: Iterable[AdapterModule],
    configs: Mapping[str, LoraConfig],
    active: Iterable[str],
    *,
    frozen: bool,
) -> None:
    """Let the active adapters train (unless ``frozen``) and freeze the other ones.

    Args:
        model: the base model.
        modules: those of it that are adapted.
        configs: of all adapters.
        active: names of the active ones.
        frozen: freeze these too.
    """
    active = tuple(active)
    let_train(modules, {name: name in active and not frozen for name in configs})
    for name in active:
        train_biases(model, configs[name], requires_grad=not frozen)


def train_biases(model: nn.Module, config: LoraConfig, *, requires_grad: bool = True) -> None:
    """Let those biases of the base model train that ``config.bias`` names."""
    for _, parameter in named_biases(model, config.bias):
        parameter.requires_grad_(requires_grad)


def named_biases(model: nn.Module, which: str) -> list[tuple[str, nn.Parameter]]:
    """Return the live names and parameters of the base model's biases that ``which`` means.

    Args:
        which: ``"none"``, ``"all"`` of the model, or ``"lora_only"``: those of adapted layers.
    """
    if which == "none":
        return []
    if which == "lora_only":
        layers = [(name, module) for name, module in adapter_modules(model) if isinstance(module, LoraLayer)]
        found = ((f"{name}.base_layer.bias", layer.base_layer._parameters.get("bias")) for name, layer in layers)
        return [(name, bias) for name, bias in found if bias is not None]
    own = _own_prefixes(model)
    return [
        (name, parameter)
        for name, parameter in model.named_parameters()
        if name.rpartition(".")[2] == "bias" and not name.startswith(own)
    ]


def _own_prefixes(model: nn.Module) -> tuple[str, ...]:
    inside: list[str] = []
    for name, module in adapter_modules(model):
        if isinstance(module, ModulesToSaveWrapper):
            inside.append(f"{name}.")
        elif isinstance(module, TrainableTokensWrapper):
            inside.append(f"{name}.token_adapter.trainable_tokens_delta.")
        else:
            inside += [f"{name}.{child}." for child in module._modules if child != "base_layer"]
    return tuple(inside)


def is_checkpointing(model: nn.Module) -> bool:
    """Return whether activations are recomputed in ``model``, as transformers' models say it of themselves.

    Their own property asks each module for an attribute that most do not have, which takes a tenth of an injection.
    """
    newer = hasattr(type(model), "is_activation_checkpointing")
    name = "is_activation_checkpointing" if newer else "is_gradient_checkpointing"
    asked = getattr(getattr(type(model), name, None), "fget", None)
    if getattr(asked, "__module__", "") != "transformers.modeling_utils":
        return bool(getattr(model, name, False))
    word = "gradient_checkpointing"
    return any(vars(module).get(word, getattr(type(module), word, False)) for module in every_module(model))


#: How the attributes begin in which transformers keeps the handles of its hooks.
_HANDLES = "_require_grads_hook"


def let_inputs_require_grad(model: Any) -> None:
    """Make the output of the input embedding require a gradient.

    Only factors train, and a re-entrant checkpoint passes no gradient to them unless its input requires one.
    """
    if hasattr(model, "enable_input_require_grads"):
        model.enable_input_require_grads()
    elif hasattr(model, "get_input_embeddings"):
        model.get_input_embeddings().register_forward_hook(_require_grad)


def undo_of_inputs(model: nn.Module) -> Callable[[], None]:
    """Return what undoes :func:`let_inputs_require_grad`, called beforehand."""
    if not is_checkpointing(model):
        return lambda: None
    hooks = [(module, dict(module._forward_hooks)) for module in model.modules()]
    own = {name: value for name, value in vars(model).items() if name.startswith(_HANDLES)}

    def undo() -> None:
        for module, before in hooks:
            for key in module._forward_hooks.keys() - before.keys():
                del module._forward_hooks[key]
        for name in [name for name in vars(model) if name.startswith(_HANDLES)]:
            delattr(model, name)
        vars(model).update(own)

    return undo


def _require_grad(module: nn.Module, args: Any, output: Tensor) -> None:
    output.requires_grad_(True)


def check_one_bias(configs: Mapping[str, LoraConfig]) -> None:
    """Refuse a second adapter that trains biases of the base model, which both would share.

    Raises:
        AdapterError: names the rule.
    """
    if sum(config.bias != "none" for config in configs.values()) > 1:
        raise AdapterError(
            "LoraModel supports only 1 adapter with bias. When using multiple adapters, set bias to 'none' for all "
            "adapters."
        )


def check_one_base(configs: Mapping[str, LoraConfig], new: str) -> None:
    """Refuse an adapter that changes the base weights for good beside one that does not (KaSA).

    Raises:
        AdapterError: names the other adapter.
    """
    uses = VARIANTS[variant_of(configs[new])].subtracts
    for name, config in configs.items():
        if VARIANTS[variant_of(config)].subtracts != uses:
            raise AdapterError(
                "KaSA cannot be combined with adapters that don't use KaSA, since KaSA modifies the base weights: the "
                f"new adapter {'uses' if uses else 'does not use'} KaSA but adapter '{name}' "
                f"{'does not' if uses else 'does'}."
            )
