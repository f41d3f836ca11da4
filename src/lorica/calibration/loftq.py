"""LoftQ on a model that is quantised already: the factors start as what its weights lost
(https://arxiv.org/abs/2310.08659), one weight at a time, read from the file of the unquantised model."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from lorica.adapt.inject import adapter_modules, base_of
from lorica.errors import AdapterError, CheckpointError, ConfigError
from lorica.files.json import read_json_object
from lorica.files.tensors import TensorReader
from lorica.init.loftq import leading
from lorica.layers import LoraLayer
from lorica.storage import Packed
from lorica.targets.resolve import config_of

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_INDEX_BYTES = 512 * 1024 * 1024


@torch.no_grad()
def replace_lora_weights_loftq(
    peft_model: nn.Module,
    model_path: str | os.PathLike[str] | None = None,
    adapter_name: str = "default",
    callback: Callable[[nn.Module, str], bool] | None = None,
) -> None:
    """Set the factors of an adapter on quantised layers so that ``Q + s·B·A`` is nearest to the unquantised weight.

    Args:
        peft_model: a model whose base weights are quantised, by whatever :mod:`lorica.storage` knows.
        model_path: the unquantised model: a safetensors file, or the directory with one or several of them. None: from
            where the base model was loaded, a directory or the hub's local cache.
        adapter_name: the adapter.
        callback: is called with the model and the layer's name after each layer; where it returns false, the layer gets
            its factors back. A measure of the model's output makes this a greedy search; another call may find more.

    Raises:
        ConfigError: no adapted layer is quantised.
        AdapterError: the adapter does not exist or is merged, or its scale is not positive.
        CheckpointError: there is no file, or it lacks a weight or has it in another shape.
    """
    layers = _quantised_layers(peft_model, adapter_name)
    weights = _Weights(_path_of(peft_model, model_path), getattr(base_of(peft_model), "base_model_prefix", ""))
    for layer in layers:
        factors, spec, stored = layer.factors(adapter_name), layer.specs[adapter_name], layer.stored
        lost = weights.read(layer.target_name, stored.shape).to(stored.device).float() - stored.to(torch.float32)
        u, s, v = leading(lost, spec.r)
        root = (s / spec.scaling).sqrt()
        before = (factors.a.clone(), factors.b.clone())
        _set(layer, adapter_name, root.unsqueeze(1) * v, u * root)
        if callback is not None and not callback(peft_model, layer.target_name):
            _set(layer, adapter_name, *before)


def _set(layer: LoraLayer, adapter: str, a: Tensor, b: Tensor) -> None:
    factors = layer.factors(adapter)
    factors.a.copy_(a)
    factors.b.copy_(b)
    layer.notes.clear()


def _quantised_layers(model: nn.Module, adapter: str) -> list[LoraLayer]:
    layers = [module for _, module in adapter_modules(model) if isinstance(module, LoraLayer)]
    if not any(adapter in layer.specs for layer in layers):
        raise AdapterError(f"adapter {adapter!r} does not exist on this model")
    found = [layer for layer in layers if adapter in layer.specs and isinstance(layer.stored, Packed)]
    if not found:
        raise ConfigError("No bnb LoRA module found on the model: none of its adapted weights is quantised")
    for layer in found:
        r, scaling, sides = layer.specs[adapter].r, layer.specs[adapter].scaling, layer.stored.shape
        if layer.merged_adapters or scaling <= 0 or r > min(sides):
            raise AdapterError(
                f"{layer.target_name}: LoftQ needs an unmerged weight, a positive scale and a rank that fits; "
                f"{layer.merged_adapters} are merged, the scale is {scaling}, the rank {r} of {tuple(sides)}"
            )
    return found


def _path_of(model: nn.Module, given: str | os.PathLike[str] | None) -> Path:
    if given is not None:
        return Path(given)
    name = getattr(base_of(model), "name_or_path", None) or config_of(base_of(model)).get("_name_or_path")
    if not name:
        raise CheckpointError(
            "The provided model does not appear to be a transformers model. In this case, you must pass the model_path "
            "argument that points to the safetensors file."
        )
    if Path(name).exists():
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except Exception as error:  # the hub's client raises a dozen unrelated types
        raise CheckpointError(
            f"The model.safetensors file of {name!r} must be present on disk, but it could not be found: {error}"
        ) from error


class _Weights:
    """The weights of a model in its files, read one at a time.

    Args:
        path: a safetensors file, or a directory.
        prefix: what transformers puts before the names of a model with a head, and files of the bare model lack.

    Raises:
        CheckpointError: there is no such file.
    """

    def __init__(self, path: Path, prefix: str) -> None:
        self._path, self._prefix = path, prefix
        self._readers: dict[Path, TensorReader] = {}
        self._files: dict[str, Path] = {}
        single = path / WEIGHTS if path.is_dir() else path
        if single.is_file():
            self._files = dict.fromkeys(self._reader(single).tensors, single)
        elif (path / INDEX).is_file():
            named = read_json_object(path / INDEX, limit=_INDEX_BYTES).get("weight_map", {})
            self._files = {key: path / Path(str(file)).name for key, file in named.items()}
        else:
            raise CheckpointError(
                f"Could not find file for {single}, ensure that there is a (sharded) safetensors file of the model."
            )

    def _reader(self, file: Path) -> TensorReader:
        if file not in self._readers:
            self._readers[file] = TensorReader(file)
        return self._readers[file]

    def read(self, module: str, shape: torch.Size) -> Tensor:
        """Return the weight of a linear layer, ``[out, in]``."""
        name = f"{module}.weight"
        candidates = [name, name.removeprefix(f"{self._prefix}."), f"{self._prefix}.{name}"]
        key = next((candidate for candidate in candidates if candidate in self._files), None)
        if key is None:
            raise CheckpointError(f"{self._path}: has no weight of {module}; looked for {candidates}")
        tensor = self._reader(self._files[key]).read(key)
        if tensor.shape != shape:
            raise CheckpointError(f"{self._path}: {key} has the shape {tuple(tensor.shape)}, not {tuple(shape)}")
        return tensor


__all__ = ["replace_lora_weights_loftq"]
