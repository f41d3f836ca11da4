"""optimum.neuron.peft.peft_model: an adapted model that lies over ranks.

It is saved whole, as one ``adapter_model.safetensors`` under PEFT's names: there is nothing to consolidate. What
Optimum Neuron saved in shards is read as it is.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from lorica import model as core
from lorica.checkpoint.neuron import ADAPTER_SHARDS, find_shards
from lorica.checkpoint.reading import LoadResult
from lorica.compat import peft
from lorica.compat.optimum_neuron.models.training.checkpointing import consolidate_adapter
from lorica.compat.optimum_neuron.peft.tuners.lora.model import NeuronLoraModel
from lorica.config import TaskType
from lorica.errors import CheckpointError

ADAPTER_MODEL_PARALLEL_SHARDS_DIR_NAME = ADAPTER_SHARDS


class NeuronPeftModel(peft.PeftModel):
    """A base model with adapters, cut over ranks or whole; see :class:`lorica.PeftModel`.

    Args:
        model: the model to adapt, in place.
        peft_config: the configuration of the first adapter, in the names of transformers' model; it is copied.
        adapter_name: its name.
        autocast_adapter_dtype: give 16-bit base weights float32 factors.
        kwargs: ``low_cpu_mem_usage``: make the factors on the meta device, to be filled from a file.

    Raises:
        TargetError: the configuration does not fit the model. The model is then as it was.
    """

    by_task: ClassVar[dict[TaskType, type[peft.PeftModel]]] = {}
    tuner_class: ClassVar[type[core.LoraModel]] = NeuronLoraModel

    def __init__(
        self,
        model: nn.Module,
        peft_config: Any,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, peft_config, adapter_name, autocast_adapter_dtype, **kwargs)

    @classmethod
    def from_pretrained(cls, model: nn.Module, model_id: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        """Put a saved adapter into ``model``, in place; see :meth:`lorica.PeftModel.from_pretrained`.

        Args:
            model: the base model.
            model_id: a directory in PEFT's form or with Optimum Neuron's shards, or a repository of the hub.
            args: as there.
            kwargs: as there, and ``first_copy``: take the first rank's values where those of shards differ.

        Raises:
            CheckpointError: it cannot be read.
        """
        name = args[0] if args else kwargs.get("adapter_name", "default")
        with _whole(model_id, name, first_copy=kwargs.pop("first_copy", False)) as place:
            return super().from_pretrained(model, place, *args, **kwargs)

    def load_adapter(
        self, model_id: str | os.PathLike[str], adapter_name: str, *args: Any, first_copy: bool = False, **kwargs: Any
    ) -> LoadResult:
        """Load a further adapter; see :meth:`lorica.PeftModel.load_adapter`, and :meth:`from_pretrained` for shards.

        Raises:
            CheckpointError: it cannot be read.
        """
        with _whole(model_id, adapter_name, first_copy=first_copy) as place:
            return super().load_adapter(place, adapter_name, *args, **kwargs)


class NeuronPeftModelForCausalLM(NeuronPeftModel, peft.PeftModelForCausalLM):
    """A decoder that generates text."""


NeuronPeftModel.by_task.update(dict.fromkeys(TaskType, NeuronPeftModel))
NeuronPeftModel.by_task[TaskType.CAUSAL_LM] = NeuronPeftModelForCausalLM


@contextmanager
def _whole(model_id: str | os.PathLike[str], adapter: str, *, first_copy: bool) -> Iterator[str | os.PathLike[str]]:
    """Yield where an adapter is in PEFT's form: there already, or in a temporary place made of shards."""
    place = Path(model_id)
    if not any(place.glob(f"adapter_*/{ADAPTER_SHARDS}")) and not (place / ADAPTER_SHARDS).is_dir():
        yield model_id
        return
    found = {name: shards for name, shards in find_shards(place).items() if name}
    chosen = adapter if adapter in found else next(iter(found))
    if chosen != adapter and len(found) > 1:
        raise CheckpointError(f"{place}: has the adapters {[*found]}; name one of them, or give its folder")
    with tempfile.TemporaryDirectory(prefix="lorica-") as folder:
        consolidate_adapter(found[chosen], chosen, folder, first_copy=first_copy)
        yield folder


__all__ = ["ADAPTER_MODEL_PARALLEL_SHARDS_DIR_NAME", "NeuronPeftModel", "NeuronPeftModelForCausalLM"]
