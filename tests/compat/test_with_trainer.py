"""transformers' ``Trainer`` takes lorica's models as it takes peft's: same losses, files, resumption and best model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("peft", reason="the comparison is with peft")
pytest.importorskip("accelerate", reason="Trainer needs accelerate")

import real

from lorica.compat.peft.peft_model import PeftModelForCausalLM

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

FIELDS = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
STEPS = 8


@pytest.fixture(scope="module")
def pieces() -> list[dict[str, list[int]]]:
    return real.pieces(48, 32)


def adapted(name: str, **fields: Any) -> Any:
    lib = real.library(name)
    return real.start(lib.get_peft_model(real.small_llama(), lib.LoraConfig(**{**FIELDS, **fields})))


def trainer_of(model: Any, pieces: Any, output: Path, **arguments: Any) -> Any:
    import datasets
    from transformers import Trainer, TrainingArguments

    settings = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 5e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "seed": 3,
        "disable_tqdm": True,
        **arguments,
    }
    return Trainer(
        model,
        TrainingArguments(str(output), **settings),
        train_dataset=datasets.Dataset.from_list(pieces[:32]),
        eval_dataset=datasets.Dataset.from_list(pieces[32:]),
    )


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(5, 25).view(2, 10)
    with torch.no_grad():
        return model.eval()(ids).logits


@pytest.mark.parametrize(
    "fields",
    [{}, {"use_dora": True}, {"modules_to_save": ["norm"], "use_rslora": True}],
    ids=["lora", "dora", "modules_to_save"],
)
def test_it_trains_and_saves_as_with_peft(pieces, tmp_path, fields):
    trained = {}
    for name in real.LIBRARIES:
        output = tmp_path / name
        trainer = trainer_of(adapted(name, **fields), pieces, output)
        trainer.train()
        trainer.save_model(str(output / "last"))
        trained[name] = real.losses(trainer), output / "last", logits(trainer.model)
    (theirs, their_folder, their_logits), (ours, our_folder, our_logits) = (trained[name] for name in real.LIBRARIES)
    real.assert_same_losses(ours, theirs)
    torch.testing.assert_close(our_logits, their_logits, rtol=1e-4, atol=1e-4)

    files = {path.name for path in our_folder.iterdir()}
    assert files == {path.name for path in their_folder.iterdir()}
    assert "model.safetensors" not in files
    saved, expected = (load_file(folder / "adapter_model.safetensors") for folder in (our_folder, their_folder))
    assert saved.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(saved[key], tensor, rtol=1e-3, atol=2e-4)  # Adam amplifies rounding

    for name in real.LIBRARIES:  # each reads what the other wrote
        read = real.library(name).PeftModel.from_pretrained(
            real.small_llama(), our_folder if name == "peft" else their_folder
        )
        torch.testing.assert_close(logits(read), our_logits if name == "peft" else their_logits, rtol=1e-5, atol=1e-5)


def test_resuming_gives_what_an_uninterrupted_run_gives(pieces, tmp_path):
    whole = trainer_of(adapted("lorica.compat.peft"), pieces, tmp_path / "whole")
    whole.train()
    first = trainer_of(
        adapted("lorica.compat.peft"), pieces, tmp_path / "cut", save_strategy="steps", save_steps=STEPS // 2
    )
    first.train()
    checkpoint = tmp_path / "cut" / f"checkpoint-{STEPS // 2}"
    assert not (checkpoint / "model.safetensors").exists()
    again = trainer_of(adapted("lorica.compat.peft"), pieces, tmp_path / "again")
    again.train(resume_from_checkpoint=str(checkpoint))
    assert again.state.global_step == STEPS
    assert real.losses(again)[-STEPS // 2 :] == real.losses(whole)[-STEPS // 2 :]
    assert torch.equal(logits(again.model), logits(whole.model))
    assert all(p.requires_grad == ("lora_" in name) for name, p in again.model.named_parameters())


def test_checkpoints_resume_in_the_other_library(pieces, tmp_path):
    """Half a run with one and half with the other is a run with either."""
    results = {}
    for first, second in (real.LIBRARIES, real.LIBRARIES[::-1]):
        output = tmp_path / first
        trainer_of(adapted(first), pieces, output, save_strategy="steps", save_steps=STEPS // 2).train()
        again = trainer_of(adapted(second), pieces, tmp_path / "again" / first)
        again.train(resume_from_checkpoint=str(output / f"checkpoint-{STEPS // 2}"))
        results[first] = real.losses(again)
    real.assert_same_losses(results["lorica.compat.peft"], results["peft"])


def test_the_best_model_is_there_at_the_end(pieces, tmp_path):
    trained = {}
    for name in real.LIBRARIES:
        trainer = trainer_of(
            adapted(name),
            pieces,
            tmp_path / name,
            max_steps=6,
            eval_strategy="steps",
            eval_steps=2,
            save_strategy="steps",
            save_steps=2,
            load_best_model_at_end=True,
            metric_for_best_model="eval_loss",
            greater_is_better=True,  # so that it is not the last one
        )
        trainer.train()
        best = Path(trainer.state.best_model_checkpoint)
        assert best.name == "checkpoint-2"
        saved = load_file(best / "adapter_model.safetensors")
        found = real.library(name).get_peft_model_state_dict(trainer.model)
        assert found.keys() == saved.keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in saved.items())
        trained[name] = trainer.evaluate()["eval_loss"]
    assert trained["lorica.compat.peft"] == pytest.approx(trained["peft"], rel=1e-4)


def test_a_classifier_trains_its_head(tmp_path):
    """The head trains whole beside the factors, and is in the file."""
    import datasets
    from transformers import Trainer, TrainingArguments

    import models

    rows = [{"input_ids": [3 + i % 7, 5, 8, 2 + i % 3], "labels": i % 3} for i in range(24)]
    settings = {"max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1, "seed": 3}
    settings |= {"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    trained = {}
    for name in real.LIBRARIES:
        lib = real.library(name)
        model = real.start(lib.get_peft_model(models.tiny_bert(), lib.LoraConfig(task_type="SEQ_CLS")))
        arguments = TrainingArguments(str(tmp_path / name), **settings)
        trainer = Trainer(model, arguments, train_dataset=datasets.Dataset.from_list(rows))
        trainer.train()
        trainer.save_model()
        trained[name] = real.losses(trainer), load_file(tmp_path / name / "adapter_model.safetensors")
    (theirs, their_file), (ours, our_file) = (trained[name] for name in real.LIBRARIES)
    real.assert_same_losses(ours, theirs)
    assert our_file.keys() == their_file.keys()
    assert "base_model.model.classifier.weight" in our_file


def test_gradient_checkpointing_and_label_smoothing(pieces, tmp_path):
    trained = {}
    for name in real.LIBRARIES:
        trainer = trainer_of(
            adapted(name), pieces, tmp_path / name, gradient_checkpointing=True, label_smoothing_factor=0.1
        )
        trainer.train()
        trained[name] = real.losses(trainer)
    real.assert_same_losses(trained["lorica.compat.peft"], trained["peft"])


def test_several_adapters_are_saved_and_resumed(pieces, tmp_path):
    def two() -> Any:
        lib = real.library("lorica.compat.peft")
        model = adapted("lorica.compat.peft")
        model.add_adapter("second", lib.LoraConfig(**FIELDS))
        model.set_adapter("second")
        return model

    trainer = trainer_of(two(), pieces, tmp_path / "run", save_strategy="steps", save_steps=STEPS // 2)
    trainer.train()
    checkpoint = tmp_path / "run" / f"checkpoint-{STEPS // 2}"
    assert (checkpoint / "second" / "adapter_model.safetensors").is_file()
    again = trainer_of(two(), pieces, tmp_path / "again")
    again.train(resume_from_checkpoint=str(checkpoint))
    assert again.model.active_adapters == ["second"]
    assert real.losses(again)[-STEPS // 2 :] == real.losses(trainer)[-STEPS // 2 :]


def test_a_plain_model_of_lorica_is_not_taken_for_peft():
    """The core's own class stays apart: only the compatibility package's is peft's too."""
    import peft

    import lorica

    assert isinstance(adapted("lorica.compat.peft"), peft.PeftModelForCausalLM)
    plain = lorica.get_peft_model(real.small_llama(), lorica.LoraConfig(**FIELDS))
    assert not isinstance(plain, peft.PeftModel)
    assert not isinstance(plain, PeftModelForCausalLM)
