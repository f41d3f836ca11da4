"""What a pickle says, as plain data: read by a machine of its own that can call nothing.

A pickle is a program. Python's own machine looks up the names in it and calls what it finds, and even one that is given
harmless names to find can be made to hang, to fill the memory or to overflow the stack of C: by places in its memo that
are numbered in billions, by tuples of tuples as keys, by text that is doubled again and again. The machine here knows
the few operations that files of torch need. A name is a :class:`Record` of that name, a call is a record with
arguments, and an object that is filled in is a record with a state. What comes out is a tree: no value of it is inside
of itself, none is so deep that a walk through it could fail, and none is much larger than the file that it came from.

Source of the operations: ``pickletools``, whose parser reads them.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from lorica.errors import CheckpointError

_MAX_DEPTH = 64
_MAX_NUMBER = 2**63
#: Values that the tree may have besides two for every byte of the file.
_SPARE_VALUES = 100_000
#: The name of records of what a pickle says is outside of it: in torch's files, the numbers of a tensor.
OUTSIDE = "persistent_id"
_PLAIN_KEYS = (str, int, float, bytes, type(None))


@dataclass(eq=False, slots=True)
class Record:
    """What a pickle says of an object.

    Attributes:
        name: full name of its class, of a function whose result it is, or of what is only named.
        args: with what that would be called.
        state: what it would be filled in with.
        items: what would be put into it, by key.
        values: what would be appended to it.
    """

    name: str
    args: tuple[Any, ...] = ()
    state: Any = None
    items: dict[Any, Any] = field(default_factory=dict)
    values: list[Any] = field(default_factory=list)

    @property
    def fields(self) -> dict[str, Any]:
        """Its attributes: its state, or, of an object with slots, the second half of it."""
        state = self.state
        if isinstance(state, tuple) and len(state) == 2:
            state = state[1]
        return state if isinstance(state, dict) else {}


def read_pickle(data: bytes, where: str, known: Callable[[str], bool]) -> Any:
    """Return what a pickle says.

    Args:
        data: the pickle.
        where: what it was read from, for messages.
        known: whether a file of this kind may hold a name, such as ``"torch.Size"``; nothing is looked up by it.

    Returns:
        Numbers, text, bytes, None, truth values, tuples, lists, dictionaries, sets and records.

    Raises:
        CheckpointError: it is no pickle, is damaged, does what such a file does not need, or holds more than it can.
    """
    machine = _Machine(known)
    try:
        for operation, argument, _ in pickletools.genops(data):
            run = _OPERATIONS.get(operation.name)
            if run is None:
                raise ValueError(f"the operation {operation.name} is not needed")
            run(machine, argument)
        value = machine.result()
        _check_tree(value, 2 * len(data) + _SPARE_VALUES)
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise CheckpointError(f"{where}: {_shown(error)}") from error
    return value


class _Machine:
    """The stack, the marks in it, and what can be referred to again."""

    def __init__(self, known: Callable[[str], bool]) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self._known = known

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def since_mark(self) -> list[Any]:
        """Take everything above the last mark."""
        start = self.marks.pop()
        found = self.stack[start:]
        del self.stack[start:]
        return found

    def named(self, name: str) -> None:
        if not self._known(name):
            raise ValueError(f"it names {name[:200]}, which no checkpoint needs")
        self.push(Record(name))

    def called(self, _: Any) -> None:
        args, callee = self.stack.pop(), self.stack.pop()
        if not isinstance(callee, Record) or not isinstance(args, tuple):
            raise ValueError("it calls what is no name")
        self.push(Record(callee.name, args))

    def filled(self, _: Any) -> None:
        state = self.stack.pop()
        if not isinstance(self.stack[-1], Record):
            raise ValueError("it fills in what is no object")
        self.stack[-1].state = state

    def extended(self, found: list[Any]) -> None:
        goal = self.stack[-1]
        (goal.values if isinstance(goal, Record) else _list(goal)).extend(found)

    def added(self, found: list[Any]) -> None:
        goal = self.stack[-1]
        if not isinstance(goal, set):
            raise ValueError("it adds to what is no set")
        goal.update(map(_key, found))

    def put(self, found: list[Any]) -> None:
        goal = self.stack[-1]
        items = goal.items if isinstance(goal, Record) else goal
        if not isinstance(items, dict) or len(found) % 2:
            raise ValueError("it puts items into what is no dictionary")
        for key, value in zip(found[::2], found[1::2], strict=True):
            items[_key(key)] = value

    def outside(self, _: Any) -> None:
        if not self._known(OUTSIDE):
            raise ValueError("it refers to something outside")
        self.push(Record(OUTSIDE, (self.stack.pop(),)))

    def stack_global(self, _: Any) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if type(name) is not str or type(module) is not str:
            raise ValueError("it names what is no text")
        self.named(f"{module}.{name}")

    def last(self, count: int) -> None:
        found = tuple(self.stack[-count:])
        if len(found) < count:
            raise IndexError("the stack is empty")
        self.stack[-count:] = [found]

    def result(self) -> Any:
        if self.marks or len(self.stack) != 1:
            raise ValueError("it does not end with one value")
        return self.stack[0]


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError("it appends to what is no list")
    return value


def _key(value: Any) -> Any:
    """Return a key of a dictionary, if finding its place costs nothing: text, a number, a record, or a few of them."""
    few = value if type(value) is tuple and len(value) <= _MAX_DEPTH else (value,)
    if not all(isinstance(part, (*_PLAIN_KEYS, Record)) for part in few):
        raise ValueError(f"a {type(value).__name__} of such values is no key")
    return value


def _whole(value: int) -> int:
    if not -_MAX_NUMBER <= value < _MAX_NUMBER:
        raise ValueError("a number is too large")
    return value


def _nothing(machine: _Machine, argument: Any) -> None:
    """What only says how the rest is written, or ends it."""


def _push(machine: _Machine, argument: Any) -> None:
    machine.push(argument)


_OPERATIONS: dict[str, Callable[[_Machine, Any], object]] = {
    **dict.fromkeys(("PROTO", "FRAME", "STOP"), _nothing),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "BINFLOAT"), _push),
    **dict.fromkeys(("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"), _push),
    **dict.fromkeys(("SHORT_BINBYTES", "BINBYTES", "BINBYTES8"), _push),
    **dict.fromkeys(("LONG1", "LONG4"), lambda m, a: m.push(_whole(a))),
    "NONE": lambda m, _: m.push(None),
    "NEWTRUE": lambda m, _: m.push(True),
    "NEWFALSE": lambda m, _: m.push(False),
    "MARK": lambda m, _: m.marks.append(len(m.stack)),
    "POP": lambda m, _: m.stack.pop(),
    "POP_MARK": lambda m, _: m.since_mark(),
    "EMPTY_TUPLE": lambda m, _: m.push(()),
    "TUPLE": lambda m, _: m.push(tuple(m.since_mark())),
    "TUPLE1": lambda m, _: m.last(1),
    "TUPLE2": lambda m, _: m.last(2),
    "TUPLE3": lambda m, _: m.last(3),
    "EMPTY_LIST": lambda m, _: m.push([]),
    "APPEND": lambda m, _: m.extended([m.stack.pop()]),
    "APPENDS": lambda m, _: m.extended(m.since_mark()),
    "EMPTY_DICT": lambda m, _: m.push({}),
    "SETITEM": lambda m, _: m.put([m.stack.pop(-2), m.stack.pop()]),
    "SETITEMS": lambda m, _: m.put(m.since_mark()),
    "EMPTY_SET": lambda m, _: m.push(set()),
    "ADDITEMS": lambda m, _: m.added(m.since_mark()),
    "FROZENSET": lambda m, _: m.push(frozenset(map(_key, m.since_mark()))),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), lambda m, a: m.memo.__setitem__(a, m.stack[-1])),
    "MEMOIZE": lambda m, _: m.memo.__setitem__(len(m.memo), m.stack[-1]),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda m, a: m.push(m.memo[a])),
    "GLOBAL": lambda m, a: m.named(a.replace(" ", ".", 1)),
    "STACK_GLOBAL": _Machine.stack_global,
    "REDUCE": _Machine.called,
    "NEWOBJ": _Machine.called,
    "BUILD": _Machine.filled,
    "BINPERSID": _Machine.outside,
}


def _check_tree(value: Any, most: int) -> None:
    """Refuse what is inside of itself, too deep, or a small pickle's way of saying something huge."""
    level, count = [value], 0
    for _ in range(_MAX_DEPTH):
        inner: list[Any] = []
        for one in level:
            inner += _inside(one)
            if count + len(inner) > most:
                raise ValueError("it repeats itself too often")
        if not inner:
            return
        count += len(inner)
        level = inner
    raise ValueError("it is nested too deeply")


def _inside(value: Any) -> list[Any]:
    if isinstance(value, Record):
        return [*value.args, value.state, *value.items, *value.items.values(), *value.values]
    if isinstance(value, dict):
        return [*value, *value.values()]
    return [*value] if isinstance(value, (tuple, list, set, frozenset)) else []


def _shown(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:300] if not isinstance(error, ValueError) else str(error)[:300]


__all__ = ["OUTSIDE", "Record", "read_pickle"]
