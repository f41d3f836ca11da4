"""What an adapter can do, one short check each: a feature works on a layer if its check passes.

A check that the library refuses by name makes a cell with the refusal's words; :class:`NoMeaning` one with its own.
Any other end of a check is a fault.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from contract_cases import CHANGING, EXAMPLES
from layers import Layer
from torch import Tensor, nn

import lorica
from lorica import calibration
from lorica.combine import TYPES
from lorica.errors import AdapterError, TargetError
from lorica.init import INITS
from lorica.model.hotswap import hotswap_adapter
from lorica.variants import VARIANTS
from models import VOCABULARY, randomise


class NoMeaning(Exception):
    """The feature has no meaning on this layer, and nothing is wrong with asking for it."""


@dataclass(frozen=True)
class Feature:
    """One row of the table: its heading, the table it stands in, and its check; what the check returns is a remark."""

    name: str
    group: str
    check: Callable[[Layer], str | None]


FEATURES: list[Feature] = []


def feature(name: str, group: str) -> Callable[[Callable[[Layer], str | None]], Callable[[Layer], str | None]]:
    def add(check: Callable[[Layer], str | None]) -> Callable[[Layer], str | None]:
        FEATURES.append(Feature(name, group, check))
        return check

    return add


# ---- what checks share -----------------------------------------------------------------------------------------------


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Norm-wise."""
    assert actual.shape == expected.shape
    assert actual.isfinite().all()
    off = float((actual.detach().double() - expected.detach().double()).norm())
    size = float(expected.detach().double().norm())
    assert off <= tolerance * size, f"{off / max(size, 1e-30):.2e} off, allowed {tolerance:.0e}"


def filled(layer: Layer, **fields: Any) -> tuple[nn.Module, nn.Module]:
    """A base network and its adapted copy with random factors."""
    base = layer.base()
    return base, randomise(layer.adapt(base, **fields))


def trained(layer: Layer, model: nn.Module, steps: int = 3) -> nn.Module:
    """Train a little: every factor that is to train learns, and the loss of a fixed task falls."""
    goal = torch.randn(layer.run(model).shape, generator=torch.Generator().manual_seed(5))

    def loss() -> Tensor:
        return (layer.run(model) - goal.to(layer.dtype)).square().mean()

    before = loss().detach()
    learned: set[str] = set()
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert names
    model.train()
    for _ in range(steps):
        model.zero_grad()
        loss().backward()
        moving = {n: p for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
        learned |= moving.keys()
        with torch.no_grad():
            for parameter in moving.values():
                parameter -= 0.02 * parameter.grad / parameter.grad.norm()
    model.eval()
    assert learned == names, sorted(names - learned)
    assert loss() < before
    return model


def reloaded(layer: Layer, model: nn.Module) -> None:
    """Its file on a fresh base model computes the same."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = lorica.PeftModel.from_pretrained(layer.base(), folder).eval()
    again = again.double() if layer.double else again
    close(layer.run(again), layer.run(model), 1e-5)


def merged(layer: Layer, model: nn.Module, *, may_refuse: bool = False) -> str | None:
    """Merging leaves the output as it is, and unmerging too; or a remark why it is refused."""
    wanted = layer.run(model)
    tolerance = layer.merged or 1e-5
    try:
        model.merge_adapter()
    except (AdapterError, TargetError) as refusal:
        if may_refuse:
            return f"is not merged: {' '.join(str(refusal).removeprefix('target: ').split())}"
        raise
    close(layer.run(model), wanted, tolerance)
    model.unmerge_adapter()
    close(layer.run(model), wanted, tolerance)
    return "merged with the error of the quantised form" if layer.merged else None


# ---- plain LoRA ------------------------------------------------------------------------------------------------------

_PLAIN = "Plain LoRA"


def as_dense(layer: Layer, scale: float, **fields: Any) -> None:
    base, model = filled(layer, **fields)
    batch = layer.batch()
    batch = batch.to(layer.dtype) if batch.is_floating_point() else batch
    close(layer.run(model), layer.expected(base, model, batch, scale), layer.tolerance)


@feature("output of the dense sum, gradients", _PLAIN)
def _(layer: Layer) -> None:
    as_dense(layer, 6 / layer.r)
    trained(layer, filled(layer)[1])


@feature("`use_rslora`", _PLAIN)
def _(layer: Layer) -> None:
    as_dense(layer, 6 / layer.r**0.5, use_rslora=True)


@feature("off means off, bit for bit", _PLAIN)
def _(layer: Layer) -> None:
    base, model = filled(layer)
    assert not torch.equal(layer.run(model), layer.run(base))
    with model.disable_adapter():
        assert torch.equal(layer.run(model), layer.run(base))


@feature("merge and unmerge", _PLAIN)
def _(layer: Layer) -> str | None:
    base, model = filled(layer)
    remark = merged(layer, model)
    plain = randomise(layer.adapt(base)).merge_and_unload()
    assert [type(m) for m in plain.modules()] == [type(m) for m in base.modules()]
    return remark


@feature("file there and back", _PLAIN)
def _(layer: Layer) -> None:
    reloaded(layer, filled(layer)[1])


@feature("`lora_bias`", _PLAIN)
def _(layer: Layer) -> None:
    as_dense(layer, 6 / layer.r, lora_bias=True)
    trained(layer, filled(layer, lora_bias=True)[1])
    reloaded(layer, filled(layer, lora_bias=True)[1])


def dropped(layer: Layer, **fields: Any) -> None:
    """In training a part is dropped, in evaluation nothing."""
    _, plain = filled(layer)
    _, model = filled(layer, lora_dropout=0.5, **fields)
    assert torch.equal(layer.run(model), layer.run(plain))
    model.train()
    same = torch.equal(layer.run(model), layer.run(plain))
    if same and layer.batch().is_floating_point() is False and "target_parameters" not in layer.fields:
        raise NoMeaning("an embedding looks up: there is no input to drop (as in PEFT)")
    if same and isinstance(getattr(layer.base(), "target", None), nn.MultiheadAttention):
        raise NoMeaning("its adapter acts on the weights; a warning says that nothing is dropped (PEFT refuses)")
    assert not same


@feature("`lora_dropout`", _PLAIN)
def _(layer: Layer) -> None:
    dropped(layer)


@feature('`dropout_position="post"`', _PLAIN)
def _(layer: Layer) -> None:
    dropped(layer, dropout_position="post")


@feature("bfloat16", _PLAIN)
def _(layer: Layer) -> None:
    if not layer.double:
        raise NoMeaning("stored in another form; its output's dtype is that of its input")
    base = layer.base().to(torch.bfloat16)
    model = randomise(lorica.get_peft_model(base, layer.config()).eval())
    wide = filled(layer)[1]
    batch = layer.batch()
    output: Any = model(batch.to(torch.bfloat16) if batch.is_floating_point() else batch)
    output = getattr(output, "logits", output)
    assert output.dtype == torch.bfloat16
    close(output, layer.run(wide), 0.15)


@feature("two adapters at once", _PLAIN)
def _(layer: Layer) -> None:
    base, model = filled(layer)
    model.add_adapter("other", layer.config(r=2))
    model = randomise(model.double() if layer.double else model, seed=4).eval()
    outputs = {}
    for names in (["default"], ["other"], ["default", "other"]):
        model.base_model.set_adapter(names)
        outputs["+".join(names)] = layer.run(model)
    both = outputs["default+other"]
    assert not torch.equal(both, outputs["default"])
    assert not torch.equal(both, outputs["other"])
    try:
        wanted, tolerance = layer.run(model.merge_and_unload()), layer.merged or 1e-5
    except (AdapterError, TargetError):  # judged by its being linear
        wanted, tolerance = outputs["default"] + outputs["other"] - layer.run(base), layer.tolerance
    close(both, wanted, tolerance)


@feature("deleted without a trace", _PLAIN)
def _(layer: Layer) -> None:
    base, model = filled(layer)
    model.add_adapter("other", layer.config(r=2))
    model.set_adapter("other")
    model.delete_adapter("default")
    model.delete_adapter("other") if len(model.peft_config) > 1 else None
    plain = model.unload()
    assert [type(m) for m in plain.modules()] == [type(m) for m in base.modules()]
    assert torch.equal(layer.run(plain), layer.run(base))


@feature("rows of a batch name their adapters", _PLAIN)
def _(layer: Layer) -> None:
    _, model = filled(layer)
    model.add_adapter("other", layer.config(r=2))
    model = randomise(model.double() if layer.double else model, seed=4).eval()
    batch = layer.batch()
    names = (["default", "__base__", "other"] * len(batch))[: len(batch)]
    mixed = layer.run(model, adapter_names=names)
    for name in dict.fromkeys(names):
        if name == "__base__":
            with model.disable_adapter():
                alone = layer.run(model)
        else:
            model.set_adapter(name)
            alone = layer.run(model)
        chosen = [row for row, used in enumerate(names) if used == name]
        close(mixed[chosen], alone[chosen], max(layer.tolerance, 1e-6))


# ---- variants --------------------------------------------------------------------------------------------------------


#: What turns a variant on, where that is more than True.
OPTIONS: dict[str, Mapping[str, Any]] = {
    "kasa_config": {"kasa_config": {"beta": 1e-4, "gamma": 1e-3}},
    "use_bdlora": {"use_bdlora": {"nblocks": 2}},
    "use_qalora": {"use_qalora": True, "qalora_group_size": 4},
    "velora_config": {"velora_config": {"num_groups": 2}},
    "monteclora_config": {"monteclora_config": {"num_samples": 2, "buffer_size": 4}},
    **EXAMPLES,
}


def _variant(field: str) -> Callable[[Layer], str | None]:
    def check(layer: Layer) -> str | None:
        fields = OPTIONS.get(field, {field: True})
        base = layer.base()
        if field == "alora_invocation_tokens":
            layer = replace(layer, given={"alora_offsets": [2] * len(layer.batch())})
        model = trained(layer, layer.adapt(base, **{"init_lora_weights": True, **fields}))
        reloaded(layer, model)
        remark = merged(layer, model, may_refuse=True)
        assert not VARIANTS[field].unmergeable or (remark or "").startswith("is not merged")
        return remark

    return check


def _arrow(layer: Layer) -> None:
    """A router over one adapter sends everything through it; over two, something between them."""
    base, model = filled(layer)
    alone = layer.run(model)
    model.add_adapter("router", layer.config(arrow_config={"top_k": 1}, init_lora_weights=True))
    model = (model.double() if layer.double else model).eval()
    model.set_adapter("router")
    close(layer.run(model), alone, max(layer.tolerance, 1e-6))
    model.add_adapter("other", layer.config())
    randomise(model.double() if layer.double else model, seed=4).eval()
    model.set_adapter("router")
    assert not torch.equal(layer.run(model), layer.run(base))


FEATURES += [
    Feature(
        f"`{name}`",
        "Variants: trained, saved, loaded, merged",
        _arrow if name == "arrow_config" else _variant(name),
    )
    for name in VARIANTS
    if name
]


# ---- initialisations -------------------------------------------------------------------------------------------------

#: Fields that an initialisation cannot do without.
STARTS: dict[bool | str, Mapping[str, Any]] = {
    "loftq": {"loftq_config": {"loftq_bits": 4}},
    "lora_ga": {"lora_ga_config": {"direction": "ArBr", "stable_gamma": 16}},
}


def _prepared(layer: Layer, name: bool | str, base: nn.Module, config: Any) -> nn.Module:
    """A base model on which the data of an initialisation was looked at."""
    if name == "corda":
        calibration.preprocess_corda(base, config, lambda: layer.run(base))
    if name == "lora_ga":
        batch = layer.batch()
        batch = batch.requires_grad_() if batch.is_floating_point() else batch
        calibration.preprocess_loraga(base, config, lambda: layer.run(base, batch).square().mean().backward())
    return base


def _from_data(layer: Layer, model: nn.Module) -> str | None:
    """Start EVA, and say where it starts as by default."""
    before = {name: tensor.clone() for name, tensor in lorica.get_peft_model_state_dict(model).items()}
    shape = layer.batch().shape[1:]
    floats = layer.batch().is_floating_point()
    data = [torch.randn(16, *shape) if floats else torch.randint(0, VOCABULARY, (16, *shape)) for _ in range(3)]
    calibration.initialize_lora_eva_weights(
        model,
        [batch.double() if layer.double and batch.is_floating_point() else batch for batch in data],
        forward_fn=lambda model, batch: model(batch),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=None,
        show_progress_bar=False,
    )
    after = lorica.get_peft_model_state_dict(model)
    same = all(torch.equal(before[name], after[name]) for name in before)
    return "starts as by default: its inputs have no directions of their own" if same else None


def _start(name: bool | str) -> Callable[[Layer], str | None]:
    spelled = re.sub("_N$", "_4", name) if isinstance(name, str) else name
    fields: Mapping[str, Any] = {"init_lora_weights": spelled, **STARTS.get(name, {})}

    def check(layer: Layer) -> str | None:
        base = layer.base()
        output = layer.run(base)
        model = layer.adapt(_prepared(layer, name, base, layer.config(**fields)), **fields)
        remark = _from_data(layer, model) if name == "eva" else None
        if name not in CHANGING:
            close(layer.run(model), output, layer.merged or (0.25 if name == "loftq" else 1e-5))
        trained(layer, model)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            again = _prepared(layer, name, layer.base(), layer.config(**fields))
            again = lorica.PeftModel.from_pretrained(again, folder).eval()
        again = again.double() if layer.double else again
        close(layer.run(again), layer.run(model), layer.merged or 1e-5)
        return remark

    return check


_DATA = "Adapters as data"


@feature("hot swap from another rank", _DATA)
def _(layer: Layer) -> None:
    _, model = filled(layer)
    other = randomise(layer.adapt(layer.base(), r=2), seed=4)
    wanted = layer.run(other)
    with tempfile.TemporaryDirectory() as folder:
        other.save_pretrained(folder)
        hotswap_adapter(model, folder, "default")
    close(layer.run(model), wanted, max(layer.tolerance, 1e-6))


@feature("`convert_to_lora`", _DATA)
def _(layer: Layer) -> None:
    base, model = filled(layer)
    config, tensors = lorica.convert_to_lora(model, layer.r)
    plain = lorica.get_peft_model(base, config)
    lorica.set_peft_model_state_dict(plain, tensors, strict=True)
    close(layer.run(plain.double() if layer.double else plain), layer.run(model), max(layer.tolerance, 1e-5))


class Headed(nn.Sequential):
    """A network and a linear layer behind it, for features that leave the first one without factors."""

    def __init__(self, network: nn.Module, width: int) -> None:
        super().__init__()
        self.network, self.head = network, nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.network(x).float() if self.head.weight.dtype == torch.float32 else self.network(x))


def headed(layer: Layer) -> Layer:
    """A layer's network with a head that is adapted in its place."""
    if not hasattr(layer.base(), "target"):
        raise NoMeaning("is a part of a module that would be meant as a whole")
    width = layer.run(layer.base()).shape[-1]
    return replace(layer, build=lambda: Headed(layer.build(), width), fields={"target_modules": ["head"]})


@feature("`trainable_token_indices`", _DATA)
def _(layer: Layer) -> None:
    if layer.batch().is_floating_point() or "target_parameters" in layer.fields:
        raise NoMeaning("has no rows of tokens")
    layer = headed(layer)
    base = layer.base()
    model = layer.adapt(base, trainable_token_indices={"network.target": [1, 5]}, init_lora_weights=True)
    assert torch.equal(layer.run(model), layer.run(base))
    reloaded(layer, trained(layer, model))
    changed = (model.merge_and_unload().network.target.weight != base.network.target.weight).any(1)
    assert set(changed.nonzero().flatten().tolist()) in ({1, 5}, {1}, {5})


@feature("whole layer (`modules_to_save`)", _DATA)
def _(layer: Layer) -> None:
    layer = headed(layer)
    base = layer.base()
    model = layer.adapt(base, modules_to_save=["target"], init_lora_weights=True)
    close(layer.run(model), layer.run(base), 1e-6)
    reloaded(layer, trained(layer, model))


_SUMS = "Weighted sums of adapters"


def _sum(kind: str) -> Callable[[Layer], str | None]:
    def check(layer: Layer) -> str | None:
        _, model = filled(layer)
        model.add_adapter("other", layer.config())
        model = randomise(model.double() if layer.double else model, seed=4).eval()
        options = {} if kind in ("svd", "cat", "linear") else {"density": 1.0 if "ties" not in kind else 0.7}
        rank = {"svd_rank": 8} if "svd" in kind else {}
        model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum", kind, **options, **rank)
        model = model.double() if layer.double else model
        model.base_model.set_adapter(["default", "other"])
        both = layer.run(model)
        model.set_adapter("sum")
        summed = layer.run(model)
        if kind == "cat" or ("svd" in kind and "ties" not in kind):  # the sum of the deltas itself
            close(summed, both, max(layer.tolerance, 1e-6))
        assert summed.isfinite().all()
        model.set_adapter("default")
        assert not torch.equal(summed, layer.run(model))
        return None

    return check


FEATURES += [Feature(f"`{kind}`", _SUMS, _sum(kind)) for kind in TYPES]
FEATURES += [Feature(f"`{name}`", "Initialisations: start, training, file", _start(name)) for name in INITS]
