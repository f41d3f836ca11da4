"""What an adapter can be on Megatron's dense layers: variants, starts, fused projections, whole modules, files."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import outcomes
import pytest
import torch
import torch.distributed as dist
import world
from gpt import HIDDEN, LAYERS, Division, chunks, moe
from outcomes import Outcome
from sent import calls, counting, sent

from lorica import LoraConfig, PeftModel
from lorica.errors import LayoutError
from lorica.parallel import sum_gradients

world.need_megatron()

WHOLE = Division()
SEQUENCE = Division(tp=2, sp=True)
#: Layers that can have everything; an embedding has no bias.
LINEAR = ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2", "output_layer"]


def same_everywhere(wanted: LoraConfig, *divisions: Division, **changes: Any) -> Outcome:
    """Compare divisions with one process, and return what that gives."""
    whole = outcomes.outcome(WHOLE, wanted, **changes)
    for division in divisions:
        outcomes.expect_equal(outcomes.outcome(division, wanted, **changes), whole, exact=not wanted.use_dora)
    return whole


def targets(outcome: Outcome) -> set[str]:
    """Return the last words of the names of what has factors, on rank 0."""
    return {name.removeprefix("base_model.model.").split(".lora_")[0].rpartition(".")[2] for name in outcome.tensors}


@world.case(ranks=2)
def fused_projections_have_factors_of_their_own_or_one_pair() -> None:
    fused = ["linear_qkv", "linear_fc1"]
    apart = same_everywhere(outcomes.config(target_modules=fused), Division(tp=2), SEQUENCE)
    one = same_everywhere(outcomes.config(target_modules=fused, fused_as_one=True), Division(tp=2), SEQUENCE)
    if dist.get_rank() == 0:
        assert targets(apart) == {"linear_q", "linear_k", "linear_v", "linear_fc1_gate", "linear_fc1_up"}
        assert targets(one) == set(fused)
        layer = "base_model.model.decoder.layers.3.self_attention"
        assert apart.tensors[f"{layer}.linear_k.lora_B.weight"].shape == (16, 4)
        assert one.tensors[f"{layer}.linear_qkv.lora_B.weight"].shape == (64, 4)


@world.case(ranks=2)
def a_pair_for_all_has_its_rows_in_the_order_of_the_parts() -> None:
    """The same delta, told part by part or for all of them at once, gives the same logits."""
    apart = outcomes.config(target_modules=["linear_qkv", "linear_fc1"])
    one = outcomes.config(target_modules=["linear_qkv", "linear_fc1"], fused_as_one=True)
    for division in (WHOLE, SEQUENCE):
        with world.divided(division):
            first, second = chunks(division), chunks(division)
            separate, joined = outcomes.adapted(first, apart), outcomes.adapted(second, one)
            for (name, part), (_, whole) in zip(layers(separate), layers(joined), strict=True):
                count = len(part.op.parts(part.base_layer))
                a = torch.randn(4, whole.site.layout.sizes["in"], generator=torch.Generator().manual_seed(len(name)))
                with torch.no_grad():
                    whole.lora_A["default"].weight.copy_(a)
                    part.lora_A["default"].weight.copy_(a.repeat(count, 1))
                    part.lora_B["default"].weight.copy_(whole.lora_B["default"].weight)
            found = [world.train(chunk, world.tokens(2), forward_only=True) for chunk in (first, second)]
            torch.testing.assert_close(*found)


def layers(model: Any) -> list[tuple[str, Any]]:
    return [(name, module) for name, module in model.named_modules() if hasattr(module, "op")]


@world.case(ranks=2, divisions=[WHOLE, Division(tp=2)])
def a_projection_is_where_megatron_has_it(division: Division) -> None:
    """Merged, the delta of each projection is in its rows of Megatron's weight, head by head, and nowhere else."""
    for name in ("linear_q", "linear_k", "linear_v", "linear_fc1_gate", "linear_fc1_up"):
        with world.divided(division) as here:
            models = chunks(division)
            layers_of = {
                "linear_qkv": models[0].decoder.layers[1].self_attention,
                "linear_fc1": models[0].decoder.layers[1].mlp,
            }
            fused = "linear_fc1" if "fc1" in name else "linear_qkv"
            before = getattr(layers_of[fused], fused).weight.clone()
            model = outcomes.adapted(models, outcomes.config(target_modules=[name]))
            factors = outcomes.logical(model)
            given = [factors]
            dist.broadcast_object_list(given)
            path = f"base_model.model.decoder.layers.1.{'mlp' if fused == 'linear_fc1' else 'self_attention'}.{name}"
            delta = 2 * given[0][f"{path}.lora_B.weight"] @ given[0][f"{path}.lora_A.weight"]
            model.merge_adapter()
            change = getattr(layers_of[fused], fused).weight - before
            rank, size = here.get_tensor_model_parallel_rank(), division.tp
            torch.testing.assert_close(change, in_place(name, delta, rank, size), rtol=1e-4, atol=1e-5)


def in_place(name: str, delta: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """Return what a rank's fused weight changes by where one projection changes by ``delta``.

    Of ``linear_qkv`` it has query groups of two query heads, a key head and a value head; of ``linear_fc1`` rows of the
    gate, then of the up projection.
    """
    own = delta.chunk(size)[rank]
    if name.startswith("linear_fc1"):
        place = 0 if name.endswith("gate") else 1
        return torch.cat([own if place == number else torch.zeros_like(own) for number in range(2)])
    groups = own.unflatten(0, (2 // size, -1, 8))
    heads = torch.zeros(2 // size, 4, 8, delta.shape[1])
    first = {"linear_q": 0, "linear_k": 2, "linear_v": 3}[name]
    heads[:, first : first + groups.shape[1]] = groups
    return heads.flatten(0, 2)


@world.case(ranks=2)
def one_projection_of_several() -> None:
    outcome = same_everywhere(outcomes.config(target_modules=["linear_q", "linear_fc1_up"]), Division(tp=2), SEQUENCE)
    if dist.get_rank() == 0:
        assert targets(outcome) == {"linear_q", "linear_fc1_up"}


@world.case(ranks=2, divisions=[Division(tp=2), SEQUENCE])
def dora(division: Division) -> None:
    """Norms are those of whole rows, also where a rank has a part of each."""
    same_everywhere(outcomes.config(use_dora=True), division)


@world.case(ranks=2, divisions=[Division(tp=2), SEQUENCE])
def scales_and_biases(division: Division) -> None:
    same_everywhere(outcomes.config(target_modules=LINEAR, use_rslora=True, lora_bias=True), division)


@world.case(ranks=2)
def the_fields_that_peft_builds_megatrons_layers_from() -> None:
    """They are kept; how layers lie is their own word, so that one file is for every division."""
    fields = {"tensor_model_parallel_size": 2, "hidden_size": 32, "num_layers": 4, "num_attention_heads": 4}
    wanted = outcomes.config(target_modules=LINEAR, megatron_config=fields, megatron_core="megatron.core")
    same_everywhere(wanted, Division(tp=2))
    assert wanted.to_dict()["megatron_config"] == fields


@world.case(ranks=2, divisions=[Division(tp=2), SEQUENCE])
def starts_from_the_weights(division: Division) -> None:
    for start in ("pissa", "olora"):
        wanted = outcomes.config(target_modules=LINEAR, init_lora_weights=start)
        whole, found = outcomes.outcome(WHOLE, wanted), outcomes.outcome(division, wanted)
        torch.testing.assert_close(found.loss, whole.loss, rtol=1e-5, atol=0)
        outcomes.close(found.tensors, whole.tensors, 1e-3)


@world.case(ranks=2, divisions=[Division(tp=2), SEQUENCE, Division(pp=2)])
def whole_modules(division: Division) -> None:
    modules = ["input_layernorm", "final_layernorm", "output_layer", "linear_proj"]
    wanted = outcomes.config(target_modules=["linear_qkv", "linear_fc1"], modules_to_save=modules)
    outcome = same_everywhere(wanted, division)
    if dist.get_rank() == 0:
        assert "base_model.model.decoder.layers.3.input_layernorm.weight" in outcome.tensors


@world.case(ranks=2, divisions=[Division(tp=2), SEQUENCE, Division(pp=2)])
def one_file_for_every_division(division: Division) -> None:
    """Saved on a division it is the same bytes as on one process, and it loads on every other."""
    folder = _shared_folder()
    wanted = outcomes.config()
    losses = []
    for place in (WHOLE, division):
        with world.divided(place):
            models = chunks(place)
            outcomes.adapted(models, wanted).save_pretrained(folder / str(place), save_embedding_layers=False)
            losses.append(world.train(models, world.tokens(2), forward_only=True))
    one, other = ((folder / str(place) / "adapter_model.safetensors").read_bytes() for place in (WHOLE, division))
    assert one == other
    for place, source in ((WHOLE, division), (division, WHOLE)):
        with world.divided(place):
            models = chunks(place)
            loaded = PeftModel.from_pretrained(models[0], folder / str(source), is_trainable=True)
            losses.append(world.train(models, world.tokens(2), forward_only=True))
            assert any(parameter.requires_grad for parameter in loaded.parameters())
    torch.testing.assert_close(torch.stack(losses), losses[0].expand(4), rtol=1e-5, atol=0)


def _shared_folder() -> Path:
    made = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(made)
    return Path(made[0])


@world.case(ranks=2, divisions=[WHOLE, Division(tp=2), SEQUENCE])
def merged_is_adapted_and_off_is_off(division: Division) -> None:
    with world.divided(division):
        models = chunks(division)
        before = [parameter.clone() for parameter in models[0].parameters()]
        plain = world.train(models, world.tokens(2), forward_only=True)
        model = outcomes.adapted(models, outcomes.config())
        adapted = world.train(models, world.tokens(2), forward_only=True)
        with model.disable_adapter():
            assert torch.equal(world.train(models, world.tokens(2), forward_only=True), plain)
        assert not torch.isclose(adapted, plain, rtol=1e-3)
        model.merge_adapter()
        torch.testing.assert_close(world.train(models, world.tokens(2), forward_only=True), adapted, rtol=1e-5, atol=0)
        model.unmerge_adapter()
        after = [p for name, p in models[0].named_parameters() if "lora" not in name]
        torch.testing.assert_close(before, after, rtol=1e-5, atol=1e-6)
        merged = model.merge_and_unload()
        torch.testing.assert_close(
            world.train([merged], world.tokens(2), forward_only=True), adapted, rtol=1e-5, atol=0
        )
        assert not any("_forward_impl" in module.__dict__ for module in merged.modules())


@world.case(ranks=2, divisions=[Division(tp=2), SEQUENCE])
def no_collective_of_its_own(division: Division) -> None:
    """An adapted model sends what the frozen one sends, and nothing else, until gradients are summed."""
    with world.divided(division):
        models = chunks(division)
        hidden(models[0])  # as after an adapted embedding, without which a frozen model has no backward
        base = sent(models)
        model = outcomes.adapted(models, outcomes.config(target_modules=LINEAR))
        assert sent(models) == base
        assert calls(base) > 20
        with counting() as count:
            sum_gradients(model)
        assert calls(count) <= 2, count  # the data axis is one rank


def hidden(model: Any) -> None:
    """Let the embedding's output require a gradient."""
    model.embedding.word_embeddings.register_forward_hook(lambda module, args, output: output.requires_grad_())


@world.case(ranks=2)
def one_collective_for_hidden_values() -> None:
    """Where they travel, one more on the way forward and one back, of ``r`` numbers for each token."""
    tokens, batch, size = 8, 2, 4
    own, every = (4 * count * batch * size for count in (tokens // 2, tokens))
    # A gather or a scatter has a tensor of each; an all-to-all has two of the same size.
    for name, there in (("linear_qkv", own + every), ("linear_proj", 2 * every)):
        with world.divided(SEQUENCE):
            models = chunks(SEQUENCE)
            hidden(models[0])
            base = sent(models)
            fields = {"target_modules": [name], "fused_as_one": True, "a2a_experimental": True}
            outcomes.adapted(models, outcomes.config(r=size, **fields))
            more = sent(models)
            assert calls(more) - calls(base) == LAYERS * 2
            assert more["bytes"] - base["bytes"] == LAYERS * (there + own + every), (name, more - base)


@world.case(ranks=2)
def hidden_values_that_travel() -> None:
    """A and B each see their rank's tokens; results and files are the same, and so is a sum that is done later."""
    wanted = outcomes.config(target_modules=LINEAR, a2a_experimental=True)
    whole = outcomes.outcome(WHOLE, wanted)
    with counting() as count:
        outcomes.expect_equal(outcomes.outcome(SEQUENCE, wanted), whole)
    assert count["all_to_all"] + count["all_to_all_single"] > 0
    loop = outcomes.config(target_modules=["linear_qkv", "linear_fc2"], a2a_experimental=True)
    outcomes.close(outcomes.trained(SEQUENCE, loop), outcomes.trained(WHOLE, loop), 1e-4)


@world.case(ranks=2)
def tokens_that_the_ranks_do_not_divide() -> None:
    """Seven tokens on two ranks."""
    batches = world.tokens(2, length=7, rows=1)
    for names in (["linear_q"], outcomes.EVERYTHING):
        same_everywhere(outcomes.config(target_modules=names), Division(tp=2), batches=batches)


@world.case(ranks=2, divisions=[Division(tp=2), SEQUENCE])
def layers_with_biases(division: Division) -> None:
    """Megatron hands some of them on beside the output, for somebody else to add."""
    biased = {"add_bias_linear": True, "add_qkv_bias": True, "normalization": "LayerNorm"}
    with_biases = LINEAR[:-1]
    wanted = outcomes.config(target_modules=with_biases, lora_bias=True)
    for adapter in (wanted, outcomes.config(target_modules=with_biases, use_dora=True)):
        same_everywhere(adapter, division, **biased)
    with world.divided(division):
        models = chunks(division, **biased)
        assert models[0].decoder.layers[0].mlp.linear_fc2.skip_bias_add
        plain = world.train(models, world.tokens(2), forward_only=True)
        model = outcomes.adapted(models, wanted)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("lora_B.default.bias"):
                    parameter.add_(0.3)
        adapted = world.train(models, world.tokens(2), forward_only=True)
        assert not torch.isclose(adapted, plain, rtol=1e-3)
        model.merge_adapter()
        torch.testing.assert_close(world.train(models, world.tokens(2), forward_only=True), adapted, rtol=1e-5, atol=0)
        model.unmerge_adapter()
        with model.disable_adapter():
            found = world.train(models, world.tokens(2), forward_only=True)
        torch.testing.assert_close(found, plain, rtol=1e-5, atol=0)


@world.case(ranks=2, divisions=[Division(tp=2), SEQUENCE])
def default_starts(division: Division) -> None:
    """B is zero, so only its gradients say something; A is drawn whole."""
    for start in (True, "gaussian"):
        wanted = outcomes.config(init_lora_weights=start)
        found, whole = (outcomes.outcome(place, wanted) for place in (division, WHOLE))
        assert all(torch.equal(tensor, whole.tensors[name]) for name, tensor in found.tensors.items())
        torch.testing.assert_close(found.loss, whole.loss, rtol=1e-5, atol=0)
        told = [name for name, gradient in whole.gradients.items() if gradient.any()]
        assert len(told) == len(whole.gradients) // 2
        outcomes.close({name: found.gradients[name] for name in told}, {name: whole.gradients[name] for name in told})


@world.case(ranks=2, divisions=[Division(tp=2), SEQUENCE])
def outputs_that_are_dropped(division: Division) -> None:
    """The summands of a sum over ranks lose the same outputs, and what is left of the adapter's part is scaled."""
    with world.divided(division):
        [model] = chunks(division)
        fields = {"target_modules": ["linear_qkv", "linear_proj"], "lora_dropout": 0.5, "dropout_position": "post"}
        adapted = outcomes.adapted([model], outcomes.config(**fields))
        block = model.decoder.layers[0].self_attention
        for layer, width in ((block.linear_qkv, HIDDEN), (block.linear_proj, HIDDEN // 2)):
            x = torch.randn(16, 4, width)
            with adapted.disable_adapter():
                plain = layer(x)[0]
            delta = layer.eval()(x)[0] - plain
            dropped = layer.train()(x)[0] - plain
            lost = dropped.abs() < 1e-6
            assert 0.4 < lost.float().mean() < 0.6
            torch.testing.assert_close(dropped[~lost], 2 * delta[~lost], rtol=1e-3, atol=1e-5)


@world.case(ranks=4, divisions=[Division(tp=2), Division(ep=2)])
def groups_that_the_model_was_given(division: Division) -> None:
    """With ``pg_collection``, Megatron's global state has nothing to say."""
    from megatron.core import parallel_state

    fields = moe() if division.ep > 1 else {}
    wanted = outcomes.config(target_modules=["linear_fc1", "linear_fc2"])
    whole = outcomes.outcome(WHOLE, wanted, **fields)
    with world.divided(division):
        models = chunks(division, **fields)
        assert models[0].pg_collection.dp_cp.size() > 1
        with mock.patch.object(parallel_state, "model_parallel_is_initialized", return_value=False):
            model = outcomes.adapted(models, wanted)
        loss = world.train(models, world.tokens(4))
        sum_gradients(model)
        found = Outcome(loss, outcomes.logical(model, gradients=True), outcomes.logical(model))
    outcomes.expect_equal(found, whole)


@world.case(ranks=2)
def gated_queries_are_refused() -> None:
    with world.divided(WHOLE):
        models = chunks(WHOLE)
        for module in models[0].modules():
            if hasattr(module, "linear_qkv"):
                module.config.attention_output_gate = True
        with pytest.raises(LayoutError, match=r"decoder.layers.0.self_attention.linear_qkv.*attention_output_gate"):
            outcomes.adapted(models, outcomes.config(target_modules=["linear_qkv"]))
        outcomes.adapted(models, outcomes.config(target_modules=["linear_proj"]))


@pytest.mark.parametrize("ranks", world.sizes(__name__))
def test_features(ranks: int, request: pytest.FixtureRequest) -> None:
    world.run(__name__, ranks, request.config.getoption("--cases"))
