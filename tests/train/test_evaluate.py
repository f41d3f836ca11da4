"""Loss, greedy answers and exact match."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import runs
from lorica.errors import RecipeError
from lorica.train import data, evaluate
from lorica.train.data import Format


def test_left_padding_changes_no_answer(tokenizer: Any) -> None:
    model = runs.llama()
    prompts = [data.prompt_ids(text, tokenizer) for text in ("1 + 1 = ", "hello world " * 3, "a", "22 + 3 = ")]
    together = evaluate.generate(model, tokenizer, prompts, max_new_tokens=6)
    alone = [evaluate.generate(model, tokenizer, [prompt], max_new_tokens=6)[0] for prompt in prompts]
    assert together == alone
    assert evaluate.generate(model, tokenizer, prompts, max_new_tokens=6, batch_size=2) == alone


def test_exact_match_counts_right_answers_in_order(tokenizer: Any) -> None:
    model = runs.llama()
    rows = runs.sums(6)
    ids = [question.ids for question in data.questions(rows, Format.detect(list(rows[0])), tokenizer)]
    given = evaluate.generate(model, tokenizer, ids, max_new_tokens=5)
    rows = [
        row | {"completion": text if index % 2 else "-"}
        for index, (row, text) in enumerate(zip(rows, given, strict=True))
    ]
    found = evaluate.exact_match(model, tokenizer, rows, max_new_tokens=5)
    assert found.score == 0.5
    assert [answer.correct for answer in found.answers] == [False, True] * 3
    assert [answer.prompt for answer in found.answers] == [row["prompt"] for row in rows]
    assert not model.training


def test_plain_text_has_no_answers(tokenizer: Any) -> None:
    with pytest.raises(RecipeError, match="no prompts"):
        evaluate.exact_match(runs.llama(), tokenizer, [{"text": "x"}])


def test_no_rows_no_matches(tokenizer: Any) -> None:
    assert evaluate.exact_match(runs.llama(), tokenizer, []).score == 0.0


def test_the_loss_is_that_of_transformers_and_leaves_the_mode_alone(tokenizer: Any) -> None:
    model = runs.llama().train()
    rows = runs.sums(5)
    found, _ = data.examples(rows, Format.detect(list(rows[0])), tokenizer, 60)
    value = evaluate.loss(model, found, batch_size=2)
    assert model.training
    total, count = 0.0, 0
    with torch.no_grad():
        for example in found:
            labels = example.labels.long()[None]
            tokens = int((labels != data.IGNORE).sum())
            total += float(model.eval()(example.ids.long()[None], labels=labels).loss) * tokens
            count += tokens
    assert value == pytest.approx(total / count, rel=1e-6)
    assert math.isnan(evaluate.loss(model, found, stop=lambda: True))
    assert math.isnan(evaluate.loss(model, []))
