"""Sizes written in a plan, such as `num_attention_heads * head_dim`, over the integers of a model's config.

A plan is untrusted data: the text is read by the parser below, never by Python's, and its length, nesting and numbers
are bounded.

    sum     := product (("+" | "-") product)*
    product := atom (("*" | "/" | "//") atom)*
    atom    := number | name | "(" sum ")"
    name    := word ("." word)*
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

MAX_CHARACTERS = 200
MAX_NESTING = 16
MAX_DIGITS = 12

_TOKEN = re.compile(r"[ \t]*([0-9]+|[A-Za-z_][A-Za-z0-9_]*(?:\.[A-Za-z_][A-Za-z0-9_]*)*|//|[-+*/()])")
_SUMS = ("+", "-")
_PRODUCTS = ("*", "/", "//")


class ExpressionError(ValueError):
    """A size expression that cannot be read or has no value. `missing` is the name that the fields lack, if one is."""

    def __init__(self, message: str, missing: str | None = None) -> None:
        super().__init__(message)
        self.missing = missing

    def __reduce__(self) -> tuple[type[ExpressionError], tuple[str, str | None]]:
        return type(self), (str(self), self.missing)


def _exact(left: int, right: int) -> int:
    if left % right:
        raise ExpressionError(f"{left} / {right} is not a whole number")
    return left // right


_OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": _exact,
    "//": operator.floordiv,
}


@dataclass(frozen=True)
class Expression:
    """A parsed size: its text, the names it needs, and its steps in the order of work (operands before operators)."""

    text: str
    names: frozenset[str]
    steps: tuple[int | str, ...] = field(repr=False)

    def evaluate(self, fields: Mapping[str, int], least: int = 1) -> int:
        """The size, with every name taken from `fields`; raises `ExpressionError` where there is none of at least 1.

        What is true counts as 1, what is false as 0. `least` is 0 for what may be missing.
        """
        stack: list[int] = []
        for step in self.steps:
            if isinstance(step, int):
                stack.append(step)
            elif step not in _OPERATIONS:
                stack.append(_field(fields, step))
            else:
                right = stack.pop()
                if right == 0 and step in ("/", "//"):
                    raise ExpressionError(f"`{self.text}` divides by zero")
                stack.append(_OPERATIONS[step](stack.pop(), right))
        return _checked_size(stack.pop(), self.text, least)


def parse(text: str) -> Expression:
    """The expression that `text` writes; raises `ExpressionError` where it writes none."""
    if len(text) > MAX_CHARACTERS:
        raise ExpressionError(f"{len(text)} characters are more than {MAX_CHARACTERS}")
    parser = _Parser(_tokens(text))
    parser.read_sum(0)
    if parser.ahead is not None:
        raise ExpressionError(f"`{parser.ahead}` stands where an operator or the end is due")
    steps = tuple(parser.steps)
    names = frozenset(step for step in steps if isinstance(step, str) and step not in _OPERATIONS)
    return Expression(text=text, names=names, steps=steps)


def evaluate_size(value: int | str, fields: Mapping[str, int], least: int = 1) -> int:
    """The size that a plan writes as an integer or as an expression; raises `ExpressionError` where it is not one."""
    return parse(value).evaluate(fields, least) if isinstance(value, str) else _checked_size(value, str(value))


def _checked_size(value: int, text: str, least: int = 1) -> int:
    if isinstance(value, bool) or value < least:
        raise ExpressionError(f"`{text}` is {value}, and a size is at least {least}")
    return value


def _field(fields: Mapping[str, int], name: str) -> int:
    if name not in fields:
        raise ExpressionError(f"`{name}` is not known", missing=name)
    value = fields[name]
    if not isinstance(value, int):
        raise ExpressionError(f"`{name}` is {value!r}, not an integer")
    return int(value)


def _tokens(text: str) -> list[str]:
    tokens: list[str] = []
    position, end = 0, len(text.rstrip(" \t"))
    while position < end:
        match = _TOKEN.match(text, position)
        if match is None:
            rest = text[position:].lstrip(" \t")
            raise ExpressionError(f"{rest[0]!a} is no part of a size; only + - * / // and parentheses are")
        token = match[1]
        if token[0].isdigit() and len(token) > MAX_DIGITS:
            raise ExpressionError(f"a number of {len(token)} digits; the most is {MAX_DIGITS}")
        tokens.append(token)
        position = match.end()
    return tokens


class _Parser:
    """Turns tokens into steps. Recurses only into parentheses, whose depth is bounded."""

    def __init__(self, tokens: Sequence[str]) -> None:
        self.tokens = tokens
        self.position = 0
        self.steps: list[int | str] = []

    @property
    def ahead(self) -> str | None:
        return self.tokens[self.position] if self.position < len(self.tokens) else None

    def read_sum(self, nesting: int) -> None:
        self._read_chain(_SUMS, lambda: self._read_chain(_PRODUCTS, lambda: self._read_atom(nesting)))

    def _read_chain(self, operators: Sequence[str], read_operand: Callable[[], None]) -> None:
        read_operand()
        while (token := self.ahead) is not None and token in operators:
            self.position += 1
            read_operand()
            self.steps.append(token)

    def _read_atom(self, nesting: int) -> None:
        token = self.ahead
        if token is None:
            raise ExpressionError("it ends where a number or a name is due")
        if token == ")" or token in _OPERATIONS:
            raise ExpressionError(f"`{token}` stands where a number or a name is due")
        self.position += 1
        if token != "(":
            self.steps.append(int(token) if token[0].isdigit() else token)
            return
        if nesting == MAX_NESTING:
            raise ExpressionError(f"parentheses are nested deeper than {MAX_NESTING}")
        self.read_sum(nesting + 1)
        if self.ahead != ")":
            raise ExpressionError("a parenthesis is not closed")
        self.position += 1
