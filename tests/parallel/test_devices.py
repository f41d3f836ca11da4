"""Device type and process-group backend come from configuration: nothing on the parallel paths names an accelerator.

A backend called ``neuron`` is registered here, which carries CPU tensors by gloo; and torch's open device slot is given
the name ``neuron``, without a device behind it.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from divisions import DIVISIONS
from safetensors.torch import load_file
from subjects import SUBJECTS, batch, logits_of, loss_of
from torch import nn

import lorica
import lorica.parallel
from lorica.compat import optimum_neuron as neuron
from lorica.engines.devices import backend_for
from lorica.errors import ConfigError

LLAMA = SUBJECTS["llama"]
#: lorica's own layers, torch's ``parallelize_module``, and ``fully_shard``.
CUT = ("native", "torch tp2", "torch fsdp2")


def _register() -> None:
    """Let torch know a backend of that name, as a vendor's package does when it is imported."""

    def create(store: Any, rank: int, size: int, timeout: Any) -> Any:
        return dist.ProcessGroupGloo(store, rank, size, timeout)

    dist.Backend.register_backend("neuron", create, devices=["cpu"])


def _trains(folder: str) -> None:
    dist.destroy_process_group()
    _register()
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=Path(folder, "port").read_text())
    config = neuron.TrainingNeuronConfig(
        dist_size(), sequence_parallel_enabled=True, device_type="cpu", backend="neuron", timeout=60
    )
    mesh = config.mesh()
    assert dist.get_backend() == "neuron"
    assert dist.get_backend(mesh.get_group("tp")) == "neuron"
    assert config.device() == torch.device("cpu")
    _as_on_one_process(config.parallelize(LLAMA.build(), mesh), f"{folder}/{CUT[0]}")
    for name in CUT[1:]:
        _as_on_one_process(DIVISIONS[name].cut(LLAMA, folder), f"{folder}/{name}")
    _starts_from_data()


def _as_on_one_process(cut: nn.Module, folder: str) -> None:
    whole = LLAMA.build()
    torch.manual_seed(0)
    model = neuron.get_peft_model(cut, lorica.LoraConfig(**LLAMA.fields))
    torch.manual_seed(0)
    oracle = lorica.get_peft_model(whole, lorica.LoraConfig(**LLAMA.fields))
    ids = batch(1)
    for _ in range(2):
        losses = []
        for one in (model, oracle):
            optimizer = torch.optim.SGD(lorica.parallel.parameter_groups(one), 0.5)
            loss = loss_of(logits_of(one(input_ids=ids)), ids)
            loss.backward()
            lorica.parallel.sum_gradients(one)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-5)
    model.save_pretrained(folder)


def _starts_from_data() -> None:
    """EVA asks all ranks whether they have another batch, and whether they have settled."""
    fields = {**LLAMA.fields, "init_lora_weights": "eva", "eva_config": lorica.EvaConfig()}
    model = lorica.get_peft_model(LLAMA.build(), lorica.LoraConfig(**fields))
    batches = [{"input_ids": batch(1 + number + dist.get_rank())} for number in range(2 + dist.get_rank())]
    lorica.initialize_lora_eva_weights(model, batches)
    for name, parameter in model.named_parameters():
        if ".lora_A." in name:
            first = parameter.detach().clone()
            dist.broadcast(first, 0)
            assert torch.equal(parameter, first), name
            assert parameter.any(), name


def dist_size() -> int:
    return int(os.environ["WORLD_SIZE"])


def test_a_model_trains_over_a_backend_of_another_name(tmp_path: Path) -> None:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        (tmp_path / "port").write_text(str(free.getsockname()[1]))
    ranks.run(2, _trains, str(tmp_path))
    first, *others = (load_file(tmp_path / name / "adapter_model.safetensors") for name in CUT)
    for other in others:
        assert other.keys() == first.keys()
        for name, tensor in other.items():
            torch.testing.assert_close(tensor, first[name], rtol=1e-4, atol=1e-6, msg=name)


def _divided(folder: str) -> tuple[list[tuple[str, ...] | None], list[str]]:
    """The meshes of some configurations on 4 ranks, and which layers are cut where the embeddings are to be left."""
    cpu: dict[str, Any] = {"device_type": "cpu", "backend": "gloo"}
    stages = neuron.TrainingNeuronConfig(2, pipeline_parallel_size=2, **cpu)
    meshes = [neuron.TrainingNeuronConfig(size, **cpu).mesh().mesh_dim_names for size in (4, 2, 1)]
    model = neuron.get_peft_model(stages.parallelize(LLAMA.build()), lorica.LoraConfig(**LLAMA.fields, r=2))
    model.save_pretrained(folder)
    left = neuron.TrainingNeuronConfig(4, parallelize_embeddings=False, **cpu).parallelize(LLAMA.build())
    native = [name for name, module in left.named_modules() if isinstance(module, lorica.parallel.ParallelEmbedding)]
    heads = type(left.lm_head).__name__  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match="4 ranks are not a multiple of 2 stages of 4 ranks"):
        neuron.TrainingNeuronConfig(4, pipeline_parallel_size=2, **cpu).mesh()
    return [*meshes, stages.mesh().mesh_dim_names], [*native, heads]


def test_ranks_are_divided_as_the_configuration_says(tmp_path: Path) -> None:
    for meshes, left in ranks.run(4, _divided, str(tmp_path)):
        assert meshes == [("tp",), ("dp", "tp"), ("dp",), ("pp", "tp")]
        assert left == ["Linear"]
    whole = lorica.get_peft_model_state_dict(
        lorica.get_peft_model(LLAMA.build(), lorica.LoraConfig(**LLAMA.fields, r=2))
    )
    found = load_file(tmp_path / "adapter_model.safetensors")
    assert {name: t.shape for name, t in found.items()} == {name: t.shape for name, t in whole.items()}


_NAMED = """
import torch
torch.utils.rename_privateuse1_backend("neuron")
import torch.distributed as dist
dist.Backend.register_backend("neuron", lambda *a: None, devices=["neuron"])
from lorica.compat.optimum_neuron import TrainingNeuronConfig
from lorica.engines.devices import backend_for
config = TrainingNeuronConfig(device_type="neuron")
print(config.device(), config._backend("neuron"), backend_for("neuron"))
"""


def test_the_backend_is_what_torch_has_for_the_device() -> None:
    done = subprocess.run([sys.executable, "-c", _NAMED], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["neuron:0", "neuron", "neuron"]
    assert backend_for("cpu") == "gloo"
    assert backend_for("cuda") == "nccl"
    assert backend_for("toaster") is None


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="import the package that registers it"):
        neuron.TrainingNeuronConfig(device_type="toaster").device()
    with pytest.raises(ConfigError, match="no backend for 'toaster'"):
        neuron.TrainingNeuronConfig()._backend("toaster")
    with pytest.raises(ConfigError, match="start the program by torchrun"):
        neuron.TrainingNeuronConfig(2, device_type="cpu").mesh()
    with pytest.raises(ConfigError, match="at least 1"):
        neuron.TrainingNeuronConfig(0)
    with pytest.raises(ConfigError, match="virtual_pipeline"):
        neuron.TrainingNeuronConfig(virtual_pipeline_parallel_size=2)
    assert neuron.TrainingNeuronConfig(8).auto_kv_size_multiplier(4) == 2
    assert not neuron.TrainingNeuronConfig().should_parallelize
    with pytest.raises(ConfigError, match="different from the inferred"):
        neuron.TrainingNeuronConfig(8, kv_size_multiplier=4).auto_kv_size_multiplier(4)


#: What is PEFT's own; and lists of what kinds of devices lack or have, which torch does not tell.
MAY_NAME = {
    "compat/peft": "its arguments",
    "helpers.py": "PEFT's prepare_model_for_kbit_training, which frees CUDA's cache",
    "lowrank/decompose.py": "kinds without float64",
    "optim/adamw.py": "kinds with torch's fused kernels",
}


def test_no_accelerator_is_named() -> None:
    """No call of ``torch.cuda``, and no name of a kind of device or of a backend, in any room."""
    source = Path(lorica.__file__).parent
    found: dict[str, list[int]] = {}
    for path in source.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            attribute = isinstance(node, ast.Attribute) and node.attr in ("cuda", "mps", "xpu")
            word = isinstance(node, ast.Constant) and node.value in ("cuda", "mps", "xpu", "nccl", "xla")
            if attribute or word:
                found.setdefault(path.relative_to(source).as_posix(), []).append(node.lineno)
    allowed = tuple(MAY_NAME)
    assert {name: lines for name, lines in found.items() if not name.startswith(allowed)} == {}
    assert "optim/adamw.py" in found  # so that names would be found
