"""Loading adapters into a model: all of it or, on an error, nothing."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from lorica.adapt import inject
from lorica.adapt.replicate import restore_layers
from lorica.adapt.trainable import undo_of_inputs
from lorica.checkpoint import reading
from lorica.checkpoint.bulk import read_whole
from lorica.checkpoint.names import adapter_entries, config_of_adapter, embedding_entries, of_other_stages
from lorica.checkpoint.pieces import piece_of
from lorica.checkpoint.placing import Place, copy_whole, place_of, take_over, write_pieces
from lorica.checkpoint.reading import LoadResult
from lorica.checkpoint.walk import base_parameters
from lorica.config import CONFIG_NAME, LoraConfig, PeftConfig
from lorica.engines.together import together
from lorica.errors import CheckpointError, ConfigError, TargetError, UnfittingError, naming, shown
from lorica.files.tensors import TensorReader
from lorica.layers import Switch

if TYPE_CHECKING:
    from lorica.model.peft_model import PeftModel

T = TypeVar("T")

#: The fields of a configuration that factors are scaled by.
_SCALES = ("lora_alpha", "use_rslora", "alpha_pattern", "rank_pattern")


def load_first(
    wrap: Callable[[LoraConfig, bool], PeftModel],
    model: nn.Module,
    model_id: str | os.PathLike[str],
    adapter: str,
    *,
    config: LoraConfig | None,
    is_trainable: bool,
    key_mapping: Mapping[str, str] | None,
    strict: bool | None,
    source: Mapping[str, Any],
) -> PeftModel:
    """Wrap ``model`` with ``wrap`` and fill it from a saved adapter; see :meth:`PeftModel.from_pretrained`.

    Args:
        wrap: given the configuration, and whether factors are made without values.
    """
    switch = inject.switch_of(model)
    flags = [*(model.parameters() if switch is not None else base_parameters(model))]
    what, where = f"loading {model_id}", os.path.join(model_id, CONFIG_NAME)
    with (switch or Switch()).turns.writing():
        with together(model, what):
            found = read_config(model_id, config, source, is_trainable=is_trainable)
            file = reading.open_weights(model_id, **source)

        def load(strictly: bool) -> PeftModel:
            with _as_it_was(model, adapter, flags), together(model, what), naming(where, ConfigError, TargetError):
                loaded = wrap(found, strictly)
                _fill(loaded, adapter, loaded.peft_config[adapter], file, key_mapping, strict=strictly)
            return loaded

        return _strictly_first(load, strict)


def load_further(
    model: PeftModel,
    model_id: str | os.PathLike[str],
    adapter: str,
    *,
    is_trainable: bool,
    autocast: bool,
    key_mapping: Mapping[str, str] | None,
    strict: bool | None,
    source: Mapping[str, Any],
    offload: bool = False,
) -> LoadResult:
    """Load an adapter into a wrapped model; see :meth:`PeftModel.load_adapter`."""
    base, turns = model.get_base_model(), model.base_model.switch.turns
    what, where = f"loading {model_id}", os.path.join(model_id, CONFIG_NAME)
    with together(base, what):
        file = reading.open_weights(model_id, **source)
        config = None
        if adapter in model.peft_config:
            _warn_of_other_scales(model.peft_config[adapter], model_id, source)
        else:
            config = read_config(model_id, None, source, is_trainable=is_trainable)
            config.runtime_config = replace(config.runtime_config, ephemeral_gpu_offload=offload)

    def load(strictly: bool) -> LoadResult:
        with ExitStack() as undo, together(base, what), naming(where, ConfigError, TargetError):
            if adapter in model.peft_config or config is None:
                known = config_of_adapter(model, adapter)
                return _fill(model, adapter, known, file, key_mapping, strict=strictly)
            undo.enter_context(_as_it_was(base, adapter, base_parameters(base)))
            with turns.writing():
                model.add_adapter(adapter, config, low_cpu_mem_usage=strictly, autocast_adapter_dtype=autocast)
                made = model.peft_config.pop(adapter)  # nobody finds it before it has its values
            result = _fill(model, adapter, made, file, key_mapping, strict=strictly)
        if is_trainable:
            model.set_requires_grad(adapter)
        return result

    with turns.changing():  # what there was to fetch is here
        return _strictly_first(load, strict)


def _strictly_first(load: Callable[[bool], T], strict: bool | None) -> T:
    """Load strictly, which makes no factors that a file replaces, or not; None: strictly, and where names do not fit,
    once more with warnings.
    """
    try:
        return load(strict is not False)
    except UnfittingError:  # the model is as it was
        if strict is not None:
            raise
    return load(False)


def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: Mapping[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
    *,
    strict: bool = False,
) -> LoadResult:
    """Write tensors, under the names they have in a file, into an adapter of a model.

    Args:
        model: an adapted model.
        peft_model_state_dict: the tensors; a partial set is fine unless ``strict``.
        adapter_name: which adapter.
        ignore_mismatched_sizes: pass over tensors of the wrong shape, with a warning.
        low_cpu_mem_usage: accepted; factors on the meta device get memory in any case.
        strict: whether missing and unexpected names are errors; otherwise they are returned.

    Returns:
        The names of missing and unexpected tensors.

    Raises:
        CheckpointError: a tensor has the wrong shape or dtype or is not finite, or (``strict``) names do not fit.
            Nothing was written.
    """
    where = f"state dict of adapter {adapter_name!r}"
    wanted = adapter_entries(model, adapter_name, config_of_adapter(model, adapter_name))
    extra = embedding_entries(model)
    known = {**extra, **wanted}
    theirs = of_other_stages(model, peft_model_state_dict)
    shapes = {name: tuple(tensor.shape) for name, tensor in peft_model_state_dict.items() if name not in theirs}
    fitting = {name: shape for name, shape in shapes.items() if strict or name in known}
    needed = wanted if strict else {name: entry for name, entry in wanted.items() if name in shapes}
    reading.check_names(
        fitting,
        needed,
        extra,
        where=where,
        strict=strict,
        ignore_mismatched_sizes=ignore_mismatched_sizes,
    )
    good = {n: t for n, t in peft_model_state_dict.items() if n in known and shapes[n] == tuple(known[n].shape)}
    reading.check_floating({n: t.dtype for n, t in good.items() if known[n].tensor.is_floating_point()}, where)
    good = {name: reading.narrowed(tensor, known[name].tensor.dtype) for name, tensor in good.items()}
    reading.check_finite(good, where)
    whole = {name for name in good if place_of(known[name]) is not Place.IN_PIECES and not known[name].tied}
    parts = {n: piece_of(n, known[n]).read(tensor) for n, tensor in good.items() if n not in whole}
    with (inject.switch_of(model) or Switch()).turns.writing():
        inject.prepare_to_fill(model, adapter_name, config_of_adapter(model, adapter_name))
        copy_whole((known[name], good[name]) for name in whole)
        write_pieces(known, parts)
    missing = [name for name, entry in wanted.items() if name not in good and not entry.tied]
    return LoadResult(missing, [name for name in shapes if name not in known])


def read_config(
    model_id: str | os.PathLike[str], config: LoraConfig | None, source: Mapping[str, Any], *, is_trainable: bool
) -> LoraConfig:
    """Return a copy of the configuration, read from the adapter's files unless one is given."""
    if config is None:
        found = PeftConfig.from_pretrained(model_id, **source)
        if not isinstance(found, LoraConfig):
            where = os.path.join(model_id, CONFIG_NAME)
            raise CheckpointError(f"{where}: the configuration has no peft_type; expected 'LORA'")
        config = found
    config = copy.copy(config)
    config.inference_mode = not is_trainable
    return config


def _warn_of_other_scales(known: LoraConfig, model_id: str | os.PathLike[str], source: Mapping[str, Any]) -> None:
    """Say so where weights that are loaded over an adapter were trained with other scales than it keeps."""
    if not os.path.isfile(os.path.join(model_id, source.get("subfolder") or "", CONFIG_NAME)):
        return
    found = read_config(model_id, None, source, is_trainable=False)
    other = [field for field in _SCALES if (getattr(found, field) or None) != (getattr(known, field) or None)]
    if other:
        said = ", or ".join(
            f"{field} is {shown(getattr(found, field))} there, {shown(getattr(known, field))} here" for field in other
        )
        warnings.warn(
            f"{os.path.join(model_id, CONFIG_NAME)}: {said}. Weights that are loaded over an adapter are used with "
            "the configuration it has; to have the other one too, delete the adapter first or hotswap_adapter",
            stacklevel=4,
        )


def _fill(
    model: PeftModel,
    adapter: str,
    config: LoraConfig,
    file: TensorReader,
    key_mapping: Mapping[str, str] | None,
    *,
    strict: bool,
) -> LoadResult:
    where = str(file.path)
    wanted = adapter_entries(model, adapter, config)
    extra = embedding_entries(model)
    stored = reading.map_keys(file.tensors, key_mapping)
    theirs = of_other_stages(model, stored)
    found = {name: file.tensors[key].shape for name, key in stored.items() if name not in theirs}
    result = reading.check_names(found, wanted, extra, where=where, strict=strict)
    # A tied factor's source is in the file too and is the same tensor.
    known = {name: entry for name, entry in {**extra, **wanted}.items() if name in stored and not entry.tied}
    reading.check_floating(
        {n: file.tensors[stored[n]].dtype for n, entry in known.items() if entry.tensor.is_floating_point()}, where
    )
    places = {name: place_of(entry) for name, entry in known.items()}
    dtypes = {
        stored[name]: _dtype_of(file, stored[name], known[name].tensor.dtype, place)
        for name, place in places.items()
        if place is not Place.IN_PIECES
    }
    whole = read_whole(file, dtypes)
    pieces = [piece_of(name, known[name]) for name, place in places.items() if place is Place.IN_PIECES]
    parts = reading.read_pieces(file, stored, pieces)
    with model.base_model.switch.turns.writing():
        inject.prepare_to_fill(model, adapter, config)  # base weights may come from the file too
        for name, place in places.items():
            if place is Place.TAKES_OVER:
                take_over(known[name], whole[stored[name]])
        copy_whole((known[name], whole[stored[name]]) for name, place in places.items() if place is Place.COPIES)
        write_pieces(known, parts)
        model.peft_config[adapter] = config
    return result


def _dtype_of(file: TensorReader, key: str, live: torch.dtype, place: Place) -> torch.dtype | None:
    """Return the dtype that a tensor is read in; None: as it is stored."""
    return live if place is Place.TAKES_OVER or reading.narrows(file.tensors[key].dtype, live) else None


@contextmanager
def _as_it_was(model: nn.Module, adapter: str, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Undo, when the block fails, what putting an adapter into ``model`` changed.

    Args:
        parameters: those that it may freeze or thaw.
    """
    flags = [(parameter, parameter.requires_grad) for parameter in parameters]
    inside = [(module, set(module._modules)) for module in inject.adapted(model)]
    configs: dict[str, LoraConfig] | None = getattr(model, "peft_config", None)
    known = None if configs is None else dict(configs)
    switch = inject.switch_of(model)
    active = None if switch is None else switch.active
    random, undo_inputs = torch.get_rng_state(), undo_of_inputs(model)
    try:
        yield
    except BaseException:
        torch.set_rng_state(random)
        undo_inputs()
        with (switch or Switch()).turns.writing():
            if known is None or adapter not in known:
                inject.take_out(model, adapter)
                for module, names in inside:  # what a variant keeps its tensors in, where there was none before
                    for name in module._modules.keys() - names:
                        del module._modules[name]
                if not any(config.layer_replication for config in (known or {}).values()):
                    restore_layers(model)
            if known is None:
                model.__dict__.pop("peft_config", None)
            elif configs is not None:
                configs.clear()
                configs.update(known)
            if switch is not None and active is not None:
                switch.active = active
            for parameter, requires_grad in flags:
                parameter.requires_grad_(requires_grad)
        raise
