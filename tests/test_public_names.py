"""The public names are frozen: to add or drop one is a decision."""

from __future__ import annotations

import subprocess
import sys

import lorica
import lorica.parallel

NAMES = [
    "ArrowConfig",
    "BdLoraConfig",
    "CordaConfig",
    "DoraCaching",
    "EvaConfig",
    "KasaConfig",
    "LoftQConfig",
    "LoraConfig",
    "LoraGAConfig",
    "LoraModel",
    "LoraRuntimeConfig",
    "MontecloraConfig",
    "PeftConfig",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "PeftType",
    "TaskType",
    "VeloraConfig",
    "__version__",
    "cast_mixed_precision_params",
    "check_if_peft_model",
    "convert_adapter",
    "convert_to_lora",
    "create_arrow_model",
    "create_lorafa_optimizer",
    "create_loraplus_optimizer",
    "create_riemannian_optimizer",
    "find_kappa_target_modules",
    "fuse_mlps",
    "get_eva_state_dict",
    "get_layer_status",
    "get_model_status",
    "get_peft_model",
    "get_peft_model_state_dict",
    "hold_adapters",
    "hotswap_adapter",
    "hotswap_adapter_from_state_dict",
    "initialize_lora_eva_weights",
    "inject_adapter_in_model",
    "intruder_dimensions",
    "prepare_model_for_compiled_hotswap",
    "prepare_model_for_kbit_training",
    "preprocess_corda",
    "preprocess_loraga",
    "reduce_intruder_dimension",
    "replace_lora_weights_loftq",
    "rescale_adapter_scale",
    "route_rows",
    "save_as_lora",
    "set_peft_model_state_dict",
    "unfuse_mlps",
]

PARALLEL = [
    "Axis",
    "ColumnParallelLinear",
    "Cut",
    "GQAQKVColumnParallelLinear",
    "GradScaler",
    "HeadOrder",
    "Layout",
    "ParallelEmbedding",
    "Pipeline",
    "RowParallelLinear",
    "Site",
    "Spec",
    "WeightSpecs",
    "clip_grad_norm_",
    "cutting",
    "gather_model_state",
    "get_total_norm",
    "grouped_heads",
    "merge_shard_",
    "next_token_loss",
    "parallelize",
    "parameter_groups",
    "specs_from_neuron",
    "specs_of",
    "split_stages",
    "stage",
    "sum_gradients",
    "verify",
]


def test_the_public_names_are_these():
    assert sorted(lorica.__all__) == sorted(NAMES)
    assert all(hasattr(lorica, name) for name in NAMES)


def test_the_public_names_for_many_ranks_are_these():
    assert sorted(lorica.parallel.__all__) == sorted(PARALLEL)
    assert all(hasattr(lorica.parallel, name) for name in PARALLEL)


def test_importing_takes_neither_peft_nor_transformers_nor_the_training_extras():
    heavy = ["peft", "transformers", "datasets", "pydantic", "matplotlib", "accelerate", "typer"]
    heavy += ["torch.distributed.tensor", "torch.distributed.fsdp", "torch.distributed.pipelining", "torch._dynamo"]
    code = f"import sys, lorica; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
