"""Using what was trained: ``lorica generate`` and ``lorica eval``."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorica.cli import launch
from lorica.cli.errors import note, quiet, readable
from lorica.errors import RecipeError, suggest_path

if TYPE_CHECKING:
    from lorica.train.ranks import Ranks
    from lorica.train.recipe import ParallelSection

Model = Annotated[str, typer.Argument(help="A model (directory or hub name), or an adapter that names its base model.")]
Adapter = Annotated[str | None, typer.Option("--adapter", "-a", help="An adapter to put on the model.")]
Dtype = Annotated[str, typer.Option(help="Precision of the base weights: auto, float32, bfloat16, float16.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps, ...")]
Parallel = Annotated[
    str, typer.Option(help="How it lies over ranks, as in a recipe: tp=2,dp=2. Starts them, unless torchrun did.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@readable
def generate(
    model: Model,
    prompts: Annotated[list[str] | None, typer.Argument(metavar="[PROMPT]...", help="Texts to continue.")] = None,
    adapter: Adapter = None,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", help="Prompts: one per line, or .jsonl with a column 'prompt'.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Ask through the model's chat template.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Sample from this much probability.")] = 1.0,
    seed: Annotated[int, typer.Option(help="For sampling.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    dtype: Dtype = "auto",
    device: Device = "auto",
    parallel: Parallel = "",
    as_json: AsJson = False,
) -> None:
    """Continue prompts with a model, with or without an adapter."""
    asked = [*(prompts or []), *(_read_prompts(file) if file is not None else [])]
    if not asked:
        raise RecipeError("nothing to continue: give prompts, or a file with --file")
    section = _spread(parallel, device, whole="generate")
    loaded, tokenizer, joined = _load(model, adapter, dtype, device, section)
    import torch

    from lorica.train import data, evaluate

    torch.manual_seed(seed)
    sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature else {}

    def encode(text: str) -> list[int]:
        if chat:
            return data.chat_ids([{"role": "user", "content": text}], tokenizer)
        return data.prompt_ids(text, tokenizer)

    answers = evaluate.generate(
        loaded,
        tokenizer,
        [encode(text) for text in asked],
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        ranks=joined,
        **sampling,
    )
    for prompt, answer in zip(asked, answers, strict=True):
        if as_json:
            print(json.dumps({"prompt": prompt, "completion": answer}, ensure_ascii=False))
        elif len(asked) == 1:
            print(answer)
        else:
            print(f"> {prompt}\n{answer}\n")


@readable
def evaluate(
    model: Model,
    source: Annotated[str, typer.Option("--data", "-d", help="A data file, or a dataset on the hub.")],
    adapter: Adapter = None,
    split: Annotated[str, typer.Option(help="Split or slice of the data.")] = "train",
    form: Annotated[
        str, typer.Option("--format", help="auto, messages, prompt_completion, instruction, text.")
    ] = "auto",
    column: Annotated[
        list[str] | None, typer.Option(help="Another name of a column, as in prompt=question; may be repeated.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first rows.")] = None,
    max_length: Annotated[int | None, typer.Option(min=2, help="Tokens per example.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer.")] = None,
    exact_match: Annotated[bool, typer.Option(help="Let the model answer, and count right answers.")] = True,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    dtype: Dtype = "auto",
    device: Device = "auto",
    parallel: Parallel = "",
    as_json: AsJson = False,
) -> None:
    """Measure loss and perplexity on completions and, where there are answers, exact match."""
    from lorica.train import data, models, pipeline, sources
    from lorica.train import evaluate as measure
    from lorica.train.recipe import parse

    columns = dict(_pair(item) for item in column or [])
    section = {"train": source, "split": split, "format": form, "columns": columns, "max_length": max_length}
    recipe = parse({"model": {"path": model, "dtype": dtype}, "data": section}, source="lorica eval")
    answers = exact_match and form != "text"
    spread = _spread(parallel, device, whole="answer (--no-exact-match only measures the loss)" if answers else None)
    quiet()
    table = sources.rows(source, split=split)
    table = table.select(range(min(limit, len(table)))) if limit else table
    format_ = sources.form_of(table, recipe.data)
    base, adapter, revision = resolve(model, adapter)
    length = models.max_length(base, revision, max_length)
    loaded, tokenizer, joined = _load(model, adapter, dtype, device, spread)
    examples, left_out = data.examples(table, format_, tokenizer, length)
    if not examples:
        raise RecipeError(f"{source}: no example has anything to predict within {length} tokens")
    if left_out:
        note(f"{left_out} of {len(table)} rows have nothing to predict within {length} tokens and are left out.")
    pad = measure.pad_id(tokenizer)
    piped = pipeline.measure_of(loaded, pad)
    loss = measure.loss(loaded, examples, batch_size=batch_size, pad_id=pad, ranks=joined, measure=piped)
    result: dict[str, Any] = {"rows": len(table), "loss": loss, "perplexity": math.exp(min(loss, 700.0))}
    if exact_match and format_.name != "text":
        found = measure.exact_match(
            loaded,
            tokenizer,
            list(table),
            form=format_,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            ranks=joined,
        )
        result["exact_match"] = found.score
    if as_json:
        print(json.dumps(result))
        return
    _table(result)


def resolve(model: str, adapter: str | None) -> tuple[str, str | None, str | None]:
    """Base model, adapter and the base's revision; a model that is an adapter names its own base."""
    from lorica.train import models

    directory = Path(model).expanduser()
    if (directory / "adapter_config.json").is_file() and not (directory / "config.json").is_file():
        if adapter is not None and Path(adapter) != Path(model):
            raise RecipeError(f"{model} is an adapter, not a model that --adapter could be put on")
        base, revision = models.base_of(model)
        return base, model, revision
    if adapter is not None:
        models.check_adapter(adapter)
    return model, adapter, None


def load(model: str, adapter: str | None, dtype: str, device: str) -> tuple[Any, Any]:
    """The model with the adapter, if any, and its tokenizer."""
    from lorica.train.recipe import ParallelSection

    loaded, tokenizer, _ = _load(model, adapter, dtype, device, ParallelSection())
    return loaded, tokenizer


def _load(model: str, adapter: str | None, dtype: str, device: str, section: ParallelSection) -> tuple[Any, Any, Ranks]:
    """The model, cut as ``section`` says, its tokenizer, and this rank."""
    from lorica.train import layouts, models, ranks

    quiet()
    base, adapter, revision = resolve(model, adapter)
    check_dtype(dtype)
    where = ranks.device(device)
    joined = ranks.join(section, where)
    tokenizer = models.load_tokenizer(base, revision)
    loaded = layouts.load_base(section, joined, where, base, dtype=dtype, revision=revision)
    return (models.load_adapted(loaded, adapter) if adapter is not None else loaded.eval()), tokenizer, joined


def _spread(text: str, device: str, *, whole: str | None = None) -> ParallelSection:
    """Start the ranks that ``text`` asks for, if it does; ``whole`` is what a pipeline's stages cannot do."""
    from lorica.train.recipe import parse_parallel

    section = parse_parallel(text)
    if whole is not None and section.pp > 1:
        raise RecipeError(f"--parallel: stages of a pipeline cannot {whole}; use tp, fsdp or dp")
    launch.spread(section, device)
    return section


def check_dtype(dtype: str) -> None:
    """Refuse what is no ``--dtype``."""
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise RecipeError(f"--dtype: expected auto, float32, bfloat16 or float16, got {dtype!r}")


def _read_prompts(file: Path) -> list[str]:
    if not file.is_file():
        raise RecipeError(f"There is no file {file}.{suggest_path(file)}")
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    if file.suffix != ".jsonl":
        return lines
    return [_prompt(file, number, line) for number, line in enumerate(lines, start=1)]


def _prompt(file: Path, number: int, line: str) -> str:
    try:
        return str(json.loads(line)["prompt"])
    except (ValueError, KeyError, TypeError):
        raise RecipeError(f"{file}, line {number}: not a JSON object with 'prompt'") from None


def _pair(item: str) -> tuple[str, str]:
    role, equals, name = item.partition("=")
    if not equals:
        raise RecipeError(f"--column: expected role=name, got {item!r}")
    return role, name


def _table(result: dict[str, Any]) -> None:
    for key, value in result.items():
        shown = f"{value:.2%}" if key == "exact_match" else f"{value:.4f}" if isinstance(value, float) else str(value)
        print(f"{key.replace('_', ' '):<12}  {shown}")
