"""Rows of a batch in several threads: each thread has its own, and deltas that are in weights are one thread's."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from adapted_models import X, adapted, base, compute, lin1, waiters, waits
from meeting import Gate, Running, meet_at, stopping_at, until
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lorica
from lorica.adapt import inject
from lorica.errors import AdapterError
from models import floats, randomise

# ---- rows ------------------------------------------------------------------------------------------------------------


def test_rows_are_the_threads_own() -> None:
    """Forwards of four threads are in one layer at the same time: with rows, with others, with none, and in a block."""
    model = adapted("a", "b", "c")
    solo = {name: compute(model, [name] * 3) for name in ("a", "b", "c", "__base__")}
    named = [["a", "b", "c"], ["c", "__base__", "b"], None, ["b", "b", "a"]]
    meet_at(lin1(model), len(named))

    def in_block(names: list[str]) -> Tensor:
        with lorica.route_rows(model, names):
            return compute(model)

    running = [Running(compute, model, names) for names in named[:-1]] + [Running(in_block, named[-1])]
    for names, thread in zip(named, running, strict=True):
        wanted = torch.stack([solo[name][row] for row, name in enumerate(names or ["a"] * 3)])
        torch.testing.assert_close(thread.result(), wanted, atol=1e-6, rtol=1e-5)


def test_an_adapter_that_is_deleted_while_rows_have_it_gives_them_their_whole_output() -> None:
    model, names = adapted("a", "b"), ["b", "a", "b"]
    before = compute(model, names)
    with stopping_at(lin1(model)) as gate:
        rows = Running(compute, model, names)
        gate.wait()
        deleting = Running(model.delete_adapter, "b")
        waits(model)
        late = Running(compute, model, names)
        waiters(model, 2)
        gate.open()
        assert torch.equal(rows.result(), before)
        deleting.result()
        with pytest.raises(AdapterError, match="non-existing adapter"):
            late.result()
    assert torch.allclose(compute(model, ["a"] * 3)[1], before[1], atol=1e-6)


def test_rows_do_not_find_an_adapter_that_is_half_deleted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its layers have forgotten it and its name is still known: rows would be the base model's without a word."""
    model, gate, take_out = adapted("a", "b"), Gate(), inject.take_out

    def taken_out(*args: Any) -> None:
        take_out(*args)
        gate()

    monkeypatch.setattr(inject, "take_out", taken_out)
    deleting = Running(model.delete_adapter, "b")
    gate.wait()
    rows = Running(compute, model, ["b", "a", "b"])
    waiters(model, 1)
    gate.open()
    deleting.result()
    with pytest.raises(AdapterError, match="non-existing adapter"):
        rows.result()


def test_a_block_of_rows_keeps_its_adapters() -> None:
    model, names = adapted("a", "b"), ["b", "a", "b"]
    before = compute(model, names)
    with lorica.route_rows(model, names):
        deleting = Running(model.delete_adapter, "b")
        waits(model)
        assert torch.allclose(compute(model), before, atol=1e-6)
        worker = Running(compute, model)  # of a pool, for which the block's thread waits
        assert torch.equal(worker.result(), compute(model, ["a"] * 3))
        assert not deleting.done
    deleting.result()


def test_a_part_of_a_batch_in_another_thread_is_refused_rows() -> None:
    model = adapted("a", "b")
    replica = model.base_model._replicate_for_data_parallel()
    with lorica.route_rows(model, ["b", "a", "b"]):
        with pytest.raises(AdapterError, match=r"nn\.DataParallel"):
            Running(compute, replica).result()
        assert torch.equal(compute(replica), compute(model))
    assert torch.equal(Running(compute, replica).result(), compute(model))


class Meeting(nn.Module):
    """A model whose layers are in other threads' hands at the same time: a base with one module in the middle."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.first, self.middle = nn.Linear(6, 6), middle

    def forward(self, x: Tensor) -> Tensor:
        return self.middle(self.first(x))


class Matrix(nn.Module):
    """A module that multiplies by a bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, self.weight)


class Attending(nn.Module):
    """An attention that looks at its input alone."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


INWARD = {
    "parameter": (Matrix, {"target_parameters": ["middle.weight"]}, "middle"),
    "attention": (Attending, {"target_modules": ["attention"]}, "middle.attention"),
}


@pytest.mark.parametrize(("middle", "fields", "where"), INWARD.values(), ids=INWARD)
def test_deltas_in_a_modules_weights_are_one_threads(
    middle: type[nn.Module], fields: dict[str, Any], where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    made = lorica.LoraConfig(r=2, **{"target_modules": [], **fields}, init_lora_weights=False)
    model = lorica.get_peft_model(Meeting(middle()), made, "a")
    model.add_adapter("b", made)
    randomise(model).eval()
    x = floats(1, 2, 6)
    names = ("a", "b", "__base__")
    wanted = {name: compute(model, [name], x) for name in names}
    gate, turns = Gate(), model.base_model.switch.turns
    asked: list[int] = []
    alone_of = type(turns).alone

    def alone(self: Any, thing: object) -> Any:
        asked.append(threading.get_ident())
        return alone_of(self, thing)

    monkeypatch.setattr(type(turns), "alone", alone)
    layer = model.get_base_model().get_submodule(where)
    layer.get_base_layer().register_forward_pre_hook(gate)  # type: ignore[operator]
    running = [Running(compute, model, ["a"], x)]
    gate.wait()  # its delta is in the module's weight
    running += [Running(compute, model, [name], x) for name in names[1:]]
    until(lambda: len(set(asked)) == len(names))
    gate.open()
    for name, thread in zip(names, running, strict=True):
        torch.testing.assert_close(thread.result(), wanted[name])


def test_of_several_threads_that_find_adapters_off_one_unmerges() -> None:
    model = adapted("a")
    with model.disable_adapter():
        wanted = compute(model)
    model.merge_adapter()
    meet_at(lin1(model), 4)
    with model.disable_adapter():
        for thread in [Running(compute, model) for _ in range(4)]:
            torch.testing.assert_close(thread.result(), wanted)
    weights = {name: tensor for name, tensor in model.get_base_model().state_dict().items() if "base_layer" in name}
    for name, tensor in base().state_dict().items():
        found = weights.get(name.replace("lin0.", "lin0.base_layer.").replace("lin1.", "lin1.base_layer."))
        assert found is None or torch.allclose(found, tensor, atol=1e-6), name


# ---- recomputation ---------------------------------------------------------------------------------------------------


def test_layers_that_autograds_threads_run_again_know_the_rows_of_the_thread_that_called_it() -> None:
    """On an accelerator a backward pass runs in threads of autograd's. On a CPU so does one that is nested deep enough
    (60 levels), for want of stack."""
    model = adapted("a", "b")
    names = ["b", "a", "b"]
    threads: set[int] = set()
    x = X.clone().requires_grad_(True)

    def forward(x: Tensor) -> Tensor:
        threads.add(threading.get_ident())
        return model.get_base_model()(x)

    def nested(x: Tensor, depth: int) -> Tensor:
        return checkpoint(nested if depth else forward, *((x, depth - 1) if depth else (x,)), use_reentrant=True)

    with lorica.route_rows(model, names):
        forward(x).sum().backward()
        wanted, x.grad = x.grad, None
        nested(x, 62).sum().backward()
    assert len(threads) > 1
    torch.testing.assert_close(x.grad, wanted)
