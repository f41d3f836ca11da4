"""What strangers and broken disks do to files: bits, ends, pieces, headers, words of JSON, steps of pickles.

Each mutation takes the bytes of a good file and a generator of random numbers, and returns other bytes. Those that know
a format change what it says and leave the rest whole, so that a reader gets past its first check.
"""

from __future__ import annotations

import copy
import io
import json
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

Mutation = Callable[[bytes, random.Random], bytes]

#: Values that no field expects, as JSON has them.
VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 3, 7, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, -(2**63), 10**18, 10**30),
    *(0.0, -0.0, 0.5, 1e30, 1e308, -1e308, 5e-324, "", "a", "x" * 300, "..", "../..", "/etc/passwd", "/dev/zero"),
    *("os", "os.system", "builtins.eval", "torch", "torch.nn.Linear", "auto", "all-linear", "none", "NaN", "1e400"),
    *("(a+)+$", "(?:a|a)*b", "[", ".*", "\\", "%s%n", "\u202e", "ß", "🤗", "default", "base_model.model."),
    *([], [[]], [0], [1, 2], [None], ["q_proj"], [["q_proj"]], [10**18] * 3, [-1], {}, {"a": 1}, {"": None}, {"r": 8}),
]
#: What JSON cannot say, put in as text.
_RAW = [
    *("NaN", "Infinity", "-Infinity", "1e400", "9" * 5000, "-" + "9" * 400, "[" * 3000, '"\\ud800"', '"\\u0000"'),
    *("{" * 500, "", "'a'", "//", "0x10", "01", '{"a": 1, "a": 2}', "[1,]", "tru"),
]


# ---- bytes -----------------------------------------------------------------------------------------------------------


def flip(data: bytes, rng: random.Random) -> bytes:
    """Change a few bits."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        if changed:
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def flip_early(data: bytes, rng: random.Random) -> bytes:
    """Change a bit where formats say what they are."""
    head = min(len(data), rng.choice((8, 64, 512)))
    return flip(data[:head], rng) + data[head:]


def cut(data: bytes, rng: random.Random) -> bytes:
    """Lose the end."""
    return data[: rng.choice((0, 1, 7, 8, 9, len(data) // 2, len(data) - 1, rng.randrange(len(data) + 1)))]


def grow(data: bytes, rng: random.Random) -> bytes:
    """Get something more at the end, or in the middle."""
    more = rng.choice((b"\0", b"\0" * 4096, data[: rng.randrange(len(data) + 1)], rng.randbytes(64)))
    at = rng.choice((len(data), rng.randrange(len(data) + 1)))
    return data[:at] + more + data[at:]


def splice(data: bytes, rng: random.Random) -> bytes:
    """Put one stretch of the file over, or into, another."""
    start, to = (rng.randrange(len(data) + 1) for _ in range(2))
    piece = data[start : start + rng.choice((1, 4, 16, 256))]
    return data[:to] + piece + data[to + (len(piece) if rng.random() < 0.7 else 0) :]


def blank(data: bytes, rng: random.Random) -> bytes:
    """Have zeros, or ones, where something was."""
    start, length = rng.randrange(len(data) + 1), rng.choice((1, 8, 64, 4096))
    return data[:start] + rng.choice((b"\0", b"\xff")) * len(data[start : start + length]) + data[start + length :]


def number(data: bytes, rng: random.Random) -> bytes:
    """Write a number with a boundary's value somewhere."""
    form = rng.choice(("<I", "<Q", "<H", "<q", ">I"))
    bits = 8 * struct.calcsize(form)
    top = 2 ** (bits - 1 if form == "<q" else bits) - 1
    word = struct.pack(form, rng.choice((0, 1, top, top // 2, top // 2 + 1, len(data), min(top, 10**9))))
    at = rng.randrange(max(1, len(data) - len(word) + 1))
    return data[:at] + word + data[at + len(word) :]


BYTES: list[Mutation] = [flip, flip, flip_early, cut, grow, splice, blank, number]

# ---- JSON, by its structure ------------------------------------------------------------------------------------------

_MARK = "\ue000raw\ue000"


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Return every container and key in a value."""
    found: list[tuple[Any, Any]] = []
    waiting = [value]
    while waiting:
        one = waiting.pop()
        keys: Any = one.keys() if isinstance(one, dict) else range(len(one)) if isinstance(one, list) else ()
        found += [(one, key) for key in keys]
        waiting += [one[key] for key in keys]
    return found


def edit(value: Any, rng: random.Random) -> tuple[Any, str]:
    """Change one or a few places of a value; return it, and text that is to stand at the mark in it."""
    raw = ""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = _places(value)
        if not places:
            return copy.deepcopy(rng.choice(VALUES)), raw
        owner, key = rng.choice(places)
        kind = rng.randrange(9)
        if kind == 0:
            del owner[key]
        elif kind == 1 and isinstance(owner, dict):
            owner[rng.choice(("", "x", f"{key}x", str(key)[:-1], "__class__", "../x", "a" * 500))] = owner.pop(key)
        elif kind == 2:
            other, where = rng.choice(places)
            owner[key] = json.loads(json.dumps(other[where])) if where in _keys(other) else None
        elif kind == 3 and isinstance(owner, list):
            owner.insert(key, owner[key])
        elif kind == 4 and isinstance(owner[key], (int, float)) and not isinstance(owner[key], bool):
            owner[key] = rng.choice((owner[key] + 1, owner[key] - 1, -owner[key], owner[key] * 2, owner[key] * 10**9))
        elif kind == 5 and isinstance(owner[key], str):
            text = owner[key]
            at = rng.randrange(len(text) + 1)
            owner[key] = rng.choice((text[:at], text[:at] + rng.choice(("*", ".", "\x00", "(", "/", "é")) + text[at:]))
        elif kind == 6 and not raw:
            owner[key], raw = _MARK, rng.choice(_RAW)
        else:
            owner[key] = copy.deepcopy(rng.choice(VALUES))
    return value, raw


def _keys(owner: Any) -> Any:
    return owner if isinstance(owner, dict) else range(len(owner))


def edit_json(data: bytes, rng: random.Random) -> bytes:
    """Change what a JSON file says."""
    try:
        value, raw = edit(json.loads(data), rng)
        text = json.dumps(value)
    except (ValueError, RecursionError):
        return flip(data, rng)
    if raw:
        text = text.replace(json.dumps(_MARK), raw)
    if rng.random() < 0.05:
        text = text.replace(",", ',"r":1,"r":2,', 1)
    return text.encode(errors="surrogatepass")


# ---- safetensors -----------------------------------------------------------------------------------------------------


def edit_header(data: bytes, rng: random.Random) -> bytes:
    """Change what the header of a safetensors file says, with a length that fits it, mostly."""
    length = int.from_bytes(data[:8], "little")
    if length > len(data):
        return flip(data, rng)
    header = edit_json(data[8 : 8 + length], rng)
    said = len(header) if rng.random() < 0.9 else rng.choice((0, 2**60, 2**63, len(header) + 8, len(data)))
    return said.to_bytes(8, "little") + header + data[8 + length :]


def spoil_numbers(data: bytes, rng: random.Random) -> bytes:
    """Put NaN, infinity or a huge number where a tensor is."""
    length = 8 + int.from_bytes(data[:8], "little")
    if length + 4 > len(data):
        return flip(data, rng)
    at = length + 4 * rng.randrange((len(data) - length) // 4)
    word = rng.choice((b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\0\0\x80\xff", b"\xff\xff\x7f\x7f", b"\0\x7c\0\x7c"))
    return data[:at] + word + data[at + 4 :]


# ---- pickles ---------------------------------------------------------------------------------------------------------

#: Stretches of pickles: calls, names, memos in billions, depth, doubling, text, numbers, keys, what is outside.
STRETCHES: list[bytes] = [
    *(b"cos\nsystem\n(S'true'\ntR.", b"cbuiltins\neval\n\x8c\x011\x85R", b"(i__main__\nx\n"),
    *(b"ctorch\nSize\n(K\x01K\x02t\x81", b"\x8c\x02os\x8c\x06system\x93", b"K\x07Q", b"P1\n"),
    *(b"r\xff\xff\xff\x7f", b"q\xff", b"j\xff\xff\xff\x7f", b"h\xff", b"(" * 1000, b"\x85" * 1000),
    *(b"]" * 500 + b"a" * 499, b"]q\x00" + b"h\x00h\x00\x86q\x00" * 40, b"N" + b"\x94h\x002" * 20),
    *(b"2" * 100, b"00", b"}(K\x01K\x02u", b"\x8f(]\x90", b"}]Ns", b"\x80\x09", b"."),
    *(b"\x8e" + (2**60).to_bytes(8, "little"), b"\x8d" + (2**40).to_bytes(8, "little"), b"B\xff\xff\xff\x7f"),
    *(b"\x8b\xff\xff\xff\x7f", b"\x8a\xff" + b"\x7f" * 255, b"\x8a\x08" + b"\xff" * 8, b"I" + b"9" * 6000 + b"\n"),
    *(b"\x95" + (2**62).to_bytes(8, "little"), b"\x82\x01", b"\x97", b"\x98", b"b", b"R", b"\x81", b"\x92", b"\x93"),
    *(b"s", b"e", b"u", b"\x90"),
]
_STEPS = b"()]}teaus.N0hqRbQcKJM\x85\x86\x87\x88\x94\x93\x81\x8c"


def edit_pickle(data: bytes, rng: random.Random) -> bytes:
    """Put a stretch of another pickle into one, or change an operation of it."""
    at = rng.randrange(len(data) + 1)
    kind = rng.randrange(4)
    if kind == 0:
        return data[:at] + rng.choice(STRETCHES) + data[at:]
    if kind == 1:
        return data[: data.rfind(b".")] + rng.choice(STRETCHES) + rng.choice((b".", b"\x86.", b"\x85R.", b"b."))
    if kind == 2:
        return data[:at] + bytes([rng.choice(_STEPS)]) + data[at + 1 :]
    return rng.choice((flip, cut, splice, number))(data, rng)


# ---- archives --------------------------------------------------------------------------------------------------------


def edit_archive(data: bytes, rng: random.Random) -> bytes:
    """Change one member of a file of ``torch.save``, and pack it again."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
    except Exception:  # it is broken already
        return flip(data, rng)
    name = next((n for n in members if n.endswith("data.pkl")), "") if rng.random() < 0.7 else rng.choice([*members])
    kind = rng.randrange(8)
    if kind == 0:
        del members[name]
    elif kind == 1:
        members[rng.choice(("x/data/9", "../x", "/x", "archive/data/0"))] = members.pop(name)
    else:
        members[name] = (edit_pickle if name.endswith("pkl") else flip)(members[name], rng)
    buffer = io.BytesIO()
    method = zipfile.ZIP_DEFLATED if rng.random() < 0.1 else zipfile.ZIP_STORED
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for inner, content in members.items():
            archive.writestr(inner, content)
    return buffer.getvalue()


# ---- which for which file --------------------------------------------------------------------------------------------


def mutations_of(path: Path) -> list[Mutation]:
    """Return what is done to a file, by its name."""
    if path.suffix in (".json", ".yaml"):
        return [*BYTES, *[edit_json] * 24]
    if path.suffix == ".safetensors":
        return [*BYTES, *[edit_header] * 12, spoil_numbers, spoil_numbers]
    if path.name == ".metadata":
        return [*BYTES, *[edit_pickle] * 12]
    if path.suffix == ".pt":
        return [*BYTES, *[edit_archive] * 12]
    return BYTES


def mutate(folder: Path, rng: random.Random) -> str:
    """Change one file of a directory, rarely two; return what was done."""
    done = []
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    for _ in range(rng.choice((1, 1, 1, 1, 2))):
        path = rng.choice(files)
        kind = rng.randrange(40)
        if kind == 0:
            path.unlink(missing_ok=True)
            done.append(f"{path.name} is gone")
        elif kind == 1 and path.exists():
            path.unlink()
            path.symlink_to(rng.choice(("/etc/passwd", "/dev/zero", path.name, "/nowhere", "..")))
            done.append(f"{path.name} is a link")
        elif kind == 2 and path.is_file() and not path.is_symlink():
            other = rng.choice(files)
            path.write_bytes(other.read_bytes() if other.is_file() and not other.is_symlink() else b"")
            done.append(f"{path.name} is another")
        elif path.is_file() and not path.is_symlink():
            mutation = rng.choice(mutations_of(path))
            path.write_bytes(mutation(path.read_bytes(), rng))
            done.append(f"{mutation.__name__} of {path.relative_to(folder)}")
    return ", ".join(done)
