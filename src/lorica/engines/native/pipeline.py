"""Stages of a model on the ranks of a mesh dimension ``"pp"``, run by ``torch.distributed.pipelining``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from lorica.engines.native.blocks import decoder_of
from lorica.engines.native.collectives import shares
from lorica.engines.site import Axis
from lorica.errors import LayoutError

if TYPE_CHECKING:
    from torch.distributed.pipelining import PipelineStage
    from torch.distributed.pipelining.schedules import PipelineScheduleSingle

#: Name → torch's class.
SCHEDULES = {"gpipe": "ScheduleGPipe", "1f1b": "Schedule1F1B"}
Loss = Callable[[Tensor, Tensor], Tensor]


class Elsewhere(nn.Module):
    """Stands for a module that another stage has: hands on what it gets."""

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the first argument."""
        return x


class Pipeline(NamedTuple):
    """A stage and the schedule that drives it; every rank calls ``schedule.step`` alike.

    The first stage is given the input ids, the last one ``target`` and, if wanted, ``losses``; each may be given
    keyword arguments of the model, such as ``attention_mask``, which are divided into microbatches.
    """

    stage: PipelineStage
    schedule: PipelineScheduleSingle


def split_stages(model: Any, mesh: DeviceMesh) -> nn.Module:
    """Keep of a Llama-like transformers model what this rank's stage has.

    The first stage keeps the embedding, the last the final norm and the head, each a run of decoder layers, as equal in
    number as can be. What is not kept is replaced, so the names of what is are those of the whole model. A head whose
    frozen weight is the embedding's keeps its own copy of it.

    Cut the model over ``"tp"`` first (:func:`lorica.parallel.parallelize` with the same mesh), and adapt it after this.
    The model's own forward is of no use afterwards on more than one stage; :func:`stage` makes what is.

    Args:
        model: the same on every rank.
        mesh: a device mesh with a dimension ``"pp"``.

    Returns:
        The model. Its ``lorica_mesh`` has the mesh's axes.

    Raises:
        LayoutError: there is no such dimension, there are fewer layers than stages, or a weight that trains lies on
            both ends. Nothing was changed.
    """
    axes, decoder, embedding, head = _checked(model, mesh)
    axis, layers = axes["pp"], decoder.layers
    model.lorica_mesh = {**getattr(model, "lorica_mesh", {}), **axes}
    counts = shares(len(layers), axis.size)
    start = sum(counts[: axis.rank])
    stop = start + counts[axis.rank]
    for index in range(len(layers)):
        if not start <= index < stop:
            layers[index] = Elsewhere()
    region = getattr(decoder, "lorica_region", None)
    if axis.rank > 0:
        _replace(model, embedding)
        if region is not None:
            region.begin(layers[start])
    if axis.rank < axis.size - 1:
        decoder.norm = Elsewhere()
        if head is not None:
            _replace(model, head)
        if region is not None:
            region.end(decoder.norm)
    return model  # type: ignore[no-any-return]


def _checked(model: Any, mesh: DeviceMesh) -> tuple[dict[str, Axis], Any, nn.Module, nn.Module | None]:
    """Return the mesh's axes, the decoder, the embedding and the head; refuse what cannot be split."""
    names = mesh.mesh_dim_names or ()
    if "pp" not in names:
        raise LayoutError(f"a mesh of {names} has no dimension 'pp'")
    axes = {name: Axis.of(mesh, dim) for dim, name in enumerate(names)}
    _, decoder = decoder_of(model)
    layers: Any = decoder.layers
    if axes["pp"].size > len(layers):
        raise LayoutError(f"{len(layers)} decoder layers do not fill {axes['pp'].size} stages")
    if any(isinstance(module, Elsewhere) for module in model.modules()):
        raise LayoutError("the model is split already")
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and head.weight is embedding.weight
    if axes["pp"].size > 1 and tied and head.weight.requires_grad:
        raise LayoutError(
            "the embedding and the head share a weight that trains and would lie on different stages: freeze it "
            "(requires_grad_(False)) or untie it"
        )
    return axes, decoder, embedding, head


def _replace(model: nn.Module, module: nn.Module) -> None:
    name = next(name for name, found in model.named_modules() if found is module)
    parent, _, short = name.rpartition(".")
    setattr(model.get_submodule(parent), short, Elsewhere())


class _Stage(nn.Module):
    """From ids or hidden states to hidden states or logits."""

    def __init__(self, model: nn.Module, axis: Axis) -> None:
        super().__init__()
        self.model = model
        self._decoder = [decoder_of(model)[1]]  # a list, so that it is not registered a second time
        self.axis = axis

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        """Run this stage on one microbatch."""
        given = "input_ids" if self.axis.rank == 0 else "inputs_embeds"
        if self.axis.rank == self.axis.size - 1:
            logits: Tensor = self.model(**{given: x}, use_cache=False, **kwargs).logits
            return logits
        hidden: Tensor = self._decoder[0](**{given: x}, use_cache=False, **kwargs).last_hidden_state
        return hidden


def stage(
    model: nn.Module,
    axis: Axis,
    *,
    microbatches: int,
    schedule: Literal["gpipe", "1f1b"] = "1f1b",
    loss: Loss | None = None,
) -> Pipeline:
    """Return this rank's stage of a model that :func:`split_stages` split, adapted or not, and its schedule.

    A step adds the gradients of the mean of the microbatches' losses. All batches of one pipeline have one shape.

    Args:
        model: this rank's part.
        axis: the axis of the stages, ``model.lorica_mesh["pp"]``.
        microbatches: into how many parts a batch is divided; at least as many as stages for ``"1f1b"``.
        schedule: GPipe (all forwards, then all backwards), or one forward, one backward in turn.
        loss: from logits and target of a microbatch to a scalar; None: :func:`next_token_loss`.

    Raises:
        LayoutError: the schedule is not known, or has too few microbatches.
    """
    if schedule not in SCHEDULES:
        raise LayoutError(f"schedule={schedule!r} is none of {sorted(SCHEDULES)}")
    if microbatches < (axis.size if schedule == "1f1b" else 1):
        raise LayoutError(f"{microbatches} microbatches are too few for {axis.size} stages with {schedule!r}")
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    from torch.distributed import pipelining  # imported late: it takes as long as torch itself

    made = pipelining.PipelineStage(_Stage(model, axis), axis.rank, axis.size, device, group=axis.group)
    drive: type[PipelineScheduleSingle] = getattr(pipelining, SCHEDULES[schedule])
    return Pipeline(made, drive(made, microbatches, loss_fn=loss or next_token_loss))


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross entropy of each next token; labels of −100 do not count.

    Args:
        logits: ``[batch, tokens, words]``.
        labels: ``[batch, tokens]``, not shifted.
    """
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())


__all__ = ["Pipeline", "next_token_loss", "split_stages", "stage"]
