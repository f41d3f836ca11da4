"""What one process gives for a case of the contract: worked out once, kept in a file, read by all ranks."""

from __future__ import annotations

import fcntl
from collections.abc import Iterable
from pathlib import Path

import ranks
import torch
from contract import ROWS, Oracle, adapted, base_weights, config_of, entries, gradients, sgd, wholes
from contract_cases import Case, cases
from divisions import DIVISIONS, Plain
from subjects import SUBJECTS, Subject, batch, logits_of, loss_of
from torch import Tensor, nn

import lorica
from lorica.errors import AdapterError
from lorica.variants import VARIANTS, variant_of


def oracle(subject: Subject, case: Case, data: int) -> Oracle:
    """Work out what one process gives.

    Args:
        subject: the model.
        case: the adapter.
        data: how many data groups divide a batch; the mean of their losses is trained on.
    """
    model = adapted(subject, case)
    if not isinstance(model, nn.Module):
        return Oracle(refusal=model)
    run, found = Plain(model), Oracle(start=wholes(entries(model)))
    groups = batch(ROWS).chunk(data)
    if case.start:
        found.output = [run.logits(rows) for rows in groups]
        return found
    if VARIANTS[variant_of(config_of(subject, case))].subtracts:
        with model.disable_adapter():
            found.left = [run.logits(rows) for rows in groups]
    found.filled = learned(found.start)
    lorica.set_peft_model_state_dict(model, found.filled)
    _train(model, found, data)
    if case.oracle:
        _merge(model, found, groups)
    return found


def learned(start: dict[str, Tensor]) -> dict[str, Tensor]:
    """Values like those of an adapter that has learned."""
    generator = torch.Generator().manual_seed(3)
    return {name: start[name] + 0.1 * torch.randn(start[name].shape, generator=generator) for name in sorted(start)}


def _train(model: nn.Module, found: Oracle, data: int) -> None:
    """Two steps on different batches."""
    model.train()
    optimizer = sgd(model)
    for step in range(2):
        optimizer.zero_grad()
        groups = batch(ROWS, seed=step).chunk(data)
        outputs = [logits_of(model(input_ids=rows)) for rows in groups]
        losses = [loss_of(logits, rows) for logits, rows in zip(outputs, groups, strict=True)]
        torch.stack(losses).mean().backward()
        if step == 0:
            found.trained = [logits.detach() for logits in outputs]
            found.losses = [loss.detach() for loss in losses]
            found.gradients = wholes(gradients(model))
            found.norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        optimizer.step()
    found.stepped = wholes(entries(model))


def _merge(model: nn.Module, found: Oracle, groups: Iterable[Tensor]) -> None:
    """Into the base weights, or why not."""
    model.eval()
    found.learned = [Plain(model).logits(rows) for rows in groups]
    found.weights = wholes(base_weights(model))
    try:
        model.merge_adapter()
    except AdapterError as refusal:
        found.merged = refusal
    else:
        found.merged = wholes(base_weights(model))


def kept(folder: Path, subject: str, names: Iterable[str], data: int) -> dict[str, Path]:
    """Work out the cases that are not in the folder yet, in a process of its own. Return where they are.

    Two workers never work out the same.
    """
    files = {name: folder / f"{subject} {data} {name}.pt" for name in names}
    with open(folder / f"{subject} {data}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if missing := {name: file for name, file in files.items() if not file.exists()}:
            ranks.run(1, _keep, subject, missing, data)
    return files


def _keep(subject: str, missing: dict[str, Path], data: int) -> None:
    known = {name: case for division in DIVISIONS for name, case in cases(division, subject).items()}
    for name, file in missing.items():
        unfinished = file.with_suffix(".new")
        torch.save(oracle(SUBJECTS[subject], known[name], data), unfinished)
        unfinished.rename(file)
