"""optimum.neuron.models.training.transformations_utils: how a model's weights become those of its fused layers.

What the specifications mean is in :mod:`lorica.layout.neuron`; here are their classes. They take base weights and the
factors of adapters alike, and both ways are exact: nothing is averaged. Differences from Optimum Neuron:

- A's of projections that share one A in a fused layer have to be equal (an average would be another adapter); lorica's
  own layers keep an A for each and need none of this.
- A configuration's patterns of ranks and alphas are translated along with its targets.
- ``kv_order="neighbours"`` puts the copies of a key/value head on neighbouring ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor, nn
from typing_extensions import Self

from lorica.compat.optimum_neuron.models.training.fused_layers import (
    FusedLinearsSpec,
    GQAQKVColumnParallelLinearSpec,
    ModelWeightTransformationSpec,
)
from lorica.errors import LayoutError
from lorica.layout.neuron import key_of

_SPECS: dict[str, type[Any]] = {cls.__name__: cls for cls in (FusedLinearsSpec, GQAQKVColumnParallelLinearSpec)}


@dataclass
class ModelWeightTransformationSpecs:
    """The specifications of one module.

    Args:
        module_fully_qualified_name: of the module.
        specs: one or several.
    """

    module_fully_qualified_name: str | None = None
    specs: ModelWeightTransformationSpec | list[ModelWeightTransformationSpec] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not isinstance(self.specs, list):
            self.specs = [self.specs]

    def __iter__(self) -> Iterator[ModelWeightTransformationSpec]:
        return iter(self._list)

    @property
    def _list(self) -> list[ModelWeightTransformationSpec]:
        assert isinstance(self.specs, list)
        return self.specs

    @property
    def _module(self) -> str:
        if self.module_fully_qualified_name is None:
            raise ValueError("`module_fully_qualified_name` must be set: it is what the specifications are about")
        return self.module_fully_qualified_name

    def add_spec(self, spec: ModelWeightTransformationSpec) -> None:
        """Add a specification.

        Raises:
            TypeError: it is none.
        """
        if not isinstance(spec, ModelWeightTransformationSpec):
            raise TypeError(f"spec must be of type ModelWeightTransformationSpec, but got {type(spec)}")
        self._list.append(spec)

    def is_transformation_spec_relevant(
        self, spec: ModelWeightTransformationSpec, parameters_for_current_stage: set[str]
    ) -> bool:
        """Return whether a specification is about any of the named parameters."""
        names = {key_of(name) for name in spec.get_relevant_parameter_names(self._module)}
        return any(key_of(name) in names for name in parameters_for_current_stage)

    def to_metadata(self, parameters_for_current_stage: set[str] | None = None) -> dict[str, Any]:
        """Return the specifications as plain JSON values, as they stand beside shards.

        Args:
            parameters_for_current_stage: leave out those that are about none of these; None: take all.

        Raises:
            ValueError: the module's name is not set.
        """
        module, serialised = self._module, []
        for spec in self:
            stage = parameters_for_current_stage
            if stage is None or self.is_transformation_spec_relevant(spec, stage):
                fields: Any = spec
                values = asdict(fields) | {"peft_type": spec.peft_type}
                if values.get("kv_order") == "strided":
                    del values["kv_order"]  # so that Optimum Neuron reads it
                serialised.append([type(spec).__name__, values])
        return {"module_fully_qualified_name": module, "specs": serialised}

    @classmethod
    def from_metadata(cls, specs_metadata: Mapping[str, Any]) -> Self:
        """Return what :meth:`to_metadata` described. Two names are known; nothing is looked up by a name from a file.

        Raises:
            LayoutError: the values describe none.
        """
        try:
            found = cls(module_fully_qualified_name=str(specs_metadata["module_fully_qualified_name"]))
            for name, fields in specs_metadata["specs"]:
                if name not in _SPECS:
                    raise LayoutError(f"{name!r} is not a known specification; known are {sorted(_SPECS)}")
                values = dict(fields)
                peft_type = values.pop("peft_type", None)
                spec: ModelWeightTransformationSpec = _SPECS[name](**values)
                spec.peft_type = peft_type
                found.add_spec(spec)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, LayoutError):
                raise
            raise LayoutError(f"not the specifications of a module: {error!r}") from error
        return found

    def adapt_state_dict(
        self,
        named_parameters: Mapping[str, nn.Parameter],
        orig_state_dict: MutableMapping[str, Tensor],
        upstanding_sharded_params: MutableMapping[str, Tensor],
        parameters_for_current_stage: set[str],
        inplace: bool = False,
        *,
        tp_rank: int | None = None,
    ) -> MutableMapping[str, Tensor]:
        """Return a state with the module's whole tensors replaced by what a rank has of the fused ones.

        Args:
            named_parameters: accepted; the specifications say all that is needed.
            orig_state_dict: whole tensors, named as in files.
            upstanding_sharded_params: keeps those whose companions have not come yet, for the next call.
            parameters_for_current_stage: names of this pipeline stage's parameters; those of others are left alone.
            inplace: change ``orig_state_dict`` rather than a copy.
            tp_rank: which rank; None: this one.

        Raises:
            LayoutError: a tensor does not fit a specification.
        """
        state = orig_state_dict
        for spec in self:
            if self.is_transformation_spec_relevant(spec, parameters_for_current_stage):
                state = spec.adapt_state_dict(
                    self._module, named_parameters, state, upstanding_sharded_params, inplace, tp_rank=tp_rank
                )
        return state

    def to_original_weights(
        self,
        sharded_state_dicts: Mapping[str, Sequence[Tensor]],
        parameters_metadata: Mapping[str, Mapping[str, Any]],
    ) -> tuple[dict[str, Tensor], list[str]]:
        """Return the module's whole tensors, and the names of those they were made of; see the specification's."""
        weights: dict[str, Tensor] = {}
        removed: list[str] = []
        for spec in self:
            found, names = spec.to_original_weights(self._module, sharded_state_dicts, parameters_metadata)
            weights |= found
            removed += names
        return weights, removed


__all__ = [
    "FusedLinearsSpec",
    "GQAQKVColumnParallelLinearSpec",
    "ModelWeightTransformationSpec",
    "ModelWeightTransformationSpecs",
]
