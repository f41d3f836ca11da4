"""What an adapted model of Megatron's gives under a division: loss, gradients and the file, as logical tensors.

All of them are on rank 0; other ranks get empty dictionaries. So ``expect_equal`` compares on rank 0 and tells all.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
import world
from gpt import Division, chunks
from torch import Tensor, nn

from lorica import LoraConfig, get_peft_model
from lorica.checkpoint.names import adapter_entries
from lorica.checkpoint.pieces import collect, pieces
from lorica.parallel import sum_gradients, verify

#: Every kind of layer of a dense model; B of each starts other than zero, so that all gradients say something.
EVERYTHING = ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2", "word_embeddings", "output_layer"]


@dataclass
class Outcome:
    """What came out under one division."""

    loss: Tensor
    gradients: dict[str, Tensor]
    tensors: dict[str, Tensor]


def config(**changes: Any) -> LoraConfig:
    """Return a configuration of small factors, none of which starts at zero."""
    fields: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": EVERYTHING, "init_lora_weights": False}
    return LoraConfig(**fields | changes)


def adapted(models: Sequence[nn.Module], wanted: LoraConfig) -> Any:
    """Return the chunks of a rank as one adapted model."""
    torch.manual_seed(7)
    return get_peft_model(models[0] if len(models) == 1 else nn.ModuleList(models), wanted)  # type: ignore[arg-type]


def outcome(
    division: Division,
    wanted: LoraConfig,
    *,
    batches: Tensor | None = None,
    rebuild: Callable[[Any], None] | None = None,
    **changes: Any,
) -> Outcome:
    """Train one step without an optimiser, and return what there is to compare.

    Args:
        division: of the model; the whole one is the oracle, of one process, for whose gradients nothing is done.
        wanted: the adapter.
        batches: microbatches; None: as many as ranks, so that each data-parallel rank has some of its own.
        rebuild: changes each chunk before it is adapted.
        **changes: of the model.
    """
    alone = division == Division()
    key = f"{wanted.to_dict()} {batches} {changes}"
    if alone and rebuild is None and key in _ORACLES:
        return _ORACLES[key]
    with world.divided(division):
        models = chunks(division, **changes)
        if rebuild is not None:
            for chunk in models:
                rebuild(chunk)
        model = adapted(models, wanted)
        loss = world.train(models, world.tokens(dist.get_world_size()) if batches is None else batches, alone=alone)
        if not alone:
            sum_gradients(model)
        found = Outcome(loss, logical(model, gradients=True), logical(model))
    if alone and rebuild is None:
        _ORACLES[key] = found
    return found


#: What one process gives, with which several divisions are compared: after a backward, and after steps.
_ORACLES: dict[str, Outcome] = {}
_TRAINED: dict[str, dict[str, Tensor]] = {}


def trained(
    division: Division, wanted: LoraConfig, *, distributed: bool = False, steps: int = 2, **changes: Any
) -> dict[str, Tensor]:
    """Train with Megatron's own DDP, finalisation and optimiser, and return the adapter's file.

    Afterwards ranks that have the same piece of a factor have it bit for bit (I5).

    Args:
        division: of the model.
        wanted: the adapter.
        distributed: whether the optimiser's state lies over data-parallel ranks.
        steps: of the optimiser.
        **changes: of the model.
    """
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    key = f"{wanted.to_dict()} {distributed} {steps} {changes}"
    if division == Division() and key in _TRAINED:
        return _TRAINED[key]
    # The distributed optimiser asks slices of its buffer for their gradients.
    warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
    with world.divided(division):
        models = chunks(division, **changes)
        model = adapted(models, wanted)
        settings = models[0].config
        settings.finalize_model_grads_func = finalize_model_grads
        how = DistributedDataParallelConfig(use_distributed_optimizer=distributed)
        wrapped = [DistributedDataParallel(settings, how, chunk) for chunk in models]
        plan = OptimizerConfig(optimizer="adam", lr=1e-2, use_distributed_optimizer=distributed, clip_grad=0.05)
        optimizer = get_megatron_optimizer(plan, wrapped)
        ranks = dist.get_world_size()
        for step in range(steps):
            for chunk in wrapped:
                chunk.zero_grad_buffer()
            optimizer.zero_grad()
            world.train(wrapped, world.tokens(ranks * (step + 1))[-ranks:], alone=division == Division())
            done, norm, _ = optimizer.step()
            assert done
            assert norm > plan.clip_grad, "nothing is clipped, so a wrong norm would not be seen"
        found = logical(model)
        if division == Division():
            _TRAINED[key] = found
        else:
            verify(model)
        return found


def logical(model: Any, *, gradients: bool = False) -> dict[str, Tensor]:
    """Return the adapter's tensors, or their gradients, whole and under their names in a file."""
    entries = adapter_entries(model, "default", model.peft_config["default"])
    if gradients:
        entries = {name: replace(entry, tensor=_gradient(entry.tensor)) for name, entry in entries.items()}
    return {name: tensor.clone() for name, tensor in collect(pieces(entries)).items()}


def _gradient(tensor: Tensor) -> Tensor:
    held = getattr(tensor, "main_grad", None)
    gradient = tensor.grad if held is None else held
    return torch.zeros_like(tensor) if gradient is None else gradient


def expect_equal(found: Outcome, wanted: Outcome, tolerance: float = 1e-5, *, exact: bool = True) -> None:
    """Refuse outcomes that differ: losses and gradients by more than a relative error, files in a bit.

    Args:
        found: under one division.
        wanted: under another.
        tolerance: the relative error.
        exact: whether files are the same bit for bit; a magnitude is a sum over ranks, which rounds.
    """
    assert found.tensors.keys() == wanted.tensors.keys(), sorted(found.tensors.keys() ^ wanted.tensors.keys())[:6]
    if not exact:
        close(found.tensors, wanted.tensors, tolerance)
    for name, tensor in found.tensors.items() if exact else ():
        assert torch.equal(tensor, wanted.tensors[name]), f"{name} starts otherwise"
    torch.testing.assert_close(found.loss, wanted.loss, rtol=tolerance, atol=0)
    close(found.gradients, wanted.gradients, tolerance)


def close(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], tolerance: float = 1e-5) -> None:
    """Refuse tensors of which one differs by more than a relative error of its norm; none may be zero."""
    assert found.keys() == wanted.keys(), sorted(found.keys() ^ wanted.keys())[:6]
    errors = {}
    for name, tensor in found.items():
        size = wanted[name].norm()
        assert size > 0, f"{name} is zero, so nothing is compared"
        errors[name] = float((tensor - wanted[name]).norm() / size)
    wrong = {name: error for name, error in errors.items() if not error < tolerance}
    assert not wrong, f"{len(wrong)} of {len(errors)} differ: {dict(list(wrong.items())[:8])}"
