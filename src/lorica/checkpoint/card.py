"""The model card: facts in its head for the hub, a page for people that they may rewrite."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

from lorica.config import LoraConfig, TaskType
from lorica.errors import CheckpointError
from lorica.files.atomic import write_bytes
from lorica.files.opening import open_regular, read_fully, refuse_links_out
from lorica.files.yaml import parse_yaml

_LIBRARY = "peft"  # the hub's word for adapters in these files
_PIPELINES = {
    TaskType.CAUSAL_LM: "text-generation",
    TaskType.SEQ_CLS: "text-classification",
    TaskType.TOKEN_CLS: "token-classification",
    TaskType.QUESTION_ANS: "question-answering",
    TaskType.FEATURE_EXTRACTION: "feature-extraction",
}

_MAX_BYTES = 4 * 1024 * 1024
#: A head that is shorter and has none of these means little, and is not read twice.
_PLAIN_LENGTH, _NESTING = 1024, frozenset("&[{")

_PAGE = """\
# LoRA adapter for {base}

Low-rank factors for `{base}`, made with [lorica](https://pypi.org/project/lorica/).

| | |
|---|---|
| rank | {rank} |
| alpha | {alpha} |
| targets | {targets} |
| parameters that train | {trainable:,} of {total:,} |

## Use

```python
from transformers import AutoModelForCausalLM
from lorica import PeftModel  # or: from peft import PeftModel

model = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(model, "path/to/this/adapter")
```
"""


def write(path: Path, config: LoraConfig, *, trainable: int, total: int) -> None:
    """Write the card, or, where there is one, renew only the facts in its head."""
    from huggingface_hub import ModelCard

    try:
        text = _text(path) if os.path.lexists(path) else None
    except ValueError as error:
        warnings.warn(f"the model card stays as it is: {path}: {error}", stacklevel=2)
        return
    page = None if text is None else ModelCard(text)
    if page is None:
        base = config.base_model_name_or_path or "the base model"
        names = config.target_modules
        text = _PAGE.format(
            base=base,
            rank=config.r,
            alpha=config.lora_alpha,
            targets=f"`{names}`" if isinstance(names, str) else ", ".join(f"`{name}`" for name in sorted(names or ())),
            trainable=trainable,
            total=total,
        )
        page = ModelCard(f"---\nlibrary_name: {_LIBRARY}\n---\n{text}")
    _renew(page.data, config)
    write_bytes(path, str(page).encode())


def _text(path: Path) -> str:
    """Return a card, which a stranger may have put there: a page of this directory with a small head.

    Raises:
        ValueError: it is none; of lorica's errors, CheckpointError.
    """
    refuse_links_out(path)
    with open_regular(path) as file:
        text = read_fully(file, _MAX_BYTES + 1).decode()
    if len(text) > _MAX_BYTES:
        raise CheckpointError(f"more than {_MAX_BYTES:,} bytes")
    head = text[3:].partition("\n---")[0] if text.startswith("---") else ""
    if len(head) > _PLAIN_LENGTH or not _NESTING.isdisjoint(head):
        parse_yaml(head)  # which bounds its depth, and what aliases make of it
    return text


def _renew(data: Any, config: LoraConfig) -> None:
    base = config.base_model_name_or_path
    data.library_name = _LIBRARY
    tags = {*(getattr(data, "tags", None) or []), "lora", "lorica"}
    if base:
        data.base_model = base
        tags.add(f"base_model:adapter:{base}")
    data.tags = sorted(tags)
    if config.task_type is not None and not getattr(data, "pipeline_tag", None):
        data.pipeline_tag = _PIPELINES.get(TaskType(config.task_type))
