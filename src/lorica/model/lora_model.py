"""``LoraModel``: a base model with any number of adapters in it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lorica import combine
from lorica.adapt import inject, merging, trainable
from lorica.adapt.replicate import replicate_layers, restore_layers
from lorica.adapt.tying import forget_tie
from lorica.config import LoraConfig
from lorica.engines.stages import axis_of_stages, has_others
from lorica.engines.together import together
from lorica.errors import AdapterError, LayoutError, suggest
from lorica.init import subtracts
from lorica.layers import LoraLayer, ModulesToSaveWrapper, Switch
from lorica.layers.gated import unfuse_mlps
from lorica.layers.merging import inexact_message, requantised_message
from lorica.model.rows import has_rows, rows_of_call
from lorica.ranks import watch
from lorica.targets import make_plan
from lorica.targets.plan import Plan
from lorica.targets.resolve import config_of
from lorica.targets.walk import targets_of_keys
from lorica.variants import VARIANTS, variant_of
from lorica.variants.losses import kasa_loss, monteclora_loss


class LoraModel(nn.Module):
    """Adapters in a base model, changed in place.

    Args:
        model: the model to adapt.
        peft_config: the configuration of the first adapter; it is copied.
        adapter_name: its name.
        low_cpu_mem_usage: make the factors on the meta device, to be filled from a file.
        state_dict: tensors of an adapter, whose names say which layers are adapted, instead of the configuration.
        autocast_adapter_dtype: give 16-bit base weights float32 factors.

    Raises:
        TargetError: the configuration does not fit the model. The model is then as it was.
    """

    prefix: ClassVar[str] = "lora_"
    holds_adapters: ClassVar[bool] = True

    def __init__(
        self,
        model: nn.Module,
        peft_config: LoraConfig,
        adapter_name: str,
        low_cpu_mem_usage: bool = False,
        state_dict: Mapping[str, Tensor] | None = None,
        *,
        autocast_adapter_dtype: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.peft_config: dict[str, LoraConfig] = dict(getattr(model, "peft_config", None) or {})
        switch = inject.switch_of(model)
        self.switch = Switch((adapter_name,)) if switch is None else switch
        with self.switch.turns.changing():
            self.add_adapter(
                adapter_name,
                peft_config,
                low_cpu_mem_usage=low_cpu_mem_usage,
                autocast_adapter_dtype=autocast_adapter_dtype,
                state_dict=state_dict,
            )
            if switch is not None:
                self.set_adapter(adapter_name, inference_mode=peft_config.inference_mode)
            model.peft_config = self.peft_config  # type: ignore[assignment]

    def __getattr__(self, name: str) -> Any:
        """Look in the base model for what this wrapper does not have."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model" or name.startswith("__"):
                raise
            return getattr(self.model, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the adapted model.

        Args:
            args: of the base model.
            kwargs: of the base model, and ``adapter_names``: an adapter for each row of the batch, ``"__base__"`` for
                none; ``alora_offsets``: for each row how many tokens, from the end, an adapter sees that tokens
                activate (otherwise its invocation is looked for in ``input_ids``).

        Raises:
            AdapterError: there are not as many rows as names, an adapter does not exist, or the model trains.
        """
        if torch.compiler.is_compiling():  # a graph has no locks: see hold_adapters
            return self._routed(self.model, args, kwargs)
        with self.switch.turns.reading:
            return self._routed(self.model, args, kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate with the adapted model: the base model's ``generate``, with ``adapter_names`` as in a forward."""
        generate: Any = self.model.generate
        with self.switch.turns.reading:
            return self._routed(generate, args, kwargs, generates=True)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return what ``nn.Module`` does, while nothing changes."""
        with self.switch.turns.reading:
            return super().state_dict(*args, **kwargs)

    def _routed(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], *, generates: bool = False
    ) -> Any:
        if not has_rows(self, kwargs):
            return function(*args, **kwargs)
        with rows_of_call(self, args, kwargs, generates=generates) as left:
            return function(*args, **left)

    # ---- adding and removing ----------------------------------------------------------------------------------------

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: LoraConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = False,
        *,
        state_dict: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Put a further adapter in. It is not active; nothing else changes. For the arguments see the class.

        Raises:
            AdapterError: the name is taken or impossible, or two adapters would share the base model's biases.
            TargetError: the configuration does not fit the model. The model is then as it was.
            RankError: it does not fit the layers of another rank, and the adapter starts from the base weights.
        """
        with self.switch.turns.changing():
            inject.check_adapter_name(adapter_name)
            if adapter_name in self.peft_config:
                raise AdapterError(f"Adapter with name {adapter_name} already exists. Please use a different name.")
            config = copy.copy(peft_config)
            trainable.check_one_bias({**self.peft_config, adapter_name: config})
            trainable.check_one_base({**self.peft_config, adapter_name: config}, adapter_name)
            undo = replicate_layers(self.model, config.layer_replication) if config.layer_replication else None
            try:
                with self._agreeing(config, on_meta=low_cpu_mem_usage):
                    exactly = None if state_dict is None else targets_of_keys(state_dict)
                    plan = make_plan(self.model, config, exactly=exactly)
                inject.inject(
                    self.model,
                    plan,
                    config,
                    adapter_name,
                    self.switch,
                    on_meta=low_cpu_mem_usage,
                    autocast=autocast_adapter_dtype,
                )
            except Exception:
                if undo is not None:
                    undo()
                raise
            with self.switch.turns.writing():
                self._enter(adapter_name, config, plan)

    def _enter(self, adapter_name: str, config: LoraConfig, plan: Plan) -> None:
        """Make known an adapter that was put in."""
        modules = inject.adapted(self.model)
        if any(isinstance(module, LoraLayer) and module.site is not None for module in modules):
            watch(self.model)
        if not self.peft_config:
            trainable.freeze_base(self.model)
        config.fan_in_fan_out = plan.fan_in_fan_out
        config.target_modules = plan.names if isinstance(plan.names, str) else set(plan.names or ())
        self.peft_config[adapter_name] = config
        active = adapter_name in self.switch.active and not config.inference_mode
        trainable.let_train(modules, {adapter_name: active})
        if active:
            trainable.train_biases(self.model, config)

    def _agreeing(self, config: LoraConfig, *, on_meta: bool) -> AbstractContextManager[None]:
        """Let all ranks find their targets, or none: starts from base weights are worked out together, and the layers
        of one stage may refuse what those of the others do not.
        """
        starts = VARIANTS[variant_of(config)].subtracts or subtracts(config.init_lora_weights, lookup=False)
        if on_meta or not starts or not has_others(self.model):
            return nullcontext()
        return together(self.model, "finding the targets")

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter. If none is active then, the first of those left becomes active, with a warning.

        Raises:
            AdapterError: there is no such adapter, or it is merged.
        """
        with self.switch.turns.writing():
            self._need(adapter_name)
            inject.take_out(self.model, adapter_name)
            del self.peft_config[adapter_name]
            if adapter_name not in self.switch.active:
                return
            left = [name for name in self.switch.active if name != adapter_name]
            if not left and self.peft_config:
                left = [next(iter(self.peft_config))]
                warnings.warn(
                    f"Adapter {adapter_name} was active which is now deleted. Setting active adapter to {left[0]}.",
                    stacklevel=3,
                )
            self.set_adapter(left)

    # ---- switching --------------------------------------------------------------------------------------------------

    @property
    def active_adapters(self) -> list[str]:
        """Names of the active adapters."""
        return list(self.switch.active)

    @property
    def active_adapter(self) -> str | list[str]:
        """The active adapter's name, or a list where several are."""
        return self.switch.active[0] if len(self.switch.active) == 1 else list(self.switch.active)

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make one adapter active, or several; the others rest and do not train.

        Args:
            adapter_name: one name or several, in the order in which their parts are added.
            inference_mode: freeze the active ones too.

        Raises:
            AdapterError: a name is unknown, or several adapters have a copy of one whole module.
        """
        names = (adapter_name,) if isinstance(adapter_name, str) else tuple(adapter_name)
        with self.switch.turns.writing():
            for name in names:
                self._need(name)
            modules = inject.adapted(self.model)
            _refuse_two_copies(self.model, modules, names)
            if any(map(inject.merged_into, modules)):
                message = "Adapter cannot be set when the model is merged. Unmerging the model first."
                warnings.warn(message, stacklevel=3)
                self.unmerge_adapter()
            self.switch.active = names
            trainable.train_only(self.model, modules, self.peft_config, names, frozen=inference_mode)

    @property
    def targeted_module_names(self) -> list[str]:
        """Full names of the adapted layers in the base model."""
        layers = inject.lora_layers(self.model)
        inside = {f"{layer.target_name}.{child}" for layer in layers for child in layer.op.children}
        return [layer.target_name for layer in layers if layer.target_name not in inside]

    def set_requires_grad(self, adapter_names: str | Iterable[str], requires_grad: bool = True) -> None:
        """Let the parameters of the named adapters train, or freeze them.

        Raises:
            AdapterError: a name is unknown.
        """
        adapter_names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        with self.switch.turns.writing():
            for name in adapter_names:
                self._need(name)
            trainable.set_requires_grad(self.model, adapter_names, requires_grad)

    def enable_adapter_layers(self) -> None:
        """Turn all adapters on again."""
        with self.switch.turns.writing():
            self.switch.enabled = True

    def disable_adapter_layers(self) -> None:
        """Turn all adapters off: the output is the base model's (its biases too, unless ``bias`` trained them)."""
        for config in self.peft_config.values():
            if config.bias != "none":
                warnings.warn(
                    f"Careful, disabling adapter layers with bias configured to be '{config.bias}' does not produce "
                    "the same output as the base model would without adaption.",
                    stacklevel=3,
                )
        with self.switch.turns.writing():
            self.switch.enabled = False

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
    ) -> None:
        """Put a combination ``Σ w·ΔW`` of adapters in as a new one, plain LoRA of scale 1; it is not active.

        Args:
            adapters: their names.
            weights: one of each, negative ones too.
            adapter_name: the new adapter's name; one that is there stays as it is, with a warning.
            combination_type: ``"svd"`` is the nearest matrix of its rank, exact, by way of the stacked factors alone.
                ``"cat"`` is the sum itself, of the sum of the ranks. ``"linear"`` adds A's and B's, so that products of
                one adapter's and another's come in. ``"ties"``, ``"dare_linear"``, ``"dare_ties"`` and
                ``"magnitude_prune"`` do what their papers do to A's and B's; with ``"_svd"`` behind, to the deltas,
                which are dense then: one target at a time. A single adapter is always combined by ``"linear"``.
            svd_rank: the rank after a decomposition; None: the largest rank of the adapters.
            svd_clamp: quantile of the entries of the factors after a decomposition, to which all are cut.
            svd_full_matrices: accepted; vectors that are left out anyway are not computed.
            svd_driver: of ``torch.linalg.svd`` on CUDA.
            density: the share of entries that pruning keeps.
            majority_sign_method: signs are elected by the sum of the entries (``"total"``) or of their signs
                (``"frequency"``).

        Raises:
            AdapterError: a name is unknown, an argument impossible, or the adapters have no such combination; the
                layer is named. The model is as it was.
        """
        with self.switch.turns.changing():
            combine.add_weighted_adapter(
                self,
                adapters,
                weights,
                adapter_name,
                combination_type,
                svd_rank,
                svd_clamp,
                svd_full_matrices,
                svd_driver,
                density,
                majority_sign_method,
            )

    def subtract_mutated_init(
        self,
        output_state_dict: Mapping[str, Tensor],
        adapter_name: str,
        kwargs: Mapping[str, Any] | None = None,
    ) -> dict[str, Tensor]:
        """Return the factors ``[B, -B₀]`` and ``[A; A₀]`` of plain LoRA, for an adapter whose start was taken out of
        the base weights.

        Args:
            output_state_dict: the trained adapter's tensors, by their names in a file.
            adapter_name: the adapter in this model that has the factors of the start.
            kwargs: ``state_dict``: live tensors to take these from.

        Raises:
            AdapterError: there is no such adapter, or its delta is not the product of its factors.
            CheckpointError: the two do not fit.
        """
        state_dict = (kwargs or {}).get("state_dict")
        return combine.subtract_mutated_init(self, output_state_dict, adapter_name, state_dict)

    # ---- merging ----------------------------------------------------------------------------------------------------

    def merge_adapter(
        self,
        adapter_names: Sequence[str] | None = None,
        safe_merge: bool = False,
        *,
        progressbar: bool = False,
    ) -> None:
        """Add the deltas of adapters to the base weights; all of them or, on an error, none.

        Quantised weights are quantised anew, and a warning says what that cost. What they were before is kept besides
        (as much memory again as the quantised weights take), so that unmerging gives it back bit for bit.

        Args:
            adapter_names: which ones; None: the active ones.
            safe_merge: look for NaN and infinity in each result before its weight is touched.
            progressbar: show one.

        Raises:
            AdapterError: a name is unknown, or a result is not finite (``safe_merge``).
            TargetError: a delta has no place in its weight (a grouped convolution).
        """
        self._merge(adapter_names, safe_merge, progressbar=progressbar, keep=True)

    def _merge(self, adapter_names: Sequence[str] | None, safe_merge: bool, *, progressbar: bool, keep: bool) -> None:
        with self.switch.turns.writing():
            names = list(self.switch.active if adapter_names is None else adapter_names)
            for name in names:
                self._need(name)
            requantised = merging.merge(self.model, names, finite=safe_merge, keep=keep, progressbar=progressbar)
        if requantised:
            warnings.warn(requantised_message(requantised), stacklevel=3)

    def unmerge_adapter(self) -> None:
        """Take all merged deltas out again; a warning says so where a weight's dtype could not keep it exactly."""
        with self.switch.turns.writing():
            inexact = merging.unmerge(self.model)
        if inexact is not None:
            warnings.warn(inexact_message(inexact), stacklevel=3)

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: Sequence[str] | None = None
    ) -> nn.Module:
        """Merge the adapters and return the base model, plain again, with the deltas in its weights.

        Args:
            progressbar: show one.
            safe_merge: look for NaN and infinity in each result before its weight is touched.
            adapter_names: which ones; None: the active ones.

        Raises:
            AdapterError: a name is unknown, or a result is not finite (``safe_merge``). Nothing was changed.
        """
        with self.switch.turns.writing():
            if self.switch.active or adapter_names:
                self._merge(adapter_names, safe_merge, progressbar=progressbar, keep=False)
            names = self.switch.active if adapter_names is None else tuple(adapter_names)
            return self._unload(names)

    def unload(self) -> nn.Module:
        """Return the base model without its adapters, as it was."""
        with self.switch.turns.writing():
            merging.unmerge(self.model)
            plain = self._unload(())
            restore_layers(plain)
            return plain

    def _unload(self, merged: Sequence[str]) -> nn.Module:
        replaced = any(self.peft_config[name].modules_to_save for name in merged)
        unfuse_mlps(self.model)
        inject.unload(self.model, merged)
        if replaced:
            forget_tie(self.model)
        if hasattr(self.model, "peft_config"):
            del self.model.peft_config
        return self.model

    # ---- losses of variants -----------------------------------------------------------------------------------------

    def _get_kasa_loss(self, adapter_names: str | Sequence[str] | None = None) -> Tensor | float:
        """Return the two penalties that KaSA trains with, to be added to the loss; 0 without such adapters.

        Args:
            adapter_names: which ones; None: the active ones.

        Raises:
            LayoutError: the model is divided into pipeline stages, of which each knows its own layers only.
        """
        return kasa_loss(*self._losing(adapter_names))

    def _get_monteclora_loss(self, adapter_names: str | Sequence[str] | None = None) -> Tensor | float:
        """Return MonteCLoRA's variational loss after a training forward, to be added to the loss; 0 without such
        adapters.

        Args:
            adapter_names: which ones; None: the active ones.

        Raises:
            LayoutError: the model is divided into pipeline stages, of which each knows its own layers only.
        """
        return monteclora_loss(*self._losing(adapter_names))

    def _losing(self, names: str | Sequence[str] | None) -> tuple[list[LoraLayer], list[str]]:
        if axis_of_stages(self.model) is not None:
            raise LayoutError("a variant's loss is summed over all layers, and a pipeline stage has only its own")
        chosen = self.switch.active if names is None else [names] if isinstance(names, str) else names
        return inject.lora_layers(self.model), list(chosen)

    # ---- helpers ----------------------------------------------------------------------------------------------------

    def _need(self, name: str) -> None:
        if name not in self.peft_config:
            raise AdapterError(
                f"Adapter {name} not found in {list(self.peft_config)}.{suggest(name, self.peft_config)}"
            )

    @staticmethod
    def get_model_config(model: nn.Module) -> dict[str, Any]:
        """Return the model's configuration as a dictionary; an empty one where it has none."""
        return config_of(model)


def _refuse_two_copies(model: nn.Module, modules: Iterable[inject.AdapterModule], names: Sequence[str]) -> None:
    """Refuse adapters of which several train a copy of one module, or rows of one token."""
    if len(names) < 2:
        return
    for module in modules:
        if isinstance(module, ModulesToSaveWrapper) and sum(name in module.modules_to_save for name in names) > 1:
            key = next(key for key, found in inject.adapter_modules(model) if found is module)
            raise AdapterError(f"Only one adapter can be set at a time for {key}: several train a copy of it")
    for layer in inject.tokens_among(modules):
        layer.check_apart(names)
