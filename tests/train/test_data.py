"""What is learned of each format, and what a row that does not fit is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import runs
from lorica.errors import RecipeError
from lorica.train import data, sources
from lorica.train.data import IGNORE, Format
from lorica.train.recipe import DataSection


def learned(example: data.Example, tokenizer: Any) -> str:
    labels = example.labels.tolist()
    assert all(label in (IGNORE, token) for label, token in zip(labels, example.ids.tolist(), strict=True))
    return tokenizer.decode([label for label in labels if label != IGNORE])


def only(rows: list[dict[str, Any]], tokenizer: Any, **options: Any) -> data.Example:
    found, _ = data.examples(rows, Format.detect(list(rows[0])), tokenizer, options.get("max_length", 90))
    assert len(found) == 1
    return found[0]


def test_only_the_completion_and_its_end_are_learned(tokenizer: Any) -> None:
    example = only([{"prompt": "what is one = ", "completion": "three"}], tokenizer)
    assert learned(example, tokenizer) == "three</s>"
    assert tokenizer.decode(example.ids) == "<s>what is one = three</s>"


def test_the_prompt_is_tokenised_as_it_is_when_generating(tokenizer: Any) -> None:
    # " three" is one token of the whole text; the prompt that ends in a space must not know that.
    row = {"prompt": "sum = ", "completion": "three"}
    example = only([row], tokenizer)
    (question,) = data.questions([row], Format.detect(list(row)), tokenizer)
    assert example.ids.tolist()[: len(question.ids)] == question.ids == data.prompt_ids("sum = ", tokenizer)
    assert tokenizer("sum = three")["input_ids"] != [
        *question.ids,
        *tokenizer("three", add_special_tokens=False).input_ids,
    ]


def test_instructions_with_and_without_input(tokenizer: Any) -> None:
    example = only([{"instruction": "say", "input": "one", "output": "two"}], tokenizer)
    assert learned(example, tokenizer) == "two</s>"
    assert "### Input:\none" in tokenizer.decode(example.ids)
    assert "### Input" not in tokenizer.decode(only([{"instruction": "say", "output": "two"}], tokenizer).ids)


def test_every_assistant_turn_is_learned_with_its_end(tokenizer: Any) -> None:
    chat = [
        {"role": "system", "content": "sum"},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "one"},
        {"role": "user", "content": "world"},
        {"role": "assistant", "content": "two"},
    ]
    example = only([{"messages": chat}], tokenizer)
    assert learned(example, tokenizer) == "one<|end|>two<|end|>"
    whole = tokenizer.apply_chat_template(chat, tokenize=False)
    assert example.ids.tolist() == tokenizer(whole, add_special_tokens=False)["input_ids"]
    (question,) = data.questions([{"messages": chat}], Format.detect(["messages"]), tokenizer)
    assert (question.answer, question.ids) == ("two", data.chat_ids(chat[:-1], tokenizer))


def test_a_template_that_rewrites_earlier_turns_gives_one_example_per_turn() -> None:
    forgetful = runs.tokenizer(template=runs.FORGETFUL)
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "thought=one"}]
    chat += [{"role": "user", "content": "b"}, {"role": "assistant", "content": "more=two"}]
    found, _ = data.examples([{"messages": chat}], Format.detect(["messages"]), forgetful, 90)
    assert [learned(example, forgetful) for example in found] == ["thought=one<|end|>", "more=two<|end|>"]


def test_plain_text_is_cut_into_blocks_that_predict_every_token_once(tokenizer: Any) -> None:
    text = "hello world 0123456789 " * 9
    whole = tokenizer(text)["input_ids"]
    found, _ = data.examples([{"text": text}], Format.detect(["text"]), tokenizer, 16)
    assert len(found) > 3
    assert all(2 <= len(example) <= 16 for example in found)
    predicted = [label for example in found for label in example.labels.tolist() if label != IGNORE]
    assert predicted == [*whole[1:], tokenizer.eos_token_id]


def test_what_is_too_long_is_cut_and_what_then_teaches_nothing_left_out(tokenizer: Any) -> None:
    rows = [{"prompt": "0 " * 20, "completion": "1"}, {"prompt": "0", "completion": "1 " * 20}]
    found, left_out = data.examples(rows, Format.detect(list(rows[0])), tokenizer, 12)
    assert left_out == 1
    assert [(len(example), example.cut) for example in found] == [(12, True)]


def test_no_begin_token_where_the_tokenizer_adds_none() -> None:
    bare = runs.tokenizer(bos=False)
    assert bare.decode(only([{"prompt": "a", "completion": "b"}], bare).ids) == "ab</s>"


@pytest.mark.parametrize(
    ("columns", "name", "renamed", "hint"),
    [
        (["promt", "completion"], "prompt_completion", {}, "Did you mean 'promt'"),
        (["question", "answer"], "auto", {}, "fit no format"),
        (["question", "answer"], "auto", {"prompt": "qestion"}, "Did you mean 'question'?"),
        (["question", "answer"], "auto", {"promt": "question"}, "Did you mean 'prompt'?"),
        (["messagse"], "auto", {}, "'messagse' is near 'messages'"),
    ],
)
def test_a_wrong_column_is_named_with_a_suggestion(
    columns: list[str], name: str, renamed: dict[str, str], hint: str
) -> None:
    with pytest.raises(RecipeError) as error:
        Format.detect(columns, name, renamed)
    assert hint in str(error.value)


@pytest.mark.parametrize(
    ("row", "hint"),
    [
        ({"prompt": ["a"], "completion": "x"}, "Row 2: column 'prompt' holds list"),
        ({"messages": "hi"}, "Row 2: a conversation is a list"),
        ({"messages": [{"role": "user"}]}, "Row 2: a conversation is a list"),
        ({"messages": [{"role": "user", "content": "x"}]}, "Row 2: the conversation has no assistant turn"),
    ],
)
def test_a_wrong_row_is_named_by_its_number(row: dict[str, Any], hint: str, tokenizer: Any) -> None:
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    good = {"messages": chat} if "messages" in row else {"prompt": "a", "completion": "b"}
    with pytest.raises(RecipeError) as error:
        data.examples([good, row], Format.detect(list(row)), tokenizer, 20)
    assert hint in str(error.value)


def test_messages_need_a_chat_template() -> None:
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(RecipeError, match="no chat template"):
        data.examples([{"messages": chat}], Format.detect(["messages"]), runs.tokenizer(template=None), 20)


def _tables(directory: Path) -> list[Path]:
    import pandas

    rows = runs.sums(10)
    frame = pandas.DataFrame(rows)
    paths = [directory / f"rows{suffix}" for suffix in (".jsonl", ".json", ".parquet", ".csv")]
    runs.write_jsonl(paths[0], rows)
    paths[1].write_text(json.dumps(rows))
    frame.to_parquet(paths[2])
    frame.to_csv(paths[3], index=False)
    return paths


def test_every_kind_of_file_gives_the_same_examples(tmp_path: Path, tokenizer: Any) -> None:
    marks = set()
    for path in _tables(tmp_path):
        loaded = sources.load(DataSection(train=str(path), eval_fraction=0.3), tokenizer, 40, seed=1)
        assert (len(loaded.training), len(loaded.held_out)) == (7, 3)
        marks.add(data.fingerprint([*loaded.training, *loaded.held_out]))
    assert len(marks) == 1


def test_a_text_file_is_one_document_whose_end_is_held_out(tmp_path: Path, tokenizer: Any) -> None:
    text = "hello world\n" * 50
    (tmp_path / "words.txt").write_text(text)
    section = DataSection(train=str(tmp_path / "words.txt"), eval_fraction=0.25)
    loaded = sources.load(section, tokenizer, 20, seed=0)
    whole, _ = data.examples([{"text": text}], Format.detect(["text"]), tokenizer, 20)
    assert data.fingerprint([*loaded.training, *loaded.held_out]) == data.fingerprint(whole)
    assert len(loaded.held_out) == round(0.25 * len(whole))


def test_a_held_out_file_and_a_split(tmp_path: Path, tokenizer: Any) -> None:
    train = runs.write_jsonl(tmp_path / "train.jsonl", runs.sums(6))
    held = runs.write_jsonl(tmp_path / "held.jsonl", runs.sums(4, seed=1))
    loaded = sources.load(DataSection(train=str(train), eval=str(held)), tokenizer, 40, seed=0)
    assert (len(loaded.training), len(loaded.held_out)) == (6, 4)
    section = DataSection(train=str(train), split="train[:4]", eval_split="train[4:]")
    loaded = sources.load(section, tokenizer, 40, seed=0)
    assert (len(loaded.training), len(loaded.held_out)) == (4, 2)


@pytest.mark.parametrize(
    ("name", "content", "hint"),
    [
        ("rows.jsonl", "{broken", "cannot be read as json"),
        ("rows.jsonk", "", "data files end in .jsonl"),
        ("rows.jsonl", "", "rows.jsonl"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str, content: str, hint: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(RecipeError) as error:
        sources.rows(str(tmp_path / name))
    assert hint in str(error.value)
    with pytest.raises(RecipeError, match="Did you mean"):
        sources.rows(str(tmp_path / f"{name}x"))
