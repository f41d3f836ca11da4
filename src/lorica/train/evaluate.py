"""How good a model is: the loss on completions, and how many answers are exactly right."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorica.train.collate import Batch, Collator, Sight, forward, seen, shared
from lorica.train.data import IGNORE, Example, Format, Question, questions
from lorica.train.ranks import Ranks


@dataclass(frozen=True)
class Answer:
    """One question of an exact-match evaluation."""

    prompt: str
    expected: str
    given: str

    @property
    def correct(self) -> bool:
        return self.given.strip() == self.expected.strip()


@dataclass(frozen=True)
class Matches:
    """All answers, in the order of the questions."""

    answers: list[Answer]

    @property
    def score(self) -> float:
        """The share of exactly right answers, 0 to 1."""
        return sum(answer.correct for answer in self.answers) / max(1, len(self.answers))


def token_losses(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
    """The summed cross-entropy (in nats, fp32) of a batch, and how many tokens it is over."""
    device = next(model.parameters()).device
    labels_BT = batch["labels"]
    images = {name: tensor.to(device) for name, tensor in seen(batch).items()}
    logits_BTV = forward(model, batch["input_ids"].to(device), batch["position_ids"].to(device), images)
    return summed_cross_entropy(logits_BTV, labels_BT.to(device)), int((labels_BT[:, 1:] != IGNORE).sum())


def summed_cross_entropy(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """The cross-entropy, in nats and fp32, summed over all tokens with a label; each is predicted from those before."""
    logits_NV, labels_N = logits_BTV[:, :-1].float().flatten(0, 1), labels_BT[:, 1:].flatten()
    return F.cross_entropy(logits_NV, labels_N, ignore_index=IGNORE, reduction="sum")


@torch.no_grad()
def loss(
    model: nn.Module,
    examples: Sequence[Example],
    *,
    batch_size: int = 8,
    pad_id: int = 0,
    stop: Callable[[], bool] = lambda: False,
    ranks: Ranks | None = None,
    measure: Callable[[Batch], Tensor] | None = None,
    sight: Sight | None = None,
) -> float:
    """The mean cross-entropy over all learned tokens of ``examples``; ``exp`` of it is the perplexity.

    ``stop`` is asked between batches; once it says so the result is NaN. ``ranks`` share the rows of each batch.
    ``measure`` gives a batch's summed cross-entropy where the model's own forward is of no use (a pipeline). ``sight``
    makes pixels of images.
    """
    collate, ranks = Collator(pad_id, sight=sight), ranks or Ranks()
    # Neighbours of like length need little padding; the mean does not depend on the order.
    ordered = sorted(examples, key=len)
    was_training = model.training
    model.eval()
    total, count = 0.0, 0.0
    try:
        for start in range(0, len(ordered), batch_size):
            if stop():
                return math.nan
            rows = shared([[item] for item in ordered[start : start + batch_size]], ranks.share)
            batch = collate(rows)
            total += float(measure(batch) if measure is not None else token_losses(model, batch)[0])
            count += int(batch["learned"])
    finally:
        model.train(was_training)
    total, count = ranks.total(torch.tensor([total, count], dtype=torch.float64)).tolist()
    return total / count if count else math.nan


def exact_match(
    model: nn.Module,
    tokenizer: Any,
    rows: Sequence[Mapping[str, Any]],
    *,
    form: Format | None = None,
    max_new_tokens: int | None = None,
    batch_size: int = 32,
    ranks: Ranks | None = None,
) -> Matches:
    """Let the model answer each row's prompt greedily and compare with the row's completion, white space aside.

    Args:
        rows: of a format with prompts (``form``; by default found from the first row's keys).
        max_new_tokens: by default a little more than the longest right answer takes.

    Raises:
        RecipeError: the rows have no prompts and answers.
    """
    asked = questions(rows, form or Format.detect(list(rows[0])), tokenizer) if rows else []
    if max_new_tokens is None:
        longest = max((len(tokenizer(question.answer)["input_ids"]) for question in asked), default=0)
        max_new_tokens = longest + 4
    prompts = [question.ids for question in asked]
    given = generate(model, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size, ranks=ranks)
    return Matches([Answer(q.prompt, q.answer, text) for q, text in zip(asked, given, strict=True)])


@torch.no_grad()
def generate(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int = 32,
    ranks: Ranks | None = None,
    **sampling: Any,
) -> list[str]:
    """Continue each tokenised prompt and return only the new text, in the order of ``prompts``.

    Replicas of the model (``ranks``) share the prompts; all ranks get all texts. Greedy unless ``sampling``
    (``do_sample``, ``temperature``, ``top_p``, ``top_k``) says otherwise.
    """
    options = {"do_sample": False, "num_beams": 1, **sampling}
    if not options["do_sample"]:
        # A model's own generation config may hold these; greedy decoding would warn about each.
        options |= {"temperature": None, "top_p": None, "top_k": None}
    device = next(model.parameters()).device
    pad = pad_id(tokenizer)
    ranks = ranks or Ranks()
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))[ranks.replica[0] :: ranks.replica[1]]
    texts: dict[int, str] = {}
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            ids_BT, mask_BT = _left_padded([prompts[index] for index in chosen], pad)
            out_BT = model.generate(  # type: ignore[operator]
                input_ids=ids_BT.to(device),
                attention_mask=mask_BT.to(device),
                max_new_tokens=max_new_tokens,
                pad_token_id=pad,
                eos_token_id=_ends(model, tokenizer),
                **options,
            )
            for index, row in zip(chosen, out_BT[:, ids_BT.shape[1] :].cpu(), strict=True):
                texts[index] = tokenizer.decode(row, skip_special_tokens=True)
    finally:
        model.train(was_training)
    texts = ranks.merged(texts)
    return [texts[index] for index in range(len(prompts))]


def pad_id(tokenizer: Any) -> int:
    """A token to fill rows with; masked wherever it stands, so any will do where the tokenizer has none."""
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if candidate is not None:
            return int(candidate)
    return 0


def _left_padded(prompts: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    width = max(map(len, prompts))
    ids_BT = torch.full((len(prompts), width), pad, dtype=torch.long)
    mask_BT = torch.zeros_like(ids_BT)
    for row, prompt in enumerate(prompts):
        ids_BT[row, width - len(prompt) :] = torch.tensor(list(prompt), dtype=torch.long)
        mask_BT[row, width - len(prompt) :] = 1
    return ids_BT, mask_BT


def _ends(model: nn.Module, tokenizer: Any) -> list[int] | None:
    """Every token at which an answer ends: the model's own and the tokenizer's, which training appends."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = {tokenizer.eos_token_id, *(own if isinstance(own, (list, tuple)) else [own])} - {None}
    return sorted(found) or None


__all__ = ["Answer", "Example", "Matches", "Question", "exact_match", "generate", "loss", "pad_id", "token_losses"]
