"""Putting an adapter into a model, and taking it out again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lorica.adapt.found import (
    AdapterModule,
    adapted,
    adapter_modules,
    adapter_parameters,
    adapters_of,
    base_of,
    lora_layers,
    merged_into,
    switch_of,
    token_layers,
    tokens_among,
    tuner_of,
)
from lorica.adapt.parts import each_part, left_of_parts, taken_of_parts
from lorica.adapt.places import Places, keep_from_fast_path
from lorica.adapt.removal import take_out, unload
from lorica.adapt.rows import first_rows, train_rows
from lorica.adapt.starts import logical_weight, made_by_all_ranks
from lorica.config import AdapterSpec, LoraConfig
from lorica.config.checks import factor_dtype
from lorica.engines import Site
from lorica.engines.kinds import is_distributed
from lorica.engines.names import submodule
from lorica.engines.registry import mark
from lorica.engines.rest import at_rest
from lorica.errors import AdapterError, TargetError
from lorica.init import (
    Factors,
    InitRequest,
    find,
    initialise,
    leftover,
    made_by,
    reads_weight,
    subtracts,
    target_generator,
)
from lorica.init.borrow import borrowing, there
from lorica.init.statistics import Found, forget, kept
from lorica.kernels import draw_seed
from lorica.layers import LoraLayer, ModulesToSaveWrapper, Switch
from lorica.layers.merging import warn_of_starts
from lorica.layers.sharing import introduce
from lorica.ops import FactorShapes, Op
from lorica.storage import Packed, stored_weight
from lorica.targets.plan import Plan, Target, changes_base
from lorica.targets.tokens import Tokens
from lorica.variants import VARIANTS


def inject(
    model: nn.Module,
    plan: Plan,
    config: LoraConfig,
    adapter: str,
    switch: Switch,
    *,
    on_meta: bool = False,
    autocast: bool = True,
) -> None:
    """Put an adapter into ``model`` in place, as ``plan`` says.

    All factors are made before the first module is replaced, so that an initialisation that fails changes nothing.

    Args:
        on_meta: make the factors on the meta device, without values, to be filled from a file.
        autocast: give 16-bit base weights float32 factors.
    """
    with borrowing(config.runtime_config.ephemeral_gpu_offload):
        _inject(model, plan, config, adapter, switch, on_meta=on_meta, autocast=autocast)


def _inject(
    model: nn.Module,
    plan: Plan,
    config: LoraConfig,
    adapter: str,
    switch: Switch,
    *,
    on_meta: bool,
    autocast: bool,
) -> None:
    seed = 0 if on_meta else draw_seed()
    own = [target for target in plan.targets if target.tied_to is None]
    factors = made_by_all_ranks(
        model,
        own,
        partial(_factors, config=config, seed=seed, on_meta=on_meta, autocast=autocast),
        () if on_meta else [target.name for target in own if _starts_from_pieces(target, config)],
    )
    rows = {
        tokens.name: first_rows(tokens, _dtype_of(tokens, config, autocast=autocast), on_meta=on_meta)
        for tokens in plan.tokens
        if tokens.tied_to is None
    }
    taking = [target for target in own if VARIANTS[target.spec.variant].subtracts]
    taking = [target for target in taking if not factors[target.name].b.is_meta]
    in_pieces = [target.name for target in taking if target.site is not None]
    taken = made_by_all_ranks(model, taking, partial(_taken, config=config), in_pieces)
    made = _Made(seed, factors, rows, taken)
    with switch.turns.writing():  # all that others must not see half done
        layers = _put_in(model, plan, config, adapter, switch, made)
    warn_of_starts(layers.values())


class _Made(NamedTuple):
    """What an adapter starts from, made before anything changes.

    Attributes:
        seed: of what variants draw.
        factors: target → its factors.
        rows: module → the rows of it that train.
        taken: target → what a variant takes out of its base weight.
    """

    seed: int
    factors: dict[str, Factors]
    rows: dict[str, Tensor]
    taken: dict[str, Factors]


def _put_in(
    model: nn.Module, plan: Plan, config: LoraConfig, adapter: str, switch: Switch, made: _Made
) -> dict[str, LoraLayer]:
    """Put layers around the targets, and the adapter into them; return them by the targets' names."""
    layers: dict[str, LoraLayer] = {}
    places = Places(model)
    _refuse_merged(places, plan, config)
    for target in plan.targets:
        layer = _layer_at(target, places, switch)
        if layer.start_error is not None:
            layer.start_error = None
        layers[target.name] = layer
        if target.tied_to is None:
            _fill_layer(layer, target, config, adapter, made)
        else:
            layer.tie_adapter(adapter, target.spec, layers[target.tied_to])
    _mark(layers.values(), adapter)
    _save_whole(model, plan, adapter, switch, places)
    train_rows(model, plan.tokens, made.rows, adapter, switch, places)
    keep_from_fast_path(places)
    introduce(layers.values())
    return layers


def _fill_layer(layer: LoraLayer, target: Target, config: LoraConfig, adapter: str, made: _Made) -> None:
    """Give a layer its factors, and take out of the base weight what they start from."""
    factors = made.factors[target.name]
    starts = subtracts(config.init_lora_weights, lookup=target.op.lookup)
    left = _left(target, config) if starts and not factors.b.is_meta else None
    if left is not None:
        layer.rewrite(adapter, left)
    layer.add_adapter(adapter, target.spec, factors, subtract=starts and left is None, seed=made.seed)
    if target.name in made.taken:
        layer.subtract(adapter, made.taken[target.name], 1.0)
    elif VARIANTS[target.spec.variant].subtracts:
        layer.owed.add(adapter)
    _used_up(target, config, factors)


def _mark(layers: Iterable[LoraLayer], adapter: str) -> None:
    """Note on new factors what the training loop of their layer's engine has to know of them."""
    for layer in layers:
        if layer.site is None or adapter in layer.tied:
            continue
        base = layer.get_base_layer()
        live = layer.factor_names(adapter).values()
        for name, roles in zip(live, layer.factor_roles(adapter), strict=True):
            owner, _, leaf = name.rpartition(".")
            if isinstance(parameter := getattr(layer.get_submodule(owner), leaf), nn.Parameter):
                mark(base, layer.site, parameter, roles)


def prepare_to_fill(model: nn.Module, adapter: str, config: LoraConfig) -> None:
    """Prepare for factors from a file.

    What the adapter's start took out of the base weights where it was trained is taken out here, so that the file
    means the same model: for factors on the meta device, whose start was not made yet. What variants kept is forgotten.
    """
    layers = lora_layers(model)
    for layer in layers:
        layer.notes.clear()
    if owing := [layer for layer in layers if adapter in layer.owed]:
        with borrowing(config.runtime_config.ephemeral_gpu_offload):
            _take_starts(owing, adapter, config)


def _take_starts(owing: Sequence[LoraLayer], adapter: str, config: LoraConfig) -> None:
    targets = [target_at(layer, adapter) for layer in owing]
    starts: list[Factors | None] = []
    for layer, target in zip(owing, targets, strict=True):
        if VARIANTS[target.spec.variant].subtracts:
            starts.append(_taken(target, config=config))
            continue
        rewritten = leaves_of(config) is not None  # then the factors in the file say nothing of the weight
        dtype = layer.factors(adapter).b.dtype
        starts.append(None if rewritten else _start(target, config, 0, layer.stored.device, dtype))
    for layer, target, start in zip(owing, targets, starts, strict=True):
        layer.start_error = None
        left = _left(target, config) if start is None else None
        if start is not None:
            layer.subtract(adapter, start, 1.0 if VARIANTS[target.spec.variant].subtracts else None)
            _used_up(target, config, start)
        elif left is not None:
            layer.rewrite(adapter, left)
    warn_of_starts(owing)


def target_at(layer: LoraLayer, adapter: str) -> Target:
    """Return an adapted layer as the target it was for one of its adapters."""
    return Target(layer.target_name, layer.get_base_layer(), layer.op, layer.specs[adapter], site=layer.site)


def leaves_of(config: LoraConfig) -> Callable[[InitRequest], Tensor] | None:
    """Return what makes the base weight anew for a configuration's initialisation, where that is not subtracting."""
    found = find(config.init_lora_weights)
    return None if found is None else found.leaves


def _left(target: Target, config: LoraConfig) -> Tensor | None:
    """Return what this rank computes with of the base weight that an initialisation leaves; None: it subtracts."""
    if leaves_of(config) is None:
        return None
    request, op, site = _request(target, config, 0), target.op, target.site
    parts = op.parts(target.base)
    fused = left_of_parts(config, request, parts, target.spec) if parts else None
    left = fused if parts else leftover(config.init_lora_weights, request)
    if left is None:
        return None
    return op.orient(left) if site is None else site.layout.take(op.orient(left), op.roles_weight, site.at)


def _taken(target: Target, weight: Tensor | None = None, *, config: LoraConfig) -> Factors:
    """Return what a variant takes out of the base weight, as this rank's plain factors (scale 1)."""
    request, op, site = _request(target, config, 0, weight), target.op, target.site
    take, parts, roles = VARIANTS[target.spec.variant].taken, op.parts(target.base), (op.roles_a, op.roles_b)
    if "expert" in op.roles_weight and not request.experts:  # one adapter for all, but each has a weight of its own
        count = len(op.logical_weight(target.base)) if site is None else site.layout.sizes["expert"]
        shapes = (torch.Size((count, *request.shape_a)), torch.Size((count, *request.shape_b)))
        request = replace(request, experts=count, shape_a=shapes[0], shape_b=shapes[1])
        roles = (("expert", *op.roles_a), ("expert", *op.roles_b))
    made = taken_of_parts(take, request, parts, target.spec) if parts else made_by(take, request)
    if site is None:
        return made
    return Factors(site.layout.take(made.a, roles[0], site.at), site.layout.take(made.b, roles[1], site.at))


def _used_up(target: Target, config: LoraConfig, made: Factors) -> None:
    """Forget what calibration found out, now that the adapter has started from it."""
    found = find(config.init_lora_weights)
    if found is not None and found.needs and not made.b.is_meta:
        forget(target.base, target.op.weight_name, found.needs)


def _refuse_merged(places: Places, plan: Plan, config: LoraConfig) -> None:
    for target in plan.targets:
        layer = places.layer_at(target)
        if layer is not None and layer.merged and (cause := changes_base(config, target.op)):
            raise AdapterError(
                f"{target.name}: {cause} changes the base weight, which has {layer.merged_adapters} merged into it; "
                "unmerge first"
            )


def check_adapter_name(name: Any) -> None:
    """Refuse a name that cannot be part of a parameter's name.

    Raises:
        AdapterError: the name is empty, holds a dot, or is an attribute of torch's containers.
    """
    if not isinstance(name, str) or not name or "." in name:
        raise AdapterError(f"adapter name {name!r}: a name is a non-empty string without dots")
    if hasattr(nn.ModuleDict(), name) or hasattr(nn.ParameterDict(), name) or name == "__base__":
        raise AdapterError(f"adapter name {name!r} is reserved; choose another")


def _starts_from_pieces(target: Target, config: LoraConfig) -> bool:
    """Whether factors start from a base weight of which this rank has a part."""
    reads = reads_weight(config.init_lora_weights, lookup=target.op.lookup)
    return reads and target.site is not None and stored_weight(target.base, target.op.weight_name).device.type != "meta"


def _factors(
    target: Target, weight: Tensor | None = None, *, config: LoraConfig, seed: int, on_meta: bool, autocast: bool
) -> Factors:
    stored = stored_weight(target.base, target.op.weight_name)
    here = at_rest(stored.detach()).local if is_distributed(stored) else stored
    dtype = _factor_dtype(here, config, autocast=autocast)
    device = torch.device("meta") if on_meta else here.device
    if device.type == "meta":
        shapes = logical_shapes(target.op, target.base, target.spec, target.site, target.name)
        empty = partial(torch.empty, dtype=dtype, device=device)
        bias = empty(shapes.b[:1]) if target.spec.bias else None
        return _slices(Factors(empty(shapes.a), empty(shapes.b), bias), target)
    return _start(target, config, seed, device, dtype, weight)


def _start(
    target: Target,
    config: LoraConfig,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
    weight: Tensor | None = None,
) -> Factors:
    request, parts = _request(target, config, seed, weight), target.op.parts(target.base)
    drawn = each_part(config, request, parts, target.spec, seed, _found(target, config)) if parts else None
    made = _slices(drawn or initialise(config.init_lora_weights, request), target)
    # Fully-sharded parallelism wants parameters without gaps.
    return made.map(lambda tensor: tensor.to(device, dtype).contiguous())


def _request(target: Target, config: LoraConfig, seed: int, weight: Tensor | None = None) -> InitRequest:
    op, site, init = target.op, target.site, find(config.init_lora_weights)
    shapes = logical_shapes(op, target.base, target.spec, site, target.name)
    seeded_by = target.seed_name or target.name
    return InitRequest(
        target=seeded_by,
        r=target.spec.r,
        scaling=target.spec.scaling,
        shape_a=shapes.a,
        shape_b=shapes.b,
        bias=target.spec.bias,
        lookup=op.lookup,
        generator=target_generator(seed, seeded_by),
        weight=lambda: there(logical_weight(op, target.base, site) if weight is None else weight),
        experts=shapes.a[0] if op.roles_a[0] == "expert" else 0,
        options=getattr(config, init.options) if init is not None and init.options else None,
        found=_found(target, config).get("", {}) if init is not None and init.needs else {},
    )


def _found(target: Target, config: LoraConfig) -> Found:
    """Return what calibration found out about a target for its initialisation."""
    init = find(config.init_lora_weights)
    return {} if init is None or not init.needs else kept(target.base, target.op.weight_name, init.needs)


#: A rank that is taken even where no delta of that weight can have it.
_ANY_RANK = 4096


def logical_shapes(op: Op, base: nn.Module, spec: AdapterSpec, site: Site | None, where: str = "") -> FactorShapes:
    """Return the shapes of A and B as they are in a file, whatever part of the base layer is here.

    Raises:
        TargetError: the rank is more than a matrix of this size has; factors of it could fill the memory.
    """
    shapes = op.factor_shapes(base, spec.r)
    if site is not None:
        sizes = site.layout.sizes
        whole = (
            torch.Size(sizes.get(role, length) for role, length in zip(roles, shape, strict=True))
            for roles, shape in ((op.roles_a, shapes.a), (op.roles_b, shapes.b))
        )
        shapes = FactorShapes(*whole)
    matrices = spec.r * (shapes.a[0] if op.roles_a[0] == "expert" else 1)
    most = min(shapes.a.numel(), shapes.b.numel()) // matrices
    if spec.r > max(most, _ANY_RANK):
        raise TargetError(f"{where}: r={spec.r} (or rank_pattern) of a weight whose rank is {most} at most")
    return VARIANTS[spec.variant].shapes(shapes, op, spec, where)


def _slices(factors: Factors, target: Target) -> Factors:
    op, site = target.op, target.site
    if site is None:
        return factors
    roles = (*VARIANTS[target.spec.variant].roles(op, target.spec), op.roles_bias)
    mine = (site.layout.take(tensor, role, site.at) for tensor, role in zip(factors.tensors(), roles, strict=False))
    return factors.renewed(mine)


def _dtype_of(tokens: Tokens, config: LoraConfig, *, autocast: bool) -> torch.dtype:
    weight = getattr(tokens.base, tokens.op.weight_name)
    return _factor_dtype(at_rest(weight.detach()).local, config, autocast=autocast)


def _factor_dtype(weight: Tensor | Packed, config: LoraConfig, *, autocast: bool) -> torch.dtype:
    if (chosen := factor_dtype(config)) is not None:
        return chosen
    if not weight.dtype.is_floating_point or weight.dtype.itemsize == 1:
        return torch.float32
    return torch.float32 if autocast and weight.dtype.itemsize == 2 else weight.dtype


def _layer_at(target: Target, places: Places, switch: Switch) -> LoraLayer:
    def make(inside: nn.Module) -> LoraLayer:
        layer = LoraLayer(inside, target.op, switch, target.name, target.site)
        layer.__dict__["training"] = target.base.training  # past nn.Module.__setattr__
        return layer

    return places.layer_at(target) or places.stand_around(target, make)


def _save_whole(model: nn.Module, plan: Plan, adapter: str, switch: Switch, places: Places) -> None:
    wrappers: dict[str, ModulesToSaveWrapper] = {}
    for name, source in sorted(plan.saved.items(), key=lambda item: item[1] is not None):
        module = submodule(model, name)
        if not isinstance(module, ModulesToSaveWrapper):
            wrapper = ModulesToSaveWrapper(module, switch, name)
            wrapper.training = module.training
            places.put(module, wrapper)
            module = wrapper
        module.add_adapter(adapter, wrappers[source].modules_to_save[adapter] if source else None)
        wrappers[name] = module


__all__ = [
    "AdapterModule",
    "adapted",
    "adapter_modules",
    "adapter_parameters",
    "adapters_of",
    "base_of",
    "check_adapter_name",
    "inject",
    "leaves_of",
    "logical_shapes",
    "logical_weight",
    "lora_layers",
    "merged_into",
    "prepare_to_fill",
    "switch_of",
    "take_out",
    "target_at",
    "token_layers",
    "tokens_among",
    "tuner_of",
    "unload",
]
