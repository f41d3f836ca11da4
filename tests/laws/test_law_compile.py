"""``torch.compile`` sees one graph through every adapted layer."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from harness import ALL_OPS, adapt, assert_close, by_name
from torch import nn

import lorica
from cases import Op
from models import ids, randomise, tiny_llama

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*groups.*"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
    pytest.mark.filterwarnings("ignore::FutureWarning:torch"),
]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(model: nn.Module, backend: str = "eager"):
    torch.compiler.reset()
    return torch.compile(model, fullgraph=True, backend=backend)


@pytest.mark.parametrize("op", ALL_OPS, ids=by_name)
def test_every_operation_in_every_state(op: Op) -> None:
    """One adapter, two at once, disabled, merged: no graph break, and the same output."""
    model, batch = adapt(op.build(), op), op.inputs()
    with torch.no_grad():
        assert_close(compiled(model)(batch), model(batch), 1e-6)
        model.add_adapter("other", op.config(lorica, r=op.ranks[-1]))
        randomise(model)
        model.base_model.set_adapter(["default", "other"])
        assert_close(compiled(model)(batch), model(batch), 1e-6)
        model.base_model.disable_adapter_layers()
        assert torch.equal(compiled(model)(batch), model(batch))
        model.base_model.enable_adapter_layers()
        if op.mergeable:
            model.merge_adapter()
            assert torch.equal(compiled(model)(batch), model(batch))


@pytest.mark.parametrize("op", ALL_OPS, ids=by_name)
def test_gradients_through_a_compiled_graph(op: Op) -> None:
    model, batch = adapt(op.build(), op).train(), op.inputs()
    grads = []
    for forward in (model, compiled(model, "aot_eager")):
        model.zero_grad(set_to_none=True)
        forward(batch).square().sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert list(grads[0]) == list(grads[1])
    for name, grad in grads[0].items():
        assert_close(grads[1][name], grad, 1e-5)


@pytest.mark.parametrize("position", ["pre", "post"])
def test_dropout_in_training(position: str) -> None:
    op = ALL_OPS[0]
    model = adapt(op.build(), op, lora_dropout=0.5, dropout_position=position).train()
    assert bool(torch.isfinite(compiled(model, "aot_eager")(op.inputs())).all())


def test_a_whole_model() -> None:
    config = lorica.LoraConfig(
        target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM", modules_to_save=["norm"]
    )
    model = lorica.get_peft_model(tiny_llama(), config).eval()
    batch = ids(2, 6)
    with torch.no_grad():
        out = compiled(model)(input_ids=batch, use_cache=False).logits
        assert_close(out, model(input_ids=batch, use_cache=False).logits, 1e-6)


def test_switching_adapters_is_seen() -> None:
    """A graph compiled for one adapter is not used for another."""
    op = ALL_OPS[0]
    model = adapt(op.build(), op)
    model.add_adapter("other", op.config(lorica, r=2))
    randomise(model)
    forward = compiled(model)
    for name in ("default", "other", "default"):
        model.set_adapter(name)
        assert_close(forward(op.inputs()), model(op.inputs()), 1e-6)
    with model.disable_adapter():
        assert torch.equal(forward(op.inputs()), model(op.inputs()))
    assert_close(forward(op.inputs()), model(op.inputs()), 1e-6)
