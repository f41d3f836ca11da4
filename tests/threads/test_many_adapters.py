"""Adapters that change in one thread while others compute with them: the old version or the new one, never both."""

from __future__ import annotations

import copy
import pickle
import shutil
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from meeting import Gate, Running, meet_at, stopping_at, until
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lorica
from lorica.adapt import inject
from lorica.checkpoint import loading
from lorica.errors import AdapterError, CheckpointError
from lorica.model import hotswap
from models import MLP, floats, randomise

X = floats(3, 10)
TARGETS = ["lin0", "lin1"]


def config(**fields: Any) -> lorica.LoraConfig:
    return lorica.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False, **fields)


def base() -> nn.Module:
    torch.manual_seed(0)
    return MLP().eval().requires_grad_(False)


def adapted(*names: str) -> lorica.PeftModel:
    model = lorica.get_peft_model(base(), config(), names[0])
    for name in names[1:]:
        model.add_adapter(name, config())
    return randomise(model).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two versions of an adapter, and one whose last tensor is not finite."""
    where = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("old", "new", "broken")):
        randomise(lorica.get_peft_model(base(), config()), seed).save_pretrained(where / name)
    path = where / "broken" / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors[max(tensors)][0, 0] = torch.nan
    save_file(tensors, path)
    return where


def alone(path: Path) -> Tensor:
    return compute(lorica.PeftModel.from_pretrained(base(), path).eval())


@torch.no_grad()
def compute(model: nn.Module, names: Sequence[str] | None = None, x: Tensor = X) -> Tensor:
    return model(x) if names is None else model(x, adapter_names=list(names))


def lin1(model: nn.Module) -> nn.Module:
    """A module in the middle of a forward: one adapted layer comes before it."""
    return model.get_base_model().lin1  # type: ignore[operator]


def waits(model: Any) -> None:
    """Wait until a thread waits to write."""
    until(lambda: model.base_model.switch.turns._waits)


def waiters(model: Any, count: int) -> None:
    """Wait until so many threads wait for their turns."""
    until(lambda: len(model.base_model.switch.turns._free._waiters) == count)


# ---- a change that comes in the middle of a forward ------------------------------------------------------------------


def swap(model: Any, folder: Path) -> None:
    lorica.hotswap_adapter(model, folder / "new", "default")


def load_over(model: Any, folder: Path) -> None:
    model.load_adapter(folder / "new", "default")


def write_state(model: Any, folder: Path) -> None:
    lorica.set_peft_model_state_dict(model, load_file(folder / "new" / "adapter_model.safetensors"))


def switch_to_another(model: Any, folder: Path) -> None:
    model.set_adapter("other")


def delete(model: Any, folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the adapter was active
        model.delete_adapter("default")


def turn_off(model: Any, folder: Path) -> None:
    model.base_model.disable_adapter_layers()


def merge_another(model: Any, folder: Path) -> None:
    model.merge_adapter(["other"])


def scale(model: Any, folder: Path) -> None:
    block = lorica.rescale_adapter_scale(model, 3.0)
    block.__enter__()
    model.scaled = block  # a block that is forgotten is left


CHANGES: list[Callable[[Any, Path], None]] = [
    *(swap, load_over, write_state, switch_to_another, delete, turn_off, merge_another, scale),
]


@pytest.mark.filterwarnings("ignore:Adapter default was active")
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_forward_ends_with_what_it_began_with(change: Callable[[Any, Path], None], folder: Path) -> None:
    """The change waits for the forward, and forwards that begin meanwhile wait for the change."""
    model = lorica.PeftModel.from_pretrained(base(), folder / "old").eval()
    model.add_adapter("other", config())
    before = compute(model)
    with stopping_at(lin1(model)) as gate:
        first = Running(compute, model)
        gate.wait()
        changing = Running(change, model, folder)
        waits(model)
        late = Running(compute, model)
        waiters(model, 2)
        assert not changing.done
        gate.open()
        assert torch.equal(first.result(), before)
        changing.result()
        after = late.result()
    assert torch.equal(after, compute(model))
    assert not torch.equal(after, before)


@pytest.mark.parametrize("change", [swap, load_over], ids=lambda change: change.__name__)
def test_a_forward_does_not_begin_while_half_is_written(
    change: Callable[[Any, Path], None], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = lorica.PeftModel.from_pretrained(base(), folder / "old").eval()
    gate, module, name = Gate(), *((hotswap, "write_pieces") if change is swap else (loading, "copy_whole"))
    whole = getattr(module, name)

    def in_halves(first: Any, second: Any = None) -> None:
        items = list(first if second is None else second.items())
        for half in (items[: len(items) // 2], items[len(items) // 2 :]):
            whole(half) if second is None else whole(first, dict(half))
            gate()

    monkeypatch.setattr(module, name, in_halves)
    changing = Running(change, model, folder)
    gate.wait()
    forward = Running(compute, model)
    waiters(model, 1)
    assert not forward.done
    gate.open()
    changing.result()
    assert torch.equal(forward.result(), alone(folder / "new"))


def test_files_are_read_while_forwards_go_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until it is there, a new adapter cannot be named; nothing else is noticed of it."""
    model = lorica.PeftModel.from_pretrained(base(), folder / "old").eval()
    before, gate, read = compute(model), Gate(), loading.read_whole

    def read_slowly(*args: Any) -> Any:
        gate()
        return read(*args)

    monkeypatch.setattr(loading, "read_whole", read_slowly)
    loaded = Running(model.load_adapter, folder / "new", "next")
    gate.wait()
    assert torch.equal(compute(model), before)
    assert list(model.peft_config) == ["default"]
    with pytest.raises(AdapterError, match="non-existing adapter"):
        compute(model, ["default", "next", "default"])
    saving = Running(model.save_pretrained, folder / "saved")  # not while something changes
    switching = Running(model.set_adapter, "next")  # waits until it is there
    waiters(model, 2)
    assert torch.equal(compute(model), before)
    gate.open()
    loaded.result()
    saving.result()
    switching.result()
    assert torch.equal(compute(model), alone(folder / "new"))


def test_two_threads_that_load_one_name_load_one_adapter(folder: Path) -> None:
    model = lorica.PeftModel.from_pretrained(base(), folder / "old").eval()
    loads = [Running(model.load_adapter, folder / "new", "next") for _ in range(4)]
    for load in loads:
        load.result()
    assert list(model.peft_config) == ["default", "next"]
    assert torch.allclose(compute(model, ["next"] * 3), alone(folder / "new"), atol=1e-6)


# ---- a change that fails ---------------------------------------------------------------------------------------------


def test_a_load_that_fails_leaves_what_is_in_use(folder: Path) -> None:
    model = lorica.PeftModel.from_pretrained(base(), folder / "old").eval()
    before, state = compute(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with stopping_at(lin1(model)) as gate:
        forward = Running(compute, model)
        gate.wait()
        # These fail before they would wait for the forward.
        for failing in (
            Running(lorica.hotswap_adapter, model, folder / "broken", "default"),
            Running(model.load_adapter, folder / "broken", "default"),
        ):
            with pytest.raises(CheckpointError, match="NaN"):
                failing.result()
        failing = Running(model.load_adapter, folder / "broken", "next")  # it waits to put its layers in
        waits(model)
        gate.open()
        assert torch.equal(forward.result(), before)
    with pytest.raises(CheckpointError, match="NaN"):
        failing.result()
    assert torch.equal(compute(model), before)
    assert list(model.peft_config) == ["default"]
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == {n: t.shape for n, t in state.items()}
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    swap(model, folder)  # and turns are free again
    assert torch.equal(compute(model), alone(folder / "new"))


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


def test_a_refused_load_leaves_no_modules_behind(folder: Path, tmp_path: Path) -> None:
    """Of a configuration that asks for magnitudes, over a file that has none."""
    model = lorica.PeftModel.from_pretrained(base(), folder / "old").eval()
    tree = [name for name, _ in model.named_modules()]
    config(use_dora=True).save_pretrained(tmp_path)
    shutil.copy(folder / "new" / "adapter_model.safetensors", tmp_path)
    with pytest.raises(CheckpointError, match="lora_magnitude_vector"):
        model.load_adapter(tmp_path, "next")
    assert [name for name, _ in model.named_modules()] == tree


def test_its_state_is_collected_while_layers_come_and_go(folder: Path) -> None:
    model = lorica.PeftModel.from_pretrained(base(), folder / "old").eval()
    stop, wanted = threading.Event(), set(lorica.get_peft_model_state_dict(model))

    def collect() -> None:
        while not stop.is_set():
            assert set(lorica.get_peft_model_state_dict(model)) == wanted
            assert sum("next" in name for name in model.state_dict()) in (0, 2)
            assert len(model.get_layer_status()) - len(TARGETS) in (0, 1)

    collecting = Running(collect)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(20):
            model.add_adapter("next", lorica.LoraConfig(r=2, target_modules=["head"]))
            model.delete_adapter("next")
    finally:
        sys.setswitchinterval(before)
        stop.set()
    collecting.result()


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


# ---- a thread's own change in the middle of its forward --------------------------------------------------------------


def test_a_hook_may_switch_adapters_in_its_own_forward() -> None:
    model = adapted("a", "b")
    with torch.no_grad():
        hidden = model.get_base_model().lin0(X)
    lin1(model).register_forward_pre_hook(lambda *args: model.set_adapter("b"))
    found = compute(model)
    model.set_adapter("b")
    inner = model.get_base_model()
    assert torch.equal(found, inner.head(inner.act(inner.lin1(inner.act(hidden)))))


def test_but_not_while_another_thread_changes_something() -> None:
    model = adapted("a", "b")
    gate = Gate()

    def hook(*args: Any) -> None:
        gate()
        model.set_adapter("b")

    lin1(model).register_forward_pre_hook(hook)
    forward = Running(compute, model)
    gate.wait()
    other = Running(model.set_adapter, "a")
    waits(model)
    gate.open()
    with pytest.raises(AdapterError, match="another thread is changing"):
        forward.result()
    other.result()
    assert model.active_adapters == ["a"]


# ---- models whose forwards take no turns -----------------------------------------------------------------------------


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("_fresh_compiler")
def test_a_compiled_model_is_held(folder: Path) -> None:
    """No graph is broken or made again by turns, by rows of other threads, or in another thread."""
    model = lorica.PeftModel.from_pretrained(base(), folder / "old").eval()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    before, names = compute(compiled), ["default", "__base__", "default"]
    compute(compiled, names)
    with torch.compiler.set_stance("fail_on_recompile"), lorica.hold_adapters(compiled):
        swapping = Running(swap, compiled, folder)
        waits(model)
        assert torch.equal(compute(compiled), before)
        assert not swapping.done
    swapping.result()
    gate = Gate()

    def in_block() -> None:
        with lorica.route_rows(model, names):
            gate()

    other = Running(in_block)
    gate.wait()
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.allclose(compute(compiled), alone(folder / "new"), atol=1e-6)
        assert torch.allclose(Running(compute, compiled).result(), alone(folder / "new"), atol=1e-6)
    gate.open()
    other.result()


def test_a_model_without_a_wrapper_is_held(folder: Path) -> None:
    model = lorica.inject_adapter_in_model(config(), base())
    before = compute(model)
    with lorica.hold_adapters(model):
        tensors = load_file(folder / "new" / "adapter_model.safetensors")
        tensors = {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}
        changing = Running(lorica.set_peft_model_state_dict, model, tensors, strict=True)
        until(lambda: model.lin0.switch.turns._waits)  # type: ignore[union-attr]
        assert torch.equal(compute(model), before)
    changing.result()
    assert torch.equal(compute(model), alone(folder / "new"))
    with pytest.raises(AdapterError, match="no adapters"), lorica.hold_adapters(base()):
        pass


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_that_is_made_in_a_block_is_free(duplicate: Callable[[Any], Any], folder: Path) -> None:
    model = lorica.PeftModel.from_pretrained(base(), folder / "old").eval()
    with lorica.route_rows(model, ["default", "__base__", "default"]):
        other = duplicate(model)
        Running(swap, other, folder).result()
        assert torch.equal(compute(other), alone(folder / "new"))
    assert torch.equal(compute(model), alone(folder / "old"))
