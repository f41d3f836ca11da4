"""A saved adapter, layer by layer: its factors in memory, its base model as shapes only."""

from __future__ import annotations

import os
import warnings
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorica.adapt.inject import lora_layers
from lorica.checkpoint import loading, reading
from lorica.checkpoint.names import Entry, adapter_entries, embedding_entries
from lorica.checkpoint.pieces import piece_of
from lorica.config import CONFIG_NAME, LoraConfig
from lorica.config.spec import AdapterSpec
from lorica.errors import ConfigError, ExportError, TargetError, naming
from lorica.files.tensors import OpenTensors
from lorica.init import Factors, find
from lorica.layers import LoraLayer
from lorica.model import get_peft_model
from lorica.ops import Op

_ADAPTER = "default"


@dataclass(frozen=True)
class Weight:
    """One adapted weight.

    Attributes:
        module: full name of its module in the base model.
        owner: that module, on the meta device.
        op: the mathematics of it; says which parameter is meant, and how it is oriented.
        spec: rank, scale, variant.
        factors: A and B, and what there is besides.
        keys: their names in the file.
    """

    module: str
    owner: nn.Module
    op: Op
    spec: AdapterSpec
    factors: Factors
    keys: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Full name of the parameter."""
        return f"{self.module}.{self.op.weight_name}"

    @property
    def experts(self) -> int:
        """How many experts the weight stacks; 0: it is a matrix."""
        return int(self.op.logical_weight(self.owner).shape[0]) if "expert" in self.op.roles_weight else 0


@dataclass(frozen=True)
class Saved:
    """A saved adapter.

    Attributes:
        path: its directory.
        config: its configuration.
        base: the model it belongs to, on the meta device, not adapted.
        weights: everything that has factors.
        others: names of tensors in its file that are no factors: biases, whole modules, rows of embeddings.
    """

    path: Path
    config: LoraConfig
    base: Any
    weights: tuple[Weight, ...]
    others: tuple[str, ...]

    def plain_config(self, r: int, alpha: float, target_modules: list[str]) -> LoraConfig:
        """Return the configuration of plain LoRA with these fields on the same model."""
        return LoraConfig(
            r=r,
            lora_alpha=int(alpha) if float(alpha).is_integer() else alpha,
            target_modules=target_modules,
            task_type=self.config.task_type,
            base_model_name_or_path=self.config.base_model_name_or_path,
            revision=self.config.revision,
            inference_mode=True,
        )


def class_of(base: str, revision: str | None = None) -> tuple[Any, Any]:
    """Return the configuration and the class of the model that a directory or a name on the hub means.

    Raises:
        ExportError: there is no such model, or no class for it.
    """
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(base, revision=revision)
    except (OSError, ValueError) as error:
        raise ExportError(f"{base}: no configuration of a base model: {error}") from error
    known = [getattr(transformers, name, None) for name in getattr(config, "architectures", None) or ()]
    known += [transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)]
    cls = next((cls for cls in known if cls is not None), None)
    if cls is None:
        raise ExportError(f"{base}: transformers has no class for it")
    return config, cls


def skeleton(base: str, revision: str | None = None) -> Any:
    """Return the model that a directory or a name on the hub means, on the meta device: shapes, no values.

    Raises:
        ExportError: there is no such model, or no class for it.
    """
    config, cls = class_of(base, revision)
    for unwanted in ("quantization_config", "distributed_config"):
        if hasattr(config, unwanted):
            delattr(config, unwanted)  # names and shapes are those of the model before it was quantised or cut
    with torch.device("meta"):
        return cls(config).eval()


def read(path: str | os.PathLike[str], base: Any) -> Saved:
    """Read an adapter.

    Args:
        path: its directory.
        base: the base model on the meta device.

    Raises:
        CheckpointError: the file is broken, or does not fit the model.
        TargetError: the configuration does not.
    """
    config = loading.read_config(path, None, {}, is_trainable=False)
    reader = reading.open_weights(path)
    shapes = reader.shapes
    names = {id(module): name for name, module in base.named_modules()}
    with warnings.catch_warnings(), naming(reader.path.with_name(CONFIG_NAME), ConfigError, TargetError):
        warnings.simplefilter("ignore")  # of the start of factors that are not started here
        wrapped = get_peft_model(base, config, low_cpu_mem_usage=True)
    wanted, extra = adapter_entries(wrapped, _ADAPTER, wrapped.peft_config[_ADAPTER]), embedding_entries(wrapped)
    reading.check_names(shapes, wanted, extra, where=str(reader.path), strict=True)
    stored: dict[int, list[tuple[str, Entry]]] = defaultdict(list)
    for key, entry in wanted.items():
        if entry.owner is not None and not entry.tied and key in shapes:
            stored[id(entry.tensor)].append((key, entry))
    with reader.opened() as file:
        weights = [_weight(file, layer, names, stored) for layer in lora_layers(wrapped)]
    others = [key for key, entry in wanted.items() if entry.owner is None and not entry.tied]
    return Saved(Path(path), config, wrapped.unload(), tuple(weights), tuple(others))


def _weight(
    file: OpenTensors, layer: LoraLayer, names: dict[int, str], stored: dict[int, list[tuple[str, Entry]]]
) -> Weight:
    owner = layer.get_base_layer()
    source = layer.tied.get(_ADAPTER)
    live = (layer if source is None else source).factors(_ADAPTER)
    keys = tuple(key for tensor in live.tensors() for key, _ in stored[id(tensor)])
    factors = live.map(lambda tensor: _read(file, tensor, stored))
    if source is not None:
        factors = Factors(factors.b.T, factors.a.T)
    return Weight(names[id(owner)], owner, layer.op, layer.specs[_ADAPTER], factors, keys)


@torch.no_grad()
def _read(file: OpenTensors, factor: Tensor, stored: dict[int, list[tuple[str, Entry]]]) -> Tensor:
    found = stored[id(factor)]
    slices = [file.slices(key) for key, _ in found]
    result = torch.zeros(factor.shape, dtype=slices[0].dtype if slices else factor.dtype)
    for (key, entry), part in zip(found, slices, strict=True):
        piece = piece_of(key, replace(entry, tensor=result))
        piece.write(piece.read(part))
    reading.check_finite({found[0][0] if found else "a factor": result}, str(file.reader.path))
    return result


def config_problems(config: LoraConfig, target: str) -> list[str]:
    """Return which fields keep an adapter from being plain pairs of factors.

    Args:
        config: the adapter's.
        target: who would have to serve it, for the messages.
    """
    found = []
    for field, why in _FIELDS.items():
        value = getattr(config, field, None)
        if value not in (None, False, "none", [], {}):
            found.append(f"{field}={value!r}: {why.format(target=target)}")
    start = find(config.init_lora_weights)
    if start is not None and (start.subtracts or config.init_lora_weights == "loftq"):
        found.append(
            f"init_lora_weights={config.init_lora_weights!r}: its start changed the base weights, and {target} serves "
            "the original ones; --initial makes it plain LoRA, given the adapter as it was before training"
        )
    return found


def weight_problems(saved: Saved, target: str) -> list[str]:
    """Return what besides pairs of factors on linear layers, embeddings and experts an adapter has."""
    found = []
    if saved.others:
        shown = ", ".join(saved.others[:3]) + (", …" if len(saved.others) > 3 else "")
        found.append(f"{target} has no place for tensors that are no factors: {shown}")
    for weight in saved.weights:
        if weight.op.kind not in ("Linear", "Embedding", "ParamWrapper"):
            found.append(f"{weight.module}: {target} adapts no layer of the kind {type(weight.owner).__name__}")
        elif weight.op.kind == "ParamWrapper" and not weight.experts:
            found.append(f"{weight.name}: {target} adapts no bare matrices, only linear layers and stacks of experts")
        elif weight.experts and not hasattr(weight.owner, "is_transposed"):
            found.append(
                f"{weight.name}: {type(weight.owner).__name__} does not say how its experts' weights lie, so their "
                f"factors cannot be given to {target}"
            )
    return found


_NEAREST = "; --as-lora makes it the nearest plain LoRA"
#: Fields whose effect is not in plain pairs of factors → why the export refuses them.
_FIELDS = {
    "use_dora": "{target} has no DoRA; the magnitudes would be lost" + _NEAREST,
    "lora_bias": "{target} has no bias of B",
    "bias": "{target} keeps the base model's biases",
    "modules_to_save": "{target} keeps the base model's modules",
    "trainable_token_indices": "{target} keeps the base model's embedding rows",
    "alora_invocation_tokens": "{target} would apply it to all tokens, not only from the invocation on",
    "use_qalora": "{target} does not pool the inputs of A" + _NEAREST,
    "use_bdlora": "{target} takes no block-diagonal factors" + _NEAREST,
    "kasa_config": "it changed the base weights, and {target} serves the original ones",
    "arrow_config": "{target} does not route between adapters token by token",
    "monteclora_config": "{target} does not know what else it has learned" + _NEAREST,
    "layer_replication": "{target} does not repeat layers",
}
