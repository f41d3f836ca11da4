"""Which tensor of a live model has which name in a file. The one place that knows.

In a file the adapter's own name does not occur (``…q_proj.lora_A.weight``), in the live model it does
(``…q_proj.lora_A.default.weight``). Names are built from the modules, never by looking for substrings, so an adapter
may be called "lora" or "a".
"""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lorica.adapt.inject import adapter_modules, base_of
from lorica.adapt.trainable import named_biases
from lorica.checkpoint.forms import FORMS
from lorica.checkpoint.walk import live_modules
from lorica.config import LoraConfig
from lorica.engines import Engines, Site, fsdp
from lorica.engines.names import logical_names
from lorica.engines.registry import lies_elsewhere
from lorica.engines.stages import is_elsewhere
from lorica.errors import AdapterError, suggest
from lorica.layers import LoraLayer, ModulesToSaveWrapper, TrainableTokensLayer, TrainableTokensWrapper
from lorica.layout import Roles
from lorica.ops import op_of

WEIGHTS_NAME = "adapter_model.safetensors"
_WRAPPERS = re.compile(r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


@dataclass(frozen=True)
class Entry:
    """One tensor of an adapter.

    Attributes:
        live: its name in the model's ``state_dict()``.
        tensor: the live tensor; for a tied factor, the value it has through its source.
        tied: whether it is another entry's tensor, written for readers that do not tie.
        owner: the module that holds it as a parameter, where it is a factor.
        device: where it lies or, while it has no values, where its base layer lies; of a factor.
        roles: the role of each of its dimensions (see :mod:`lorica.layout`).
        site: where it lies among the ranks; None on one process.
        window: the part of the logical tensor that is meant, where one live tensor has several names in a file.
    """

    live: str
    tensor: Tensor
    tied: bool = False
    owner: nn.Module | None = None
    device: torch.device | None = None
    roles: Roles = ()
    site: Site | None = None
    window: tuple[slice, ...] | None = None

    @property
    def shape(self) -> torch.Size:
        """The shape that the tensor in a file has."""
        if self.window is None:
            form = FORMS.get(self.roles)
            return self.whole_shape if form is None else form.shape(self.whole_shape)
        return torch.Size(side.stop - side.start for side in self.window)

    @property
    def whole_shape(self) -> torch.Size:
        """The logical shape of the live tensor, of which ``window`` may be a part."""
        return whole_shape(self.tensor, self.roles, self.site)

    def saved(self, tensor: Tensor) -> Tensor:
        """Return a whole live tensor as it is in a file."""
        form = FORMS.get(self.roles)
        return tensor if form is None else form.saved(tensor)


def whole_shape(tensor: Tensor, roles: Roles, site: Site | None) -> torch.Size:
    """Return the logical shape of a tensor of which this rank may have a part."""
    if site is None:
        return tensor.shape
    sizes = site.layout.sizes
    return torch.Size(sizes.get(role, size) for role, size in zip(roles, tensor.shape, strict=True))


def adapter_entries(model: nn.Module, adapter: str, config: LoraConfig) -> dict[str, Entry]:
    """Return every tensor that belongs to an adapter: name in a file → where it lives, at rest."""
    fsdp.reshard(model)  # what a forward gathered is not what is kept: a value written there would be lost
    entries: dict[str, Entry] = {}
    engines: Engines | None = None
    inside: dict[int, str] = {}
    logical = logical_names(model, base_of(model))
    for path, module in adapter_modules(model):
        if isinstance(module, LoraLayer):
            saved_as, base = inside.get(id(module), logical(path)), module._modules["base_layer"]
            # Of layers around one another, those without this adapter leave no trace in the names of a file.
            inside[id(base)] = f"{saved_as}.base_layer" if adapter in module.specs else saved_as
            if adapter in module.specs:
                _enter_factors(entries, path, saved_as, module, adapter)
        elif isinstance(module, TrainableTokensWrapper):
            inside[id(module.original_module)] = logical(path)
            entries.update(_rows(path, logical(path), module.token_adapter, adapter))
        elif adapter in module.modules_to_save:
            engines = engines or Engines(base_of(model))
            prefix = f"{path}.modules_to_save.{adapter}"
            copied = module.modules_to_save[adapter]
            state = copied.state_dict(keep_vars=True)
            for name, tensor in ((name, value) for name, value in state.items() if value is not None):
                entries[f"{logical(path)}.{name}"] = _whole(f"{prefix}.{name}", tensor, copied, name, engines)
    for name, bias in named_biases(model, config.bias):
        engines = engines or Engines(base_of(model))
        entries[logical(name)] = _whole(name, bias, model, name, engines)
    if _WRAPPERS.search("\n".join(entries)) is None:
        return entries
    return {_WRAPPERS.sub("", name): entry for name, entry in entries.items()}


def _whole(live: str, tensor: Tensor, inside: nn.Module, name: str, engines: Engines) -> Entry:
    """Return the entry of a tensor that is not a factor: ``inside``'s ``name``, a parameter or a buffer."""
    owner_name, _, parameter = name.rpartition(".")
    owner = inside.get_submodule(owner_name)
    op = op_of(owner)
    roles = tuple(f"dim{dim}" for dim in range(tensor.dim()))
    if op is not None and parameter in (op.weight_name, op.bias_name):
        roles = op.roles_weight if parameter == op.weight_name else op.roles_bias
    if getattr(owner, parameter, None) is not tensor:  # extra state, which is no tensor of the module
        return Entry(live, tensor)
    return Entry(live, tensor, roles=roles, site=engines.parameter_site(owner_name, owner, parameter, roles))


def _enter_factors(entries: dict[str, Entry], path: str, saved_as: str, layer: LoraLayer, adapter: str) -> None:
    """Enter an adapter's factors in one layer; runs for every layer of a model, so it asks for everything once."""
    spec, op, site, base = layer.specs[adapter], layer.op, layer.site, layer._modules["base_layer"]
    tied = layer.factors(adapter).tensors() if adapter in layer.tied else None
    device = None
    names = layer.factor_names(adapter).items()
    for index, ((name, live), role) in enumerate(zip(names, layer.factor_roles(adapter), strict=True)):
        owner, tensor = _held(layer, live) if tied is None else (None, tied[index])
        if device is None:
            device = _device_of(layer) if tensor.is_meta else tensor.device
        shape = whole_shape(tensor, role, site)
        for key, window in op.windows(saved_as, name, spec, base, shape, role):
            entries[key] = Entry(f"{path}.{live}", tensor, tied is not None, owner, device, role, site, window)


def _device_of(layer: LoraLayer) -> torch.device:
    weight = layer._modules["base_layer"]._parameters.get(layer.op.weight_name)  # type: ignore[union-attr]
    return weight.device if type(weight) is nn.Parameter else layer.stored.device


def _held(module: nn.Module, name: str) -> tuple[nn.Module, Tensor]:
    """Return the module that holds ``module``'s tensor of that name, and the tensor, without asking for attributes."""
    parts, leaf = _steps(name)
    for part in parts:
        module = module._modules[part]  # type: ignore[assignment]
    held = module._parameters.get(leaf)
    return module, module._buffers[leaf] if held is None else held  # type: ignore[return-value]


@functools.lru_cache(maxsize=1024)
def _steps(name: str) -> tuple[list[str], str]:
    *parts, leaf = name.split(".")
    return parts, leaf


def _rows(path: str, saved_as: str, layer: TrainableTokensLayer, adapter: str) -> dict[str, Entry]:
    if adapter not in layer.token_indices or layer.tied_adapter is not None:
        return {}
    name, rows = "token_adapter.trainable_tokens_delta", layer.trainable_tokens_delta
    device = layer.bare._parameters[layer.op.weight_name].device  # type: ignore[union-attr]
    live = f"{path}.{name}.{adapter}"
    entry = Entry(live, rows[adapter], owner=rows, device=device, roles=layer.roles, site=layer.site)
    return {f"{saved_as}.{name}": entry}


def embedding_entries(model: nn.Module, *, adapted_only: bool = False) -> dict[str, Entry]:
    """Return the weights of the base model's input and output embeddings, under the names PEFT saves them by.

    Args:
        adapted_only: only those whose layer is adapted.
    """
    base = base_of(model)
    ends = {id(getattr(base, get, lambda: None)()) for get in ("get_input_embeddings", "get_output_embeddings")}
    ends.discard(id(None))
    entries = {}
    engines: Engines | None = None
    for path, module in live_modules(model):
        if not ends:
            break
        if id(module) not in ends or isinstance(module, ModulesToSaveWrapper):
            continue
        ends.remove(id(module))
        if isinstance(module, TrainableTokensWrapper):
            path, module = f"{path}.token_adapter.base_layer", module.original_module
        if isinstance(module, LoraLayer):
            path = f"{path}.base_layer"
        elif adapted_only or ".modules_to_save." in path or path.endswith(".original_module"):
            continue
        layer: Any = module.base_layer if isinstance(module, LoraLayer) else module
        if getattr(layer, "weight", None) is None:
            continue  # on another stage of a pipeline
        engines = engines or Engines(base)
        entry = _whole(f"{path}.weight", layer.weight, layer, "weight", engines)
        entries[_WRAPPERS.sub("", f"{path}.weight")] = entry
    return entries


def of_other_stages(model: nn.Module, names: Iterable[str]) -> set[str]:
    """Return those names in a file that belong to modules which another stage of a pipeline has."""
    if not dist.is_available() or not dist.is_initialized():
        return set()
    places = tuple(f"{path}." for path, module in live_modules(model) if is_elsewhere(module))
    found = {name for name in names if name.startswith(places)} if places else set()
    base = base_of(model)
    return found | {name for name in names if lies_elsewhere(base, name.removeprefix("base_model.model."))}


def config_of_adapter(model: nn.Module, adapter: str) -> LoraConfig:
    """Return an adapter's configuration.

    Raises:
        AdapterError: the model has no such adapter.
    """
    configs: Mapping[str, LoraConfig] = getattr(model, "peft_config", None) or {}
    if adapter not in configs:
        raise AdapterError(f"Adapter {adapter} not found in {list(configs)}.{suggest(adapter, configs)}")
    return configs[adapter]


def saved_entries(model: nn.Module, adapter: str, save_embedding_layers: bool | str = "auto") -> dict[str, Entry]:
    """Return everything that the file of an adapter holds: name in the file → where it lives.

    Args:
        model: an adapted model.
        adapter: which adapter.
        save_embedding_layers: add the embedding and output weights of the base model. ``"auto"``: where they are
            targets or the vocabulary was resized.

    Raises:
        AdapterError: there is no such adapter.
    """
    config = config_of_adapter(model, adapter)
    entries = adapter_entries(model, adapter, config)
    targeted = config.trainable_token_indices is None and _embeddings_targeted(model, adapter, entries)
    reason = "embedding layers found in `target_modules`" if targeted else "the vocabulary was resized"
    if save_embedding_layers == "auto":
        save_embedding_layers = targeted or _resized(model, config)
        if save_embedding_layers:
            warnings.warn(f"Setting `save_embedding_layers` to `True` as {reason}.", stacklevel=3)
    if save_embedding_layers:
        entries.update(embedding_entries(model, adapted_only=targeted))
    return entries


def _embeddings_targeted(model: nn.Module, adapter: str, entries: Iterable[str]) -> bool:
    ends, names = ("embed_tokens", "lm_head"), "\n".join(entries)
    return any(end in names for end in ends) and any(
        isinstance(module, LoraLayer) and adapter in module.specs and module.target_name.rpartition(".")[2] in ends
        for _, module in adapter_modules(model)
    )


def _resized(model: nn.Module, config: LoraConfig) -> bool:
    base_config: Any = getattr(base_of(model), "config", None)
    size = getattr(base_config, "vocab_size", None)
    path = config.base_model_name_or_path
    if size is None or not path or not hasattr(type(base_config), "from_pretrained"):
        return False
    try:
        original = type(base_config).from_pretrained(path, local_files_only=True)
    except (OSError, ValueError):
        return False  # the original is not at hand; PEFT assumes the same
    return bool(original.vocab_size != size)
