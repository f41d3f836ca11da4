"""An adapter extracted from a fine-tuned model, merged again, gives the fine-tuned model back to the stated error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from saved import load_base, save_base
from test_memory import MIB, peak, write_base
from torch import Tensor, nn

from lorica import PeftModel
from lorica.errors import AdapterError, ConfigError
from lorica.merge import Change, Wanted, extract_files, merge_files
from mixtures import moe
from models import ids, tiny_llama

STORIES = Path(__file__).resolve().parents[3] / "shared" / "models" / "stories260K"


def tiny_gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=32, n_embd=16, n_layer=2, n_head=2))


MODELS: dict[str, Any] = {
    "llama": tiny_llama,
    "tied": lambda: tiny_llama(tied=True),
    "gpt2": tiny_gpt2,
    "experts": moe,
    "experts turned": lambda: moe("gpt_oss"),
}


def train(directory: Path, output: Path, steps: int = 12, learning_rate: float = 3e-3) -> Path:
    """Train every weight on a fixed batch, really."""
    model = load_base(directory).float().train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    batch = ids(4, 12)
    for _ in range(steps):
        optimiser.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimiser.step()
    model.save_pretrained(output, max_shard_size="6KB")
    return output


@pytest.fixture(scope="module", params=MODELS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pair")
    base = save_base(MODELS[request.param](), folder / "base")
    return base, train(base, folder / "tuned")


def weights(directory: Path) -> dict[str, Tensor]:
    """Every parameter by its live name."""
    return {name: p.detach().double() for name, p in load_base(directory).named_parameters()}


def merged(adapter: Path, base: Path, output: Path) -> dict[str, Tensor]:
    merge_files(adapter, base, output)
    return weights(output)


def assert_errors_are_true(changes: list[Change], pair: tuple[Path, Path], found: dict[str, Tensor]) -> None:
    old, new = map(weights, pair)
    told = {change.name: change for change in changes}
    assert {name for name in new if not torch.equal(old[name], new[name])} == set(told)
    for name, change in told.items():
        size = float((new[name] - old[name]).norm())
        error = float((new[name] - found[name]).norm()) / size
        assert error == pytest.approx(change.error, abs=2e-4), name
        norm = float(old[name].norm())
        assert change.change == pytest.approx(size / norm if norm else float("inf"), rel=1e-4)


@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`")
@pytest.mark.parametrize("exact", [True, False])
def test_a_rank_for_all(pair: tuple[Path, Path], exact: bool, tmp_path: Path):
    changes = extract_files(*pair, tmp_path / "adapter", wanted=Wanted(rank=2, exact=exact))
    assert {change.rank for change in changes} == {0, 2}
    assert_errors_are_true(changes, pair, merged(tmp_path / "adapter", pair[0], tmp_path / "merged"))
    report = json.loads((tmp_path / "adapter" / "extraction.json").read_text())
    assert [entry["name"] for entry in report] == [change.name for change in changes]


@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`")
def test_everything_gives_the_fine_tuned_model_back(pair: tuple[Path, Path], tmp_path: Path):
    changes = extract_files(*pair, tmp_path / "adapter", wanted=Wanted(energy=1.0), whole="changed")
    # What a module of experts has beside its stacks cannot be saved apart from them.
    left = {change.name for change in changes if not change.explained}
    assert all(".experts." in name and name.endswith("_bias") for name in left), left
    assert all(change.explained > 1 - 1e-6 for change in changes if change.name not in left)
    found, wanted = merged(tmp_path / "adapter", pair[0], tmp_path / "merged"), weights(pair[1])
    for name in wanted.keys() - left:
        tensor = wanted[name]
        assert float((found[name] - tensor).norm() / tensor.norm().clamp_min(1e-12)) < 1e-5, name
    if left:
        return
    model = PeftModel.from_pretrained(load_base(pair[0]), tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.allclose(
            model(input_ids=ids(2, 5)).logits, load_base(pair[1]).eval()(input_ids=ids(2, 5)).logits, atol=1e-4
        )


@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`")
def test_a_share_gives_each_layer_its_least_rank(pair: tuple[Path, Path], tmp_path: Path):
    changes = extract_files(*pair, tmp_path / "adapter", wanted=Wanted(energy=0.8, exact=True))
    old, new = map(weights, pair)
    for change in (change for change in changes if change.rank):
        delta = new[change.name] - old[change.name]
        squares = torch.linalg.svdvals(delta).square()
        shares = squares.cumsum(-1) / squares.sum(-1, keepdim=True)
        shares = shares.view(-1, shares.shape[-1])
        assert float(shares[:, change.rank - 1].min()) >= 0.8 - 1e-6
        assert change.rank == 1 or float(shares[:, change.rank - 2].min()) < 0.8 + 1e-6
        assert change.explained >= 0.8 - 1e-6
    assert_errors_are_true(changes, pair, merged(tmp_path / "adapter", pair[0], tmp_path / "merged"))


def test_layers_that_a_rank_explains_too_little_of_are_saved_whole(tmp_path: Path):
    base = save_base(tiny_llama(), tmp_path / "base")
    tuned = train(base, tmp_path / "tuned")
    changes = extract_files(base, tuned, tmp_path / "adapter", wanted=Wanted(energy=0.9, most=5), whole="changed")
    low = [change for change in changes if "_proj" in change.name and change.rank]
    saved = [change for change in changes if "_proj" in change.name and not change.rank]
    assert low
    assert saved
    assert all(change.explained == 1 for change in saved)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert {change.name.removesuffix(".weight") for change in saved} <= set(config["modules_to_save"])
    assert_errors_are_true(changes, (base, tuned), merged(tmp_path / "adapter", base, tmp_path / "merged"))


def test_peft_reads_what_is_extracted(pair: tuple[Path, Path], tmp_path: Path):
    peft = pytest.importorskip("peft")
    if "mlp.experts.gate_up_proj" in " ".join(weights(pair[0])):
        pytest.skip("its loader of experts' files is held to in tests/parity/test_peft_experts.py")
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        extract_files(*pair, tmp_path / "adapter", wanted=Wanted(energy=0.9), whole="changed")
        theirs = peft.PeftModel.from_pretrained(load_base(pair[0]), tmp_path / "adapter").eval()
        ours = PeftModel.from_pretrained(load_base(pair[0]), tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.allclose(theirs(input_ids=ids(2, 5)).logits, ours(input_ids=ids(2, 5)).logits, atol=1e-5)


def test_only_what_changed_is_a_target(tmp_path: Path):
    base = save_base(tiny_llama(), tmp_path / "base")
    model = load_base(base)
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight.add_(0.1)
    model.save_pretrained(tmp_path / "tuned")
    (change,) = extract_files(base, tmp_path / "tuned", tmp_path / "adapter", wanted=Wanted(rank=1, exact=True))
    assert change.name == "model.layers.1.self_attn.q_proj.weight"
    assert change.explained == pytest.approx(1.0, abs=1e-6)
    found = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all(".layers.1.self_attn.q_proj." in name for name in found)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either a rank or the share"),
        ({"rank": 2, "energy": 0.5}, "either a rank or the share"),
        ({"energy": 1.5}, "energy=1.5"),
        ({"rank": 0}, "rank=0"),
        ({"rank": 2, "most": 3}, "most=3"),
    ],
)
def test_what_cannot_be_wanted_is_refused(arguments: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        Wanted(**arguments)


def test_what_cannot_be_extracted_leaves_nothing(tmp_path: Path):
    base = save_base(tiny_llama(), tmp_path / "base")
    other = save_base(tiny_llama(layers=1), tmp_path / "other")
    wanted = Wanted(rank=2)
    with pytest.raises(AdapterError, match="same weights"):
        extract_files(base, base, tmp_path / "adapter", wanted=wanted)
    with pytest.raises(AdapterError, match=r"model.layers.1.* missing in .*other"):
        extract_files(base, other, tmp_path / "adapter", wanted=wanted)
    broken = load_base(base)
    with torch.no_grad():
        broken.model.norm.weight[0] = float("nan")
    broken.save_pretrained(tmp_path / "broken")
    with pytest.raises(ValueError, match=r"model\.norm\.weight holds NaN"):
        extract_files(base, tmp_path / "broken", tmp_path / "adapter", wanted=wanted)
    assert not (tmp_path / "adapter").exists()


@pytest.mark.skipif(not STORIES.exists(), reason="the model is not here")
def test_a_real_model(tmp_path: Path):
    tuned = train(STORIES, tmp_path / "tuned", steps=4, learning_rate=1e-3)
    before = weights(STORIES)
    errors = []
    for rank in (4, 16):
        changes = extract_files(STORIES, tuned, tmp_path / f"a{rank}", wanted=Wanted(rank=rank), whole="changed")
        found = merged(tmp_path / f"a{rank}", STORIES, tmp_path / f"m{rank}")
        assert_errors_are_true(changes, (STORIES, tuned), found)
        assert set(before) == set(found)
        errors.append(sum(change.error for change in changes))
    assert errors[1] < errors[0]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_memory_is_that_of_one_parameter(tmp_path: Path):
    from transformers import LlamaConfig

    sizes = {"hidden_size": 512, "intermediate_size": 4096, "vocab_size": 1000, "num_attention_heads": 4}
    config = LlamaConfig(num_hidden_layers=6, num_key_value_heads=4, dtype="bfloat16", **sizes)
    total, largest = write_base(tmp_path / "base", config)
    write_base(tmp_path / "tuned", config)
    tensors = load_file(tmp_path / "tuned" / "model.safetensors")
    for name, tensor in tensors.items():
        if "_proj" in name:
            tensor[: len(tensor) // 2] += 1
    save_file(tensors, tmp_path / "tuned" / "model.safetensors", metadata={"format": "pt"})
    del tensors
    for directory in ("first", "again"):  # the first loads what torch loads when it first computes
        before = peak(reset=True)
        changes = extract_files(tmp_path / "base", tmp_path / "tuned", tmp_path / directory, wanted=Wanted(rank=1))
    assert all(change.explained > 1 - 1e-5 for change in changes)
    allowed = 6 * largest + 8 * MIB  # two of float32, one as it is stored, and what Python and the file system take
    assert 2 * total > 5 * allowed
    assert peak() - before < allowed
