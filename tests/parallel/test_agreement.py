"""Ranks that would train different adapters are stopped before the first step; loads fail on all ranks or on none."""

from __future__ import annotations

import importlib
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import divisions
import pytest
import ranks
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from subjects import SUBJECTS, batch, logits_of, loss_of
from torch import nn

import lorica
from lorica.engines import Engines
from lorica.errors import LoricaError, RankError
from lorica.parallel import sum_gradients, verify

SUBJECT = SUBJECTS["llama"]


def config(**fields: Any) -> lorica.LoraConfig:
    return lorica.LoraConfig(**{"init_lora_weights": False, "r": 4, **SUBJECT.fields, **fields})


def cut() -> nn.Module:
    return divisions.native(tp=2)(SUBJECT, "")


def said(call: Any, *args: Any, **options: Any) -> str:
    """What this rank is told."""
    try:
        call(*args, **options)
    except LoricaError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _differing(fields: dict[str, Any], seeds: tuple[int, int]) -> str:
    rank = dist.get_rank()
    model = cut()
    torch.manual_seed(seeds[rank])
    return said(verify, lorica.get_peft_model(model, config(**(fields if rank else {}))))


@pytest.mark.parametrize(
    ("fields", "seeds", "field"),
    [
        ({"lora_alpha": 9}, (1, 1), "lora_alpha of the configuration of adapter 'default': 9, not "),
        ({"r": 2}, (1, 1), "r of the configuration of adapter 'default': 2, not 4"),
        (
            {"target_modules": ["q_proj"]},
            (1, 1),
            "target_modules of the configuration of adapter 'default': ",
        ),
        ({}, (1, 2), "initial values of default/base_model.model"),
    ],
)
def test_both_ranks_name_the_one_that_differs(fields: dict[str, Any], seeds: tuple[int, int], field: str) -> None:
    for message in ranks.run(2, _differing, fields, seeds):
        assert message.startswith("RankError: rank 1 differs from rank 0 in the "), message
        assert field in message


def test_the_same_adapter_passes() -> None:
    assert ranks.run(2, _differing, {}, (1, 1)) == ["", ""]


def _random_states(dropout: float) -> str:
    model = cut()
    torch.manual_seed(1)
    adapted = lorica.get_peft_model(model, config(lora_dropout=dropout))
    torch.manual_seed(dist.get_rank())
    return said(verify, adapted)


def test_dropout_needs_equal_random_states() -> None:
    assert all("random state" in message for message in ranks.run(2, _random_states, 0.5))
    assert ranks.run(2, _random_states, 0.0) == ["", ""]


def _absent() -> str:
    model = cut()
    torch.manual_seed(1)
    adapted = lorica.get_peft_model(model, config())
    store = dist.distributed_c10d._get_default_store()
    if dist.get_rank() == 1:
        store.wait(["given up"])
        return ""
    message = said(verify, adapted, timeout=1.0)
    store.set("given up", "")
    return message


def test_a_rank_that_does_not_come_is_an_error_within_the_time() -> None:
    message = ranks.run(2, _absent)[0]
    assert "not all ranks came to compare their adapters within 1 s" in message
    assert "1" in message.rpartition("Rank")[2]


def _unasked() -> str:
    model = cut()
    torch.manual_seed(dist.get_rank())
    adapted = lorica.get_peft_model(model, config())
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], 1.0)
    before = [parameter.detach().clone() for parameter in adapted.parameters()]
    ids = batch(2)
    loss_of(logits_of(adapted(input_ids=ids)), ids).backward()
    message = said(optimizer.step)
    assert all(torch.equal(a, b) for a, b in zip(before, adapted.parameters(), strict=True))
    return message


def test_the_first_step_compares_unasked() -> None:
    assert all("initial values" in message for message in ranks.run(2, _unasked))


# ---- loading -------------------------------------------------------------------------------------------------------


def saved(folder: Path) -> Path:
    torch.manual_seed(1)
    lorica.get_peft_model(SUBJECT.build(), config()).save_pretrained(folder)
    return folder


def _load(folders: tuple[str, str], further: bool) -> tuple[str, bool]:
    """Load from a folder of this rank's own; whether the model is afterwards what it was."""
    model = cut()
    ids = batch(2)
    torch.manual_seed(1)
    loaded = lorica.get_peft_model(model, config(r=2)) if further else model
    with torch.no_grad():
        before = logits_of(loaded(input_ids=ids))
    folder = folders[dist.get_rank()]
    if further:
        message = said(loaded.load_adapter, folder, "other")  # type: ignore[operator]
    else:
        message = said(lorica.PeftModel.from_pretrained, model, folder)
    with torch.no_grad():
        same = torch.equal(before, logits_of(loaded(input_ids=ids)))
    return message, same and sum_gradients(loaded) is None if further else same


@pytest.mark.parametrize("further", [False, True])
def test_a_file_that_one_rank_lacks(tmp_path: Path, *, further: bool) -> None:
    good = saved(tmp_path / "good")
    (first, same), (second, as_well) = ranks.run(2, _load, (str(good), str(tmp_path / "none")), further)
    assert same
    assert as_well
    assert first.startswith(RankError.__name__)
    assert "failed on 1 of 2 ranks" in first
    assert "rank 1" in first
    assert second
    assert not second.startswith(RankError.__name__)


def test_a_nan_in_one_rank_s_share(tmp_path: Path) -> None:
    folder = saved(tmp_path / "adapter")
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if "q_proj.lora_B" in name)
    tensors[name][-1, 0] = torch.nan  # the last row is rank 1's
    save_file(tensors, path)
    (first, same), (second, as_well) = ranks.run(2, _load, (str(folder), str(folder)), False)
    assert same
    assert as_well
    assert "rank 1" in first
    assert name in second
    assert "NaN" in second


# ---- starts that are worked out together -----------------------------------------------------------------------------


def _start_fails(config_fields: dict[str, Any], module: str, name: str, call: int) -> tuple[str, bool, float]:
    """Let the ``call``-th use of a function fail on rank 1 while starts are made; whether the model is as it was."""
    model, ids = cut(), batch(2)
    with torch.no_grad():
        before = logits_of(model(input_ids=ids))
    if dist.get_rank() == 1:
        owner = importlib.import_module(module)
        original, calls = getattr(owner, name), 0

        def failing(*args: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == call:
                raise MemoryError("no memory for a decomposition")
            return original(*args, **options)

        setattr(owner, name, failing)
    started, message = time.monotonic(), ""
    try:
        lorica.get_peft_model(model, config(**config_fields))
    except (LoricaError, MemoryError) as error:
        message = f"{type(error).__name__}: {error}"
    took = time.monotonic() - started
    with torch.no_grad():
        return message, torch.equal(before, logits_of(model(input_ids=ids))), took


@pytest.mark.parametrize(
    ("fields", "module", "name", "call"),
    [
        ({"init_lora_weights": "pissa"}, "lorica.init.pissa", "weight_of", 1),
        ({"init_lora_weights": "pissa"}, "lorica.init.pissa", "weight_of", 4),
        ({"init_lora_weights": "mica"}, "lorica.init.mica", "minor_directions", 2),
        ({"init_lora_weights": True, "kasa_config": lorica.KasaConfig()}, "lorica.adapt.inject", "made_by", 3),
    ],
)
def test_a_start_that_fails_on_one_rank_fails_on_all_at_once(
    fields: dict[str, Any], module: str, name: str, call: int
) -> None:
    (first, same, took), (second, as_well, _) = ranks.run(2, _start_fails, fields, module, name, call)
    assert first.startswith("RankError: making the factors failed on 1 of 2 ranks, so it is undone on all: rank 1: Mem")
    assert second == "MemoryError: no memory for a decomposition"
    assert same
    assert as_well
    assert took < ranks.PATIENCE / 2


def _dies_inside(timeout: float) -> tuple[str, float]:
    """Fail on rank 1 before a collective that the block has, which rank 0 then waits for."""
    from lorica.engines.together import together
    from lorica.train.ranks import limit_waiting

    model = cut()
    limit_waiting(timedelta(seconds=timeout))
    started = time.monotonic()

    def block() -> None:
        with together(model, "a block"):
            if dist.get_rank() == 1:
                raise MemoryError("none left")
            dist.all_reduce(torch.ones(1), group=next(iter(Engines(model).axes.values())).group)

    try:
        block()
    except (LoricaError, MemoryError) as error:
        return f"{type(error).__name__}: {error}", time.monotonic() - started
    return "", 0.0


def test_who_misses_a_rank_that_failed_inside_a_block_says_why() -> None:
    (first, took), (second, _) = ranks.run(2, _dies_inside, 5.0)
    assert first == "RankError: a block failed, so it is undone on all ranks: rank 1: MemoryError: none left"
    assert second == "MemoryError: none left"
    assert took < ranks.PATIENCE / 2


# ---- what else has to agree ------------------------------------------------------------------------------------------


def _lacking(layers: tuple[int, int]) -> str:
    """Rank 1's model has fewer layers than rank 0's, so that targets of the same names are fewer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "vocab_size": 32}
    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers[dist.get_rank()], **sizes))
    torch.manual_seed(1)
    return said(verify, lorica.get_peft_model(model, lorica.LoraConfig(r=2, target_modules=["q_proj"])))


def test_a_model_of_fewer_layers_is_named() -> None:
    for message in ranks.run(2, _lacking, (2, 1)):
        assert message.startswith("RankError: rank 1 differs from rank 0 in the names of what trains: nothing, not ")
        assert "layers.1.self_attn.q_proj.lora_A" in message
    assert ranks.run(2, _lacking, (1, 1)) == ["", ""]


def _adapters_and_data(names: tuple[str, str], batches: tuple[int, int]) -> str:
    model, rank = cut(), dist.get_rank()
    torch.manual_seed(1)
    adapted = lorica.get_peft_model(model, config(), adapter_name=names[rank])
    return said(verify, adapted, also={"number of batches": batches[rank]})


@pytest.mark.parametrize(
    ("names", "batches", "said_of"),
    [
        (("default", "other"), (1, 1), "names of the adapters: ['other'], not ['default']"),
        (("default", "default"), (8, 9), "number of batches: 9, not 8"),
    ],
)
def test_names_of_adapters_and_what_the_caller_adds_are_compared(
    names: tuple[str, str], batches: tuple[int, int], said_of: str
) -> None:
    for message in ranks.run(2, _adapters_and_data, names, batches):
        assert message.startswith(f"RankError: rank 1 differs from rank 0 in the {said_of}."), message


def _cannot_say() -> str:
    model = cut()
    torch.manual_seed(1)
    adapted = lorica.get_peft_model(model, config())
    if dist.get_rank() == 1:
        from lorica.ranks import agreement

        def broken(tensor: torch.Tensor) -> str:
            raise MemoryError("none left")

        agreement._digest = broken
    try:
        verify(adapted)
    except (LoricaError, MemoryError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def test_a_rank_that_cannot_say_what_it_has_is_named() -> None:
    first, second = ranks.run(2, _cannot_say)
    assert first == "RankError: what ranks are about to train cannot be compared: rank 1: MemoryError: none left"
    assert second == "MemoryError: none left"
