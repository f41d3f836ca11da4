"""Losses that variants add, and what VeLoRA and MonteCLoRA work out in a forward: one process's, on every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import contract
import oracles
import pytest
import ranks
import torch
from contract import adapt, batch, compare, config_of, entries, gradients, near, wholes
from contract_cases import Case
from divisions import DIVISIONS, Plain
from subjects import SUBJECTS, logits_of, loss_of
from torch import Tensor, nn

import lorica
from lorica.adapt.inject import lora_layers
from lorica.errors import LayoutError, RankError
from lorica.parallel import sum_gradients, verify
from lorica.variants import monteclora, velora
from lorica.variants.base import cut_along

PLACES = [
    ("one process", "phi3"),
    ("native tp2", "llama"),
    ("native tp8", "llama"),
    ("native tp2 sp", "llama"),
    ("native tp8 fused", "phi3"),
    ("native dp2 tp2", "llama"),
    ("native tp2", "llama's ends"),
    ("transformers tp2", "llama"),
    ("transformers ep2", "qwen3-moe"),
    ("transformers fsdp2 tp2", "llama"),
    ("torch tp2 sp", "llama"),
    ("torch fsdp2", "llama"),
    ("ddp2", "llama"),
]
FIELDS: dict[str, dict[str, Any]] = {
    "kasa": {"kasa_config": {"beta": 0.3, "gamma": 0.2}},
    "monteclora": {
        "monteclora_config": {"num_samples": 3, "sample_scaler": 0.1, "kl_loss_weight": 0.2, "use_entropy": True}
    },
}

pytestmark = [
    pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
]


def logical_draws(layer: Any, a_LRI: Tensor, options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The same draws for the same target on every layout: of the whole layer, of which each rank takes its part."""
    op, site = layer.op, layer.site
    sizes = {} if site is None else site.layout.sizes
    inputs = a_LRI.shape[2] if site is None or site.layout.cut_of("in") is None else sizes["in"]
    names = [part for part, _, _ in op.parts(layer.base_layer)] or [""]
    experts = sizes.get("expert", len(a_LRI)) if op.roles_a[0] == "expert" else 0
    found: list[list[Tensor]] = [[], [], []]
    for name in names:
        generator = torch.Generator().manual_seed(sum(map(ord, f"{layer.target_name.rpartition('.')[0]}.{name}")))
        pairs = experts or 1
        found[0].append(torch.randn(options.num_samples, pairs, a_LRI.shape[1], inputs, generator=generator))
        found[1].append(torch.rand(pairs, a_LRI.shape[1], generator=generator) * 6)
        found[2].append(torch.randn(pairs, options.num_samples, generator=generator))
    noise, chance, odds = torch.cat(found[0], 1), torch.cat(found[1]), torch.cat(found[2])
    if experts:
        noise, chance, odds = (
            cut_along(layer, tensor, dim, "expert") for tensor, dim in ((noise, 1), (chance, 0), (odds, 0))
        )
    return cut_along(layer, noise, 3, "in"), chance, odds


def fill(*models: nn.Module) -> None:
    """Give models in one piece and on ranks the same values, each rank taking its slices; the first is whole."""
    values = oracles.learned(wholes(entries(models[0])))
    for model in models:
        lorica.set_peft_model_state_dict(model, values)


def added(model: nn.Module, name: str) -> Tensor:
    tuner = next(module for module in model.modules() if isinstance(module, lorica.LoraModel))
    return getattr(tuner, f"_get_{name}_loss")()


def with_its_loss(division: str, subject: str, name: str, folder: str) -> None:
    """The loss and the gradients, of a task's loss and the variant's together."""
    monteclora.draws = logical_draws  # type: ignore[assignment]
    place = contract.Place(DIVISIONS[division], SUBJECTS[subject], Path(folder))
    case = Case(FIELDS[name])
    oracle = adapt(place.subject.build(), config_of(place.subject, case))
    model = adapt(place.division.cut(place.subject, folder), config_of(place.subject, case))
    run = place.run(model)
    fill(oracle, model)
    ids = batch(contract.ROWS)
    for adapted in (oracle, model):
        adapted.train()
    losses = []
    for rows in ids.chunk(place.division.data):
        losses.append(loss_of(logits_of(oracle(input_ids=rows)), rows))
        wanted = added(oracle, name)
        losses[-1] = losses[-1] + wanted
    torch.stack(losses).mean().backward()
    mine = place.rows(ids)
    logits = logits_of(run.model(input_ids=mine))
    loss = added(model, name)
    assert float(loss.detach()) > 0.1
    (loss_of(logits, mine) + loss).backward()
    sum_gradients(model)
    near(loss, wanted, "the variant's loss")
    near(logits, Plain(oracle).logits(mine), "the output")
    compare(gradients(model), wholes(gradients(oracle)), "the gradient")


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize(("division", "subject"), PLACES)
def test_the_loss_is_one_process_s(division: str, subject: str, name: str, tmp_path: Path) -> None:
    SUBJECTS[subject].save(tmp_path)
    ranks.run(DIVISIONS[division].ranks, with_its_loss, division, subject, name, str(tmp_path))


def of_a_stage() -> None:
    place = contract.Place(DIVISIONS["native pp2"], SUBJECTS["llama"], Path())
    model = adapt(place.division.cut(place.subject, ""), config_of(place.subject, Case(FIELDS["kasa"])))
    for name in FIELDS:
        with pytest.raises(LayoutError, match="pipeline stage"):
            added(model, name)


def test_stages_of_a_pipeline_have_only_their_own() -> None:
    ranks.run(2, of_a_stage)


# ---- VeLoRA ---------------------------------------------------------------------------------------------------------


def directions(division: str, kind: str, groups: int, folder: str) -> None:
    """Batch averages: gradients over two batches, and the directions that are kept."""
    place = contract.Place(DIVISIONS[division], SUBJECTS["llama"], Path(folder))
    case = Case({"velora_config": {"num_groups": groups, "init_type": kind}})
    oracle = adapt(place.subject.build(), config_of(place.subject, case))
    model = adapt(place.division.cut(place.subject, folder), config_of(place.subject, case))
    run = place.run(model)
    fill(oracle, model)
    for adapted in (oracle, model):
        adapted.train()
        for layer in lora_layers(adapted):
            layer.factors("default").extras[velora.DIRECTION].zero_()
            layer.notes.clear()
    for seed in range(2):
        ids = batch(contract.ROWS, seed)
        for adapted in (oracle, model):
            adapted.zero_grad()
        whole = ids.chunk(1 if kind == "batch_average_once" else place.division.data)
        torch.stack([loss_of(logits_of(oracle(input_ids=rows)), rows) for rows in whole]).mean().backward()
        run.train(place.rows(ids))
        sum_gradients(model)
        compare(gradients(model), wholes(gradients(oracle)), f"the gradient of batch {seed}")
    contract.check_replicas(model)
    compare(entries(model), wholes(entries(oracle)), "the directions")
    kept = [layer.factors("default").extras[velora.DIRECTION] for layer in lora_layers(model)]
    assert all(bool(tensor.any()) is (kind == "batch_average_once") for tensor in kept)


@pytest.mark.parametrize(
    ("division", "groups", "kind"),
    [
        *((division, 4, "batch_average") for division in ("native tp2", "native tp8", "torch tp2 sp")),
        *((division, 4, "batch_average_once") for division in ("native tp2", "native tp8", "torch tp2 sp")),
        *(("native tp2", 3, kind) for kind in ("batch_average", "batch_average_once")),
        *(("native dp2 tp2", 8, kind) for kind in ("batch_average", "batch_average_once")),
        ("ddp2", 5, "batch_average"),  # of other buffers it hands on rank 0's, in the second forward
    ],
)
def test_directions_are_one_process_s(division: str, groups: int, kind: str, tmp_path: Path) -> None:
    ranks.run(DIVISIONS[division].ranks, directions, division, kind, groups, str(tmp_path))


# ---- MonteCLoRA -----------------------------------------------------------------------------------------------------


def agreeing(division: str, folder: str) -> list[dict[str, Any]]:
    """What each rank drew for its layers."""
    place = contract.Place(DIVISIONS[division], SUBJECTS["llama"], Path(folder))
    model = adapt(place.division.cut(place.subject, folder), config_of(place.subject, Case(FIELDS["monteclora"])))
    model.train()
    drawn: dict[str, Any] = {}
    real = monteclora.draws

    def watch(layer: Any, *args: Any) -> Any:
        drawn[layer.target_name] = real(layer, *args)
        return drawn[layer.target_name]

    monteclora.draws = watch  # type: ignore[assignment]
    place.run(model).train(place.rows(batch(contract.ROWS)))
    return [drawn["model.layers.0.self_attn.q_proj"], drawn["model.layers.0.self_attn.o_proj"]]


def test_ranks_of_a_batch_draw_the_same_but_for_their_own_columns() -> None:
    found = ranks.run(4, agreeing, "native dp2 tp2", "")
    for first, second, same in ((0, 1, True), (2, 3, True), (0, 2, False)):
        (column, row), (other_column, other_row) = found[first], found[second]
        for mine, other in zip(column, other_column, strict=True):
            assert torch.equal(mine, other) is same
        assert not torch.equal(row[0], other_row[0])
        assert all(torch.equal(mine, other) is same for mine, other in zip(row[1:], other_row[1:], strict=True))


def out_of_step() -> None:
    place = contract.Place(DIVISIONS["native tp2"], SUBJECTS["llama"], Path())
    model = adapt(place.division.cut(place.subject, ""), config_of(place.subject, Case(FIELDS["monteclora"])))
    verify(model)
    torch.manual_seed(torch.distributed.get_rank())
    with pytest.raises(RankError, match="random state"):
        verify(model)


def test_generators_that_are_out_of_step_are_noticed() -> None:
    ranks.run(2, out_of_step)
