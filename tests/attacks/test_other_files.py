"""Hostile files that are no adapters of PEFT's: refused within a second and 200 MB, and nothing in them runs."""

from __future__ import annotations

import encodings.cp437  # noqa: F401 (archives' names are looked up in it; nothing is imported afterwards)
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import others
import pytest
import torch
from doors import refused
from hostile_headers import CONTENTS
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

import models
from lorica.calibration import files
from lorica.checkpoint.neuron import read_shards
from lorica.checkpoint.shards import read_index
from lorica.checkpoint.whole import consolidate
from lorica.cli.app import app
from lorica.convert import convert_adapter
from lorica.convert.dcp import METADATA, Distributed
from lorica.convert.geometry import Geometry, geometry_of
from lorica.errors import CheckpointError, ExportError, LoricaError, RecipeError
from lorica.files.pickles import Record, read_pickle
from lorica.files.torch_files import read_torch_file
from lorica.layout.tiling import tiles
from lorica.merge.stream import weight_files
from lorica.train import data, recipe, state
from lorica.train.data import Format


@pytest.fixture
def canary(tmp_path):
    """A file that is made by whoever runs what is in another one."""
    yield tmp_path / "ran"
    assert not (tmp_path / "ran").exists()


# ---- pickles ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", others.pickles(Path("canary")))
def test_metadata_are_no_program(name: str, tmp_path: Path, canary: Path) -> None:
    (tmp_path / METADATA).write_bytes(others.pickles(canary)[name])
    reason = others.REASONS.get(name, "")
    refused(lambda: Distributed(tmp_path), str(tmp_path / METADATA), reason, error=CheckpointError)


def test_what_a_pickle_names_is_a_record() -> None:
    found = read_pickle(pickle.dumps({"a": (1, [2.5, None]), "b": torch.Size((3, 4)), "c": b"x"}), "x", lambda _: True)
    assert (found["a"], found["c"]) == ((1, [2.5, None]), b"x")
    assert isinstance(found["b"], Record)
    assert (found["b"].name, found["b"].args) == ("torch.Size", ((3, 4),))


# ---- files of torch --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", others.TORCH_FILES)
def test_files_of_torch_have_what_they_say(name: str, tmp_path: Path, canary: Path) -> None:
    path = tmp_path / "file.pt"
    path.write_bytes(others.TORCH_FILES[name](canary))
    refused(lambda: read_torch_file(path), str(path), error=CheckpointError)


def test_what_torch_saves_is_read_as_torch_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    whole = torch.arange(24.0).view(4, 6)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int64, torch.bool):
        tensors = {"a": whole.to(dtype), "b": whole.to(dtype).t(), "c": whole.to(dtype)[1:3, 2:4], "d": whole[0, 0]}
        tensors |= {"e": torch.empty(0, 3, dtype=dtype), "p": torch.nn.Parameter(whole)}
        torch.save({**tensors, "words": (1, [None, True], "x")}, path)
        found = read_torch_file(path)
        assert found.pop("words") == (1, [None, True], "x")
        for name, tensor in tensors.items():
            assert (found[name].dtype, found[name].tolist()) == (tensor.dtype, tensor.tolist()), name


def test_pipes_and_links_are_no_shards(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pt")
    refused(lambda: read_torch_file(tmp_path / "pipe.pt"), "pipe.pt")
    shards = tmp_path / "adapter_default" / "adapter_shards"
    (shards / "model").mkdir(parents=True)
    (shards / "done").touch()
    (shards / "mp_metadata_pp_rank_0.json").write_text("{}")
    (shards / "model" / "dp_rank_00_tp_rank_00_pp_rank_00.pt").symlink_to("/etc/hostname")
    refused(lambda: read_shards(shards), "a link that leads out of")


@pytest.mark.parametrize("name", others.NEURON_METADATA)
def test_metadata_of_shards_say_what_there_is(name: str, tmp_path: Path) -> None:
    shards = tmp_path / "adapter_default" / "adapter_shards"
    (shards / "model").mkdir(parents=True)
    (shards / "done").touch()
    torch.save({"x.lora_B.weight": torch.ones(4, 2)}, shards / "model" / "dp_rank_00_tp_rank_00_pp_rank_00.pt")
    about = shards / "mp_metadata_pp_rank_0.json"
    about.write_text(json.dumps({"parameters": {"x.lora_B.default.weight": {"tensor_model_parallel": False}}}))
    assert read_shards(shards)["base_model.model.x.lora_B.weight"].shape == (4, 2)
    about.write_text(json.dumps(others.NEURON_METADATA[name]))
    refused(lambda: read_shards(shards), str(shards), error=CheckpointError)


# ---- distributed checkpoints -----------------------------------------------------------------------------------------


def convert(folder: Path) -> None:
    """Convert a checkpoint that should not be converted."""
    convert_adapter(folder, folder.with_name("output"), source="megatron-bridge", target="peft")


def test_a_good_checkpoint_is_good(tmp_path: Path) -> None:
    (tmp_path / "good").mkdir()
    others.checkpoint(tmp_path / "good")
    convert(tmp_path / "good")


@pytest.mark.parametrize("name", others.METADATA_CHANGES)
def test_chunks_are_where_they_can_be(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "bad"
    folder.mkdir()
    metadata = others.checkpoint(folder)
    others.METADATA_CHANGES[name](metadata)
    (folder / METADATA).write_bytes(pickle.dumps(metadata))
    refused(lambda: convert(folder), str(folder))
    assert os.listdir(tmp_path) == ["bad"]


def test_chunks_make_up_a_tensor(tmp_path: Path) -> None:
    for second, place in ((12, tmp_path / "beside"), (6, tmp_path / "on")):
        place.mkdir()
        others.halves(place, second)
    assert torch.equal(Distributed(tmp_path / "beside").lazy("a").read(), torch.ones(2, 24))
    refused(lambda: Distributed(tmp_path / "on").lazy("a"), "some elements are stored twice", error=CheckpointError)


def test_files_of_a_checkpoint_are_its_own(tmp_path: Path) -> None:
    for name in ("__0_0.distcp", METADATA):
        folder = tmp_path / name.strip("._")
        folder.mkdir()
        others.checkpoint(folder)
        (folder / name).rename(tmp_path / "elsewhere")
        (folder / name).symlink_to(tmp_path / "elsewhere")
        refused(lambda folder=folder: convert(folder), "a link that leads out of")


# ---- shards ----------------------------------------------------------------------------------------------------------


def sharded(folder: Path, content: Any) -> Path:
    """Write sharded state with one file, and an index of one tensor."""
    tensors = {"factors/a@0": torch.ones(4), "factors/a@0,0": torch.ones(4, 2), "factors/a@0,1": torch.ones(4, 2)}
    save_file(tensors, folder / "shards-00000.safetensors")
    (folder / "index.json").write_text(json.dumps({"format": "lorica.shards.1", "tensors": {"factors/a": content}}))
    return folder


@pytest.mark.parametrize("name", others.INDICES)
def test_shards_make_up_a_tensor(name: str, tmp_path: Path) -> None:
    folder = sharded(tmp_path, others.INDICES[name])
    refused(lambda: consolidate(folder, folder), str(folder), error=CheckpointError)
    assert not (folder / "adapter_model.safetensors").exists()


def test_an_index_of_shards_is_read(tmp_path: Path) -> None:
    content = {"shape": [4], "dtype": "float32", "shards": [[[0], [4], "shards-00000.safetensors"]]}
    assert read_index(sharded(tmp_path, content))["factors/a"].shape == (4,)


@pytest.mark.parametrize("seed", range(20))
def test_rectangles_tile_only_what_they_cover_once(seed: int) -> None:
    """Against counting, on rectangles that were cut, and then moved, grown, doubled or lost."""
    draw = torch.Generator().manual_seed(seed)

    def number(most: int) -> int:
        return int(torch.randint(most, (1,), generator=draw))

    shape = [2 + number(4) for _ in range(1 + number(3))]
    boxes: list[tuple[list[int], list[int]]] = [([0] * len(shape), [*shape])]
    for _ in range(number(6)):
        offsets, sizes = boxes.pop(number(len(boxes)))
        dim = number(len(shape))
        at = number(sizes[dim] + 1)
        for start, size in ((0, at), (at, sizes[dim] - at)):
            moved, cut = [*offsets], [*sizes]
            moved[dim], cut[dim] = offsets[dim] + start, size
            boxes.append((moved, cut))
    assert tiles(shape, boxes)
    for _ in range(20):
        other = [([*offsets], [*sizes]) for offsets, sizes in boxes]
        one, dim = number(len(other)), number(len(shape))
        if number(2):
            other[one] = other[number(len(other))]
        else:
            other[one][number(2)][dim] += 1
        assert tiles(shape, other) == _covers_once(shape, other)


def _covers_once(shape: list[int], boxes: list[tuple[list[int], list[int]]]) -> bool:
    counted: Tensor = torch.zeros([side + 2 for side in shape])
    for offsets, sizes in boxes:
        counted[tuple(slice(at, at + size) for at, size in zip(offsets, sizes, strict=True))] += 1
    inside = counted[tuple(slice(0, side) for side in shape)]
    return bool((inside == 1).all()) and int(counted.sum()) == inside.numel()


# ---- words -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", others.YAMLS)
def test_recipes_are_plain(name: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(others.YAMLS[name].encode(errors="surrogatepass"))
    refused(lambda: recipe.load(path), str(path), error=RecipeError)
    (tmp_path / METADATA).touch()
    path.rename(tmp_path / "run_config.yaml")
    refused(lambda: convert(tmp_path), "run_config.yaml", error=CheckpointError)


def test_values_of_overrides_are_plain() -> None:
    refused(lambda: recipe.load(None, ["training.seed=" + "9" * 5000]), "training.seed", error=RecipeError)
    refused(lambda: recipe.load(None, ["training.seed=" + "[" * 5000]), "training.seed", error=RecipeError)


GOOD = {"format": 2, "step": 1, "axes": {}, "batches": {"position": 1}, "random": {}, "recipe": {}, "data": "x"}
PROGRESS = dict.fromkeys(vars(state.Progress()), 0)


@pytest.mark.parametrize("field", [*GOOD, "progress"])
@pytest.mark.parametrize("value", [None, "x", [], 1.5, True], ids=str)
def test_numbers_of_a_checkpoint_are_numbers(field: str, value: Any, tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    path.write_text(json.dumps(GOOD | {"progress": PROGRESS}))
    assert state.read_numbers(tmp_path)["step"] == 1
    if field == "data" and value == "x":
        return
    path.write_text(json.dumps(GOOD | {"progress": PROGRESS} | {field: value}))
    refused(lambda: state.read_numbers(tmp_path), str(tmp_path), error=CheckpointError)
    path.write_text(json.dumps(GOOD | {"progress": PROGRESS | {"tokens": value or "x"}}))
    if type(value) is not int:
        refused(lambda: state.read_numbers(tmp_path), "tokens", error=CheckpointError)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "..", "model.bin", 7, None])
def test_files_of_a_model_lie_beside_their_index(name: Any, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    refused(lambda: weight_files(tmp_path), "model.safetensors.index.json", error=CheckpointError)


@pytest.fixture(scope="module")
def whole_models(tmp_path_factory):
    """A base model, and one that is fine-tuned, after one has been compared with the other: all is imported."""
    folder = tmp_path_factory.mktemp("models")
    model = models.tiny_llama()
    model.save_pretrained(folder / "base")
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.add_(torch.randn(16, 16))
    model.save_pretrained(folder / "tuned")
    places = [str(folder / name) for name in ("base", "tuned", "out")]
    done = CliRunner().invoke(app, ["extract", *places[:2], "-o", places[2], "-q", "--rank", "2"])
    assert done.exit_code == 0, done.output
    return folder


@pytest.mark.parametrize("side", ["base", "tuned"])
@pytest.mark.parametrize("name", ["cut", "NaN", "a pickle", "a pipe", "a million empty tensors", "a gap"])
def test_models_that_an_adapter_is_extracted_from_are_whole(name, side, whole_models, tmp_path) -> None:
    shutil.copytree(whole_models, tmp_path / "models")
    file = tmp_path / "models" / side / "model.safetensors"
    tensors = load_file(file)
    file.unlink()
    query = "model.layers.0.self_attn.q_proj.weight"
    if name == "a pipe":
        os.mkfifo(file)
    elif name == "a pickle":
        torch.save(tensors, file)
    elif name in CONTENTS and name != "NaN":
        file.write_bytes(CONTENTS[name][0]())
    else:
        tensors[query][0, 0] = float("nan") if name == "NaN" else 1.0
        save_file(tensors, file, {"format": "pt"})
        if name == "cut":
            os.truncate(file, file.stat().st_size - 1)
    folders = [str(tmp_path / "models" / place) for place in ("base", "tuned")]

    def extract() -> None:
        done = CliRunner().invoke(app, ["extract", *folders, "-o", str(tmp_path / "adapter"), "-q", "--rank", "2"])
        raise LoricaError(done.stderr) if done.exit_code == 2 else AssertionError(done.output) from done.exception

    refused(extract, str(tmp_path / "models" / side), query if name == "NaN" else "model.safetensors")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("template", ["{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ 1 / 0 }}", "{{ x.y.z }}"])
def test_chat_templates_are_in_a_sandbox(template: str) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0}, unk_token="a")))
    tokenizer.chat_template = template
    turns = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}]}
    form = Format.detect(["messages"])
    with pytest.raises(RecipeError):  # which imports what jinja says its errors with
        data.examples([turns], form, tokenizer, 8)
    refused(lambda: data.examples([turns], form, tokenizer, 8), "Row 1", "the chat template", error=RecipeError)


def test_what_calibration_kept_is_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    refused(lambda: files.read(tmp_path / "pipe", "cache_file"), "pipe", error=CheckpointError)
    torch.save({"a": torch.ones(1)}, tmp_path / "pickle")
    refused(lambda: files.read(tmp_path / "pickle", "cache_file"), "cache_file", "pickle", error=CheckpointError)


SIZES = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 16}


@pytest.mark.parametrize("field", SIZES)
@pytest.mark.parametrize("value", [0, -1, 10**18, "x", [], {}, 1e30, None], ids=str)
def test_sizes_of_a_model_are_sizes(field: str, value: Any) -> None:
    assert isinstance(geometry_of(SIZES), Geometry)
    if field == "num_key_value_heads" and not value:
        return  # as many as there are query heads
    refused(lambda: geometry_of(SIZES | {field: value}), error=ExportError)
