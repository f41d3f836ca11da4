"""What starting from base weights and from data costs beside peft, in counts that do not jitter.

Each bound is what was measured, rounded up a little. FLOPs are those of products: decompositions have none here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

import lorica
from benchmarks.measures import calibration, starts
from benchmarks.models import call_chain, chain
from benchmarks.suite import LORICA, PEFT, Contest, count_sides, quiet
from lorica.bench import counting
from lorica.calibration import moments

QUANTITIES = ("FLOPs", "kernels", "bytes moved", "peak bytes")


def counts(build: Callable[[], Contest]) -> tuple[dict[str, int], dict[str, int]]:
    with quiet():
        found = count_sides(replace(build(), counts=QUANTITIES))
    return found[PEFT], found[LORICA]


def test_a_sketch_moves_what_one_without_a_bound_does():
    kind = "pissa_niter_4"
    theirs, ours = counts(lambda: starts.build_start(False, width=1024, theirs=kind, ours=kind))
    assert ours["FLOPs"] <= 1.15 * theirs["FLOPs"]
    assert ours["bytes moved"] <= 1.06 * theirs["bytes moved"]
    assert ours["peak bytes"] <= 0.22 * theirs["peak bytes"]
    assert ours["kernels"] <= 90


def test_no_decomposition_is_larger_than_the_basis():
    """Exact or whole, it would be of 1024 columns."""
    seen: list[tuple[int, ...]] = []

    class Decompositions(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if function.overloadpacket.__name__ in ("linalg_qr", "_linalg_svd", "_linalg_eigh"):
                seen.append(tuple(args[0].shape))
            return function(*args, **(kwargs or {}))

    with quiet():
        for kind, most in (("pissa_niter_4", 80), ("olora", 16)):
            contest = starts.build_start(False, width=1024, theirs=kind, ours=kind)
            contest.tasks[LORICA].reset()
            with Decompositions():
                contest.tasks[LORICA].run()
            assert seen
            assert max(shape[-1] for shape in seen) <= most
            seen.clear()


def test_olora_reads_the_weight_once_and_writes_it_once():
    theirs, ours = counts(lambda: starts.build_start(False, width=1024, theirs="olora", ours="olora"))
    weight = 4 * 1024**2
    assert ours["bytes moved"] <= 3.2 * weight  # the product reads it, the difference reads and writes it
    assert ours["bytes moved"] <= 0.45 * theirs["bytes moved"]
    assert ours["peak bytes"] <= 0.02 * theirs["peak bytes"]
    assert ours["kernels"] <= 8


@pytest.mark.parametrize(("layers", "width", "rows"), [(4, 1024, 2048)])
def test_eva_moves_a_sixth(layers, width, rows):
    theirs, ours = counts(lambda: calibration.build(True, layers=layers, width=width, rows=rows))
    assert ours["bytes moved"] <= 0.16 * theirs["bytes moved"]
    assert ours["FLOPs"] <= 0.28 * theirs["FLOPs"]  # 4 forwards of about 13, and the second moments
    assert ours["kernels"] <= 0.2 * theirs["kernels"]


def test_eva_runs_the_model_once_for_each_batch():
    model, data, runs = chain(3, 64), calibration.batches(4, 128, 64), [0]
    model.register_forward_hook(lambda *_: runs.__setitem__(0, runs[0] + 1))
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    config = lorica.LoraConfig(r=8, target_modules=names, init_lora_weights="eva", eva_config=lorica.EvaConfig(tau=1.0))
    rest = {"prepare_model_inputs_fn": None, "prepare_layer_inputs_fn": None, "show_progress_bar": False}
    lorica.get_eva_state_dict(model, data, config, forward_fn=call_chain, **rest)
    assert runs == [len(data)]


@pytest.mark.parametrize("features", [moments.BLOCK, 3 * moments.BLOCK, 3 * moments.BLOCK + 40])
def test_mirrored_blocks_of_a_moment_are_added_up_once(features):
    stream, rows = moments.Moments(features, torch.device("cpu")), torch.randn(512, features)
    flops = counting.count(lambda: stream.add(rows))["FLOPs"]
    whole = 2 * len(rows) * features**2
    blocks = -(-features // moments.BLOCK)
    assert flops <= whole * (blocks + 1) / (2 * blocks) * 1.1
