"""What was aimed at: each figure with its bound, what was measured, and why where it was not reached.

One entry of :data:`TARGETS` per figure. It names a row of the tables (measure, case, quantity) and how that row is read
(:data:`READINGS`). ``why`` says, with a measurement, why a bound is not reached; it is shown only where it is not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from benchmarks.suite import FROZEN, LORICA, Figure
from lorica.bench.report import NOTABLE, show

Rows = Mapping[tuple[str, str, str], Figure]


@dataclass(frozen=True)
class Target:
    """One figure that was aimed at.

    Attributes:
        aim: what it is, in words; targets with the same words stand together.
        measure: name of the measure.
        case: of the measure.
        quantity: of the case: ``time``, or one of the counts.
        reading: how the row is read; a key of :data:`READINGS`.
        bound: the most that the reading may be (for ``speed``: the least).
        beside: the case of the same measure that ``beside`` compares with, or the side that ``of side`` does.
        why: why the bound is not reached.
    """

    aim: str
    measure: str
    case: str
    quantity: str
    reading: str
    bound: float
    beside: str = ""
    why: str = ""

    def value(self, rows: Rows) -> float | None:
        """Return what was measured; None where it was not, or where what it is compared with takes nothing."""
        figure = rows.get((self.measure, self.case, self.quantity))
        if figure is None or LORICA not in figure.values:
            return None
        return READINGS[self.reading].of(self, figure, rows)

    def reached(self, value: float) -> bool:
        """Whether a value keeps to the bound."""
        return value >= self.bound if self.reading == "speed" else value <= self.bound

    def say(self, value: float) -> str:
        """Return a value of the reading, as text."""
        if self.reading in ("added", "own"):
            return show(value, "B" if "bytes" in self.quantity else "s" if self.quantity == "time" else "")
        return f"{value:.3g} ×"


@dataclass(frozen=True)
class Reading:
    """A way to read a row.

    Attributes:
        of: the target, its row and all rows → what is compared with the bound.
        says: what stands behind the bound's number.
    """

    of: Callable[[Target, Figure, Rows], float | None]
    says: str


def _speed(target: Target, figure: Figure, rows: Rows) -> float | None:
    return 1 / figure.ratio if figure.ratio else None


def _of_frozen(target: Target, figure: Figure, rows: Rows) -> float | None:
    frozen = figure.values.get(FROZEN)
    return figure.values[LORICA] / frozen if frozen else None


def _added(target: Target, figure: Figure, rows: Rows) -> float | None:
    return figure.values[LORICA] - figure.values[FROZEN] if FROZEN in figure.values else None


def _beside(target: Target, figure: Figure, rows: Rows) -> float | None:
    other = rows.get((target.measure, target.beside, target.quantity))
    return figure.values[LORICA] / other.values[LORICA] if other and other.values.get(LORICA) else None


def _of_side(target: Target, figure: Figure, rows: Rows) -> float | None:
    other = figure.values.get(target.beside)
    return figure.values[LORICA] / other if other else None


#: Name → how lorica's side of a row is read. Ratios are to the side that the measure's table compares with.
READINGS: dict[str, Reading] = {
    "ratio": Reading(lambda target, figure, rows: figure.ratio, "the other's"),
    "excess": Reading(lambda target, figure, rows: figure.excess, "the other's excess over the frozen base"),
    "speed": Reading(_speed, "faster"),
    "of frozen": Reading(_of_frozen, "the frozen base's"),
    "added": Reading(_added, "beyond the frozen base"),
    "own": Reading(lambda target, figure, rows: figure.values[LORICA], ""),
    "beside": Reading(_beside, "lorica's own in the case"),
    "of side": Reading(_of_side, "that of"),
}


_STEP = "Training step, what it adds to the frozen base"
_KINDS = ("fp32", "fp32, dropout 0.05", "bf16 base, fp32 factors", "bf16 base, fp32 factors, dropout 0.05")
_FP32, _DROPOUT, _BF16, _ = _KINDS
# Processor time, of which neighbours on the machine change least.
_LOADING = (
    "of 36 ms of processor time of `from_pretrained` beside neighbours (peft: 300) 22 are 224 layers with modules and "
    "parameters without values, 2.3 the plan, 3.2 names, 3.6 reading and checking 4.8 MB, 1.8 the header, 1.9 the "
    "448 parameters; without the second set of parameters, which a file's values replace, it would be 2 less"
)
_SAVING = (
    "17 ms, of which flushing is 0.6; again and again alone it is 10, a third of it the tensors by name, a quarter the "
    "model card with its count of parameters, a quarter the file; renames, checksums and the look for a journal are "
    "what peft has not"
)

_COPIED = (
    "with `batched_mm` the block copies a weight for each token's expert before it multiplies, and the frozen base "
    "alone is but 6 times as fast as peft with 8 experts, of which a token takes 2"
)
_COMPILED = (
    "inductor fuses peft's separate passes into their neighbours, where lorica's addmm is a call of its own: a chain "
    "of 8 adapted linears takes 362 µs (peft's form: 325) at width 256 and one token, but 11.4 ms (12.0) at width 512 "
    "and 256 tokens; and dynamo checks 2402 guards before a call (peft: 2219)"
)

# The least of many times in one thread, of what is in the cache.
_THIN = (
    "the six thin products of a linear of 512 x 512 take 179 µs for 256 tokens (47, 29, 28, 24, 25, 26), and peft has "
    "the same ones; its further passes take 76 µs from the cache, so that 0.70 is the least at this width"
)
_NARROW = (
    "this processor has no 16-bit products: a thin one takes 162 µs in bf16 and 47 µs in fp32, in which peft computes "
    "them, for 5 times the bytes moved"
)
# Times in one thread, of sides that took turns.
_PYTHON = (
    "of the 190 µs that peft's layer takes, 70 are the frozen layer's; of the 87 that lorica adds, 4.4 are the way in, "
    "the rest nine kernels and the nodes of torch's own that record them (an autograd function written in Python takes "
    "13 more)"
)
_MASKS = (
    "a mask of 2,048 elements takes 11 µs (the draw 2, the comparison 2.5, memory and a seeded generator 3), its seed "
    "2.4, a cast and its two uses 6, where torch's dropout takes 19 and its backward 2: that a mask can be drawn "
    "again, and that neighbours share it, is of no use to one small layer"
)
# Each of these was taken alone, after other data had been in the cache.
_GAINS = (
    "in fp32 and one thread a thin product with each weight takes 8.8 ms, and four passes over each output (1 forward, "
    "3 backward; chunks of rows spare nothing) 16, beside the 137 of a Llama's step with plain LoRA: 18 %. In one "
    "linear they are 0.5 and 1.0 of 16 ms"
)
_FROZEN_BF16 = (
    "this processor has no 16-bit products: the frozen base alone takes 70 of peft's 88 ms in one linear and 506 of "
    "716 in a Llama, so that adding nothing at all would be 1.25 and 1.42 × faster, and plain LoRA is 1.15 and 1.2 ×"
)
_TOKEN = (
    "the frozen base takes 3.3 of peft's 5.1 ms (one thread, beside neighbours); for 1.15 × a linear may add 39 µs, "
    "and lorica adds 42, though the same layers add 22 in a chain: what stands between them evicts code and factors"
)
_ADDING = (
    "in one thread the products alone take 14.4 of 16 ms in fp32 (4 layers of width 512); in bf16 widening takes 7.4, "
    "the products 6.7, and rounding 5.7 of 25 ms, and none of the three can go where each number is rounded once: "
    "without anything else it would be 2.3 times peft's speed (45 ms)"
)
_SKETCHED = (
    "in one thread ten products with the weight, which the bound on the residual needs, take 3.3 of 8.3 ms, bases and "
    "their check 1.9, the small decompositions 0.8, putting an adapter in 0.9 more; the exact decomposition takes 28 "
    "times as long there, and took 180 ms in one row and 239 ms in another of the same run in two threads"
)
_LOOPED = (
    "the frozen block takes 53 ms in one thread and 54 ms in two, 66 ms would be 2 times as fast as peft, whose passes "
    "over whole stacks fall from 293 ms to 132 by the second thread; what lorica adds, 768 products of 32 rows with "
    "rank 8, is 11 ms in one thread (4.6 times as fast as peft) and 15 in two, which wait for each other at each"
)

TARGETS: tuple[Target, ...] = (
    Target(f"{_STEP}: bytes moved", "training", _FP32, "bytes moved", "excess", 0.45),
    Target(f"{_STEP}: bytes moved", "training", _BF16, "bytes moved", "excess", 0.25),
    Target(f"{_STEP}: bytes moved", "training", _DROPOUT, "bytes moved", "excess", 0.55),
    *(
        Target(f"{_STEP}: time", "training", kind, "time", "excess", 0.65, why=_NARROW if "bf16" in kind else _THIN)
        for kind in _KINDS
    ),
    # 2 of the 10 are the frozen linear's own products.
    Target("Kernels of an adapted linear, forward and backward", "linear", _FP32, "kernels", "added", 10 - 2),
    Target("Saved bytes of a step", "training", _FP32, "saved bytes", "ratio", 1.0),
    Target("Saved bytes of a step", "training", _BF16, "saved bytes", "ratio", 0.65),
    Target("Saved bytes of a step", "training", _DROPOUT, "saved bytes", "ratio", 0.6),
    *(
        Target("Saved bytes with fused gated MLPs", "gated", f"{what}{kind}", "saved bytes", "of frozen", 1.0)
        for what in ("", "one MLP, ")
        for kind in (_FP32, _DROPOUT, _BF16)
    ),
    *(
        Target(
            "Gated MLPs in one piece: time",
            "gated",
            kind,
            "time",
            "of side",
            1.05,
            beside="not fused",
            why="the activation and the product are made again, which takes five passes over a matrix of gate's size",
        )
        for kind in (_FP32, _DROPOUT, _BF16)
    ),
    Target("Small layers, forward and backward", "small", _FP32, "time", "speed", 1.3, why=_PYTHON),
    Target("Small layers, forward and backward", "small", _DROPOUT, "time", "speed", 1.3, why=_MASKS),
    *(
        Target(
            "DoRA: training step",
            "dora",
            f"{what}: {kind}",
            "time",
            "of side",
            1.1,
            beside="lorica's LoRA",
            why=_GAINS,
        )
        for what in ("one linear", "Llama")
        for kind in _KINDS
    ),
    *(
        Target(
            "DoRA: training step against peft's",
            "dora",
            f"{what}: {kind}",
            "time",
            "speed",
            1.3,
            why=_FROZEN_BF16 if "bf16" in kind else _GAINS,
        )
        for what in ("one linear", "Llama")
        for kind in _KINDS
    ),
    # The norms of one linear take 2·16·1024² FLOPs beside 4·512·1024² of its own products.
    *(
        Target("DoRA: no second base product", "dora", f"one linear: {kind}", "FLOPs", "of side", 1.02, "lorica's LoRA")
        for kind in (_FP32, _DROPOUT)
    ),
    Target("Decoding with one adapter", "decode", "8 linears of width 256", "time", "speed", 1.15),
    Target("Decoding with one adapter", "decode", "Llama, 4 layers of width 256", "time", "speed", 1.15, why=_TOKEN),
    *(
        Target("Merging and unmerging", "merging", f"{dtype}, {shape}", "time", "speed", 2.5, why=_ADDING)
        for shape in ("4 layers of width 512", "1 layer of width 2048")
        for dtype in ("fp32", "bf16")
    ),
    Target("Merging and unmerging: beside the model", "merging", "fp32, 1 layer of width 2048", "peak bytes", "own", 0),
    Target(
        "Merging and unmerging: beside the model", "merging", "bf16, 1 layer of width 2048", "peak bytes", "own", 2**22
    ),
    Target("Optimiser step over 896 factors", "optimiser", "448 linears of width 128", "time", "speed", 3),
    Target("Optimiser step over 896 factors", "optimiser", "448 linears of width 512", "time", "speed", 3),
    Target("Injection into 448 linears", "injection", "get_peft_model, 7 names", "time", "speed", 8),
    Target("Injection into 448 linears", "injection", "get_peft_model, all-linear", "time", "speed", 8),
    Target("Switching, off and on, deleting", "injection", "set_adapter, there and back", "time", "speed", 10),
    Target("Switching, off and on, deleting", "injection", "disable_adapter, off and on", "time", "speed", 10),
    Target("Switching, off and on, deleting", "injection", "delete_adapter", "time", "speed", 10),
    *(
        Target("Loading an adapter of 224 linears", "files", case, "time", "speed", 10, why=_LOADING)
        for case in ("from_pretrained", "load_adapter, 1 there already", "load_adapter, 8 there already")
    ),
    Target(
        "Loading: flat in the number of adapters there",
        "files",
        "load_adapter, 8 there already",
        "time",
        "beside",
        1.25,
        beside="load_adapter, 1 there already",
    ),
    # The bounds are the sizes of the two files.
    Target("Loading: peak, at most the file", "files", "load_adapter, 1 there already", "peak bytes", "own", 4_839_512),
    Target("Loading: peak, at most the file", "files", "load_adapter, 150 MB", "peak bytes", "own", 153_149_272),
    Target("Loading: bytes moved", "files", "load_adapter, 1 there already", "bytes moved", "ratio", 0.25),
    Target("Saving an adapter of 224 linears", "files", "save_pretrained", "time", "speed", 3, why=_SAVING),
    Target(
        "PiSSA, 1024², rank 16, against the exact SVD",
        "starts",
        "pissa, lorica: pissa_niter_4",
        "time",
        "speed",
        28,
        why=_SKETCHED,
    ),
    Target("OLoRA", "starts", "olora", "time", "speed", 15),
    Target(
        "EVA, at equal variance explained",
        "calibration",
        "4 layers of width 256, 512 rows",
        "time",
        "speed",
        10,
        why="12 decompositions of a second moment, whose rounds keep the variance of even spectra too, are a third "
        "of lorica's time; its 4 forwards are a fifth",
    ),
    Target(
        "EVA, at equal variance explained",
        "calibration",
        "4 layers of width 1024, 2048 rows",
        "time",
        "speed",
        10,
        why="the model's own 4 forwards are 45 % of lorica's time: without anything else it would be 12 × (peft runs "
        "13). A second moment costs half as many multiplications as a square layer's forward, nearly all the rest. "
        "A Llama's layer, whose directions settle slowly, takes peft 100 forwards",
    ),
    Target(
        "EVA, at equal variance explained",
        "calibration",
        "a Llama's layer of width 128, 256 tokens",
        "time",
        "speed",
        10,
    ),
    Target("`add_weighted_adapter` by SVD, width 2048", "combining", "svd, width 2048", "time", "speed", 50),
    *(
        Target(
            "Experts, training",
            "experts",
            f"training, {count} experts, {kind}",
            quantity,
            reading,
            bound,
            why=_LOOPED if count == 64 else "",
        )
        for quantity, reading, bound in (("time", "speed", 2), ("saved bytes", "ratio", 0.3))
        for count in (8, 64)
        for kind in ("eager", "grouped_mm")
    ),
    *(
        Target("Experts, decoding", "experts", f"decoding, {count} experts, {kind}", "time", "speed", 10, why=_COPIED)
        for count in (8, 64)
        for kind in ("eager", "grouped_mm", "batched_mm")
    ),
    Target(
        "64 adapters in a batch of 64 rows, decoding", "rows", "decode, 64 rows of 64 adapters", "time", "speed", 2.5
    ),
    *(
        Target(
            "The same in prompts",
            "rows",
            f"prompts of 64 tokens, {rows} rows of {rows} adapters",
            "bytes moved",
            "excess",
            0.1,
        )
        for rows in (64, 16)
    ),
    Target(
        "The same in prompts, the base included",
        "rows",
        "prompts of 64 tokens, 64 rows of 64 adapters",
        "bytes moved",
        "ratio",
        0.1,
    ),
    *(
        Target("Compiled by inductor: no slower", "compiled", case, "time", "ratio", NOTABLE, why=_COMPILED)
        for case in ("training step, fp32", "training step, fp32, dropout 0.05", "one token, fp32")
    ),
    *(
        Target("Compiled: one graph without a break", "compiled", case, "graph breaks", "own", 0)
        for case in ("training step, fp32", "training step, fp32, dropout 0.05", "one token, fp32")
    ),
    *(
        Target("Tensor parallelism: collectives of LoRA's own", "parallel", case, f"collectives, {phase}", "added", 0)
        for case in ("tp2, medium", "tp2 sp, medium", "tp4 sp, tiny", "transformers tp2, columns, medium")
        for phase in ("forward", "backward")
    ),
    Target("Tensor parallelism: bytes beside Megatron's", "parallel", "tp2, medium", "bytes sent", "ratio", 1.0),
    Target("Tensor parallelism: bytes beside Megatron's", "parallel", "tp2 sp, medium", "bytes sent", "ratio", 1.0),
    Target(
        "Tensor parallelism: bytes beside PEFT's on transformers' layers",
        "parallel",
        "transformers tp2, columns, medium",
        "bytes sent",
        "ratio",
        1.0,
        why="the sum of the factors' gradients, once per optimiser step and independent of the tokens, is counted with "
        "the step; peft sums its activations' gradients once per layer and pass instead, which grows with the tokens, "
        "and cannot adapt row-parallel layers at all",
    ),
)


def by_row(figures: Iterable[Figure]) -> dict[tuple[str, str, str], Figure]:
    """Return the figures under measure, case and quantity."""
    return {(figure.measure, figure.case, figure.quantity): figure for figure in figures}


def section(figures: Iterable[Figure], targets: Iterable[Target] = TARGETS) -> str:
    """Return the Markdown section that says of each target what was measured and whether it is reached."""
    rows = by_row(figures)
    lines = ["| aim | row | bound | measured | reached |", "|---|---|---|---:|---|"]
    reasons: list[str] = []
    previous = ""
    for target in targets:
        value = target.value(rows)
        reached = value is not None and target.reached(value)
        cells = [
            "" if target.aim == previous else target.aim,
            f"`{target.measure}`, {target.case}: {target.quantity}",
            _bound(target),
            "not measured" if value is None else target.say(value),
            "–" if value is None else "yes" if reached else "**no**",
        ]
        lines.append(f"| {' | '.join(cells)} |")
        previous = target.aim
        if value is not None and not reached:
            reasons.append(f"- `{target.measure}`, {target.case}, {target.quantity}: {target.why or 'not explained'}.")
    why = "\n\nNot reached, and why:\n\n" + "\n".join(reasons) if reasons else ""
    return "## What was aimed at\n\n" + "\n".join(lines) + why


def _bound(target: Target) -> str:
    sign = "≥" if target.reading == "speed" else "≤"
    words = f"{sign} {target.say(target.bound)} {READINGS[target.reading].says}".rstrip()
    return f"{words} “{target.beside}”" if target.beside else words
