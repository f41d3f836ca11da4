"""The loss curve of many ranks is that of one process, whatever the layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import many
import pytest

import runs

LAYOUTS = [
    (2, {"dp": 2}),
    (4, {"dp": 4}),
    (2, {"tp": 2}),
    (2, {"tp": 2, "sp": True}),
    (2, {"fsdp": 2}),
    (4, {"tp": 2, "sp": True, "fsdp": 2}),
    (4, {"tp": 4}),
    (4, {"tp": 2, "dp": 2}),
    (2, {"pp": 2}),
    (4, {"pp": 2, "tp": 2, "sp": True}),
    (4, {"pp": 2, "dp": 2}),
]


def settings(base: Path, data: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """A run whose last batch of an epoch has fewer rows than there are ranks, and whose clipping matters."""
    values = runs.settings(base, data, output, lora__lora_dropout=0.0, training__batch_size=4, **changes)
    values["training"] |= {"max_grad_norm": 0.5, "learning_rate": 2e-3, "loraplus_lr_ratio": 4}
    values["data"]["train"] = str(data)
    values["data"]["eval_fraction"] = 0.3  # 9 of 30 rows; 21 in batches of 4
    return values


@pytest.fixture(scope="module")
def alone(base: Path, data_file: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return many.run(1, settings(base, data_file, tmp_path_factory.mktemp("alone") / "out"))


@pytest.mark.parametrize(("count", "layout"), LAYOUTS, ids=[str(layout) for _, layout in LAYOUTS])
def test_the_curve_is_that_of_one_process(
    count: int, layout: dict[str, Any], base: Path, data_file: Path, tmp_path: Path, alone: list[dict[str, Any]]
) -> None:
    values = settings(base, data_file, tmp_path / "out", parallel=layout)
    many.assert_same_curve(many.run(count, values), alone)
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()
