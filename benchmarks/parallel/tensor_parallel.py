"""A Llama that transformers cut (``DistributedConfig(tp_size=…)``), adapted by peft and by lorica."""

from __future__ import annotations

import shutil
import tempfile
from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AutoModel, LlamaConfig, LlamaModel
from transformers.distributed import DistributedConfig

import lorica
from benchmarks.models import LIBRARIES, call_llama
from benchmarks.parallel.decoder import RANK, SCALE, Sizes
from benchmarks.parallel.side import Side
from benchmarks.suite import FROZEN, LORICA, PEFT, quiet

COLUMNS = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"]
ROWS = ["o_proj", "down_proj"]


def sides(sizes: Sizes) -> dict[str, Side]:
    """Return the frozen model, and peft and lorica on its column-parallel layers with equal logical factors."""
    models = {FROZEN: _load(sizes), **{name: adapt(name, _load(sizes), COLUMNS) for name in (PEFT, LORICA)}}
    _fill(models)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(sizes.batch, sizes.tokens, sizes.width, generator=generator)
    return {name: Side(model, partial(call_llama, model), x) for name, model in models.items()}


def refusal(sizes: Sizes, targets: list[str]) -> str | None:
    """Return what peft raises in a training step on these layers, or None if it trains."""
    try:
        model = adapt(PEFT, _load(sizes), targets)
        x = torch.zeros(sizes.batch, sizes.tokens, sizes.width)
        call_llama(model, x).sum().backward()  # type: ignore[no-untyped-call]
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def adapt(library: str, model: nn.Module, targets: list[str]) -> nn.Module:
    """Return the model adapted in place by one of the libraries."""
    config = {"r": RANK, "lora_alpha": RANK * SCALE, "target_modules": targets}
    with quiet():
        adapted: nn.Module = LIBRARIES[library].get_peft_model(model, LIBRARIES[library].LoraConfig(**config))
    return adapted


@torch.no_grad()
def _fill(models: dict[str, nn.Module]) -> None:
    """Give both libraries the same factors, none of them zero."""
    generator, state = torch.Generator().manual_seed(2), {}
    for name, parameter in models[PEFT].named_parameters():
        if parameter.requires_grad:  # whole, or a distributed tensor that knows its whole shape
            whole = torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5
            state[name.replace(".default", "")] = whole
            if isinstance(parameter, DTensor):
                parameter.to_local().copy_(whole.chunk(dist.get_world_size())[dist.get_rank()])
            else:
                parameter.copy_(whole)
    lorica.set_peft_model_state_dict(models[LORICA], state)


def _load(sizes: Sizes) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=sizes.width,
        intermediate_size=sizes.inner,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.heads // 2,
        use_cache=False,
    )
    folder = [tempfile.mkdtemp(prefix="llama-") if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(folder)
    try:
        if dist.get_rank() == 0:
            LlamaModel(config).save_pretrained(folder[0])
        dist.barrier()
        distributed = DistributedConfig(tp_size=dist.get_world_size())
        with quiet():
            model: nn.Module = AutoModel.from_pretrained(folder[0], distributed_config=distributed)
        dist.barrier()
    finally:
        if dist.get_rank() == 0:
            shutil.rmtree(folder[0])
    return model.requires_grad_(False)
