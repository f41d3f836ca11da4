"""Which adapters of a model are on: one object, shared by all its layers."""

from __future__ import annotations


class Switch:
    """The active adapters of one model. Every layer of the model holds the same object, so that switching adapters
    does not visit the layers.

    Attributes:
        active: names of the adapters that take part in a forward, in their order.
        enabled: whether adapters take part at all.
        pending: whether a backward pass gave partial gradients that were not summed over ranks since.
        agreed: whether the ranks have compared their adapters since the last change.
    """

    def __init__(self, active: tuple[str, ...] = ()) -> None:
        self.active = active
        self.enabled = True
        self.pending = False
        self.agreed = False

    def gradients_changed(self, gradient: object) -> None:
        """Note that a backward pass went through a layer that lies over several ranks (a hook on its output)."""
        self.pending = True
