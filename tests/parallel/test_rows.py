"""Batches of several adapters on ranks: every row is one process's, whatever its adapter and however the layers lie."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from divisions import DIVISIONS
from subjects import SUBJECTS, batch, logits_of
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import lorica
from lorica.checkpoint.names import adapter_entries
from lorica.checkpoint.pieces import piece_of
from lorica.layout import Layout
from lorica.parallel import Axis, Site, verify

TOLERANCE = 1e-5
#: Occurs in three rows of the batch, from other tokens on.
INVOCATION = [16]
ROWS = ["dora", "plain", "alora", "small", "__base__", "alora", "plain", "dora"]
ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4},
    "small": {"r": 2, "lora_alpha": 3},
    "dora": {"r": 4, "use_dora": True},
    "alora": {"r": 4, "alora_invocation_tokens": INVOCATION, "task_type": "CAUSAL_LM"},
}
#: On experts the variants have no meaning.
EXPERTS = {name: fields for name, fields in ADAPTERS.items() if name in ("plain", "small")}
EXPERTS["shared"] = {"r": 4, "share_expert_adapters": True}
OF_EXPERTS = ["shared", "plain", "shared", "small", "__base__", "plain", "plain", "small"]

pytestmark = pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor")


def adapted(base: nn.Module, subject: str, adapters: dict[str, dict[str, Any]]) -> nn.Module:
    """A model with several adapters, their factors random and the same on every layout."""
    model: Any = None
    for name, fields in adapters.items():
        config = lorica.LoraConfig(**{**SUBJECTS[subject].fields, "init_lora_weights": False, **fields})
        torch.manual_seed(11)
        if model is None:
            model = lorica.get_peft_model(base, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    return model.eval()


def fill(oracle: nn.Module, model: nn.Module) -> None:
    """Load the same random values into both."""
    generator = torch.Generator().manual_seed(3)
    for name, config in oracle.peft_config.items():
        entries = adapter_entries(oracle, name, config)
        values = {
            key: entry.tensor.detach().view(piece_of(key, entry).shape)
            + 0.1 * torch.randn(piece_of(key, entry).shape, generator=generator)
            for key, entry in sorted(entries.items())
        }
        for adapted in (oracle, model):
            lorica.set_peft_model_state_dict(adapted, values, adapter_name=name)


def near(got: Tensor, wanted: Tensor, what: str) -> None:
    assert got.shape == wanted.shape, what
    got, wanted = got.detach(), wanted.detach()
    off = float((got - wanted).norm() / wanted.norm())
    assert off <= TOLERANCE, f"{what}: off by {off}"


def invoked() -> Tensor:
    """Eight rows; the invocation stands early, late or nowhere in them."""
    ids = batch(8).masked_fill(batch(8) == INVOCATION[0], 3)
    for row, place in ((2, 1), (5, 6), (0, 4)):
        ids[row, place] = INVOCATION[0]
    return ids


def mixed(division: str, subject: str, adapters: dict[str, dict[str, Any]], names: list[str], folder: str) -> None:
    """Prompts, single tokens and gradients of a mixed batch are one process's; so is each row alone."""
    place = DIVISIONS[division]
    oracle = adapted(SUBJECTS[subject].build(), subject, adapters)
    model = adapted(place.cut(SUBJECTS[subject], folder), subject, adapters)
    verify(model)
    fill(oracle, model)
    group = dist.get_rank() * place.data // dist.get_world_size()
    ids = invoked().chunk(place.data)[group]
    mine = [names[index :: place.data] for index in range(place.data)][group]
    few = 2 if division == "torch tp2 sp" else 1  # torch cannot view a distributed tensor of which a rank has nothing
    for tokens in (ids.shape[1], few):
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                got = logits_of(model(input_ids=ids[:, :tokens], adapter_names=mine))
                wanted = logits_of(oracle(input_ids=ids[:, :tokens], adapter_names=mine))
                near(got, wanted, f"{tokens} tokens")
    with torch.no_grad():
        whole = logits_of(model(input_ids=ids, adapter_names=mine))
        for row, name in enumerate(mine):
            if name != "__base__" and place.data == 1:
                oracle.set_adapter(name)
                near(whole[row : row + 1], logits_of(oracle(input_ids=ids[row : row + 1])), f"row {row} alone")
    assert model.base_model.switch.rows is None


PLACES = [
    ("native tp2", "llama"),
    ("native tp2", "llama's ends"),
    ("native tp2", "phi3"),
    ("native tp4", "llama"),
    ("native tp2 sp", "llama"),
    ("native dp2 tp2", "llama"),
    ("transformers tp2", "llama"),
    ("transformers tp2", "llama's ends"),
    ("transformers tp2", "phi3"),
    ("torch tp2", "llama"),
    ("torch tp2 sp", "llama"),
    ("torch fsdp2", "llama"),
    ("transformers fsdp2", "llama"),
]
OF_MIXTURES = [
    ("native tp2", "qwen3-moe"),
    ("transformers tp2", "qwen3-moe"),
    ("transformers ep2", "qwen3-moe"),
    ("transformers ep2 tp2", "qwen3-moe"),
    ("transformers ep2 tp2 fsdp2", "qwen3-moe"),
]


@pytest.mark.parametrize(("division", "subject"), PLACES)
def test_rows_of_several_adapters(division: str, subject: str, tmp_path: Path) -> None:
    SUBJECTS[subject].save(tmp_path)
    ranks.run(DIVISIONS[division].ranks, mixed, division, subject, ADAPTERS, ROWS, str(tmp_path))


@pytest.mark.parametrize(("division", "subject"), OF_MIXTURES)
def test_rows_of_several_adapters_on_experts(division: str, subject: str, tmp_path: Path) -> None:
    SUBJECTS[subject].save(tmp_path)
    ranks.run(DIVISIONS[division].ranks, mixed, division, subject, EXPERTS, OF_EXPERTS, str(tmp_path))


def test_ranks_with_other_adapters_in_their_batches_wait_for_each_other(tmp_path: Path) -> None:
    """Experts are computed in calls that all ranks take part in, also for adapters that only one of them has."""
    SUBJECTS["qwen3-moe"].save(tmp_path)
    names = ["plain", "__base__"] * 4  # one rank has the adapter in all rows, the other in none
    ranks.run(2, mixed, "transformers ep2", "qwen3-moe", {"plain": EXPERTS["plain"]}, names, str(tmp_path))


@pytest.mark.parametrize("division", ["native tp2", "transformers tp2", "torch tp2"])
def test_whole_copies_are_each_rows_own(division: str, tmp_path: Path) -> None:
    SUBJECTS["llama"].save(tmp_path)
    adapters = {**ADAPTERS, "small": {**ADAPTERS["small"], "modules_to_save": ["lm_head", "norm"]}}
    ranks.run(2, mixed, division, "llama", adapters, ROWS, str(tmp_path))


def test_hidden_values_that_travel_are_each_rows_own(tmp_path: Path) -> None:
    adapters = {**ADAPTERS, "small": {**ADAPTERS["small"], "a2a_experimental": True}}
    ranks.run(2, mixed, "native tp2 sp", "llama", adapters, ROWS, str(tmp_path))


def generation(division: str, folder: str) -> None:
    oracle = adapted(SUBJECTS["llama"].build(), "llama", ADAPTERS)
    model = adapted(DIVISIONS[division].cut(SUBJECTS["llama"], folder), "llama", ADAPTERS)
    fill(oracle, model)
    options = {"adapter_names": ROWS, "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    ids = invoked()
    for one in (oracle, model):
        one.get_base_model().generation_config.pad_token_id = 0
    got, wanted = (one.generate(input_ids=ids, **options) for one in (model, oracle))
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("division", ["native tp2", "transformers tp2", "torch tp2"])
def test_generation(division: str, tmp_path: Path) -> None:
    SUBJECTS["llama"].save(tmp_path)
    ranks.run(2, generation, division, str(tmp_path))


def tokens_of_ranks() -> None:
    """A layer that every rank has whole, between blocks: each has its tokens of each row, in shares of any size."""
    torch.manual_seed(0)
    config = lorica.LoraConfig(target_modules=["target"], r=2, init_lora_weights=False, task_type="CAUSAL_LM")
    config.alora_invocation_tokens = INVOCATION
    model = lorica.PeftModel(nn.ModuleDict({"target": nn.Linear(6, 5)}), config).eval()
    layer = model.base_model.model["target"]
    x, offsets = torch.randn(4, 5, 6), [4, 1, None, 5]
    with torch.no_grad(), lorica.route_rows(model, alora_offsets=offsets):
        wanted = layer(x)
        axis = Axis.of(init_device_mesh("cpu", (2,), mesh_dim_names=("tp",)), 0)
        layer.settle(Site(Layout({"out": 5, "in": 6}, (), sequence=("tp",)), {"tp": axis}))
        for share in (slice(0, 3), slice(3, 5)), (slice(0, 1), slice(1, 5)), (slice(0, 5), slice(5, 5)):
            mine = share[axis.rank]
            assert torch.allclose(layer(x[:, mine]), wanted[:, mine], atol=1e-6)


def test_tokens_of_a_rank_know_where_in_the_row_they_stand() -> None:
    ranks.run(2, tokens_of_ranks)


# ---- Arrow ----------------------------------------------------------------------------------------------------------

_ROUTER = {"top_k": 2, "router_temperature": 0.5}


def routed(base: nn.Module, subject: str, *, general: bool) -> nn.Module:
    """Three adapters, perhaps a general one, and a router over them."""
    names = ["one", "two", "three", *(["gks_0"] if general else [])]
    model = adapted(base, subject, {name: {"r": 4, "lora_alpha": 6} for name in names})
    config = lorica.ArrowConfig(**_ROUTER, use_gks=general)
    config.gks_adapter_names = ["gks_0"] if general else []
    router = lorica.LoraConfig(**{**SUBJECTS[subject].fields, "r": 4, "arrow_config": config})
    model.add_adapter("arrow_router", router)
    return model


def arrow(division: str, subject: str, general: bool, folder: str) -> None:
    """Outputs, and the gradient that reaches the input, are one process's."""
    place = DIVISIONS[division]
    oracle = routed(SUBJECTS[subject].build(), subject, general=general)
    model = routed(place.cut(SUBJECTS[subject], folder), subject, general=general)
    fill(oracle, model)
    group = dist.get_rank() * place.data // dist.get_world_size()
    ids, found = batch(4).chunk(place.data)[group], []
    table = SUBJECTS[subject].build().get_input_embeddings()
    for one in (model, oracle):
        one.set_adapter("arrow_router", inference_mode=True)
        x = table(ids).detach().requires_grad_()
        logits = logits_of(one(inputs_embeds=x))
        logits.square().sum().backward()
        found.append((logits.detach(), x.grad))
    for what, got, wanted in zip(("the output", "the input's gradient"), *found, strict=True):
        near(got, wanted, what)
    with torch.no_grad(), model.disable_adapter():
        assert (logits_of(model(inputs_embeds=table(ids))) - found[0][0]).norm() > 0.01 * found[0][0].norm()


@pytest.mark.parametrize(
    ("division", "subject", "general"),
    [
        ("native tp2", "llama", True),
        ("native tp8", "llama", False),
        ("native tp2", "phi3", False),
        ("native tp8 fused", "phi3", True),
        ("native tp2 sp", "llama", False),
        ("transformers tp2", "llama", False),
        ("torch tp2", "llama", True),
        ("torch fsdp2", "llama", False),
    ],
)
def test_tokens_find_the_same_ways(division: str, subject: str, general: bool, tmp_path: Path) -> None:
    SUBJECTS[subject].save(tmp_path)
    ranks.run(DIVISIONS[division].ranks, arrow, division, subject, general, str(tmp_path))
