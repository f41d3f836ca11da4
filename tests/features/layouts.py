"""The table layout × feature: what the contract of the layouts tries, and why it leaves something out."""

from __future__ import annotations

import functools
import warnings

import contract
import contract_cases
from divisions import DIVISIONS
from subjects import SUBJECTS
from torch import nn

Cell = tuple[bool, str]


@functools.cache
def _can_be_had(subject: str, name: str) -> str:
    """Empty, or why a family of models cannot have a case."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        case = contract_cases.cases(_widest(name), subject).get(name)
        found = None if case is None else contract.adapted(SUBJECTS[subject], case)
    return "" if found is None or isinstance(found, nn.Module) else str(found).partition(": ")[2]


def _widest(name: str) -> str:
    """A division that tries a case."""
    return next(division for division in DIVISIONS if name in contract_cases.cases(division))


def names() -> list[str]:
    """Every case but the starts, which are counted."""
    every = {name for division in DIVISIONS for name in contract_cases.cases(division)}
    known = [name for division in DIVISIONS for name in contract_cases.cases(division)]
    return [name for name in dict.fromkeys(known) if name in every and not name.startswith("init ")]


def cell(division: str, name: str) -> Cell:
    """Whether the contract tries a case on a layout, on a family that can have it; and if not, why."""
    reasons = []
    for subject in DIVISIONS[division].subjects:
        if name not in contract_cases.cases(division, subject):
            reasons.append(_left_out(division, name))
        elif not (why := _can_be_had(subject, name)):
            return True, ""
        else:
            reasons.append(why)
    return False, reasons[0]


def _left_out(division: str, name: str) -> str:
    field = name.removeprefix("variant ")
    if field in contract_cases.NOT_IN and contract_cases.NOT_IN[field][0] in division:
        return contract_cases.NOT_IN[field][1]
    if DIVISIONS[division].brief:
        return "only variants are tried: a layout of fewer ranks says the rest"
    return "has a meaning or a way of its own in some layouts only, where it is tried"


def starts(division: str) -> int:
    """How many initialisations the contract tries on a layout."""
    tried = {name for subject in DIVISIONS[division].subjects for name in contract_cases.cases(division, subject)}
    return sum(name.startswith("init ") for name in tried)
