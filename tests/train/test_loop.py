"""One optimiser step is the step of the whole accumulated batch, however it is cut up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import lorica
import runs
from lorica.errors import LayoutError
from lorica.train import collate, evaluate, job, loop, metrics, optim, recipe, state
from lorica.train.collate import Batches, Collator
from lorica.train.data import IGNORE, Example


def documents(count: int) -> list[Example]:
    """Of very different numbers of learned tokens, so that a mean of means would be wrong."""
    found = []
    for index in range(count):
        ids = torch.randint(6, 300, (12,), dtype=torch.int32)
        labels = ids.clone()
        labels[: 11 - 3 * (index % 4)] = IGNORE
        found.append(Example(ids, labels))
    return found


def trainer(
    rows: list[Example], *, batch: int, accumulation: int, adapter: dict[str, Any] | None = None, **settings: Any
) -> loop.Trainer:
    torch.manual_seed(0)
    fields = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False, **(adapter or {})}
    config = lorica.LoraConfig(task_type="CAUSAL_LM", **fields)
    model = lorica.get_peft_model(runs.llama(), config)
    chosen = recipe.TrainingSection(
        batch_size=batch, gradient_accumulation=accumulation, schedule="constant", warmup_steps=0, **settings
    )
    optimizer = optim.optimizer(model, chosen)
    batches = Batches([[row] for row in rows], Collator(0), batch, seed=5)
    live = state.Live(model, optimizer, optim.schedule(optimizer, chosen, 10), batches, state.Progress())
    return loop.Trainer(live, chosen, [], 0)


def factors(run: loop.Trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in run.live.model.named_parameters() if p.requires_grad}


def test_accumulated_batches_make_the_same_step_as_one_large_batch() -> None:
    rows = documents(8)
    one, four = (trainer(rows, batch=b, accumulation=a, learning_rate=1e-3) for b, a in ((4, 1), (1, 4)))
    for _ in range(2):
        first, second = one.step(), four.step()
        assert (first.learned, first.tokens) == (second.learned, second.tokens)
        assert float(first.loss) == pytest.approx(float(second.loss), rel=1e-6)
        assert float(first.norm) == pytest.approx(float(second.norm), rel=1e-5)
    for name, expected in factors(one).items():
        torch.testing.assert_close(factors(four)[name], expected, rtol=0, atol=1e-6)


def test_the_loss_of_a_variant_counts_once_in_a_step() -> None:
    """However many batches are accumulated: with nothing to learn the step is that of the penalty alone."""
    rows, kasa = documents(8), {"kasa_config": {"beta": 0.5, "gamma": 0.5}}
    rows = [Example(row.ids, torch.full_like(row.labels, IGNORE)) for row in rows]
    settings = {"learning_rate": 1e-3, "optimizer": "adamw", "weight_decay": 0.0, "max_grad_norm": 1e9}
    one, four = (trainer(rows, batch=b, accumulation=a, adapter=kasa, **settings) for b, a in ((4, 1), (1, 4)))
    penalty = one.live.model._get_kasa_loss()
    penalty.backward()
    wanted = torch.nn.utils.get_total_norm([p.grad for p in one.live.model.parameters() if p.grad is not None])
    one.live.model.zero_grad()
    for run in (one, four):
        step = run.step()
        assert float(step.loss) == 0
        assert float(step.norm) == pytest.approx(float(wanted), rel=1e-5)
        assert float(run.live.model._get_kasa_loss().detach()) < float(penalty.detach())


def test_stages_of_a_pipeline_cannot_add_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop.layouts, "stages", lambda model: "some")
    monkeypatch.setattr(loop, "Pipelines", lambda *given: given)
    with pytest.raises(LayoutError, match="kasa_config"):
        trainer(documents(1), batch=1, accumulation=1, adapter={"kasa_config": {}})
    trainer(documents(1), batch=1, accumulation=1)


def test_the_loss_is_the_mean_over_all_learned_tokens() -> None:
    rows = documents(4)
    run = trainer(rows, batch=1, accumulation=4)
    expected = evaluate.loss(run.live.model, rows)
    step = run.step()
    assert float(step.loss) / step.learned == pytest.approx(expected, rel=1e-6)
    assert step.learned == sum(int((row.labels != IGNORE).sum()) for row in rows)
    assert step.tokens == sum(map(len, rows))


def test_gradients_are_scaled_down_to_the_norm() -> None:
    rows = documents(4)
    free, bound = (trainer(rows, batch=4, accumulation=1, max_grad_norm=norm) for norm in (None, 1e-3))
    seen = []
    for run in (free, bound):
        run.live.optimizer.zero_grad = lambda **_: None  # type: ignore[method-assign]
        norm = float(run.step().norm)
        left = torch.nn.utils.get_total_norm([p.grad for p in run.live.model.parameters() if p.grad is not None])
        seen.append((norm, float(left)))
    assert seen[0][0] == pytest.approx(seen[0][1], rel=1e-5)
    assert seen[1][0] == pytest.approx(seen[0][0], rel=1e-5)
    assert seen[1][1] == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.parametrize("kind", ["reentrant", "non_reentrant"])
def test_gradient_checkpointing_changes_no_gradient(kind: str) -> None:
    rows = documents(4)
    plain, saving = (trainer(rows, batch=4, accumulation=1, learning_rate=1e-3) for _ in range(2))
    job._checkpoint_gradients(saving.live.model, kind)
    # transformers checkpoints only while training
    plain.live.model.train()
    saving.live.model.train()
    plain.step()
    saving.step()
    for name, expected in factors(plain).items():
        torch.testing.assert_close(factors(saving)[name], expected, rtol=0, atol=1e-6)


def test_a_loss_that_is_no_number_stops_the_run_and_is_not_saved(base: Path, data_file: Path, tmp_path: Path) -> None:
    values = runs.settings(base, data_file, tmp_path / "out", training__learning_rate=1e30)
    values["training"] |= {"max_grad_norm": None, "warmup_steps": 0}
    with pytest.raises(loop.DivergedError, match="step"):
        job.run(recipe.parse(values), progress=False, notify=lambda _: None)
    for checkpoint in state.complete(tmp_path / "out"):
        state.read_numbers(checkpoint)
    assert all(record["loss"] == record["loss"] for record in metrics.read(tmp_path / "out" / "metrics.jsonl"))


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
def test_a_run_learns(base: Path, data_file: Path, tmp_path: Path, packing: bool, bf16: bool) -> None:
    changes = {"data__packing": packing, "training__bf16": bf16, "training__steps": 25}
    values = runs.settings(base, data_file, tmp_path / "out", **changes, checkpoint={"every": None, "keep": 1})
    values["training"]["loraplus_lr_ratio"] = 4
    values["data"]["max_length"] = 40
    values["training"]["eval_every"] = None  # before and after all the same
    result = job.run(recipe.parse(values), progress=False, notify=lambda _: None)
    assert result.eval_loss_before is not None
    assert result.eval_loss_after is not None
    assert result.eval_loss_after < 0.8 * result.eval_loss_before
    assert result.plot.read_bytes().startswith(b"\x89PNG")
    assert {p.name for p in result.adapter.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
    }
    assert [path.name for path in state.complete(result.output_dir)] == ["step-000025"]


def test_packing_is_refused_where_documents_would_mix(
    base: Path, data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collate, "takes_positions", lambda model: False)
    values = runs.settings(base, data_file, tmp_path / "out", data__packing=True)
    with pytest.raises(lorica.errors.RecipeError, match="packed examples see each other"):
        job.run(recipe.parse(values), progress=False)
    assert not (tmp_path / "out").exists()
