"""Layers that share weights, on layouts that the contract does not lay them over."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import contract
import oracles
import pytest
import ranks
from contract import Place, config_of
from contract_cases import Case
from divisions import DIVISIONS, _mesh, native
from subjects import SUBJECTS
from torch import nn
from torch.distributed.fsdp import fully_shard

from lorica.errors import LayoutError

CASE = Case({"layer_replication": [(0, 2), (1, 2)]})


def shard_whole(model: nn.Module) -> nn.Module:
    """One group: torch wants parameters that modules share in one."""
    return fully_shard(model, mesh=_mesh(fsdp=2))


def alone() -> oracles.Oracle:
    return oracles.oracle(SUBJECTS["llama"], CASE, 2)


def keeps(oracle: oracles.Oracle, folder: str) -> None:
    division = dataclasses.replace(DIVISIONS["torch fsdp2, adapted before"], late=shard_whole)
    place = Place(division, SUBJECTS["llama"], Path(folder))
    with pytest.raises(LayoutError, match="merge it where the model is whole"):  # the last but one of the checks
        contract.check_all(place, CASE, oracle, place.subject.build())


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor")
def test_a_stack_is_sharded_as_a_whole(tmp_path: Path) -> None:
    ranks.run(2, keeps, ranks.run(1, alone)[0], str(tmp_path))


def refused() -> None:
    model = native(tp=2)(SUBJECTS["llama"], "")
    layers = len(model.model.layers)
    with pytest.raises(LayoutError, match=re.escape("lorica.parallel.cutting(model)")):
        contract.adapt(model, config_of(SUBJECTS["llama"], CASE))
    assert len(model.model.layers) == layers


def test_a_model_that_is_cut_already_is_refused() -> None:
    ranks.run(2, refused)
