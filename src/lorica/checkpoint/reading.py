"""Reading adapter files: the header first, everything checked against the model, and only then the tensors."""

from __future__ import annotations

import math
import os
import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lorica.checkpoint.names import WEIGHTS_NAME, Entry
from lorica.checkpoint.pieces import Piece
from lorica.config import CONFIG_NAME
from lorica.errors import CheckpointError, UnfittingError, shown, suggest
from lorica.files.header import DTYPES
from lorica.files.hub import find_file
from lorica.files.tensors import OpenTensors, TensorReader

_PREFIX = "base_model.model."
#: The format's words for floating-point numbers.
_FLOATING = {word for word, dtype in DTYPES.items() if dtype.is_floating_point}
_FACTOR = re.compile(r"\.lora_\w+(?:\.\w+){0,2}$")
#: Products and sums are computed in float32 at least; a larger number has no place in an adapter, whatever stores it.
_LARGEST = torch.finfo(torch.float32).max
_PICKLES = ("adapter_model.bin", "adapter_model.pt", "pytorch_model.bin")


class LoadResult(NamedTuple):
    """Names of tensors that were expected and not found, and found and not expected."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def find_weights(source: str | os.PathLike[str], **hub: Any) -> Path:
    """Return the path of the adapter's weights in a directory or on the hub.

    Raises:
        CheckpointError: there are none, or only a pickle, which could run code and is not read.
    """
    try:
        return find_file(source, WEIGHTS_NAME, **hub)
    except CheckpointError as error:
        folder = Path(source, hub.get("subfolder") or "")
        for name in _PICKLES:
            if (folder / name).exists():
                raise CheckpointError(
                    f"{folder / name}: a pickle can run code when it is loaded, so lorica does not read it. Convert it "
                    f"to {WEIGHTS_NAME} where you trust it: safetensors.torch.save_file(torch.load(path, "
                    "weights_only=True), new_path)"
                ) from error
        raise


def open_weights(source: str | os.PathLike[str], **hub: Any) -> TensorReader:
    """Return what reads the adapter's weights in a directory or on the hub, its header checked.

    Raises:
        CheckpointError: see :func:`find_weights`; the file is no whole safetensors file; or a factor's numbers have no
            point.
    """
    reader = TensorReader(find_weights(source, **hub))
    if not _FLOATING.issuperset({stored.word for stored in reader.tensors.values()}):
        factors = {name: stored.dtype for name, stored in reader.tensors.items() if _FACTOR.search(name)}
        check_floating(factors, str(reader.path))
    return reader


def check_floating(dtypes: Mapping[str, torch.dtype | None], where: str) -> None:
    """Refuse whole and complex numbers and truth values where floating-point numbers belong; copying would take them.

    Args:
        dtypes: name → dtype of a tensor; None: one that torch does not know, which its reader refuses.
        where: they come from.

    Raises:
        CheckpointError: names the tensor.
    """
    for name, dtype in dtypes.items():
        if dtype is not None and not dtype.is_floating_point:
            raise CheckpointError(f"{where}: {name} holds {dtype}, where floating-point numbers belong")


def read_pieces(reader: TensorReader, stored: Mapping[str, str], wanted: Iterable[Piece]) -> dict[str, list[Tensor]]:
    """Return this rank's parts of tensors in a safetensors file, on the CPU.

    Args:
        reader: the file.
        stored: name → name in the file.
        wanted: which parts; those that the file lacks are left out.

    Raises:
        CheckpointError: one of them is not finite, or has a dtype that cannot be computed with; it is named. Or the
            file became shorter.
    """
    there = [piece for piece in wanted if piece.name in stored]
    if not there:
        return {}
    with reader.opened() as file:
        parts = {
            piece.name: [narrowed(part, piece.tensor.dtype) for part in piece.read(file.slices(stored[piece.name]))]
            for piece in there
        }
    for number in range(max(map(len, parts.values()), default=0)):
        check_finite({name: read[number] for name, read in parts.items() if number < len(read)}, str(reader.path))
    return parts


class Tensors(Mapping[str, Tensor]):
    """The tensors of a file, each read and checked when it is asked for."""

    def __init__(self, file: OpenTensors) -> None:
        self._file = file

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._file.slices(name)[...]
        check_finite({name: tensor}, str(self._file.reader.path))
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._file.reader.tensors)

    def __len__(self) -> int:
        return len(self._file.reader.tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._file.reader.tensors


def check_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    """Refuse NaN, infinity, and what is infinite as float32.

    Raises:
        CheckpointError: names the tensor.
    """
    alike: dict[tuple[torch.dtype, torch.device], dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            alike[tensor.dtype, tensor.device][name] = tensor
    for (dtype, _), group in alike.items():
        # One call for all. A norm may overflow where no element is infinite, so a doubt is looked into.
        if dtype.itemsize > 1 and bool((torch.stack(torch._foreach_norm([*group.values()])) <= _LARGEST).all()):
            continue
        for name, tensor in group.items():
            if not is_finite(tensor):
                raise CheckpointError(f"{where}: {name} holds NaN or infinity{beyond(dtype)}")


def is_finite(tensor: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether no element is NaN or infinite, also in another dtype and in float32, found out without a copy."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    low, high = (tensor.float() if tensor.dtype.itemsize == 1 else tensor).aminmax()
    most = min(_LARGEST, torch.finfo(dtype).max) if dtype is not None and dtype.is_floating_point else _LARGEST
    return all(math.isfinite(end) and abs(end) <= most for end in (low.item(), high.item()))


def beyond(have: torch.dtype, want: torch.dtype = torch.float32) -> str:
    """Return what an error says besides NaN and infinity, of numbers that are to have another dtype."""
    narrowest = want if narrows(torch.float32, want) else torch.float32
    return f", or what is infinite as {narrowest}" if narrows(have, narrowest) else ""


def narrowed(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor in the dtype that it will have, where that holds no numbers as large as its own."""
    return tensor.to(dtype) if narrows(tensor.dtype, dtype) else tensor


def narrows(have: torch.dtype | None, want: torch.dtype) -> bool:
    """Whether numbers that are finite in one floating dtype may be infinite in another."""
    if have is None or not (have.is_floating_point and want.is_floating_point):
        return False
    return torch.finfo(want).max < torch.finfo(have).max


def check_names(
    found: Mapping[str, tuple[int, ...]],
    wanted: Mapping[str, Entry],
    extra: Mapping[str, Entry],
    *,
    where: str,
    strict: bool,
    ignore_mismatched_sizes: bool = False,
) -> LoadResult:
    """Compare the names and shapes in a file with what the model wants.

    Args:
        found: name → shape in the file.
        wanted: what the adapter consists of.
        extra: what may be in the file besides (weights of the base model's embeddings).
        where: the file, for messages.
        strict: whether missing and unexpected names are errors; otherwise they are warnings.
        ignore_mismatched_sizes: treat a tensor of the wrong shape as missing.

    Raises:
        CheckpointError: names what is missing, unexpected, or of the wrong shape.
    """
    known = {**extra, **wanted}
    missing = [name for name, entry in wanted.items() if name not in found and not entry.tied]
    unexpected = [name for name in found if name not in known]
    needed = {name: known[name].shape for name in found if name in known}
    wrong = {name: (found[name], tuple(need)) for name, need in needed.items() if found[name] != need}
    if wrong and not ignore_mismatched_sizes:
        said = "; ".join(f"{name} is {got}, the model needs {need}" for name, (got, need) in [*wrong.items()][:5])
        raise CheckpointError(f"{where}: {len(wrong)} tensor(s) of the wrong shape: {said}{_rank_hint(wrong, known)}")
    missing += [name for name in wrong if name in wanted]
    for problem, names in (("missing", missing), ("unexpected", unexpected)):
        if names:
            message = f"{where}: {len(names)} tensor(s) {problem}: {_shorten(names, found, known)}"
            if strict and not (wrong and problem == "missing" and set(names) <= set(wrong)):
                raise UnfittingError(f"{message}. Pass strict=False to go on with a warning")
            warnings.warn(message, stacklevel=4)
    return LoadResult(missing, unexpected)


def _rank_hint(wrong: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]], known: Mapping[str, Entry]) -> str:
    """Name the field where the first tensor that is wrong has another rank than the configuration says."""
    name, (got, _) = next(iter(wrong.items()))
    roles, shape = known[name].roles, known[name].tensor.shape
    rank = shape[roles.index("rank")] if "rank" in roles else 0
    return f"; {CONFIG_NAME} says r={rank} of it (r or rank_pattern)" if rank and rank not in got else ""


def _shorten(names: list[str], found: Mapping[str, Any], known: Mapping[str, Any]) -> str:
    said = ", ".join(map(shown, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    pool = known if names[0] in found else found
    return said + suggest(names[0], pool, limit=1)


def map_keys(names: Mapping[str, Any], mapping: Mapping[str, str] | None) -> dict[str, str]:
    """Return new name → name in the file.

    The first regular expression of ``mapping`` that occurs in a name, less the wrappers' prefix, is replaced.
    """
    result = {}
    for stored in names:
        prefix = _PREFIX if stored.startswith(_PREFIX) else ""
        name = stored.removeprefix(prefix)
        for pattern, replacement in (mapping or {}).items():
            name, count = re.subn(pattern, replacement, name)
            if count:
                break
        result[prefix + name] = stored
    return result
