"""Combinations of adapters are those of one process, however the model lies over ranks."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import contract
import pytest
import ranks
import test_fused
import torch
import torch.distributed as dist
from divisions import DIVISIONS
from safetensors.torch import load_file
from subjects import SUBJECTS, Subject
from torch import Tensor, nn

import lorica
from lorica.adapt.inject import lora_layers
from lorica.checkpoint.names import adapter_entries
from lorica.checkpoint.pieces import collect, lie_over_ranks, pieces

NAMES, WEIGHTS = ["default", "second"], [0.7, -1.3]
CASES: dict[str, dict[str, Any]] = {
    "svd": {"combination_type": "svd"},
    "svd of less": {"combination_type": "svd", "svd_rank": 2, "svd_clamp": 0.95},
    "cat": {"combination_type": "cat"},
    "linear": {"combination_type": "linear"},
    "ties": {"combination_type": "ties", "density": 0.4},
    "dare_linear": {"combination_type": "dare_linear", "density": 0.6},
    "dare_ties_svd": {"combination_type": "dare_ties_svd", "density": 0.6},
    "magnitude_prune_svd": {"combination_type": "magnitude_prune_svd", "density": 0.3},
}
TOLERANCE = 1e-5

pytestmark = [
    pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
    pytest.mark.filterwarnings("ignore:Converting a PEFT adapter to LoRA that is already"),
]


def config(subject: Subject, **fields: Any) -> lorica.LoraConfig:
    return lorica.LoraConfig(**{"r": 4, "lora_alpha": 6, "init_lora_weights": False, **subject.fields, **fields})


def adapted(base: nn.Module, subject: Subject, **fields: Any) -> Any:
    torch.manual_seed(11)
    model = lorica.get_peft_model(base, config(subject, **fields))
    model.add_adapter("second", config(subject, lora_alpha=10, **fields))
    return model


def wholes(model: Any, adapter: str) -> dict[str, Tensor]:
    """Every tensor of an adapter, whole; all ranks get all of them."""
    entries = adapter_entries(model, adapter, model.peft_config[adapter])
    if not lie_over_ranks(model.get_base_model(), entries):
        return {name: tensor.clone() for name, tensor in contract.wholes(entries).items()}
    said = [collect(pieces(entries))]
    dist.broadcast_object_list(said, src=0)
    return said[0]


def fill(model: Any, oracle: Any) -> None:
    """Give both the same factors, away from where they started."""
    generator = torch.Generator().manual_seed(3)
    for adapter in NAMES:
        found = wholes(oracle, adapter)
        values = {
            name: tensor * (1 + 0.3 * torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype))
            for name, tensor in sorted(found.items())
        }
        lorica.set_peft_model_state_dict(oracle, values, adapter_name=adapter)
        lorica.set_peft_model_state_dict(model, values, adapter_name=adapter)


def same(found: dict[str, Tensor], wanted: dict[str, Tensor], what: str) -> None:
    """Equal names, and values that differ by rounding alone."""
    assert found.keys() == wanted.keys(), what
    for name, tensor in found.items():
        assert tensor.shape == wanted[name].shape, (what, name)
        scale = max(float(wanted[name].norm()), 1e-6)
        assert float((tensor - wanted[name]).norm()) <= TOLERANCE * scale, (what, name)


def combined(division: str, subject_name: str, fields: dict[str, Any], kinds: list[str], folder: str) -> None:
    subject = SUBJECTS[subject_name]
    model = adapted(DIVISIONS[division].cut(subject, folder), subject, **fields)
    oracle = adapted(subject.build(), subject, **fields)
    fill(model, oracle)
    kept = [wholes(model, adapter) for adapter in NAMES]
    for kind in kinds:
        for one in (oracle, model):
            torch.manual_seed(23)
            one.add_weighted_adapter(NAMES, WEIGHTS, kind.replace(" ", "_"), **CASES[kind])
        same(wholes(model, kind.replace(" ", "_")), wholes(oracle, kind.replace(" ", "_")), kind)
    for adapter, before in zip(NAMES, kept, strict=True):
        after = wholes(model, adapter)
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    check_replicas(model, [kind.replace(" ", "_") for kind in kinds])
    model.set_adapter(kinds[0].replace(" ", "_"))
    lorica.parallel.verify(model)
    check_file(model, oracle, kinds[0].replace(" ", "_"), Path(folder))


def check_replicas(model: Any, adapters: list[str]) -> None:
    """What several ranks hold of a factor is the same bits."""
    for adapter in adapters:
        for layer in lora_layers(model):
            if layer.site is None or adapter not in layer.specs:
                continue
            for tensor, roles in zip(layer.factors(adapter).tensors(), layer.factor_roles(adapter), strict=True):
                cut = layer.site.layout.sharded(roles)
                for name, axis in layer.site.axes.items():
                    if name not in cut and name != "pp" and axis.size > 1:
                        mine = tensor.detach().contiguous()
                        other = mine.clone()
                        dist.broadcast(other, src=dist.get_global_rank(axis.group, 0), group=axis.group)
                        assert torch.equal(mine, other), (adapter, layer.target_name)


def check_file(model: Any, oracle: Any, adapter: str, folder: Path) -> None:
    """The file is the one that one process writes."""
    if dist.get_rank() == 0:
        shutil.rmtree(folder / "mine", ignore_errors=True)
    dist.barrier()
    model.save_pretrained(folder / "mine", selected_adapters=[adapter], save_embedding_layers=False)
    if dist.get_rank() == 0:
        written = load_file(folder / "mine" / adapter / "adapter_model.safetensors")
        wanted = lorica.get_peft_model_state_dict(oracle, adapter_name=adapter, save_embedding_layers=False)
        assert written.keys() == wanted.keys()
        same(written, wanted, "file")


SOME = ["svd", "ties", "dare_ties_svd"]
LAYOUTS: list[tuple[str, str, dict[str, Any], list[str]]] = [
    ("native tp2", "llama", {"use_rslora": True, "lora_bias": True}, list(CASES)),
    ("native tp4", "llama", {}, SOME),
    ("native tp2", "llama's ends", {}, SOME),
    ("native tp2 sp", "llama", {}, SOME),
    ("native tp8", "llama", {}, ["svd", "dare_linear"]),
    ("native tp8 fused", "phi3", {}, [*SOME, "cat", "linear"]),
    ("native pp2 tp2", "llama", {}, SOME),
    ("native fsdp2 tp2", "llama", {}, SOME),
    ("transformers tp2", "qwen3-moe", {}, SOME),
    ("transformers ep2", "qwen3-moe", {}, SOME),
    ("torch tp2", "llama", {}, SOME),
    ("torch fsdp2", "llama", {}, SOME),
    ("torch fsdp2", "llama's ends", {}, SOME),
]


@pytest.mark.parametrize(
    ("division", "subject", "fields", "kinds"), LAYOUTS, ids=[f"{d}-{s}" for d, s, _, _ in LAYOUTS]
)
def test_a_combination_is_that_of_one_process(
    division: str, subject: str, fields: dict[str, Any], kinds: list[str], tmp_path: Path
) -> None:
    SUBJECTS[subject].save(tmp_path)
    ranks.run(DIVISIONS[division].ranks, combined, division, subject, fields, kinds, str(tmp_path))


def of_dora(division: str, folder: str) -> None:
    """What changes the whole weight: through its dense form, gathered."""
    subject = SUBJECTS["llama"]
    model = adapted(DIVISIONS[division].cut(subject, folder), subject, use_dora=True)
    oracle = adapted(subject.build(), subject, use_dora=True)
    fill(model, oracle)
    for one in (oracle, model):
        one.add_weighted_adapter(NAMES, WEIGHTS, "both", "svd", svd_rank=3)
        one.add_weighted_adapter(["second"], [1.0], "again", "svd")
    same(wholes(model, "both"), wholes(oracle, "both"), "both")
    assert all(torch.equal(t, wholes(model, "second")[n]) for n, t in wholes(model, "again").items())
    found = [lorica.convert_to_lora(one, rank, "second") for one in (oracle, model) for rank in (3, 0.9)]
    for wanted, mine in zip(found[:2], found[2:], strict=True):
        assert mine[0].rank_pattern == wanted[0].rank_pattern
        if dist.get_rank() == 0:
            assert mine[1].keys() == wanted[1].keys()
            same(mine[1], wanted[1], "converted")


@pytest.mark.parametrize("division", ["native tp2", "native fsdp2 tp2", "transformers tp2", "torch tp2", "torch fsdp2"])
def test_what_changes_the_whole_weight_is_combined_and_converted(division: str, tmp_path: Path) -> None:
    SUBJECTS["llama"].save(tmp_path)
    ranks.run(DIVISIONS[division].ranks, of_dora, division, str(tmp_path))


def reduced(division: str, folder: str) -> None:
    subject = SUBJECTS["llama"]
    model = adapted(DIVISIONS[division].cut(subject, folder), subject)
    oracle = adapted(subject.build(), subject)
    fill(model, oracle)
    arguments: dict[str, Any] = {"top_k": 4, "threshold_epsilon": 0.8}
    wanted = lorica.intruder_dimensions(oracle, **arguments)
    found = lorica.intruder_dimensions(model, **arguments)
    assert any(report.intruders for report in wanted)
    by_name = {report.name: report.intruders for report in wanted}
    assert all(report.intruders == by_name[report.name] for report in found)
    for one in (oracle, model):
        lorica.reduce_intruder_dimension(one, logging_sink=None, **arguments)
    a, b = wholes(model, "intruder_reduced"), wholes(oracle, "intruder_reduced")
    for name in (name for name in a if "lora_A" in name):
        other = name.replace("lora_A", "lora_B")
        same({name: a[other] @ a[name]}, {name: b[other] @ b[name]}, "reduced")


@pytest.mark.parametrize("division", ["native tp2", "torch fsdp2"])
def test_intruders_are_those_of_one_process(division: str, tmp_path: Path) -> None:
    ranks.run(DIVISIONS[division].ranks, reduced, division, str(tmp_path))


def without_start(division: str, subject_name: str, fields: dict[str, Any], folder: str) -> None:
    subject = SUBJECTS[subject_name]
    model = DIVISIONS[division].cut(subject, folder)
    torch.manual_seed(11)
    model = lorica.get_peft_model(model, config(subject, **fields))
    torch.manual_seed(11)
    oracle = lorica.get_peft_model(subject.build(), config(subject, **fields))
    if dist.get_rank() == 0:
        oracle.save_pretrained(Path(folder) / "initial", save_embedding_layers=False)
    dist.barrier()
    generator = torch.Generator().manual_seed(3)
    values = {
        name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in sorted(wholes(oracle, "default").items())
    }
    for one in (model, oracle):
        lorica.set_peft_model_state_dict(one, values)
    initial = str(Path(folder) / "initial")
    options: dict[str, Any] = {"path_initial_model_for_weight_conversion": initial, "save_embedding_layers": False}
    model.save_pretrained(Path(folder) / "mine", **options)
    if dist.get_rank() == 0:
        oracle.save_pretrained(Path(folder) / "whole", **options)
        wanted = load_file(Path(folder) / "whole" / "adapter_model.safetensors")
        found = load_file(Path(folder) / "mine" / "adapter_model.safetensors")
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


@pytest.mark.parametrize(
    ("division", "subject", "init"),
    [
        ("native tp2", "llama", "pissa"),
        ("native tp8 fused", "phi3", "olora"),
        ("native pp2", "llama", "olora"),
        ("transformers ep2", "qwen3-moe", "olora"),
        ("torch fsdp2", "llama", "pissa_niter_4"),
    ],
)
def test_files_without_the_start_are_those_of_one_process(
    division: str, subject: str, init: str, tmp_path: Path
) -> None:
    SUBJECTS[subject].save(tmp_path)
    fields = {"init_lora_weights": init}
    ranks.run(DIVISIONS[division].ranks, without_start, division, subject, fields, str(tmp_path))


def refused_on_all(folder: str) -> str:
    subject = SUBJECTS["llama"]
    model = adapted(DIVISIONS["native tp2"].cut(subject, folder), subject, use_dora=True)
    before = sorted(model.state_dict())
    with pytest.raises(ValueError, match="changes the whole weight") as error:
        model.add_weighted_adapter(NAMES, WEIGHTS, "new", "cat")
    assert sorted(model.state_dict()) == before
    return str(error.value)


def test_a_refusal_is_one_on_every_rank(tmp_path: Path) -> None:
    first, second = ranks.run(2, refused_on_all, str(tmp_path))
    assert first == second


def of_parts(order: str) -> None:
    """Adapters on different projections of one fused layer, with copies of key/value heads on neighbouring ranks."""
    fields = {"r": 3, "init_lora_weights": False}
    first, second = ["q_proj", "o_proj"], ["v_proj", "o_proj"]
    oracle: Any = lorica.get_peft_model(test_fused.whole(), lorica.LoraConfig(target_modules=first, **fields))
    oracle.add_adapter("second", lorica.LoraConfig(target_modules=second, lora_alpha=5, **fields))
    cut = test_fused.Cut(test_fused.whole(), fused=True, order=order)
    model: Any = lorica.get_peft_model(cut, lorica.LoraConfig(target_modules=first, **fields))
    model.add_adapter("second", lorica.LoraConfig(target_modules=second, lora_alpha=5, **fields))
    fused = next(layer for layer in lora_layers(model) if layer.op.parts(layer.base_layer))
    for adapter in NAMES:
        tensors = {
            name.replace(".q", ".qkv.q").replace(".v_", ".qkv.v_"): t for name, t in wholes(oracle, adapter).items()
        }
        lorica.set_peft_model_state_dict(model, tensors, adapter_name=adapter)
    for kind in ("svd", "cat", "ties"):
        for one in (oracle, model):
            one.add_weighted_adapter(NAMES, WEIGHTS, kind, **CASES[kind])
        found = {name.replace(".qkv.", "."): tensor for name, tensor in wholes(model, kind).items()}
        same(found, wholes(oracle, kind), kind)
        # k_proj is nobody's: its pair is zero, so that training leaves it so.
        place = [name for name, _, _ in fused.op.parts(fused.base_layer)].index("k_proj")
        rank = fused.specs[kind].r
        assert not fused.factors(kind).a[place * rank : (place + 1) * rank].any()
        assert fused.specs[kind].parts == ("q_proj", "v_proj")


@pytest.mark.parametrize("order", ["strided", "neighbours"])
def test_parts_of_a_fused_layer_are_combined_as_if_apart(order: str) -> None:
    ranks.run(4, of_parts, order)
