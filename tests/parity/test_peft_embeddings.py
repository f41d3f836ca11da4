"""Embeddings: saved when PEFT saves them, tied when PEFT ties them."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import twins
from safetensors.torch import load_file
from torch import nn
from twins import lorica, peft

from models import embedding_net, ids, tiny_bert, tiny_gpt2, tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

DIRECTIONS = [pytest.param(peft, lorica, id="peft-to-lorica"), pytest.param(lorica, peft, id="lorica-to-peft")]
WEIGHTS = "adapter_model.safetensors"

TARGETS = {
    "embedding": ["embed_tokens", "q_proj"],
    "output": ["lm_head"],
    "both": ["embed_tokens", "lm_head"],
    "none": ["q_proj"],
    "regex": r".*embed_tokens",
    "linear": "all-linear",
}


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("save", ["auto", True, False], ids=str)
def test_embedding_layers_are_saved_alike(targets: str, save: object, tmp_path) -> None:
    pair = twins.adapted(tiny_llama(), {"target_modules": TARGETS[targets]})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # both announce the choice that "auto" makes
        for model, name in zip(pair, ("peft", "ours"), strict=True):
            model.save_pretrained(str(tmp_path / name), save_embedding_layers=save)
    twins.assert_same_tensors(load_file(tmp_path / "ours" / WEIGHTS), load_file(tmp_path / "peft" / WEIGHTS))


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2, tiny_bert])
def test_embedding_layers_of_other_models(build, tmp_path) -> None:
    for targets in (["embed_tokens"], ["wte"], ["word_embeddings"]):
        if not any(name.endswith(targets[0]) for name, _ in build().named_modules()):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # tied, and saved automatically
            pair = twins.adapted(build(), {"target_modules": targets})
            tensors = [lib.get_peft_model_state_dict(m) for lib, m in zip((peft, lorica), pair, strict=True)]
        twins.assert_same_tensors(tensors[1], tensors[0])


def test_a_plain_module_has_no_known_embedding() -> None:
    pair = twins.adapted(embedding_net(), {"target_modules": ["emb"]})
    twins.assert_same_files(pair)


@pytest.mark.parametrize(("writer", "reader"), DIRECTIONS)
@pytest.mark.parametrize("targets", ["embedding", "both", "output"])
def test_saved_embeddings_are_loaded(writer, reader, targets: str, tmp_path) -> None:
    """A file that carries the base embedding brings it into another base model."""
    base, other = tiny_llama(seed=0), tiny_llama(seed=1)
    trained = twins.adapted(base, {"target_modules": TARGETS[targets]})[0 if writer is peft else 1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trained.save_pretrained(str(tmp_path), save_embedding_layers=True)
        loaded = reader.PeftModel.from_pretrained(copy.deepcopy(other), str(tmp_path))
        reference = (peft if reader is lorica else lorica).PeftModel.from_pretrained(other, str(tmp_path))
    twins.assert_close(loaded(ids(2, 5)).logits, reference(ids(2, 5)).logits)


TIED = {
    "targets-both": {"target_modules": ["embed_tokens", "lm_head"]},
    "targets-embedding": {"target_modules": ["embed_tokens"]},
    "targets-output": {"target_modules": ["lm_head"]},
    "saves-embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "saves-output": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "saves-both": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
}


def tied_pair(case: str, ensure: bool) -> twins.Twins:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # both warn that tied weights are adapted apart
        pair = twins.adapt(tiny_llama(tied=True), {**TIED[case], "ensure_weight_tying": ensure})
        theirs, ours = pair
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for _, parameter in sorted(theirs.named_parameters()):
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
        lorica.set_peft_model_state_dict(ours, peft.get_peft_model_state_dict(theirs))
    return pair


def shared(model: nn.Module) -> list[list[str]]:
    """Groups of parameter names that are one tensor."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(parameter.data_ptr(), []).append(name)
    return sorted(sorted(names) for names in groups.values() if len(names) > 1)


@pytest.mark.parametrize("case", TIED)
@pytest.mark.parametrize("ensure", [False, True])
def test_tied_models(case: str, ensure: bool) -> None:
    pair = tied_pair(case, ensure)
    twins.assert_close(pair[1](ids(2, 5)).logits, pair[0](ids(2, 5)).logits)
    if case == "targets-output" and ensure:
        return  # here PEFT forgets that the output layer was asked for, and leaves the base weight out of the file
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        twins.assert_same_files(pair)
    if case.startswith("targets") and ensure:
        return  # PEFT ties by storage: two parameters on one memory, which an optimiser updates twice
    twins.assert_same_parameters(pair)
    assert shared(pair[1]) == shared(pair[0])
    twins.assert_same_run(pair, ids(2, 5), 2e-6)


@pytest.mark.parametrize("case", TIED)
@pytest.mark.parametrize("ensure", [False, True])
@pytest.mark.parametrize(("writer", "reader"), DIRECTIONS)
def test_tied_models_move(case: str, ensure: bool, writer, reader, tmp_path) -> None:
    trained = tied_pair(case, ensure)[0 if writer is peft else 1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trained.save_pretrained(str(tmp_path))
        loaded = reader.PeftModel.from_pretrained(tiny_llama(tied=True), str(tmp_path))
    twins.assert_close(loaded(ids(2, 5)).logits, trained(ids(2, 5)).logits)


@pytest.mark.parametrize("case", ["targets-both", "targets-embedding", "targets-output"])
def test_merging_into_tied_weights_warns(case: str) -> None:
    for library in (peft, lorica):
        config = library.LoraConfig(**TIED[case])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = library.get_peft_model(tiny_llama(tied=True), config)
        with pytest.warns(UserWarning, match="tie"):
            model.merge_and_unload()


def test_targeting_a_tied_module_warns_at_once() -> None:
    for library in (peft, lorica):
        with pytest.warns(UserWarning, match="tie"):
            library.get_peft_model(tiny_llama(tied=True), library.LoraConfig(target_modules=["embed_tokens"]))


def test_ensuring_ties_where_there_are_none_warns() -> None:
    for library in (peft, lorica):
        config = library.LoraConfig(target_modules=["embed_tokens"], ensure_weight_tying=True)
        with pytest.warns(UserWarning, match=r"ti(e|ed)|tying"):
            library.get_peft_model(tiny_llama(tied=False), config)
