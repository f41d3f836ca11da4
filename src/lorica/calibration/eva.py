"""EVA's statistics: in which directions the inputs of each layer vary most (https://arxiv.org/abs/2410.07170).

The second moments of the inputs are streamed, so every batch costs one product per distinct input, and the directions
are worked out after 1, 2, 4, 8 … batches. They have settled when the last of these batches alone would have moved none
of them by more than the cosine ``tau``; at the end of the data they are those of all of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sized
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lorica.adapt.inject import base_of, switch_of
from lorica.calibration import over_ranks
from lorica.calibration.inputs import (
    LayerInputs,
    PerLayer,
    device_of,
    forward_fn_dict,
    made_of,
    prepare_layer_inputs_fn_language_modeling,
    prepare_model_inputs_fn_language_modeling,
    shape_of,
)
from lorica.calibration.moments import Directions, Stream, stream_for
from lorica.calibration.redistribute import load_eva
from lorica.calibration.shares import Claim, shared_out
from lorica.calibration.watch import Watch, adapted_targets, adapters_off, mode, targets_of
from lorica.config import LoraConfig
from lorica.config.options import EvaConfig
from lorica.errors import AdapterError, ConfigError
from lorica.targets import make_plan
from lorica.targets.plan import Target

#: Above this, rho says "any rank".
_ANY_RHO = 1000.0

Forward = Callable[[nn.Module, Any], Any]
ModelInputs = Callable[[Any, LoraConfig], Any]


class _Eva:
    """The statistics of one call.

    Args:
        targets: with their names in the model.
        config: rank of each, and the options.
        layer_inputs: which rows of their inputs count.
        everyone: whether ranks of which nothing is known bring batches of their own.
    """

    def __init__(
        self, targets: list[tuple[str, Target]], config: LoraConfig, layer_inputs: PerLayer, *, everyone: bool
    ) -> None:
        self.names = {target.name: name for name, target in targets}
        self.targets = {target.name: target for _, target in targets}
        self.options: EvaConfig = config.eva_config or EvaConfig()
        self.model_input: Any = None
        self.shape: tuple[int, ...] = ()
        self.ranks: dict[str, int] = {}
        self.settled: dict[str, bool] = {}
        self._layer_inputs = layer_inputs
        self.everyone = everyone
        self._streams: dict[str, Stream] = {}
        self._directions: dict[str, Directions] = {}
        self._features = {name: _features(target) for name, target in self.targets.items()}
        self._most = {name: self._most_of(target) for name, target in self.targets.items()}
        # Whoever else is given an input is not known yet: the most that any layer may ask for.
        self._widest = max(self._most.values())
        self._looked = 0
        self.watch = Watch(self.targets.values(), self._record, lambda target: id(self._function(target)))

    def _function(self, target: Target) -> LayerInputs:
        return self._layer_inputs.of(self.names[target.name])

    def _most_of(self, target: Target) -> int:
        """Return the largest rank that a layer can get."""
        features = self._features[target.name]
        return features if self.options.rho > _ANY_RHO else min(round(target.spec.r * self.options.rho), features)

    def _record(self, target: Target, x: Tensor, y: Tensor) -> Tensor:
        if self.watch.leads(target):
            # Whole tokens for the caller's function; the features of the rows that it picks are gathered afterwards.
            pick, tokens = self._function(target), over_ranks.whole_tokens(x, target.site)
            listed = pick is prepare_layer_inputs_fn_language_modeling and tokens.dim() != 3
            if listed and tokens.shape[:-1].numel() == math.prod(self.shape):
                tokens = tokens.reshape(*self.shape, -1)  # all tokens in one list (a mixture's), or under a head
            rows = pick((tokens,), self.model_input, self.names[target.name])
            rows = over_ranks.whole_features(rows, target.site)
            if target.name not in self._streams:
                self._streams[target.name] = stream_for(self._features[target.name], self._wanted(target), rows.device)
            self._streams[target.name].add(rows)
        return y

    def _wanted(self, target: Target) -> int:
        return min(self._widest, self._features[target.name])

    def look(self, seen: int) -> bool:
        """Work out the directions of what was seen so far; return whether all that are needed have settled.

        Args:
            seen: how many batches that was.
        """
        before, self._directions = self._directions, {}
        unseen = [name for name in self.targets if self.watch.leader.get(name) not in self._streams]
        if unseen:
            raise AdapterError(f"{unseen[0]}: no batch reached this layer, so nothing says how it should start")
        for name, stream in self._streams.items():
            target = self.targets[name]
            groups = over_ranks.data_groups(target.site, everyone=self.everyone)
            self._directions[name] = stream.directions(self._wanted(target), name, groups)
        claims = {name: self._claim(target) for name, target in self.targets.items()}
        self.ranks = shared_out(over_ranks.told(claims, everyone=self.everyone))
        # Directions move by the root of 1/m - 1/n from m batches to n. tau speaks of a step from n - 1 to n.
        steps = (seen - self._looked) * (seen - 1) / max(1, self._looked)
        self.settled = {
            name: self._has_settled(name, before, 1 - (1 - self.options.tau) * steps) for name in self.targets
        }
        self._looked = seen
        return all(self.settled.values())

    def _claim(self, target: Target) -> Claim:
        leader = self.watch.leader[target.name]
        squares, _, total, _ = self._directions[leader]
        explained = (squares.double() / max(total, torch.finfo(torch.float32).tiny)).tolist()
        return Claim(target.spec.r, self._most[target.name], leader, explained, len(target.op.parts(target.base)) or 1)

    def _has_settled(self, name: str, before: Mapping[str, Directions], least: float) -> bool:
        leader = self.watch.leader[name]
        if leader not in before:
            return False
        needed = self.ranks[name]
        old, new = before[leader].vectors[:needed], self._directions[leader].vectors[:needed]
        if len(old) < len(new):
            return False
        return bool(((old * new).sum(1) >= least).all())

    def result(self) -> dict[str, Tensor]:
        """Return the rows that A starts with, ``[rank, in]``, by the layers' names in the model."""
        found = {}
        for name, target in self.targets.items():
            directions, rank = self._directions[self.watch.leader[name]], self.ranks[name]
            if rank > max(directions.rows - 1, 0):
                raise ConfigError(
                    f"{name}: {directions.rows} rows of its input have fewer directions than the rank {rank} that it "
                    "is to get; give more data, or choose a smaller rank or rho (check the label mask, too)"
                )
            rows = directions.vectors[:rank]
            if self.options.whiten:
                rows = rows / directions.squares[:rank].sqrt().sqrt().unsqueeze(1)
            agreed = over_ranks.agreed({"rows": rows.clone()}, target.site, everyone=self.everyone)
            found[self.names[name]] = agreed["rows"]
        return found


def _features(target: Target) -> int:
    site = target.site
    if site is not None:
        return site.layout.sizes["in"]
    return int(target.op.logical_shape(target.base)[1])


def _prepared(
    model: nn.Module, peft_config: LoraConfig | None, adapter: str
) -> tuple[LoraConfig, list[tuple[str, Target]]]:
    """Return the configuration and the layers to look at, with their names in the model."""
    configs = getattr(base_of(model), "peft_config", None)
    if configs is None:
        if peft_config is None:
            raise AdapterError("peft_config is required if model is not a PeftModel")
        return peft_config, [(target.name, target) for target in targets_of(make_plan(model, peft_config))]
    if adapter not in configs:
        raise AdapterError(f"adapter {adapter!r} does not exist; there are {list(configs)}")
    return peft_config or configs[adapter], adapted_targets(model, adapter)


@torch.no_grad()
def get_eva_state_dict(
    model: nn.Module,
    dataloader: Iterable[Any],
    peft_config: LoraConfig | None = None,
    forward_fn: Forward = forward_fn_dict,
    prepare_model_inputs_fn: ModelInputs | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: LayerInputs | Mapping[str, LayerInputs] | None = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> dict[str, Tensor]:
    """Find the directions in which the inputs of each layer vary most, and share the ranks out anew.

    Args:
        model: adapted or not; its adapters are off meanwhile. It may be cut by any engine; then every rank calls.
        dataloader: batches. They are gone through once at most, and no further than the directions have settled.
        peft_config: needed where the model is not adapted.
        forward_fn: runs the model on a batch.
        prepare_model_inputs_fn: makes of a batch (and the configuration) what the next function is given; None: a
            copy of the batch.
        prepare_layer_inputs_fn: picks the rows ``[T, in]`` of a layer's input that count, from ``(layer_input,
            model_input, layer_name)``; one for all, or a dictionary by names; None: all rows. A layer that is cut by
            its inputs shows it this rank's features of each row.
        adapter_name: whose layers, where the model is adapted.
        gather_distributed_inputs: where ranks hold whole models: whether they have different batches that belong
            together. How the batches of a divided model lie over its ranks is known from its layout.
        show_progress_bar: on the first rank.

    Returns:
        Name of each layer in ``model`` → the rows of its A, ``[rank, in]``, on the layer's device, in float32.

    Raises:
        ConfigError: there is no data, or not enough for a rank; or a function is given for a layer that is not there.
        AdapterError: there is no configuration, or no batch reached a layer.
    """
    config, targets = _prepared(model, peft_config, adapter_name)
    if not targets:
        raise AdapterError("EVA looks at the inputs of linear layers, of which none is adapted")
    if isinstance(dataloader, Sized) and len(dataloader) == 0:
        raise ConfigError("dataloader is empty")
    layer_inputs = PerLayer(prepare_layer_inputs_fn, [name for name, _ in targets])
    eva = _Eva(targets, config, layer_inputs, everyone=gather_distributed_inputs)
    shown = show_progress_bar and over_ranks.is_first()
    with ExitStack() as stack:
        stack.enter_context(mode(model, training=False))
        stack.enter_context(adapters_off(model))
        stack.enter_context(eva.watch)
        bar = stack.enter_context(tqdm(total=None, disable=not shown, leave=False, desc="EVA"))
        _run(eva, model, config, dataloader, forward_fn, prepare_model_inputs_fn, bar)
    return over_ranks.of_all_stages(base_of(model), eva.result())


def _run(
    eva: _Eva,
    model: nn.Module,
    config: LoraConfig,
    dataloader: Iterable[Any],
    forward: Forward,
    prepare: ModelInputs | None,
    bar: Any,
) -> None:
    everyone, device, seen, looked = eva.everyone, device_of(model), 0, 0
    for batch in over_ranks.together(dataloader, everyone=everyone):
        inputs, eva.model_input = made_of(batch, prepare, config, device)
        eva.shape = shape_of(inputs)
        forward(model, inputs)
        seen += 1
        if seen == max(1, 2 * looked):
            looked = seen
            all_settled = over_ranks.every(eva.look(seen), everyone=everyone)
            bar.set_description(f"{sum(eva.settled.values())}/{len(eva.settled)} layers have converged")
            if all_settled:
                return
        bar.update()
    if not seen:
        raise ConfigError("dataloader is empty")
    if looked < seen:
        eva.look(seen)


@torch.no_grad()
def initialize_lora_eva_weights(
    model: nn.Module,
    dataloader: Iterable[Any] | None = None,
    eva_state_dict: Mapping[str, Tensor] | None = None,
    forward_fn: Forward = forward_fn_dict,
    prepare_model_inputs_fn: ModelInputs | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: LayerInputs | Mapping[str, LayerInputs] | None = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> None:
    """Let an adapter start from the directions in which the inputs of its layers vary most.

    To be called before the optimiser is made: factors whose rank changes are new parameters. Layers that get no rank
    lose the adapter; ranks, scales and targets are written into the adapter's configuration. Layers of which the state
    says nothing (embeddings, convolutions, experts) start as by default, with a warning.

    Args:
        model: with an adapter of ``init_lora_weights="eva"``, which is the only active one.
        dataloader: see :func:`get_eva_state_dict`, as for all that is not here.
        eva_state_dict: what that function returned, in place of data.

    Raises:
        AdapterError: the adapter is none of EVA's or not alone, or there is neither data nor a state.
        ConfigError: there is not enough data, or a tensor of the state does not fit.
    """
    configs = getattr(base_of(model), "peft_config", None)
    switch = switch_of(model)
    if configs is None or switch is None:
        raise AdapterError("model must be a PeftModel")
    if len(switch.active) > 1:
        raise AdapterError("`initialize_lora_eva_weights` currently only works with a single active adapter")
    if adapter_name not in configs:
        raise AdapterError(f"adapter {adapter_name!r} does not exist; there are {list(configs)}")
    if configs[adapter_name].init_lora_weights != "eva":
        raise AdapterError("`initialize_lora_eva_weights` can only be used with `init_lora_weights='eva'`")
    if eva_state_dict is None:
        if dataloader is None:
            raise AdapterError("dataloader is required if eva_state_dict is not provided")
        eva_state_dict = get_eva_state_dict(
            model,
            dataloader,
            forward_fn=forward_fn,
            prepare_model_inputs_fn=prepare_model_inputs_fn,
            prepare_layer_inputs_fn=prepare_layer_inputs_fn,
            adapter_name=adapter_name,
            gather_distributed_inputs=gather_distributed_inputs,
            show_progress_bar=show_progress_bar,
        )
    load_eva(model, eva_state_dict, adapter_name)


__all__ = ["get_eva_state_dict", "initialize_lora_eva_weights"]
