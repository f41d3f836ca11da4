"""Ranks shared out anew: as many as before, each to the layer that it explains most."""

from __future__ import annotations

from lorica.calibration.shares import Claim, shared_out


def test_the_most_explaining_directions_get_the_ranks() -> None:
    claims = {
        "one": Claim(2, 4, "one", [0.9, 0.02, 0.01, 0.01]),
        "two": Claim(2, 4, "two", [0.3, 0.25, 0.2, 0.1]),
    }
    assert shared_out(claims) == {"one": 1, "two": 3}


def test_no_layer_gets_more_than_its_most_and_none_may_be_left() -> None:
    claims = {
        "one": Claim(2, 3, "one", [0.5, 0.4, 0.3, 0.2]),
        "two": Claim(1, 2, "two", [0.1, 0.1]),
        "three": Claim(1, 2, "three", [0.01, 0.0]),
    }
    assert shared_out(claims) == {"one": 3, "two": 1, "three": 0}


def test_of_layers_with_equal_claims_the_first_comes_first() -> None:
    explained = [0.5, 0.3, 0.1]
    claims = {name: Claim(1, 3, "q", explained) for name in ("q", "k", "v")}
    claims["o"] = Claim(1, 3, "o", [0.4, 0.2, 0.1])
    assert shared_out(claims) == {"q": 1, "k": 1, "v": 1, "o": 1}
    claims["o"] = Claim(1, 3, "o", [0.6, 0.55, 0.1])
    assert shared_out(claims) == {"q": 1, "k": 1, "v": 0, "o": 2}


def test_layers_with_the_same_inputs_may_get_what_the_largest_of_them_may() -> None:
    claims = {"q": Claim(1, 1, "q", [0.9, 0.8, 0.7]), "k": Claim(2, 3, "q", [])}
    assert shared_out(claims) == {"q": 2, "k": 1}


def test_projections_that_are_fused_get_the_same_and_count_each() -> None:
    claims = {
        "qkv": Claim(2, 4, "qkv", [0.5, 0.4, 0.3, 0.2], parts=3),
        "o": Claim(2, 4, "o", [0.45, 0.35, 0.1, 0.05]),
    }
    ranks = shared_out(claims)
    assert 3 * ranks["qkv"] + ranks["o"] <= 3 * 2 + 2
    assert ranks == {"qkv": 2, "o": 2}
