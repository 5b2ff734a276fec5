"""The text of a plan as small nodes that know their lines. Nothing in the text is executed, constructed or expanded.

A plan is untrusted data. Size and depth are bounded before anything is built, tags, anchors and aliases are refused,
and scalars stay text: a node keeps what YAML would have made of one (`on` is a boolean) only as a word.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from parallel_plans.errors import Finding, PlanError

MAX_BYTES = 1 << 20
MAX_DEPTH = 8  # a plan needs 4: the file, a section, a rule, a list of sizes
MAX_SHOWN = 80  # characters of the plan's text that a message repeats

_RESOLVER = yaml.resolver.Resolver()
_STAR_FIX = 'put a name that begins with * in quotes, as in "**"'
_DEPTH_EXPECTED = f"at most {MAX_DEPTH} levels"


@dataclass(frozen=True)
class Scalar:
    """One value. `kind` is `str`, `bool`, `int`, `null` or another of YAML's, or `refused`: a finding has named it."""

    text: str
    kind: str
    line: int | None


@dataclass(frozen=True)
class Items:
    """A list."""

    items: tuple[Node, ...]
    line: int | None


@dataclass(frozen=True)
class Fields:
    """A mapping as its entries in order; a key may be any node, and may come twice."""

    entries: tuple[tuple[Node, Node], ...]
    line: int | None


Node = Scalar | Items | Fields


def shown(text: str) -> str:
    """The text for a message: ASCII, on one line and of bounded length, whatever the plan holds."""
    text = text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "..."
    return text if text.isascii() and text.isprintable() else ascii(text)[1:-1]


def shown_path(path: str | os.PathLike[str]) -> str:
    """The path for a message: relative to the working directory where it lies below it, else as given."""
    given = os.fsdecode(path)
    try:
        return Path(os.path.abspath(given)).relative_to(Path.cwd()).as_posix()
    except ValueError:
        return given


def read_text(path: str | os.PathLike[str], file: str) -> str:
    """The text of the file at `path`, called `file` in messages; `PlanError` where it has none."""
    try:
        with open(path, "rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a path that holds a null character
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise PlanError(
            Finding(code="PP001", message=f"the plan cannot be read: {reason}", file=file, expected="a YAML file")
        ) from error
    if len(data) > MAX_BYTES:
        message = f"the plan is larger than {MAX_BYTES} bytes"
        raise PlanError(Finding(code="PP002", message=message, file=file, expected=f"at most {MAX_BYTES} bytes"))
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        message = f"byte 0x{data[error.start]:02x} is not UTF-8"
        fix = "save the file as UTF-8"
        raise PlanError(Finding(code="PP003", message=message, file=file, line=line, fix=fix)) from error


def text_node(text: str, file: str | None) -> tuple[Node | None, list[Finding]]:
    """The root node, None for an empty text, and what was refused on the way; `PlanError` where it is not YAML."""
    builder = _Builder(file)
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            builder.feed(event)
            if builder.documents > 1:
                break
    except PlanError:  # a ValueError too
        raise
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark is not None else None
        builder.not_yaml(shown(error.problem or "it cannot be read"), line, text)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        builder.not_yaml(f"character {shown(chr(error.character))!r} is not allowed", line, text)
    except (ValueError, OverflowError) as error:  # PyYAML lets these out for an escape such as "\UFFFFFFFF"
        builder.not_yaml(shown(str(error)), None, text)
    return builder.root, builder.findings


class _Builder:
    """Builds nodes from YAML events, one after another, without recursion."""

    def __init__(self, file: str | None) -> None:
        self.file = file
        self.findings: list[Finding] = []
        self.root: Node | None = None
        self.documents = 0
        self._anchored_line = 0
        self._open: list[tuple[yaml.CollectionStartEvent, list[Node]]] = []

    def feed(self, event: yaml.Event) -> None:
        line = _line(event)
        if isinstance(event, yaml.DocumentStartEvent):
            self._start_document(line)
        elif isinstance(event, yaml.NodeEvent):
            self._refuse_references(event, line)
            if isinstance(event, yaml.CollectionStartEvent):
                self._open_collection(event, line)
            elif isinstance(event, yaml.ScalarEvent):
                self._place(Scalar(event.value, _kind(event), line))
            else:
                self._place(Scalar("", "refused", line))
        elif isinstance(event, yaml.CollectionEndEvent):
            self._close_collection()

    def not_yaml(self, problem: str, line: int | None, text: str) -> None:
        """Raises everything found so far, with the reason why reading stopped."""
        at_line = text.splitlines()[line - 1 : line] if line is not None else []
        starred = at_line and at_line[0].lstrip(" -{").startswith("*")
        self._add("PP004", f"the plan is not YAML: {problem}", line, fix=_STAR_FIX if starred else None)
        raise PlanError(self.findings)

    def _start_document(self, line: int) -> None:
        self.documents += 1
        if self.documents > 1:
            fix = "put each plan into a file of its own"
            self._add("PP004", "the file holds more than one YAML document", line, expected="one document", fix=fix)

    def _refuse_references(self, event: yaml.NodeEvent, line: int) -> None:
        tag = getattr(event, "tag", None)
        if tag is not None:
            written = shown(tag.replace("tag:yaml.org,2002:", "!!", 1))
            self._add("PP005", f"the YAML tag `{written}` is not allowed in a plan", line, fix="remove the tag")
        if event.anchor is None or self._anchored_line == line:  # one finding per line is enough
            return
        self._anchored_line = line
        is_alias = isinstance(event, yaml.AliasEvent)
        message = f"the YAML {'alias `*' if is_alias else 'anchor `&'}{shown(event.anchor)}` is not allowed in a plan"
        starred = is_alias and self._is_key_due
        self._add("PP006", message, line, fix=_STAR_FIX if starred else "write the value out wherever it is used")

    @property
    def _is_key_due(self) -> bool:
        """Whether the next node is the key of a mapping."""
        if not self._open:
            return False
        event, nodes = self._open[-1]
        return isinstance(event, yaml.MappingStartEvent) and len(nodes) % 2 == 0

    def _open_collection(self, event: yaml.CollectionStartEvent, line: int) -> None:
        if len(self._open) == MAX_DEPTH:
            self._add("PP007", "the plan is nested too deeply", line, expected=_DEPTH_EXPECTED)
            raise PlanError(self.findings)
        self._open.append((event, []))

    def _close_collection(self) -> None:
        event, nodes = self._open.pop()
        line = _line(event)
        if event.tag is not None:
            self._place(Scalar("", "refused", line))
        elif isinstance(event, yaml.MappingStartEvent):
            self._place(Fields(tuple(zip(nodes[::2], nodes[1::2], strict=True)), line))
        else:
            self._place(Items(tuple(nodes), line))

    def _place(self, node: Node) -> None:
        if self._open:
            self._open[-1][1].append(node)
        else:
            self.root = node

    def _add(
        self, code: str, message: str, line: int | None, expected: str | None = None, fix: str | None = None
    ) -> None:
        self.findings.append(Finding(code=code, message=message, file=self.file, line=line, expected=expected, fix=fix))


def _line(event: yaml.Event) -> int:
    """The line on which an event begins, counted from 1."""
    assert event.start_mark is not None, "events that come from text have marks"
    return event.start_mark.line + 1


def _kind(event: yaml.ScalarEvent) -> str:
    """What YAML makes of a scalar: the last word of its tag."""
    if event.tag is not None:
        return "refused"
    tag: str = _RESOLVER.resolve(yaml.ScalarNode, event.value, event.implicit)
    return tag.rpartition(":")[2]


def value_node(value: object, depth: int = 0) -> Node:
    """The node of a Python value, without a line; `PlanError` where it is nested too deeply (or holds itself)."""
    if isinstance(value, Mapping | list | tuple) and depth == MAX_DEPTH:
        raise PlanError(Finding(code="PP007", message="the plan is nested too deeply", expected=_DEPTH_EXPECTED))
    if isinstance(value, Mapping):
        entries = tuple((value_node(key, depth + 1), value_node(item, depth + 1)) for key, item in value.items())
        return Fields(entries, None)
    if isinstance(value, list | tuple):
        items: Sequence[object] = value
        return Items(tuple(value_node(item, depth + 1) for item in items), None)
    return _scalar(value)


def _scalar(value: object) -> Scalar:
    if value is None:
        return Scalar("null", "null", None)
    if isinstance(value, bool):
        return Scalar(str(value).lower(), "bool", None)
    if isinstance(value, int):
        # Python refuses to write out a number of thousands of digits in decimal
        return Scalar(str(int(value)) if value.bit_length() < 64 else hex(value), "int", None)
    if isinstance(value, str):
        return Scalar(str(value), "str", None)
    return Scalar(type(value).__name__, "float" if isinstance(value, float) else "object", None)
