"""What an adapter will be put into: worked out, and checked, before anything of the model is changed."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace

from torch import nn

from lorica.config import AdapterSpec, LoraConfig
from lorica.config.expressions import one_search
from lorica.engines import Engines, Site
from lorica.engines.megatron.models import is_megatron
from lorica.engines.registry import is_in_pieces, prepare
from lorica.engines.stages import has_others, is_elsewhere
from lorica.errors import TargetError
from lorica.init import find, subtracts
from lorica.layers import ModulesToSaveWrapper
from lorica.ops import Op, op_of, op_of_parameter, part_names, supported_layers
from lorica.storage import Packed, stored_weight
from lorica.targets.divided import check_experts_alike, is_routed_expert
from lorica.targets.experts import has_experts, share_among_experts
from lorica.targets.explain import explain_no_match, warn_of_idle_entries
from lorica.targets.match import Names, excluded, excluding, selected, selecting
from lorica.targets.parameters import Found, find_parameters, spec_per_expert
from lorica.targets.resolve import resolve_names
from lorica.targets.saved import check_copies
from lorica.targets.specs import Specs
from lorica.targets.tied import tying
from lorica.targets.tokens import Tokens, plan_tokens, refuse_factors
from lorica.targets.walk import bare, base_modules, op_at, tied_with_embedding
from lorica.variants import VARIANTS, variant_of


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


@one_search()
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
    saved, names, tied = tying(group, modules, config, names, staged=staged)
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
    check_copies(model, saved)
    _warn_of_no_megatron(config, targets)
    tokens = plan_tokens(model, modules, config, saved, {target.name: target.spec.variant for target in targets})
    placed = share_among_experts(_placed(model, targets), config, elsewhere=staged and has_experts(model))
    _check_unmergeable(config, placed)
    return Plan(names, placed, saved, _orientation(config, targets), tokens)


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


def _targets_at(key: str, module: nn.Module, config: LoraConfig, names: Names, specs: Specs) -> list[Target]:
    if isinstance(module, ModulesToSaveWrapper):
        raise TargetError(
            f"{key}: already trained fully by another adapter (modules_to_save); it cannot be adapted too"
        )
    base = bare(module)
    op = op_of(base, fused_as_one=config.fused_as_one) if part_names(key, base) else op_at(module)
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
        child_op = op_at(child)
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


def _tied_target(key: str, module: nn.Module, source: Target) -> Target:
    op = op_at(module)
    if op is None or op.kind != "Linear":
        raise TargetError(
            f"{key}: shares its weight with {source.name} but is no linear layer; it cannot be tied to it"
        )
    return Target(key, bare(module), op, source.spec, tied_to=source.name)


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
