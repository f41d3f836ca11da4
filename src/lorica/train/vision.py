"""Rows with images: read by the model's own processor, tokenised like any other, their pixels made when they are
needed.

The processor says how many tokens an image takes and where they stand. Apart from that an example is made as ever: the
formats ask for the tokens of pieces of text, and :class:`Seeing` answers with those of the images among them.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorica.errors import RecipeError, suggest, suggest_path
from lorica.targets.roles import Role, check_sees, outermost
from lorica.targets.walk import tied_with_embedding
from lorica.train import data
from lorica.train.data import Example, Format, Row
from lorica.train.recipe import LoraSection, VisionSection

#: What a processor says of each token rather than of images; worked out from the tokens themselves.
_OF_TOKENS = ("token_type_ids", "mm_token_type_ids")


class Sight:
    """How the images of a data set are seen.

    Args:
        processor: transformers' processor of the model.
        token_id: the token that stands for a piece of an image in the model.
        column: the column with the images of a row.

    Raises:
        RecipeError: the processor has no token that stands for an image.
    """

    def __init__(self, processor: Any, token_id: int, column: str) -> None:
        self.processor, self.token_id, self.column = processor, token_id, column
        placeholder = getattr(processor, "boi_token", None) or getattr(processor, "image_token", None)
        tokenizer = processor.tokenizer
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        if placeholder is None:
            raise RecipeError(
                f"{type(processor).__name__} has no token that stands for an image, so rows cannot say where"
            )
        self.placeholder = str(placeholder)

    def examples(self, table: Any, form: Format, max_length: int) -> tuple[list[Example], int]:
        """Tokenise rows; as :func:`lorica.train.data.examples`, whose errors it has.

        Returns:
            the examples, and how many rows are left out: nothing to learn, or an image, lies beyond ``max_length``.
        """
        if form.name == "text":
            raise RecipeError("Plain text is cut into pieces, which images cannot be: give them with another format")
        if self.column not in table.column_names:
            near = suggest(self.column, table.column_names)
            raise RecipeError(f"vision.images: there is no column {self.column!r}.{near}")
        found: list[Example] = []
        left_out = 0
        for index in range(len(table)):
            row = table[index]
            images = self._images(row, index + 1)
            seeing = Seeing(self, images)
            new = data.encode((index + 1, seeing.placed(row, form)), form, seeing, max_length)
            new = [example for example in new if self._sees_all(example, images, seeing)]
            left_out += not new
            mark = b"".join(map(_mark, images))
            load = partial(self._images_at, table, index)
            found += [replace(example, images=load, mark=mark) for example in new]
        return found, left_out

    def together(self, examples: Sequence[Example], ids_BT: Tensor) -> dict[str, Tensor]:
        """Return what the model takes besides tokens, for a batch of examples in the order of its rows.

        Args:
            examples: one for each row.
            ids_BT: their tokens, padded on the right.
        """
        images = [example.images() if example.images is not None else [] for example in examples]
        lengths = torch.tensor([len(example) for example in examples])
        there_BT = torch.arange(ids_BT.shape[1]).expand(ids_BT.shape) < lengths[:, None]
        seen: dict[str, Tensor] = {"attention_mask": there_BT.long()}
        made = self._process([self.placeholder * len(of_row) for of_row in images], images)
        names = set(made) - {"input_ids", "attention_mask"}
        seen |= {name: made[name] for name in names if name not in _OF_TOKENS}
        return seen | {name: ids_BT.eq(self.token_id).long() for name in names if name in _OF_TOKENS}

    def _process(self, texts: list[str], images: list[list[Any]]) -> Mapping[str, Any]:
        given = images if any(images) else None
        made: Mapping[str, Any] = self.processor(
            text=texts, images=given, padding=True, return_tensors="pt", add_special_tokens=False
        )
        return made

    def _sees_all(self, example: Example, images: Sequence[Any], seeing: Seeing) -> bool:
        return not images or int(example.ids.eq(self.token_id).sum()) == seeing.tokens_of_images

    def _images_at(self, table: Any, index: int) -> list[Any]:
        return self._images(table[index], index + 1)

    def _images(self, row: Row, number: int) -> list[Any]:
        value = row[self.column]
        many = value if isinstance(value, list | tuple) else [] if value is None else [value]
        return [_opened(one, f"Row {number}: column {self.column!r}") for one in many]


class Seeing:
    """A tokenizer for one row: the tokens of a text are those of the images in it too.

    Args:
        sight: how images are seen.
        images: of the row.
    """

    def __init__(self, sight: Sight, images: list[Any]) -> None:
        self._sight, self._images = sight, images
        tokenizer = sight.processor.tokenizer
        self.bos_token_id, self.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        self.chat_template = getattr(sight.processor, "chat_template", None) or tokenizer.chat_template
        self.tokens_of_images = 0

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        """Return the tokens of a piece of text, of which the first so many images are that it has places for."""
        count = text.count(self._sight.placeholder)
        if not count:
            return {"input_ids": list(self._sight.processor.tokenizer(text, **options)["input_ids"])}
        if count > len(self._images):
            raise RecipeError(
                f"a text has places for {count} images, and the row has {len(self._images)}: {text[:80]!r}"
            )
        made = self._sight.processor(
            text=[text], images=[self._images[:count]], return_tensors="pt", add_special_tokens=False
        )
        ids: list[int] = made["input_ids"][0].tolist()
        self.tokens_of_images = max(self.tokens_of_images, ids.count(self._sight.token_id))
        return {"input_ids": ids}

    def apply_chat_template(self, conversation: list[dict[str, Any]], **options: Any) -> str:
        """Write a conversation out, with a place for each image."""
        template = getattr(self._sight.processor, "chat_template", None)
        owner = self._sight.processor if template else self._sight.processor.tokenizer
        return str(owner.apply_chat_template(conversation, **options))

    def placed(self, row: Row, form: Format) -> Row:
        """Return the row with places for its images in front of its first words, where it has none."""
        if not self._images:
            return row
        if form.name == "messages":
            return _with_images_in_front(row, form.columns["messages"], len(self._images), self._sight.placeholder)
        column = form.columns["prompt" if form.name == "prompt_completion" else "instruction"]
        text, place = row[column], self._sight.placeholder
        if not isinstance(text, str) or place in text:
            return row
        return {**row, column: place * len(self._images) + "\n" + text}


def _with_images_in_front(row: Row, column: str, count: int, place: str) -> Row:
    turns = [dict(turn) for turn in row[column] or ()]
    if any(_has_image(turn.get("content"), place) for turn in turns):
        return row
    for turn in turns:
        if turn.get("role") == "user":
            words = turn["content"]
            said = [{"type": "text", "text": words}] if isinstance(words, str) else list(words)
            turn["content"] = [{"type": "image"}] * count + said
            break
    return {**row, column: turns}


def _has_image(content: Any, place: str) -> bool:
    if isinstance(content, str):
        return place in content
    return any(isinstance(piece, Mapping) and piece.get("type") == "image" for piece in content or ())


def _opened(value: Any, where: str) -> Any:
    """Return an image, given it, its bytes, or the path of its file (relative to the working directory)."""
    from PIL import Image, UnidentifiedImageError

    if isinstance(value, Image.Image):
        return value.convert("RGB")
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str):
        file = Path(value).expanduser()
        if not file.is_file():
            raise RecipeError(f"{where}: there is no image {value}.{suggest_path(file)}")
        value = file.read_bytes()
    if not isinstance(value, bytes):
        raise RecipeError(f"{where} holds {type(value).__name__}, which is no image, nor bytes or the path of one")
    try:
        return Image.open(io.BytesIO(value)).convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise RecipeError(f"{where}: the image cannot be read: {error}") from None


def _mark(image: Any) -> bytes:
    return hashlib.blake2b(image.tobytes() + str(image.size).encode(), digest_size=16).digest()


# --- the model -----------------------------------------------------------------------------------------------------


def divide(base: nn.Module, section: VisionSection, lora: LoraSection) -> tuple[LoraSection, list[str]]:
    """Work out which parts of a model are adapted, trained fully or left as they are.

    Args:
        base: the model.
        section: which parts are frozen, and which have adapters.
        lora: the adapter.

    Returns:
        the adapter with these parts left out and trained, and what the user should know.

    Raises:
        RecipeError: the model does not see, or ``exclude_modules`` is a pattern that cannot be added to.
    """
    try:
        check_sees(base)
    except ValueError as error:
        raise RecipeError(f"vision: {error}") from error
    thawed = {role for role, frozen in section.frozen.items() if not frozen}
    if "language_model" in thawed and (tied := tied_with_embedding(base)) is not None:
        raise RecipeError(
            f"vision.freeze_language_model: {tied[1]} share the weight of {tied[0]}, and a part that trains is a copy, "
            "so they would come apart; keep it frozen, and train the embedding by lora.modules_to_save with "
            "lora.ensure_weight_tying"
        )
    every: tuple[Role, ...] = ("vision_model", "vision_projection", "language_model", "other")
    left = [role for role in every if role not in thawed and role not in section.adapters]
    whole, untouched = outermost(base, thawed), outermost(base, left)
    if isinstance(lora.exclude_modules, str) and untouched.modules:
        raise RecipeError(
            "lora.exclude_modules: with a vision section it is a list of names, to which those parts are added that "
            "have no adapters"
        )
    excluded = [*(lora.exclude_modules or ()), *(f"{name}*" for name in untouched.modules)]
    saved = [*(lora.modules_to_save or ()), *whole.modules]
    notes = [
        f"{name} stays frozen: it is a parameter and no module, so it cannot be saved with an adapter."
        for name in whole.parameters
    ]
    return lora.model_copy(update={"exclude_modules": excluded or None, "modules_to_save": saved or None}), notes
