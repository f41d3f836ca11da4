"""What an adapter will be put into: worked out, and checked, before anything of the model is changed."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from lorica.config import AdapterSpec, LoraConfig, TaskType
from lorica.engines import Engines, Site, fsdp
from lorica.engines.megatron.models import is_megatron
from lorica.engines.names import submodule
from lorica.engines.registry import is_in_pieces, prepare
from lorica.engines.stages import has_others, is_elsewhere
from lorica.errors import LayoutError, TargetError, suggest
from lorica.init import find, subtracts
from lorica.layers import LoraLayer, ModulesToSaveWrapper, TrainableTokensWrapper
from lorica.ops import Op, op_of, op_of_parameter, part_names, supported_layers
from lorica.storage import Packed, kind_of, stored_weight
from lorica.targets.defaults import DEFAULT_TARGETS
from lorica.targets.divided import check_experts_alike, is_routed_expert
from lorica.targets.experts import has_experts, share_among_experts
from lorica.targets.explain import endings, explain_no_match, warn_of_idle_entries
from lorica.targets.match import (
    Names,
    excluded,
    excluding,
    matches,
    selected,
    selecting,
    shortest_names,
)
from lorica.targets.parameters import Found, find_parameters, spec_per_expert
from lorica.targets.specs import Specs
from lorica.targets.tokens import Tokens, plan_tokens, refuse_factors
from lorica.targets.walk import bare, base_modules, tied_with_embedding
from lorica.variants import VARIANTS, variant_of

#: Heads that a task trains fully; a model has one of them.
TASK_HEADS: dict[TaskType, tuple[str, ...]] = {
    TaskType.SEQ_CLS: ("classifier", "score"),
    TaskType.TOKEN_CLS: ("classifier", "score"),
    TaskType.QUESTION_ANS: ("qa_outputs",),
}


_CONTAINERS = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)


@dataclass(frozen=True)
class Target:
    """One base layer that gets factors.

    Attributes:
        name: full name in the base model; of a bare parameter, the parameter's.
        base: the base layer.
        op: its mathematics.
        spec: rank, scale and the rest.
        tied_to: name of the embedding whose factors it uses, if it has none of its own.
        site: where it lies among the ranks; None on one process.
        seed_name: the name that seeds its factors, where that is another one.
    """

    name: str
    base: nn.Module
    op: Op
    spec: AdapterSpec
    tied_to: str | None = None
    site: Site | None = None
    seed_name: str = ""


@dataclass(frozen=True)
class Plan:
    """Everything an adapter will be put into.

    Attributes:
        names: the target names as they go into the configuration, with shorthands resolved.
        targets: in the order of the model; tied ones last.
        saved: full names of the modules to train fully → None, or the name of the one whose weight each shares.
        fan_in_fan_out: whether the adapted weights are stored ``[in, out]``.
        tokens: modules of which rows train; tied ones last.
    """

    names: Names | None
    targets: tuple[Target, ...]
    saved: dict[str, str | None]
    fan_in_fan_out: bool
    tokens: tuple[Tokens, ...] = ()


def make_plan(model: nn.Module, config: LoraConfig, *, exactly: Collection[str] | None = None) -> Plan:
    """Work out where the adapter goes.

    Args:
        model: the base model, adapted already or not.
        config: the configuration.
        exactly: full names of the targets, instead of what the configuration says.

    Raises:
        TargetError: nothing matches, a match cannot be adapted, or a layer cannot have the spec. Nothing was changed.
    """
    prepare(model)
    modules = dict(base_modules(model))
    names = set(exactly) if exactly is not None else resolve_names(model, modules, config)
    group = tied_with_embedding(model, modules)
    staged = has_others(model)  # then what is named may lie on another rank
    saved, names, tied = _tying(group, modules, config, names, staged=staged)
    fused = {} if config.fused_as_one else _parts(modules)
    chosen = _chosen(config, names, modules, fused)
    whole = tuple(f"{name}." for name in saved)
    chosen = [key for key in chosen if key not in tied and not f"{key}.".startswith(whole)]
    if not chosen and not config.target_parameters and not staged:
        explain_no_match(config, names, modules)
    if not staged:
        warn_of_idle_entries(config, names, [name for key in modules for name in (key, *fused.get(key, ()))])
    chosen = _without_attention_inside(chosen, modules)
    specs = Specs(config)
    targets = [target for key in chosen for target in _targets_at(key, modules[key], config, names, specs)]
    targets += _parameter_targets(modules, config, chosen, whole, specs)
    by_name = {target.name: target for target in targets}
    for key, source in tied.items():
        targets.append(_tied_target(key, modules[key], by_name[source]))
    _check_variant(targets)
    _check_start(group, config, targets)
    _check_copies(model, saved)
    _warn_of_no_megatron(config, targets)
    tokens = plan_tokens(model, modules, config, saved, {target.name: target.spec.variant for target in targets})
    placed = share_among_experts(_placed(model, targets), config, elsewhere=staged and has_experts(model))
    _check_unmergeable(config, placed)
    return Plan(names, placed, saved, _orientation(config, targets), tokens)


def _check_copies(model: nn.Module, saved: Iterable[str]) -> None:
    saved = list(saved)
    sharded = fsdp.managed(model) if saved else set()
    for name in saved:
        if any(id(parameter) in sharded for parameter in submodule(model, name).parameters()):
            raise LayoutError(
                f"{name}: modules_to_save trains a copy, and what fully_shard manages cannot be copied; add the "
                "adapter first and call fully_shard then"
            )


def _check_variant(targets: Iterable[Target]) -> None:
    for target in targets:
        VARIANTS[target.spec.variant].check(target.op, target.base, target.spec, target.name)
        if target.spec.variant and target.tied_to is not None:
            raise TargetError(f"{target.name}: ensure_weight_tying=True is not supported with {target.spec.variant}")


def _check_start(group: tuple[str, list[str]] | None, config: LoraConfig, targets: Sequence[Target]) -> None:
    shared = [] if group is None else [group[0], *group[1]]
    causes = {op: changes_base(config, op) for op in {target.op for target in targets}}
    for target in targets:
        if target.tied_to is None and (cause := causes[target.op]):
            if target.name in shared:
                raise TargetError(
                    f"{target.name}: {cause} changes the base weight, which "
                    f"{[name for name in shared if name != target.name]} would see; untie the model's weights first"
                )
            weight = stored_weight(target.base, target.op.weight_name)
            if isinstance(weight, Packed) and weight.refusal:
                raise TargetError(
                    f"{target.name}: {cause} changes the base weight, which is stored as {weight.kind}: "
                    f"{weight.refusal}"
                )
            if not weight.is_floating_point():
                raise TargetError(f"{target.name}: {cause} needs a floating-point base weight")
            init = find(config.init_lora_weights)
            if isinstance(weight, Packed) and init is not None and init.leaves is not None:
                raise TargetError(
                    f"{target.name}: {cause} quantises the base weight, which is stored as {weight.kind} already; "
                    "start by default and call lorica.replace_lora_weights_loftq then"
                )


def _check_unmergeable(config: LoraConfig, targets: Iterable[Target]) -> None:
    for target in targets:
        if target.site is not None and target.site.unmergeable and (cause := changes_base(config, target.op)):
            raise TargetError(f"{target.name}: {cause} changes the base weight: {target.site.unmergeable}")


def changes_base(config: LoraConfig, op: Op) -> str:
    """Return what makes an adapter take something out of the base weight of a layer for good; empty: nothing does."""
    if VARIANTS[variant := variant_of(config)].subtracts:
        return variant
    starts = subtracts(config.init_lora_weights, lookup=op.lookup)
    return f"init_lora_weights={config.init_lora_weights!r}" if starts else ""


def _chosen(config: LoraConfig, names: Names, modules: dict[str, nn.Module], fused: dict[str, list[str]]) -> list[str]:
    """Return the names of the modules that are meant, themselves or by a projection that is fused in them."""
    is_selected, is_excluded = selecting(config, names), excluding(config)

    def is_meant(name: str) -> bool:
        return is_selected(name) and not is_excluded(name)

    check_experts_alike(modules, fused, is_meant)
    found = [key for key in modules if key and (is_meant(key) or (key in fused and any(map(is_meant, fused[key]))))]
    return [key for key in found if not (is_elsewhere(modules[key]) or is_in_pieces(modules[key]))]


def _parts(modules: dict[str, nn.Module]) -> dict[str, list[str]]:
    """Return the names of the projections that are fused in modules, by the names of those that have some."""
    found = ((key, part_names(key, bare(module))) for key, module in modules.items())
    return {key: names for key, names in found if names}


def _spec_of_parts(config: LoraConfig, names: Names, key: str, base: nn.Module, specs: Specs) -> AdapterSpec:
    """Return the spec of a layer in which several projections are fused, of which some may be targets."""
    parts = part_names(key, base)
    meant = [name for name in parts if selected(config, names, key) or selected(config, names, name)]
    meant = [name for name in meant if not excluded(config, name)]
    of = {name: specs.of(name) for name in meant}
    spec = of[meant[0]]
    differing = [name for name in meant if of[name] != spec]
    if differing:
        raise TargetError(
            f"{key}: the projections fused in it need the same rank, alpha and options, but rank_pattern, "
            f"alpha_pattern or the variant gives {differing[0]} {_said(of[differing[0]])} and {meant[0]} "
            f"{_said(spec)}; leave them unfused or give them the same"
        )
    return replace(spec, parts=tuple(name.rpartition(".")[2] for name in meant) if meant != parts else ())


def _said(spec: AdapterSpec) -> str:
    options = "" if spec.options is None else f", {spec.options}"
    return f"r={spec.r}, alpha={spec.alpha}{options}"


def _placed(model: nn.Module, targets: Iterable[Target]) -> tuple[Target, ...]:
    engines = Engines(model)
    sites = [(target, target.op.place(engines, target.name, target.base)) for target in targets]
    placed = tuple(target if site is None else replace(target, site=site) for target, site in sites)
    _warn_of_no_way(placed)
    return placed


def _warn_of_no_megatron(config: LoraConfig, targets: Iterable[Target]) -> None:
    if config.megatron_config is not None and not any(is_megatron(target.base) for target in targets):
        warnings.warn("megatron_config changes nothing: no target is a layer of Megatron-Core", stacklevel=4)


def _warn_of_no_way(targets: Iterable[Target]) -> None:
    sites = [target.site for target in targets if target.spec.a2a and target.site is not None]
    asking = [site for site in sites if any(cut.size > 1 for cut in site.layout.cuts)]
    if asking and not any(site.across is not None for site in asking):
        warnings.warn(
            f"a2a_experimental=True changes nothing: none of {len(asking)} adapted layers gathers its rank's tokens, "
            "or leaves each rank its tokens of a sum, by itself; adapters ride on the collectives that are there",
            stacklevel=5,
        )


def _parameter_targets(
    modules: dict[str, nn.Module], config: LoraConfig, chosen: Collection[str], whole: tuple[str, ...], specs: Specs
) -> list[Target]:
    if not config.target_parameters:
        return []
    found = find_parameters(modules, list(config.target_parameters or ()))
    for parameter in found:
        owner = modules[parameter.owner]
        if isinstance(owner, ModulesToSaveWrapper) or f"{parameter.owner}.".startswith(whole):
            raise TargetError(f"{parameter.key}: its module trains fully (modules_to_save); it cannot be adapted too")
        if parameter.owner in chosen:
            raise TargetError(f"{parameter.key}: its module is a target already; leave one of the two out")
    return [_parameter_target(parameter, config, specs) for parameter in found]


def _parameter_target(found: Found, config: LoraConfig, specs: Specs) -> Target:
    op = op_of_parameter(found.module, found.name, shared=config.share_expert_adapters)
    if op is None:
        shape = tuple(found.module._parameters[found.name].shape)  # type: ignore[union-attr]
        raise TargetError(
            f"{found.key}: a parameter of shape {shape} of {type(found.module).__name__} cannot be adapted so. "
            "Supported are matrices, and stacks of one for each expert; other layers are named in target_modules"
        )
    spec = specs.of(found.key)
    if config.normalize_moe_lora and "expert" in op.roles_weight:
        spec = spec_per_expert(spec, found)
    op.check(found.module, spec, found.key)
    own = op_of(found.module) is op
    return Target(found.owner if own else found.key, found.module, op, spec)


def resolve_names(model: nn.Module, modules: dict[str, nn.Module], config: LoraConfig) -> Names:
    """Return the target names with "all-linear" and the architecture's defaults filled in.

    Raises:
        TargetError: the configuration names none and the architecture is not known.
    """
    names = config.target_modules
    if names is None:
        model_type = config_of(model).get("model_type")
        if model_type not in DEFAULT_TARGETS and config.target_parameters:
            return set()
        if model_type not in DEFAULT_TARGETS:
            raise TargetError(
                "Please specify `target_modules` or `target_parameters` in `peft_config`: there is no default for "
                f"model type {model_type!r}.{suggest(str(model_type), DEFAULT_TARGETS)}"
            )
        default = DEFAULT_TARGETS[model_type]
        return default if isinstance(default, str) else set(default)
    if isinstance(names, str) and names.lower() == "all-linear":
        return _all_linear(model, modules, config)
    return names


def config_of(model: nn.Module) -> dict[str, Any]:
    """Return the model's configuration as a dictionary; an empty one where it has none."""
    config = getattr(model, "config", None)
    if config is None:
        return {}
    if hasattr(config, "to_dict"):
        return dict(config.to_dict())
    return dict(config) if isinstance(config, dict) else dict(vars(config))


def _all_linear(model: nn.Module, modules: dict[str, nn.Module], config: LoraConfig) -> set[str]:
    linear = {name for name, module in modules.items() if getattr(_op(module), "kind", None) == "Linear"}
    inside_attention = {
        name for name in linear if isinstance(bare(modules[name.rpartition(".")[0]]), nn.MultiheadAttention)
    }
    output = _output_layer(model, config)
    chosen = {name for name in linear - inside_attention if modules[name] is not output}
    return shortest_names(chosen, modules.keys() - chosen)


def _output_layer(model: nn.Module, config: LoraConfig) -> nn.Module | None:
    get = getattr(model, "get_output_embeddings", None)
    output: nn.Module | None = get() if get is not None else None
    if output is None and config.task_type == TaskType.SEQ_CLS:
        heads = (getattr(model, name, None) for name in ("score", "classifier"))
        output = next((head for head in heads if head is not None), None)
    return output


def _op(module: nn.Module) -> Op | None:
    if isinstance(module, TrainableTokensWrapper):
        return _op(module.original_module)
    return module.op if isinstance(module, LoraLayer) else op_of(module)


def _targets_at(key: str, module: nn.Module, config: LoraConfig, names: Names, specs: Specs) -> list[Target]:
    if isinstance(module, ModulesToSaveWrapper):
        raise TargetError(
            f"{key}: already trained fully by another adapter (modules_to_save); it cannot be adapted too"
        )
    base = bare(module)
    op = op_of(base, fused_as_one=config.fused_as_one) if part_names(key, base) else _op(module)
    if op is None:
        raise TargetError(
            f"Target module {str(module).splitlines()[0]} is not supported. Currently, only the following modules are "
            f"supported: {', '.join(supported_layers())}. It is {key}."
        )
    spec = _spec_of_parts(config, names, key, base, specs) if op.parts(base) else specs.of(key)
    if config.normalize_moe_lora and is_routed_expert(base):
        spec = spec_per_expert(spec, Found(key, base, op.weight_name))
    refuse_factors(key, module, op)
    op.check(base, spec, key)
    targets = [Target(key, base, op, spec)]
    for child_name in op.children:
        child = getattr(base, child_name)
        child_op = _op(child)
        assert child_op is not None
        targets.append(Target(f"{key}.{child_name}", bare(child), child_op, spec))
    if op.children and config.lora_dropout:
        warnings.warn(
            f"{key}: lora_dropout is not applied inside {type(base).__name__}, whose adapter acts on its weights",
            stacklevel=2,
        )
    return targets


def _orientation(config: LoraConfig, targets: list[Target]) -> bool:
    linear = [target for target in targets if target.op.kind == "Linear"]
    found = config.fan_in_fan_out if not linear else any(target.op.transposed for target in linear)
    if found != config.fan_in_fan_out:
        kind = type(linear[0].base).__name__
        warnings.warn(
            f"fan_in_fan_out is set to {config.fan_in_fan_out} but the target module is `{kind}`. Setting "
            f"fan_in_fan_out to {found}.",
            stacklevel=4,
        )
    return found


# ---- tied embeddings ------------------------------------------------------------------------------------------------

_TIED_WARNING = (
    "Model has `tie_word_embeddings=True` and a tied layer is part of the adapter, but `ensure_weight_tying` is not "
    "set to True. The adapted layer then differs from the one it shares its weight with, and merging has to untie them."
)


def _tying(
    group: tuple[str, list[str]] | None,
    modules: dict[str, nn.Module],
    config: LoraConfig,
    names: Names,
    *,
    staged: bool,
) -> tuple[dict[str, str | None], Names, dict[str, str]]:
    """Return the modules to save, the target names and the tied targets, with ``ensure_weight_tying`` carried out."""
    saved: dict[str, str | None] = dict.fromkeys(_saved_modules(config, modules, staged=staged))
    if group is None:
        if config.ensure_weight_tying:
            warnings.warn(
                "You have requested `ensure_weight_tying`, but no tied modules were found in the model", stacklevel=4
            )
        return saved, names, {}
    source, others = group
    members = {source, *others}
    in_saved = members & saved.keys()
    in_targets = {key for key in members if matches(names, key) and not excluded(config, key)}
    if not config.ensure_weight_tying:
        if in_saved or in_targets:
            warnings.warn(_TIED_WARNING, stacklevel=4)
        return saved, names, {}
    if in_saved:
        return {**saved, source: None, **dict.fromkeys(others, source)}, names, {}
    if in_targets:
        return saved, _with_name(names, source), dict.fromkeys(others, source)
    if config.trainable_token_indices is None:
        warnings.warn(
            "You have requested `ensure_weight_tying`, but no tied modules are added in either `modules_to_save` or "
            "`target_modules`",
            stacklevel=4,
        )
    return saved, names, {}


def _with_name(names: Names, name: str) -> Names:
    if matches(names, name):
        return names
    return f"(?:{names}|{name.replace('.', '[.]')})" if isinstance(names, str) else {*names, name}


def _tied_target(key: str, module: nn.Module, source: Target) -> Target:
    op = _op(module)
    if op is None or op.kind != "Linear":
        raise TargetError(
            f"{key}: shares its weight with {source.name} but is no linear layer; it cannot be tied to it"
        )
    return Target(key, bare(module), op, source.spec, tied_to=source.name)


def _saved_modules(config: LoraConfig, modules: dict[str, nn.Module], *, staged: bool) -> list[str]:
    wanted = tuple(config.modules_to_save or ())
    if not wanted:
        return []
    # Without a dot, as PEFT has it: "norm" means "input_layernorm" too. Files name what was saved, so both must agree.
    named = [key for key in modules if key.endswith(wanted)]
    heads = {head for heads in TASK_HEADS.values() for head in heads}
    for name in wanted:
        if name not in heads and not staged and not any(key.endswith(name) for key in named):
            raise TargetError(f"modules_to_save: no module is named {name!r}.{suggest(name, endings(modules))}")
    found = [key for key in named if not is_elsewhere(modules[key])]
    for key in found:
        if isinstance(modules[key], (*_CONTAINERS, LoraLayer, TrainableTokensWrapper)):
            raise TargetError(
                f"{key}: modules_to_save cannot be applied to modules of type {type(modules[key])}; name modules that "
                "have a forward and that no adapter is on"
            )
        _refuse_quantised(key, bare(modules[key]))
    return found


def _refuse_quantised(key: str, module: nn.Module) -> None:
    """Numbers that stand for a weight in another form cannot be trained."""
    for inner in module.modules():
        names = [name for name, parameter in inner._parameters.items() if parameter is not None]
        if kind_of(type(inner)) or any(isinstance(stored_weight(inner, name), Packed) for name in names):
            raise TargetError(
                f"{key}: modules_to_save trains a whole module, and this one's weights are quantised "
                f"({type(inner).__name__}); adapt it with target_modules, or load it without quantisation"
            )


def _without_attention_inside(chosen: list[str], modules: dict[str, nn.Module]) -> list[str]:
    outside = []
    for key in chosen:
        parent = key.rpartition(".")[0]
        if not isinstance(modules.get(parent), nn.MultiheadAttention):
            outside.append(key)
        elif parent not in chosen:
            raise TargetError(
                f"{key}: nn.MultiheadAttention computes from its weights and never calls this layer, so an adapter on "
                f"it would do nothing; target {parent!r}, which adapts its projections together"
            )
    return outside
