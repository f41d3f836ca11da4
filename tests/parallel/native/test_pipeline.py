"""Stages of a model, alone and cut over tensor-parallel ranks, train as one process does."""

from __future__ import annotations

from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from test_parallelize import close, gradients, make
from torch.distributed.device_mesh import init_device_mesh

from lorica.engines.native import gather_model_state, parallelize, split_stages, stage
from lorica.engines.native.pipeline import Elsewhere
from lorica.errors import LayoutError


def mesh_of(stages: int) -> Any:
    return init_device_mesh("cpu", (stages, dist.get_world_size() // stages), mesh_dim_names=("pp", "tp"))


def trained(kind: str, stages: int, schedule: Any, sequence_parallel: bool, frozen: bool) -> list[str]:
    mesh = mesh_of(stages)
    whole, model = make(kind), make(kind)
    for one in (whole, model):
        one.requires_grad_(not frozen)
        one.model.layers[-1].mlp.requires_grad_(True)
    parallelize(model, mesh, sequence_parallel=sequence_parallel)
    split_stages(model, mesh)
    axis = model.lorica_mesh["pp"]
    pipeline = stage(model, axis, microbatches=4, schedule=schedule)
    ids = torch.randint(3, 51, (8, 5))
    expected = whole(input_ids=ids, labels=ids).loss
    expected.backward()
    for _ in range(2):
        model.zero_grad()
        losses: list[Any] = []
        inputs = (ids,) if axis.rank == 0 else ()
        last = {"target": ids, "losses": losses} if axis.rank == stages - 1 else {}
        pipeline.schedule.step(*inputs, **last)
    if losses:
        close(torch.stack(losses).mean(), expected.detach(), "loss")
    for parameter in model.parameters():
        if parameter.grad is None:
            assert not parameter.requires_grad
            parameter.grad = torch.zeros_like(parameter)
    found = gradients_of_stage(model, mesh)
    for name, parameter in whole.named_parameters():
        if name in found and parameter.grad is not None:
            close(found[name], parameter.grad, name)
    state = {name: tensor.clone() for name, tensor in gather_model_state(model)}
    if dist.get_rank() == 0:
        assert state.keys() >= dict(whole.named_parameters()).keys()
        assert all(torch.equal(state[name], parameter) for name, parameter in whole.named_parameters())
    else:
        assert state == {}
    return [name for name, module in model.named_modules() if isinstance(module, Elsewhere)]


def gradients_of_stage(model: Any, mesh: Any) -> dict[str, torch.Tensor]:
    """As :func:`gradients`, whose sums are over the ranks of one stage."""
    return gradients(model, mesh.get_group("tp"))


@pytest.mark.parametrize(
    ("kind", "schedule", "frozen"),
    [("Llama", "gpipe", False), ("Phi3", "1f1b", False), ("Gemma3Text", "1f1b", True)],
)
def test_two_stages(kind: str, schedule: str, frozen: bool) -> None:
    first, second = ranks.run(2, trained, kind, 2, schedule, False, frozen)
    assert first == ["model.layers.1", "model.norm", "lm_head"]
    assert second == ["model.embed_tokens", "model.layers.0"]


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_two_stages_of_two_ranks(sequence_parallel: bool) -> None:
    ranks.run(4, trained, "Qwen3", 2, "1f1b", sequence_parallel, False)


def masked() -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("pp",))
    whole, model = make("Llama"), split_stages(make("Llama"), mesh)
    axis = model.lorica_mesh["pp"]
    pipeline = stage(model, axis, microbatches=2)
    ids = torch.randint(3, 51, (4, 5))
    mask = torch.ones_like(ids)
    mask[:, :2] = 0
    inputs = (ids,) if axis.rank == 0 else ()
    last = {"target": ids} if axis.rank else {}
    logits = pipeline.schedule.step(*inputs, attention_mask=mask, **last)
    if axis.rank:
        close(logits, whole(input_ids=ids, attention_mask=mask).logits, "logits")


def test_masks_reach_every_stage() -> None:
    ranks.run(2, masked)


def refused() -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("pp",))
    cases: list[tuple[Any, Any, str]] = [
        (make("Gemma"), mesh, "share a weight that trains"),
        (make("Llama"), init_device_mesh("cpu", (2,), mesh_dim_names=("tp",)), "no dimension 'pp'"),
        (split_stages(make("Llama"), mesh), mesh, "already"),
    ]
    few = make("Llama")
    few.model.layers = few.model.layers[:1]
    cases.append((few, mesh, "1 decoder layers"))
    for model, where, message in cases:
        before = [(name, id(module)) for name, module in model.named_modules()]
        with pytest.raises(LayoutError, match=message):
            split_stages(model, where)
        assert before == [(name, id(module)) for name, module in model.named_modules()]
    axis = cases[2][0].lorica_mesh["pp"]
    with pytest.raises(LayoutError, match="too few"):
        stage(cases[2][0], axis, microbatches=1)
    with pytest.raises(LayoutError, match="none of"):
        stage(cases[2][0], axis, microbatches=2, schedule="interleaved")  # type: ignore[arg-type]


def test_what_cannot_be_split_is_refused() -> None:
    ranks.run(2, refused)
