"""A rank that fails or dies while ranks merge a model's files: the others say which, and nothing is left."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path

import ranks
import torch.distributed as dist
from rank_faults import SOON, Call, Outcome, attempt_to

import lorica
import runs
from lorica.merge import merge_files
from lorica.train import lost

DEAD = "gave no sign of life"
FAULTS = {"error": "struck", "full": "No space left on device", "kill": DEAD, "term": DEAD}
WRITING = Call("lorica.merge.stream:Merge", "write")


def merge(rank: int, adapter: Path, base: Path, output: Path) -> None:
    """What ``lorica merge --shard-ranks`` does in each process."""
    from lorica.cli import merge as command

    dist.init_process_group = lambda *args, **options: None  # the ranks have met
    with command._group(True):
        merge_files(adapter, base, output)


def merge_and_fail(adapter: Path, base: Path, folder: Path) -> dict[str, tuple[list[Outcome], list[str]]]:
    """What became of the ranks, and what they left."""
    if dist.is_initialized():
        dist.destroy_process_group()
    for name in ("RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)
    lost.BEAT, lost.PATIENCE = 0.1, 1.0
    told, act = {}, partial(merge, adapter=adapter, base=base, output=folder / "merged")
    for number, fault in enumerate((*FAULTS, "error", "kill", "")):
        victim = number % 2
        options = {"victim": victim, "fault": fault, "at": WRITING} if fault else {}
        outcomes = attempt_to(act, 2, folder / f"{number}", **options)
        told[f"{fault} {victim}"] = outcomes, sorted(path.name for path in folder.glob("merged*"))
    return told


def test_a_merge_that_loses_a_rank_leaves_nothing(tmp_path: Path) -> None:
    model = runs.llama()
    model.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    index = json.loads((tmp_path / "base" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    adapted = lorica.get_peft_model(model, lorica.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    arguments = tmp_path / "adapter", tmp_path / "base", tmp_path / "tries"
    (told,) = ranks.run(1, merge_and_fail, *arguments, timeout=600)
    outcomes, left = told.pop(" 0")
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes
    assert left == ["merged"]
    for name, (outcomes, left) in told.items():
        fault, victim = name.split()
        other = outcomes[1 - int(victim)]
        assert other.kind in ("RankError", "LostRankError"), outcomes
        assert f"rank {victim}" in other.said, outcomes
        assert FAULTS[fault] in other.said, outcomes
        assert all(outcome.late < SOON for outcome in outcomes), outcomes
        assert not left, (name, left)
