"""The registry: how a base layer's weight is stored, found by the names of classes.

No package of a quantiser is imported for it. Another quantiser is one file with its kind, and one line here.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lorica.engines.kinds import is_distributed
from lorica.engines.registry import lender_of
from lorica.errors import AdapterError
from lorica.storage.base import Packed, Quantised, Storage
from lorica.storage.bitsandbytes import FOUR_BIT, INT8_ROWS
from lorica.storage.dense import STORAGES
from lorica.storage.fixed import AQLM, AWQ, EETQ, GPTQ, INC
from lorica.storage.hqq import HQQ
from lorica.storage.torchao import TORCHAO

_GPTQMODEL = "gptqmodel.nn_modules.qlinear"
_INC = "neural_compressor.torch.algorithms.fp8_quant._quant_common.helper_modules"

#: Linear layers that are no ``nn.Linear``, by the full name of their class or of a base of it → their kind.
LINEARS: dict[str, Quantised] = {
    "hqq.core.quantize.HQQLinear": HQQ,
    f"{_GPTQMODEL}.AWQuantLinear": AWQ,
    f"{_GPTQMODEL}.BaseQuantLinear": GPTQ,
    "aqlm.inference.QuantizedLinear": AQLM,
    "eetq.modules.qlinear.EetqLinear": EETQ,
    "transformers.integrations.eetq.EetqLinear": EETQ,
    f"{_INC}.PatchedLinear": INC,
}
#: Full name of the class of a parameter, or of a base of it, or of a linear layer's → its kind.
KINDS: dict[str, Quantised] = {
    "bitsandbytes.nn.modules.Int8Params": INT8_ROWS,
    "bitsandbytes.nn.modules.Params4bit": FOUR_BIT,
    "torchao.utils.TorchAOBaseTensor": TORCHAO,
    **LINEARS,
}


def stored_weight(base: Any, name: str) -> Tensor | Packed:
    """Return a base layer's weight as it is stored: the parameter, or what stands for a quantised one.

    Args:
        base: the base layer.
        name: the parameter that a delta belongs to.
    """
    kind = kind_of(type(base))
    if kind is None:
        weight: Any = base._parameters.get(name)
        if type(weight) is nn.Parameter and "quant_state" not in base.__dict__:
            return weight  # plain numbers, as nearly always
        if weight is None:
            weight = getattr(lender_of(base), name)  # what stands in a parameter's place
        kind = kind_of(type(weight._local_tensor if is_distributed(weight) else weight))
        if kind is None and base.__dict__.get("quant_state") is not None:
            kind = FOUR_BIT  # fully-sharded parallelism leaves of such a parameter the numbers alone
        if kind is None and is_distributed(weight) and not weight.is_floating_point():
            kind = INT8_ROWS
        if kind is None or not kind.holds(base, name):
            return weight  # type: ignore[no-any-return]
    return Packed(base, name, kind)


def kind_of(cls: type) -> Quantised | None:
    """Return the quantised form that a class of layers or of parameters means, or None."""
    try:
        return _FOUND[cls]
    except KeyError:
        names = [f"{base.__module__}.{base.__qualname__}" for base in cls.__mro__]
        _FOUND[cls] = next((KINDS[name] for name in names if name in KINDS), None)
        return _FOUND[cls]


_FOUND: dict[type, Quantised | None] = {}


def storage_of(weight: Tensor | Packed, where: str) -> Storage:
    """Return the storage of ``weight``.

    Raises:
        AdapterError: no storage is known for its dtype; ``where`` names the module.
    """
    if isinstance(weight, Packed):
        return weight.storage
    try:
        return STORAGES[weight.dtype]
    except KeyError:
        raise AdapterError(
            f"{where}: a base weight stored as {weight.dtype} cannot take a delta; known: {[*map(str, STORAGES)]}"
        ) from None
