"""What LoRA, its canonical form and DoRA share: their fields become one ``LoraConfig``, which lorica carries out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch.distributed as dist
from torch import nn

from lorica.adapt.inject import inject
from lorica.compat.megatron_bridge._chunks import as_one, chunks_of
from lorica.compat.megatron_bridge._experts import agreed, expert_fields
from lorica.compat.megatron_bridge.base import PEFT
from lorica.compat.megatron_bridge.module_matcher import ModuleMatcher, is_linear
from lorica.config import LoraConfig
from lorica.engines.megatron.fused import tell_alone
from lorica.engines.registry import prepare
from lorica.engines.stages import axis_of_stages
from lorica.errors import AdapterError, ConfigError, TargetError, suggest
from lorica.init.random import METHODS, named_after
from lorica.layers import LoraLayer, Switch
from lorica.model import PeftModel
from lorica.ops import part_names
from lorica.targets import make_plan
from lorica.targets.explain import endings
from lorica.targets.match import idle_entries, meaning, shortest_names
from lorica.targets.walk import bare, base_modules

#: What the adapter is called in files and in the model.
ADAPTER = "default"
T = TypeVar("T")
_WRAPPER = "lorica_peft_model"


@dataclass
class LowRank(PEFT, ModuleMatcher):
    """A method that puts factors on linear layers.

    Attributes:
        dim: the rank.
        alpha: the numerator of the scale ``alpha / dim``.
        dropout: probability.
        dropout_position: ``"pre"`` on the way into A, ``"post"`` after B, before the scale.
        lora_A_init_method: how A starts: one of :data:`lorica.init.random.METHODS`.
        lora_B_init_method: how B starts.
    """

    _switch: Switch = field(default_factory=lambda: Switch(active=(ADAPTER,)), init=False, repr=False, compare=False)
    dim: int = 32
    alpha: int = 32
    dropout: float = 0.0
    dropout_position: Literal["pre", "post"] = "pre"
    lora_A_init_method: str = "xavier"
    lora_B_init_method: str = "zero"

    def lora_fields(self) -> dict[str, Any]:
        """Return the fields of ``LoraConfig`` that the method's own fields mean, whatever the model."""
        return {
            "r": self.dim,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "dropout_position": self.dropout_position,
            "init_lora_weights": init_of(self.lora_A_init_method, self.lora_B_init_method),
        }

    def named(self, modules: Mapping[str, nn.Module]) -> set[str]:
        """Return the names that the configuration has of what is adapted.

        Args:
            modules: of the model, by their full names.
        """
        return set(self.entries() or ())

    def lora_config(self, model: nn.Module | list[Any]) -> LoraConfig:
        """Return the configuration that is carried out on a model.

        Args:
            model: a model, or the list of a pipeline stage's chunks; all ranks ask.

        Raises:
            ConfigError: the fields contradict each other.
            TargetError: an entry means no module of the model.
        """
        whole = as_one(chunks_of(model))
        prepare(whole)
        modules = {name: module for name, module in base_modules(whole) if name}
        names, fields = self._names(modules, whole), self.lora_fields()
        meant = meaning(names)
        inside = {name: (name, *part_names(name, bare(module))) for name, module in modules.items()}
        experts = expert_fields({name: modules[name] for name in inside if any(map(meant, inside[name]))}, fields)
        fields |= agreed(_everywhere(experts, whole))
        return LoraConfig(target_modules=names, exclude_modules=list(self.exclude_modules or ()) or None, **fields)

    def adapt(self, chunks: list[Any]) -> None:
        """Put the adapter in, as one plan for all that is meant.

        Raises:
            ConfigError: the fields contradict each other.
            TargetError: an entry means nothing, or a layer cannot be adapted so. The model is as it was.
        """
        made = PeftModel(as_one(chunks), self.lora_config(chunks), ADAPTER, autocast_adapter_dtype=False)
        for chunk in chunks:
            chunk.__dict__[_WRAPPER] = made  # as an attribute it would be a submodule

    def peft_model(self, model: nn.Module | list[Any]) -> PeftModel:
        """Return a model that this was called on as a ``PeftModel``, which saves, loads, merges and switches adapters.

        Args:
            model: the model, or the list of a pipeline stage's chunks.

        Raises:
            AdapterError: nothing was called on it.
        """
        found: PeftModel | None = chunks_of(model)[0].__dict__.get(_WRAPPER)
        if found is None:
            raise AdapterError(f"{type(self).__name__}: the model has no adapter; call this on it first")
        return found

    def transform(self, module: nn.Module, name: str | None = None, prefix: str | None = None) -> nn.Module:
        """Return the module with an adapter, where it is meant and has none.

        Called on the whole model (:meth:`PEFT.__call__`) a method does more: it tells one model's layers apart by their
        place in it, refuses entries that mean nothing, and sees to it that gradients are summed over ranks.

        Args:
            module: any module of the model.
            name: its name in the module that holds it.
            prefix: the full name of that one.

        Raises:
            TargetError: it is meant and cannot be adapted.
        """
        found = None if isinstance(module, LoraLayer) else self.match(module, name, prefix)
        if found is None:
            return module
        holder, full_name = _held(module, found[1])
        tell_alone(module, full_name.rpartition(".")[2])
        inside, meant = {full_name: module}, meaning(self.named({full_name: module}))
        names = {part for part in part_names(full_name, module) if meant(part)} or {full_name}
        fields = self.lora_fields()
        config = LoraConfig(target_modules=names, **fields | expert_fields(inside, fields))
        inject(holder, make_plan(holder, config), config, ADAPTER, self._switch, autocast=False)
        return holder.get_submodule(full_name)

    def _names(self, modules: dict[str, nn.Module], model: nn.Module) -> set[str]:
        if self.entries() is None:
            excluded = meaning(self.exclude_modules)
            chosen = [name for name, module in modules.items() if is_linear(module) and not excluded(name)]
            found = shortest_names(chosen, modules.keys() - set(chosen))
            return set().union(*_everywhere(found, model))
        names = set().union(*_everywhere(self.named(modules), model))
        known = [inner for name, module in modules.items() for inner in (name, *part_names(name, bare(module)))]
        idle = set.intersection(*_everywhere(idle_entries(names, known), model))
        if idle:
            hints = "".join(suggest(name, endings(modules)) for name in sorted(idle))
            raise TargetError(f"{type(self).__name__}: no module of the model is meant by {sorted(idle)}.{hints}")
        return names


def init_of(for_a: str, for_b: str) -> str:
    """Return lorica's name of a start of A and B.

    Args:
        for_a: ``lora_A_init_method``.
        for_b: ``lora_B_init_method``.

    Raises:
        ConfigError: a method is not known, or both are ``"zero"``.
    """
    for name, method in (("lora_A_init_method", for_a), ("lora_B_init_method", for_b)):
        if method not in METHODS:
            raise ConfigError(f"{name}={method!r}: there are {', '.join(METHODS)}.{suggest(str(method), METHODS)}")
    if for_a == for_b == "zero":
        raise ConfigError(
            "lora_A_init_method='zero' with lora_B_init_method='zero': all gradients would be zero, and the adapter "
            "would never learn; let one of them be random"
        )
    return named_after(for_a, for_b)


def _everywhere(found: T, model: nn.Module) -> list[T]:
    """Return what was found on each rank, where these hold different layers of a model."""
    if axis_of_stages(model) is None:
        return [found]
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, found)
    return everywhere


def _held(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Return a model in which nothing but a module is, under its full name."""
    model = holder = nn.Module()
    *path, last = name.split(".")
    for word in path:
        holder.add_module(word, nn.Module())
        holder = holder.get_submodule(word)
    holder.add_module(last, module)
    return model, name
