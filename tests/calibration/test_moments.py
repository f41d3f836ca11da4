"""Second moments of a stream of rows: those of all rows at once, however they come."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lorica.calibration import moments
from lorica.calibration.moments import Moments, Sketch, stream_for

CPU = torch.device("cpu")


def rows(count: int, features: int, *, decay: float = 0.8, mean: float = 0.0, seed: int = 0) -> Tensor:
    """Normal rows whose variances decay, in a turned basis."""
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(features, features, generator=generator)).Q
    x = torch.randn(count, features, generator=generator) * decay ** torch.arange(features)
    return x @ turn + mean


def dense(x: Tensor) -> tuple[Tensor, Tensor]:
    """Squares and directions of centred rows in float64."""
    centred = x.double() - x.double().mean(0)
    values, vectors = torch.linalg.eigh(centred.T @ centred)
    return values.flip(0), vectors.T.flip(0)


@pytest.mark.parametrize("parts", [[300], [1, 299], [100, 100, 100], [7] * 42 + [6, 0]])
@pytest.mark.parametrize("mean", [0.0, 1000.0])
def test_a_stream_has_the_moments_of_all_its_rows(parts: list[int], mean: float) -> None:
    x = rows(300, 12, mean=mean)
    stream = Moments(12, CPU)
    for part in x.split(parts):
        stream.add(part)
    found, (squares, vectors) = stream.directions(5, "layer"), dense(x)
    tolerance = 1e-5 if not mean else 2e-3  # the rows themselves are rounded at the mean
    assert torch.allclose(found.squares.double(), squares[:5], rtol=tolerance)
    assert ((found.vectors.double() * vectors[:5]).sum(1).abs() > 1 - tolerance).all()
    assert found.rows == 300
    assert found.total == pytest.approx(float(squares.sum()), rel=tolerance)


def test_many_features_are_decomposed_without_the_whole() -> None:
    features = moments.EXACT_UP_TO + 50
    x = rows(900, features, decay=0.9)
    stream = stream_for(features, 8, CPU)
    stream.add(x)
    found, (squares, vectors) = stream.directions(8, "layer"), dense(x)
    assert torch.allclose(found.squares.double(), squares[:8], rtol=1e-4)
    assert ((found.vectors.double() * vectors[:8]).sum(1).abs() > 0.999).all()


@pytest.mark.parametrize("features", [moments.BLOCK, 3 * moments.BLOCK, 3 * moments.BLOCK + 40])
def test_blocks_that_mirror_each_other_are_equal_after_every_look(features: int) -> None:
    x = rows(600, features, decay=0.99)
    stream = Moments(features, CPU)
    for part in x.split(250):
        stream.add(part)
        found = stream.directions(8, "layer")
    centred = x.double() - x.double().mean(0)
    wanted = centred.T @ centred
    assert torch.allclose(stream.scatter_II.double(), wanted, atol=1e-4 * float(wanted.norm()) / features**0.5)
    assert torch.allclose(found.squares.double(), dense(x)[0][:8], rtol=2e-3)


@pytest.mark.parametrize("decay", [0.9, 0.97, 0.995, 1.0])
def test_later_looks_explain_as_much_as_the_first(decay: float) -> None:
    """From where the last one ended, in fewer rounds; of batches that agree on few directions, too."""
    features, k = 300, 16
    x = rows(900, features, decay=decay)
    stream = Moments(features, CPU)
    for part in x.split([100, 100, 700]):
        stream.add(part)
        found = stream.directions(k, "layer")
    centred = x.double() - x.double().mean(0)
    explained = (centred @ found.vectors.double().T).square().sum()
    assert explained >= 0.98 * dense(x)[0][:k].sum()
    assert float(found.squares.sum()) == pytest.approx(float(explained), rel=1e-4)


@pytest.mark.parametrize("decay", [0.7, 0.97, 1.0])
@pytest.mark.parametrize("step", [13, 64, 500])
def test_a_sketch_keeps_its_bound(decay: float, step: int) -> None:
    x = rows(500, 80, decay=decay, mean=3.0)
    sketch = Sketch(80, 24, CPU)
    for part in x.split(step):
        sketch.add(part)
    squares, _ = dense(x)
    found = sketch.directions(24, "layer")
    k = 8
    bound = float(squares[k:].sum()) / (24 - k)
    centred = x.double() - x.double().mean(0)
    kept = found.vectors.double().T * found.squares.double() @ found.vectors.double()
    missing = torch.linalg.eigvalsh(centred.T @ centred - kept)
    assert missing.min() >= -1e-4 * float(squares[0])
    assert missing.max() <= bound * (1 + 1e-4) + 1e-4 * float(squares[0])
    assert found.total == pytest.approx(float(squares.sum()), rel=1e-4)
    assert found.rows == 500


def test_large_inputs_are_sketched() -> None:
    assert isinstance(stream_for(moments.WHOLE_UP_TO, 4, CPU), Moments)
    assert isinstance(stream_for(moments.WHOLE_UP_TO + 1, 4, CPU), Sketch)


def test_signs_do_not_depend_on_the_routine() -> None:
    found = rows(5, 9)
    assert torch.equal(moments.signed(-found), moments.signed(found))
    largest = moments.signed(found).gather(1, found.abs().argmax(1, keepdim=True))
    assert (largest > 0).all()
