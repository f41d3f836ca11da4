"""Two adapters on one layer, one of them fused as one: a layer around another, each as if it were alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import outcomes
import pytest
import torch
import torch.nn.functional as F
import world
from gpt import HIDDEN, Division, chunks
from test_megatron_checkpoints import models_parameters, read, shared_folder, write
from torch import Tensor, nn

from lorica import LoraConfig
from lorica.checkpoint.names import adapter_entries
from lorica.checkpoint.pieces import collect, pieces
from lorica.errors import AdapterError, RankError, TargetError
from lorica.parallel import sum_gradients

world.need_megatron()

WHOLE = Division()
TARGETS = ["linear_qkv", "linear_fc1", "linear_proj"]
WANTED = {
    "default": outcomes.config(target_modules=TARGETS),
    "one": outcomes.config(target_modules=TARGETS, fused_as_one=True),
}


def both(division: Division) -> tuple[list[Any], Any]:
    """Return the chunks of a rank, and the model with both adapters, of which each starts as if it were alone."""
    models = chunks(division)
    model = outcomes.adapted(models, WANTED["default"])
    torch.manual_seed(7)
    model.add_adapter("one", WANTED["one"])
    return models, model


def tensors(model: Any, name: str, *, gradients: bool = False) -> dict[str, Tensor]:
    entries = adapter_entries(model, name, model.peft_config[name])
    if gradients:
        entries = {key: replace(entry, tensor=entry.tensor.grad) for key, entry in entries.items()}
    return {key: tensor.clone() for key, tensor in collect(pieces(entries)).items()}


@world.case(ranks=2, divisions=[WHOLE, Division(tp=2), Division(tp=2, sp=True), Division(pp=2)])
def each_is_what_it_is_alone(division: Division) -> None:
    alone = {name: outcomes.outcome(WHOLE, wanted) for name, wanted in WANTED.items()}
    with world.divided(division):
        models, model = both(division)
        for name, wanted in alone.items():
            model.set_adapter(name)
            loss = world.train(models, world.tokens(2), alone=division == WHOLE)
            if division != WHOLE:
                sum_gradients(model)
            found = outcomes.Outcome(loss, tensors(model, name, gradients=True), tensors(model, name))
            outcomes.expect_equal(found, wanted)


@world.case(ranks=2, divisions=[Division(tp=2)])
def both_are_merged_and_taken_out_again(division: Division) -> None:
    with world.divided(division):
        models, model = both(division)
        model.base_model.set_adapter(["default", "one"])
        loss = world.train(models, world.tokens(2), forward_only=True)
        model.merge_adapter()
        torch.testing.assert_close(world.train(models, world.tokens(2), forward_only=True), loss, rtol=1e-5, atol=0)
        model.unmerge_adapter()
        torch.testing.assert_close(world.train(models, world.tokens(2), forward_only=True), loss, rtol=1e-5, atol=0)


@world.case(ranks=2, divisions=[Division(tp=2, sp=True), Division(pp=2)])
def both_are_in_a_distributed_checkpoint(division: Division) -> None:
    folder = shared_folder()
    with world.divided(division):
        models, model = both(division)
        wanted = {name: tensors(model, name) for name in WANTED}
        loss = world.train(models, world.tokens(2), forward_only=True)
        write(models, folder)
    with world.divided(WHOLE):
        models, model = both(WHOLE)
        with torch.no_grad():
            for parameter in models_parameters(models):
                parameter.add_(1)
        read(models, folder)
        for name, saved in wanted.items():
            outcomes.close(tensors(model, name), saved, 1e-12)
        torch.testing.assert_close(world.train(models, world.tokens(2), forward_only=True), loss, rtol=1e-5, atol=0)


class Two(nn.Module):
    """A module with two matrices, each of which one adapter is on."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.first, self.second = nn.Parameter(torch.eye(HIDDEN)), nn.Parameter(torch.eye(HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(self.norm(x), self.first), self.second)


@world.case(ranks=2)
def one_adapter_on_two_parameters_has_no_two_names() -> None:
    with world.divided(Division(tp=2)):
        models = chunks(Division(tp=2))
        for layer in models[0].decoder.layers:
            layer.pre_mlp_layernorm = Two(layer.pre_mlp_layernorm)
        outcomes.adapted(models, LoraConfig(r=4, target_parameters=["first", "second"]))
        with pytest.raises(AdapterError, match=r"pre_mlp_layernorm: .*several parameters.*save_pretrained"):
            models[0].sharded_state_dict()


@world.case(ranks=2)
def what_one_stage_refuses_all_refuse() -> None:
    division = Division(pp=2)
    with world.divided(division) as state:
        models = chunks(division, tied=True)
        wanted = outcomes.config(target_modules=["output_layer", "linear_proj"], init_lora_weights="pissa")
        last = state.is_pipeline_last_stage()
        with pytest.raises(TargetError if last else RankError, match=r"output_layer.*share this weight"):
            outcomes.adapted(models, wanted)
        assert not any("lora" in name for name, _ in models[0].named_parameters())


@world.case(ranks=2)
def ends_of_other_models_lie_elsewhere() -> None:
    """BERT has heads on its last stage that a GPT has not."""
    from megatron.core.models.bert.bert_layer_specs import bert_layer_local_spec
    from megatron.core.models.bert.bert_model import BertModel

    from lorica.engines.registry import lies_elsewhere

    division = Division(pp=2)
    with world.divided(division) as state:
        from gpt import POSITIONS, VOCABULARY, config

        ends = {"pre_process": state.is_pipeline_first_stage(), "post_process": state.is_pipeline_last_stage()}
        settings = config(division, normalization="LayerNorm", gated_linear_unit=False)
        model = BertModel(settings, 0, bert_layer_local_spec, VOCABULARY, POSITIONS, **ends)
        here = {name for name, _ in model.named_modules()}
        last = ("lm_head.dense", "pooler.dense", "binary_head", "output_layer", "encoder.final_layernorm")
        for name in ("embedding.word_embeddings", *last):
            assert (name in here) == (ends["post_process"] if name in last else ends["pre_process"])
            assert lies_elsewhere(model, name) == (name not in here), name
        assert not lies_elsewhere(model, "nothing")


@pytest.mark.parametrize("ranks", world.sizes(__name__))
def test_two_adapters(ranks: int, request: pytest.FixtureRequest) -> None:
    world.run(__name__, ranks, request.config.getoption("--cases"))
