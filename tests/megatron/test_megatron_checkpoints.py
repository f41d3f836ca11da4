"""Adapted models in Megatron-Core's own distributed checkpoints, written on one division and read on another."""

from __future__ import annotations

import multiprocessing
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import outcomes
import pytest
import torch
import torch.distributed as dist
import world
from gpt import Division, chunks, moe

from lorica import LoraConfig

world.need_megatron()

WHOLE = Division()


def shared_folder() -> Path:
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # writers are processes
    made = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(made)
    return Path(made[0])


def write(models: Sequence[Any], folder: Path) -> None:
    from megatron.core import dist_checkpointing

    dist_checkpointing.save(state_of(models), str(folder))


def read(models: Sequence[Any], folder: Path) -> None:
    from megatron.core import dist_checkpointing

    state = dist_checkpointing.load(state_of(models), str(folder))
    for number, model in enumerate(models):
        model.load_state_dict(state[f"model{number}"])


def state_of(models: Sequence[Any]) -> Any:
    warnings.filterwarnings("ignore", "Please use DTensor instead", FutureWarning)
    return {f"model{number}": model.sharded_state_dict() for number, model in enumerate(models)}


def goes_and_comes(source: Division, goal: Division, wanted: LoraConfig, **changes: Any) -> None:
    folder = shared_folder()
    with world.divided(source):
        models = chunks(source, **changes)
        model = outcomes.adapted(models, wanted)
        saved = outcomes.logical(model)
        loss = world.train(models, world.tokens(4), forward_only=True)
        write(models, folder)
    with world.divided(goal):
        models = chunks(goal, **changes)
        model = outcomes.adapted(models, wanted)
        with torch.no_grad():
            for parameter in models_parameters(models):
                parameter.add_(1)
        read(models, folder)
        outcomes.close(outcomes.logical(model), saved, 1e-12)
        torch.testing.assert_close(world.train(models, world.tokens(4), forward_only=True), loss, rtol=1e-5, atol=0)


def models_parameters(models: Sequence[Any]) -> list[Any]:
    return [parameter for model in models for parameter in model.parameters()]


@world.case(ranks=4, divisions=[Division(tp=4, sp=True), Division(tp=2, pp=2)])
def read_on_another_division(division: Division) -> None:
    goes_and_comes(division, WHOLE, outcomes.config())
    if division.pp > 1:
        goes_and_comes(WHOLE, division, outcomes.config())


@world.case(ranks=4, divisions=[Division(ep=2), Division(tp=2, sp=True, ep=2, etp=1), Division(ep=2, etp=2)])
def experts(division: Division) -> None:
    """Those that are modules, and those whose weights are stacked."""
    wanted = outcomes.config(target_modules=["linear_fc1", "linear_fc2", "router"])
    for kind in ({}, {"moe_grouped_gemm": True}):
        goes_and_comes(WHOLE, division, wanted, **moe(**kind))
        goes_and_comes(division, WHOLE, wanted, **moe(**kind))


@world.case(ranks=4)
def every_kind_of_tensor() -> None:
    source, goal = Division(tp=2, sp=True), Division(tp=4)
    for wanted in (
        outcomes.config(target_modules=["linear_q", "linear_fc1_up"], use_dora=True),
        outcomes.config(
            target_modules=["linear_qkv"], fused_as_one=True, modules_to_save=["output_layer", "final_layernorm"]
        ),
    ):
        goes_and_comes(source, goal, wanted)


@world.case(ranks=4)
def base_tensors_keep_their_names() -> None:
    """What Megatron reads of a model without adapters is in the checkpoint of one with them, and of the other way."""
    folder, division = shared_folder(), Division(tp=2, pp=2)
    from megatron.core import dist_checkpointing

    with world.divided(division):
        plain = chunks(division)
        keys = {tensor.key for tensor in flat(state_of(plain))}
        loss = world.train(plain, world.tokens(4), forward_only=True)
        dist_checkpointing.save(state_of(plain), str(folder))
        models = chunks(division)
        outcomes.adapted(models, outcomes.config(init_lora_weights=True))
        assert keys < {tensor.key for tensor in flat(state_of(models))}
        with torch.no_grad():
            for name, parameter in models[0].named_parameters():
                if "lora" not in name:
                    parameter.add_(1)
        state = {"model0": {name: one for name, one in state_of(models)["model0"].items() if "lora" not in name}}
        loaded = dist_checkpointing.load(state, str(folder))
        result = models[0].load_state_dict(loaded["model0"], strict=False)
        assert result.missing_keys
        assert all("lora" in name for name in result.missing_keys)
        assert not result.unexpected_keys
        torch.testing.assert_close(world.train(models, world.tokens(4), forward_only=True), loss, rtol=1e-6, atol=0)


def flat(state: Any) -> list[Any]:
    if isinstance(state, dict):
        return [one for value in state.values() for one in flat(value)]
    return [state]


@pytest.mark.parametrize("ranks", world.sizes(__name__))
def test_checkpoints(ranks: int, request: pytest.FixtureRequest) -> None:
    world.run(__name__, ranks, request.config.getoption("--cases"))
