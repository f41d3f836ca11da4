"""Models that lorica cuts: what comes out, and every gradient, equals one process."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
import transformers
from collective_counts import Collectives
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from lorica.engines.gather import gather
from lorica.engines.native import Native, gather_model_state, parallelize
from lorica.engines.native.collectives import shares
from lorica.engines.native.sequence import Region, enter_block
from lorica.engines.site import Axis
from lorica.errors import LayoutError

SIZES: dict[str, Any] = {
    "vocab_size": 51,  # divides by nothing
    "hidden_size": 32,
    "intermediate_size": 45,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
KINDS: dict[str, dict[str, Any]] = {
    "Llama": {"attention_bias": True, "mlp_bias": True},
    "Mistral": {"tie_word_embeddings": True},
    "Phi3": {"resid_pdrop": 0.0},
    "Qwen2": {"tie_word_embeddings": True},
    "Qwen3": {},
    "Gemma": {"tie_word_embeddings": True},
    "Gemma3Text": {"tie_word_embeddings": True, "query_pre_attn_scalar": 4},
    "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "mlp_only_layers": [1]},
}
STORIES = Path(__file__).parents[4] / "shared" / "models" / "stories260K"


def make(kind: str) -> Any:
    """A tiny model with weights that no symmetry hides."""
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **KINDS[kind]}, attn_implementation="eager")
    name = "Gemma3ForCausalLM" if kind == "Gemma3Text" else f"{kind}ForCausalLM"
    torch.manual_seed(7)
    model = getattr(transformers, name)(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def tp(size: int | None = None) -> Any:
    return init_device_mesh("cpu", (size or dist.get_world_size(),), mesh_dim_names=("tp",))


def close(a: Tensor, b: Tensor, what: str) -> None:
    torch.testing.assert_close(
        a, b, rtol=1e-5, atol=1e-5 * max(1.0, b.abs().max().item()), msg=lambda text: f"{what}: {text}"
    )


def gradients(model: Any, group: Any = None) -> dict[str, Tensor]:
    """The logical gradients: summed over the axis where they are partial."""
    found = {}
    for place, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            gradient = parameter.grad
            if isinstance(module, Native):
                roles, (cut,) = module.roles[name], module.layout.cuts
                partial = cut.dim not in roles and getattr(module, "sequence_parallel_enabled", False)
                copies = cut.dim in roles and (cut.copies > 1)
                if cut.dim in roles and not copies:
                    gradient = gather(gradient, module.layout, roles, module.logical_shape(name), module.axes)
                else:
                    total = torch.zeros(module.logical_shape(name))
                    module.layout.put(total, gradient, roles, module.at)
                    gradient = total
            else:
                partial, copies = hasattr(module, "sequence_axes"), False
            if partial or copies:
                dist.all_reduce(gradient, group=group)
            found[f"{place}.{name}"] = gradient
    return found


def one_and_many(model: Any, cut: Any, ids: Tensor, **kwargs: Any) -> None:
    """Compare logits, loss and gradients of a whole model and the same one cut."""
    expected = model(input_ids=ids, labels=ids, **kwargs)
    result = cut(input_ids=ids, labels=ids, **kwargs)
    close(result.logits, expected.logits, "logits")
    close(result.loss, expected.loss, "loss")
    expected.loss.backward()
    result.loss.backward()
    found = gradients(cut)
    names = {name for name, _ in model.named_parameters()}
    assert names <= found.keys()
    for name, parameter in model.named_parameters():
        close(found[name], parameter.grad, name)
        tied = "lm_head.weight"
        if name == "model.embed_tokens.weight" and tied in found and model.config.tie_word_embeddings:
            assert cut.lm_head.weight is cut.model.embed_tokens.weight
    model.zero_grad()
    cut.zero_grad()


def every_kind(kinds: list[str], sequence_parallel: bool, order: Any) -> None:
    for kind in kinds:
        model, cut = make(kind), make(kind)
        parallelize(cut, tp(), sequence_parallel=sequence_parallel, order=order)
        assert all(type(parameter) is nn.Parameter for parameter in cut.parameters())
        for length in (7, 1) if kind == "Llama" else (5,):
            torch.manual_seed(length)
            ids = torch.randint(3, 51, (2, length if length > 1 else 3))
            try:
                one_and_many(model, cut, ids)
            except AssertionError as error:
                raise AssertionError(f"{kind}, {length} tokens: {error}") from error


@pytest.mark.parametrize(("size", "sequence_parallel"), [(2, False), (2, True), (4, True)])
def test_every_kind_equals_one_process(size: int, sequence_parallel: bool) -> None:
    ranks.run(size, every_kind, list(KINDS), sequence_parallel, "strided")


@pytest.mark.parametrize(("sequence_parallel", "order"), [(False, "strided"), (True, "neighbours")])
def test_eight_ranks_on_four_key_value_heads(sequence_parallel: bool, order: str) -> None:
    ranks.run(8, every_kind, ["Qwen3", "Phi3"], sequence_parallel, order)


def greedy(kind: str, sequence_parallel: bool) -> None:
    model, cut = make(kind).eval(), parallelize(make(kind), tp(), sequence_parallel=sequence_parallel).eval()
    ids = torch.tensor([[0, 0, 5, 6, 7], [3, 9, 8, 7, 4]])
    mask = (ids > 0).long()
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    assert torch.equal(cut.generate(ids, **options), model.generate(ids, **options))


@pytest.mark.parametrize(("kind", "sequence_parallel"), [("Llama", False), ("Phi3", True), ("Gemma3Text", False)])
def test_generation_with_a_cache(kind: str, sequence_parallel: bool) -> None:
    ranks.run(2, greedy, kind, sequence_parallel)


def checkpointed() -> None:
    model, cut = make("Qwen3"), parallelize(make("Qwen3"), tp(), sequence_parallel=True)
    cut.activation_checkpointing_enable()
    cut.train()
    long, short = torch.randint(3, 51, (2, 9)), torch.randint(3, 51, (2, 4))
    losses = []
    for one in (model, cut):  # both graphs live while the layers of the first are computed again
        losses.append(sum(one(input_ids=ids, labels=ids).loss for ids in (long, short)))
        losses[-1].backward()
    close(losses[1], losses[0], "loss")
    found = gradients(cut)
    for name, parameter in model.named_parameters():
        close(found[name], parameter.grad, name)


def test_lengths_are_not_mixed_up_by_checkpointing() -> None:
    ranks.run(2, checkpointed)


def region_alone() -> None:
    region = Region(Axis.of(tp(), 0))
    first, block, last = nn.Identity(), nn.Identity(), nn.Identity()
    region.begin(first)
    enter_block(block, region.axis, region)
    region.end(last)
    for length in (5, 1):
        x = torch.randn(2, length, 3)
        mine = first(x)
        assert mine.shape[1] == shares(length, 2)[dist.get_rank()]
        assert torch.equal(block(mine), x)
        assert torch.equal(last(mine), x)


def test_the_length_is_known_without_positions() -> None:
    ranks.run(2, region_alone)


def embedded(sequence_parallel: bool) -> None:
    model, cut = make("Llama"), parallelize(make("Llama"), tp(), sequence_parallel=sequence_parallel)
    x = torch.randn(2, 5, 32)
    found = []
    for one in (model, cut):
        given = x.clone().requires_grad_()
        one(inputs_embeds=given).logits.square().sum().backward()
        found.append(given.grad)
    close(found[1], found[0], "gradient of the embeddings")
    found = [one.model(inputs_embeds=x).last_hidden_state for one in (model, cut)]
    close(found[1], found[0], "last hidden state")


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_gradient_of_the_input(sequence_parallel: bool) -> None:
    ranks.run(2, embedded, sequence_parallel)


def counted(sequence_parallel: bool) -> list[list[Counter[str]]]:
    found = []
    for layers in (1, 2):
        SIZES["num_hidden_layers"] = layers
        cut = parallelize(make("Llama"), tp(), sequence_parallel=sequence_parallel).requires_grad_(False)
        x = torch.randn(1, 4, 32, requires_grad=True)
        with Collectives() as forward:
            logits = cut(inputs_embeds=x).logits
        with Collectives() as backward:
            logits.sum().backward()
        found.append([forward.counts, backward.counts])
    return found


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_collectives_of_a_layer_and_of_the_rest(sequence_parallel: bool) -> None:
    one, two = ranks.run(2, counted, sequence_parallel)[0]
    layer = [Counter(b) - Counter(a) for a, b in zip(one, two, strict=True)]
    rest = [Counter(a) - Counter(b) for a, b in zip(one, layer, strict=True)]
    if sequence_parallel:
        assert layer == 2 * [{"all_gather": 2, "reduce_scatter": 2}]
        assert rest == [{"all_gather": 2}, {"all_reduce": 1, "all_gather": 1}]
    else:
        assert layer == 2 * [{"all_reduce": 2}]
        assert rest == [{"all_gather": 1}, {"all_reduce": 1}]


def stories(sequence_parallel: bool) -> None:
    load = transformers.AutoModelForCausalLM.from_pretrained
    model, cut = load(STORIES), parallelize(load(STORIES), tp(), sequence_parallel=sequence_parallel)
    one_and_many(model, cut, torch.randint(3, 500, (2, 23)))
    ids = torch.tensor([[1, 403, 407]])
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 20, "do_sample": False}
    assert torch.equal(cut.generate(ids, **options), model.generate(ids, **options))


@pytest.mark.skipif(not STORIES.exists(), reason="the model is not here")
@pytest.mark.parametrize(("size", "sequence_parallel"), [(2, True), (8, False)])
def test_a_trained_model(size: int, sequence_parallel: bool) -> None:
    ranks.run(size, stories, sequence_parallel)


def saved(kind: str) -> None:
    model, cut = make(kind), parallelize(make(kind), tp())
    state = dict(gather_model_state(cut))
    if dist.get_rank():
        assert state == {}
        return
    expected = dict(model.named_parameters())  # what is shared comes once
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


@pytest.mark.parametrize("kind", ["Phi3", "Gemma", "Qwen3Moe"])
def test_the_whole_state_comes_back(kind: str) -> None:
    ranks.run(4, saved, kind)


def sharded() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "tp"))
    model, cut = make("Llama"), parallelize(make("Llama"), mesh, sequence_parallel=True)
    assert {name: (axis.size, axis.rank) for name, axis in cut.lorica_mesh.items()} == {
        "fsdp": (2, mesh.get_local_rank("fsdp")),
        "tp": (2, mesh.get_local_rank("tp")),
    }
    ids = torch.randint(3, 51, (2, 5))
    mine = ids[mesh.get_local_rank("fsdp")][None]
    result = cut(input_ids=mine, labels=mine)
    close(result.logits, model(input_ids=mine).logits, "logits")
    result.loss.backward()
    (sum(model(input_ids=row[None], labels=row[None]).loss for row in ids) / 2).backward()
    down = cut.model.layers[1].mlp.down_proj
    expected = down.layout.take(model.model.layers[1].mlp.down_proj.weight.grad, down.roles["weight"], down.at)
    close(down.weight.grad.full_tensor(), expected, "gradient, averaged over the data ranks")
    state = dict(gather_model_state(cut))
    if dist.get_rank() == 0:
        assert all(torch.equal(state[name], parameter) for name, parameter in model.named_parameters())


def test_fully_sharded_layers() -> None:
    ranks.run(4, sharded)


def left_whole() -> None:
    model, cut = make("Llama"), make("Llama")
    parallelize(cut, tp(), sequence_parallel=True, whole=("mlp", "lm_head", "embed_tokens"))
    assert type(cut.lm_head) is nn.Linear
    one_and_many(model, cut, torch.randint(3, 51, (2, 5)))


def test_blocks_can_be_left_whole() -> None:
    ranks.run(2, left_whole)


def classify() -> None:
    heads = []
    for _ in range(2):
        config = transformers.LlamaConfig(**SIZES, num_labels=3)
        torch.manual_seed(3)
        heads.append(transformers.LlamaForSequenceClassification(config))
    model, cut = heads[0], parallelize(heads[1], tp(), sequence_parallel=True)
    ids = torch.randint(3, 51, (2, 5))
    one, many = (head(input_ids=ids, labels=torch.tensor([0, 2])) for head in (model, cut))
    close(many.logits, one.logits, "logits")
    one.loss.backward()
    many.loss.backward()
    found = gradients(cut)
    for name, parameter in model.named_parameters():
        close(found[name], parameter.grad, name)


def test_other_heads_stay_whole() -> None:
    ranks.run(2, classify)


def refused() -> None:
    def broken(change: Any, size: str = "Llama") -> Any:
        model = make(size)
        change(model)
        return model

    def unknown(model: Any) -> None:
        model.model.layers[1].extra = nn.Linear(2, 2)

    def quantised(model: Any) -> None:
        model.model.layers[1].mlp.down_proj.weight = nn.Parameter(torch.ones(32, 45).to(torch.int8), False)

    def wide_norm(model: Any) -> None:
        model.model.layers[1].self_attn.q_norm = nn.RMSNorm(32)

    def more(model: Any) -> None:
        model.model.layers[1].mlp.more_proj = nn.Linear(2, 2)

    def sinks(model: Any) -> None:
        model.model.layers[1].self_attn.sinks = nn.Parameter(torch.ones(8))

    def same(model: Any) -> None:
        pass

    named = tp()
    nameless = init_device_mesh("cpu", (2,))
    cases: list[tuple[Any, Any, dict[str, Any], str]] = [
        (broken(unknown), named, {}, "layers.1.extra"),
        (broken(quantised), named, {}, "layers.1.mlp.down_proj"),
        (broken(wide_norm), named, {}, "layers.1.self_attn.q_norm"),
        (broken(more), named, {}, "layers.1.mlp"),
        (broken(sinks), named, {}, "layers.1.self_attn.*sinks"),
        (broken(same), named, {"kv_size_multiplier": 4}, "layers.0.self_attn"),
        (broken(same), named, {"whole": ("self_attn",), "sequence_parallel": True}, "needs all tokens"),
        (broken(same, "Qwen2"), named, {"whole": ("lm_head",)}, "share their weight"),
        (broken(same), nameless, {}, "need names"),
        (broken(same), init_device_mesh("cpu", (2,), mesh_dim_names=("cp",)), {}, "cp"),
        (nn.Linear(2, 2), named, {}, "decoder layers"),
    ]
    for model, mesh, options, message in cases:
        before = [(name, id(module)) for name, module in model.named_modules()]
        with pytest.raises(LayoutError, match=message):
            parallelize(model, mesh, **options)
        assert before == [(name, id(module)) for name, module in model.named_modules()]
        assert not hasattr(model, "lorica_mesh")
        assert not any(module._forward_pre_hooks for module in model.modules())
    cut = parallelize(make("Llama"), named)
    with pytest.raises(LayoutError, match="already"):
        parallelize(cut, named)


def test_what_cannot_be_cut_is_refused_before_anything_changes() -> None:
    ranks.run(2, refused)
