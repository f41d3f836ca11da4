"""There and back again, bit for bit, in every direction."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conversions import assert_same, base, contents, deltas, move, save, words

from lorica import PeftModel
from lorica.convert.dcp import Distributed
from lorica.convert.megatron import find_iteration
from lorica.errors import ExportError

SYSTEMS = ("peft", "megatron-bridge", "neuron")
#: Name → the kind of the model, what is special about its adapter, and what the first conversion is told.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "dense": ("llama", {}, {}),
    "fused exactly": ("llama", {}, {"form": "fused"}),
    "projections share their A": ("llama", {"shared": True}, {}),
    "canonical for two ranks": ("llama", {}, {"form": "canonical", "tensor_parallel": 2}),
    "two ranks, two stages": ("llama", {}, {"tensor_parallel": 2, "pipeline_parallel": 2}),
    "copies of key heads": ("llama", {}, {"tensor_parallel": 4}),
    "as many key heads": ("mha", {}, {"tensor_parallel": 2}),
    "some projections": ("llama", {"target_modules": ["q_proj", "v_proj", "gate_proj"]}, {}),
    "some projections, fused": ("llama", {"target_modules": ["q_proj", "v_proj", "up_proj"]}, {"form": "fused"}),
    "other ranks": ("llama", {"rank_pattern": {"q_proj": 4, "layers.1.mlp.down_proj": 8}}, {}),
    "other ranks and alphas": ("llama", {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"q_proj": 48}}, {}),
    "rank-stabilised": ("llama", {"use_rslora": True}, {}),
    "bfloat16": ("llama", {"lora_dtype": "bfloat16"}, {}),
    "fused in transformers": ("phi3", {}, {}),
    "stacked experts": ("moe", {}, {}),
    "stacked experts, canonical": ("moe", {}, {"form": "canonical"}),
    "experts that share": ("moe", {"share_expert_adapters": True}, {}),
    "experts of a divided rank": ("moe", {"r": 4, "normalize_moe_lora": True}, {}),
    "experts of a lower rank": (
        "moe",
        {"r": 4, "rank_pattern": {"experts.gate_up_proj": 2, "experts.down_proj": 2}},
        {},
    ),
}


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """Gives a case's adapter in a system's form; ``model/`` of the same folder has the model's configuration."""

    @cache
    def folder_of(case: str) -> Path:
        folder = tmp_path_factory.mktemp("adapter")
        save(folder, CASES[case][0], **CASES[case][1])
        (folder / "adapter").rename(folder / "peft")
        return folder

    @cache
    def made(case: str, system: str) -> Path:
        folder = folder_of(case)
        if system != "peft":
            way = ("peft", system)
            move(folder / "peft", folder / system, way, model=folder / "model", **CASES[case][2])
        return folder / system

    return made


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("start", "via"), [*itertools.permutations(SYSTEMS, 2)])
def test_there_and_back_again(start: str, via: str, case: str, there: Callable[[str, str], Path], tmp_path: Path):
    first = there(case, start)
    options = CASES[case][2] if start == "peft" else {}
    move(first, tmp_path / "via", (start, via), model=first.parent / "model", **options)
    move(tmp_path / "via", tmp_path / "back", (via, start))
    assert_same(contents(tmp_path / "back", start), contents(first, start))
    assert words(tmp_path / "back", start) == words(first, start)


def test_dora_goes_to_megatron_bridge_and_back(tmp_path: Path):
    saved = save(tmp_path, use_dora=True)
    move(saved, tmp_path / "there", ("peft", "megatron-bridge"), model=tmp_path / "model", tensor_parallel=2)
    peft = words(tmp_path / "there", "megatron-bridge")["peft"]
    assert peft["_target_"] == "megatron.bridge.peft.dora.DoRA"
    move(tmp_path / "there", tmp_path / "back", ("megatron-bridge", "peft"))
    assert_same(contents(tmp_path / "back", "peft"), contents(saved, "peft"))
    with pytest.raises(ExportError, match="norms of shards"):
        move(saved, tmp_path / "no", ("peft", "neuron"))
    with pytest.raises(ExportError, match="on fused layers only"):
        move(saved, tmp_path / "no", ("peft", "megatron-bridge"), model=tmp_path / "model", form="canonical")
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("system", ["megatron-bridge", "neuron"])
def test_without_the_record_deltas_are_the_same(system: str, tmp_path: Path):
    """What other programs read: one A of the sum of the ranks, and the same deltas."""
    saved = save(tmp_path)
    done = move(saved, tmp_path / "there", ("peft", system), model=tmp_path / "model", form="fused")
    assert done.fused == (4 if system == "megatron-bridge" else 2)
    assert not done.errors
    [record] = (tmp_path / "there").rglob("conversion.json")
    record.unlink()
    move(tmp_path / "there", tmp_path / "back", (system, "peft"))
    found, expected = deltas(tmp_path / "back"), deltas(saved)
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-12, atol=1e-14)
    assert words(tmp_path / "back", "peft")["r"] == (6 if system == "megatron-bridge" else 4)
    model = PeftModel.from_pretrained(base("llama"), tmp_path / "back")
    ids = torch.arange(6).view(1, 6)
    other = PeftModel.from_pretrained(base("llama"), saved)
    torch.testing.assert_close(model(input_ids=ids).logits, other(input_ids=ids).logits, rtol=1e-5, atol=1e-6)


def test_an_adapter_that_was_trained_further_is_read_as_it_is(tmp_path: Path):
    """Where zeros have become numbers, nothing is taken apart."""
    saved = save(tmp_path)
    move(saved, tmp_path / "there", ("peft", "megatron-bridge"), model=tmp_path / "model", form="fused")
    folder = find_iteration(tmp_path / "there")
    key = "decoder.layers.self_attention.linear_qkv.adapter.linear_out.weight"
    stored = Distributed(folder)
    chunk = stored.tensors[key].chunks[0]
    trained = stored.lazy(key, (0,)).read() + 1.0
    path = folder / chunk.file
    data = bytearray(path.read_bytes())
    buffer = io.BytesIO()
    torch.save(trained.unsqueeze(0), buffer)
    assert len(buffer.getvalue()) == chunk.length
    data[chunk.start : chunk.start + chunk.length] = buffer.getvalue()
    path.write_bytes(data)
    move(tmp_path / "there", tmp_path / "back", ("megatron-bridge", "peft"))
    tensors = contents(tmp_path / "back", "peft")
    first, second = (f"base_model.model.model.layers.{layer}.self_attn" for layer in (0, 1))
    assert tensors[f"{first}.q_proj.lora_A.weight"].shape[0] == 6
    assert torch.equal(tensors[f"{first}.q_proj.lora_A.weight"], tensors[f"{first}.v_proj.lora_A.weight"])
    assert tensors[f"{second}.q_proj.lora_A.weight"].shape[0] == 2
    adapted = PeftModel.from_pretrained(base("llama"), tmp_path / "back")
    assert adapted.peft_config["default"].r == 2


def test_a_truncated_pair_is_the_nearest_and_says_what_it_lost(tmp_path: Path):
    saved = save(tmp_path)
    done = move(saved, tmp_path / "there", ("peft", "megatron-bridge"), model=tmp_path / "model", form="fused", rank=3)
    assert done.rank == 3
    assert len(done.errors) == 4
    move(tmp_path / "there", tmp_path / "back", ("megatron-bridge", "peft"))
    found, expected = deltas(tmp_path / "back"), deltas(saved)
    for name, lost in done.errors.items():
        parent, _, leaves = name.partition(".(")
        names = [f"base_model.model.{parent}.{leaf}" for leaf in leaves.removesuffix(")").split("|")]
        wanted, got = (torch.cat([side[name] for name in names]) for side in (expected, found))
        singular = torch.linalg.svdvals(wanted)
        best = float(singular[3:].norm() / singular.norm())
        assert lost == pytest.approx(best, rel=1e-9)
        assert float((got - wanted).norm() / wanted.norm()) == pytest.approx(best, rel=1e-5)
        assert 0.05 < lost < 1
    unfused = [name for name in expected if name.endswith(("o_proj", "down_proj"))]
    assert unfused
    assert all(torch.allclose(found[name], expected[name], rtol=1e-12) for name in unfused)


def test_scales_that_differ_are_multiplied_in_only_where_that_is_exact_or_allowed(tmp_path: Path):
    saved = save(tmp_path, alpha_pattern={"q_proj": 10})
    for system in ("megatron-bridge", "neuron"):
        with pytest.raises(ExportError, match=r"q_proj: the scale 5 is to be 3.*--rounding"):
            move(saved, tmp_path / "no", ("peft", system), model=tmp_path / "model")
        move(saved, tmp_path / system, ("peft", system), model=tmp_path / "model", rounding=True)
        move(tmp_path / system, tmp_path / f"{system}-back", (system, "peft"))
        tensors, originals = contents(tmp_path / f"{system}-back", "peft"), contents(saved, "peft")
        name = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
        torch.testing.assert_close(tensors[name], originals[name] * (5 / 3), rtol=1e-6, atol=0)


def test_experts_that_share_on_megatron_share_on_transformers(tmp_path: Path):
    """Under Megatron's names the pair of all experts is there for each of them."""
    saved = save(tmp_path, "moe", share_expert_adapters=True)
    move(saved, tmp_path / "there", ("peft", "peft"), names="megatron", model=tmp_path / "model")
    (tmp_path / "there" / "conversion.json").unlink()
    copies = contents(tmp_path / "there", "peft")
    names = [
        f"base_model.model.decoder.layers.0.mlp.experts.local_experts.{e}.linear_fc2.lora_A.weight" for e in (0, 3)
    ]
    assert torch.equal(copies[names[0]], copies[names[1]])
    move(tmp_path / "there", tmp_path / "back", ("megatron-bridge", "peft"), model=tmp_path / "model")
    assert_same(contents(tmp_path / "back", "peft"), contents(saved, "peft"))
    ids = torch.arange(6).view(1, 6)
    found, wanted = (PeftModel.from_pretrained(base("moe"), place) for place in (tmp_path / "back", saved))
    assert torch.equal(found(input_ids=ids).logits, wanted(input_ids=ids).logits)


def test_stacked_experts_may_be_written_apart_and_back(tmp_path: Path):
    saved = save(tmp_path, "moe")
    move(saved, tmp_path / "apart", ("peft", "peft"), experts="separate")
    names = contents(tmp_path / "apart", "peft")
    assert names["base_model.model.model.layers.1.mlp.experts.3.up_proj.lora_A.weight"].shape == (2, 16)
    move(tmp_path / "apart", tmp_path / "back", ("peft", "peft"), experts="stacked")
    assert_same(contents(tmp_path / "back", "peft"), contents(saved, "peft"))
