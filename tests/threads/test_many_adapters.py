"""Adapters that change in one thread while others compute with them: the old version or the new one, never both."""

from __future__ import annotations

import copy
import pickle
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from adapted_models import TARGETS, X, adapted, alone, base, compute, config, lin1, waiters, waits
from meeting import Gate, Running, stopping_at, until
from safetensors.torch import load_file

import lorica
from lorica.adapt import inject
from lorica.checkpoint import loading
from lorica.errors import AdapterError, CheckpointError
from lorica.model import hotswap

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


def test_a_router_does_not_see_an_adapter_before_it_is_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A router goes over all adapters of a layer."""
    routed = lorica.ArrowConfig(top_k=3)
    model = lorica.create_arrow_model(base(), [folder / "old", folder / "new"], routed).eval()
    before, gate, read = compute(model), Gate(), loading.read_whole

    def read_slowly(*args: Any) -> Any:
        gate()
        return read(*args)

    monkeypatch.setattr(loading, "read_whole", read_slowly)
    loaded = Running(model.load_adapter, folder / "new", "task_2")
    gate.wait()
    assert torch.equal(compute(model), before)
    gate.open()
    loaded.result()
    assert not torch.equal(compute(model), before)


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


def test_what_is_refused_or_deleted_leaves_no_modules_behind(folder: Path, tmp_path: Path) -> None:
    """A configuration that asks for magnitudes, over a file that has none; and an adapter that has some."""
    model = lorica.PeftModel.from_pretrained(base(), folder / "old").eval()
    tree = [name for name, _ in model.named_modules()]
    config(use_dora=True).save_pretrained(tmp_path)
    shutil.copy(folder / "new" / "adapter_model.safetensors", tmp_path)
    with pytest.raises(CheckpointError, match="lora_magnitude_vector"):
        model.load_adapter(tmp_path, "next")
    assert [name for name, _ in model.named_modules()] == tree
    model.add_adapter("next", config(use_dora=True))
    model.delete_adapter("next")
    assert [name for name, _ in model.named_modules()] == tree


def test_what_walks_over_the_model_waits_until_layers_are_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = lorica.PeftModel.from_pretrained(base(), folder / "old").eval()
    gate, introduce = Gate(), inject.introduce

    def slowly(*args: Any) -> None:
        gate()
        introduce(*args)

    monkeypatch.setattr(inject, "introduce", slowly)
    adding = Running(model.add_adapter, "next", lorica.LoraConfig(r=2, target_modules=["head"]))
    gate.wait()
    walks = [lorica.get_peft_model_state_dict, type(model).state_dict, type(model).get_layer_status]
    walking = [Running(walk, model) for walk in (*walks, type(model).get_nb_trainable_parameters)]
    waiters(model, len(walking))
    gate.open()
    adding.result()
    tensors, state, status, _ = (walk.result() for walk in walking)
    assert len(tensors) == 2 * len(TARGETS)
    assert sum("next" in name for name in state) == 2
    assert len(status) == len(TARGETS) + 1


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
