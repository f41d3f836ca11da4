"""Targets at the ends of a model whose layers lie on pipeline stages: each stage has what it has, the file has all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import divisions
import pytest
import ranks
import torch
import torch.distributed as dist
from contract import adapt
from safetensors.torch import load_file
from subjects import SUBJECTS, batch, logits_of
from torch import nn

import lorica
from lorica.parallel import clip_grad_norm_, sum_gradients, verify

SUBJECT = SUBJECTS["llama"]


def adapted(base: nn.Module, fields: dict[str, Any]) -> nn.Module:
    return adapt(base, lorica.LoraConfig(**{"r": 4, "init_lora_weights": False, **fields}))


def _ends(fields: dict[str, Any], folder: str) -> None:
    model, oracle = (adapted(cut, fields) for cut in (divisions.stages(pp=2)(SUBJECT, ""), SUBJECT.build()))
    verify(model)
    ids = batch(4)
    _, loss = divisions.Pipelined(model).train(ids)
    _, wanted = divisions.Plain(oracle).train(ids)
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=0)
    sum_gradients(model)
    norm = nn.utils.clip_grad_norm_(oracle.parameters(), 0.1)
    torch.testing.assert_close(clip_grad_norm_(model, 0.1), norm, rtol=1e-5, atol=0)
    model.save_pretrained(f"{folder}/stages")  # type: ignore[operator]
    if dist.get_rank() == 0:
        oracle.save_pretrained(f"{folder}/whole")  # type: ignore[operator]


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["lm_head"]},
        {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [0]},
    ],
    ids=str,
)
def test_ends(fields: dict[str, Any], tmp_path: Path) -> None:
    ranks.run(2, _ends, fields, str(tmp_path))
    mine, whole = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("stages", "whole"))
    assert mine.keys() == whole.keys()
    assert all(torch.equal(mine[name], whole[name]) for name in mine)
    configs = [(tmp_path / name / "adapter_config.json").read_text() for name in ("stages", "whole")]
    assert configs[0] == configs[1]


def _transformers(folder: str) -> None:
    fields = {"target_modules": [*SUBJECT.fields["target_modules"], "lm_head", "embed_tokens"]}
    model = adapted(divisions.transformers(pp_size=2)(SUBJECT, folder), fields)
    oracle = adapted(SUBJECT.build(), fields)
    ids = batch(2)
    with torch.no_grad():
        wanted = logits_of(oracle(input_ids=ids))
        torch.testing.assert_close(logits_of(model(input_ids=ids)), wanted, rtol=1e-5, atol=1e-5)


def test_stages_of_transformers(tmp_path: Path) -> None:
    SUBJECT.build().save_pretrained(tmp_path)  # type: ignore[operator]
    ranks.run(2, _transformers, str(tmp_path))
