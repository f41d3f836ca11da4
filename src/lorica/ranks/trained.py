"""What trains of an adapted model, and where it lies among the ranks."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from lorica.adapt.inject import base_of
from lorica.checkpoint.names import Entry, adapter_entries
from lorica.engines.kinds import is_distributed
from lorica.engines.registry import reduced_by_engines
from lorica.engines.rest import gradient_of, storage_axes
from lorica.engines.site import Axis, Site
from lorica.errors import AdapterError
from lorica.layout import Roles


@dataclass(frozen=True)
class Trained:
    """One parameter that trains.

    Attributes:
        name: its name in a file.
        parameter: the live parameter.
        roles: the role of each of its dimensions.
        site: where it lies.
    """

    name: str
    parameter: nn.Parameter
    roles: Roles
    site: Site

    @property
    def stored_over(self) -> dict[str, Axis]:
        """The axes over which fully-sharded parallelism shards, gathers and reduces it by itself."""
        if not is_distributed(self.parameter):
            return {}
        mesh = self.parameter.device_mesh
        found = [Axis.of(mesh, dim) for dim in range(mesh.ndim)]
        computed = set(self.site.layout.sharded(self.roles))
        return {axis.name: axis for axis in found if axis.name not in computed}

    @property
    def sharded_over(self) -> dict[str, Axis]:
        """The axes whose ranks hold different elements of it."""
        cut = {
            name: self.site.axes[name] for name in (*self.site.layout.sharded(self.roles), *self.site.own_factors_over)
        }
        cut |= {axis.name: axis for _, axis in storage_axes(self.parameter)}
        return {name: axis for name, axis in cut.items() if axis.size > 1}

    @property
    def reduced_elsewhere(self) -> set[str]:
        """The axes over which the engine's own training loop reduces its gradient."""
        return reduced_by_engines(self.parameter)

    def local_gradient(self) -> Tensor | None:
        """What this rank holds of the gradient, sharing its memory."""
        gradient = gradient_of(self.parameter)
        return gradient.to_local() if is_distributed(gradient) else gradient


def trained(model: nn.Module) -> list[Trained]:
    """Return the parameters of all adapters that train and that lie over ranks, in an order that all ranks share."""
    configs = getattr(base_of(model), "peft_config", None)
    if configs is None:
        raise AdapterError("the model has no adapter: call get_peft_model first")
    found: dict[int, tuple[str, Entry]] = {}
    for adapter, config in configs.items():
        for name, entry in adapter_entries(model, adapter, config).items():
            if not entry.tied and isinstance(entry.tensor, nn.Parameter) and entry.tensor.requires_grad:
                found.setdefault(id(entry.tensor), (f"{adapter}/{name}", entry))
    return [
        Trained(name, entry.tensor, entry.roles, entry.site)  # type: ignore[arg-type]
        for name, entry in sorted(found.values(), key=lambda item: item[0])
        if entry.site is not None
    ]
