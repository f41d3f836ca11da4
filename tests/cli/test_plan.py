"""``lorica plan``: tables, JSON, a picture, and errors in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_commands import stdout
from transformers import LlamaConfig, Qwen3MoeConfig
from typer.testing import CliRunner

from lorica.cli.app import app
from lorica.cli.plan import NOTES, ROUTED

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("dense")
    LlamaConfig(**SIZES, architectures=["LlamaForCausalLM"]).save_pretrained(directory)
    return directory


def said(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["plan", *map(str, arguments)])
    return result.exit_code, result.output


def test_one_layout_is_shown_in_full(dense: Path) -> None:
    shown = stdout("plan", dense / "config.json", "--world", 4, "--tp", 2, "--sp", "--fsdp", 2, "--sequence", 16)
    for word in ("fsdp2 tp2 sp", "weights", "optimiser", "activations", "reduce_scatter", "LoRA's gradients"):
        assert word in shown
    assert "Megatron Bridge" in shown
    assert all(note in shown for note in NOTES)
    assert ROUTED not in shown


def test_json_has_the_same_figures(dense: Path) -> None:
    options = ["--world", 2, "--tp", 2, "--no-sp", "--sequence", 16, "-r", 4, "--target", "q_proj", "--json"]
    values = json.loads(stdout("plan", dense, *options))
    (plan,) = values["plans"]
    assert (plan["layout"], plan["tp"], values["world"], values["refused"]) == ("tp2", 2, 2, [])
    assert plan["trainable"] == {"logical": 2 * 4 * 64, "rank": 2 * 4 * (32 + 16)}
    assert plan["memory"]["factors"] * 2 == plan["memory"]["optimiser"]
    assert plan["memory"]["total"] == sum(size for part, size in plan["memory"].items() if part != "total")
    assert plan["file"] == {"tensors": 4, "bytes": 4 * plan["trainable"]["logical"]}
    assert sum(one["bytes"] for one in plan["written"]) == plan["file"]["bytes"]
    assert plan["sent_by_lora_in_forward_and_backward"]["lorica"] == 0


def test_layouts_that_fit_are_listed_and_drawn_and_the_others_explained(dense: Path, tmp_path: Path) -> None:
    options = ["--world", 8, "--pp", 1, "--sequence", 16, "--target", "o_proj", "--plot", tmp_path / "memory.png"]
    shown = stdout("plan", dense, *options, "--no-sp")
    assert "layouts of 8 ranks fit, best first" in shown
    assert "impossible: tp8" in shown
    assert "4 query and 2 key/value heads" in shown
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")


def test_what_does_not_fit_says_by_how_much(dense: Path) -> None:
    code, shown = said(dense, "--world", 2, "--memory", "0.00001", "--sequence", 16, "--no-sp", "--pp", 1)
    assert code == 1
    assert "no layout of 2 ranks fits" in shown
    assert "before any activation" in shown


def test_experts_over_ranks_are_cut_by_transformers(tmp_path: Path) -> None:
    Qwen3MoeConfig(**SIZES, **EXPERTS, architectures=["Qwen3MoeForCausalLM"]).save_pretrained(tmp_path)
    options = ["--world", 4, "--fsdp", 4, "--ep", 4, "--sequence", 16, "--dtype", "bfloat16", "-r", 8]
    options += ["--target-parameter", "experts.gate_up_proj", "--target-parameter", "experts.down_proj", "--json"]
    values = json.loads(stdout("plan", tmp_path, *options))
    (plan,) = values["plans"]
    assert plan["engine"] == "transformers"
    # In each layer how many tokens go where, the tokens to the experts and back, and in backward their gradients.
    tokens, counts = 16 * 2 * 32 * 2, 4 * 8
    (exchanged,) = [one["bytes"] for one in plan["sent"] if one["collective"] == "all_to_all"]
    assert exchanged == 2 * (4 * tokens + counts) * 3 // 4
    assert ROUTED in values["notes"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.json", "--world", 2], "There is no configuration nowhere.json"),
        (["{dense}", "--world", 6, "--tp", 4], "no layout of 6 ranks has tp=4"),
        (["{dense}", "--world", 8, "--tp", 8, "--no-sp"], "4 query and 2 key/value heads"),
        (["{dense}", "--world", 2, "--tp", 2, "--sp", "--target", "nothing"], "nothing"),
        (["{dense}", "--world", 2, "--dtype", "float7"], "float7 is no dtype"),
        (["{dense}", "--world", 2, "--engine", "magic"], "one of auto, native, transformers"),
    ],
)
def test_mistakes_are_one_line(dense: Path, arguments: list[Any], message: str) -> None:
    code, shown = said(*(str(a).replace("{dense}", str(dense)) for a in arguments))
    assert code == 2
    assert shown.startswith("error: ")
    assert message in shown
