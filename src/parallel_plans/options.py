"""What a style's option may hold: one checker per kind, from a node to the value that a `Rule` keeps."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from parallel_plans.expressions import MAX_DIGITS, Expression, ExpressionError, parse
from parallel_plans.nodes import Fields, Items, Node, Scalar, shown

_INTEGER = re.compile(rf"-?(0|[1-9][0-9]{{0,{MAX_DIGITS - 1}}})")
_FLAGS = {"true": True, "false": False}
# no leading double underscore: a plan sets counts, it does not reach into the object
_ATTRIBUTE = re.compile(r"(?!__)[A-Za-z_][A-Za-z0-9_]*(\.(?!__)[A-Za-z_][A-Za-z0-9_]*)*")
_KIND_WORDS = {
    "bool": "a YAML boolean",
    "int": "a number",
    "float": "a number",
    "timestamp": "a date",
    "merge": "a YAML merge key",
    "value": "a YAML value key",
    "object": "neither text, number, list nor mapping",
}

EXPECTED: dict[str, str] = {
    "dim": "an integer; -1 is the last dim",
    "size": "an integer of at least 1, or an expression over the model's config",
    "parts": "an integer of at least 1, an expression, or a list of at least 2 sizes",
    "units": "a size, or a list of sizes, one per part",
    "shares": "true, false, a size, or a list of these, one per part",
    "flag": "true or false",
    "counts": "a mapping from an attribute of the module to a size, or to a mapping with parts, unit, shared, each",
    "buffers": "a mapping from a buffer of the module to `{dim: ...}`, with parts, unit and shared where needed",
    "draws": "a mapping with `dim` and `size`, with unit and shared where needed",
    "inputs": "a mapping from an input of the module to `{dim: ..., size: ...}`, with unit and shared where needed",
    "name": "a name, as text",
}


Checkers = Mapping[str, Callable[[Node], object]]


class OptionError(ValueError):
    """A value that its option cannot hold; `node` is the place, `reason` says why a size cannot be read."""

    def __init__(self, node: Node, expected: str, reason: str | None = None) -> None:
        super().__init__(expected)
        self.node = node
        self.expected = expected
        self.reason = reason


def described(node: Node) -> str:
    """The node in a few words: "`no` (a YAML boolean)", "a list"."""
    if isinstance(node, Items):
        return "a list"
    if isinstance(node, Fields):
        return "a mapping"
    if node.kind == "null":
        return "nothing"
    words = _KIND_WORDS.get(node.kind)
    return f"`{shown(node.text)}`" + ("" if words is None else f" ({words})")


def option_value(kind: str, node: Node) -> object:
    """The value of an option of this kind; raises `OptionError` where the node does not hold one."""
    return CHECKERS[kind](node)


def integer(node: Node) -> int | None:
    """The integer that a node writes in decimal; None where it writes none. YAML's octal and hex forms are not read."""
    if isinstance(node, Scalar) and node.kind == "int" and _INTEGER.fullmatch(node.text):
        return int(node.text)
    return None


def _dim(node: Node) -> int:
    value = integer(node)
    if value is None:
        raise OptionError(node, EXPECTED["dim"])
    return value


def _size(node: Node) -> int | str:
    value = integer(node)
    if value is not None and value >= 1:
        return value
    if not isinstance(node, Scalar) or node.kind != "str":
        raise OptionError(node, EXPECTED["size"])
    try:
        _check_constant(parse(node.text))
    except ExpressionError as error:
        raise OptionError(node, EXPECTED["size"], reason=str(error)) from error
    return node.text


def _check_constant(expression: Expression) -> None:
    """Raises where an expression without names has no value; one with names is worked out against the model."""
    if not expression.names:
        expression.evaluate({})


def _parts(node: Node) -> int | str | tuple[int | str, ...]:
    if isinstance(node, Items) and len(node.items) >= 2:
        return tuple(_size(item) for item in node.items)
    if isinstance(node, Scalar) and node.kind == "str":
        return _size(node)
    value = integer(node)
    if value is None or value < 1:
        raise OptionError(node, EXPECTED["parts"])
    return value


def _units(node: Node) -> int | str | tuple[int | str, ...]:
    if not isinstance(node, Items):
        return _size(node)
    if not node.items:
        raise OptionError(node, EXPECTED["units"])
    return tuple(_size(item) for item in node.items)


def _share(node: Node) -> bool | int | str:
    is_flag = isinstance(node, Scalar) and node.kind == "bool" and node.text.lower() in _FLAGS
    return _flag(node) if is_flag else _size(node)


def _shares(node: Node) -> bool | int | str | tuple[bool | int | str, ...]:
    try:
        return tuple(map(_share, node.items)) if isinstance(node, Items) and node.items else _share(node)
    except OptionError as error:
        raise OptionError(error.node, EXPECTED["shares"], reason=error.reason) from None


def _flag(node: Node) -> bool:
    # yes, no, on and off are booleans to YAML 1.1 only, so a plan does not use them
    if not isinstance(node, Scalar) or node.kind != "bool" or node.text.lower() not in _FLAGS:
        raise OptionError(node, EXPECTED["flag"])
    return _FLAGS[node.text.lower()]


def _count(node: Node) -> object:
    """A size, or what says more of a number: its unit, what ranks that share one have, of how many things it is one."""
    if not isinstance(node, Fields):
        return _size(node)
    found: dict[str, object] = {}
    for key, value in node.entries:
        checker = _COUNT.get(key.text) if isinstance(key, Scalar) and key.kind == "str" else None
        if checker is None:
            raise OptionError(key, EXPECTED["counts"])
        found[key.text] = checker(value)  # type: ignore[union-attr]
    return found


def _counts(node: Node) -> dict[str, object]:
    if not isinstance(node, Fields) or not node.entries:
        raise OptionError(node, EXPECTED["counts"])
    counts: dict[str, object] = {}
    for key, value in node.entries:
        if not isinstance(key, Scalar) or key.kind != "str" or not _ATTRIBUTE.fullmatch(key.text):
            raise OptionError(key, EXPECTED["counts"])
        counts[key.text] = _count(value)
    return counts


def _parted(node: Node, kind: str, checkers: Checkers, needed: set[str]) -> dict[str, dict[str, object]]:
    """What is split, by name, and how: a mapping for each, which says at least what is `needed`."""
    if not isinstance(node, Fields) or not node.entries:
        raise OptionError(node, EXPECTED[kind])
    found: dict[str, dict[str, object]] = {}
    for key, value in node.entries:
        if not isinstance(key, Scalar) or key.kind != "str" or not key.text.isidentifier():
            raise OptionError(key, EXPECTED[kind])
        found[key.text] = given = _said(value, kind, checkers)
        if not needed <= given.keys():
            raise OptionError(value, EXPECTED[kind])
    return found


def _said(node: Node, kind: str, checkers: Checkers) -> dict[str, object]:
    if not isinstance(node, Fields):
        raise OptionError(node, EXPECTED[kind])
    given: dict[str, object] = {}
    for key, value in node.entries:
        if not isinstance(key, Scalar) or key.text not in checkers:
            raise OptionError(key, EXPECTED[kind])
        given[key.text] = checkers[key.text](value)
    return given


def _inputs(node: Node) -> dict[str, dict[str, object]]:
    return _parted(node, "inputs", _OF_INPUT, {"dim", "size"})


def _buffers(node: Node) -> dict[str, dict[str, object]]:
    return _parted(node, "buffers", _OF_BUFFER, {"dim"})


def _draws(node: Node) -> dict[str, object]:
    given = _said(node, "draws", _OF_INPUT)
    if not {"dim", "size"} <= given.keys():
        raise OptionError(node, EXPECTED["draws"])
    return given


_OF_INPUT: Checkers = {"dim": _dim, "size": _size, "unit": _size, "shared": _size}
_OF_BUFFER: Checkers = {"dim": _dim, "parts": _parts, "unit": _units, "shared": _shares}


def _name(node: Node) -> str:
    if not isinstance(node, Scalar) or node.kind != "str" or not node.text or not node.text.isprintable():
        raise OptionError(node, EXPECTED["name"])
    return node.text


_COUNT: dict[str, Callable[[Node], object]] = {"parts": _parts, "unit": _units, "shared": _shares, "each": _size}
CHECKERS: dict[str, Callable[[Node], object]] = {
    "dim": _dim,
    "size": _size,
    "parts": _parts,
    "units": _units,
    "shares": _shares,
    "flag": _flag,
    "counts": _counts,
    "buffers": _buffers,
    "draws": _draws,
    "inputs": _inputs,
    "name": _name,
}
