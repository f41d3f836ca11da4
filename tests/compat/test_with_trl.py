"""TRL's trainers take lorica's models and configurations as they take peft's, and reach the same losses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("peft", reason="the comparison is with peft")
pytest.importorskip("trl", reason="the trainers are TRL's")

import datasets
import real
import trl

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

FIELDS = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}
COMMON = {
    "max_steps": 4,
    "per_device_train_batch_size": 2,
    "learning_rate": 2e-3,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "seed": 3,
    "disable_tqdm": True,
}
ROUTES = ["ready", "config"]


def config_of(lib: Any, **fields: Any) -> Any:
    return lib.LoraConfig(**{**FIELDS, **fields})


def given(name: str, route: str, **fields: Any) -> dict[str, Any]:
    """The trainer's arguments: an adapted model, or a plain one and a configuration."""
    lib = real.library(name)
    config = config_of(lib, **fields)
    if route == "ready":
        return {"model": real.start(lib.get_peft_model(real.demo_model(), config))}
    return {"model": real.demo_model(), "peft_config": config}


def run(trainer: Any, route: str, **arguments: Any) -> Any:
    """Train, from the same factors in either library."""
    if route == "config":
        real.start(trainer.model)
    torch.manual_seed(11)  # the order of the data, and what is sampled
    trainer.train(**arguments)
    return trainer


def class_of(name: str) -> type:
    return real.library(name).PeftModel


def saved(trainer: Any, folder: Path) -> dict[str, torch.Tensor]:
    trainer.save_model(str(folder))
    assert not (folder / "model.safetensors").exists()
    return load_file(folder / "adapter_model.safetensors")


def assert_same_files(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        torch.testing.assert_close(ours[key], tensor, rtol=1e-3, atol=2e-4)  # Adam amplifies rounding


def supervised(name: str, route: str, output: Path, fields: dict[str, Any], **arguments: Any) -> Any:
    return trl.SFTTrainer(
        **given(name, route, **fields),
        args=trl.SFTConfig(str(output), max_length=96, **{**COMMON, **arguments}),
        train_dataset=datasets.Dataset.from_list(real.demo_rows(16)),
        processing_class=real.tokenizer(),
    )


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    "fields",
    [{}, {"task_type": "CAUSAL_LM"}, {"use_dora": True, "modules_to_save": ["norm"]}],
    ids=["no_task", "task", "dora"],
)
def test_sft(tmp_path, route, fields):
    trained = {}
    for name in real.LIBRARIES:
        trainer = run(supervised(name, route, tmp_path / name, fields), route)
        assert isinstance(trainer.model, class_of(name))
        trained[name] = real.losses(trainer), saved(trainer, tmp_path / name / "last")
    real.assert_same_losses(trained["lorica.compat.peft"][0], trained["peft"][0])
    assert_same_files(trained["lorica.compat.peft"][1], trained["peft"][1])


def test_sft_resumes_and_keeps_its_configuration(tmp_path):
    """Also with TRL's default of gradient checkpointing, which needs the embedding's output to require gradients."""
    name = "lorica.compat.peft"
    whole = run(supervised(name, "config", tmp_path / "whole", {}), "config")
    cut = supervised(name, "config", tmp_path / "cut", {}, save_strategy="steps", save_steps=2)
    run(cut, "config")
    checkpoint = tmp_path / "cut" / "checkpoint-2"
    written = json.loads((checkpoint / "adapter_config.json").read_text())
    assert written["r"] == 4
    assert written["peft_type"] == "LORA"
    assert sorted(written["target_modules"]) == sorted(FIELDS["target_modules"])
    again = run(supervised(name, "config", tmp_path / "again", {}), "config", resume_from_checkpoint=str(checkpoint))
    assert real.losses(again)[2:] == real.losses(whole)[2:]


def test_sft_with_tokens_that_a_chat_template_adds(tmp_path):
    """TRL lets them train, by ``trainable_token_indices`` and ``modules_to_save`` of the configuration.

    The head has a weight of its own: of one that it shares with the embedding, TRL cannot train both.
    """
    source = real.tokenizer()
    source.chat_template = "{% for m in messages %}<|turn|>{{ m['content'] }}<|end|>{% endfor %}"
    source.add_special_tokens({"additional_special_tokens": ["<|turn|>", "<|end|>"]})
    source.save_pretrained(tmp_path / "source")
    trained = {}
    for name in real.LIBRARIES:
        model = real.demo_model()
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        model.config.tie_word_embeddings = False
        trainer = trl.SFTTrainer(
            model,
            args=trl.SFTConfig(str(tmp_path / name), chat_template_path=str(tmp_path / "source"), **COMMON),
            train_dataset=datasets.Dataset.from_list(real.demo_rows(16)),
            processing_class=real.tokenizer(),
            peft_config=config_of(real.library(name)),
        )
        run(trainer, "config")
        config = trainer.model.peft_config["default"]
        assert {1024, 1025} <= set(config.trainable_token_indices["embed_tokens"])
        trained[name] = real.losses(trainer), saved(trainer, tmp_path / name / "last")
    ours, theirs = trained["lorica.compat.peft"], trained["peft"]
    assert any("trainable_tokens_delta" in key for key in ours[1])
    real.assert_same_losses(ours[0], theirs[0])
    twice = [key for key in theirs[1] if "original_module" in key or "modules_to_save" in key]  # under live names too
    assert_same_files(ours[1], {key: tensor for key, tensor in theirs[1].items() if key not in twice})


@pytest.mark.parametrize("route", ROUTES)
def test_dpo(tmp_path, route):
    """A ready model is copied into a frozen adapter "ref", by names of parameters; a new one turns adapters off."""
    trained = {}
    for name in real.LIBRARIES:
        trainer = trl.DPOTrainer(
            **given(name, route),
            args=trl.DPOConfig(str(tmp_path / name), max_length=96, **COMMON),
            train_dataset=datasets.Dataset.from_list(real.preferences(16)),
            processing_class=real.tokenizer(),
        )
        if route == "ready":
            live = dict(trainer.model.named_parameters())
            copies = [key for key in live if ".ref." in key]
            assert len(copies) == sum(".default." in key for key in live) > 0
            assert all(torch.equal(live[key], live[key.replace(".ref.", ".default.")]) for key in copies)
            assert not any(live[key].requires_grad for key in copies)
        before = {key: p.clone() for key, p in trainer.model.named_parameters() if ".ref." in key}
        run(trainer, route)
        live = dict(trainer.model.named_parameters())
        assert all(torch.equal(live[key], tensor) for key, tensor in before.items())
        logged = [entry["rewards/margins"] for entry in trainer.state.log_history if "rewards/margins" in entry]
        trained[name] = real.losses(trainer), logged, saved(trainer, tmp_path / name / "last")
    (theirs, their_margins, their_file), (ours, our_margins, our_file) = (trained[name] for name in real.LIBRARIES)
    real.assert_same_losses(ours, theirs)
    torch.testing.assert_close(torch.tensor(our_margins), torch.tensor(their_margins), rtol=1e-4, atol=1e-5)
    assert_same_files(our_file, their_file)


def many_letters(completions: list[str], **kwargs: Any) -> list[float]:
    """A reward that differs between completions."""
    return [sum(letter.isalpha() for letter in text) / 10 for text in completions]


@pytest.mark.parametrize("route", ROUTES)
def test_grpo(tmp_path, route):
    """Samples with the adapted model, and compares with the reference: the adapter "ref", or none."""
    trained = {}
    for name in real.LIBRARIES:
        prompts = [{"prompt": row["prompt"]} for row in real.demo_rows(8)]
        trainer = trl.GRPOTrainer(
            **given(name, route),
            reward_funcs=many_letters,
            args=trl.GRPOConfig(
                str(tmp_path / name),
                num_generations=2,
                max_completion_length=8,
                beta=0.1,
                **{**COMMON, "max_steps": 3},
            ),
            train_dataset=datasets.Dataset.from_list(prompts),
            processing_class=real.tokenizer(),
        )
        run(trainer, route)
        assert isinstance(trainer.model, class_of(name))
        history = [entry for entry in trainer.state.log_history if "loss" in entry]
        logged = [[entry["loss"], entry["kl"], entry["reward"]] for entry in history]
        trained[name] = logged, saved(trainer, tmp_path / name / "last")
    (theirs, their_file), (ours, our_file) = (trained[name] for name in real.LIBRARIES)
    assert len(ours) == 3
    assert any(kl > 0 for _, kl, _ in theirs)
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-4, atol=1e-5)
    assert_same_files(our_file, their_file)


def test_configurations_of_others_are_refused_by_name(tmp_path):
    """TRL takes peft's classes; the core's own configuration is not one."""
    import lorica

    with pytest.raises(TypeError, match=r"must be a `peft\.PeftConfig` instance"):
        trl.SFTTrainer(
            model=real.demo_model(),
            peft_config=lorica.LoraConfig(**FIELDS),
            args=trl.SFTConfig(str(tmp_path), **COMMON),
            train_dataset=datasets.Dataset.from_list(real.demo_rows(4)),
            processing_class=real.tokenizer(),
        )
