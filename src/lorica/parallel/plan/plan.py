"""What a division of a model over ranks costs: memory and bytes sent, of the rank that has most; and which ones fit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from lorica.config import LoraConfig
from lorica.errors import LayoutError, TargetError
from lorica.parallel.plan.division import Division
from lorica.parallel.plan.held import Cut, Held, hold, stage_layers
from lorica.parallel.plan.outline import Outline
from lorica.parallel.plan.step import Step, Steps, Work
from lorica.parallel.plan.traffic import ring

#: AdamW's two moments, in the factors' dtype.
MOMENTS = 2
#: Parts of :attr:`Plan.memory`, from what is certain to what is estimated.
PARTS = ("weights", "factors", "gradients", "optimiser", "gathered", "activations", "working")


@dataclass(frozen=True)
class Plan:
    """One division of the model, the figures of the rank that has most of each sum.

    Attributes:
        division: which.
        memory: bytes by part (:data:`PARTS`), of the rank whose sum is largest.
        stage: the pipeline stage of that rank.
        sent: (what, axis, collective) → bytes that a rank sends in one optimiser step, of the stage that sends most.
            What is ``"base"``, the base model's (with LoRA's partial sums on board), or ``"lora"``, the gradients.
        trainable: elements that train, of the whole adapter and on the rank that has most.
        tensors: in the adapter's file.
        file: bytes of the tensors in it.
        written: rank → pieces and bytes that it writes.
        tokens: of one optimiser step, of all ranks.
        idle: share of its time that a pipeline waits, if all stages take equally long.
        cuts: the adapted linear layers that tensor parallelism cuts.
        others: what LoRA adds to what a rank sends in forward and backward: whose → bytes (:meth:`Planner.compared`).
    """

    division: Division
    memory: Mapping[str, int]
    stage: int
    sent: Mapping[tuple[str, str, str], int]
    trainable: tuple[int, int]
    tensors: int
    file: int
    written: Mapping[int, tuple[int, int]]
    tokens: int
    idle: float
    cuts: tuple[Cut, ...] = ()
    others: Mapping[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Bytes of memory."""
        return sum(self.memory.values())

    @property
    def sent_by(self) -> dict[str, int]:
        """``"base"`` and ``"lora"`` → bytes that a rank sends in one step."""
        sums = {"base": 0, "lora": 0}
        for (what, _, _), size in self.sent.items():
            sums[what] += size
        return sums

    @property
    def per_token(self) -> float:
        """Bytes that all ranks together send for each token that is trained on."""
        return sum(self.sent.values()) * self.division.ranks / self.tokens

    def as_json(self) -> dict[str, Any]:
        """The plan as plain values."""
        names = ("pp", "dp", "fsdp", "tp", "ep", "sp", "engine")
        return {
            "layout": str(self.division),
            **{name: getattr(self.division, name) for name in names},
            "memory": {**self.memory, "total": self.total},
            "stage": self.stage,
            "sent": [{"what": w, "axis": a, "collective": c, "bytes": size} for (w, a, c), size in self.sent.items()],
            "sent_by_lora_in_forward_and_backward": dict(self.others),
            "sent_per_token": self.per_token,
            "trainable": {"logical": self.trainable[0], "rank": self.trainable[1]},
            "file": {"tensors": self.tensors, "bytes": self.file},
            "written": [{"rank": r, "pieces": n, "bytes": size} for r, (n, size) in sorted(self.written.items())],
            "tokens": self.tokens,
            "pipeline_idle": self.idle,
        }


@dataclass(frozen=True)
class Refused:
    """A division that is not to be had.

    Attributes:
        division: which.
        reason: why.
        plan: its figures, where they are the reason.
    """

    division: Division
    reason: str
    plan: Plan | None = None


class Planner:
    """Makes plans of one model, adapter and workload.

    Args:
        outline: the model.
        config: the adapter's configuration.
        work: what a step has to do.
    """

    def __init__(self, outline: Outline, config: LoraConfig, work: Work) -> None:
        self._outline, self._config, self._work = outline, config, work
        self._steps = Steps(outline, config, work)

    def plan(self, division: Division, *, limit: int | None = None) -> Plan:
        """Return the plan of a division.

        Args:
            division: over which ranks.
            limit: bytes of memory of a rank; where what it holds is more already, no step is run and the plan has
                neither activations nor what is sent in forward and backward.

        Raises:
            LayoutError: the model cannot be divided so, or does not run so.
            TargetError: the adapter does not fit, or a stage has none of its targets.
        """
        self._check(division)
        stages = self._stages(division)
        held = {stage: hold(self._outline, division, stage, self._config) for stage in stages}
        full = limit is not None and max(sum(_resting(found).values()) for found in held.values()) > limit
        steps = {stage: Step() if full else self._steps.step(division, stage) for stage in stages}
        memory = {stage: self._memory(division, stage, held[stage], steps[stage]) for stage in stages}
        sent = {stage: self._sent(held[stage], steps[stage]) for stage in stages}
        most = max(stages, key=lambda stage: sum(memory[stage].values()))
        busiest = max(stages, key=lambda stage: sum(sent[stage].values()))
        every = [held[like] for like in self._like(division)]
        work, waits = self._work, division.pp - 1
        return Plan(
            division=division,
            memory=memory[most],
            stage=most,
            sent=sent[busiest],
            trainable=(sum(one.logical for one in every), max(one.trainable for one in every)),
            tensors=sum(one.tensors for one in every),
            file=sum(size for one in every for _, size in one.written.values()),
            written=self._written(division, held),
            tokens=work.tokens * work.passes * division.data,
            idle=waits / (work.passes + waits),
            cuts=held[busiest].cuts,
        )

    def compared(self, plan: Plan) -> Plan:
        """Return a plan with what the adapter itself sends in forward and backward, and what other systems' would."""
        if plan.division.tp == 1:
            return plan
        own = self._work.passes * sum(self.own_traffic(plan.division, plan.stage).values())
        return replace(plan, others={"lorica": own} | other_ways(plan.cuts, plan.division, self._work))

    def own_traffic(self, division: Division, stage: int = 0) -> Counter[tuple[str, str]]:
        """Return what the adapter adds to what is sent in a forward and backward: (axis, collective) → bytes."""
        with_it = self._steps.step(division, stage, flowing=True).sent
        without = self._steps.step(division, stage, flowing=True, adapter=False).sent
        return Counter({key: size for key in with_it | without if (size := with_it[key] - without[key])})

    def _check(self, division: Division) -> None:
        layers, passes = len(self._outline.kinds), self._work.passes
        if division.pp > max(1, layers):
            raise LayoutError(f"{layers} decoder layers do not fill the stages")
        if 1 < division.pp > passes:
            raise LayoutError(
                f"a pipeline needs as many microbatches as stages, and there are {passes}: raise --passes"
            )

    def _stages(self, division: Division) -> list[int]:
        """Return one stage of each sort: both ends, and of those between one for each number and kind of layers."""
        return sorted({*self._like(division)})

    def _like(self, division: Division) -> list[int]:
        """Return for each stage the first one that is like it, in which the most microbatches wait."""
        first: dict[Any, int] = {}
        found = []
        for stage in range(division.pp):
            layers = stage_layers(len(self._outline.kinds), division, stage)
            kinds = tuple(sorted(Counter(self._outline.kinds[index] for index in layers).items()))
            found.append(first.setdefault((stage == 0, stage == division.pp - 1, kinds), stage))
        return found

    def _memory(self, division: Division, stage: int, held: Held, step: Step) -> dict[str, int]:
        waiting = min(self._work.passes, division.pp - stage)  # forwards whose backwards are to come
        kept = step.activations(checkpointing=self._work.checkpointing)
        return _resting(held) | {"activations": waiting * kept, "working": step.working}

    def _sent(self, held: Held, step: Step) -> dict[tuple[str, str, str], int]:
        passes = self._work.passes
        sent = {("base", axis, collective): passes * size for (axis, collective), size in step.sent.items()}
        if held.gathers:
            sent["base", "fsdp", "all_gather"] = passes * held.gathers + sent.get(("base", "fsdp", "all_gather"), 0)
        return sent | {("lora", axis, "all_reduce"): size for axis, size in held.buckets.items()}

    def _written(self, division: Division, held: Mapping[int, Held]) -> dict[int, tuple[int, int]]:
        found: dict[int, tuple[int, int]] = {}
        for stage, like in enumerate(self._like(division)):
            further = division.stage_first(stage) - division.stage_first(like)
            found |= {rank + further: pieces for rank, pieces in held[like].written.items()}
        return found


def _resting(held: Held) -> dict[str, int]:
    return {
        "weights": held.weights,
        "factors": held.factors,
        "gradients": held.factors,
        "optimiser": MOMENTS * held.factors,
        "gathered": held.gathered,
    }


def other_ways(cuts: Iterable[Cut], division: Division, work: Work, *, element: int = 2) -> dict[str, int]:
    """Return what other systems' LoRA adds, in forward and backward, to what a rank sends in one step.

    By their forms, not by running them. T tokens, r the rank; ``h = x Aᵀ``.

    - Megatron Bridge: A of a column layer is cut too, so h ``[T, r]`` is gathered, and its gradient and that of x
      are summed (with sequence parallelism the latter is reduce-scattered). Of a row layer h is summed and the output
      ``[T, out]``, made in parts, gathered.
    - PEFT: the gradient of h of a column layer is summed, and h of a row layer.

    Args:
        cuts: the adapted layers that tensor parallelism cuts.
        division: over which ranks.
        work: what a step has to do.
        element: bytes of an element of an activation.
    """
    n, tokens = division.tp, work.tokens * work.passes * element
    sums = {"Megatron Bridge": 0.0, "PEFT": 0.0}
    for cut in cuts:
        h, (out, width) = tokens * cut.rank, cut.sizes
        sums["PEFT"] += cut.times * ring("all_reduce", n, h)
        megatron = 2 * ring("all_reduce", n, h) + ring("all_gather", n, tokens * out)
        if not cut.by_rows:
            dx = ring("reduce_scatter" if division.sp else "all_reduce", n, tokens * width)
            megatron = ring("all_gather", n, h) + ring("all_reduce", n, h) + dx
        sums["Megatron Bridge"] += cut.times * megatron
    return {name: round(size) for name, size in sums.items()}


def search(
    planner: Planner,
    divisions: Iterable[Division],
    *,
    limit: int | None,
    either: bool = False,
    tried: Callable[[Division], None] = lambda division: None,
) -> tuple[list[Plan], list[Refused]]:
    """Return the plans that fit, best first, and why the others do not.

    Best is what has the shortest pipeline, whose ranks wait the least; then what sends the fewest bytes for each token
    trained on; then what leaves more memory to spare.

    Args:
        planner: makes the plans.
        divisions: to be tried.
        limit: bytes of memory of a rank; None: all fit.
        either: where lorica's own layers cannot cut the model, try transformers' engine.
        tried: called with each when it is done.
    """
    fitting, refused = [], []
    for division in divisions:
        try:
            plan = _planned(planner, division, limit, either)
        except (LayoutError, TargetError) as error:
            refused.append(Refused(division, str(error)))
        else:
            if limit is None or plan.total <= limit:
                fitting.append(plan)
            else:
                what = "with activations" if plan.memory["activations"] else "before any activation"
                refused.append(Refused(division, f"{plan.total / 2**30:.1f} GiB {what}", plan))
        tried(division)
    return sorted(fitting, key=lambda plan: (plan.idle, plan.per_token, plan.total)), refused


def _planned(planner: Planner, division: Division, limit: int | None, either: bool) -> Plan:
    try:
        return planner.plan(division, limit=limit)
    except LayoutError as error:
        if not either or division.engine != "native" or division.sp or division.pp > 1 or division.tp == 1:
            raise
        try:
            return planner.plan(replace(division, engine="transformers"), limit=limit)
        except LayoutError as second:
            raise LayoutError(f"{error}; with transformers' engine: {second}") from error


__all__ = ["PARTS", "Plan", "Planner", "Refused", "other_ways", "search"]
