"""On a real model and real text, `lorica train` learns as much as peft does with the same settings."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import lorica
from lorica.cli.app import app
from lorica.train import metrics
from lorica.train.state import Saver

SHARED = Path(os.environ.get("LORICA_SHARED", Path(__file__).resolve().parents[3] / "shared"))
MODEL, TEXT = SHARED / "models" / "stories260K", SHARED / "data" / "tinyshakespeare.txt"

pytestmark = [
    pytest.mark.skipif(not (MODEL.is_dir() and TEXT.is_file()), reason="the model or the text is not here"),
    # peft 0.21 uses names that transformers 5.23 deprecates.
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def held_out_loss(output: Path, text: Path) -> tuple[float, float]:
    overrides = [
        f"model.path={MODEL}",
        f"data.train={text}",
        "data.max_length=128",
        "lora.r=8",
        "lora.lora_alpha=16",
        "training.steps=60",
        "training.batch_size=8",
        "training.learning_rate=5e-3",
        "training.eval_every=null",
        "training.device=cpu",
        "checkpoint.every=null",
        f"output_dir={output}",
    ]
    result = CliRunner().invoke(app, ["train", *overrides, "--quiet"])
    assert result.exit_code == 0, result.output
    records = [record for record in metrics.read(output / "metrics.jsonl") if record["kind"] == "eval"]
    return records[0]["loss"], records[-1]["loss"]


@pytest.mark.slow
def test_the_held_out_loss_is_as_low_as_with_peft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peft: Any = pytest.importorskip("peft")
    text = tmp_path / "text.txt"
    text.write_text(TEXT.read_text(encoding="utf-8")[:200_000], encoding="utf-8")
    ours, ours_config, factors = lorica.get_peft_model, lorica.LoraConfig, {}

    def from_lorica(model: Any, config: Any) -> Any:
        adapted = ours(model, config)
        factors.update({k: v.clone() for k, v in lorica.get_peft_model_state_dict(adapted).items()})
        return adapted

    def config_of_peft(**fields: Any) -> Any:
        known = {field.name for field in dataclasses.fields(peft.LoraConfig)}
        own = {k: v for k, v in fields.items() if k not in known}
        defaults = ours_config(**fields), ours_config(**{k: v for k, v in fields.items() if k in known})
        assert defaults[0] == defaults[1], f"the recipe sets a field of lorica alone: {own}"
        return peft.LoraConfig(**{k: v for k, v in fields.items() if k in known})

    def from_peft(model: Any, config: Any) -> Any:
        adapted = peft.get_peft_model(model, config)
        peft.set_peft_model_state_dict(adapted, factors)
        return adapted

    monkeypatch.setattr(lorica, "get_peft_model", from_lorica)
    before, after = held_out_loss(tmp_path / "lorica", text)
    # The same command, recipe, data, order, optimiser, loop, initial factors; only the layers are the other library's.
    monkeypatch.setattr(lorica, "LoraConfig", config_of_peft)
    monkeypatch.setattr(lorica, "get_peft_model", from_peft)
    monkeypatch.setattr(Saver, "save", lambda self: tmp_path)  # training states name the tensors of lorica's layers
    start, theirs = held_out_loss(tmp_path / "peft", text)
    print(f"before {before:.4f}, lorica {after:.4f}, peft {theirs:.4f}")
    assert start == pytest.approx(before, rel=1e-5)
    assert theirs < 0.85 * before
    assert after <= 1.01 * theirs
