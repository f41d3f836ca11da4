"""The public names are frozen: to add or drop one is a decision."""

from __future__ import annotations

import subprocess
import sys

import lorica

NAMES = [
    "LoraConfig",
    "LoraModel",
    "LoraRuntimeConfig",
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
    "__version__",
    "cast_mixed_precision_params",
    "get_layer_status",
    "get_model_status",
    "get_peft_model",
    "get_peft_model_state_dict",
    "inject_adapter_in_model",
    "prepare_model_for_kbit_training",
    "set_peft_model_state_dict",
]


def test_the_public_names_are_these():
    assert sorted(lorica.__all__) == sorted(NAMES)
    assert all(hasattr(lorica, name) for name in NAMES)


def test_importing_takes_neither_peft_nor_transformers_nor_the_training_extras():
    heavy = ["peft", "transformers", "datasets", "pydantic", "matplotlib", "accelerate", "typer"]
    code = f"import sys, lorica; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
