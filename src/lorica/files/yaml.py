"""YAML, read as if it came from strangers: plain values, bounded in depth and in what aliases make of it.

``yaml.safe_load`` runs nothing, but nine lines of aliases to aliases are a billion values, a number may be written as a
hundred thousand sexagesimal places, and of two equal keys it takes the last.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode

#: Characters; reading a thousand takes a few milliseconds.
_MAX_LENGTH = 128 * 1024
_MAX_VALUES = 10_000
_MAX_DEPTH = 64
#: Characters of a number, a date, or a truth value.
_MAX_PLAIN = 128
_TEXT = "tag:yaml.org,2002:str"
_TAGS = frozenset(
    f"tag:yaml.org,2002:{name}"
    for name in ("null", "bool", "int", "float", "timestamp", "str", "seq", "map", "merge", "value")
)


class _Loader(yaml.SafeLoader):
    """Counts values as it composes them, those of an alias as often as it stands there."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._count = self._depth = 0
        self._sizes: dict[int, int] = {}

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        alias, before = self.check_event(yaml.AliasEvent), self._count
        mark = self.get_mark()
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise yaml.MarkedYAMLError(problem="nested too deeply", problem_mark=mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if alias:
            if id(node) not in self._sizes:
                raise yaml.MarkedYAMLError(problem="an alias inside of what it means", problem_mark=mark)
            self._count += self._sizes[id(node)]
        else:
            self._count += 1
            self._sizes[id(node)] = self._count - before
            _check(node)
        if self._count > _MAX_VALUES:
            raise yaml.MarkedYAMLError(problem=f"more than {_MAX_VALUES:,} values", problem_mark=mark)
        return node


def _check(node: Node | None) -> None:
    if node is None:
        return
    problem = ""
    if node.tag not in _TAGS:
        problem = f"{node.tag[:80]!r} is no plain value"
    elif isinstance(node, ScalarNode) and node.tag != _TEXT and len(node.value) > _MAX_PLAIN:
        problem = f"{node.value[:20]!r}… is too long for a number"
    elif isinstance(node, MappingNode):
        keys = Counter((key.tag, key.value) for key, _ in node.value if isinstance(key, ScalarNode))
        problem = next((f"the key {name[:80]!r} stands twice" for (_, name), count in keys.items() if count > 1), "")
    if problem:
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


def parse_yaml(text: str) -> Any:
    """Return the value that a text means.

    Raises:
        ValueError: the text is too long, is not YAML, or is not plain; says where.
    """
    if len(text) > _MAX_LENGTH:
        raise ValueError(f"{len(text):,} characters are too many (limit {_MAX_LENGTH:,})")
    try:
        return _Loader(text).get_single_data()
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise ValueError(" ".join(str(error).split())[:400]) from error


def read_yaml(path: Path) -> Any:
    """Return the value in a file; as :func:`parse_yaml`."""
    size = path.stat().st_size
    if size > 4 * _MAX_LENGTH:  # no character has more bytes
        raise ValueError(f"{size:,} bytes are too many (limit {_MAX_LENGTH:,})")
    return parse_yaml(path.read_text(encoding="utf-8"))


def to_yaml(values: Any) -> str:
    """Return plain values as YAML, mappings in their order."""
    return str(yaml.safe_dump(values, sort_keys=False, allow_unicode=True))


__all__ = ["parse_yaml", "read_yaml", "to_yaml"]
