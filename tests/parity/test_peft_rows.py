"""PEFT's ``adapter_names``, aLoRA and Arrow: the same outputs, sequences, gradients and complaints."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from twins import Twins, adapt, add, assert_close, peft, quiet, run, share_factors

import lorica
import models
from cases import OPS, Op

NAMES = ["b", "default", "__base__", "c", "b", "default", "c"]
TARGETS = {"target_modules": ["q_proj", "v_proj", "down_proj"], "init_lora_weights": False, "task_type": "CAUSAL_LM"}
#: PEFT does not mix batches of these.
WITHOUT = ("attention", "attention-batch-first")

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")


def mixed(pair: Twins, batch: Tensor, names: list[str] = NAMES, **kwargs: Any) -> Twins:
    """The outputs of both for a batch of several adapters."""
    with quiet():
        theirs = pair[0](batch, adapter_names=names, **kwargs)
    ours = pair[1](batch, adapter_names=names, **kwargs)
    return tuple(out if isinstance(out, Tensor) else out.logits for out in (theirs, ours))  # type: ignore[return-value]


# ---- mixed batches --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", [op for op in OPS if op.name not in WITHOUT], ids=lambda op: op.name)
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "grad"])
def test_mixed_batches_of_every_layer(op: Op, grad: bool) -> None:
    fields = {"target_modules": ["target"], "init_lora_weights": False, "lora_alpha": 6, **op.fields}
    pair = adapt(op.build(), {**fields, "r": op.ranks[0]})
    add(pair, "b", {**fields, "r": op.ranks[-1]})
    add(pair, "c", {**fields, "r": op.ranks[-1], "use_rslora": True})
    share_factors(pair)
    one = op.inputs()
    batch = models.floats(7, *one.shape[1:]) if one.is_floating_point() else models.ids(7, *one.shape[1:])
    for model in pair:
        model.eval()
    with torch.set_grad_enabled(grad):
        theirs, ours = mixed(pair, batch)
    assert_close(ours, theirs)


def llamas() -> Twins:
    """Two Llamas with three adapters each, on layers that are not all the same."""
    pair = adapt(models.tiny_llama(), {**TARGETS, "r": 4, "target_modules": ["q_proj", "embed_tokens", "lm_head"]})
    add(pair, "b", {**TARGETS, "r": 2})
    add(pair, "c", {**TARGETS, "r": 4, "lora_alpha": 3})
    share_factors(pair)
    return pair[0].eval(), pair[1].eval()


@pytest.mark.parametrize("tokens", [1, 3, 20])
def test_mixed_batches_of_a_model(tokens: int) -> None:
    with torch.no_grad():
        theirs, ours = mixed(llamas(), models.ids(7, tokens))
    assert_close(ours, theirs)


@pytest.mark.parametrize("beams", [1, 3])
def test_mixed_generation(beams: int) -> None:
    pair, prompts = llamas(), models.ids(7, 4)
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams, "adapter_names": NAMES}
    with quiet():
        theirs, ours = (model.generate(input_ids=prompts, **options) for model in pair)
    assert torch.equal(ours, theirs)


def test_mixed_generation_of_an_encoder_and_a_decoder_with_beams() -> None:
    fields = {"target_modules": ["q", "v", "wo"], "init_lora_weights": False, "task_type": "SEQ_2_SEQ_LM"}
    pair = adapt(models.tiny_t5(), fields)
    add(pair, "b", fields)
    add(pair, "c", fields)
    share_factors(pair)
    with quiet():
        theirs, ours = (
            model.eval().generate(
                input_ids=models.ids(7, 4), adapter_names=NAMES, num_beams=2, max_new_tokens=5, do_sample=False
            )
            for model in pair
        )
    assert torch.equal(ours, theirs)


def test_whole_copies_in_a_mixed_batch() -> None:
    fields = {**TARGETS, "modules_to_save": ["lm_head"]}
    pair = adapt(models.tiny_llama(), fields)
    add(pair, "b", fields)
    add(pair, "c", fields)
    share_factors(pair)
    with torch.no_grad():
        theirs, ours = mixed((pair[0].eval(), pair[1].eval()), models.ids(7, 4))
    assert_close(ours, theirs)


def complaints(pair: Twins, call: Any) -> None:
    """Both raise, of the same family; ours begins with PEFT's words."""
    with quiet(), pytest.raises((ValueError, TypeError)) as theirs:
        call(pair[0])
    with pytest.raises(theirs.type) as ours:
        call(pair[1])
    assert str(ours.value).startswith(str(theirs.value).rstrip("."))


def test_the_same_complaints() -> None:
    pair, batch = llamas(), models.ids(2, 3)
    complaints(pair, lambda model: model(batch, adapter_names=["default"]))
    complaints(pair, lambda model: model(batch, adapter_names=["default", "nope"]))
    complaints(pair, lambda model: model.train()(batch, adapter_names=["default", "b"]))
    for model in pair:
        model.eval()
        with quiet():
            model.merge_adapter()
    complaints(pair, lambda model: model(batch, adapter_names=["default", "b"]))


# ---- aLoRA ----------------------------------------------------------------------------------------------------------


def activated(invocation: dict[str, list[int] | None] | None = None) -> tuple[Twins, Tensor]:
    """Two Llamas with an aLoRA, another and a plain adapter, and a batch in which they are invoked here and there."""
    pair = adapt(models.tiny_llama(), {**TARGETS, "alora_invocation_tokens": [5, 6]})
    add(pair, "b", {**TARGETS, "alora_invocation_tokens": [7]})
    add(pair, "c", TARGETS)
    share_factors(pair)
    batch = models.ids(7, 9).clamp(min=8)
    batch[0, 3:5] = batch[0, 6:8] = batch[1, :2] = torch.tensor([5, 6])
    batch[2, 8], batch[4, 8], batch[4, 2], batch[5, 7], batch[6, 1] = 5, 7, 7, 6, 7
    return (pair[0].eval(), pair[1].eval()), batch


def test_activated_in_each_row_from_its_invocation_on() -> None:
    (theirs, ours), batch = activated()
    with torch.no_grad():
        got = ours(batch).logits
        with quiet():
            assert_close(got, theirs(batch).logits)
        with ours.disable_adapter():
            base = ours(batch).logits
    first = [int((row != plain).any(-1).float().argmax()) for row, plain in zip(got, base, strict=True)]
    assert first[:2] == [6, 0]
    assert torch.equal(got[2:], base[2:])
    assert torch.equal(got[0, :6], base[0, :6])


def test_activated_rows_of_a_mixed_batch() -> None:
    pair, batch = activated()
    names = ["default", "default", "c", "__base__", "b", "default", "b"]
    with torch.no_grad():
        theirs, ours = mixed(pair, batch, names)
    assert_close(ours, theirs)


@pytest.mark.parametrize("names", [None, ["default", "default", "c", "__base__", "b", "b", "b"]], ids=["one", "mixed"])
def test_activated_generation(names: list[str] | None) -> None:
    pair, batch = activated()
    options = {"max_new_tokens": 8, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    options |= {} if names is None else {"adapter_names": names}
    with quiet():
        theirs, ours = (model.generate(input_ids=batch, **options) for model in pair)
    assert torch.equal(ours.sequences, theirs.sequences)
    for score, wanted in zip(ours.scores, theirs.scores, strict=True):
        assert_close(score, wanted)


def test_a_cache_filled_by_the_base_model_serves_an_activated_adapter() -> None:
    (_, model), batch = activated()
    prompt, rest = batch[:1, :6], batch[:1, 6:]
    with torch.no_grad():
        whole = model(batch[:1]).logits[:, 6:]
        with model.disable_adapter():
            cache = model(prompt, use_cache=True).past_key_values
        assert_close(model(rest, past_key_values=cache).logits, whole)


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_activated_gradients(reentrant: bool | None) -> None:
    pair, batch = activated()
    for model in pair:
        model.train()
        if reentrant is not None:
            with quiet():
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    with quiet():
        (theirs, expected), (ours, gradients) = (run(model, batch) for model in pair)
    assert_close(ours, theirs)
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_close(gradients[name], gradient, 1e-5, name)
    assert max(gradient.norm() for gradient in gradients.values()) > 0


def test_an_adapter_that_was_not_invoked_gets_gradients_of_zero() -> None:
    pair, _ = activated()
    batch = models.ids(2, 5).clamp(min=8)
    with quiet():
        found = [run(model.train(), batch)[1] for model in pair]
    assert found[0].keys() == found[1].keys() != set()
    assert all(not gradient.any() for gradients in found for gradient in gradients.values())


def test_two_forwards_before_a_backward_are_recomputed_each_with_its_own_rows() -> None:
    (_, model), batch = activated()
    model.train()
    other = batch.flip(0)

    def gradients(checkpointed: bool) -> list[Tensor]:
        model.zero_grad()
        if checkpointed:
            model.activation_checkpointing_enable({"use_reentrant": False})
        loss = model(batch).logits.square().sum() + model(other).logits.sum()
        loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    for got, wanted in zip(gradients(False), gradients(True), strict=True):
        assert_close(got, wanted, 1e-5)


def test_offsets_as_peft_works_them_out() -> None:
    from peft.tuners.lora import variants as theirs

    from lorica import routing as ours

    (their_model, our_model), batch = activated()
    names = ["default", "default", "c", "__base__", "b", "nope", "b"]
    for given in (names, None):
        with quiet():
            wanted = theirs.calculate_alora_offsets(their_model.peft_config, "default", batch, given)
            assert ours.calculate_alora_offsets(our_model.peft_config, "default", batch, given) == wanted
    for name in ("get_alora_offsets_for_forward", "get_alora_offsets_for_generate"):
        for kwargs in ({"input_ids": batch}, {"input_ids": batch, "adapter_names": ["b"] * 7}, {"alora_offsets": [1]}):
            wanted = getattr(theirs, name)(their_model, **kwargs)
            assert getattr(ours, name)(our_model, **kwargs) == wanted or "input_ids" in wanted


def test_activated_complaints() -> None:
    pair, batch = activated()
    with pytest.warns(UserWarning, match="aLoRA is currently only supported for CAUSAL_LM task"):
        lorica.LoraConfig(alora_invocation_tokens=[1])
    complaints(pair, lambda model: model.generate(input_ids=batch, num_beams=2, max_new_tokens=2))
    ours = pair[1]
    with pytest.warns(UserWarning, match="Cannot calculate aLoRA offsets when only inputs_embeds are provided"):
        output = ours(inputs_embeds=ours.get_input_embeddings()(batch)).logits
    with ours.disable_adapter():
        assert torch.equal(output, ours(batch).logits)
    with pytest.raises(ValueError, match="aLoRA does not support merging"):
        ours.merge_adapter()
    with pytest.raises(ValueError, match=r"alora_invocation_tokens.*whole numbers"):
        lorica.LoraConfig(alora_invocation_tokens=["a"], task_type="CAUSAL_LM")


# ---- Arrow ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def experts(tmp_path_factory) -> list[str]:
    """Four saved adapters. The singular values of their deltas are well apart: PEFT takes fifteen power steps from a
    random vector for what is exact here."""
    folder = tmp_path_factory.mktemp("experts")
    generator = torch.Generator().manual_seed(0)
    for index in range(4):
        model = lorica.get_peft_model(models.tiny_llama(), lorica.LoraConfig(**{**TARGETS, "r": 4, "lora_alpha": 6}))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    long = max(parameter.shape)
                    basis = torch.linalg.qr(torch.randn(long, 4, generator=generator))[0]
                    parameter.copy_((basis * torch.tensor([1, 0.3, 0.2, 0.1])).T if "lora_A" in name else basis)
        model.save_pretrained(folder / str(index))
    return [str(folder / str(index)) for index in range(4)]


ROUTERS: list[dict[str, Any]] = [
    {"top_k": 2},
    {"top_k": 1, "router_temperature": 0.2},
    {"top_k": 3, "router_temperature": 4.0},
    {"top_k": 2, "use_gks": True},
]


def routers(experts: list[str], **fields: Any) -> Twins:
    """PEFT's model and ours, of three experts and a general adapter."""
    general = experts[3:] if fields.get("use_gks") else None
    with quiet():
        theirs = peft.create_arrow_model(
            models.tiny_llama(), experts[:3], peft.ArrowConfig(**fields, rng_seed=1), general_adapter_paths=general
        )
    config = lorica.ArrowConfig(**fields)
    ours = lorica.create_arrow_model(models.tiny_llama(), experts[:3], config, general_adapter_paths=general)
    return theirs.eval(), ours.eval()


@pytest.mark.parametrize("fields", ROUTERS, ids=str)
def test_tokens_go_the_same_ways(experts: list[str], fields: dict[str, Any]) -> None:
    theirs, ours = routers(experts, **fields)
    batch = models.ids(3, 7)
    with torch.no_grad(), quiet():
        assert_close(ours(batch).logits, theirs(batch).logits)
        assert not torch.equal(ours(batch).logits, models.tiny_llama()(batch).logits)


def test_an_expert_that_comes_later_takes_part(experts: list[str]) -> None:
    pair, batch = routers(experts, top_k=3), models.ids(3, 7)
    with torch.no_grad(), quiet():
        for model in pair:
            model(batch)
            model.load_adapter(experts[3], "later")
        assert_close(pair[1](batch).logits, pair[0](batch).logits)


def test_routed_gradients_reach_the_input(experts: list[str]) -> None:
    pair, batch = routers(experts, top_k=2), models.ids(2, 5)
    found = []
    for model in pair:
        embeddings = model.get_input_embeddings()(batch).detach().requires_grad_()
        with quiet():
            model(inputs_embeds=embeddings).logits.square().sum().backward()
        found.append(embeddings.grad)
    assert_close(found[1], found[0], 1e-5)


def test_a_router_and_its_experts_are_saved_and_loaded(experts: list[str], tmp_path: Path) -> None:
    _, ours = routers(experts, top_k=2, use_gks=True)
    ours.save_pretrained(tmp_path)
    first, *rest = ours.peft_config
    again = lorica.PeftModel.from_pretrained(models.tiny_llama(), tmp_path / first, first)
    for name in rest:
        again.load_adapter(tmp_path / name, name)
    again.set_adapter("arrow_router")
    with torch.no_grad():
        assert torch.equal(again(models.ids(3, 7)).logits, ours(models.ids(3, 7)).logits)


def test_general_knowledge_is_taken_out_without_a_trace(experts: list[str]) -> None:
    _, ours = routers(experts, top_k=2, use_gks=True)
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    ours(models.ids(2, 3))
    assert all(torch.equal(tensor, before[name]) for name, tensor in ours.state_dict().items())


def test_a_router_in_a_mixed_batch(experts: list[str]) -> None:
    _, ours = routers(experts, top_k=2)
    batch, names = models.ids(4, 5), ["arrow_router", "task_1", "__base__", "arrow_router"]
    with torch.no_grad():
        got = ours(batch, adapter_names=names).logits
        assert_close(got[[0, 3]], ours(batch[[0, 3]]).logits)
        ours.set_adapter("task_1")
        assert_close(got[1], ours(batch).logits[1])


def test_what_cannot_be_routed_is_refused(experts: list[str], tmp_path: Path) -> None:
    _, ours = routers(experts, top_k=2)
    with pytest.raises(ValueError, match=r"Cannot merge an active Arrow router adapter\. Remove it first"):
        ours.merge_adapter()
    config = lorica.ArrowConfig(top_k=2)
    with pytest.raises(ValueError, match="should contain at least one adapter path"):
        lorica.create_arrow_model(models.tiny_llama(), [], config)
    with pytest.raises(ValueError, match="general LoRA paths"):
        lorica.create_arrow_model(models.tiny_llama(), experts[:2], lorica.ArrowConfig(use_gks=True))
    with pytest.raises(ValueError, match=r"does not contain 'adapter_config\.json'"):
        lorica.create_arrow_model(models.tiny_llama(), [str(tmp_path)], config)
    for fields, message in (({"r": 2}, "rank mismatch"), ({"target_modules": ["q_proj"]}, "target_modules mismatch")):
        lorica.get_peft_model(models.tiny_llama(), lorica.LoraConfig(**{**TARGETS, "r": 4, **fields})).save_pretrained(
            tmp_path / "other"
        )
        with pytest.raises(ValueError, match=message):
            lorica.create_arrow_model(models.tiny_llama(), [experts[0], str(tmp_path / "other")], config)
    base: nn.Module = models.embedding_net()
    lorica.get_peft_model(copy.deepcopy(base), lorica.LoraConfig(target_modules=["emb"])).save_pretrained(
        tmp_path / "embedding"
    )
    with pytest.raises(TypeError, match="must only target Linear-like layers"):
        lorica.create_arrow_model(base, [str(tmp_path / "embedding")], config)
