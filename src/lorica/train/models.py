"""Loading base models, tokenizers and adapters, with errors that say which path is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorica.config.lora import check_fields
from lorica.errors import RecipeError, suggest_path
from lorica.files.hub import find_file, find_folder
from lorica.files.json import read_json_object
from lorica.train.paths import meant_as_path

_CONFIG = "adapter_config.json"
#: What a model consists of.
MODEL_FILES = ("model*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken")


def device(name: str = "auto") -> torch.device:
    """The device of that name; ``auto`` is the accelerator where there is one.

    Raises:
        RecipeError: there is no such device.
    """
    if name == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        return found if found is not None else torch.device("cpu")
    try:
        chosen = torch.device(name)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise RecipeError(f"There is no device {name!r} here: {str(error).splitlines()[0]}") from None
    return chosen


def load_tokenizer(path: str, revision: str | None = None) -> Any:
    """The tokenizer that belongs to a model.

    Raises:
        RecipeError: there is none.
    """
    from transformers import AutoTokenizer

    return _load(AutoTokenizer, "tokenizer", path, revision=revision)


def load_processor(path: str, revision: str | None = None) -> tuple[Any, int]:
    """The processor that belongs to a vision-language model, and the token that stands for a piece of an image.

    Raises:
        RecipeError: there is none.
    """
    from transformers import AutoConfig, AutoProcessor

    found = _load(AutoProcessor, "processor", path, revision=revision)
    if getattr(found, "image_processor", None) is None:
        raise RecipeError(f"vision: the processor of {path} takes no images, so the model does not see")
    config = _load(AutoConfig, "model", path, revision=revision)
    tokens = (getattr(config, name, None) for name in ("image_token_id", "image_token_index"))
    token = next((token for token in tokens if isinstance(token, int)), None)
    if token is None:
        raise RecipeError(f"vision: the configuration of {path} names no token that stands for an image")
    return found, token


def load_base(
    path: str,
    *,
    dtype: str = "auto",
    revision: str | None = None,
    attn_implementation: str | None = None,
    where: torch.device | None = None,
    distributed: Any = None,
    quantization: str | None = None,
    sees: bool = False,
) -> nn.Module:
    """A causal language model, on the device ``where``, or laid over ranks by transformers (``distributed``).

    Args:
        path: directory, or name on the hub.
        dtype: of its weights; of quantised ones, what they compute in.
        revision: on the hub.
        attn_implementation: transformers' name of the attention.
        where: the device.
        distributed: transformers' ``DistributedConfig``.
        quantization: the form in which linear layers are quantised while loading; None: as they were saved.
        sees: whether it is a vision-language model.

    Raises:
        RecipeError: it is not there, or not a causal language model, or quantised already in another form.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    kind = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    options: dict[str, Any] = {"revision": revision, "dtype": dtype}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    if distributed is not None:
        options["distributed_config"] = distributed
    config = _load(AutoConfig, "model", path, revision=revision)
    saved = getattr(config, "quantization_config", None) is not None
    if quantization is not None:
        if saved:
            raise RecipeError(f"model.quantization: {path} is quantised already; leave it out")
        options["quantization_config"] = _quantised(quantization, dtype, config)
    if quantization is None and not saved:
        plain: nn.Module = _load(kind, "model", path, **options)
        return plain.to(where) if where is not None else plain
    if where is not None:
        options["device_map"] = {"": where}  # quantised models are made where they stay
    model: nn.Module = _load(kind, "model", path, **options)
    return model


def _quantised(kind: str, dtype: str, config: Any) -> Any:
    from transformers import BitsAndBytesConfig

    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    compute = getattr(config, "dtype", None) if dtype == "auto" else getattr(torch, dtype)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute or torch.float32,
    )


def load_adapted(base: nn.Module, adapter: str) -> nn.Module:
    """``base`` with a saved adapter on it, for inference.

    Raises:
        RecipeError: there is no adapter at this path.
    """
    from lorica import PeftModel

    check_adapter(adapter)
    adapted: nn.Module = PeftModel.from_pretrained(base, adapter)
    return adapted.eval()


def check_adapter(adapter: str) -> Path:
    """The directory of a saved adapter.

    Raises:
        RecipeError: it is not there, or holds none.
    """
    directory = Path(adapter).expanduser()
    if not directory.is_dir():
        raise RecipeError(f"There is no adapter directory {adapter}.{suggest_path(directory)}")
    if not (directory / _CONFIG).is_file():
        inner = [entry for entry in sorted(directory.iterdir()) if (entry / _CONFIG).is_file()]
        hint = f" Did you mean {str(inner[0])!r}?" if inner else ""
        raise RecipeError(f"{adapter} holds no {_CONFIG}, so it is not an adapter.{hint}")
    return directory


def base_of(adapter: str) -> tuple[str, str | None]:
    """The base model (and its revision) that an adapter was trained on, as its config says.

    Raises:
        RecipeError: the config does not say.
        CheckpointError: it is not a JSON object.
        ConfigError: it says something else than a name.
    """
    file = find_file(check_adapter(adapter), _CONFIG)
    values = read_json_object(file)
    name, revision = values.get("base_model_name_or_path"), values.get("revision")
    check_fields({"base_model_name_or_path": name, "revision": revision}, file)
    if not name:
        raise RecipeError(f"{file} does not name its base model; give it with --model")
    return name, revision


def files_of(path: str, revision: str | None = None) -> Path:
    """The directory with a model's own files; from the hub they are fetched, weights only as safetensors.

    Raises:
        RecipeError: there is no model.
        CheckpointError: the hub does not give its files.
    """
    from transformers import AutoConfig

    _load(AutoConfig, "model", path, revision=revision)
    directory = Path(path).expanduser()
    return directory if directory.is_dir() else find_folder(path, MODEL_FILES, revision=revision)


def max_length(path: str, revision: str | None, wanted: int | None) -> int:
    """How many tokens an example may have, from the model's config alone.

    Raises:
        RecipeError: there is no model, or ``wanted`` is more than it has positions for.
    """
    from transformers import AutoConfig

    config = _load(AutoConfig, "model", path, revision=revision).get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    if wanted is None:
        return min(1024, limit) if limit else 1024
    if limit and wanted > limit:
        raise RecipeError(f"data.max_length: {wanted} is more than the model's {limit} positions")
    return wanted


def _load(loader: Any, what: str, path: str, **options: Any) -> Any:
    directory = Path(path).expanduser()
    if directory.is_dir():
        if (directory / _CONFIG).is_file() and not (directory / "config.json").is_file():
            raise RecipeError(f"{path} is an adapter, not a {what}; name its base model")
        if not (directory / "config.json").is_file():
            raise RecipeError(f"{path} holds no config.json, so it is not a model that transformers can load")
        path = str(directory)
    elif meant_as_path(path):
        raise RecipeError(f"There is no model directory {path}.{suggest_path(directory)}")
    try:
        return loader.from_pretrained(path, trust_remote_code=False, **options)
    except (OSError, ValueError, ImportError, KeyError) as error:
        hint = "" if directory.is_dir() else suggest_path(directory)
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise RecipeError(f"The {what} {path} cannot be loaded: {lines[0]}{hint}") from None
