"""The demonstration: ``make demo``, or ``python demo/run.py``.

A small language model is asked to turn order notes into JSON, before and after it is fine-tuned with LoRA on
four thousand examples. Everything it needs lies in this folder; nothing is fetched.
"""

from __future__ import annotations

import os

os.environ |= dict.fromkeys(("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"), "1")
os.environ |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lorica import train
from lorica.cli.errors import quiet
from lorica.errors import LoricaError
from lorica.train import evaluate, models
from lorica.train.evaluate import Matches

ROOT = Path(__file__).resolve().parent.parent
RECIPE = "demo/recipe.yaml"
SHOWN = 4  # example answers

console = Console(highlight=False)


def main() -> int:
    """Run everything; return the exit status."""
    os.chdir(ROOT)  # the recipe's paths start there
    started = time.perf_counter()
    quiet()
    try:
        run(started)
    except LoricaError as error:
        console.print(f"[bold red]The demonstration failed:[/] {error}")
        return 1
    return 0


def run(started: float) -> None:
    """Evaluate, train, evaluate, merge, check, report."""
    recipe = train.load(RECIPE)
    output = recipe.output
    rows = [json.loads(line) for line in Path(str(recipe.data.eval)).read_text(encoding="utf-8").splitlines()]
    tokenizer = models.load_tokenizer(recipe.model.path)

    step(f"Asking the base model {len(rows)} held-out questions")
    base = models.load_base(recipe.model.path)
    before = evaluate.exact_match(base, tokenizer, rows)
    console.print(f"{before.score:.1%} of its answers are exactly right.")

    step("Fine-tuning with LoRA")
    shutil.rmtree(output, ignore_errors=True)
    result = train.run(recipe)

    step("Asking again, with the adapter")
    adapted = models.load_adapted(base, str(result.adapter))
    after = evaluate.exact_match(adapted, tokenizer, rows)
    console.print(f"{after.score:.1%} of its answers are exactly right.")

    step("Merging the adapter into the base model")
    merged = merge(adapted, tokenizer, output / "merged")
    again = evaluate.exact_match(models.load_base(str(merged)), tokenizer, rows)
    changed = sum(one != other for one, other in zip(again.answers, after.answers, strict=True))
    # Merging rounds the weights once more, which can tip an answer that hung in the balance; more would be a fault.
    if changed > len(rows) // 50:
        raise LoricaError(f"the merged model answers {changed} of {len(rows)} questions otherwise than the adapter")
    console.print(f"Loaded as a plain transformers model, it gives {len(rows) - changed} of {len(rows)} answers alike.")

    summary = {
        "exact_match_before": before.score,
        "exact_match_after": after.score,
        "loss_before": result.eval_loss_before,
        "loss_after": result.eval_loss_after,
        "seconds": round(time.perf_counter() - started, 1),
        "training_seconds": round(result.seconds, 1),
        "steps": result.steps,
        "adapter": str(result.adapter),
        "merged_model": str(merged),
        "loss_curve": str(result.plot),
        "metrics": str(result.metrics),
    }
    (output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    show_answers(before, after)
    show_summary(summary, output / "summary.json")


def merge(adapted: Any, tokenizer: Any, directory: Path) -> Path:
    """Fold the adapter into the base weights and write a model that needs no lorica."""
    adapted.merge_and_unload().save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def step(title: str) -> None:
    """Announce what comes next."""
    console.rule(f"[bold]{title}", align="left")


def show_answers(before: Matches, after: Matches) -> None:
    """Print a few questions with the base model's answer, the tuned one's, and the right one where it differs."""
    step("Some answers")
    for old, new in list(zip(before.answers, after.answers, strict=True))[:SHOWN]:
        console.print(Text(old.prompt.strip(), style="bold"))
        console.print(Text(f"  before  {shortened(old.given)}", style="red"))
        console.print(Text(f"  after   {shortened(new.given)}", style="green" if new.correct else "yellow"))
        if not new.correct:
            console.print(Text(f"  right   {new.expected}"))
        console.print()


def shortened(text: str, width: int = 100) -> str:
    """Return ``text`` on one line of at most ``width`` characters."""
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"


def show_summary(summary: dict[str, Any], file: Path) -> None:
    """Print the table that ends the demonstration."""
    table = Table(title="Held-out order notes")
    for title in ("", "before", "after"):
        table.add_column(title, justify="right" if title else "left")
    table.add_row("exact match", f"{summary['exact_match_before']:.1%}", f"{summary['exact_match_after']:.1%}")
    table.add_row("loss (nats per token)", f"{summary['loss_before']:.3f}", f"{summary['loss_after']:.3f}")
    console.print(table)
    for name in ("adapter", "merged_model", "loss_curve", "metrics"):
        console.print(f"{name.replace('_', ' '):13} {summary[name]}")
    console.print(f"{'summary':13} {file}")
    console.print(f"{summary['seconds']:.0f} seconds in all, {summary['training_seconds']:.0f} of them training.")


if __name__ == "__main__":
    sys.exit(main())
