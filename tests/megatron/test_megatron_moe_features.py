"""What an adapter can be on experts and routers of Megatron-Core: variants, files, merging, experts without tokens."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import outcomes
import pytest
import torch
import torch.distributed as dist
import world
from gpt import Division, chunks, logical_names, moe
from torch import Tensor

from lorica import PeftModel
from lorica.errors import TargetError
from lorica.parallel import sum_gradients

world.need_megatron()

WHOLE = Division()
APART, TENSOR, BOTH = Division(ep=2), Division(tp=2, sp=True), Division(tp=2, sp=True, ep=2, etp=1)
EVERY = [APART, TENSOR, BOTH]
TARGETS = ["linear_fc1", "linear_fc2", "router"]
#: Experts that are modules, and experts whose weights are stacked.
KINDS = ({}, {"moe_grouped_gemm": True}, {"moe_grouped_gemm": True, "grouped_layers": True})


def same_everywhere(division: Division, batches: Tensor | None = None, **wanted: Any) -> None:
    """Compare a division with one process, experts of either kind with modules on one."""
    config = outcomes.config(**{"target_modules": TARGETS, **wanted})
    whole = outcomes.outcome(WHOLE, config, batches=batches, **moe())
    for kind in KINDS:
        found = outcomes.outcome(division, config, batches=batches, **moe(**kind))
        outcomes.expect_equal(found, whole, exact=not config.use_dora)


@world.case(ranks=2, divisions=[TENSOR, BOTH])
def dora(division: Division) -> None:
    same_everywhere(division, use_dora=True)


@world.case(ranks=2, divisions=[TENSOR, BOTH])
def scales_and_biases(division: Division) -> None:
    """The router's bias sends few tokens to one of the experts."""
    same_everywhere(division, world.tokens(4), use_rslora=True, lora_bias=True)


@world.case(ranks=2, divisions=[BOTH])
def one_pair_for_gate_and_up(division: Division) -> None:
    same_everywhere(division, fused_as_one=True)


@world.case(ranks=2, divisions=[TENSOR])
def some_experts_and_one_projection(division: Division) -> None:
    same_everywhere(division, target_modules=["local_experts.1.linear_fc1", "local_experts.0.linear_fc2"])
    same_everywhere(division, target_modules=["linear_fc1_up"])


@world.case(ranks=2, divisions=[APART])
def experts_that_are_divided_are_targets_together(division: Division) -> None:
    """Also on the rank that has none of the targets."""
    with world.divided(division):
        for names in (["local_experts.3.linear_fc1"], ["local_experts.0.linear_fc1_up", "linear_qkv"]):
            models = chunks(division, **moe())
            with pytest.raises(
                TargetError, match=r"layers\.0\..*is a target and .*local_experts\.\d.*Target all experts"
            ):
                outcomes.adapted(models, outcomes.config(target_modules=names))
            outcomes.adapted(models, outcomes.config(target_modules=["linear_fc1_up"]))


@world.case(ranks=2, divisions=EVERY)
def one_file_for_every_division(division: Division) -> None:
    """Saved on a division it is the same bytes as on one process, of either kind of experts; it loads on all."""
    folder = shared_folder()
    config, losses = outcomes.config(target_modules=TARGETS), []
    places = [(WHOLE, KINDS[0]), *((division, kind) for kind in KINDS)]
    for index, (place, kind) in enumerate(places):
        with world.divided(place):
            models = chunks(place, **moe(**kind))
            outcomes.adapted(models, config).save_pretrained(folder / str(index))
            losses.append(world.train(models, world.tokens(2), forward_only=True))
    files = [(folder / str(index) / "adapter_model.safetensors").read_bytes() for index in range(len(places))]
    assert files[1:] == files[:1] * 3
    for place, kind in places:
        with world.divided(place):
            models = chunks(place, **moe(**kind))
            PeftModel.from_pretrained(models[0], folder / "0")
            losses.append(world.train(models, world.tokens(2), forward_only=True))
    torch.testing.assert_close(torch.stack(losses), losses[0].expand(8), rtol=1e-5, atol=0)


def shared_folder() -> Path:
    made = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(made)
    return Path(made[0])


@world.case(ranks=2, divisions=[TENSOR, BOTH])
def merged_is_adapted_and_off_is_off(division: Division) -> None:
    for kind in KINDS:
        with world.divided(division):
            models = chunks(division, **moe(**kind))
            before = [parameter.clone() for parameter in models[0].parameters()]
            plain = world.train(models, world.tokens(2), forward_only=True)
            model = outcomes.adapted(models, outcomes.config(target_modules=TARGETS))
            adapted = world.train(models, world.tokens(2), forward_only=True)
            with model.disable_adapter():
                assert torch.equal(world.train(models, world.tokens(2), forward_only=True), plain)
            assert not torch.isclose(adapted, plain, rtol=1e-3)
            model.merge_adapter()
            merged = world.train(models, world.tokens(2), forward_only=True)
            torch.testing.assert_close(merged, adapted, rtol=1e-5, atol=0)
            model.unmerge_adapter()
            after = [p for name, p in models[0].named_parameters() if "lora" not in name]
            torch.testing.assert_close(before, after, rtol=1e-5, atol=1e-6)
            bare = model.merge_and_unload()
            found = world.train([bare], world.tokens(2), forward_only=True)
            torch.testing.assert_close(found, adapted, rtol=1e-5, atol=0)


@world.case(ranks=2, divisions=[APART, TENSOR])
def activations_that_are_computed_again(division: Division) -> None:
    """Of the experts' activation, and of the whole layer; also where the tokens are weighted before the experts."""
    wanted = outcomes.config(target_modules=[*TARGETS, "linear_qkv"])
    for fields in ({}, {"moe_router_topk": 1, "moe_apply_probs_on_input": True, "moe_router_pre_softmax": True}):
        whole = outcomes.outcome(WHOLE, wanted, **moe(**fields))
        for kind in KINDS:
            for again in ("moe", "moe_act") if kind else ("moe",):  # the latter is of stacked experts
                how = {"recompute_granularity": "selective", "recompute_modules": [again]}
                outcomes.expect_equal(outcomes.outcome(division, wanted, **moe(**kind, **fields, **how)), whole)


@world.case(ranks=2, divisions=[TENSOR])
def hidden_values_that_travel(division: Division) -> None:
    """Those of dense layers that gather tokens; layers of experts, and those whose dispatcher gathers, do not."""
    for fields in ({}, {"moe_shared_expert_intermediate_size": 16, "moe_shared_expert_overlap": True}):
        wanted = outcomes.config(target_modules=[*TARGETS, "linear_qkv", "linear_proj"], a2a_experimental=True)
        whole = outcomes.outcome(WHOLE, wanted, **moe(**fields))
        for kind in KINDS:
            outcomes.expect_equal(outcomes.outcome(division, wanted, **moe(**kind, **fields)), whole)


@world.case(ranks=2, divisions=[BOTH])
def ranks_by_the_experts_of_a_token(division: Division) -> None:
    same_everywhere(division, normalize_moe_lora=True, target_modules=[*TARGETS, "linear_proj"])
    with world.divided(division):
        model = chunks(division, **moe())[0]
        adapted = outcomes.adapted([model], outcomes.config(target_modules=TARGETS, normalize_moe_lora=True))
        ranks = {name.rpartition(".")[2]: layer.r["default"] for name, layer in layers(adapted)}
        assert ranks == {"router": 4, "linear_fc1": 2, "linear_fc2": 2}
        with pytest.raises(TargetError, match="2 experts that a token is sent to, and r=3"):
            outcomes.adapted(
                chunks(division, **moe()), outcomes.config(r=3, target_modules=TARGETS, normalize_moe_lora=True)
            )


def layers(model: Any) -> list[tuple[str, Any]]:
    return [(name, module) for name, module in model.named_modules() if hasattr(module, "target_name")]


@world.case(ranks=2, divisions=[APART])
def experts_without_tokens(division: Division) -> None:
    """Whatever is routed to no token of a rank has a gradient of zeros there, and the others theirs."""
    config = outcomes.config(target_modules=["linear_fc1", "linear_fc2"])

    def gradients(place: Division, kind: dict[str, Any]) -> dict[str, torch.Tensor]:
        with world.divided(place):
            biased = {"moe_router_enable_expert_bias": True, "moe_router_score_function": "sigmoid"}
            models = chunks(place, **moe(**kind, **biased))
            for name, module in models[0].named_modules():
                if name.endswith("router"):  # all tokens to the first two experts
                    module.expert_bias[:2] += 100
            model = outcomes.adapted(models, config)
            world.train(models, world.tokens(2), alone=place == WHOLE)
            if place != WHOLE:
                sum_gradients(model)
            return outcomes.logical(model, gradients=True)

    expected = gradients(WHOLE, KINDS[0])
    for kind in KINDS:
        found = gradients(division, kind)
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-7)
            assert gradient.any() == any(f"local_experts.{number}." in name for number in (0, 1)), name


@world.case(ranks=2, divisions=[APART])
def the_names_are_those_of_the_whole_model(division: Division) -> None:
    with world.divided(division):
        for kind in KINDS:
            model = chunks(division, **moe(**kind))[0]
            outcomes.adapted([model], outcomes.config(target_modules=["linear_fc2"]))
            names = {layer.target_name for _, layer in layers(model)}
            assert len(names) == 4
            if not kind:
                assert names == {name for name in logical_names(model).values() if name.endswith("linear_fc2")}


@pytest.mark.parametrize("ranks", world.sizes(__name__))
def test_moe_features(ranks: int, request: pytest.FixtureRequest) -> None:
    world.run(__name__, ranks, request.config.getoption("--cases"))
