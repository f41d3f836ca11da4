"""Layers over Transformer Engine, by stand-ins: adapted as Megatron-Core's own layers with the same weights."""

from __future__ import annotations

from functools import partial
from typing import Any

import outcomes
import pytest
import te_layers
import torch
import torch.distributed as dist
import world
from gpt import HIDDEN, Division, chunks
from torch import Tensor, nn

from lorica import LoraConfig, get_peft_model
from lorica.errors import AdapterError, LayoutError

world.need_megatron()

WHOLE = Division()
LINEARS = ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]


@world.case(ranks=2, divisions=[WHOLE, Division(tp=2), Division(tp=2, sp=True)])
def as_megatrons_own(division: Division) -> None:
    for wanted in (outcomes.config(), outcomes.config(use_dora=True), outcomes.config(fused_as_one=True)):
        own = outcomes.outcome(WHOLE, wanted)
        found = outcomes.outcome(division, wanted, rebuild=te_layers.rebuild)
        outcomes.expect_equal(found, own, exact=not wanted.use_dora)


@world.case(ranks=2, divisions=[Division(tp=2), Division(tp=2, sp=True)])
def with_biases(division: Division) -> None:
    for wanted in (outcomes.config(lora_bias=True, target_modules=LINEARS), outcomes.config(use_dora=True)):
        own = outcomes.outcome(WHOLE, wanted, add_bias_linear=True)
        found = outcomes.outcome(division, wanted, rebuild=te_layers.rebuild, add_bias_linear=True)
        outcomes.expect_equal(found, own, exact=not wanted.use_dora)


@world.case(ranks=2, divisions=[Division(tp=2, sp=True)])
def merged_is_adapted(division: Division) -> None:
    biased = outcomes.config(lora_bias=True, target_modules=LINEARS)
    for wanted, changes in (
        (outcomes.config(), {}),
        (outcomes.config(use_dora=True), {}),
        (biased, {"add_bias_linear": True}),
    ):
        with world.divided(division):
            models = chunks(division, **changes)
            te_layers.rebuild(models[0])
            model = outcomes.adapted(models, wanted)
            loss = world.train(models, world.tokens(2), forward_only=True)
            merged = model.merge_and_unload()
            found = world.train([merged], world.tokens(2), forward_only=True)
            assert abs(found - loss) < 1e-5 * loss
            assert not any("forward" in module.__dict__ for module in merged.modules())


@world.case(ranks=2)
def a_bias_has_no_empty_one_to_go_into() -> None:
    with world.divided(Division(tp=2)):
        models = chunks(Division(tp=2))
        te_layers.rebuild(models[0])
        model = outcomes.adapted(models, outcomes.config(lora_bias=True, target_modules=["linear_proj"]))
        with pytest.raises(AdapterError, match="the base layer has none to merge it into"):
            model.merge_adapter()


@world.case(ranks=2, divisions=[Division(tp=2), Division(tp=2, sp=True)])
def a_norm_inside_trains(division: Division) -> None:
    found, wanted = _of_norms(division, te_layers.rebuild), _of_norms(WHOLE, lambda model: None)
    outcomes.close(found, wanted)


def _of_norms(division: Division, rebuild: Any) -> dict[str, Tensor]:
    """Return the gradients of the norms before the MLPs, summed as Megatron does."""
    with world.divided(division):
        models = chunks(division)
        rebuild(models[0])
        outcomes.adapted(models, outcomes.config(target_modules=["linear_fc1"]))
        named = models[0].named_parameters()
        norms = [norm for name, norm in named if "mlp" in name and "norm" in name and "lora" not in name]
        for norm in norms:
            norm.requires_grad_(True)
        world.train(models, world.tokens(2), alone=True)
        gradients = {str(index): norm.grad for index, norm in enumerate(norms) if norm.grad is not None}
        for gradient in gradients.values() if division.sp else ():
            dist.all_reduce(gradient)
        assert all(isinstance(norm, nn.Parameter) for norm in norms)
        assert gradients
        return gradients


@world.case(ranks=2, divisions=[WHOLE, Division(tp=2), Division(tp=2, sp=True)])
def a_layer_that_every_rank_has_whole(division: Division) -> None:
    for changes in ({}, {"use_dora": True}, {"lora_bias": True}):
        wanted = outcomes.config(target_modules=["linear_down", "linear_proj"], **changes)
        own = outcomes.outcome(WHOLE, wanted, rebuild=partial(te_layers.with_duplicated, plain=True))
        found = outcomes.outcome(division, wanted, rebuild=te_layers.with_duplicated)
        outcomes.expect_equal(found, own, exact="use_dora" not in changes)


@world.case(ranks=2)
def what_cannot_be_opened_is_refused() -> None:
    with world.divided(Division(tp=2)):
        models = chunks(Division(tp=2))
        te_layers.rebuild(models[0])
        layer = models[0].decoder.layers[0].mlp.linear_fc2
        wanted = outcomes.config(target_modules=["linear_fc2"])
        layer.use_bias = True
        with pytest.raises(LayoutError, match=r"decoder.layers.0.mlp.linear_fc2.*skip_bias_add"):
            outcomes.adapted(models, wanted)
        layer.use_bias = False
        layer.config.tp_comm_overlap = True
        with pytest.raises(LayoutError, match=r"decoder.layers.0.mlp.linear_fc2.*tp_comm_overlap"):
            outcomes.adapted(models, wanted)
        layer.config.tp_comm_overlap = False
        layer.parallel_mode, layer.tp_size = None, 1  # as of an expert
        with pytest.raises(LayoutError, match=r"decoder.layers.0.mlp.linear_fc2.*moe_grouped_gemm"):
            outcomes.adapted(models, wanted)


@world.case(ranks=2)
def layers_that_are_never_called_are_refused() -> None:
    from megatron.core.transformer.mlp import MLP

    fused = type("TEFusedMLP", (MLP,), {"__module__": "megatron.core.extensions.transformer_engine"})
    with world.divided(Division(tp=2)):
        for name in ("linear_fc1", "linear_fc2"):
            models = chunks(Division(tp=2))
            te_layers.rebuild(models[0])
            for layer in models[0].decoder.layers:
                layer.mlp.__class__ = fused
            with pytest.raises(LayoutError, match=rf"decoder.layers.0.mlp.{name}: .*use_te_op_fuser"):
                outcomes.adapted(models, outcomes.config(target_modules=[name]))


@world.case(ranks=2)
def transformer_engines_own_class_is_adapted_where_it_is_alone() -> None:
    def made(**changes: Any) -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(te_layers.Linear(nn.Parameter(torch.randn(HIDDEN, HIDDEN)), **changes))

    wanted = LoraConfig(r=4, target_modules=["0"], init_lora_weights=False, use_dora=True)
    with world.divided(Division(tp=2)) as state:
        linear = nn.Linear(HIDDEN, HIDDEN, bias=False)
        linear.weight = made()[0].weight
        x = torch.randn(3, HIDDEN)
        outputs = []
        for base in (made(), nn.Sequential(linear)):
            torch.manual_seed(3)
            outputs.append(get_peft_model(base, wanted)(x))
        torch.testing.assert_close(*outputs)
        over_ranks = made(mode="column", group=state.get_tensor_model_parallel_group())
        in_pairs = made()
        in_pairs[0].return_bias = True
        for base in (over_ranks, in_pairs):
            with pytest.raises(LayoutError, match=r"0: .*TEColumnParallelLinear"):
                get_peft_model(base, wanted)


@pytest.mark.parametrize("ranks", world.sizes(__name__))
def test_te(ranks: int, request: pytest.FixtureRequest) -> None:
    world.run(__name__, ranks, request.config.getoption("--cases"))
