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
from contract import CHANGING, EXAMPLES
from layers import Layer
from torch import Tensor, nn

import lorica
from lorica.combine import TYPES
from lorica.errors import AdapterError
from lorica.init import INITS
from lorica.variants import VARIANTS
from models import randomise


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


def merged(layer: Layer, model: nn.Module) -> None:
    """Merging leaves the output as it is, and unmerging too."""
    wanted = layer.run(model)
    tolerance = layer.merged or 1e-5
    model.merge_adapter()
    close(layer.run(model), wanted, tolerance)
    model.unmerge_adapter()
    close(layer.run(model), wanted, tolerance)


# ---- plain LoRA ------------------------------------------------------------------------------------------------------

_PLAIN = "Plain LoRA"


def as_dense(layer: Layer, scale: float, **fields: Any) -> None:
    base, model = filled(layer, **fields)
    batch = layer.batch()
    batch = batch.to(layer.dtype) if batch.is_floating_point() else batch
    close(layer.run(model), layer.expected(base, model, batch, scale), layer.tolerance)


@feature("output of the dense sum, gradients", _PLAIN)
def _(layer: Layer) -> None:
    as_dense(layer, 6 / 4)
    trained(layer, filled(layer)[1])


@feature("`use_rslora`", _PLAIN)
def _(layer: Layer) -> None:
    as_dense(layer, 6 / 2, use_rslora=True)


@feature("off means off, bit for bit", _PLAIN)
def _(layer: Layer) -> None:
    base, model = filled(layer)
    assert not torch.equal(layer.run(model), layer.run(base))
    with model.disable_adapter():
        assert torch.equal(layer.run(model), layer.run(base))


@feature("merge and unmerge", _PLAIN)
def _(layer: Layer) -> str | None:
    base, model = filled(layer)
    merged(layer, model)
    plain = randomise(layer.adapt(base)).merge_and_unload()
    assert [type(m) for m in plain.modules()] == [type(m) for m in base.modules()]
    return "a quantised weight is written anew: with the error of its form" if layer.merged else None


@feature("file there and back", _PLAIN)
def _(layer: Layer) -> None:
    reloaded(layer, filled(layer)[1])


@feature("`lora_bias`", _PLAIN)
def _(layer: Layer) -> None:
    as_dense(layer, 6 / 4, lora_bias=True)
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
    except AdapterError:  # judged by its being linear
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
        why = VARIANTS[field].unmergeable
        if why:
            try:
                model.merge_adapter()
            except AdapterError:
                return f"is not merged: {why}"
            raise AssertionError("merged although it says that it cannot be")
        merged(layer, model)
        return "merged with the error of the quantised form" if layer.merged else None

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

#: What an initialisation wants to be done to the base model first.
PREPARATIONS: dict[str, Callable[[Layer, nn.Module, Any], Mapping[str, Any]]] = {}


def _start(name: bool | str) -> Callable[[Layer], str | None]:
    spelled = re.sub("_N$", "_4", name) if isinstance(name, str) else name

    def check(layer: Layer) -> str | None:
        base = layer.base()
        model = layer.adapt(base, init_lora_weights=spelled)
        close(layer.run(model), layer.run(base), layer.merged or 1e-5) if name not in CHANGING else None
        reloaded(layer, trained(layer, model))
        return None

    return check


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
