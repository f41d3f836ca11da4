"""Writing adapters: the files PEFT reads, each in one step, the configuration last."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor, nn

from lorica.adapt.inject import base_of, switch_of
from lorica.checkpoint import card
from lorica.checkpoint.names import WEIGHTS_NAME, saved_entries
from lorica.checkpoint.pieces import collect, here, lie_over_ranks, pieces
from lorica.config import LoraConfig
from lorica.engines import Engines
from lorica.engines.together import together
from lorica.errors import AdapterError, CheckpointError, suggest
from lorica.files.atomic import at_once, write_tensors
from lorica.layers import Switch

if TYPE_CHECKING:
    from lorica.model.peft_model import PeftModel


def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: bool | str = "auto",
) -> dict[str, Tensor]:
    """Return the tensors of one adapter under the names they have in a file.

    On a model that lies over ranks they are the logical tensors, whatever the layout: all ranks call, rank 0 gets
    them, the others an empty dictionary.

    Args:
        model: an adapted model.
        state_dict: take the values from it, by their live names, instead of from the model.
        adapter_name: which adapter.
        unwrap_compiled: look inside a compiled model.
        save_embedding_layers: add the embedding and output weights of the base model. ``"auto"``: where they are
            targets or the vocabulary was resized.

    Raises:
        AdapterError: there is no such adapter.
        KeyError: ``state_dict`` lacks one of its tensors.
    """
    if unwrap_compiled:
        model = getattr(model, "_orig_mod", model)
    with (switch_of(model) or Switch()).turns.reading:
        entries = saved_entries(model, adapter_name, save_embedding_layers)
        if state_dict is not None:
            values = {n: e.tensor.detach() if e.tied else state_dict[e.live] for n, e in entries.items()}
            return {name: entries[name].saved(value) for name, value in values.items()}
        if lie_over_ranks(base_of(model), entries):
            return collect(pieces(entries))
        return {
            name: entry.saved(entry.tensor.detach()) if entry.window is None else here(name, entry)
            for name, entry in entries.items()
        }


def save_adapters(
    model: PeftModel,
    directory: str | os.PathLike[str],
    *,
    safe_serialization: bool,
    selected: Sequence[str] | None,
    save_embedding_layers: str | bool,
    write: bool,
    state_dict: Mapping[str, Tensor] | None,
    convert: Callable[[str, dict[str, Tensor]], tuple[dict[str, Tensor], LoraConfig]] | None = None,
) -> None:
    """Write adapters; see :meth:`PeftModel.save_pretrained`.

    ``convert`` is given an adapter's name and tensors, and returns the tensors and the configuration to be written; all
    ranks call it.
    """
    directory = Path(directory)
    if directory.is_file():
        raise CheckpointError(f"Provided path ({directory}) should be a directory, not a file")
    if not safe_serialization:
        raise CheckpointError("safe_serialization=False: lorica writes safetensors only; a pickle could run code")
    names = list(model.peft_config) if selected is None else list(selected)
    for name in names:
        if name not in model.peft_config:
            known = list(model.peft_config)
            raise AdapterError(
                f"You passed an invalid `selected_adapters` arguments, current supported adapter names are {known} - "
                f"got {names}.{suggest(name, known)}"
            )
    write = write and (not Engines(base_of(model)).axes or dist.get_rank() == 0)
    with together(base_of(model), f"writing {directory}"), at_once():  # no rank goes on to read what is being written
        for name in names:
            tensors = get_peft_model_state_dict(
                model, state_dict, adapter_name=name, save_embedding_layers=save_embedding_layers
            )
            config = model.peft_config[name]
            if convert is not None:
                tensors, config = convert(name, tensors)
            if write:
                folder = directory if name == "default" else directory / name
                folder.mkdir(parents=True, exist_ok=True)
                write_tensors(folder / WEIGHTS_NAME, tensors, {"format": "pt"})
                _write_config(model, config, folder)
        if write:
            directory.mkdir(parents=True, exist_ok=True)
            write_model_card(model, directory)


def _write_config(model: PeftModel, config: LoraConfig, folder: Path) -> None:
    base = model.get_base_model()
    mapping = None
    if config.task_type is None:
        # Fully-sharded parallelism gives a model a class of its own, made of its real one.
        kind = next(cls for cls in type(base).__mro__ if not hasattr(cls, "_get_fsdp_state"))
        mapping = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
    mode, config.inference_mode = config.inference_mode, True
    try:
        config.save_pretrained(folder, auto_mapping_dict=mapping)
    finally:
        config.inference_mode = mode


def write_model_card(model: PeftModel, directory: str | os.PathLike[str]) -> None:
    """Write ``README.md``, or bring the facts at the head of the one that is there up to date."""
    first = next(iter(model.peft_config.values()))
    trainable, total = model.get_nb_trainable_parameters()
    card.write(Path(directory) / "README.md", first, trainable=trainable, total=total)


def push_to_hub(model: PeftModel, repo_id: str, *, private: bool | None, **options: Any) -> Any:
    """Save the adapters and upload them; see :meth:`PeftModel.push_to_hub`."""
    from huggingface_hub import HfApi

    api = HfApi(token=options.pop("token", None))
    options.setdefault("commit_message", "Upload LoRA adapter")
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        return api.upload_folder(repo_id=url.repo_id, folder_path=folder, **options)
