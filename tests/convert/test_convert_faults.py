"""What a conversion refuses, and what no file can make it do."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from conversions import assert_same, contents, move, save, words
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.metadata import TensorProperties
from typer.testing import CliRunner

from lorica.cli.app import app
from lorica.convert import read_adapter
from lorica.convert.dcp import Distributed, DistributedWriter
from lorica.convert.megatron import find_iteration
from lorica.errors import CheckpointError, ExportError, LayoutError

MODEL = {"num_layers": 2, "num_attention_heads": 4, "num_query_groups": 2, "hidden_size": 16, "gated_linear_unit": True}
PEFT = {"_target_": "megatron.bridge.peft.lora.LoRA", "dim": 2, "alpha": 6}


def bridge(folder: Path, tensors: dict[str, torch.Tensor], **model: Any) -> Path:
    """Write a checkpoint with whole tensors, as one process of Megatron Bridge does."""
    folder.mkdir()
    with DistributedWriter(folder) as writer:
        for key, tensor in tensors.items():
            writer.write(key, tensor.shape, (), tensor)
    (folder / "run_config.yaml").write_text(json.dumps({"peft": PEFT, "model": MODEL | model}))
    return folder


def factors(module: str, width: int, out: int, *lead: int) -> dict[str, torch.Tensor]:
    """Return the factors of a module, with dimensions before them."""
    adapter = f"decoder.layers.{module}.adapter"
    a, b = torch.randn(*lead, 2, width), torch.randn(*lead, out, 2)
    return {f"{adapter}.linear_in.weight": a, f"{adapter}.linear_out.weight": b}


class _Runs:
    """A pickle that makes a file when it is loaded as pickles are."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


# ---- nothing is run --------------------------------------------------------------------------------------------------


def test_metadata_that_would_run_something_do_not(tmp_path: Path):
    folder = bridge(tmp_path / "there", factors("mlp.linear_fc2", 24, 16, 2))
    for content in (pickle.dumps(_Runs(tmp_path / "ran")), pickle.dumps({"a": 1}), b"", b"\x80\x04nonsense"):
        (folder / ".metadata").write_bytes(content)
        with pytest.raises(CheckpointError, match="not the metadata of a distributed checkpoint"):
            Distributed(folder)
    assert not (tmp_path / "ran").exists()


class _Member:
    """A member of an enumeration, as some versions of Python store one: an attribute that is to be taken."""

    def __init__(self, owner: Any, name: str) -> None:
        self.owner, self.name = owner, name

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self.owner, self.name)


def test_attributes_in_metadata_are_records(tmp_path: Path):
    folder = bridge(tmp_path / "there", factors("mlp.linear_fc2", 24, 16, 2))
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    wanted = Distributed(folder).tensors
    metadata.planner_data = _Member(TensorProperties, "create_from_tensor")
    path.write_bytes(pickle.dumps(metadata))
    assert Distributed(folder).tensors == wanted
    metadata.planner_data = _Member(_Member(TensorProperties, "__init__"), "__globals__")
    path.write_bytes(pickle.dumps(metadata))
    assert Distributed(folder).tensors == wanted, "nothing is looked up, so nothing is found"
    path.write_bytes(pickle.dumps(_Member(pickle.PickleError, "mro")))
    with pytest.raises(CheckpointError, match="which no checkpoint needs"):
        Distributed(folder)


def test_a_chunk_that_would_run_something_does_not(tmp_path: Path):
    folder = bridge(tmp_path / "there", factors("mlp.linear_fc2", 24, 16, 2))
    stored = Distributed(folder)
    key, chunk = next((key, tensor.chunks[0]) for key, tensor in stored.tensors.items())
    buffer = io.BytesIO()
    torch.save(_Runs(tmp_path / "ran"), buffer)
    data = bytearray((folder / chunk.file).read_bytes())
    bad = buffer.getvalue()
    assert len(bad) <= chunk.length
    # the archive's directory is at its end: what is before it may be anything
    data[chunk.start : chunk.start + chunk.length] = b"\0" * (chunk.length - len(bad)) + bad
    (folder / chunk.file).write_bytes(data)
    with pytest.raises(CheckpointError, match="without running it"):
        stored.lazy(key).read()
    assert not (tmp_path / "ran").exists()


def test_a_chunk_that_unpacks_to_more_than_it_is_is_refused(tmp_path: Path):
    folder = bridge(tmp_path / "there", factors("mlp.linear_fc2", 2400, 16, 2))
    stored = Distributed(folder)
    key, chunk = next((key, tensor.chunks[0]) for key, tensor in stored.tensors.items())
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", b"\0" * 2_000_000)
    bad = buffer.getvalue()
    data = bytearray((folder / chunk.file).read_bytes())
    data[chunk.start : chunk.start + chunk.length] = b"\0" * (chunk.length - len(bad)) + bad
    (folder / chunk.file).write_bytes(data)
    with pytest.raises(CheckpointError, match="unpacks to"):
        stored.lazy(key).read()


def test_words_of_a_run_are_words(tmp_path: Path):
    folder = bridge(tmp_path / "there", factors("mlp.linear_fc2", 24, 16, 2))
    (folder / "run_config.yaml").write_text(f"peft: !!python/object/apply:os.system ['touch {tmp_path}/ran']\n")
    with pytest.raises(CheckpointError, match="not plain YAML"):
        read_adapter(folder, "megatron-bridge")
    (folder / "run_config.yaml").write_text("- a\n- list\n")
    with pytest.raises(CheckpointError, match="expected sections"):
        read_adapter(folder, "megatron-bridge")
    assert not (tmp_path / "ran").exists()


def test_a_shard_that_would_run_something_does_not(tmp_path: Path):
    saved = save(tmp_path)
    move(saved, tmp_path / "there", ("peft", "neuron"))
    [shard] = (tmp_path / "there").rglob("dp_rank*.pt")
    torch.save({"x": _Runs(tmp_path / "ran")}, shard)
    with pytest.raises(CheckpointError):
        read_adapter(tmp_path / "there", "neuron")
    assert not (tmp_path / "ran").exists()


# ---- where chunks lie ------------------------------------------------------------------------------------------------


def metadata_with(folder: Path, **changes: Any) -> None:
    """Change where the first chunk of a checkpoint lies, by its own metadata."""
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    index = next(iter(metadata.storage_data))
    info = metadata.storage_data[index]
    for name, value in changes.items():
        if name == "sizes":
            metadata.state_dict_metadata[index.fqn].chunks[0].sizes = torch.Size(value)
        elif name == "offsets":
            metadata.state_dict_metadata[index.fqn].chunks[0].offsets = torch.Size(value)
        else:
            setattr(info, name, value)
    path.write_bytes(pickle.dumps(metadata))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"relative_path": "../other.distcp"}, "no name of a file beside"),
        ({"relative_path": "/etc/passwd"}, "no name of a file beside"),
        ({"relative_path": "gone.distcp"}, "not readable"),
        ({"offset": 10**9}, "ends within"),
        ({"length": 10**12}, "cannot be"),
        ({"length": 8}, "cannot be"),
        ({"offset": -1}, "is not inside of"),
        ({"sizes": (2, 2, 25)}, "is not inside of"),
        ({"offsets": (0, 0, 1)}, "where the chunk at"),
        ({"transform_descriptors": ["zstd"]}, "compressed"),
    ],
)
def test_a_chunk_lies_where_it_can(changes: dict[str, Any], says: str, tmp_path: Path):
    folder = bridge(tmp_path / "there", factors("mlp.linear_fc2", 24, 16, 2))
    metadata_with(folder, **changes)
    with pytest.raises(CheckpointError, match=says):
        [pair.a.read() for pair in read_adapter(folder, "megatron-bridge").pairs]


def test_a_chunk_is_what_the_metadata_say(tmp_path: Path):
    folder = bridge(tmp_path / "there", factors("mlp.linear_fc2", 24, 16, 2))
    stored = Distributed(folder)
    (one, first), (_, second) = stored.tensors.items()
    metadata_with(folder, offset=second.chunks[0].start, length=second.chunks[0].length)
    with pytest.raises(CheckpointError, match=r"is none of|cannot be"):
        Distributed(folder).lazy(one).read()
    assert first.shape != second.shape


def test_what_is_missing_is_said(tmp_path: Path):
    whole = factors("mlp.linear_fc2", 24, 16)
    (tmp_path / "there").mkdir()
    with DistributedWriter(tmp_path / "there") as writer:
        for key, tensor in whole.items():
            writer.write(key, (2, *tensor.shape), (1,), tensor)  # a layer without an adapter is none that is missing
        writer.write("decoder.layers.mlp.linear_fc1.adapter.linear_in.weight", (2, 2, 16), (0, 0), torch.randn(16))
        writer.write("decoder.layers.mlp.linear_fc1.adapter.linear_out.weight", (2, 48, 2), (0,), torch.randn(48, 2))
    (tmp_path / "there" / "run_config.yaml").write_text(json.dumps({"peft": PEFT, "model": MODEL}))
    with pytest.raises(
        CheckpointError, match=r"linear_fc1.adapter.linear_in.weight\[0\] 16 elements are stored, not 32"
    ):
        read_adapter(tmp_path / "there", "megatron-bridge")
    folder = bridge(tmp_path / "half", {key: tensor for key, tensor in whole.items() if "linear_in" in key})
    with pytest.raises(CheckpointError, match="A or B is missing"):
        read_adapter(folder, "megatron-bridge")
    folder = bridge(tmp_path / "unsaid", {key: tensor.unsqueeze(0) for key, tensor in whole.items()})
    (folder / "run_config.yaml").unlink()
    with pytest.raises(CheckpointError, match=r"does not say peft\.alpha"):
        read_adapter(folder, "megatron-bridge")
    with pytest.raises(CheckpointError, match="no checkpoint of Megatron Bridge"):
        read_adapter(tmp_path, "megatron-bridge")
    folder = bridge(tmp_path / "strange", {"decoder.layers.mlp.linear_fc2.adapter.linear_up.weight": torch.ones(2, 2)})
    with pytest.raises(CheckpointError, match="no factor that is known"):
        read_adapter(folder, "megatron-bridge")
    folder = bridge(tmp_path / "new", factors("cross_attention.linear_kv", 16, 16, 2))
    with pytest.raises(ExportError, match="not known which of transformers' layers"):
        read_adapter(folder, "megatron-bridge")
    folder = bridge(tmp_path / "bare", {"decoder.layers.mlp.linear_fc2.weight": torch.ones(2, 16, 24)})
    with pytest.raises(CheckpointError, match=r"no factors of an adapter of Megatron Bridge's$"):
        read_adapter(folder, "megatron-bridge")
    folder = bridge(tmp_path / "ours", {"decoder.layers.mlp.linear_fc2.lora_A.default.weight": torch.ones(2, 2, 24)})
    with pytest.raises(CheckpointError, match="it has lorica's own, which `save_pretrained`"):
        read_adapter(folder, "megatron-bridge")


# ---- forms of theirs -------------------------------------------------------------------------------------------------


def test_layers_with_numbers_and_prefixes_are_the_same(tmp_path: Path):
    whole = factors("mlp.linear_fc2", 24, 16, 2)
    apart = {
        key.replace("decoder.layers.", f"module.decoder.layers.{layer}."): tensor[layer].clone()
        for key, tensor in whole.items()
        for layer in range(2)
    }
    apart["optimizer.state.exp_avg.decoder.layers.0.mlp.linear_fc2.adapter.linear_in.weight"] = torch.ones(2, 24)
    for name, tensors in (("stacked", whole), ("apart", apart)):
        folder = bridge(tmp_path / name, tensors)
        move(folder, tmp_path / f"{name}-peft", ("megatron-bridge", "peft"))
    one, other = (contents(tmp_path / f"{name}-peft", "peft") for name in ("stacked", "apart"))
    assert_same(one, other)
    assert len(one) == 4
    config = words(tmp_path / "apart-peft", "peft")
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (2, 6, ["down_proj"])


def test_layers_that_are_not_alike_have_numbers(tmp_path: Path):
    """As in Megatron's own checkpoints, which stack layers only where all have the same modules."""
    saved = save(tmp_path, target_modules=["down_proj", "layers.1.self_attn.o_proj"])
    move(saved, tmp_path / "there", ("peft", "megatron-bridge"), model=tmp_path / "model")
    keys = [key for key in Distributed(find_iteration(tmp_path / "there")).tensors if "linear_in" in key]
    end = "adapter.linear_in.weight"
    assert sorted(keys) == [
        f"decoder.layers.0.mlp.linear_fc2.{end}",
        f"decoder.layers.1.mlp.linear_fc2.{end}",
        f"decoder.layers.1.self_attention.linear_proj.{end}",
    ]
    move(tmp_path / "there", tmp_path / "back", ("megatron-bridge", "peft"))
    assert_same(contents(tmp_path / "back", "peft"), contents(saved, "peft"))


def test_experts_that_share_an_adapter_are_read_by_the_size_that_shared_it(tmp_path: Path):
    """A copy each; a pair for each rank, told how many; one pair, told that there was one rank."""
    model = {"num_moe_experts": 4, "moe_router_topk": 2}
    module = "mlp.experts.experts.linear_fc2"
    of_ranks = factors(module, 12, 16, 2, 2)
    copies = {key: tensor.repeat_interleave(2, 1) for key, tensor in of_ranks.items()}
    expected = bridge(tmp_path / "copies", copies, **model)
    move(expected, tmp_path / "expected", ("megatron-bridge", "peft"))
    folder = bridge(tmp_path / "ranks", of_ranks, **model)
    with pytest.raises(ExportError, match=r"2 pair\(s\) for 4 experts.*--expert-parallel"):
        read_adapter(folder, "megatron-bridge")
    move(folder, tmp_path / "told", ("megatron-bridge", "peft"), expert_parallel=2)
    assert_same(contents(tmp_path / "told", "peft"), contents(tmp_path / "expected", "peft"))
    said = bridge(tmp_path / "said", of_ranks, **model, expert_model_parallel_size=2)
    move(said, tmp_path / "as-said", ("megatron-bridge", "peft"))
    assert_same(contents(tmp_path / "as-said", "peft"), contents(tmp_path / "expected", "peft"))

    one = {key: tensor[:, 0].clone() for key, tensor in of_ranks.items()}
    folder = bridge(tmp_path / "one", one, **model, expert_model_parallel_size=2)
    with pytest.raises(ExportError, match=r"1 pair\(s\) for 4 experts"):
        read_adapter(folder, "megatron-bridge")
    pairs = read_adapter(folder, "megatron-bridge", expert_parallel=1).pairs
    assert len(pairs) == 8
    assert all(
        torch.equal(
            pair.a.read(), one[f"decoder.layers.{module}.adapter.linear_in.weight"][int(pair.names[0].split(".")[2])]
        )
        for pair in pairs
    )


def test_ranks_divided_by_the_experts_of_a_token_are_said_so(tmp_path: Path):
    fields = {"r": 4, "rank_pattern": {"experts.gate_up_proj": 2, "experts.down_proj": 2}}
    move(save(tmp_path, "moe", **fields), tmp_path / "there", ("peft", "megatron-bridge"), model=tmp_path / "model")
    peft = words(tmp_path / "there", "megatron-bridge")["peft"]
    assert (peft["dim"], peft["alpha"], peft["normalize_moe_lora"]) == (4, 6, True)
    stored = Distributed(find_iteration(tmp_path / "there"))
    assert stored.tensors["decoder.layers.mlp.experts.experts.linear_fc1.adapter.linear_in.weight"].shape == (
        2,
        4,
        2,
        16,
    )
    assert stored.tensors["decoder.layers.self_attention.linear_proj.adapter.linear_in.weight"].shape == (2, 4, 16)


def test_ranks_of_neuron_that_differ_are_refused_or_the_first_is_taken(tmp_path: Path):
    saved = save(tmp_path, shared=True)
    move(saved, tmp_path / "there", ("peft", "neuron"), model=tmp_path / "model", tensor_parallel=2)
    second = sorted((tmp_path / "there").rglob("dp_rank*.pt"))[1]
    state = torch.load(second, weights_only=True)
    name = next(name for name in state if name.endswith("gate_up_proj.lora_A.weight"))
    state[name] = state[name] + 1
    torch.save(state, second)
    with pytest.raises(LayoutError, match="differs from that of another rank"):
        move(tmp_path / "there", tmp_path / "no", ("neuron", "peft"))
    assert not (tmp_path / "no").exists()
    move(tmp_path / "there", tmp_path / "first", ("neuron", "peft"), first_copy=True)
    assert_same(contents(tmp_path / "first", "peft"), contents(saved, "peft"))


# ---- what has no place -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\]"),
        ({"init_lora_weights": "pissa"}, "changed the base weights"),
    ],
)
def test_what_pairs_cannot_say_is_refused(fields: dict[str, Any], says: str, tmp_path: Path):
    saved = save(tmp_path)
    config = saved / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | fields))
    with pytest.raises(ExportError, match=says):
        move(saved, tmp_path / "no", ("peft", "megatron-bridge"), model=tmp_path / "model")
    assert not (tmp_path / "no").exists()


def test_embeddings_go_where_they_are_adapted(tmp_path: Path):
    saved = save(tmp_path, target_modules=["embed_tokens", "lm_head", "q_proj"])
    with pytest.raises(ExportError, match="Megatron Bridge adapts no embedding"):
        move(saved, tmp_path / "no", ("peft", "megatron-bridge"), model=tmp_path / "model")
    move(saved, tmp_path / "there", ("peft", "neuron"))
    move(tmp_path / "there", tmp_path / "back", ("neuron", "peft"))
    assert_same(contents(tmp_path / "back", "peft"), contents(saved, "peft"))


def test_files_that_are_no_pairs_are_refused(tmp_path: Path):
    saved = save(tmp_path)
    tensors = load_file(saved / "adapter_model.safetensors")
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"

    def refused(says: str, changed: dict[str, torch.Tensor], error: type[Exception] = CheckpointError) -> None:
        save_file(changed, saved / "adapter_model.safetensors")
        with pytest.raises(error, match=says):
            move(saved, tmp_path / "no", ("peft", "neuron"))
        assert not (tmp_path / "no").exists()

    refused("is no factor", {**tensors, "base_model.model.lm_head.weight": torch.ones(2, 2)})
    refused("no pair of two matrices", {key: tensor for key, tensor in tensors.items() if key != name})
    refused("are no pair on", {**tensors, name: torch.ones(24, 3)})
    refused("holds NaN or infinity", {**tensors, name: torch.full((24, 2), float("nan"))})
    (saved / "adapter_config.json").unlink()
    refused("Can't find 'adapter_config.json'", tensors)


def test_the_models_sizes_are_asked_for_where_they_are_needed(tmp_path: Path):
    saved = save(tmp_path)
    with pytest.raises(ExportError, match="needs the model's configuration"):
        move(saved, tmp_path / "no", ("peft", "megatron-bridge"))
    with pytest.raises(ExportError, match="how a model lies over ranks"):
        move(saved, tmp_path / "no", ("peft", "neuron"), tensor_parallel=2)
    with pytest.raises(ExportError, match="does not say its sizes"):
        move(saved, tmp_path / "no", ("peft", "megatron-bridge"), model={"hidden_size": 4})
    with pytest.raises(ExportError, match="no configuration of a model"):
        move(saved, tmp_path / "no", ("peft", "megatron-bridge"), model=tmp_path / "nowhere")
    wrong = json.loads((tmp_path / "model" / "config.json").read_text()) | {"num_attention_heads": 8, "head_dim": 4}
    with pytest.raises(ExportError, match=r"rows .* are not the model's"):
        move(saved, tmp_path / "no", ("peft", "megatron-bridge"), model=wrong, form="fused")
    assert not (tmp_path / "no").exists()


def test_a_broken_record_is_said_to_be_one(tmp_path: Path):
    saved = save(tmp_path)
    move(saved, tmp_path / "there", ("peft", "neuron"), model=tmp_path / "model")
    [record] = (tmp_path / "there").rglob("conversion.json")
    values = json.loads(record.read_text())
    for change in ({"joined": [{"names": ["x"]}]}, {"joined": 3}, {"version": 2}):
        record.write_text(json.dumps(values | change))
        with pytest.raises(CheckpointError, match=r"delete it|is no list"):
            read_adapter(tmp_path / "there", "neuron")
    record.unlink()
    assert read_adapter(tmp_path / "there", "neuron").rank == 4


# ---- from the terminal -----------------------------------------------------------------------------------------------


def test_lorica_convert(tmp_path: Path):
    saved = save(tmp_path)
    run = CliRunner().invoke
    there, back = str(tmp_path / "there"), str(tmp_path / "back")
    to = ["--from", "peft", "--to", "megatron-bridge", "--model", str(tmp_path / "model")]
    done = run(app, ["convert", str(saved), there, *to, "--form", "fused", "--rank", "3"])
    assert done.exit_code == 0, done.output
    assert done.output.count("relative error") == 4
    assert "(14 layers, rank 3)" in done.output
    shutil.rmtree(there)
    assert run(app, ["convert", str(saved), there, *to]).exit_code == 0
    assert run(app, ["convert", there, back, "--from", "megatron-bridge", "--to", "peft"]).exit_code == 0
    assert_same(contents(Path(back), "peft"), contents(saved, "peft"))
    for wrong, says in (
        (["convert", there, back, "--from", "megatron-bridge", "--to", "peft"], "already exists"),
        (["convert", str(tmp_path / "gone"), there + "2", *to], "There is no directory"),
        (["convert", str(saved), there + "2", "--from", "peft", "--to", "megatron"], "Did you mean 'megatron-bridge'"),
        (["convert", str(saved), there + "2", *to, "--form", "both"], "expected one of auto, fused, canonical"),
        (["convert", str(saved), there + "2", *to[:4]], "give it (model=, --model)"),
    ):
        refused = run(app, wrong)
        assert refused.exit_code == 2
        assert says in refused.stderr, refused.stderr
    assert not Path(there + "2").exists()
