"""What goes wrong in Optimum Neuron and must not here, beside what the files of its shards and the ranks tests hold.

Sequence parallelism, starts of unseeded ranks and disabling while merged are in ``test_neuron_ranks.py``; consolidation
of adapters on attention only, substrings in names, averages of A's and patterns in ``test_neuron_shards.py``.
"""

from __future__ import annotations

import inspect
import json
import math
from pathlib import Path
from typing import Any

import neuron_files as files
import pytest
import ranks
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from subjects import SUBJECTS, batch, logits_of
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import lorica
import lorica.parallel as parallel
from lorica.compat import optimum_neuron as neuron
from lorica.errors import CheckpointError, ConfigError
from lorica.parallel import Axis, sum_gradients

LLAMA = SUBJECTS["llama"]
IN, OUT = 48, 16


def near(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def tp() -> Axis:
    return Axis.of(init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",)), 0)


def cut() -> nn.Module:
    config = neuron.TrainingNeuronConfig(dist.get_world_size(), device_type="cpu", backend="gloo")
    return config.parallelize(LLAMA.build())


# ---- the start -------------------------------------------------------------------------------------------------------


def _start(folder: str) -> None:
    torch.manual_seed(7)
    config = lorica.LoraConfig(**LLAMA.fields, r=4)
    neuron.get_peft_model(cut(), config).save_pretrained(folder)


def test_the_start_is_that_of_the_whole_weight(tmp_path: Path) -> None:
    """A of a row layer is drawn for the fan-in of the whole input, not of a rank's share."""
    ranks.run(4, _start, str(tmp_path))
    torch.manual_seed(7)
    oracle = lorica.get_peft_model(LLAMA.build(), lorica.LoraConfig(**LLAMA.fields, r=4))
    wanted, found = lorica.get_peft_model_state_dict(oracle), load_file(tmp_path / "adapter_model.safetensors")
    assert found.keys() == wanted.keys()
    assert [name for name in found if not torch.equal(found[name], wanted[name])] == []
    a = found["base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"]
    assert 0.9 / math.sqrt(48) < float(a.abs().max()) <= 1 / math.sqrt(48)


# ---- DoRA ------------------------------------------------------------------------------------------------------------


def _dora(kind: str) -> None:
    axis, torch_linear = tp(), nn.Linear(IN, OUT, bias=False).requires_grad_(False)
    cls: Any = getattr(parallel, kind)
    base = cls.from_linear(torch_linear, axis)
    fields: dict[str, Any] = {"r": 4, "lora_alpha": 8, "use_dora": True, "init_lora_weights": False}
    torch.manual_seed(5)
    model = neuron.get_peft_model(nn.ModuleDict({"layer": base}), lorica.LoraConfig(target_modules=["layer"], **fields))
    torch.manual_seed(5)
    oracle = lorica.get_peft_model(
        nn.ModuleDict({"layer": torch_linear}), lorica.LoraConfig(target_modules=["layer"], **fields)
    )
    layer: Any = model.get_base_model()["layer"]  # type: ignore[index]
    whole: Any = oracle.get_base_model()["layer"]  # type: ignore[index]
    assert type(layer) is neuron.ParallelLinear
    x = torch.randn(2, 5, IN, generator=torch.Generator().manual_seed(2))
    outputs = [layer(x), whole(x)]
    near(outputs[0], outputs[1])
    for output in outputs:
        output.square().sum().backward()
    sum_gradients(model)
    site, roles = layer.site, layer.factor_roles("default")
    tensors = zip(layer.factors("default").tensors(), roles, whole.factors("default").tensors(), strict=False)
    for factor, role, one in tensors:
        near(factor.grad, site.layout.take(one.grad, role, site.at))
    with torch.no_grad():
        layer.merge(safe_merge=True)
        near(layer(x), outputs[1])
        layer.unmerge()
        near(base.logical("weight"), torch_linear.weight)


@pytest.mark.parametrize("kind", ["ColumnParallelLinear", "RowParallelLinear"])
@pytest.mark.parametrize("size", [2, 4])
def test_dora_has_norms_of_whole_rows(size: int, kind: str) -> None:
    ranks.run(size, _dora, kind)


# ---- names, patterns, files ------------------------------------------------------------------------------------------


def _names(folder: str) -> None:
    config = lorica.LoraConfig(**LLAMA.fields, r=4, init_lora_weights=False)
    model = neuron.NeuronPeftModel(cut(), config, "a")
    for name in ("lora", "default"):
        model.add_adapter(name, config)
    model.save_pretrained(folder)
    ids = batch(1)
    with torch.no_grad():
        for name in ("a", "lora", "default"):
            model.set_adapter(name)
            before = logits_of(model(input_ids=ids))
            place = folder if name == "default" else f"{folder}/{name}"
            again = neuron.NeuronPeftModel.from_pretrained(cut(), place)
            near(logits_of(again(input_ids=ids)), before)


@pytest.mark.filterwarnings("ignore:Adapter name 'lora' should not be contained:UserWarning")
@pytest.mark.filterwarnings("ignore:Adapter name 'a' should not be contained:UserWarning")
def test_adapters_may_be_called_a_and_lora(tmp_path: Path) -> None:
    ranks.run(2, _names, str(tmp_path))
    shapes = {name: t.shape for name, t in load_file(tmp_path / "a" / "adapter_model.safetensors").items()}
    assert shapes == {name: t.shape for name, t in load_file(tmp_path / "lora" / "adapter_model.safetensors").items()}
    whole = lorica.get_peft_model(LLAMA.build(), lorica.LoraConfig(**LLAMA.fields, r=4))
    assert shapes == {name: t.shape for name, t in lorica.get_peft_model_state_dict(whole).items()}


def _fused_alone(folder: str) -> None:
    """q with a rank of its own where all three are one weight: refused, and not forgotten."""
    linears = [nn.Linear(IN, rows, bias=False) for rows in (16, 4, 4)]
    model = nn.ModuleDict({"qkv": parallel.GQAQKVColumnParallelLinear.from_linears(*linears, tp(), head_dim=2)})
    fields: dict[str, Any] = {"target_modules": ["q_proj", "k_proj", "v_proj"], "r": 4}
    with pytest.raises(lorica.errors.TargetError, match="need the same rank"):
        neuron.get_peft_model(model, lorica.LoraConfig(**fields, rank_pattern={"q_proj": 2}))
    made = neuron.get_peft_model(model, lorica.LoraConfig(**fields, rank_pattern={"[qkv]_proj": 2}))
    assert {tensor.shape[0] for name, tensor in made.named_parameters() if "lora_A" in name} == {6}  # 2 for each
    made.save_pretrained(folder)


def test_patterns_reach_projections_that_are_fused(tmp_path: Path) -> None:
    ranks.run(2, _fused_alone, str(tmp_path))
    found = load_file(tmp_path / "adapter_model.safetensors")
    assert {tuple(tensor.shape) for name, tensor in found.items() if "lora_A" in name} == {(2, IN)}


def test_consolidation_writes_what_peft_reads(tmp_path: Path) -> None:
    """The configuration too."""
    wholes = {"default": files.adapter_tensors(seed=1), "other": files.adapter_tensors(targets=files.ATTENTION, seed=2)}
    targets = {"other": {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}}
    for name, whole in wholes.items():
        files.save(tmp_path / "run", whole, 4, stages=2, adapter=name, config=targets.get(name))
    neuron.consolidate_model_parallel_checkpoints_to_unified_checkpoint(tmp_path / "run", tmp_path / "out")
    for name, whole in wholes.items():
        place = tmp_path / "out" / ("" if name == "default" else name)
        found = load_file(place / "adapter_model.safetensors")
        assert found.keys() == whole.keys()
        assert all(torch.equal(found[key], whole[key]) for key in found)
        config = lorica.LoraConfig.from_pretrained(place)
        assert config.r == files.RANK
        assert config.lora_alpha == 6  # type: ignore[attr-defined]
    with pytest.raises(CheckpointError, match="safetensors only"):
        neuron.consolidate_model_parallel_checkpoints_to_unified_checkpoint(
            tmp_path / "run",
            tmp_path / "out",
            "pytorch",  # type: ignore[arg-type]
        )


def test_a_base_models_shards_are_consolidated(tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    (shards / "model").mkdir(parents=True)
    whole = {"model.embed_tokens.weight": torch.randn(8, 3), "model.norm.weight": torch.randn(3)}
    cut_over = {"tensor_model_parallel": True, "partition_dim": 0, "partition_stride": 1, "num_partitions": 2}
    about = {"model.embed_tokens.weight": cut_over, "model.norm.weight": {"tensor_model_parallel": False}}
    metadata = {"parameters": about, "model_weight_transformation_specs": []}
    (shards / "mp_metadata_pp_rank_0.json").write_text(json.dumps(metadata))
    (shards / "done").write_text("1")
    for rank in range(2):
        state = {"model.embed_tokens.weight": whole["model.embed_tokens.weight"].chunk(2)[rank].clone()}
        torch.save(state | {"model.norm.weight": whole["model.norm.weight"]}, shards / f"model/{_file(rank)}")
    neuron.consolidate_model_parallel_checkpoints_to_unified_checkpoint(tmp_path, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in whole.items())
    assert found.keys() == whole.keys()


def _file(rank: int) -> str:
    return f"dp_rank_00_tp_rank_{rank:02d}_pp_rank_00.pt"


def _model_of_files() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": files.HIDDEN, "intermediate_size": files.MLP, "vocab_size": files.VOCABULARY}
    heads = {"num_attention_heads": files.HEADS, "num_key_value_heads": files.KV, "head_dim": files.HEAD}
    config = LlamaConfig(**sizes, **heads, num_hidden_layers=2, attn_implementation="eager")
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def _load(run: str) -> None:
    config = neuron.TrainingNeuronConfig(dist.get_world_size(), device_type="cpu", backend="gloo")
    model = neuron.NeuronPeftModel.from_pretrained(config.parallelize(_model_of_files()), run)
    assert type(model) is neuron.NeuronPeftModelForCausalLM
    model.load_adapter(f"{run}/adapter_other", "second")
    whole = lorica.get_peft_model(_model_of_files(), model.peft_config["default"])
    ids = batch(1)
    for name, seed in (("default", 1), ("second", 2)):
        model.set_adapter(name)
        lorica.set_peft_model_state_dict(whole, files.adapter_tensors(seed=seed), strict=True)
        with torch.no_grad():
            near(logits_of(model(input_ids=ids)), logits_of(whole(input_ids=ids)))


def test_their_shards_are_loaded_as_they_are(tmp_path: Path) -> None:
    """Cut for 8 ranks there, loaded on 2 here, with the logits of one process."""
    for name, seed in (("default", 1), ("other", 2)):
        files.save(tmp_path, files.adapter_tensors(seed=seed), 8, stages=2, adapter=name)
    ranks.run(2, _load, str(tmp_path))


# ---- the interface ---------------------------------------------------------------------------------------------------

_LINEAR = (
    "self, base_layer, adapter_name: str, r: int = 0, lora_alpha: int = 1, lora_dropout: float = 0.0, "
    "fan_in_fan_out: bool = False, is_target_conv_1d_layer: bool = False, init_lora_weights: bool | str = True, "
    "use_rslora: bool = False, use_dora: bool = False, lora_bias: bool = False, **kwargs"
)
SIGNATURES = {
    neuron.NeuronPeftModel: (
        "self, model, peft_config, adapter_name: str = 'default', autocast_adapter_dtype: bool = True, **kwargs"
    ),
    neuron.NeuronPeftModelForCausalLM: (
        "self, model, peft_config, adapter_name: str = 'default', autocast_adapter_dtype: bool = True, **kwargs"
    ),
    neuron.NeuronLoraLayer: "self, base_layer, ephemeral_gpu_offload: bool = False, **kwargs",
    neuron.ParallelLinear: _LINEAR,
    neuron.GQAQKVColumnParallelLinear: _LINEAR,
    neuron.ParallelEmbedding: _LINEAR.replace("is_target_conv_1d_layer: bool = False, ", ""),
    neuron.NeuronLoraModel: "self, model, config, adapter_name, low_cpu_mem_usage: bool = False",
    neuron.get_peft_model: (
        "model, peft_config, adapter_name: str = 'default', mixed: bool = False, autocast_adapter_dtype: bool = True, "
        "revision: str | None = None, low_cpu_mem_usage: bool = False"
    ),
}


@pytest.mark.parametrize("what", SIGNATURES, ids=lambda what: what.__name__)
def test_arguments_and_defaults_are_theirs(what: Any) -> None:
    def parts(signature: inspect.Signature) -> list[tuple[str, Any, Any]]:
        ours = (p for p in signature.parameters.values() if p.kind is not p.KEYWORD_ONLY)  # lorica's own come after
        return [(parameter.name, parameter.default, parameter.kind) for parameter in ours]

    made: dict[str, Any] = {}
    exec(f"def theirs({SIGNATURES[what]}): ...", made)
    found = inspect.signature(what.__init__ if inspect.isclass(what) else what)
    assert parts(found) == parts(inspect.signature(made["theirs"]))


def test_merge_and_unmerge_are_there() -> None:
    for cls in (neuron.ParallelLinear, neuron.GQAQKVColumnParallelLinear, neuron.ParallelEmbedding):
        assert [*inspect.signature(cls.merge).parameters] == ["self", "safe_merge", "adapter_names"]
        assert [*inspect.signature(cls.unmerge).parameters] == ["self"]
        assert [*inspect.signature(cls.get_delta_weight).parameters] == ["self", "adapter"]


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="not supported for Dropout"):
        neuron.NeuronLoraLayer(nn.Dropout())
    with pytest.raises(NotImplementedError, match=r"no GQAQKVColumnParallelLinear of lorica's"):
        neuron.GQAQKVColumnParallelLinear(nn.Linear(2, 2), "default", 1)
    layer = neuron.ParallelLinear(nn.Linear(3, 2), "default", 1)
    with pytest.raises(lorica.errors.AdapterError, match="an adapter 'default' already"):
        layer.update_layer("default", 1, 1, 0.0, True, False)
    with pytest.raises(ConfigError, match="r"):
        layer.update_layer("other", 0, 1, 0.0, True, False)
    layer.update_layer("other", 2, 4, 0.0, "gaussian", False, lora_bias=True)
    assert dict(layer.r) == {"default": 1, "other": 2}
    assert layer.active_adapters == ["default"]


def test_a_model_that_is_whole_is_pefts() -> None:
    model = neuron.get_peft_model(LLAMA.build(), lorica.LoraConfig(**LLAMA.fields, r=1))
    assert not isinstance(model, neuron.NeuronPeftModel)
