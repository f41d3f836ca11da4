"""An adapter that was there before its model was cut is the one that is added after."""

from __future__ import annotations

from typing import Any

import divisions
import pytest
import ranks
import torch
from contract import adapt
from subjects import SUBJECTS, Subject, batch, logits_of, loss_of
from torch import Tensor, nn
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import lorica
from lorica.checkpoint.names import adapter_entries
from lorica.checkpoint.pieces import collect, pieces
from lorica.errors import AdapterError, LayoutError, LoricaError
from lorica.parallel import cutting, parallelize, sum_gradients

LLAMA = SUBJECTS["llama"]
EVERYTHING = {"target_modules": [*LLAMA.fields["target_modules"], "embed_tokens"], "modules_to_save": ["lm_head"]}


def config(**fields: Any) -> lorica.LoraConfig:
    return lorica.LoraConfig(**{"init_lora_weights": False, "r": 4, **fields})


def _native(base: nn.Module) -> None:
    parallelize(base, divisions._mesh(tp=torch.distributed.get_world_size()))


def _torch(base: nn.Module) -> None:
    stand_in = Subject(make=lambda: base)
    object.__setattr__(stand_in, "make", lambda: base)
    divisions.torch_tensor_parallel(stand_in, "")


ENGINES = {"native": _native, "torch": _torch}


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> Tensor:
    ids = batch(2)
    loss = loss_of(logits_of(model(input_ids=ids)), ids)
    loss.backward()
    optimizer.step()
    return loss.detach()


def saved(model: nn.Module) -> dict[str, Tensor]:
    return collect(pieces(adapter_entries(model, "default", model.peft_config["default"])))


def _before_and_after(engine: str, fields: dict[str, Any]) -> None:
    after = LLAMA.build()
    ENGINES[engine](after)
    after = adapt(after, config(**fields)).train()
    before = adapt(LLAMA.build(), config(**fields)).train()
    trains = [parameter for parameter in before.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trains, 0.1)
    with cutting(before) as base:
        ENGINES[engine](base)
    if "modules_to_save" not in fields:
        still = [parameter for parameter in before.parameters() if parameter.requires_grad]
        assert [id(p) for p in trains] == [id(p) for p in still]  # what an optimiser holds stays what trains
    else:
        optimizer = torch.optim.SGD(lorica.parallel.parameter_groups(before), 0.1)
    other = torch.optim.SGD(lorica.parallel.parameter_groups(after), 0.1)
    for _ in range(2):
        assert torch.equal(step(before, optimizer), step(after, other))
    for (name, mine), theirs in zip(saved(before).items(), saved(after).values(), strict=True):
        assert torch.equal(mine, theirs), name


@pytest.mark.parametrize("engine", ENGINES)
def test_before_and_after_are_the_same(engine: str) -> None:
    ranks.run(2, _before_and_after, engine, LLAMA.fields)


@pytest.mark.parametrize("engine", ENGINES)
def test_also_of_modules_that_train_whole(engine: str) -> None:
    ranks.run(2, _before_and_after, engine, EVERYTHING)


def _refusals() -> list[str]:
    found = []
    for state in ("merged", "cut"):
        model = adapt(LLAMA.build(), config(**LLAMA.fields))
        if state == "merged":
            model.merge_adapter()  # type: ignore[operator]
        else:
            with cutting(model) as base:
                _native(base)
        try:
            with cutting(model):
                pass
        except LoricaError as error:
            found.append(f"{type(error).__name__}: {error}")
    return found


def test_what_cannot_be_cut_is_refused() -> None:
    for merged, twice in ranks.run(2, _refusals):
        assert merged.startswith(AdapterError.__name__)
        assert "unmerge" in merged
        assert twice.startswith(LayoutError.__name__)
        assert "cut once" in twice


def _cut_behind_its_back() -> str:
    model = adapt(LLAMA.build(), config(**LLAMA.fields)).train()
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj.base_layer")
    parallelize_module(layer, divisions._mesh(tp=2), ColwiseParallel())
    ids = batch(2)
    try:
        model(input_ids=ids)
    except LoricaError as error:
        return str(error)
    return ""


def test_a_cut_behind_its_back_is_noticed() -> None:
    for message in ranks.run(2, _cut_behind_its_back):
        assert "cutting" in message
        assert "q_proj" in message


def _failing() -> bool:
    """An engine that fails leaves an adapted model that works."""
    model = adapt(LLAMA.build(), config(**LLAMA.fields))
    ids = batch(2)
    before = logits_of(model(input_ids=ids))
    with pytest.raises(ValueError, match="no"), cutting(model):
        raise ValueError("no")
    sum_gradients(model)
    return torch.equal(before, logits_of(model(input_ids=ids)))


def test_an_engine_that_fails() -> None:
    assert ranks.run(2, _failing) == [True, True]
