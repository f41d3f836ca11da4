"""Exports hold the adapter: what a server makes of the files is what merging writes into the model's own files."""

from __future__ import annotations

import copy
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from servers import Sglang, Vllm, config_of, parts_of, stacked_in
from torch import Tensor, nn

pytest.importorskip("transformers")

import lorica
import mixtures
import models
from lorica.errors import CheckpointError, ExportError
from lorica.export import export_adapter

PROJECTIONS = ("gate_proj", "down_proj", "up_proj")
MIXTRAL = ("w1", "w2", "w3")
LINEAR = {
    *("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "gate", "lm_head"),
    *("embed_tokens", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "router"),
}


class Case:
    """A base model on disk, an adapter on it, and what merging changes in the model's files."""

    def __init__(self, folder: Path, model: nn.Module, **fields: Any) -> None:
        self.base, self.adapter = folder / "base", folder / "adapter"
        self.out = folder / "out"
        model.save_pretrained(self.base)
        config = lorica.LoraConfig(base_model_name_or_path=str(self.base), **{"r": 4, "lora_alpha": 6} | fields)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.live = models.randomise(lorica.get_peft_model(copy.deepcopy(model), config))
            self.live.save_pretrained(self.adapter)
            merged = copy.deepcopy(self.live).merge_and_unload()
        merged.save_pretrained(folder / "merged")
        before, after = (self._tensors(folder / name) for name in ("base", "merged"))
        assert before.keys() == after.keys()
        self.changes = {n: after[n] - before[n] for n in before if not torch.equal(after[n], before[n])}
        self.sizes = {name.removesuffix(".weight"): tensor.shape[0] for name, tensor in before.items()}
        assert self.changes

    @staticmethod
    def _tensors(folder: Path) -> dict[str, Tensor]:
        return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}

    def export(self, target: str, **options: Any) -> list[str]:
        shutil.rmtree(self.out, ignore_errors=True)
        return export_adapter(self.adapter, self.out, target, **options)

    def compare(self, deltas: dict[str, Tensor]) -> None:
        """Equal to what merging changed, weight for weight, and nothing else but zeros."""
        wanted = {name.removesuffix(".weight"): tensor for name, tensor in self.changes.items()}
        assert wanted.keys() <= deltas.keys(), sorted(wanted.keys() - deltas.keys())
        for name, delta in deltas.items():
            if name in wanted:
                torch.testing.assert_close(delta, wanted[name], rtol=1e-4, atol=2e-6, msg=name)
            else:
                assert not delta.any(), name

    def compare_sglang(self, deltas: dict[str, Any]) -> None:
        """The same, with SGLang's names and stacks."""
        found: dict[str, Tensor] = {}
        for place, delta in deltas.items():
            parts = place.split(".")
            if len(parts) == 1:
                found[next(n for n in self.sizes if n.endswith(place))] = delta
                continue
            layer, module = parts[0], parts[-1]
            for part in stacked_in(module) or (module,):
                aliases = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
                leaf = rf"(?:{part}|{aliases[part]})" if part in aliases else part
                names = [n for n in self.sizes if _is(n, layer, parts[1] if len(parts) == 3 else None, leaf)]
                assert len(names) == 1, (place, part, names)
                found[names[0]] = delta if not stacked_in(module) else None  # type: ignore[assignment]
            if stacked_in(module):
                wanted = [n for n in found if found[n] is None]
                split = parts_of(module, delta, [self.sizes[n] for n in wanted])
                found |= dict(zip(wanted, split.values(), strict=True))
        self.compare(found)


def _is(name: str, layer: str, expert: str | None, leaf: str) -> bool:
    middle = rf"experts\.{expert}\." if expert is not None else ""
    if expert is None and re.search(r"experts\.\d", name):
        return False
    return re.search(rf"layers\.{layer}\.(?:.*\.)?{middle}{leaf}$", name) is not None


DENSE: dict[str, dict[str, Any]] = {
    "all": {"target_modules": "all-linear"},
    "one projection": {"target_modules": ["v_proj"]},
    "gate without up": {"target_modules": ["gate_proj", "down_proj"]},
    "rank-stabilised": {"target_modules": ["q_proj", "down_proj"], "use_rslora": True},
    "ranks and scales": {
        "target_modules": ["q_proj", "k_proj", "o_proj"],
        "rank_pattern": {"k_proj": 2},
        "alpha_pattern": {"o_proj": 32},
    },
    "some layers": {"target_modules": ["o_proj"], "layers_to_transform": [1]},
    "regular expression": {"target_modules": r".*layers\.0\.self_attn\.[qk]_proj"},
    "ends": {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    "eva-like start": {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"},
}


@pytest.mark.parametrize("fields", DENSE.values(), ids=DENSE)
def test_dense(fields, tmp_path: Path):
    case = Case(tmp_path, models.tiny_llama(), **fields)
    case.export("vllm")
    case.compare(Vllm(LINEAR).load(case.out))
    case.export("sglang")
    case.compare_sglang(Sglang(2).load(case.out))


KINDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "qwen3_moe": ("separate", PROJECTIONS),
    "mixtral": ("separate", MIXTRAL),
    "deepseek_v3": ("separate", PROJECTIONS),
}
STACKS: dict[str, dict[str, Any]] = {
    "both": {"target_parameters": mixtures.STACKS},
    "down": {"target_parameters": mixtures.STACKS[1:]},
    "gate and up": {"target_parameters": mixtures.STACKS[:1]},
    "shared": {"target_parameters": mixtures.STACKS, "share_expert_adapters": True},
    "normalised": {"target_parameters": mixtures.STACKS, "normalize_moe_lora": True, "target_modules": ["o_proj"]},
    "and attention": {
        "target_parameters": mixtures.STACKS,
        "target_modules": ["o_proj"],
        "rank_pattern": {"down_proj": 2},
    },
}


@pytest.mark.parametrize("fields", STACKS.values(), ids=STACKS)
@pytest.mark.parametrize("kind", KINDS)
def test_experts_one_by_one(kind, fields, tmp_path: Path):
    case = Case(tmp_path, mixtures.moe(kind), **{"target_modules": []} | fields)
    notes = case.export("vllm")
    assert any("one by one" in note for note in notes)
    case.compare(Vllm(LINEAR, (mixtures.EXPERTS, KINDS[kind][1])).load(case.out))
    case.export("sglang")
    case.compare_sglang(Sglang(2).load(case.out))


@pytest.mark.parametrize("fields", STACKS.values(), ids=STACKS)
@pytest.mark.parametrize("kind", ["gpt_oss", "qwen3_moe"])
def test_experts_fused(kind, fields, tmp_path: Path):
    """gpt-oss's stacks are ``[E, in, out]`` with gate and up in turn; the other's are taken apart in its files."""
    case = Case(tmp_path, mixtures.moe(kind), **{"target_modules": []} | fields)
    notes = case.export("vllm", experts="auto" if kind == "gpt_oss" else "fused")
    assert any("fused" in note for note in notes)
    deltas = Vllm(LINEAR, (mixtures.EXPERTS, PROJECTIONS), fused=True).load(case.out)
    for name in [name for name in deltas if ".experts" in name]:
        delta = deltas.pop(name)
        if kind == "gpt_oss":
            parameter = "gate_up_proj" if name.endswith(".base_layer") else "down_proj"
            deltas[f"{name.removesuffix('.base_layer')}.{parameter}"] = delta.mT
            continue
        for e, one in enumerate(delta):
            if name.endswith(".base_layer"):
                place = f"{name.removesuffix('.base_layer')}.{e}"
                deltas[f"{place}.gate_proj"], deltas[f"{place}.up_proj"] = one.chunk(2)
            else:
                deltas[f"{name}.{e}.down_proj"] = one
    case.compare(deltas)


def test_interleaved_experts_one_by_one(tmp_path: Path):
    case = Case(tmp_path, mixtures.moe("gpt_oss"), target_modules=[], target_parameters=mixtures.STACKS)
    deltas: dict[str, Tensor] = {}
    case.export("vllm", experts="separate")
    found = Vllm(LINEAR, (mixtures.EXPERTS, PROJECTIONS)).load(case.out)
    for layer in range(2):
        place = f"model.layers.{layer}.mlp.experts"
        parts = {name: torch.stack([found[f"{place}.{e}.{name}"] for e in range(4)]) for name in PROJECTIONS}
        both = torch.stack([parts["gate_proj"], parts["up_proj"]], 2).flatten(1, 2)
        deltas |= {f"{place}.gate_up_proj": both.mT, f"{place}.down_proj": parts["down_proj"].mT}
    case.compare(deltas)


@pytest.mark.parametrize(
    "fields",
    [
        {"use_dora": True},
        {"use_bdlora": {"nblocks": 2, "match_strict": False}},
        {"use_qalora": True, "qalora_group_size": 4},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_variants_as_the_nearest_lora(fields, tmp_path: Path):
    """Of the full rank the nearest is the same: what merging the variant changes."""
    case = Case(tmp_path, models.tiny_llama(), target_modules=["k_proj"], **fields)
    with pytest.raises(ExportError, match=r"--as-lora makes it the nearest plain LoRA"):
        case.export("vllm")
    case.export("vllm", as_lora=8)
    case.compare(Vllm(LINEAR).load(case.out))
    case.export("sglang", as_lora=8)
    case.compare_sglang(Sglang(2).load(case.out))
    with pytest.raises(ExportError, match="cannot be made plain LoRA"):
        case.export("vllm", as_lora=-1)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_start_that_came_out_of_the_base(init, tmp_path: Path):
    """What is served on the original base model is the model that was trained."""
    model = models.tiny_llama()
    model.save_pretrained(tmp_path / "base")
    fields = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": init}
    live = lorica.get_peft_model(
        copy.deepcopy(model), lorica.LoraConfig(base_model_name_or_path=str(tmp_path / "base"), **fields)
    )
    live.save_pretrained(tmp_path / "start")
    with torch.no_grad():
        for name, parameter in live.named_parameters():
            if "lora_" in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    live.save_pretrained(tmp_path / "trained")
    with pytest.raises(ExportError, match=rf"'{init}'.*--initial"):
        export_adapter(tmp_path / "trained", tmp_path / "out", "vllm")
    export_adapter(tmp_path / "trained", tmp_path / "out", "vllm", initial=tmp_path / "start")
    served = copy.deepcopy(model)
    for name, delta in Vllm(LINEAR).load(tmp_path / "out").items():
        served.get_submodule(name).weight.data += delta
    batch = models.ids(2, 7)
    torch.testing.assert_close(served(batch).logits, live(batch).logits, rtol=1e-4, atol=1e-5)
    assert config_of(tmp_path / "out")["init_lora_weights"] is True


def test_numbers_are_left_alone_where_they_can_be(tmp_path: Path):
    """One scale for all: factors bit for bit; another one: B in one rounding, a power of two exactly."""
    case = Case(tmp_path, models.tiny_llama(), target_modules=["q_proj", "o_proj"], lora_alpha=12)
    case.export("vllm")
    ours, theirs = (load_file(d / "adapter_model.safetensors") for d in (case.adapter, case.out))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert (config_of(case.out)["lora_alpha"], config_of(case.out)["r"]) == (12, 4)


# ---- PEFT ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["shared", "normalised", "both"])
def test_peft_reads_what_only_lorica_knows(name, tmp_path: Path):
    peft = pytest.importorskip("peft")
    base = mixtures.moe("qwen3_moe")
    case = Case(tmp_path, base, **{"target_modules": []} | STACKS[name])
    notes = case.export("peft")
    assert any("every expert" in note for note in notes) == (name == "shared")
    assert not {"share_expert_adapters", "normalize_moe_lora", "dropout_position"} & config_of(case.out).keys()
    batch = models.ids(2, 7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), case.out)
        torch.testing.assert_close(theirs(batch).logits, case.live(batch).logits, rtol=1e-4, atol=1e-5)


def test_peft_gets_all_that_it_knows(tmp_path: Path):
    """DoRA, biases and whole modules stay as they are: the file is the same."""
    fields = {"target_modules": ["q_proj"], "use_dora": True, "modules_to_save": ["lm_head"], "bias": "none"}
    case = Case(tmp_path, models.tiny_llama(), **fields)
    assert case.export("peft") == []
    ours, theirs = (load_file(d / "adapter_model.safetensors") for d in (case.adapter, case.out))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


# ---- refusals --------------------------------------------------------------------------------------------------------

REFUSED: list[tuple[dict[str, Any], dict[str, str]]] = [
    ({"use_dora": True}, {"vllm": "use_dora=True.*no DoRA", "sglang": "use_dora=True"}),
    ({"modules_to_save": ["lm_head"]}, {"vllm": "modules_to_save", "sglang": "modules_to_save"}),
    ({"init_lora_weights": "pissa"}, {"vllm": "'pissa'.*original", "sglang": "'pissa'.*original"}),
    ({"init_lora_weights": "olora"}, {"vllm": "'olora'.*original", "sglang": "'olora'"}),
    ({"r": 600}, {"vllm": "rank 600.*512"}),
]


@pytest.mark.parametrize(("fields", "reasons"), REFUSED, ids=lambda value: ",".join(map(str, value)))
def test_refusals_name_the_reason_and_write_nothing(fields, reasons, tmp_path: Path):
    case = Case(tmp_path, models.tiny_llama(), **{"target_modules": ["q_proj"]} | fields)
    for target, reason in reasons.items():
        with pytest.raises(ExportError, match=reason):
            case.export(target)
        assert not case.out.exists()


def test_a_bias_of_b_and_of_the_base(tmp_path: Path):
    base = models.tiny_llama(attention_bias=True)
    for number, fields in enumerate(({"lora_bias": True}, {"bias": "lora_only"})):
        case = Case(tmp_path / str(number), base, target_modules=["q_proj"], **fields)
        for target in ("vllm", "sglang"):
            with pytest.raises(ExportError, match=next(iter(fields))):
                case.export(target)


def test_every_reason_at_once(tmp_path: Path):
    case = Case(tmp_path, models.tiny_llama(), target_modules=["q_proj"], use_dora=True, init_lora_weights="pissa")
    with pytest.raises(ExportError, match=r"(?s)use_dora.*init_lora_weights"):
        case.export("vllm")


def test_sglang_has_no_room_for_a_router_nor_for_matrices(tmp_path: Path):
    case = Case(tmp_path, mixtures.moe("qwen3_moe"), target_modules=[], target_parameters=["mlp.gate.weight"])
    for target in ("vllm", "sglang"):
        with pytest.raises(ExportError, match="bare matrices"):
            case.export(target)
    head = Case(tmp_path / "2", models.tiny_llama(), target_modules=["lm_head", "q_proj"])
    head.export("sglang")
    gpt2 = Case(tmp_path / "3", models.tiny_gpt2(), target_modules=["c_proj"])
    with pytest.raises(ExportError, match="no room for modules called 'c_proj'"):
        gpt2.export("sglang")
    gpt2.export("vllm")


def test_experts_that_do_not_say_how_they_lie(tmp_path: Path):
    """Llama 4 multiplies ``[E, in, out]`` and does not say so: which dimension A belongs to is a guess."""
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    config = Llama4TextConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=8,
        intermediate_size_mlp=8,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        num_local_experts=4,
        interleave_moe_layer_step=1,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    parameters = ["feed_forward.experts.down_proj"]
    case = Case(tmp_path, Llama4ForCausalLM(config), target_modules=[], target_parameters=parameters)
    for target in ("vllm", "sglang"):
        with pytest.raises(ExportError, match=r"Llama4TextExperts does not say how its experts' weights lie"):
            case.export(target)


def test_what_is_asked_wrongly(tmp_path: Path):
    case = Case(tmp_path, models.tiny_llama(), target_modules=["q_proj"])
    for options, reason in (
        ({"target": "vlm"}, "no export to 'vlm'.*vllm"),
        ({"target": "vllm", "experts": "each"}, "expected one of auto"),
        ({"target": "vllm", "base": str(tmp_path / "none")}, "no configuration of a base model"),
    ):
        with pytest.raises(ExportError, match=reason):
            case.export(**options)
    case.out.mkdir()
    with pytest.raises(CheckpointError, match="already exists"):
        export_adapter(case.adapter, case.out, "vllm")
    other = tmp_path / "other"
    models.tiny_llama(layers=1).save_pretrained(other)
    with pytest.raises(CheckpointError, match="unexpected"):
        case.export("vllm", base=str(other))
