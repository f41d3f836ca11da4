"""Where files of adapters lie and what becomes of them while they are read: links, folders, files that shrink."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from doors import DOORS, World, differences, refused
from good_adapter import CONFIG, WEIGHTS, good_tensors, write_good
from hostile_headers import pickled
from make import attacks

import lorica
import models
from lorica.compat import peft
from lorica.errors import CheckpointError, TargetError
from lorica.files.journal import NAME as JOURNAL
from lorica.files.tensors import OpenTensors

pytest.importorskip("transformers")


@pytest.fixture
def good(tmp_path: Path) -> Path:
    write_good(tmp_path / "good")
    return tmp_path / "good"


@pytest.fixture
def world(tmp_path: Path, good: Path) -> Iterator[World]:
    """A world that is as it was when the test is over."""
    made = World(tmp_path, tmp_path / "base", good)
    before = made.state()
    yield made
    assert not differences(before, made.state())


def loads(folder: Path, **where: Any) -> bool:
    model = lorica.PeftModel.from_pretrained(models.tiny_llama(), folder, **where)
    state = lorica.get_peft_model_state_dict(model)
    return all(torch.equal(state[name], tensor) for name, tensor in good_tensors().items())


# ---- links and folders ----------------------------------------------------------------------------------------------


def snapshot(cache: Path, good: Path) -> Path:
    """Lay an adapter out as the hub's client does: links to blobs of the same repository."""
    place = cache / "models--user--adapter" / "snapshots" / "0123abc"
    blobs = place.parent.parent / "blobs"
    place.mkdir(parents=True)
    blobs.mkdir()
    for name in (CONFIG, WEIGHTS):
        shutil.copy(good / name, blobs / f"hash of {name}")
        (place / name).symlink_to(Path("..", "..", "blobs", f"hash of {name}"))
    return place


def test_a_snapshot_of_the_hubs_cache_is_read(good: Path, tmp_path: Path):
    place = snapshot(tmp_path / "cache", good)
    assert loads(place)
    (place / "inner").mkdir()
    for name in (CONFIG, WEIGHTS):
        (place / "inner" / name).symlink_to(Path("..", "..", "..", "blobs", f"hash of {name}"))
    assert loads(place, subfolder="inner")
    assert loads(place / "inner")


def test_a_snapshot_whose_blobs_are_elsewhere_is_refused(good: Path, tmp_path: Path):
    place = snapshot(tmp_path / "cache", good)
    blobs = place.parent.parent / "blobs"
    blobs.rename(tmp_path / "secrets")
    blobs.symlink_to(tmp_path / "secrets")
    with pytest.raises(CheckpointError, match="leads out of"):
        loads(place)


def test_links_inside_a_directory_and_to_it_are_followed(good: Path, tmp_path: Path):
    (good / "store").mkdir()
    (good / WEIGHTS).rename(good / "store" / "it")
    (good / WEIGHTS).symlink_to(good / "store" / "it")
    assert loads(good)
    (tmp_path / "latest").symlink_to(good)
    assert loads(tmp_path / "latest")


@pytest.mark.parametrize("subfolder", ["../good", "inner/../../good", "{}/good"])
def test_a_subfolder_is_inside(subfolder: str, good: Path, tmp_path: Path):
    (tmp_path / "other" / "inner").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"subfolder=.* is not inside of"):
        loads(tmp_path / "other", subfolder=subfolder.format(tmp_path))


def test_a_subfolder_that_is_a_link_out_is_refused(good: Path, tmp_path: Path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "inner").symlink_to(good)
    with pytest.raises(CheckpointError, match=rf"{CONFIG}: a link that leads out of"):
        loads(tmp_path / "other", subfolder="inner")
    shutil.copytree(good, tmp_path / "other" / "own")
    assert loads(tmp_path / "other", subfolder="own")


# ---- what lies beside -----------------------------------------------------------------------------------------------


def test_nothing_else_in_a_directory_is_touched(good: Path, tmp_path: Path):
    names = ("adapter_model.bin", "optimizer.pt", "training_args.bin", "scheduler.pt", "rng_state.pth", "tokenizer.pkl")
    for name in names:
        (good / name).write_bytes(pickled(good))
    code = f"import os; os.mkdir({str(tmp_path / 'canary')!r})"
    for name in ("__init__.py", "configuration.py", "modeling.py", "sitecustomize.py", "setup.py", "conftest.py"):
        (good / name).write_text(code)
    config = json.loads((good / CONFIG).read_text())
    config["auto_mapping"] = {"base_model_class": "modeling", "parent_library": "good.modeling"}
    (good / CONFIG).write_text(json.dumps(config))
    assert loads(good)
    assert not (tmp_path / "canary").exists()


# ---- the journal of an interrupted save ------------------------------------------------------------------------------

_TEMPORARY = f".partial-{'0' * 32}.safetensors"


def _says(files: object, *, after: str = "") -> Callable[[Path], object]:
    return lambda folder: (folder / JOURNAL).write_text(json.dumps({"files": files}) + after)


def _link_of_a_journal(folder: Path) -> None:
    _says({WEIGHTS: _TEMPORARY})(folder.parent)
    (folder / JOURNAL).symlink_to(folder.parent / JOURNAL)


def _instead_of_the_weights(make: Callable[[Path], object]) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        _says({WEIGHTS: _TEMPORARY})(folder)
        (folder / _TEMPORARY).rename(folder.parent / _TEMPORARY)
        make(folder / _TEMPORARY)

    return spoil


_UNKNOWN = f"Can't find '{WEIGHTS}'"
JOURNALS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a pipe": (lambda folder: os.mkfifo(folder / JOURNAL), _UNKNOWN),
    "a directory": (lambda folder: (folder / JOURNAL).mkdir(), _UNKNOWN),
    "a link out": (_link_of_a_journal, _UNKNOWN),
    "a link to a device": (lambda folder: (folder / JOURNAL).symlink_to("/dev/zero"), _UNKNOWN),
    "4,000 lists": (lambda folder: (folder / JOURNAL).write_text("[" * 4000), "nested too deeply"),
    "64 MB": (_says({WEIGHTS: _TEMPORARY}, after=" " * 64_000_000), "64,000,"),
    "no JSON": (lambda folder: (folder / JOURNAL).write_text("{"), "not valid JSON"),
    "a list": (_says([WEIGHTS, _TEMPORARY]), "does not name files beside it"),
    "a file above": (_says({WEIGHTS: f"../{_TEMPORARY}"}), "does not name files beside it"),
    "a file by its whole name": (_says({WEIGHTS: f"/tmp/{_TEMPORARY}"}), "does not name files beside it"),
    "any other file": (_says({WEIGHTS: "optimizer.pt"}), "does not name files beside it"),
    "a name above": (_says({"../other": _TEMPORARY}), "does not name files beside it"),
    "a name that is a whole path": (_says({"/etc/passwd": _TEMPORARY}), "does not name files beside it"),
    "a number": (_says({WEIGHTS: 7}), "does not name files beside it"),
    "a temporary file that is a link": (
        _instead_of_the_weights(lambda path: path.symlink_to(path.parent.parent / path.name)),
        _UNKNOWN,
    ),
    "a temporary file that is a pipe": (_instead_of_the_weights(os.mkfifo), _UNKNOWN),
    "a temporary file that is not there": (_instead_of_the_weights(lambda path: None), _UNKNOWN),
}


_READERS = ("first", "load", "swap", "peft's model", "inspect")


@pytest.fixture(scope="module")
def _imported(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What these doors import is imported."""
    folder = tmp_path_factory.mktemp("imported")
    write_good(folder / "good")
    for door in _READERS:
        DOORS[door](World(folder / door, folder / "base", folder / "good"), folder / "good")


@pytest.mark.usefixtures("_imported")
@pytest.mark.parametrize("name", JOURNALS)
def test_a_journal_leads_nowhere(name: str, world: World, good: Path, tmp_path: Path):
    folder = tmp_path / "interrupted"
    shutil.copytree(good, folder)
    (folder / WEIGHTS).rename(folder / _TEMPORARY)
    _says({WEIGHTS: _TEMPORARY})(folder)
    with pytest.warns(UserWarning, match="saving was interrupted"):
        assert loads(folder)
    (folder / JOURNAL).unlink()
    spoil, says = JOURNALS[name]
    spoil(folder)
    for door in _READERS:
        refused(lambda door=door: DOORS[door](world, folder), says, str(folder))
    assert not (folder / WEIGHTS).exists()


# ---- files that change while they are read --------------------------------------------------------------------------


@pytest.mark.parametrize("door", ["first", "load", "load over another", "swap"])
def test_a_file_that_shrinks_while_it_is_read_is_refused(
    door: str, world: World, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / "shrinking"
    shutil.copytree(good, folder)
    reading = OpenTensors.read_into

    def shrinking(file: OpenTensors, tensor: torch.Tensor, place: int) -> None:
        os.truncate(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size - 900)
        reading(file, tensor, place)

    monkeypatch.setattr(OpenTensors, "read_into", shrinking)
    with pytest.raises(CheckpointError, match=rf"{WEIGHTS}: the tensors end too early"):
        DOORS[door](world, folder)


# ---- loading that warns ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["the wrong prefix", "half the tensors", "half the layers", "tensors of no layer"])
def test_the_drop_in_warns_of_names_and_takes_nothing_else(name: str, tmp_path: Path):
    folder = tmp_path / "adapter"
    write_good(folder)
    attacks()[name].spoil(folder)
    model = models.tiny_llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.warns(UserWarning, match="missing|unexpected"):
        loaded = peft.PeftModel.from_pretrained(model, str(folder))
    assert all(torch.equal(loaded.get_base_model().get_parameter(_live(name)), value) for name, value in before.items())
    assert all(parameter.isfinite().all() for parameter in loaded.parameters())


def _live(name: str) -> str:
    return name.replace("q_proj.", "q_proj.base_layer.").replace("v_proj.", "v_proj.base_layer.")


def test_a_rank_that_no_weight_has_is_refused_before_factors_of_it_are_made(
    good: Path, monkeypatch: pytest.MonkeyPatch
):
    (good / CONFIG).write_text((good / CONFIG).read_text().replace('"r": 4', '"r": 5000'))
    monkeypatch.setattr("lorica.adapt.inject.initialise", lambda *_: pytest.fail("made factors"))
    for strict in (True, False):
        with pytest.raises(TargetError, match=rf"{CONFIG}: .*q_proj: r=5000 .* whose rank is 16 at most"):
            lorica.PeftModel.from_pretrained(models.tiny_llama(), good, strict=strict)


# ---- what is as before ----------------------------------------------------------------------------------------------


def test_a_model_that_recomputes_has_no_hook_left(good: Path, tmp_path: Path):
    attacks()["half the layers"].spoil(good)
    model = models.tiny_llama()
    recompute = "activation_checkpointing_enable"  # older releases have the second name only
    getattr(model, recompute if hasattr(model, recompute) else "gradient_checkpointing_enable")()
    hooks = [len(module._forward_hooks) for module in model.modules()]
    with pytest.raises(CheckpointError, match="missing"):
        lorica.PeftModel.from_pretrained(model, good)
    assert [len(module._forward_hooks) for module in model.modules()] == hooks


@pytest.mark.parametrize("strict", [True, False])
def test_loading_that_is_interrupted_leaves_the_model_as_it_was(
    strict: bool, world: World, good: Path, monkeypatch: pytest.MonkeyPatch
):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lorica.checkpoint.loading.read_whole", interrupted)
    with pytest.raises(KeyboardInterrupt):
        lorica.PeftModel.from_pretrained(world.plain, good, strict=strict)
    with pytest.raises(KeyboardInterrupt):
        world.adapted.load_adapter(good, "other", strict=strict)
