"""What lets megatron-core 0.16 run on a machine without a GPU: patches of a rank of the tests, never of the package.

Megatron-Core calls CUDA directly in many places. Each level below unlocks more of it; :func:`install` does all of them.
A rank is a process of its own and is thrown away (``world.py``), so nothing here is undone.

===== ======================================================================== =====================================
level what is patched                                                          what runs then
===== ======================================================================== =====================================
1     ``torch.cuda.current_device`` is the CPU                                 linears and embeddings, also with SP
2     CUDA's generator is the CPU's                                            ``GPTModel``, dropout, recomputation
3     streams, events and waiting do nothing; ``device="cuda"``, ``.cuda()``,  dispatch to experts, pipeline
      ``record_stream``, ``pin_memory`` mean the CPU                           schedules, DDP, optimisers, clipping
4     norms without Apex under SP, gloo's uneven collectives, a grouped        SP with the local spec, EP and ETP,
      product in torch, host copies that are numpy arrays                      ``GroupedMLP``
===== ======================================================================== =====================================
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

CPU = torch.device("cpu")
#: What is imported before anything is patched, and without compiling what it fuses, in every rank once more.
IMPORTED = [
    "dist_checkpointing.strategies.torch",
    "distributed.finalize_model_grads",
    "models.gpt.gpt_layer_specs",
    "models.gpt.moe_module_specs",
    "optimizer.distrib_optimizer",
    "pipeline_parallel.schedules",
    "transformer.moe.experts",
]
_INSTALLED: list[bool] = []


def install() -> None:
    """Import megatron-core and patch this process, once."""
    if _INSTALLED:
        return
    _INSTALLED.append(True)
    with mock.patch.object(torch, "compile", _as_it_is), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of packages that are not installed, and of its own deprecated imports
        for name in IMPORTED:
            importlib.import_module(f"megatron.core.{name}")
    _level_1()
    _level_2()
    _level_3()
    _level_4()
    warnings.filterwarnings("ignore", module=r"megatron\.core\.")  # its own calls of what it deprecates itself
    warnings.filterwarnings("ignore", r".torch\.distributed\.\w+. is deprecated", FutureWarning)  # and torch later


def _as_it_is(function: Any = None, **_: Any) -> Any:
    return _as_it_is if function is None else function


def _level_1() -> None:
    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment,return-value]


def _level_2() -> None:
    from torch.cuda import random as cuda_random

    def read(device: Any = None) -> Tensor:
        return torch.get_rng_state()

    def write(state: Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)

    for place in (torch.cuda, cuda_random):
        place.manual_seed = lambda seed: torch.default_generator.manual_seed(seed)  # type: ignore[attr-defined]
        place.get_rng_state = read  # type: ignore[attr-defined]
        place.set_rng_state = write  # type: ignore[attr-defined]


class Stream:
    """A stream on which everything has happened already."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: Stream()


class Event(Stream):
    """An event that has happened."""


#: What makes tensors on a device that it is told by name. A mode of torch's would see every call, and take longer.
_MAKING = ("arange", "empty", "full", "ones", "rand", "randn", "tensor", "zeros")


def _on_the_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which does on the CPU what is asked of a CUDA device."""

    @functools.wraps(function)
    def there(*args: Any, **kwargs: Any) -> Any:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        kwargs.pop("pin_memory", None)
        return function(*(CPU if _is_cuda(arg) else arg for arg in args), **kwargs)

    return there


def _is_cuda(device: Any) -> bool:
    return isinstance(device, torch.device | str) and str(device).startswith("cuda")


_type = Tensor.type


def _cuda_type(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Its optimisers sort parameters by the names of types."""
    found = _type(tensor, *args, **kwargs)
    return found.replace("torch.", "torch.cuda.") if isinstance(found, str) else found


def _level_3() -> None:
    cuda: Any = torch.cuda
    cuda.Stream, cuda.Event = Stream, Event
    cuda.stream = contextlib.nullcontext
    cuda.current_stream = cuda.default_stream = Stream
    cuda.synchronize = cuda.empty_cache = cuda.set_device = lambda *args, **kwargs: None
    cuda.nvtx = SimpleNamespace(range_push=lambda *a, **k: None, range_pop=lambda *a, **k: None)
    for name in _MAKING:
        setattr(torch, name, _on_the_cpu(getattr(torch, name)))
    Tensor.to = _on_the_cpu(Tensor.to)  # type: ignore[method-assign]
    Tensor.type = _cuda_type  # type: ignore[method-assign]
    Tensor.cuda = Tensor.pin_memory = lambda tensor, *args, **kwargs: tensor  # type: ignore[method-assign]
    Tensor.record_stream = lambda *args, **kwargs: None  # type: ignore[method-assign]


def _level_4() -> None:
    dist.all_gather = _padded_all_gather
    dist.reduce_scatter = _padded_reduce_scatter
    from megatron.core.models import backends
    from megatron.core.models.gpt import gpt_layer_specs
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer import torch_norm, transformer_block
    from megatron.core.transformer.moe import grouped_gemm_util, moe_utils, token_dispatcher

    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    # Recomputation of a block's part asks Transformer Engine whether it is in 8 bits, be it there or not.
    random.FP8GlobalStateManager = SimpleNamespace(is_fp8_enabled=lambda: False)
    random.activation_recompute_forward = random.fp8_autocast = lambda **_: contextlib.nullcontext()
    moe_utils.te_general_gemm = None
    moe_utils.maybe_move_tensor_to_cpu = token_dispatcher.maybe_move_tensor_to_cpu = _host_copy
    for place in (torch_norm, backends):
        place.WrappedTorchNorm = Norm
    backends.LNImpl = Norm
    for place in (gpt_layer_specs, transformer_block):
        for name in ("LNImpl", "LayerNormImpl"):
            if hasattr(place, name):
                setattr(place, name, Norm)
    grouped_gemm_util.grouped_gemm = grouped_gemm_util  # it is asked whether there is such a package
    grouped_gemm_util.ops = SimpleNamespace(gmm=gmm)


class Norm:
    """Makes a norm as Megatron-Core's builders do; its parameters say that their gradients are of a rank's tokens."""

    def __new__(cls, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> Any:
        kind = nn.RMSNorm if config.normalization == "RMSNorm" else nn.LayerNorm
        made = kind(hidden_size, eps=eps)
        for parameter in made.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return made


def _host_copy(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if as_numpy and isinstance(tensor, Tensor) else tensor


def gmm(a: Tensor, b: Tensor, batch_sizes: Tensor, trans_b: bool = False) -> Tensor:
    """The product of a grouped-GEMM package: the rows of each expert with that expert's matrix."""
    pieces = torch.split(a, batch_sizes.tolist())
    weights = b.transpose(1, 2) if trans_b else b
    return torch.cat([piece @ weight for piece, weight in zip(pieces, weights, strict=True)])


_all_gather, _reduce_scatter = dist.all_gather, dist.reduce_scatter


def _padded_all_gather(tensors: list[Tensor], tensor: Tensor, group: Any = None, async_op: bool = False) -> Any:
    longest = max(len(one) for one in tensors) if tensors[0].dim() else 0
    if all(one.shape == tensor.shape for one in tensors):
        return _all_gather(tensors, tensor.contiguous(), group=group, async_op=async_op)
    rows = [one.new_empty(longest, *one.shape[1:]) for one in tensors]
    _all_gather(rows, _padded(tensor, longest), group=group)
    for one, row in zip(tensors, rows, strict=True):
        one.copy_(row[: len(one)])
    return None


def _padded_reduce_scatter(output: Tensor, tensors: list[Tensor], op: Any = None, group: Any = None) -> Any:
    total = [one.clone() for one in tensors]  # gloo reduces whole tensors
    flat = torch.cat([one.reshape(-1) for one in total])
    dist.all_reduce(flat, group=group)
    start = sum(one.numel() for one in total[: dist.get_rank(group)])
    output.copy_(flat[start : start + output.numel()].view_as(output))


def _padded(tensor: Tensor, length: int) -> Tensor:
    return torch.cat([tensor, tensor.new_zeros(length - len(tensor), *tensor.shape[1:])])
