"""Which rows of which modules train (``trainable_token_indices``)."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from lorica.config import LoraConfig
from lorica.engines import Engines, Site
from lorica.engines.rest import at_rest
from lorica.engines.stages import axis_of_stages, is_elsewhere
from lorica.errors import LayoutError, TargetError, suggest
from lorica.layers import LoraLayer, ModulesToSaveWrapper, TrainableTokensWrapper
from lorica.ops import Op, op_of
from lorica.targets.walk import bare, tied_with_embedding


@dataclass(frozen=True)
class Tokens:
    """One module of which rows train.

    Attributes:
        name: its full name in the base model.
        base: the module.
        op: its mathematics.
        indices: the tokens, in the order of the rows.
        tied_to: name of the module whose rows these are, if it has none of its own.
        site: where it lies among the ranks; None on one process.
    """

    name: str
    base: nn.Module
    op: Op
    indices: tuple[int, ...]
    tied_to: str | None = None
    site: Site | None = None


def plan_tokens(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    config: LoraConfig,
    saved: Collection[str],
    adapted: Mapping[str, str],
) -> tuple[Tokens, ...]:
    """Work out which rows train.

    Args:
        model: the base model, adapted already or not.
        modules: its modules by their names in the base model.
        config: the configuration.
        saved: names of modules that train fully.
        adapted: name of each module that gets factors → its variant.

    Raises:
        TargetError: a module is not there, has no such rows, or trains otherwise already. Nothing was changed.
    """
    if config.trainable_token_indices is None:
        return ()
    wanted = _by_name(model, modules, config)
    tied = _tied(model, config, wanted)
    engines = Engines(model)
    found = [_one(name, modules[name], indices, engines) for name, indices in wanted.items() if name not in tied]
    known = {tokens.name: tokens for tokens in found}
    for name, source in tied.items():
        found.append(_one(name, modules[name], known[source].indices, engines, tied_to=known[source]))
    for tokens in found:
        _refuse_others(tokens, modules[tokens.name], saved, adapted)
    return tuple(found)


def _by_name(model: nn.Module, modules: Mapping[str, nn.Module], config: LoraConfig) -> dict[str, tuple[int, ...]]:
    """Return full name → tokens."""
    given = config.trainable_token_indices
    assert given is not None
    asked = given if isinstance(given, dict) else {_embedding_name(model, modules): given}
    found: dict[str, tuple[int, ...]] = {}
    for ending, indices in asked.items():
        # Without a dot, as PEFT has it: files name what was found, so both must agree.
        names = [name for name in modules if name and name.endswith(ending)]
        if not names and axis_of_stages(model) is None:
            raise TargetError(
                f"Target modules {{{ending!r}}} not found in the base model. Please check the target modules and try "
                f"again. (trainable_token_indices){suggest(ending, [name.rpartition('.')[2] for name in modules])}"
            )
        found |= {name: tuple(indices) for name in names if not is_elsewhere(modules[name])}
    return found


def _embedding_name(model: nn.Module, modules: Mapping[str, nn.Module]) -> str:
    get = getattr(model, "get_input_embeddings", None)
    embedding: nn.Module | None = None if get is None else get()
    if embedding is None:
        return "embed_tokens"
    found = (name for name, module in modules.items() if bare(module) is bare(embedding))
    return next(found, "embed_tokens")


def _tied(model: nn.Module, config: LoraConfig, wanted: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Return the names of modules that take the rows of the embedding, whose weight they share."""
    group = tied_with_embedding(model)
    if group is None:
        if config.ensure_weight_tying:
            warnings.warn(
                "ensure_weight_tying=True but the model does not have tied weights (tie_word_embeddings=False). Weight "
                "tying will not be applied for trainable_token_indices.",
                stacklevel=5,
            )
        return {}
    source, others = group
    named = [name for name in (source, *others) if name in wanted]
    if len({wanted[name] for name in named}) > 1:
        if config.ensure_weight_tying:
            shown = ", ".join(f"{name}: {list(wanted[name])}" for name in named)
            raise TargetError(
                "Cannot ensure weight tying when different token indices are specified for tied layers. Conflicting "
                f"layers: {shown}. Please use the same indices for all tied layers or set ensure_weight_tying=False."
            )
        return {}
    return dict.fromkeys(others, source) if source in wanted else {}


def _one(
    name: str, module: nn.Module, indices: tuple[int, ...], engines: Engines, *, tied_to: Tokens | None = None
) -> Tokens:
    base = bare(module)
    op = op_of(base)
    if op is None or op.kind not in ("Embedding", "Linear") or op.transposed or op.parts(base):
        raise TargetError(
            f"{name}: trainable_token_indices cannot be applied to modules of type {type(base)}; rows of embeddings "
            "and of linear layers can train"
        )
    weight = getattr(base, op.weight_name)
    if not weight.is_floating_point() or weight.dtype.itemsize < 2:
        raise TargetError(f"{name}: trainable_token_indices needs a floating-point weight, not {weight.dtype}")
    if getattr(base, "max_norm", None) is not None or getattr(base, "scale_grad_by_freq", False):
        raise TargetError(f"{name}: trainable_token_indices is not supported with max_norm or scale_grad_by_freq")
    site = op.place(engines, name, base)
    role = op.roles_weight[0]
    rows = weight.shape[0] if site is None else site.layout.sizes[role]
    if beyond := [token for token in indices if token >= rows]:
        raise TargetError(f"{name}: trainable_token_indices {beyond[:5]} are not among its {rows} rows")
    made = Tokens(name, base, op, indices, None if tied_to is None else tied_to.name, site)
    if tied_to is not None:
        _need_same_columns(made, tied_to)
    return made


def _need_same_columns(tokens: Tokens, source: Tokens) -> None:
    mine, theirs = (
        at_rest(getattr(one.base, one.op.weight_name).detach()).local.shape[1]
        if one.site is None
        else one.site.layout.held(one.op.roles_weight[1], one.site.layout.sizes[one.op.roles_weight[1]], one.site.at)
        for one in (tokens, source)
    )
    if mine != theirs:
        raise LayoutError(f"{tokens.name}: has other columns on this rank than {source.name}, whose rows it shares")


def _refuse_others(tokens: Tokens, module: nn.Module, saved: Iterable[str], adapted: Mapping[str, str]) -> None:
    name = tokens.name
    if name in saved or isinstance(module, ModulesToSaveWrapper):
        short = name.rpartition(".")[2]
        raise TargetError(
            "The embedding layer is already marked to be trained fully, either specify "
            f'`modules_to_save=[..., "{short}", ...]` or `trainable_token_indices={{"{short}": x}}` but not both. '
            f"({name})"
        )
    inner = module.token_adapter.base_layer if isinstance(module, TrainableTokensWrapper) else module
    if tokens.op.lookup and (name in adapted or isinstance(inner, LoraLayer)):
        raise TargetError(
            f"{name}: trainable_token_indices cannot be applied to modules of type lora.Embedding: a module's rows "
            "train or it has factors; leave it out of target_modules"
        )
    if adapted.get(name):
        raise TargetError(f"{name}: {adapted[name]} is not supported where rows train (trainable_token_indices)")


def refuse_factors(name: str, module: nn.Module, op: Op) -> None:
    """Refuse factors on an embedding of which rows train for another adapter.

    Raises:
        TargetError: names the module.
    """
    if isinstance(module, TrainableTokensWrapper) and op.lookup:
        raise TargetError(
            f"{name}: rows of it train for another adapter (trainable_token_indices); it cannot have factors too"
        )


__all__ = ["Tokens", "plan_tokens", "refuse_factors"]
