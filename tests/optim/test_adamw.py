"""AdamW's short way is torch's AdamW, bit for bit, and everything torch's does is still done."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lorica.optim import AdamW

SHAPES = ((4, 16), (16, 4), (3,), (1, 1), (130, 70))
OPTIONS: list[dict[str, Any]] = [
    {},
    {"amsgrad": True},
    {"maximize": True},
    {"weight_decay": 0.0, "betas": (0.5, 0.9), "eps": 1e-3},
    {"amsgrad": True, "maximize": True, "weight_decay": 0.3},
]


def parameters(dtype: torch.dtype = torch.float32, seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def give_gradients(params: list[nn.Parameter], step: int, without: tuple[int, ...] = ()) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for index, parameter in enumerate(params):
        gradient = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        parameter.grad = None if index in without else gradient


def assert_same(ours: torch.optim.Optimizer, theirs: torch.optim.Optimizer) -> None:
    for mine, other in zip(ours.param_groups, theirs.param_groups, strict=True):
        for a, b in zip(mine["params"], other["params"], strict=True):
            assert torch.equal(a, b)
    assert_same_state(ours.state_dict()["state"], theirs.state_dict()["state"])


def assert_same_state(ours: Any, theirs: Any) -> None:
    assert ours.keys() == theirs.keys()
    for number in ours:
        assert ours[number].keys() == theirs[number].keys()
        for name, value in ours[number].items():
            other = theirs[number][name]
            assert (value.shape, value.dtype, value.device) == (other.shape, other.dtype, other.device)
            assert torch.equal(value, other), (number, name)


def pair(dtype: torch.dtype = torch.float32, **options: Any) -> tuple[AdamW, torch.optim.AdamW]:
    made = []
    for kind in (AdamW, torch.optim.AdamW):
        params = parameters(dtype)
        groups = [{"params": params[:3], "lr": 0.1}, {"params": params[3:], "weight_decay": 0.5}]
        made.append(kind(groups, lr=0.01, fused=True, **options))
    return made[0], made[1]


def all_of(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


class Kernels(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and "record_function" not in func.overloadpacket.__name__:
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def takes_the_short_way(optimizer: AdamW) -> bool:
    with Kernels() as seen:
        optimizer.step()
    return seen.names == ["add_", "_fused_adamw_"] * len(optimizer.param_groups)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_number_is_that_of_torchs_fused_step(dtype, options):
    ours, theirs = pair(dtype, **options)
    schedules = [torch.optim.lr_scheduler.ExponentialLR(one, 0.8) for one in (ours, theirs)]
    for step in range(6):
        for optimizer in (ours, theirs):
            give_gradients(all_of(optimizer), step)
            optimizer.step()
        for schedule in schedules:
            schedule.step()
        assert_same(ours, theirs)
    assert takes_the_short_way(ours)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_numbers_are_those_of_a_loop_up_to_rounding(options):
    ours, theirs = AdamW(parameters(), lr=0.1, **options), None
    theirs = torch.optim.AdamW(parameters(), lr=0.1, foreach=False, fused=False, **options)
    for step in range(6):
        for optimizer in (ours, theirs):
            give_gradients(all_of(optimizer), step)
            optimizer.step()
    for mine, other in zip(all_of(ours), all_of(theirs), strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-5)


def test_parameters_come_go_and_pause():
    ours, theirs = pair()
    missing = [(), (1,), (1,), (), (0, 3), (0, 1, 2), (), (0, 1, 2, 3, 4)]
    for step, without in enumerate(missing):
        for optimizer in (ours, theirs):
            give_gradients(all_of(optimizer), step, without)
            optimizer.step()
        assert_same(ours, theirs)
    for optimizer in (ours, theirs):
        optimizer.add_param_group({"params": parameters(seed=7)[:2], "lr": 0.3})
        all_of(optimizer)[0].requires_grad_(False)
    for step in range(3):
        for optimizer in (ours, theirs):
            give_gradients(all_of(optimizer), step, (0,))
            optimizer.step()
        assert_same(ours, theirs)
    assert takes_the_short_way(ours)
    assert ours.state_dict()["state"][0]["step"] != ours.state_dict()["state"][2]["step"]


@pytest.mark.parametrize("fused", [True, None])
def test_either_loads_what_the_other_saved(fused):
    ours, theirs = AdamW(parameters(), lr=0.1), torch.optim.AdamW(parameters(), lr=0.1, fused=fused)
    for step in range(3):
        for optimizer in (ours, theirs):
            give_gradients(all_of(optimizer), step)
            optimizer.step()
    file = io.BytesIO()
    torch.save(theirs.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    to_ours, back = AdamW(parameters(), lr=0.5), torch.optim.AdamW(parameters(), lr=0.5, fused=fused)
    to_ours.load_state_dict(saved)
    assert_same_state(to_ours.state_dict()["state"], saved["state"])
    back.load_state_dict(to_ours.state_dict())
    assert_same_state(back.state_dict()["state"], saved["state"])
    give_gradients(all_of(to_ours), 3)
    to_ours.step()
    assert takes_the_short_way(to_ours)
    file = io.BytesIO()
    torch.save(ours.state_dict(), file)
    file.seek(0)
    again = torch.optim.AdamW(parameters(seed=1), lr=0.1, fused=True)
    again.load_state_dict(torch.load(file, weights_only=True))
    with torch.no_grad():
        for mine, other in zip(all_of(again), all_of(ours), strict=True):
            mine.copy_(other)
    for step in range(3, 5):
        for optimizer in (ours, again):
            give_gradients(all_of(optimizer), step)
            optimizer.step()
    assert_same(ours, again)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_a_copy_steps_alone(copied):
    ours, theirs = pair()
    for step in range(2):
        for optimizer in (ours, theirs):
            give_gradients(all_of(optimizer), step)
            optimizer.step()
    other = copied(ours)
    give_gradients(all_of(other), 5)
    other.step()
    assert_same(ours, theirs)
    give_gradients(all_of(theirs), 5)
    theirs.step()
    assert_same(other, theirs)


@pytest.mark.parametrize("whole", [False, True])
def test_state_that_somebody_replaces_is_seen(whole):
    ours, theirs = pair()
    for step in range(4):
        for optimizer in (ours, theirs):
            give_gradients(all_of(optimizer), step)
            optimizer.step()
            first = all_of(optimizer)[step % 2]
            changed = {name: value * 2 for name, value in optimizer.state[first].items()}
            if whole:
                optimizer.state[first] = changed
            else:
                optimizer.state[first].update(changed)
        assert_same(ours, theirs)


def test_gradients_with_strides_of_their_own_meet_their_numbers():
    ours, other = AdamW(parameters(), lr=0.1), AdamW(parameters(), lr=0.1)
    for step in range(3):
        for optimizer in (ours, other):
            give_gradients(all_of(optimizer), step)
        for parameter in all_of(ours)[:2]:
            parameter.grad = parameter.grad.t().contiguous().t()
        ours.step()
        other.step()
    assert_same(ours, other)


@pytest.mark.parametrize(
    "options",
    [{"foreach": True}, {"fused": False}, {"lr": torch.tensor(0.1)}],
    ids=str,
)
def test_what_the_short_way_does_not_know_is_torchs_own(options):
    made = [kind(parameters(), **{"lr": 0.1, **options}) for kind in (AdamW, torch.optim.AdamW)]
    for step in range(3):
        for optimizer in made:
            give_gradients(all_of(optimizer), step)
            optimizer.step()
    for mine, other in zip(*map(all_of, made), strict=True):
        torch.testing.assert_close(mine, other, atol=1e-6, rtol=1e-6)
    give_gradients(all_of(made[0]), 3)
    assert not takes_the_short_way(made[0])


def test_complex_parameters_are_stepped_and_sparse_gradients_refused():
    values = torch.randn(3, dtype=torch.complex64)
    made = [kind([nn.Parameter(values.clone())], lr=0.1) for kind in (AdamW, torch.optim.AdamW)]
    for optimizer in made:
        for _ in range(2):
            all_of(optimizer)[0].grad = values.flip(0)
            optimizer.step()
    torch.testing.assert_close(all_of(made[0])[0], all_of(made[1])[0])
    table = nn.Embedding(5, 3, sparse=True)
    optimizer = AdamW(table.parameters(), lr=0.1)
    for dense in (False, True):
        if dense:
            table.weight.grad = torch.ones(5, 3)
            optimizer.step()
        optimizer.zero_grad()
        before = table.weight.detach().clone()
        table(torch.tensor([1])).sum().backward()
        with pytest.raises(RuntimeError, match="sparse"):
            optimizer.step()
        assert torch.equal(table.weight, before)


def test_a_gradient_scaler_unscales_and_skips():
    made = [kind(parameters(), lr=0.1, fused=True) for kind in (AdamW, torch.optim.AdamW)]
    scalers = [torch.amp.GradScaler("cpu", init_scale=4.0) for _ in made]
    for step in range(5):
        for optimizer, scaler in zip(made, scalers, strict=True):
            give_gradients(all_of(optimizer), step)
            for parameter in all_of(optimizer):
                parameter.grad.mul_(float(scaler.scale(torch.ones(()))))
            if step == 2:
                all_of(optimizer)[1].grad[0, 0] = float("inf")
            if step == 3:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        assert_same(*made)
    assert float(made[0].state_dict()["state"][0]["step"]) == 4


def test_hooks_and_closures_run_once():
    calls: list[str] = []
    made = [AdamW(parameters(), lr=0.1), AdamW(parameters(), lr=0.1, foreach=True)]
    torch.optim.AdamW(parameters())  # torch wraps the step of its class when it makes the first object
    for optimizer in made:
        optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
        optimizer.register_step_post_hook(lambda *_: calls.append("after"))

        def closure(optimizer: AdamW = optimizer) -> float:
            assert torch.is_grad_enabled()
            calls.append("closure")
            give_gradients(all_of(optimizer), 0)
            return 3.0

        assert optimizer.step(closure) == 3.0
        assert calls == ["before", "closure", "after"]
        calls.clear()


def test_groups_may_be_generators_names_or_single_tensors():
    params = parameters()
    given = [
        iter(params),
        [{"params": iter(params[:2])}, {"params": params[2]}],
        [{"params": params}],
        [(str(index), parameter) for index, parameter in enumerate(params)],
    ]
    for one in given:
        optimizer = AdamW(one, lr=0.1)
        assert all(group["fused"] for group in optimizer.param_groups)
        give_gradients(all_of(optimizer), 0)
        optimizer.step()
        assert takes_the_short_way(optimizer)


def test_gradients_set_to_zero_are_steps_too():
    ours, theirs = pair()
    for step in range(4):
        for optimizer in (ours, theirs):
            give_gradients(all_of(optimizer), step)
            if step == 2:
                optimizer.zero_grad(set_to_none=False)
            if step == 3:
                optimizer.zero_grad()
            optimizer.step()
        assert_same(ours, theirs)
    assert float(ours.state_dict()["state"][0]["step"]) == 3
