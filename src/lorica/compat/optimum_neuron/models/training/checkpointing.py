"""optimum.neuron.models.training.checkpointing: shards made one file.

Differences from Optimum Neuron: the adapter's configuration is written too, with patterns of ranks and alphas as they
were really trained; adapters on attention only are consolidated; adapters may have any name; ranks that differ in what
they should have alike are an error unless ``first_copy`` is true; nothing is unpickled but tensors.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from torch import Tensor

from lorica.checkpoint.names import WEIGHTS_NAME
from lorica.checkpoint.neuron import find_shards, read_config, read_shards
from lorica.errors import CheckpointError
from lorica.files.atomic import at_once, write_json, write_tensors


def consolidate_model_parallel_checkpoints(
    checkpoint_dir: str | os.PathLike[str], adapter_name: str | None = None, *, first_copy: bool = False
) -> dict[str, Tensor]:
    """Return the whole tensors of a folder of shards, under the names of PEFT's and transformers' files.

    Args:
        checkpoint_dir: the folder of shards.
        adapter_name: whose they are; None: a base model's.
        first_copy: take what the first rank has where ranks differ in what they should have alike.

    Raises:
        CheckpointError: a file is missing or not what it should be, or ranks differ.
    """
    return read_shards(checkpoint_dir, adapter_name, first_copy=first_copy)


def consolidate_model_parallel_checkpoints_to_unified_checkpoint(
    checkpoint_dir: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    save_format: Literal["safetensors"] = "safetensors",
    *,
    first_copy: bool = False,
) -> None:
    """Write what a run saved as one checkpoint in PEFT's (and transformers') form.

    The base model and the adapter "default" go into ``output_dir``, other adapters into folders of their names.

    Args:
        checkpoint_dir: what the run saved into, the folder of one adapter, or a folder of shards.
        output_dir: made where it does not exist.
        save_format: safetensors; a pickle could run code.
        first_copy: take what the first rank has where ranks differ in what they should have alike.

    Raises:
        CheckpointError: there are no shards, a file is missing or not what it should be, or ranks differ.
    """
    if save_format != "safetensors":
        raise CheckpointError(f"save_format={save_format!r}: lorica writes safetensors only; a pickle could run code")
    output = Path(output_dir)
    for adapter, shards in find_shards(checkpoint_dir).items():
        if adapter:
            folder = output if adapter == "default" else output / adapter
            consolidate_adapter(shards, adapter, folder, first_copy=first_copy)
        else:
            _write_model(consolidate_model_parallel_checkpoints(shards, first_copy=first_copy), output)


def consolidate_adapter(
    shards: str | os.PathLike[str], adapter: str, output_dir: str | os.PathLike[str], *, first_copy: bool = False
) -> None:
    """Write one adapter in PEFT's form.

    Args:
        shards: its folder of shards.
        adapter: its name.
        output_dir: made where it does not exist.
        first_copy: take what the first rank has where ranks differ in what they should have alike.

    Raises:
        CheckpointError: a file is missing or not what it should be, or ranks differ.
    """
    tensors = consolidate_model_parallel_checkpoints(shards, adapter, first_copy=first_copy)
    config = read_config(shards, tensors, adapter)
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with at_once():
        write_tensors(folder / WEIGHTS_NAME, tensors, {"format": "pt"})
        config.save_pretrained(folder)


def _write_model(tensors: dict[str, Tensor], folder: Path) -> None:
    """Write a base model's tensors, in several files where they are large, as transformers does."""
    from huggingface_hub import split_torch_state_dict_into_shards

    split = split_torch_state_dict_into_shards(tensors)
    folder.mkdir(parents=True, exist_ok=True)
    for name, inside in split.filename_to_tensors.items():
        write_tensors(folder / name, {tensor: tensors[tensor] for tensor in inside}, {"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)


__all__ = [
    "consolidate_adapter",
    "consolidate_model_parallel_checkpoints",
    "consolidate_model_parallel_checkpoints_to_unified_checkpoint",
]
