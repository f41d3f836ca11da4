"""``export_adapter``: a saved adapter in the form that another program takes."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from lorica.checkpoint.names import WEIGHTS_NAME
from lorica.errors import CheckpointError, ExportError, suggest
from lorica.export import peft, sglang, vllm
from lorica.export.convert import make_plain
from lorica.export.source import Exported, Source
from lorica.files.atomic import complete_directory, write_tensors

#: Program → what makes its files, or says why it cannot.
TARGETS: dict[str, Callable[[Source], Exported]] = {
    "peft": peft.export,
    "vllm": vllm.export,
    "sglang": sglang.export,
}
_EXPERTS = ("auto", "separate", "fused")


def export_adapter(
    adapter: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    target: str,
    *,
    base: str | None = None,
    experts: str = "auto",
    as_lora: int | float | None = None,
    initial: str | os.PathLike[str] | None = None,
) -> list[str]:
    """Write an adapter as ``target`` reads it; the directory appears once it is complete.

    Args:
        adapter: directory of a saved adapter.
        directory: where the export goes; must not exist yet.
        target: ``"peft"``, ``"vllm"`` or ``"sglang"``.
        base: the base model (directory, or name on the hub), of which only the configuration is read; None: the one
            that the adapter names.
        experts: the form of stacked experts: ``"separate"`` for a pair for each of them, ``"fused"`` for one for a
            layer, ``"auto"`` for what the target's class for this model takes.
        as_lora: make a variant the nearest plain LoRA of this rank first, or of as many directions as explain this
            share of its deltas. For this and the next, the base model's weights are loaded.
        initial: the adapter as it was before training, where its start was taken out of the base weights (PiSSA,
            OLoRA, CorDA, LoRA-GA): what is exported is plain LoRA of twice the rank, exactly the same model.

    Returns:
        What a user has to know: options that the program needs, zeros that were added.

    Raises:
        ExportError: the target would refuse, lose or misread something; every reason is named. Nothing is written.
        CheckpointError: a file is broken or does not fit the model, or the directory exists.
    """
    if target not in TARGETS:
        raise ExportError(f"no export to {target!r}.{suggest(target, TARGETS)} Known: {', '.join(TARGETS)}")
    if experts not in _EXPERTS:
        raise ExportError(f"experts={experts!r}: expected one of {', '.join(_EXPERTS)}")
    directory = Path(directory)
    if directory.exists():
        raise CheckpointError(f"{directory} already exists; choose another directory")
    source = Source(Path(adapter), base, experts)
    with tempfile.TemporaryDirectory() as plain:
        if as_lora is not None or initial is not None:
            where, revision = source.base_model()
            make_plain(source.path, where, revision, Path(plain), rank=as_lora, initial=initial)
            source = Source(Path(plain), where, experts, revision)
        exported = TARGETS[target](source)
    with complete_directory(directory, marker=False) as temporary:
        write_tensors(temporary / WEIGHTS_NAME, _apart(exported.tensors), {"format": "pt"})
        exported.config.save_pretrained(temporary)
    return exported.notes


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give tensors that share memory memory of their own: the format does not know sharing."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        result[name] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return result
