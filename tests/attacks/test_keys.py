"""Names of tensors come from strangers too: any name is understood or refused, quickly."""

from __future__ import annotations

import pytest
import torch
from costs import bounded
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import lorica
from lorica.checkpoint.reading import map_keys
from lorica.convert import families
from lorica.convert.peft import read_peft_adapter
from lorica.errors import LoricaError, suggest
from lorica.layout.neuron import key_of
from lorica.targets.walk import targets_of_keys
from models import mlp

WORDS = ["base_model", "model", "layers", "0", "12", "self_attn", "q_proj", "mlp", "experts", "gate_up_proj", "lora_A"]
WORDS += [
    "lora_B",
    "weight",
    "lora_embedding_A",
    "lora_magnitude_vector",
    "default",
    "modules_to_save",
    "base_layer",
    "",
]
WORDS += ["decoder", "linear_qkv", "local_experts", "lin0", "lin1", "٣", "é", " ", "", "9" * 60]
KEYS = st.one_of(st.lists(st.sampled_from(WORDS), min_size=1, max_size=9).map(".".join), st.text(max_size=30))
#: As long as a name in a file may be, and made for expressions to go back over.
LONG = [
    *("." * 2048, "a" * 2048, "a." * 1024, "layers.1." * 227, "layers." * 292, "experts.1." * 204, "lora_A." * 292),
    *("model.layers." + "1" * 2000, "decoder.layers.1." + "mlp.experts." * 168, ".lora_A.weight" * 146),
    *("base_model.model." * 120, "model." * 341, "1." * 1024, "layers.1.mlp.experts.1" * 93),
]
READERS = [
    lambda key: targets_of_keys([key]),
    lambda key: map_keys({key: None}, None),
    families.from_lorica_on_megatron,
    lambda key: families.spelling_of([key]),
    key_of,
    lambda key: read_names([key]),
]


def read_names(keys: list[str]) -> set[str]:
    return targets_of_keys(f"{key}.lora_A.weight" for key in keys)


def refused(reader, key: str) -> bool:
    """Whether a reader refuses a name; another error than lorica's is not caught."""
    try:
        reader(key)
    except LoricaError:
        return True
    return False


@settings(max_examples=200, deadline=None)
@given(KEYS)
def test_any_name_is_understood_or_refused(key) -> None:
    for reader in READERS:
        refused(reader, key)  # raises what is no LoricaError


@pytest.mark.parametrize("place", range(len(READERS)))
def test_long_names_take_no_longer(place) -> None:
    answers, excess = bounded(lambda: [refused(READERS[place], key) for key in LONG], 0.5)
    assert len(answers) == len(LONG)
    assert not excess, excess


@given(st.lists(KEYS, unique=True, max_size=6))
def test_names_without_a_mapping_stay_what_they_are(keys) -> None:
    assert map_keys(dict.fromkeys(keys), None) == {key: key for key in keys}


@given(st.text(min_size=1, max_size=20).filter(lambda text: "\n" not in text), st.sampled_from(["A", "B"]))
def test_a_factor_belongs_to_what_its_name_begins_with(target, letter) -> None:
    wanted = {target.removeprefix("base_model.model.")}
    assert targets_of_keys([f"base_model.model.{target}.lora_{letter}.weight"]) == {target}
    assert targets_of_keys([f"{target}.lora_embedding_{letter}"]) == wanted


@settings(max_examples=60, deadline=None)
@given(other=KEYS.filter(str.isprintable), place=st.integers(0, 3))
def test_a_file_with_other_names_changes_no_model(other, place, saved) -> None:
    tensors = load_file(saved / "adapter_model.safetensors")
    assume(other not in tensors)
    changed = sorted(tensors)[place]
    tensors[other] = tensors.pop(changed)
    folder = saved.parent / "other"
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_bytes((saved / "adapter_config.json").read_bytes())
    save_file(tensors, folder / "adapter_model.safetensors")
    base = mlp()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    with pytest.raises(LoricaError, match=r"adapter_model\.safetensors"):
        lorica.PeftModel.from_pretrained(base, folder)
    assert base.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
    assert not hasattr(base, "peft_config")
    with pytest.raises(LoricaError):
        read_peft_adapter(folder)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """An adapter on the disk."""
    folder = tmp_path_factory.mktemp("keys") / "adapter"
    lorica.get_peft_model(mlp(), lorica.LoraConfig(target_modules=["lin0", "lin1"])).save_pretrained(folder)
    return folder


def test_nothing_is_near_to_a_long_word() -> None:
    """Looking for it would take as long as the word is."""
    known = ["x" * 200]
    assert suggest("x" * 200, known)
    assert suggest("x" * 201, known) == ""
