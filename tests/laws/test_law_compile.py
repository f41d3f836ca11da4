"""``torch.compile`` sees one graph through every adapted layer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import ALL_OPS, adapt, assert_close, by_name
from torch import nn
from torch._dynamo.testing import CompileCounter

import lorica
import mixtures
from cases import Op
from models import VOCABULARY, ids, randomise, tiny_llama

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
    """One adapter, disabled, merged: no graph break, and the same output."""
    model, batch = adapt(op.build(), op), op.inputs()
    with torch.no_grad():
        assert_close(compiled(model)(batch), model(batch), 1e-6)
        model.base_model.disable_adapter_layers()
        assert torch.equal(compiled(model)(batch), model(batch))
        model.base_model.enable_adapter_layers()
        if op.mergeable:
            model.merge_adapter()
            assert torch.equal(compiled(model)(batch), model(batch))


@pytest.mark.parametrize("op", ALL_OPS, ids=by_name)
def test_gradients_through_a_compiled_graph(op: Op) -> None:
    """Of two adapters at once, and their output."""
    model, batch = adapt(op.build(), op).train(), op.inputs()
    model.add_adapter("other", op.config(lorica, r=op.ranks[-1]))
    randomise(model)
    model.base_model.set_adapter(["default", "other"])
    outputs, grads = [], []
    for forward in (model, compiled(model, "aot_eager")):
        model.zero_grad(set_to_none=True)
        output = forward(batch)
        output.square().sum().backward()
        outputs.append(output)
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert_close(outputs[1], outputs[0], 1e-6)
    assert any("other" in name for name in grads[0])
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


# ---- variants -------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """An embedding, two linears and a norm, by names that variants ask for."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 16)
        self.q_proj = nn.Linear(16, 16)
        self.o_proj = nn.Linear(16, 16)
        self.norm = nn.LayerNorm(16)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        return self.norm(x + self.o_proj(torch.relu(self.q_proj(x))))


#: Fields of a config; what is called with ``adapter_names`` or in training is said by the tests.
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dropout": {"lora_dropout": 0.3},
    "dropout post": {"lora_dropout": 0.3, "dropout_position": "post"},
    "lora_bias": {"lora_bias": True},
    "dora": {"use_dora": True},
    "dora, dropout": {"use_dora": True, "lora_dropout": 0.3},
    "kasa": {"kasa_config": {}},
    "mica": {"init_lora_weights": "mica"},
    "bd-lora": {
        "use_bdlora": {"nblocks": 2, "target_modules_bd_a": ["o_proj"], "target_modules_bd_b": ["q_"]},
    },
    "qa-lora": {"use_qalora": True, "qalora_group_size": 4},
    "velora": {"velora_config": {"num_groups": 4, "scale": 0.9}},
    "velora, random": {"velora_config": {"num_groups": 4, "scale": 0.9, "init_type": "random"}},
    "monteclora": {"monteclora_config": {"num_samples": 3, "sample_scaler": 0.1}},
    "alora": {"alora_invocation_tokens": [5], "task_type": "CAUSAL_LM"},
    "embedding": {"target_modules": ["embed", "q_proj"]},
    "dora, embedding": {"target_modules": ["embed"], "use_dora": True},
    "modules_to_save": {"modules_to_save": ["norm"]},
    "trainable tokens": {"trainable_token_indices": {"embed": [3, 5, 7]}},
}


#: Variants whose mask in a compiled graph is drawn in another way, as compilers do.
RANDOM = {"dropout", "dropout post", "dora, dropout"}


def adapted_net(name: str) -> nn.Module:
    torch.manual_seed(0)
    fields = {"r": 4, "target_modules": ["q_proj", "o_proj"], "init_lora_weights": False, **VARIANTS[name]}
    return randomise(lorica.get_peft_model(Net(), lorica.LoraConfig(**fields)))


def tokens() -> torch.Tensor:
    batch = ids(3, 6)
    batch[0, 3] = batch[1, 1] = 5  # an aLoRA's invocation in two of three rows
    return batch


def loss_of(output: torch.Tensor) -> torch.Tensor:
    """A fixed function of an output; its squares would not do, of which a norm at the end leaves the sum alone."""
    return (output * torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)).sum()


def output_and_grads(
    forward: Any, model: nn.Module, **arguments: Any
) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
    model.zero_grad(set_to_none=True)
    torch.manual_seed(0)
    output = forward(input_ids=tokens(), **arguments)
    loss_of(output).backward()
    return output.detach(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def assert_same_step(forward: Any, model: nn.Module, tolerance: float = 1e-5, **arguments: Any) -> None:
    """Output and gradients, those of a compiled forward beside those of the model's own."""
    output, grads = output_and_grads(model, model, **arguments)
    found, compiled_grads = output_and_grads(forward, model, **arguments)
    assert_close(found, output, tolerance)
    for name, grad in grads.items():
        other = compiled_grads[name]
        assert (grad is None) == (other is None), name
        if grad is not None and other is not None and grad.any():
            assert_close(other, grad, tolerance)


def assert_gradients_belong_to_the_output(forward: Any, model: nn.Module) -> None:
    """A small step along a gradient changes the loss by what the gradient says, under the same mask.

    DoRA's norm counts as a constant for the factors' gradients (section 4.3 of its paper), so there the
    magnitude moves.
    """
    parameters = dict(model.named_parameters())
    moved = "lora_magnitude" if any("lora_magnitude" in name for name in parameters) else "lora_A"
    factors = [parameter for name, parameter in parameters.items() if moved in name]

    def loss() -> torch.Tensor:
        torch.manual_seed(5)
        return loss_of(forward(input_ids=tokens()).double())

    @torch.no_grad()
    def move(by: float) -> None:
        for factor, grad in zip(factors, grads, strict=True):
            factor.add_(grad, alpha=by)

    grads = torch.autograd.grad(loss(), factors)
    slope = sum(float(grad.double().square().sum()) for grad in grads)
    by = 1e-2 / slope**0.5
    ends = []
    for sign in (1, -1):
        move(sign * by)
        ends.append(loss().item())
        move(-sign * by)
    assert (ends[0] - ends[1]) / (2 * by) == pytest.approx(slope, rel=2e-2)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_one_graph_forward_and_backward(name: str) -> None:
    model = adapted_net(name).train()
    forward = compiled(model, "aot_eager")
    if name in RANDOM:
        assert_gradients_belong_to_the_output(forward, model)
    else:
        assert_same_step(forward, model)
    model.eval()
    with torch.no_grad():
        assert_close(compiled(model)(input_ids=tokens()), model(input_ids=tokens()), 1e-6)


@pytest.mark.parametrize("name", ["plain", "dropout", "dora"])
def test_the_compiler_that_users_have_gives_the_same(name: str) -> None:
    model = adapted_net(name).train()
    forward = compiled(model, "inductor")
    if name in RANDOM:
        assert_gradients_belong_to_the_output(forward, model)
    else:
        assert_same_step(forward, model)


@pytest.mark.parametrize("fields", [{}, {"use_dora": True}, {"lora_dropout": 0.3}], ids=str)
def test_several_active_adapters(fields: dict[str, Any]) -> None:
    model = adapted_net("plain").train()
    model.add_adapter("other", lorica.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, **fields))
    randomise(model)
    model.base_model.set_adapter(["default", "other"])
    assert_same_step(compiled(model, "aot_eager"), model)


def test_rows_of_several_adapters() -> None:
    model = adapted_net("plain").eval()
    model.add_adapter("other", lorica.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    randomise(model)
    names = ["default", "__base__", "other"]
    with torch.no_grad():
        found = compiled(model, "aot_eager")(input_ids=tokens(), adapter_names=names)
        assert_close(found, model(input_ids=tokens(), adapter_names=names), 1e-6)


def test_a_router_over_adapters(tmp_path: Path) -> None:
    paths = []
    for index in range(3):
        adapter = adapted_net("plain")
        randomise(adapter, index)
        adapter.save_pretrained(tmp_path / str(index))
        paths.append(str(tmp_path / str(index)))
    torch.manual_seed(0)
    model = lorica.create_arrow_model(Net(), paths, lorica.ArrowConfig(top_k=2)).eval()
    with torch.no_grad():
        assert_close(compiled(model, "aot_eager")(input_ids=tokens()), model(input_ids=tokens()), 1e-6)


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_stacked_experts(implementation: str) -> None:
    """transformers' "eager" experts break a graph by themselves."""
    config = lorica.LoraConfig(r=4, target_modules=[], target_parameters=mixtures.STACKS, init_lora_weights=False)
    model = lorica.get_peft_model(mixtures.moe(implementation=implementation, num_hidden_layers=1), config)
    model = randomise(model).train()
    forward = compiled(model, "aot_eager")

    def logits(of: nn.Module) -> Any:
        return lambda input_ids: of(input_ids=input_ids, use_cache=False).logits

    output, grads = output_and_grads(logits(model), model)
    found, compiled_grads = output_and_grads(logits(forward), model)
    assert_close(found, output, 1e-5)
    for name, grad in grads.items():
        assert_close(compiled_grads[name], grad, 1e-4)


def test_a_graph_for_each_state_and_no_more() -> None:
    """Back in a state that was compiled, nothing is compiled again."""
    model = adapted_net("plain")
    model.add_adapter("other", lorica.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    counter = CompileCounter()
    torch.compiler.reset()
    forward = torch.compile(model, fullgraph=True, backend=counter)
    with torch.no_grad():
        for _ in range(3):
            for name in ("default", "other"):
                model.set_adapter(name)
                forward(input_ids=tokens())
            with model.disable_adapter():
                forward(input_ids=tokens())
    assert counter.frame_count == 3


def test_steps_of_training_are_compiled_once() -> None:
    """What changes from step to step (factors, their versions, caches made of them) is no reason to compile again."""
    for name in ("plain", "dora", "dropout"):
        model = adapted_net(name).train()
        counter = CompileCounter()
        torch.compiler.reset()
        forward = torch.compile(model, fullgraph=True, backend=counter)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
        for _ in range(3):
            loss_of(forward(input_ids=tokens())).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert counter.frame_count == 1, name
