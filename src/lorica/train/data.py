"""From rows to examples: the four formats, what is learned of each, and where a row's tokens come from.

A format turns a row into *parts*: pieces of text, each either given (prompt) or to be learned (completion). The parts
are tokenised as prefixes of the whole text, so that a token never straddles the border between prompt and completion
unless the model would also see it so when it generates.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lorica.errors import RecipeError, suggest

IGNORE = -100
"""The label of a token that is not learned (torch's ``ignore_index``)."""

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Example:
    """One document: ``ids`` and ``labels`` of shape ``[T]``; a label is the token itself or :data:`IGNORE`."""

    ids: Tensor
    labels: Tensor
    cut: bool = False
    """Whether its end fell off at the maximal length."""
    images: Callable[[], list[Any]] | None = None
    """Opens the images that it goes with."""
    mark: bytes = b""
    """What tells these images from others."""

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Question:
    """A prompt as the model sees it, and the answer it should give."""

    ids: list[int]
    prompt: str
    answer: str


@dataclass(frozen=True)
class Parts:
    """A row as ``(text, learned)`` pieces. ``raw``: begin- and end-of-text tokens are the tokenizer's to add."""

    pieces: list[tuple[str, bool]]
    raw: bool = True
    is_text: bool = False


@dataclass(frozen=True)
class Format:
    """How a row is read: the format's name and what its columns are called in this data set."""

    name: str
    columns: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def detect(cls, present: Sequence[str], name: str = "auto", renamed: Mapping[str, str] | None = None) -> Format:
        """Choose by the columns that are there, or check that those of ``name`` are.

        Raises:
            RecipeError: a column is missing, or no format fits.
        """
        renamed = dict(renamed or {})
        roles = {role for required, optional, _ in _FORMATS.values() for role in (*required, *optional)}
        for role, column in renamed.items():
            if role not in roles:
                raise RecipeError(f"data.columns: unknown role {role!r}.{suggest(role, roles) or _listing(roles)}")
            if column not in present:
                raise RecipeError(
                    f"data.columns: there is no column {column!r}.{suggest(column, present)} Columns: {_names(present)}"
                )
        names = list(_FORMATS) if name == "auto" else [name]
        for candidate in names:
            required, optional, _ = _FORMATS[candidate]
            if all(renamed.get(role, role) in present for role in required):
                return cls(candidate, {role: renamed.get(role, role) for role in (*required, *optional)})
        if name == "auto":
            wanted = "; ".join(f"{key}: {', '.join(value[0])}" for key, value in _FORMATS.items())
            raise RecipeError(
                f"The columns {_names(present)} fit no format ({wanted}).{_near_columns(present, roles)}"
                " Name them in data.columns, as in data.columns={prompt: question, completion: answer}"
            )
        missing = [role for role in _FORMATS[name][0] if renamed.get(role, role) not in present]
        hint = suggest(missing[0], present)
        raise RecipeError(
            f"The format {name!r} needs a column {missing[0]!r}.{hint} Columns: {_names(present)};"
            f" another name goes in data.columns={{{missing[0]}: ...}}"
        )


def examples(rows: Iterable[Row], form: Format, tokenizer: Any, max_length: int) -> tuple[list[Example], int]:
    """Tokenise rows.

    Returns:
        the examples, and how many rows have nothing to learn within ``max_length`` and are left out.

    Raises:
        RecipeError: a row does not hold what its format needs (the message says which row).
    """
    found: list[Example] = []
    left_out = 0
    for row in _numbered(rows):
        new = encode(row, form, tokenizer, max_length)
        found += new
        left_out += not new
    return found, left_out


def encode(row: tuple[int, Row], form: Format, tokenizer: Any, max_length: int) -> list[Example]:
    """The examples of one numbered row: one, several (long plain text, some chat templates), or none."""
    found = []
    for parts in _parts(row, form, tokenizer):
        ids, learned = _tokenise(parts, tokenizer)
        # A long text becomes blocks that overlap by one token, so that each token is predicted exactly once.
        starts = range(0, max(1, len(ids) - 1), max_length - 1) if parts.is_text else (0,)
        for start in starts:
            block, mask = ids[start : start + max_length], learned[start : start + max_length]
            # Nothing precedes the first token that could predict it.
            labels = [IGNORE, *(token if known else IGNORE for token, known in zip(block[1:], mask[1:], strict=True))]
            if any(label != IGNORE for label in labels):
                cut = len(ids) > max_length and not parts.is_text
                ids_T, labels_T = (torch.tensor(values, dtype=torch.int32) for values in (block, labels))
                found.append(Example(ids_T, labels_T, cut))
    return found


def questions(rows: Iterable[Row], form: Format, tokenizer: Any) -> list[Question]:
    """Each row's prompt and the answer that belongs to it (of a conversation: its last assistant turn).

    Raises:
        RecipeError: the format has no answers, or a row does not hold what it needs.
    """
    if form.name == "text":
        raise RecipeError("Plain text has no prompts and answers, so there is no exact match to count")
    found = []
    for numbered in _numbered(rows):
        parts = _parts(numbered, form, tokenizer)[-1]
        last = max(index for index, (_, learned) in enumerate(parts.pieces) if learned)
        prompt = parts.pieces[:last]
        ids, _ = _tokenise(Parts(prompt, parts.raw), tokenizer, closed=False)
        text = "".join(text for text, _ in prompt)
        found.append(Question(ids, text, _answer(numbered[1], form)))
    return found


def prompt_ids(prompt: str, tokenizer: Any) -> list[int]:
    """The tokens of a bare prompt, as training sees it."""
    return _tokenise(Parts([(prompt, False)]), tokenizer, closed=False)[0]


def chat_ids(messages: list[dict[str, str]], tokenizer: Any) -> list[int]:
    """The tokens of a conversation that the assistant is to continue."""
    text = _render(tokenizer, messages, 0, add_generation_prompt=True)
    return _tokenise(Parts([(text, False)], raw=False), tokenizer, closed=False)[0]


def fingerprint(found: Iterable[Example]) -> str:
    """A hash of all tokens and labels: equal exactly if a resumed run sees the same data."""
    digest = hashlib.sha256()
    for example in found:
        digest.update(len(example).to_bytes(8, "little"))
        digest.update(example.ids.numpy().tobytes())
        digest.update(example.labels.numpy().tobytes())
        digest.update(example.mark)
    return digest.hexdigest()


# --- formats -------------------------------------------------------------------------------------------------------


def _messages(row: tuple[int, Row], form: Format, tokenizer: Any) -> list[Parts]:
    number, values = row
    conversation = _conversation(number, values[form.columns["messages"]])
    whole = _render(tokenizer, conversation, number)
    turns = [index for index, message in enumerate(conversation) if message["role"] == "assistant"]
    if not turns:
        raise RecipeError(f"Row {number}: the conversation has no assistant turn to learn from")
    pieces: list[tuple[str, bool]] = []
    done = 0
    for index in turns:
        start, end = _turn(tokenizer, conversation, index, number)
        upto = _render(tokenizer, conversation[: index + 1], number)
        if not whole.startswith(upto) or start < done:
            # The template shows earlier turns otherwise than when they were written (some drop their reasoning):
            # learn each turn from the conversation as it stood then.
            return [_single_turn(tokenizer, conversation[: turn + 1], number) for turn in turns]
        pieces += [(whole[done:start], False), (whole[start:end], True)]
        done = end
    return [Parts([*pieces, (whole[done:], False)], raw=False)]


def _single_turn(tokenizer: Any, conversation: list[dict[str, Any]], number: int) -> Parts:
    start, end = _turn(tokenizer, conversation, len(conversation) - 1, number)
    text = _render(tokenizer, conversation, number)
    return Parts([(text[:start], False), (text[start:end], True)], raw=False)


def _turn(tokenizer: Any, conversation: list[dict[str, Any]], index: int, number: int) -> tuple[int, int]:
    """Where the assistant's turn ``index`` begins and ends in the text of the conversation up to it."""
    upto = _render(tokenizer, conversation[: index + 1], number)
    before = _render(tokenizer, conversation[:index], number, add_generation_prompt=True) if index else ""
    start = 0
    for ours, theirs in zip(before, upto, strict=False):
        if ours != theirs:
            break
        start += 1
    return start, len(upto)


def _prompt_completion(row: tuple[int, Row], form: Format, tokenizer: Any) -> list[Parts]:
    prompt, completion = (_text(row, form, role) for role in ("prompt", "completion"))
    return [Parts([(prompt, False), (completion, True)])]


def _instruction(row: tuple[int, Row], form: Format, tokenizer: Any) -> list[Parts]:
    instruction, output = _text(row, form, "instruction"), _text(row, form, "output")
    context = _text(row, form, "input", optional=True)
    middle = f"### Input:\n{context}\n\n" if context else ""
    prompt = f"### Instruction:\n{instruction}\n\n{middle}### Response:\n"
    return [Parts([(prompt, False), (output, True)])]


def _plain(row: tuple[int, Row], form: Format, tokenizer: Any) -> list[Parts]:
    return [Parts([(_text(row, form, "text"), True)], is_text=True)]


_Reader = Callable[[tuple[int, Row], Format, Any], list[Parts]]
_FORMATS: dict[str, tuple[tuple[str, ...], tuple[str, ...], _Reader]] = {
    "messages": (("messages",), (), _messages),
    "prompt_completion": (("prompt", "completion"), (), _prompt_completion),
    "instruction": (("instruction", "output"), ("input",), _instruction),
    "text": (("text",), (), _plain),
}


def _parts(row: tuple[int, Row], form: Format, tokenizer: Any) -> list[Parts]:
    return _FORMATS[form.name][2](row, form, tokenizer)


def _answer(row: Row, form: Format) -> str:
    if form.name == "messages":
        turns = [turn for turn in row[form.columns["messages"]] if turn["role"] == "assistant"]
        return str(turns[-1]["content"])
    return str(row[form.columns["completion" if form.name == "prompt_completion" else "output"]])


# --- tokens --------------------------------------------------------------------------------------------------------


def _tokenise(parts: Parts, tokenizer: Any, *, closed: bool = True) -> tuple[list[int], list[bool]]:
    ids: list[int] = []
    learned: list[bool] = []
    text = ""
    for piece, known in parts.pieces:
        if not piece:
            continue
        text += piece
        whole = _ids(tokenizer, text)
        # If the border falls inside a token of the whole, the piece stands alone: so it does when generating.
        new = whole[len(ids) :] if whole[: len(ids)] == ids else _ids(tokenizer, piece)
        ids += new
        learned += [known] * len(new)
    if parts.raw and _begins_with_bos(tokenizer):
        ids.insert(0, int(tokenizer.bos_token_id))
        learned.insert(0, False)
    if parts.raw and closed and tokenizer.eos_token_id is not None:
        ids.append(int(tokenizer.eos_token_id))
        learned.append(True)
    return ids, learned


def _ids(tokenizer: Any, text: str) -> list[int]:
    # verbose=False: a text longer than the model's context is cut later, which is no reason to warn.
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _begins_with_bos(tokenizer: Any) -> bool:
    bos = tokenizer.bos_token_id
    return bos is not None and list(tokenizer("a")["input_ids"])[:1] == [bos]


def _render(tokenizer: Any, conversation: list[dict[str, Any]], number: int, **options: Any) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise RecipeError(
            "The tokenizer has no chat template, which the format 'messages' needs; "
            "give the data as prompt and completion, or use a model that was made for chat"
        )
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(conversation, tokenize=False, **options))
    except (
        TemplateError,
        TypeError,
        ValueError,
        ArithmeticError,
        LookupError,
        AttributeError,
        RecursionError,
    ) as error:
        raise RecipeError(f"Row {number}: the chat template refuses the conversation: {error}") from None


# --- checks --------------------------------------------------------------------------------------------------------


def _numbered(rows: Iterable[Row]) -> Iterable[tuple[int, Row]]:
    return enumerate(rows, start=1)


def _text(row: tuple[int, Row], form: Format, role: str, *, optional: bool = False) -> str:
    number, values = row
    column = form.columns[role]
    value = values.get(column)
    if value is None and optional:
        return ""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)  # a table of answers that are numbers
    if not isinstance(value, str):
        raise RecipeError(f"Row {number}: column {column!r} holds {type(value).__name__}, not text")
    return value


def _conversation(number: int, value: Any) -> list[dict[str, Any]]:
    turns = list(value) if isinstance(value, (list, tuple)) else []
    if not turns or not all(isinstance(turn, Mapping) and {"role", "content"} <= set(turn) for turn in turns):
        raise RecipeError(f"Row {number}: a conversation is a list of {{role, content}}, got {str(value)[:80]!r}")
    # A table has every key in every turn; a template takes a key that is there for one that is meant.
    return [{key: item for key, item in turn.items() if item is not None} for turn in turns]


def _names(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))


def _listing(names: Iterable[str]) -> str:
    return f" Known: {', '.join(sorted(names))}."


def _near_columns(present: Sequence[str], roles: Iterable[str]) -> str:
    roles = list(roles)
    hints = [
        f"{column!r} is near{suggest(column, roles, limit=1)[13:-1]}" for column in present if suggest(column, roles)
    ]
    return f" {'; '.join(hints)}." if hints else ""
