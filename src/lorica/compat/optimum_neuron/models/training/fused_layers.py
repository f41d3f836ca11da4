"""How the weights of one module become those of its fused layer, and back: one class for each kind of fused layer.

What the fields mean is in :mod:`lorica.layout.neuron`; see
:mod:`lorica.compat.optimum_neuron.models.training.transformations_utils` for what differs from Optimum Neuron.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lorica.errors import ConfigError
from lorica.layers import LoraLayer
from lorica.layout import grouped_heads
from lorica.layout.neuron import key_of, spec_candidates
from lorica.layout.specs import PREFIX, Spec

_AXIS = "tp"
_PEFT_TYPES = (None, "lora")


def _ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class ModelWeightTransformationSpec:
    """How the weights of one module become those of its fused layer; the base of two.

    Attributes:
        tp_size: tensor-parallel ranks.
    """

    tp_size: int

    @property
    def peft_type(self) -> str | None:
        """``"lora"`` where the fused layer is adapted; it is told in the JSON form and changes nothing here."""
        return getattr(self, "_peft_type", None)

    @peft_type.setter
    def peft_type(self, value: str | None) -> None:
        if value not in _PEFT_TYPES:
            raise NotImplementedError(f"PEFT type {value} is not supported for {type(self).__name__}")
        self._peft_type = value

    # ---- names -------------------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def fused(self) -> tuple[str, tuple[str, ...]]:
        """Name of the fused layer, and those of the projections in it."""

    def get_relevant_parameter_names(self, module_fully_qualified_name: str) -> set[str]:
        """Return the names of all tensors that the specification is about: fused, apart, and of factors.

        Args:
            module_fully_qualified_name: of the module that has the layers.
        """
        prefix = PREFIX if module_fully_qualified_name.startswith(PREFIX) else ""
        bare = {
            name.removeprefix(PREFIX)
            for spec in self._candidates(module_fully_qualified_name)
            for name in (spec.local, *(part for part, _ in spec.parts), *spec.also)
        }
        return {f"{prefix}{name}" for name in bare}

    def guess_peft_type(self, model: nn.Module, module_fully_qualified_name: str) -> str | None:
        """Return ``"lora"`` if the fused layer of a model is adapted.

        Args:
            model: it.
            module_fully_qualified_name: of the module that has the layers.
        """
        layer = model.get_submodule(f"{module_fully_qualified_name}.{self.fused[0]}")
        return "lora" if any(isinstance(inner, LoraLayer) for inner in layer.modules()) else None

    # ---- configurations ----------------------------------------------------------------------------------------------

    def adapt_peft_config(self, peft_config: Any, inplace: bool = False) -> Any:
        """Return a configuration that names the fused layer instead of the projections in it.

        Args:
            peft_config: names the projections, or some other layers; a word such as ``"all-linear"`` or a regular
                expression stays as it is.
            inplace: change it rather than a copy.

        Raises:
            ConfigError: it names some of the projections only, or gives them several ranks or alphas: in one layer with
                one A they have them together.
        """
        config = _lora_config(peft_config, inplace)
        name, parts = self.fused
        for kind in ("target_modules", "exclude_modules"):
            given = getattr(config, kind)
            if isinstance(given, str) or given is None:
                continue
            missing = [part for part in parts if part not in given]
            if missing and len(missing) < len(parts):
                raise ConfigError(
                    f"If you use {type(self).__name__}, either all linear layers must be in the {kind} of the PEFT "
                    f"config or none at all. The following linear layers are missing: {', '.join(missing)}."
                )
            if not missing:
                setattr(config, kind, {*(other for other in given if other not in parts), name})
        defaults = {"rank_pattern": config.r, "alpha_pattern": config.lora_alpha}
        for kind, default in defaults.items():
            setattr(config, kind, _together(getattr(config, kind) or {}, name, parts, default, kind))
        return config

    def to_original_peft_config(self, peft_config: Any, inplace: bool = False) -> Any:
        """Return a configuration that names the projections instead of the layer they are fused in.

        Args:
            peft_config: names the fused layer, or some other layers.
            inplace: change it rather than a copy.
        """
        config = _lora_config(peft_config, inplace)
        name, parts = self.fused
        for kind in ("target_modules", "exclude_modules"):
            given = getattr(config, kind)
            if not isinstance(given, str) and given is not None and name in given:
                setattr(config, kind, {*(other for other in given if other != name), *parts})
        for kind in ("rank_pattern", "alpha_pattern"):
            values: dict[str, Any] = {}
            for pattern, value in (getattr(config, kind) or {}).items():
                before, dot, last = pattern.rpartition(".")
                values |= {f"{before}{dot}{part}": value for part in parts} if last == name else {pattern: value}
            setattr(config, kind, values)
        return config

    # ---- tensors -----------------------------------------------------------------------------------------------------

    def adapt_state_dict(
        self,
        module_fully_qualified_name: str,
        named_parameters: Mapping[str, nn.Parameter],
        orig_state_dict: MutableMapping[str, Tensor],
        upstanding_sharded_params: MutableMapping[str, Tensor],
        inplace: bool = False,
        *,
        tp_rank: int | None = None,
    ) -> MutableMapping[str, Tensor]:
        """Return a state with this module's whole tensors replaced by what a rank has of the fused ones.

        Args:
            module_fully_qualified_name: of the module that has the layers.
            named_parameters: accepted; the specification says all that is needed.
            orig_state_dict: whole tensors, of base layers or of an adapter, named as in files.
            upstanding_sharded_params: keeps those whose companions have not come yet, for the next call.
            inplace: change ``orig_state_dict`` rather than a copy.
            tp_rank: which rank; None: this one, where tensor-parallel groups are of neighbouring ranks.

        Raises:
            LayoutError: a tensor has another shape than the specification says, or A's (of layers fused along their
                inputs: B's) that are to be one differ.
        """
        del named_parameters
        state = orig_state_dict if inplace else dict(orig_state_dict)
        rank = dist.get_rank() % self.tp_size if tp_rank is None and _ranks() > 1 else tp_rank or 0
        for spec in self._candidates(module_fully_qualified_name):
            names = [*spec.names, *spec.also]
            there = {name: found for name in names if (found := _found(name, state, upstanding_sharded_params))}
            if not there or ".base_layer." in spec.local:  # the same tensor's name once the layer is adapted
                continue
            if len(there) < len(names):
                upstanding_sharded_params.update({key: state.pop(key) for key in there.values() if key in state})
                continue
            taken = {}
            for name, key in there.items():
                taken[name] = state.pop(key) if key in state else upstanding_sharded_params.pop(key)
            prefix = PREFIX if next(iter(there.values())).startswith(PREFIX) else ""
            state[f"{prefix}{spec.local}"] = spec.to_local(taken, {_AXIS: rank})
        return state

    def to_original_weights(
        self,
        module_fully_qualified_name: str,
        sharded_state_dicts: Mapping[str, Sequence[Tensor]],
        parameters_metadata: Mapping[str, Mapping[str, Any]],
    ) -> tuple[dict[str, Tensor], list[str]]:
        """Return this module's whole tensors, and the names of those they were made of.

        Args:
            module_fully_qualified_name: of the module that has the layers.
            sharded_state_dicts: for each tensor what every rank has of it, in their order.
            parameters_metadata: names of parameters, as the adapted model names them; for the names that are returned.

        Raises:
            LayoutError: a rank is missing, a shape is wrong, or ranks disagree on what both have.
        """
        there = {key_of(name): name for name in sharded_state_dicts}
        weights: dict[str, Tensor] = {}
        removed: list[str] = []
        for spec in self._candidates(module_fully_qualified_name):
            if (local := there.get(spec.local)) is None:
                continue
            held = [({_AXIS: rank}, tensor) for rank, tensor in enumerate(sharded_state_dicts[local])]
            prefix = PREFIX if local.startswith(PREFIX) else ""
            whole = spec.to_logical(held)
            weights |= {f"{prefix}{name.removeprefix(PREFIX)}": tensor for name, tensor in whole.items()}
            removed += [name for name in parameters_metadata if key_of(name) == spec.local] or [local]
        return weights, removed

    def _candidates(self, module: str) -> Iterator[Spec]:
        fields: Any = self  # a dataclass
        bare = module.removeprefix(PREFIX.removesuffix(".")).removeprefix(".")
        return spec_candidates(type(self).__name__, asdict(fields), bare, axis=_AXIS)


@dataclass
class FusedLinearsSpec(ModelWeightTransformationSpec):
    """Several linear layers fused into one, which is cut over ranks.

    Args:
        fused_linear_name: name of the fused layer in its module.
        linear_names: names of the layers, in their order.
        bias: whether they have biases.
        fuse_axis: 0 or ``"column"``: their outputs lie one after the other; 1 or ``"row"``: their inputs.
        original_dims: how many outputs (or inputs) each has.
        tp_size: tensor-parallel ranks; by default all of the process group.
    """

    fused_linear_name: str
    linear_names: list[str]
    bias: bool
    fuse_axis: Literal[0, 1, "column", "row"]
    original_dims: list[int]
    tp_size: int = field(default_factory=_ranks)

    def __post_init__(self) -> None:
        self.fuse_axis = {"column": 0, "row": 1}.get(self.fuse_axis, self.fuse_axis)  # type: ignore[assignment,arg-type]

    @property
    def fused(self) -> tuple[str, tuple[str, ...]]:
        """Name of the fused layer, and those of the projections in it."""
        return self.fused_linear_name, tuple(self.linear_names)


@dataclass
class GQAQKVColumnParallelLinearSpec(ModelWeightTransformationSpec):
    """Query, key and value projections in one layer, on more ranks than key/value heads or not.

    The output projection's inputs lie as the query heads do, so its columns (those of its A) are permuted with them.

    Args:
        gqa_qkv_projection_name: name of the layer in its module.
        query_projection_name: and of the projections in it.
        key_projection_name: likewise.
        value_projection_name: likewise.
        output_projection_name: of the output projection beside it.
        num_attention_heads: query heads.
        num_key_value_heads: key/value heads.
        kv_size_multiplier: ranks that hold each key/value head.
        q_output_size_per_partition: rows of the query projection on a rank.
        kv_output_size_per_partition: rows of the key (or value) projection on a rank.
        fuse_qkv: whether the three are one weight.
        bias: whether they have biases.
        tp_size: tensor-parallel ranks; by default all of the process group.
        kv_order: ``"strided"``: neighbouring ranks hold different key/value heads; ``"neighbours"``: copies of one.
            lorica's own field, written only where it is not ``"strided"``.
    """

    gqa_qkv_projection_name: str
    query_projection_name: str
    key_projection_name: str
    value_projection_name: str
    output_projection_name: str
    num_attention_heads: int
    num_key_value_heads: int
    kv_size_multiplier: int
    q_output_size_per_partition: int
    kv_output_size_per_partition: int
    fuse_qkv: bool
    bias: bool
    tp_size: int = field(default_factory=_ranks)
    kv_order: Literal["strided", "neighbours"] = "strided"

    @property
    def fused(self) -> tuple[str, tuple[str, ...]]:
        """Name of the layer, and those of the projections in it."""
        parts = (self.query_projection_name, self.key_projection_name, self.value_projection_name)
        return self.gqa_qkv_projection_name, parts

    @staticmethod
    def compute_query_indices_for_rank(
        tp_size: int,
        tp_rank: int,
        num_attention_heads: int,
        num_key_value_heads: int,
        kv_size_multiplier: int,
        kv_order: Literal["strided", "neighbours"] = "strided",
    ) -> Tensor:
        """Return the query heads of a rank, in its order.

        Args:
            tp_size: tensor-parallel ranks.
            tp_rank: which of them.
            num_attention_heads: query heads.
            num_key_value_heads: key/value heads.
            kv_size_multiplier: ranks that hold each key/value head.
            kv_order: as in the class.

        Raises:
            LayoutError: the heads cannot be divided so.
        """
        order = grouped_heads(
            tp_size, num_attention_heads, num_key_value_heads, multiplier=kv_size_multiplier, order=kv_order
        )
        return torch.tensor(order.query[tp_rank])


# ---- helpers ---------------------------------------------------------------------------------------------------------


def _lora_config(config: Any, inplace: bool) -> Any:
    if str(getattr(config.peft_type, "value", config.peft_type)) != "LORA":
        raise NotImplementedError(f"PEFT type {config.peft_type} is not supported; LORA is")
    return config if inplace else copy.deepcopy(config)


def _together(values: Mapping[str, Any], name: str, parts: Sequence[str], default: Any, kind: str) -> dict[str, Any]:
    """Return a pattern's values with those of the projections as one of the fused layer."""
    found: dict[str, Any] = {}
    for pattern, value in values.items():
        before, dot, last = pattern.rpartition(".")
        if last not in parts:
            found[pattern] = value
            continue
        given = {part: values.get(f"{before}{dot}{part}", default) for part in parts}
        if len(set(given.values())) > 1:
            raise ConfigError(
                f"{kind}: {before}{dot}{name} is one layer with one A, and {given} are several values; give all the "
                "same, or use lorica's own layers, which keep factors for each projection"
            )
        found[f"{before}{dot}{name}"] = value
    return found


def _found(name: str, *states: Mapping[str, Tensor]) -> str | None:
    """Return the name under which one of the states has a tensor: with PEFT's prefix or without."""
    bare = name.removeprefix(PREFIX)
    return next((key for state in states for key in (name, f"{PREFIX}{bare}", bare) if key in state), None)


__all__ = ["FusedLinearsSpec", "GQAQKVColumnParallelLinearSpec", "ModelWeightTransformationSpec"]
