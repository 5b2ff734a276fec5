"""A resolved plan as the tree of the model's modules: what `parallel-plans show` prints, a line each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from parallel_plans.table import ModuleEntry, Table, wildcarded
from parallel_plans.verify.summary import ParameterRow, parameter_rows

LAYER = "*"
_LAST, _MORE, _UNDER_LAST, _UNDER_MORE = "`- ", "|- ", "   ", "|  "


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line of the tree.

    Args:
        name: with the branches before it, `|- q_proj.weight`.
        times: for how many layers it stands; None for what is no parameter and stands for one.
        shape, letters, styles, rule: as the plan's text has them; empty for a module that no rule acts on.
        bytes: that the rank holds which holds most, of all that the line stands for.
        modules: the names, with `*` for numbers, of the modules whose collectives belong here.
    """

    name: str
    times: int | None
    shape: str
    letters: str
    styles: str
    rule: str
    bytes: int
    modules: tuple[str, ...]


@dataclass(kw_only=True)
class _Node:
    """A module, or a parameter where it has a row."""

    path: str = ""
    row: ParameterRow | None = None
    entries: tuple[ModuleEntry, ...] = ()
    below: dict[str, _Node] = field(default_factory=dict)

    @property
    def rows(self) -> Iterator[ParameterRow]:
        """Those of all parameters in it."""
        if self.row is not None:
            yield self.row
        for node in self.below.values():
            yield from node.rows

    @property
    def is_leaf(self) -> bool:
        """Whether it is a module that has parameters and nothing else, and stands under no style that they do not."""
        rows = [node.row for node in self.below.values()]
        styles = {name for row in rows if row is not None for name in row.styles.split(" and ")}
        return bool(rows) and None not in rows and styles.issuperset(entry.style.name for entry in self.entries)

    def reach(self, path: str) -> _Node:
        """The node at a path below it, made where it is not there yet."""
        node, segments = self, path.split(".")
        for number, segment in enumerate(segments, 1):
            node = node.below.setdefault(segment, _Node(path=".".join(segments[:number])))
        return node


def lines_of(table: Table) -> list[Line]:
    """The modules and parameters of a resolved plan, in the model's order; the first line is the model itself."""
    root = _Node()
    for row in parameter_rows(table):
        root.reach(row.form).row = row
    for name, entries in table.modules.items():
        node = root.reach(name if _has(root, name) else wildcarded(name))
        node.entries = node.entries or entries
    return [_line(root, table.spec.model_type or "model"), *_below(root, "")]


def _has(root: _Node, path: str) -> bool:
    node: _Node | None = root
    for segment in path.split("."):
        node = None if node is None else node.below.get(segment)
    return node is not None


def _below(node: _Node, before: str) -> Iterator[Line]:
    """The lines below a node, each behind the branches that lead to it."""
    shown = list(_shown(node))
    for number, (name, each) in enumerate(shown, 1):
        is_last = number == len(shown)
        if each.is_leaf:
            parameters = list(each.below.items())
            for at, (parameter, held) in enumerate(parameters, 1):
                branch = _LAST if is_last and at == len(parameters) else _MORE
                yield _line(held, f"{before}{branch}{name}.{parameter}", around=each if at == 1 else None)
            continue
        yield _line(each, f"{before}{_LAST if is_last else _MORE}{name}")
        yield from _below(each, before + (_UNDER_LAST if is_last else _UNDER_MORE))


def _shown(node: _Node) -> Iterator[tuple[str, _Node]]:
    """The nodes below, a list and its alike layers as one: `layers.*`."""
    for name, each in node.below.items():
        while list(each.below) == [LAYER] and not each.entries and each.below[LAYER].row is None:
            name, each = f"{name}.{LAYER}", each.below[LAYER]
        yield name, each


def _line(node: _Node, name: str, around: _Node | None = None) -> Line:
    """The line of a node; `around` is the module that a parameter's line stands for too."""
    row, module = node.row, around or (node if node.row is None else None)
    entries = module.entries if module else ()
    if row is not None:
        letters, styles, rule = _letters(row), row.styles, row.lines
    else:
        letters, styles = "", " and ".join(dict.fromkeys(entry.style.name for entry in entries))
        rule = " and ".join(str(entry.rule.line) for entry in entries if entry.rule.line is not None)
    around_told = [each for each in (letters, _boundary(entries)) if each]
    return Line(
        name=name,
        times=row.times if row is not None else _times(node),
        shape=row.shape if row is not None else "",
        letters="; ".join(around_told),
        styles=styles,
        rule=f"line {rule}" if rule else "",
        bytes=sum(each.bytes for each in node.rows),
        modules=() if module is None else (module.path,),
    )


def _times(node: _Node) -> int | None:
    """For how many layers a module stands, if for several."""
    stars = node.path.split(".").count(LAYER)
    alike = [row.times for row in node.rows if row.form.split(".").count(LAYER) == stars]
    return max(alike, default=None) if stars else None


def _letters(row: ParameterRow) -> str:
    return " ".join(f"{letter}@{axis}" for letter, axis in row.letters)


def _boundary(entries: Sequence[ModuleEntry]) -> str:
    """How values change where a module begins and where it ends."""
    told = []
    for entry in entries:
        style = entry.style
        told += [f"in {style.arrives} -> {style.needs}@{entry.axis}"] if style.arrives != style.needs else []
        told += [f"out {style.leaves} -> {style.delivers}@{entry.axis}"] if style.leaves != style.delivers else []
    return ", ".join(dict.fromkeys(told))


def gathered(lines: Sequence[Line], told: Mapping[str, str]) -> list[str]:
    """What is told of modules, by their names with `*`, as a text for each line: the module's, or what is around it."""
    there = {path for line in lines for path in line.modules}
    found: dict[str, list[str]] = {}
    for path, text in told.items():
        while path not in there:
            path = path.rpartition(".")[0]
        found.setdefault(path, []).append(text)
    return [", ".join(text for path in line.modules for text in found.get(path, ())) for line in lines]
