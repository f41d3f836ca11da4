"""Megatron Bridge's methods on Megatron-Core's own layers: every division equals one process."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from typing import Any

import outcomes
import pytest
import torch
import torch.distributed as dist
import world
from gpt import Division, chunks, moe
from outcomes import Outcome

world.need_megatron()

WHOLE = Division()
DENSE = [Division(tp=2, sp=True), Division(tp=2, pp=2), Division(tp=2, sp=True, pp=2, vpp=2), Division(tp=4, sp=True)]
#: A start that changes the output at once, so that every gradient says something.
RANDOM = {"lora_A_init_method": "normal", "lora_B_init_method": "kaiming"}


#: What one process gives, with which several divisions are compared.
_ORACLES: dict[str, Outcome] = {}


def bridged(division: Division, method: Any, **changes: Any) -> Outcome:
    """What a method gives under a division, after one step without an optimiser."""
    from lorica.parallel import sum_gradients

    alone = division == WHOLE  # one process, for whose gradients nothing is done
    key = f"{method!r} {changes}"
    if alone and key in _ORACLES:
        return _ORACLES[key]
    with world.divided(division):
        models = chunks(division, **changes)
        torch.manual_seed(7)
        assert method(models) is models
        model = method.peft_model(models)
        loss = world.train(models, world.tokens(dist.get_world_size()), alone=alone)
        if not alone:
            sum_gradients(model)
        found = Outcome(loss, outcomes.logical(model, gradients=True), outcomes.logical(model))
    if alone:
        _ORACLES[key] = found
    return found


def targets(models: list[Any]) -> set[str]:
    """The targets of all ranks."""
    from lorica.adapt.found import lora_layers

    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, {layer.target_name for model in models for layer in lora_layers(model)})
    return set().union(*found)


def equal_to_one_process(division: Division, make: Callable[..., Any], **changes: Any) -> Outcome:
    found = bridged(division, make(dim=4, alpha=8, **RANDOM), **changes)
    outcomes.expect_equal(found, bridged(WHOLE, make(dim=4, alpha=8, **RANDOM), **changes))
    return found


@world.case(ranks=4, divisions=DENSE)
def lora(division: Division) -> None:
    """One pair on a fused layer, under its name."""
    from lorica.compat.megatron_bridge import LoRA

    found = equal_to_one_process(division, LoRA)
    if dist.get_rank() == 0:
        layers = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
        assert found.tensors.keys() == {
            f"base_model.model.decoder.layers.{number}.{layer}.lora_{factor}.weight"
            for number in range(4)
            for layer in layers
            for factor in "AB"
        }
        assert {tensor.dtype for tensor in found.tensors.values()} == {torch.float32}


@world.case(ranks=4, divisions=[Division(tp=4, sp=True)])
def default_starts(division: Division) -> None:
    """A is drawn for the whole layer, with the fans that it has there; B is zero, and its gradients alone say more."""
    from lorica.compat.megatron_bridge import LoRA

    found, whole = (bridged(place, LoRA(dim=4)) for place in (division, WHOLE))
    torch.testing.assert_close(found.loss, whole.loss, rtol=1e-5, atol=0)
    assert all(torch.equal(tensor, whole.tensors[name]) for name, tensor in found.tensors.items())
    told = {name: gradient for name, gradient in whole.gradients.items() if "lora_B" in name}
    outcomes.close({name: found.gradients[name] for name in told}, told)
    for name, tensor in whole.tensors.items():
        fans = sum(tensor.shape)
        assert tensor.any() == ("lora_A" in name)
        if "lora_A" in name:
            torch.testing.assert_close(tensor.std(), torch.tensor((2 / fans) ** 0.5), rtol=0.4, atol=0)


@world.case(ranks=4, divisions=DENSE[2:])
def canonical(division: Division) -> None:
    """Each projection has its own pair, under its own name; one alone may be adapted."""
    from lorica.compat.megatron_bridge import CanonicalLoRA

    found = equal_to_one_process(division, CanonicalLoRA)
    if dist.get_rank() == 0:
        names = {name.split(".")[-3] for name in found.tensors}
        assert names == set(CanonicalLoRA().target_modules)
    one = equal_to_one_process(division, lambda **fields: CanonicalLoRA(target_modules=["linear_q"], **fields))
    if dist.get_rank() == 0:
        assert {name.split(".")[-3] for name in one.tensors} == {"linear_q"}


@world.case(ranks=4, divisions=DENSE[:2])
def dora(division: Division) -> None:
    """Norms are of whole rows, also of those that lie over ranks."""
    from lorica.compat.megatron_bridge import DoRA

    found, wanted = (bridged(where, DoRA(dim=4, alpha=8, **RANDOM)) for where in (division, WHOLE))
    torch.testing.assert_close(found.loss, wanted.loss, rtol=1e-5, atol=0)
    outcomes.close(found.tensors, wanted.tensors)  # magnitudes are norms, of which ranks have shares
    outcomes.close(found.gradients, wanted.gradients)
    assert dist.get_rank() or any("lora_magnitude_vector" in name for name in found.tensors)


@world.case(ranks=4)
def layers_are_named_by_their_place_in_the_whole_model() -> None:
    from lorica.compat.megatron_bridge import LoRA

    for division in (WHOLE, *DENSE[1:3]):
        with world.divided(division):
            models = chunks(division)
            LoRA(target_modules=["*.layers.3.*linear_fc1", "*.layers.0.*linear_proj"])(models)
            wanted = {"decoder.layers.3.mlp.linear_fc1", "decoder.layers.0.self_attention.linear_proj"}
            assert targets(models) == wanted


@world.case(ranks=4)
def what_means_nothing_on_any_stage_is_refused_on_all() -> None:
    from lorica.compat.megatron_bridge import LoRA
    from lorica.errors import TargetError

    division = Division(tp=2, pp=2)
    with world.divided(division):
        models = chunks(division)
        with pytest.raises(TargetError, match=r"meant by \['linear_fc3'\]"):
            LoRA(target_modules=["*.layers.3.*linear_fc1", "linear_fc3"])(models)
        assert not targets(models)


@world.case(ranks=4)
def exclusions_are_left_out_of_all_linear_layers() -> None:
    from lorica.compat.megatron_bridge import LoRA

    wanted = None
    for division in (WHOLE, Division(tp=2, pp=2)):
        with world.divided(division):
            models = chunks(division)
            LoRA(target_modules=[], exclude_modules=["linear_fc2", "*.layers.0.*"])(models)
            found = targets(models)
        assert "output_layer" in found
        assert not any("linear_fc2" in name or "layers.0." in name for name in found)
        assert len(found) == 1 + 3 * 3
        assert wanted in (None, found)
        wanted = found


@world.case(ranks=2)
def gradients_are_the_same_where_activations_are_computed_again() -> None:
    from lorica.compat.megatron_bridge import LoRA

    again = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    for division in (WHOLE, Division(tp=2, sp=True)):
        plain = bridged(division, LoRA(dim=4, **RANDOM))
        found = bridged(division, LoRA(dim=4, **RANDOM), **again)
        outcomes.expect_equal(found, plain)


@world.case(ranks=2, divisions=[Division(tp=2), Division(tp=2, sp=True)])
def one_module_is_adapted_as_in_the_model(division: Division) -> None:
    from lorica.compat.megatron_bridge import LoRA

    with world.divided(division):
        whole_model, by_module = chunks(division)[0], chunks(division)[0]
        method = LoRA(target_modules=["linear_qkv", "linear_fc1"], dim=4, **RANDOM)
        method(whole_model)
        for number, layer in enumerate(by_module.decoder.layers):
            path = f"base_model.model.decoder.layers.{number}"
            layer.self_attention.linear_qkv = method.transform(
                layer.self_attention.linear_qkv, "linear_qkv", f"{path}.self_attention"
            )
            layer.mlp.linear_fc1 = method.transform(layer.mlp.linear_fc1, "linear_fc1", f"{path}.mlp")
        by_module.peft_config = method.peft_model(whole_model).peft_config
        wanted = {name: value for name, value in whole_model.state_dict().items() if value is not None}
        by_module.load_state_dict(wanted)
        files = [outcomes.logical(model) for model in (by_module, whole_model)]
        assert files[0].keys() == files[1].keys()
        for name, tensor in files[0].items():  # rows of B are in the same order
            assert torch.equal(tensor, files[1][name]), name
        batches = world.tokens(2)
        torch.testing.assert_close(world.train([by_module], batches), world.train([whole_model], batches))


@world.case(ranks=2)
def merged_shards_are_those_of_merge_adapter() -> None:
    """``LoRAMerge`` on factors in Megatron Bridge's pieces, against lorica's own merge."""
    from megatron.core import parallel_state

    from lorica.adapt import merging
    from lorica.adapt.found import lora_layers
    from lorica.compat.megatron_bridge import LoRA, LoRAMerge

    division = Division(tp=2)
    with world.divided(division):
        [model] = chunks(division)
        LoRA(dim=4, alpha=6, **RANDOM)(model)
        group, rank = parallel_state.get_tensor_model_parallel_group(), dist.get_rank()
        merged = {}
        for layer in lora_layers(model):
            found, base = layer.factors("default"), layer.get_base_layer().weight
            a, b = found.a.detach(), found.b.detach()
            if "linear_qkv" in layer.target_name or "linear_fc1" in layer.target_name:
                a = a.chunk(2)[rank]  # column: A is cut over the rank
            else:
                b = b.chunk(2)[rank]  # row: B is cut over the outputs
            merged[layer.target_name] = LoRAMerge().merge(base, b, a, 6, 4, tp_size=2, tp_group=group)
        merging.merge(model, ["default"], finite=False, keep=True, progressbar=False)
        for layer in lora_layers(model):
            weight = layer.get_base_layer().weight
            torch.testing.assert_close(merged[layer.target_name], weight.detach(), rtol=1e-5, atol=1e-6)


MIXTURES = [Division(ep=2), Division(tp=2, sp=True, ep=2, etp=1), Division(tp=2, sp=True, ep=2), Division(ep=2, pp=2)]


def experts(**fields: Any) -> Any:
    from lorica.compat.megatron_bridge import LoRA

    return LoRA(**{"target_modules": ["linear_fc1", "linear_fc2"], "dim": 4, "alpha": 8} | RANDOM | fields)


@world.case(ranks=4, divisions=MIXTURES)
def stacked_experts_share_an_adapter_whatever_ranks_they_lie_on(division: Division) -> None:
    found, wanted = (bridged(where, experts(), **moe(moe_grouped_gemm=True)) for where in (division, WHOLE))
    outcomes.expect_equal(found, wanted)
    for name, tensor in found.tensors.items():
        first = re.sub(r"local_experts\.\d+", "local_experts.0", name)
        assert torch.equal(tensor, found.tensors[first])
    assert dist.get_rank() or len(found.tensors) == 2 * 4 * 2 * 2  # layers, experts, projections, factors


@world.case(ranks=4, divisions=[Division(ep=2), Division(tp=2, sp=True, ep=2, etp=1)])
def megatrons_loop_and_optimisers_train_a_shared_adapter_alike(division: Division) -> None:
    names = ["linear_fc1", "linear_fc2"]
    wanted = outcomes.config(target_modules=names, share_expert_adapters=True, fused_as_one=True)
    fields = moe(moe_grouped_gemm=True)
    for distributed in (False, True):
        found = outcomes.trained(division, wanted, distributed=distributed, **fields)
        outcomes.close(found, outcomes.trained(WHOLE, wanted, **fields), 1e-3)  # Adam divides by tiny numbers


@world.case(ranks=4, divisions=MIXTURES[:2])
def or_each_has_its_own(division: Division) -> None:
    own = experts(share_expert_adapters=False)
    found, wanted = (bridged(where, own, **moe(moe_grouped_gemm=True)) for where in (division, WHOLE))
    outcomes.expect_equal(found, wanted)
    modules = bridged(WHOLE, experts(), **moe())  # experts that are modules have their own in any case
    outcomes.expect_equal(found, modules)
    tensors = [
        tensor for name, tensor in found.tensors.items() if "layers.0.mlp" in name and "linear_fc2.lora_A" in name
    ]
    assert dist.get_rank() or (len(tensors) == 4 and not torch.equal(tensors[0], tensors[1]))


@world.case(ranks=2)
def a_shared_adapter_has_the_gradient_of_all_its_experts() -> None:
    """What each expert's own adapter would get, summed."""
    with world.divided(WHOLE):
        made = []
        for shared in (True, False):
            [model] = chunks(WHOLE, **moe(moe_grouped_gemm=True))
            method = experts(share_expert_adapters=shared)
            method(model)
            made.append((model, method.peft_model(model)))
        from lorica import get_peft_model_state_dict, set_peft_model_state_dict

        tensors = get_peft_model_state_dict(made[0][1])
        if dist.get_world_size() > 1:
            held = [tensors]
            dist.broadcast_object_list(held)
            tensors = held[0]
        set_peft_model_state_dict(made[1][1], tensors)
        for model, _ in made:
            world.train([model], world.tokens(2))
        for name, layer in made[0][0].named_modules():
            if name.endswith("local_experts.0.linear_fc2"):
                for factor in ("lora_A", "lora_B"):
                    each = [
                        made[1][0].get_submodule(name.replace("experts.0", f"experts.{number}")) for number in range(4)
                    ]
                    wanted = sum(getattr(one, factor)["default"].weight.grad for one in each)
                    torch.testing.assert_close(getattr(layer, factor)["default"].weight.grad, wanted)


@world.case(ranks=4, divisions=MIXTURES[1::2])
def experts_get_a_share_of_the_rank(division: Division) -> None:
    from lorica.adapt.found import lora_layers
    from lorica.compat.megatron_bridge import CanonicalLoRA, LoRA
    from lorica.errors import ConfigError

    fields = moe(moe_grouped_gemm=True, moe_shared_expert_intermediate_size=16)
    for method in (LoRA, CanonicalLoRA):
        with world.divided(division):
            models = chunks(division, **fields)
            method(dim=8, alpha=8, normalize_moe_lora=True)(models)
            for layer in (layer for model in models for layer in lora_layers(model)):
                spec, routed = layer.specs["default"], ".experts." in layer.target_name
                assert (spec.r, spec.scaling) == ((4, 2) if routed else (8, 1)), layer.target_name
    for wrong, message in (({"dim": 7}, "no multiple"), ({}, "is 0")):
        with world.divided(division):
            models = chunks(division, **fields)
            if not wrong:
                for module in (module for model in models for module in model.modules() if hasattr(module, "config")):
                    module.config.moe_router_topk = 0
            with pytest.raises(ConfigError, match=message):
                LoRA(**{"dim": 8, "normalize_moe_lora": True} | wrong)(models)
    found, wanted = (bridged(where, experts(normalize_moe_lora=True), **fields) for where in (division, WHOLE))
    outcomes.expect_equal(found, wanted)


def llava(division: Division) -> Any:
    """A tiny vision-language model of Megatron's, whose base trains."""
    from gpt import config, fill
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.multimodal.llava_model import LLaVAModel
    from megatron.core.models.vision import clip_vit_model
    from megatron.core.models.vision.vit_layer_specs import get_vit_layer_with_local_spec
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLPSubmodules

    tower = {"gated_linear_unit": False, "num_query_groups": 4, "add_bias_linear": True, "normalization": "LayerNorm"}
    language, seen = config(division, num_layers=2), config(division, num_layers=2, **tower)
    language.language_model_type, seen.vision_model_type = "gpt", "clip"

    def built(spec: Any, *args: Any, **options: Any) -> Any:
        # Without Transformer Engine and Apex its norm is torch's, which takes other arguments.
        if spec is torch.nn.LayerNorm:
            return torch.nn.LayerNorm(options["hidden_size"], options["eps"])
        return build_module(spec, *args, **options)

    build_module = clip_vit_model.build_module
    clip_vit_model.build_module = built if build_module.__name__ != "built" else build_module
    model = LLaVAModel(
        language,
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        64,
        64,
        seen,
        get_vit_layer_with_local_spec(),
        drop_vision_class_token=True,
        vision_projection_config=config(division, gated_linear_unit=False),
        vision_projection_layer_spec=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
        language_position_embedding_type="rope",
        img_h=16,
        img_w=16,
        patch_dim=8,
    )
    fill(model)
    return model


@world.case(ranks=2, divisions=[WHOLE, Division(tp=2)])
def parts_of_a_vision_language_model_train_as_they_are_told(division: Division) -> None:
    from lorica.adapt.found import lora_layers
    from lorica.compat.megatron_bridge import VLMLoRA

    parts = ("vision_model", "vision_projection", "language_model")
    with world.divided(division):
        gradients = {}
        for mix in itertools.product([True, False], repeat=3):
            frozen = {f"freeze_{part}": value for part, value in zip(parts, mix, strict=True)}
            model = llava(division)
            torch.manual_seed(7)
            targets = ["*language_model*.linear_qkv", "vision_projection.*.linear_fc2"]
            assert VLMLoRA(target_modules=targets, dim=4, **RANDOM, **frozen)(model) is model
            assert {layer.target_name.split(".")[0] for layer in lora_layers(model)} == {parts[1], parts[2]}
            for name, parameter in model.named_parameters():
                part = name.split(".")[0]
                assert parameter.requires_grad is ("lora_" in name or not frozen[f"freeze_{part}"]), (mix, name)
            generator = torch.Generator().manual_seed(3)
            ids = torch.randint(64, (2, 8), generator=generator)
            ids[:, 2] = -200
            labels = torch.randint(64, (2, 8), generator=generator)
            places = torch.arange(8).expand(2, 8)
            images = torch.randn(2, 3, 16, 16, generator=generator)
            loss, _ = model(images, ids, places, None, labels=labels, loss_mask=torch.ones(2, 8))
            loss.mean().backward()
            for name, parameter in model.named_parameters():
                assert (parameter.grad is not None) is parameter.requires_grad, (mix, name)
                if parameter.grad is not None:  # whatever else trains, a gradient is the same
                    known = gradients.setdefault(name, parameter.grad)
                    torch.testing.assert_close(parameter.grad, known, rtol=1e-4, atol=1e-6)


@world.case(ranks=2)
def hidden_values_travel_where_that_is_asked_for() -> None:
    from lorica.adapt.found import lora_layers
    from lorica.compat.megatron_bridge import LoRA

    division = Division(tp=2, sp=True)
    found = {}
    for asked in (False, True):
        method = LoRA(dim=4, alpha=8, a2a_experimental=asked, **RANDOM)
        found[asked] = bridged(division, method)
        with world.divided(division):
            [model] = chunks(division)
            LoRA(dim=4, a2a_experimental=asked)(model)
            assert {layer.specs["default"].a2a for layer in lora_layers(model)} == {asked}
    outcomes.expect_equal(found[True], found[False])


@pytest.mark.parametrize("ranks", world.sizes(__name__))
def test_bridge(ranks: int, request: pytest.FixtureRequest) -> None:
    world.run(__name__, ranks, request.config.getoption("--cases"))
