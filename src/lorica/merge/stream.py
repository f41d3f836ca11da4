"""Writing a merged model file by file and tensor by tensor."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lorica.engines.board import is_lost
from lorica.errors import AdapterError, CheckpointError, LostRankError, RankError
from lorica.files.atomic import complete_directory
from lorica.files.json import read_json_object
from lorica.files.tensors import Stored, TensorReader, TensorWriter
from lorica.merge.changes import Changes
from lorica.merge.follow import Conversion, skeleton
from lorica.merge.traced import NotFollowedError, Piece
from lorica.storage import chunks

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
#: What belongs to a model beside its weights: configurations, tokenizer, chat templates.
COMPANIONS = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken")
_TEMPLATES = "additional_chat_templates"
_INDEX_BYTES = 64 * 1024 * 1024

#: Is told how many bytes were written since the last call.
Progress = Callable[[int], object]


@dataclass(frozen=True)
class Output:
    """One tensor of a merged file.

    Attributes:
        name: its name.
        source: the stored tensor that it starts from.
        stored: what it will be.
        work: the parameters that are made of it and change → the piece of each.
    """

    name: str
    source: str
    stored: Stored
    work: tuple[tuple[str, Piece], ...]


class Merge:
    """A merge that can be done: everything was checked, nothing is written yet.

    Args:
        adapter: a saved adapter's directory.
        base: the directory of the model that it belongs to, with its weights in safetensors files.
        dtype: to store floating-point weights in; None: each as it is.
        device: where sums are computed.

    Raises:
        NotFollowedError: the model has to be loaded for this merge; says why.
        CheckpointError: a file is broken, holds NaN, or does not fit the model.
        AdapterError: a delta has no place in its weight.
    """

    def __init__(
        self,
        adapter: str | os.PathLike[str],
        base: str | os.PathLike[str],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        from transformers import AutoConfig

        self._base, self._dtype, self._device = Path(base), dtype, device or torch.device("cpu")
        self._readers = {name: TensorReader(self._base / name) for name in weight_files(self._base)}
        stored = {key: found for reader in self._readers.values() for key, found in reader.tensors.items()}
        model = skeleton(AutoConfig.from_pretrained(self._base, trust_remote_code=False))
        self._conversion = Conversion(model, {key: found.shape for key, found in stored.items()})
        self._changes = Changes(model, adapter)
        new = self._new_names(self._new_parameters())
        work = self._work(stored)
        self.outputs = {file: self._outputs(reader, work, new) for file, reader in self._readers.items()}

    # ---- the plan ----------------------------------------------------------------------------------------------------

    def _new_parameters(self) -> dict[str, str]:
        """Return the parameters that get a stored tensor of their own → the one that they were until now."""
        found = self._conversion.parameters
        parted = {name: group for group in self._changes.parted for name in group}
        shared = {name: group for group in self._changes.groups for name in group}
        needed, new = set(self._changes.names), {}
        for name in {*parted, *needed & shared.keys()} - found.keys():
            other = next((member for member in shared[name] if member in found), None)
            if other is not None:
                needed.discard(name)
                if name in parted:
                    new[name] = other
                elif other not in self._changes.names:
                    needed.add(other)
        self._conversion.need(sorted(needed | set(new.values())), str(self._base))
        return new

    def _work(self, stored: Mapping[str, Stored]) -> dict[str, list[tuple[str, Piece]]]:
        work = defaultdict(list)
        for name in sorted(self._changes.names & self._conversion.parameters.keys()):
            traced = self._conversion.parameters[name]
            for piece in traced.pieces:
                self._changes.check(name, piece, traced.shape, self._dtype_of(stored[piece.key], piece.key))
                work[piece.key].append((name, piece))
        return work

    def _dtype_of(self, stored: Stored, key: str) -> torch.dtype:
        if stored.dtype is None:
            raise AdapterError(f"{key}: a base weight stored as {stored.word} cannot take a delta")
        return self._dtype if self._dtype is not None and stored.dtype.is_floating_point else stored.dtype

    def _new_names(self, new: Mapping[str, str]) -> dict[str, tuple[str, Piece]]:
        """Return the stored names of new parameters → the parameter and the stored tensor that it starts from."""
        names = {}
        for name, other in new.items():
            traced = self._conversion.parameters[other]
            if len(traced.pieces) > 1:
                raise NotFollowedError(
                    f"{other} is made of {len(traced.pieces)} stored tensors and gets a copy, {name}"
                )
            names[self._conversion.stored_name(name)] = (name, traced.pieces[0])
        return names

    def _outputs(
        self,
        reader: TensorReader,
        work: Mapping[str, list[tuple[str, Piece]]],
        new: Mapping[str, tuple[str, Piece]],
    ) -> list[Output]:
        outputs = []
        for key, stored in reader.tensors.items():
            if self._dtype is not None and stored.dtype is not None and stored.dtype.is_floating_point:
                stored = stored.of(self._dtype)
            outputs.append(Output(key, key, stored, tuple(work.get(key, ()))))
            for new_key, (name, piece) in new.items():
                if piece.key == key:
                    changed = ((name, piece),) if name in self._changes.names else ()
                    outputs.append(Output(new_key, key, stored, changed))
        return outputs

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of tensors in each file."""
        return {
            file: sum(output.stored.stop - output.stored.start for output in outputs)
            for file, outputs in self.outputs.items()
        }

    # ---- writing -----------------------------------------------------------------------------------------------------

    def write(self, file: str, directory: Path, progress: Progress) -> None:
        """Write one file of merged weights.

        In memory there is one tensor at a time, a chunk of its rows in float32, and the factors of a few layers.

        Raises:
            CheckpointError: a merged weight is not finite; names it.
        """
        reader, outputs = self._readers[file], self.outputs[file]
        with TensorWriter(directory / file, {out.name: out.stored for out in outputs}, reader.metadata) as writer:
            for out in outputs:
                if not out.work and out.stored.word == reader.tensors[out.source].word:
                    writer.copy(out.name, reader, out.source)
                else:
                    writer.write(out.name, self._merged(reader, out))
                progress(out.stored.stop - out.stored.start)

    @torch.no_grad()
    def _merged(self, reader: TensorReader, out: Output) -> Tensor:
        tensor = reader.read(out.source).to(self._device, out.stored.dtype)
        for name, piece in out.work:
            view = piece.view(tensor)
            self._changes.apply(name, view, piece.box)
            if not _finite(view):
                raise CheckpointError(f"{name}: the merged weight holds NaN or infinity")
        return tensor.cpu()

    def write_companions(self, directory: Path) -> None:
        """Write what belongs to the model beside its weights."""
        for pattern in COMPANIONS:
            for path in self._base.glob(pattern):
                if path.is_file() and not path.name.endswith(".index.json") and path.name != "config.json":
                    shutil.copyfile(path, directory / path.name)
        if (self._base / _TEMPLATES).is_dir():
            shutil.copytree(self._base / _TEMPLATES, directory / _TEMPLATES)
        _write_json(directory / "config.json", self._config())
        if (self._base / INDEX).is_file():
            index = read_json_object(self._base / INDEX, limit=_INDEX_BYTES)
            index["weight_map"] = {out.name: file for file, outputs in self.outputs.items() for out in outputs}
            metadata = index["metadata"] = dict(index["metadata"]) if isinstance(index.get("metadata"), dict) else {}
            metadata["total_size"] = sum(self.sizes.values())
            if isinstance(metadata.get("total_parameters"), int):
                metadata["total_parameters"] += self._new_elements()
            _write_json(directory / INDEX, index)

    def _new_elements(self) -> int:
        new = (out for outputs in self.outputs.values() for out in outputs if out.name != out.source)
        return sum(torch.Size(out.stored.shape).numel() for out in new)

    def _config(self) -> dict[str, Any]:
        values = read_json_object(self._base / "config.json")
        for section in (values, values.get("text_config")):
            if not isinstance(section, dict):
                continue
            if self._changes.parted and (section is values or "tie_word_embeddings" in section):
                section["tie_word_embeddings"] = False
            for word in ("dtype", "torch_dtype"):
                if self._dtype is not None and word in section:
                    section[word] = str(self._dtype).removeprefix("torch.")
        return values


def _finite(values: Tensor) -> bool:
    """Whether there is neither NaN nor infinity, looked at in chunks of rows."""
    if values.dim() > 2:
        return all(map(_finite, values))
    rows = values.reshape(-1, 1) if values.dim() < 2 else values
    return all(bool(rows[part].isfinite().all()) for part in chunks(rows))


def merge_files(
    adapter: str | os.PathLike[str],
    base: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    progress: Callable[[int], contextlib.AbstractContextManager[Progress]] | None = None,
) -> None:
    """Merge a saved adapter into the files of its base model, without loading the model.

    The new directory has the same files with the same tensors under the same names. It appears when it is complete.
    Where a process group was initialised, each rank does some of the files; all must see the same file system.

    Memory: the largest stored tensor, :data:`lorica.storage.deltas.CHUNK_ELEMENTS` float32 values at most (and as many
    again for DoRA's norms), and the factors of the four layers last used. PiSSA and OLoRA need some more of the largest
    weight, for they start from its decomposition.

    Args:
        adapter: the adapter's directory.
        base: the model's directory, with safetensors files.
        output: the new directory; it must not be there.
        dtype: to store floating-point weights in; None: each as it is.
        device: where sums are computed.
        progress: given the number of bytes to come, a context that is told how many were written.

    Raises:
        NotFollowedError: the model has to be loaded for this merge; says why.
        CheckpointError: a file is broken, holds NaN, or does not fit the model.
        AdapterError: a delta has no place in its weight.
        TargetError: the adapter's configuration does not fit the model.
        RankError: another rank failed (LostRankError: died).
        FileExistsError: ``output`` is there.
    """
    plan = Merge(adapter, base, dtype=dtype, device=device)
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    mine = _share(plan.sizes, size)[rank]
    with _directory(Path(output), alone=size == 1) as directory:
        total = sum(plan.sizes[file] for file in mine)
        with progress(total) if progress is not None else contextlib.nullcontext(lambda _: None) as tell:
            for file in mine:
                plan.write(file, directory, tell)
        if rank == 0:
            plan.write_companions(directory)


def weight_files(base: Path) -> list[str]:
    """Return the names of the files that hold a model's weights."""
    if not (base / INDEX).is_file():
        if not (base / WEIGHTS).is_file():
            raise NotFollowedError(f"{base} has neither {INDEX} nor {WEIGHTS}")
        return [WEIGHTS]
    places = read_json_object(base / INDEX, limit=_INDEX_BYTES).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise CheckpointError(f"{base / INDEX}: no weight_map from names to files")
    names = sorted(set(places.values()))
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{base / INDEX}: {name!r} is not the name of a safetensors file beside it")
        if not (base / name).is_file():
            raise CheckpointError(f"{base / INDEX} names {name}, which is not there")
    return names


def _share(sizes: Mapping[str, int], ranks: int) -> list[list[str]]:
    """Divide files over ranks, the largest first, each to the rank that has least."""
    shares: list[list[str]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for file in sorted(sizes, key=lambda name: (-sizes[name], name)):
        least = loads.index(min(loads))
        shares[least].append(file)
        loads[least] += sizes[file]
    return shares


@contextlib.contextmanager
def _directory(output: Path, *, alone: bool) -> Iterator[Path]:
    """Yield the directory to fill; on several ranks one directory, which appears when all of them succeeded."""
    if alone:
        with complete_directory(output, marker=False) as directory:
            yield directory
        return
    error: BaseException | None = None
    with contextlib.ExitStack() as stack:
        said: list[Any] = [None]
        if dist.get_rank() == 0:
            try:
                said = [stack.enter_context(complete_directory(output, marker=False))]
            except OSError as caught:
                said = [caught]
        dist.broadcast_object_list(said, src=0)
        if isinstance(said[0], OSError):
            raise said[0]
        try:
            yield said[0]
        except BaseException as caught:
            error = caught
            raise
        finally:
            _refuse_failure(error)


def _refuse_failure(error: BaseException | None) -> None:
    failed: list[Any] = [None] * dist.get_world_size()
    try:
        dist.all_gather_object(failed, None if error is None else f"{type(error).__name__}: {error}")
    except RuntimeError as lost:
        if error is not None:
            return
        if not is_lost(lost):
            raise
        raise LostRankError(f"merging was not finished, so nothing was kept: another rank is gone ({lost})") from lost
    wrong = [f"rank {rank}: {text}" for rank, text in enumerate(failed) if text is not None]
    if wrong and error is None:
        raise RankError(f"merging failed, so nothing was kept: {'; '.join(wrong)}")


def _write_json(path: Path, value: Mapping[str, Any] | Sequence[Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


__all__ = ["Merge", "Progress", "merge_files", "weight_files"]
