"""What every initialisation, variant and base layer has to keep on every layout; runs on the ranks.

The oracle is the same adapter on the same model in one piece: :mod:`oracles` works out once what it gives, from the
same seed, and every rank of every division reads it.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from contract_cases import FROM_DATA, TOLERANCE, Case, cases
from divisions import DIVISIONS, Division, Plain
from safetensors.torch import load_file
from subjects import SUBJECTS, Subject, batch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

import lorica
from lorica.checkpoint.names import Entry, adapter_entries
from lorica.checkpoint.pieces import piece_of
from lorica.engines.fsdp import reshard
from lorica.errors import AdapterError, ConfigError, TargetError
from lorica.init import find
from lorica.layers import LoraLayer
from lorica.parallel import clip_grad_norm_, sum_gradients, verify
from lorica.variants import VARIANTS, variant_of

#: Rows of the whole batch; the data groups have equal shares.
ROWS = 4


@dataclasses.dataclass
class Place:
    """Where a case is tried: the division, the subject, a folder for files.

    Attributes:
        without: the collectives of the base model alone, once they are counted.
        alone: its output, once it is known.
        weights: what this rank holds of its weights, by their names, once it is known.
    """

    division: Division
    subject: Subject
    folder: Path
    without: Counter[str] | None = None
    alone: Tensor | None = None
    weights: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    @property
    def group(self) -> int:
        """Which of the data groups this rank is in."""
        return dist.get_rank() * self.division.data // dist.get_world_size()

    def run(self, model: nn.Module) -> Plain:
        """What runs an adapted model, or what a late engine makes of it."""
        return self.division.runner(model if self.division.late is None else self.division.late(model))

    def save(self, model: nn.Module) -> dict[str, Tensor]:
        """Save an adapter; rank 0 gets what is in the file."""
        folder = self.folder / "saved"
        if dist.get_rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)
        dist.barrier()
        model.save_pretrained(folder, save_embedding_layers=False)
        return load_file(folder / "adapter_model.safetensors") if dist.get_rank() == 0 else {}

    def cut(self) -> nn.Module:
        """This rank's frozen model; the first time it is looked at alone."""
        base = self.division.cut(self.subject, str(self.folder / "base"))
        if self.alone is None and self.division.late is None:
            self._look_at(base)
        return base

    def _look_at(self, base: nn.Module) -> None:
        """Learn what the base model alone computes, sends and holds."""
        bare, ids = self.division.runner(base), self.rows(batch(ROWS))
        self.alone = bare.logits(ids)
        if self.division.counted:
            with _flowing(base, self.subject):
                self.without = counted(bare, ids)
            base.zero_grad()
        self.weights = {name: held.clone() for name, held in _held(base).items()}

    def base_again(self, model: nn.Module) -> nn.Module | None:
        """The base model without its adapters, with the weights it had: starts come out of them, and merging rounds.

        None where a late engine made something else of it.
        """
        if self.division.late is not None:
            return None
        base: nn.Module = model.unload()
        found = _held(base)
        assert found.keys() == self.weights.keys()
        for name, held in found.items():
            held.copy_(self.weights[name])
        return base.eval()

    def rows(self, ids: Tensor) -> Tensor:
        """This rank's share of a batch."""
        return ids.chunk(self.division.data)[self.group]

    def config(self, case: Case) -> Any:
        """The config of a case."""
        return config_of(self.subject, case)


def _held(base: nn.Module) -> dict[str, Tensor]:
    """What this rank holds of a base model's weights, at rest."""
    reshard(base)
    tensors = {name: parameter.detach() for name, parameter in base.named_parameters()}
    return {name: held.to_local() if isinstance(held, DTensor) else held for name, held in tensors.items()}


def config_of(subject: Subject, case: Case) -> Any:
    """The config of a case on a subject."""
    return lorica.LoraConfig(**{"r": 4, "lora_alpha": 6, **subject.fields, **case.fields})


def adapt(base: nn.Module, config: Any, runner: type[Plain] = Plain, ids: Tensor | None = None) -> nn.Module:
    """An adapted model, as a user makes one.

    Args:
        base: this rank's.
        config: of the adapter.
        runner: how the model is run, where its start needs data.
        ids: the data that this rank has; None: the whole batch.
    """
    torch.manual_seed(11)
    ids = batch(ROWS) if ids is None else ids
    known = {"": None, "inputs": None, "covariance": _covariance, "gradient": _gradient}
    needs = find(config.init_lora_weights).needs
    if (before := known[needs]) is not None:
        before(base, config, runner, ids)
    model = lorica.get_peft_model(base, config)
    if needs == "inputs":
        data = [{"input_ids": rows} for rows in ids.chunk(2)]
        lorica.initialize_lora_eva_weights(
            model, data, forward_fn=lambda model, rows: runner(model).logits(rows["input_ids"]), show_progress_bar=False
        )
    return model


def _covariance(base: nn.Module, config: Any, runner: type[Plain], ids: Tensor) -> None:
    """Every rank brings its rows."""
    lorica.preprocess_corda(base, config, lambda: runner(base).logits(ids))


def _gradient(base: nn.Module, config: Any, runner: type[Plain], ids: Tensor) -> None:
    """Every rank brings its rows."""
    lorica.preprocess_loraga(base, config, lambda: runner(base).train(ids))


def entries(model: nn.Module) -> dict[str, Entry]:
    """The adapter's tensors by their names in a file."""
    return adapter_entries(model, "default", model.peft_config["default"])


def near(got: Tensor, wanted: Tensor, what: str, tolerance: float = TOLERANCE) -> None:
    """Refuse a relative difference above the tolerance, by norm."""
    assert got.shape == wanted.shape, f"{what}: {tuple(got.shape)}, wanted {tuple(wanted.shape)}"
    got, wanted = got.detach(), wanted.detach()
    difference = float((got - wanted).norm())
    assert difference <= tolerance * max(float(wanted.norm()), 1e-3), f"{what}: off by {difference}"


def equal(got: Tensor, wanted: Tensor, what: str) -> None:
    """Refuse any difference."""
    assert got.dtype == wanted.dtype, what
    assert torch.equal(got, wanted), f"{what}: not bitwise equal, off by {float((got - wanted).detach().abs().max())}"


def compare(mine: Mapping[str, Entry], whole: Mapping[str, Tensor], what: str, tolerance: float = TOLERANCE) -> None:
    """Compare what this rank has of logical tensors with the whole ones."""
    for name, entry in mine.items():
        piece = piece_of(name, entry)
        assert piece.shape == whole[name].shape, f"{what} of {name}: {piece.shape}, wanted {whole[name].shape}"
        held, wanted = piece.tensor.detach(), whole[name]
        off = sum(float((held[box.local] - wanted[box.logical]).square().sum()) for box in piece.boxes) ** 0.5
        limit = tolerance * max(float(wanted.norm()), 1e-3)
        assert off <= limit, f"{what} of {name}: off by {off}, {limit} allowed"


def gradients(model: nn.Module) -> dict[str, Entry]:
    """The gradients of an adapter, as entries."""
    found = {}
    layers = [module for module in model.modules() if isinstance(module, LoraLayer) and "default" in module.specs]
    still = {id(getattr(m.factors("default"), key)) for m in layers for key in m.specs["default"].frozen}
    for name, entry in entries(model).items():
        if not entry.tied and isinstance(entry.tensor, nn.Parameter) and id(entry.tensor) not in still:
            assert entry.tensor.grad is not None, f"{name} has no gradient"
            found[name] = dataclasses.replace(entry, tensor=entry.tensor.grad)
    return found


def base_weights(model: nn.Module) -> dict[str, Entry]:
    """The weights of the adapted base layers, as entries."""
    return {
        f"{layer.target_name}.{layer.op.weight_name}": Entry(
            "", getattr(layer.get_base_layer(), layer.op.weight_name), roles=layer.op.roles_weight, site=layer.site
        )
        for layer in model.modules()
        if isinstance(layer, LoraLayer)
    }


def wholes(found: Mapping[str, Entry]) -> dict[str, Tensor]:
    """Of a model in one piece: copies of the tensors, as they would be in a file."""
    result = {}
    for name, entry in found.items():
        piece = piece_of(name, entry)
        result[name] = torch.empty(piece.shape, dtype=piece.tensor.dtype)
        for box in piece.boxes:
            result[name][box.logical] = piece.tensor[box.local].detach()
    return result


# ---- collectives ----------------------------------------------------------------------------------------------------


class Collectives(TorchDispatchMode):
    """Counts what is sent between ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Let distributed tensors show what they do inside."""
        if any(issubclass(cls, DTensor) for cls in types):
            return NotImplemented
        space, name = func.name().split("::")
        if "c10d" in space and not name.startswith("wait"):
            self.counts[name.split(".")[0]] += 1
        return func(*args, **(kwargs or {}))


def counted(run: Plain, ids: Tensor) -> Counter[str]:
    """The collectives of a forward and a backward."""
    with Collectives() as seen:
        run.train(ids)
    return seen.counts


@contextmanager
def _flowing(model: nn.Module, subject: Subject) -> Iterator[None]:
    """Let gradients flow through the whole frozen model, from its embedding's output on."""
    embedding = next((m for name, m in model.named_modules() if name.endswith(subject.embedding)), None)
    if embedding is None:  # on another stage
        yield
        return
    handle = embedding.register_forward_hook(lambda module, args, output: output.requires_grad_())
    try:
        yield
    finally:
        handle.remove()


# ---- the contract ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Oracle:
    """What one process gives for a case; outputs and losses for each of the data groups.

    Attributes:
        refusal: what it says to a case that the subject's layers cannot have by their nature, and nothing else. Then
            every layout must refuse it too, in the same words.
        start: the adapter's tensors.
        output: computed with them, of a case that is only started.
        left: what the base model then computes by itself, where the start took something out of it.
        filled: the values that are put into the adapter for all that follows.
        trained, losses, gradients, norm: of a forward and a backward.
        stepped: the adapter's tensors after the steps.
        learned: the output with them.
        weights: of the base layers; merged: with the adapter in them, or why it cannot be.
    """

    refusal: Exception | None = None
    start: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    output: list[Tensor] = dataclasses.field(default_factory=list)
    left: list[Tensor] = dataclasses.field(default_factory=list)
    filled: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    trained: list[Tensor] = dataclasses.field(default_factory=list)
    losses: list[Tensor] = dataclasses.field(default_factory=list)
    gradients: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    norm: Tensor | None = None
    stepped: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    learned: list[Tensor] = dataclasses.field(default_factory=list)
    weights: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    merged: dict[str, Tensor] | AdapterError = dataclasses.field(default_factory=dict)


def check_start(place: Place, case: Case, oracle: Oracle, cut: nn.Module) -> nn.Module:
    """I2: the adapter starts as on one process, and computes the same. Return the adapted model.

    Bit for bit, unless it starts from data, which passed through sums over ranks.
    """
    ids = place.rows(batch(ROWS))
    model = adapt(cut, place.config(case), place.division.runner, ids)
    run = place.run(model)
    verify(model)
    allowed = FROM_DATA[find(case.fields["init_lora_weights"]).needs]
    compare(entries(model), oracle.start, "I2: the start", allowed)
    near(run.logits(ids), oracle.output[place.group], "I1: the output")
    return model


def check_all(place: Place, case: Case, oracle: Oracle, cut: nn.Module) -> nn.Module:
    """Everything else, in the order of a training run. Return the adapted model."""
    mine = place.rows(batch(ROWS))
    model = adapt(cut, place.config(case))
    run = place.run(model)
    optimizer = sgd(model)  # of the parameters that a late engine has made
    before = place.alone
    if before is None or VARIANTS[variant_of(place.config(case))].subtracts:
        with model.disable_adapter():
            before = run.logits(mine)
    if oracle.left:
        near(before, oracle.left[place.group], "I1: the base model that is left")
    if case.off:
        # Sums over ranks in the start and in a forward may differ in their order.
        ordered = place.division.exact and (not case.collectives or place.division.ranks == 1)
        same = equal if ordered else near
        same(run.logits(mine), before, "I8: the output of an adapter that has learned nothing")
    lorica.set_peft_model_state_dict(model, oracle.filled)
    compare(entries(model), oracle.filled, "I6: what was loaded", 0.0)
    with model.disable_adapter():
        equal(run.logits(mine), before, "I8: the output with the adapter off")
    with _flowing(model.get_base_model(), place.subject):
        check_gradients(place, case, oracle, run, model)
    check_steps(place, case, oracle, run, model, optimizer)
    if case.oracle:
        check_merging(place, oracle, run, model)
    check_files(place, case, oracle, model)
    return model


def check_gradients(place: Place, case: Case, oracle: Oracle, run: Plain, model: nn.Module) -> None:
    """I1, I4: output, loss, gradients and their norm are one process's; nothing more was sent than without LoRA."""
    model.train()
    with Collectives() as seen:
        logits, loss = run.train(place.rows(batch(ROWS)))
    if place.division.counted and not case.collectives:
        assert seen.counts == place.without, f"I4: {seen.counts} with LoRA, {place.without} without"
    sum_gradients(model)
    norm = clip_grad_norm_(model, float("inf"))
    if case.oracle:
        near(logits, oracle.trained[place.group], "I1: the output")
        near(loss, oracle.losses[place.group], "I1: the loss")
        compare(gradients(model), oracle.gradients, "I1: the gradient")
        near(norm, oracle.norm, "the norm of all gradients")


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """An optimiser of what trains."""
    return torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], 0.05)


def check_steps(
    place: Place, case: Case, oracle: Oracle, run: Plain, model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """I5: after steps on different batches replicas are equal bit for bit, and the factors are one process's.

    The first is on gradients that are summed already, the second sums them itself.
    """
    optimizer.step()
    optimizer.zero_grad()
    run.train(place.rows(batch(ROWS, seed=1)))
    optimizer.step()
    check_replicas(model)
    if case.oracle:
        compare(entries(model), oracle.stepped, "I1: after steps")


def check_replicas(model: nn.Module) -> None:
    """Whatever two ranks hold of the same tensor is equal bit for bit."""
    mine = {
        (name, str(box.logical)): piece.tensor[box.local].contiguous().numpy().tobytes()
        for name, entry in entries(model).items()
        for piece in [piece_of(name, entry)]
        for box in piece.boxes
    }
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    for rank, other in enumerate(everyone):
        for place, values in other.items():
            assert mine.get(place, values) == values, f"I5: rank {rank} has another {place}"


def check_merging(place: Place, oracle: Oracle, run: Plain, model: nn.Module) -> None:
    """I1, I8: merged weights are one process's, compute the same, and come back."""
    mine = place.rows(batch(ROWS))
    model.eval()
    if isinstance(oracle.merged, AdapterError):
        with pytest.raises(AdapterError, match=re.escape(str(oracle.merged)[:40])):
            model.merge_adapter()
        return
    model.merge_adapter()
    compare(base_weights(model), oracle.merged, "I1: the merged weight")
    near(run.logits(mine), oracle.learned[place.group], "I1: the merged model's output")
    model.unmerge_adapter()
    compare(base_weights(model), oracle.weights, "I8: the weight after unmerging")
    near(run.logits(mine), oracle.learned[place.group], "I8: the output after unmerging")


def check_files(place: Place, case: Case, oracle: Oracle, model: nn.Module) -> None:
    """I6: one file under PEFT's names, which loads on this layout as it was."""
    written = place.save(model)
    if written:
        assert written.keys() == oracle.stepped.keys()
        for name, tensor in oracle.stepped.items():
            assert written[name].shape == tensor.shape
            if case.oracle:
                near(written[name], tensor, f"I6: {name}")
    dist.barrier()
    model.load_adapter(place.folder / "saved", "again")
    again = adapter_entries(model, "again", model.peft_config["again"])
    compare(again, load_file(place.folder / "saved" / "adapter_model.safetensors"), "I6: what was loaded again", 0.0)


def check(division: str, subject: str, names: Mapping[str, Path], folder: str) -> None:
    """Try cases one after the other; rank 0 leaves word of the one that is being tried.

    Args:
        division: by its name.
        subject: by its name.
        names: of the cases, with the files that their oracles are in.
        folder: with the base model, and for what is written.
    """
    place = Place(DIVISIONS[division], SUBJECTS[subject], Path(folder))
    known = cases(division, subject)
    cut = None
    for name, file in names.items():
        case, oracle = known[name], torch.load(file, weights_only=False)
        if dist.get_rank() == 0:
            (place.folder / "trying").write_text(name)
        cut = place.cut() if cut is None else cut
        if oracle.refusal is not None:
            with pytest.raises(type(oracle.refusal), match=re.escape(str(oracle.refusal)[:40])):
                adapt(cut, place.config(case), place.division.runner, place.rows(batch(ROWS)))
            continue
        cut = place.base_again((check_start if case.start else check_all)(place, case, oracle, cut))
        dist.barrier()


def adapted(subject: Subject, case: Case) -> nn.Module | Exception:
    """The adapted model in one piece, or what is said to a case that the subject's layers cannot have."""
    try:
        return adapt(subject.build(), config_of(subject, case))
    except (ConfigError, TargetError) as refusal:
        return refusal


def base_layers(division: str, subject: str) -> list[type]:
    """The classes of the base layers that are adapted there."""
    cut = DIVISIONS[division].cut(SUBJECTS[subject], "")
    model = adapt(cut, config_of(SUBJECTS[subject], Case({})))
    return [type(module.get_base_layer()) for module in model.modules() if isinstance(module, LoraLayer)]
