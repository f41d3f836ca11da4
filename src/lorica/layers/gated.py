"""Gated MLPs whose three adapted linears are computed as one: ``down(act(gate(x)) · up(x))``.

Which module is one, and in which order, is not read from names: a forward of the module's own class, on small random
linears in the places of its own, is compared with the formula. What is fused keeps its modules, its parameters and
their names; it gets a forward that takes the short way through all three layers where that can be taken through each of
them (see :mod:`lorica.layers.lean`), and is the class's own everywhere else.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lorica.kernels import Dropped, draw_seed, gated, kernel_for
from lorica.kernels.gated import ACTIVATIONS, Gated
from lorica.kernels.projection import Projection
from lorica.layers import lean
from lorica.layers.layer import LoraLayer
from lorica.ops.linear import Linear

#: Sizes of the linears that a block's forward is tried with, tokens, and how large the values are that it sees.
_IN, _INNER, _OUT = 6, 10, 7
_SHAPES = ((3,), (2, 4))
_SIZES = (0.1, 1.0, 30.0)
_TOLERANCE = 1e-10


class Order(NamedTuple):
    """How a block computes.

    Attributes:
        into: names of gate and up, or of the one layer that has both in its rows.
        down: name of the layer behind them.
        activation: a key of :data:`lorica.kernels.gated.ACTIVATIONS`.
        up_first: whether up comes before gate.
    """

    into: tuple[str, ...]
    down: str
    activation: str
    up_first: bool


class _Block(NamedTuple):
    """A block as it was when its forward was tried.

    Attributes:
        order: how it computes.
        forward: of its class.
        children: all of its modules, by name.
        act_forward: of the class of its activation, if that is a module.
    """

    order: Order
    forward: Any
    children: dict[str, nn.Module]
    act_forward: Any


class Fused:
    """The forward of a block that is computed as one.

    Args:
        module: the block.
        block: what was found out about it; a copy finds that out for itself, in its first forward.
    """

    def __init__(self, module: nn.Module, block: _Block) -> None:
        self.module = module
        self.block: _Block | str | None = block

    def __getstate__(self) -> dict[str, Any]:
        return {"module": self.module, "block": None}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the block's output."""
        if len(args) == 1 and not kwargs and (output := self._short(args[0])) is not None:
            return output
        return type(self.module).forward(self.module, *args, **kwargs)

    def _short(self, x: Any) -> Tensor | None:
        if not lean.is_open(x):
            return None
        block = self.block
        if block is None:
            block = self.block = _look(self.module)
        if isinstance(block, str) or not _unchanged(self.module, block):
            return None
        return lean.in_dtype(_run, block, x)


def _run(block: _Block, x: Tensor, dtype: torch.dtype, *, autocast: bool) -> Tensor | None:
    order = block.order
    layers = [block.children[name] for name in (*order.into, order.down)]
    found = [lean.find(layer, dtype, autocast=autocast) for layer in layers]
    ready = [each for each in found if each is not None]
    if len(ready) < len(layers):
        return None
    *into, last = [each.dropout(layer.__dict__) for each, layer in zip(ready, layers, strict=True)]
    if len(set(into)) > 1:
        return None
    # As gate and up draw when they are called: one mask for both. Then down, whose input there is not yet.
    first, *_ = [lean.drawn(layer, p, x) for layer, p in zip(layers, into, strict=False)]
    masks = [first] * len(into) + [Dropped(last, draw_seed()) if last else None]
    items: list[Projection] = [
        each.projection(layer.__dict__, mask) for each, layer, mask in zip(ready, layers, masks, strict=True)
    ]
    item = Gated(tuple(items[:-1]), items[-1], order.activation, order.up_first)
    x = x.to(dtype) if autocast else x
    run: Callable[..., Tensor] = kernel_for("gated", x, item)
    return run(x, item)


def _unchanged(module: nn.Module, block: _Block) -> bool:
    """Tell whether nothing came in between since: another module, a hook, a forward put in the place of one."""
    children, modules = block.children, module._modules
    if len(modules) != len(children) or type(module).forward is not block.forward:
        return False
    for name, child in children.items():
        if modules.get(name) is not child or "forward" in child.__dict__:
            return False
        if child._forward_hooks or child._forward_pre_hooks or child._backward_hooks or child._backward_pre_hooks:
            return False
        if type(child) is LoraLayer:
            switch = child.switch
            if not switch.enabled or (switch.routing and switch.rows is not None):
                return False
        elif type(child).forward is not block.act_forward:
            return False
    return True


def fuse_mlps(model: nn.Module) -> list[str]:
    """Compute the gated MLPs of an adapted model as one each, so that backward needs less memory.

    Kept for backward are the block's input, gate and up, and not what is made of them: ``act(gate)`` and the product
    are made again. Outputs and gradients are the same; parameters, their names, files, merging and unloading are not
    concerned. Blocks are recognised by what they compute (gate, up and down, or gate and up in one weight; SiLU, GELU
    or ReLU). Each falls back to its own forward wherever one of its layers is not plain LoRA on a whole dense weight,
    or has hooks.

    Args:
        model: the adapted model.

    Returns:
        The names of the blocks that are fused.

    Warns:
        UserWarning: a block has adapted linears in the shapes of a gated MLP, and is left alone; or no block is fused.
    """
    names = []
    for name, module in model.named_modules():
        if _adapted(module) is None:
            continue
        block = _look(module)
        if not isinstance(block, str) and (reason := _never_short(module, block)):
            block = reason
        if isinstance(block, str):
            warnings.warn(f"{name}: the MLP is left as it is: {block}", stacklevel=2)
            continue
        module.forward = Fused(module, block)
        names.append(name)
    if not names:
        warnings.warn("no MLP is fused: no module holds adapted gate, up and down projections", stacklevel=2)
    return names


def unfuse_mlps(model: nn.Module) -> list[str]:
    """Undo :func:`fuse_mlps`.

    Args:
        model: the model.

    Returns:
        The names of the blocks that were fused.
    """
    names = []
    for name, module in model.named_modules():
        if isinstance(module.__dict__.get("forward"), Fused):
            del module.__dict__["forward"]
            names.append(name)
    return names


# ---- what a block computes ------------------------------------------------------------------------------------------


def _adapted(module: nn.Module) -> dict[str, LoraLayer] | None:
    """Return a module's own adapted linears, if they are two or three and have the shapes of a gated MLP."""
    layers = {
        name: child
        for name, child in module._modules.items()
        if type(child) is LoraLayer and type(child.op) is Linear and isinstance(child.base_layer, nn.Linear)
    }
    if len(layers) not in (2, 3) or not any(_orders(layers)):
        return None
    try:
        inspect.signature(type(module).forward).bind(module, None)
    except TypeError:
        return None  # an attention, whose forward takes more than the input
    return layers


def _orders(layers: dict[str, LoraLayer]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield the ways in which layers may follow one another: (gate, up), down, or (both), down."""
    shapes = {name: (layer.base_layer.in_features, layer.base_layer.out_features) for name, layer in layers.items()}
    for *into, down in itertools.permutations(layers):
        inner = sum(shapes[name][1] for name in into)
        if len({shapes[name] for name in into}) == 1 and inner == 2 * shapes[down][0]:
            yield tuple(into), down


def _look(module: nn.Module) -> _Block | str:
    """Return how a block computes, or why it is not known."""
    layers = _adapted(module)
    if layers is None:
        return "it has other linears than it had"
    children = {name: child for name, child in module._modules.items() if child is not None}
    others = {name: child for name, child in children.items() if name not in layers}
    if "forward" in module.__dict__ and not isinstance(module.__dict__["forward"], Fused):
        return "the object has a forward of its own"
    if len(others) > 1 or any(child.state_dict() or [*child.parameters()] for child in others.values()):
        return f"it has more modules than an activation ({', '.join(others)})"
    if module._parameters or module._buffers:
        return "it has tensors of its own"
    own = {name: value for name, value in module.__dict__.items() if callable(value) and name != "forward"}
    if own:
        return f"it holds functions ({', '.join(own)}), which may be replaced unseen"
    try:
        order = _order(module, layers, others)
    except Exception as error:  # code of any kind
        return f"its forward cannot be tried with small linears ({type(error).__name__}: {error})"
    if order is None:
        return f"{type(module).__name__}.forward is not down(act(gate(x)) · up(x)) with {', '.join(ACTIVATIONS)}"
    act_forward = next((type(child).forward for child in others.values()), None)
    return _Block(order, type(module).forward, children, act_forward)


def _never_short(module: nn.Module, block: _Block) -> str:
    """Return why the short way could not be taken through a block's layers as they are; empty: it could."""
    for name in (*block.order.into, block.order.down):
        layer: Any = module._modules[name]
        if layer.site is not None:
            return f"{name} lies over ranks"
        if type(layer.base_layer._parameters.get("weight")) is not nn.Parameter:
            return f"the weight of {name} is not dense"
        found = lean.Lean(layer)
        plain = found.fits and found.variant is None
        if not plain and any(adapter in layer.specs for adapter in found.active):
            return f"what is active on {name} is not one adapter of plain LoRA"
    return ""


def _order(module: nn.Module, layers: dict[str, LoraLayer], others: dict[str, nn.Module]) -> Order | None:
    for into, down in _orders(layers):
        square = layers[into[0]].base_layer.in_features == layers[down].base_layer.out_features
        trials = list(_trials(module, others, into, down, _IN if square else _OUT))
        for activation, up_first in itertools.product(ACTIVATIONS, (False, True)):
            wanted = [gated.plain_mlp(x, Gated(items, last, activation, up_first)) for x, _, items, last in trials]
            if all(
                torch.allclose(y, z, _TOLERANCE, _TOLERANCE) for (_, y, _, _), z in zip(trials, wanted, strict=True)
            ):
                return Order(into, down, activation, up_first)
    return None


def _trials(
    module: nn.Module, others: dict[str, nn.Module], into: tuple[str, ...], down: str, out: int
) -> Iterator[tuple[Tensor, Tensor, tuple[Projection, ...], Projection]]:
    """Yield inputs, what the block's own forward makes of them with small random linears, and these linears."""
    generator = torch.Generator().manual_seed(0)
    widths = {name: (_IN, _INNER * 2 // len(into)) for name in into} | {down: (_INNER, out)}
    linears = {name: _small(*shape, generator) for name, shape in widths.items()}
    for training in (False, True):
        stub = copy.copy(module)
        stub.__dict__.pop("forward", None)
        rest = {name: copy.deepcopy(child).train(training) for name, child in others.items()}
        stub.__dict__["_modules"] = {name: linears[name] if name in linears else rest[name] for name in module._modules}
        stub.__dict__["training"] = training
        for shape, size in itertools.product(_SHAPES, _SIZES):
            x = size * torch.randn(*shape, _IN, generator=generator, dtype=torch.float64, device="cpu")
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                y = type(stub).forward(stub, x)
            yield x, y, tuple(_bare(linears[name]) for name in into), _bare(linears[down])


def _small(size: int, out: int, generator: torch.Generator) -> nn.Linear:
    linear = nn.Linear(size, out, dtype=torch.float64, device="meta").to_empty(device="cpu")  # draws nothing
    for each in linear.parameters():
        each.data.normal_(generator=generator)
    return linear.requires_grad_(False)


def _bare(linear: nn.Linear) -> Projection:
    """Return a linear with factors that add nothing."""
    weight = linear.weight
    return Projection(weight, linear.bias, weight.new_zeros(1, weight.shape[1]), weight.new_zeros(len(weight), 1), 1.0)
