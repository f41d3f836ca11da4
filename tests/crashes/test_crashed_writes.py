"""Files, pairs of files and directories that are written while the disk fails, the process dies or is interrupted."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Callable
from itertools import count
from pathlib import Path

import faults
import pytest

from lorica.errors import CheckpointError
from lorica.files import atomic, journal
from lorica.files.hub import find_file

NAMES = ("adapter_model.safetensors", "adapter_config.json", "README.md")
ACTS: dict[str, Callable[[str], None]] = {
    **{errno.errorcode[number]: faults.error(number) for number in (errno.ENOSPC, errno.EIO, errno.EROFS)},
    "SIGINT": faults.interrupt(),
    "SIGKILL": faults.kill,
}

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def save(folder: Path, version: str) -> None:
    """Write files that belong together, as adapters are saved."""
    with atomic.at_once():
        for name in NAMES:
            atomic.write_bytes(folder / name, f"{version} {name}".encode())


def versions(folder: Path, find: Callable[[Path, str], Path]) -> set[str]:
    """The versions of the files that a reader gets; "missing" where there is none."""
    paths = [find(folder, name) for name in NAMES]
    return {path.read_text().split()[0] if path.is_file() else "missing" for path in paths}


def outcomes(folder: Path, act: str, work: Callable[[], object], prepare: Callable[[], object], *, lasting: bool):
    """Yield once for every change of the file system that the work makes, after it was hit by the fault there."""
    for number in count():
        prepare()
        if act == "SIGKILL":
            if not faults.killed_at(folder, number, work):
                return
            yield number
            continue
        raised: list[BaseException] = []
        with faults.at(folder, number, ACTS[act], lasting=lasting) as hit:
            try:
                work()
            except (OSError, KeyboardInterrupt) as error:
                raised.append(error)
        if not hit:
            return
        # Cleaning up may fail unnoticed; what is said of anything else names the file.
        assert all(isinstance(error, KeyboardInterrupt) or error.filename for error in raised), number
        yield number


@pytest.mark.filterwarnings("ignore:.*saving was interrupted")
@pytest.mark.parametrize(
    ("act", "lasting"), [*((act, False) for act in ACTS), *((act, True) for act in ACTS if act.startswith("E"))]
)
def test_files_that_belong_together_are_never_of_two_versions(act: str, lasting: bool, tmp_path: Path) -> None:
    seen = set()

    def prepare() -> None:
        save(tmp_path, "old")

    for number in outcomes(tmp_path, act, lambda: save(tmp_path, "new"), prepare, lasting=lasting):
        ours, others = versions(tmp_path, find_file), versions(tmp_path, Path)
        assert ours in ({"old"}, {"new"}), number
        # Who knows no journal may miss a file, and then refuses to load; what is there is of one version.
        assert others - {"missing"} in ({"old"}, {"new"}), number
        assert others == ours or act == "SIGKILL" or lasting, number
        seen |= ours
        if act != "SIGKILL" and not lasting:
            assert {entry.name for entry in tmp_path.iterdir()} == set(NAMES), number
        save(tmp_path, "newest")
        assert versions(tmp_path, Path) == {"newest"}
        assert not (tmp_path / journal.NAME).exists()
        atomic.remove_partial(tmp_path)
    assert seen == {"old", "new"}


def test_of_two_processes_that_write_at_once_one_waits_while_the_other_renames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, "old")
    rename = next(
        number
        for number, change in enumerate(faults.changes(tmp_path, lambda: save(tmp_path, "new")))
        if change.startswith("os.remove") and "partial" not in change
    )
    save(tmp_path, "old")
    (ready, told), (goes, go) = os.pipe(), os.pipe()

    def pause(change: str) -> None:
        os.write(told, b"x")
        os.read(goes, 1)

    def slow() -> None:
        with faults.at(tmp_path, rename, pause):
            save(tmp_path, "new")

    first = threading.Thread(target=faults.in_child, args=(slow,))
    first.start()
    assert os.read(ready, 1) == b"x"
    second = threading.Thread(target=save, args=(tmp_path, "newest"))
    second.start()
    second.join(0.2)
    waits = second.is_alive()
    monkeypatch.setattr(atomic, "_PATIENCE", 0.0)
    with pytest.raises(TimeoutError, match=f"renaming files here .*{tmp_path}"):
        save(tmp_path, "impatient")
    os.write(go, b"x")
    first.join()
    second.join()
    assert waits
    assert versions(tmp_path, Path) == {"newest"}
    assert {entry.name for entry in tmp_path.iterdir()} == set(NAMES)


def test_an_unchanged_configuration_needs_no_journal_and_stays_where_it_is(tmp_path: Path) -> None:
    save(tmp_path, "old")

    def again() -> None:
        with atomic.at_once():
            atomic.write_bytes(tmp_path / NAMES[0], b"new weights")
            atomic.write_bytes(tmp_path / NAMES[1], f"old {NAMES[1]}".encode())

    made = faults.changes(tmp_path, again)
    assert not [change for change in made if journal.NAME in change or change == f"os.remove {tmp_path / NAMES[1]}"]
    assert len([change for change in made if change.startswith("os.rename")]) == 2


@pytest.mark.parametrize(
    "files",
    [
        {"adapter_config.json": "../secret.json"},
        {"adapter_config.json": "/etc/passwd"},
        {"adapter_config.json": "adapter_config.json"},
        {"../adapter_config.json": f".partial-{'0' * 32}.json"},
        {"adapter_config.json": 3},
        ["adapter_config.json"],
    ],
    ids=str,
)
def test_a_strangers_journal_leads_nowhere(files: object, tmp_path: Path) -> None:
    save(tmp_path, "old")
    (tmp_path / journal.NAME).write_text(json.dumps({"files": files}))
    with pytest.raises(CheckpointError, match=r"partial-journal\.json: files does not name files beside it"):
        find_file(tmp_path, "adapter_config.json")


@pytest.mark.parametrize("link", ["file", "journal"])
def test_a_strangers_journal_leads_to_no_link_and_is_none(link: str, tmp_path: Path) -> None:
    folder, temporary = tmp_path / "adapter", f".partial-{'0' * 32}.json"
    folder.mkdir()
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "journal").write_text(json.dumps({"files": {"adapter_config.json": temporary}}))
    if link == "file":
        (folder / temporary).symlink_to(tmp_path / "secret")
        (folder / journal.NAME).write_bytes((tmp_path / "journal").read_bytes())
    else:
        (folder / temporary).write_text("{}")
        (folder / journal.NAME).symlink_to(tmp_path / "journal")
    with pytest.raises(CheckpointError, match=r"Can't find 'adapter_config\.json'"):
        find_file(folder, "adapter_config.json")


@pytest.mark.parametrize("content", ["x" * 70_000, "[" * 60_000, "3", '{"files": {}, "files": {}}'])
def test_a_strangers_journal_is_read_in_bounds(content: str, tmp_path: Path) -> None:
    (tmp_path / journal.NAME).write_text(content)
    with pytest.raises(CheckpointError, match=r"partial-journal\.json"):
        find_file(tmp_path, "adapter_config.json")


def test_a_strangers_journal_shows_no_other_adapter(tmp_path: Path) -> None:
    save(tmp_path, "seen")
    hidden = {name: f".partial-{number:032x}.json" for number, name in enumerate(NAMES)}
    for name, temporary in hidden.items():
        (tmp_path / temporary).write_text(f"hidden {name}")
    (tmp_path / journal.NAME).write_text(json.dumps({"files": hidden}))
    assert versions(tmp_path, find_file) == {"seen"}
    (tmp_path / NAMES[1]).unlink()
    with pytest.warns(UserWarning, match=rf"{tmp_path}: saving was interrupted; adapter_config\.json is read from"):
        assert find_file(tmp_path, NAMES[1]).read_text() == f"hidden {NAMES[1]}"


def test_what_somebody_puts_there_after_a_kill_stays(tmp_path: Path) -> None:
    for number in count():
        save(tmp_path, "old")
        if not faults.killed_at(tmp_path, number, lambda: save(tmp_path, "new")):
            break
        for name in NAMES:  # as by cp
            (tmp_path / name).write_text(f"copied {name}")
        assert versions(tmp_path, find_file) == {"copied"}
        atomic.finish_files(tmp_path)
        assert versions(tmp_path, Path) == {"copied"}, number
        assert not (tmp_path / journal.NAME).exists()
        atomic.remove_partial(tmp_path)
    assert number > 15


def fill(final: Path) -> None:
    with atomic.complete_directory(final) as folder:
        (folder / "inner").mkdir()
        for name in ("one", "inner/two"):
            (folder / name).write_text(name)


@pytest.mark.parametrize("act", ACTS)
def test_a_directory_is_whole_or_not_there(act: str, tmp_path: Path) -> None:
    final, seen = tmp_path / "final", set()
    for number in outcomes(tmp_path, act, lambda: fill(final), lambda: None, lasting=False):
        seen.add(final.exists())
        if final.exists():
            atomic.marker.check(final)
            assert sorted(path.name for path in final.rglob("*")) == ["COMPLETE", "inner", "one", "two"], number
        if act != "SIGKILL":
            assert {entry.name for entry in tmp_path.iterdir()} <= {"final"}, number
        atomic.remove_directory(final)
        fill(final)  # and removes what a killed process left
        assert [entry.name for entry in tmp_path.iterdir()] == ["final"], number
        atomic.remove_directory(final)
    assert seen == {False, True}


def test_a_long_name_stays_possible(tmp_path: Path) -> None:
    fill(tmp_path / ("n" * 255))
    assert atomic.is_complete(tmp_path / ("n" * 255))


def test_of_two_that_make_one_directory_neither_has_a_part_in_the_others(tmp_path: Path) -> None:
    final = tmp_path / "final"

    def slower() -> None:
        with atomic.complete_directory(final) as folder:
            (folder / "slower").write_text("")
            fill(final)

    with pytest.raises(FileExistsError, match="final already exists"):
        slower()
    assert sorted(path.name for path in final.rglob("*")) == ["COMPLETE", "inner", "one", "two"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["final"]


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage", [_flip, Path.unlink, lambda path: path.write_bytes(b"")], ids=["bit", "gone", "empty"]
)
@pytest.mark.parametrize("name", ["one", "inner/two"])
def test_a_file_that_changed_since_is_named(name: str, damage: Callable[[Path], object], tmp_path: Path) -> None:
    fill(tmp_path / "final")
    atomic.marker.check(tmp_path / "final")
    damage(tmp_path / "final" / name)
    with pytest.raises(CheckpointError, match=f"{tmp_path / 'final' / name} "):
        atomic.marker.check(tmp_path / "final")


@pytest.mark.parametrize(
    ("content", "said"),
    [("{", "not valid JSON"), ('{"files": 3}', "lists no files"), ('{"files": {"../x": [0, 0]}}', "no file of this")],
)
def test_a_marker_that_changed_is_named(content: str, said: str, tmp_path: Path) -> None:
    fill(tmp_path / "final")
    (tmp_path / "final" / "COMPLETE").write_text(content)
    with pytest.raises(CheckpointError, match=f"COMPLETE.*{said}"):
        atomic.marker.check(tmp_path / "final")
