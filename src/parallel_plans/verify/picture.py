"""A picture of one layer of each kind and of what is around the layers, as nested boxes: what is drawn, not where.

A box is a module. It has its parameters, the value that it gave, the collectives that it started, forward and backward,
and the numbers of the findings about it. Boxes stand in forward order, as far as a step of the model was followed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from parallel_plans.model_spec import ModelSpec
from parallel_plans.table import Table
from parallel_plans.verify.alike import Kind, kinds_drawn, layer_of, moved, within
from parallel_plans.verify.badges import places_of
from parallel_plans.verify.flow import Flow, Mark, Value
from parallel_plans.verify.report import Report
from parallel_plans.verify.summary import letters_of


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A parameter in a box: its own name, its shape with shard marks, and (letter, axis) for each rule."""

    name: str
    shape: str
    letters: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Passed:
    """Collectives of one kind that a module starts in one direction: how many, bytes of all of them."""

    op: str
    axis: str
    count: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Box:
    """A module.

    Args:
        name: from the layer on; the layer's own is empty.
        kind: its class.
        styles: (style, line) of the rules that act at its boundary, or on its parameters where none does.
        leaves: the letter of its output before its style hands it on; empty where no style says.
        badges: the numbers of the findings about it.
        inner: what is within, in forward order.
    """

    name: str
    kind: str = ""
    styles: tuple[tuple[str, int | None], ...] = ()
    leaves: str = ""
    parameters: tuple[Shown, ...] = ()
    value: Value | None = None
    forward: tuple[Passed, ...] = ()
    backward: tuple[Passed, ...] = ()
    badges: tuple[int, ...] = ()
    inner: tuple[Box, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Part:
    """Neighbouring boxes: a layer of one kind, for which `layers` are alike, or some modules around the layers."""

    title: str
    layers: tuple[str, ...]
    boxes: tuple[Box, ...]


@dataclass(frozen=True, kw_only=True)
class Picture:
    """All parts in forward order, and the numbers of the findings that have no place in them."""

    parts: tuple[Part, ...]
    elsewhere: tuple[int, ...] = ()


@dataclass(kw_only=True)
class _Sketch:
    """All that boxes are made from."""

    spec: ModelSpec
    table: Table | None
    steps: Mapping[str, Sequence[Value | Mark]]
    order: Mapping[str, int]
    badges: Mapping[str, Sequence[int]] = field(default_factory=dict)

    def boxes(self, names: Sequence[str], layer: str, followed: str) -> tuple[Box, ...]:
        """The outermost of these modules, which are given in the order of the model, with all that is within."""
        roots = [name for name in names if not any(name.startswith(f"{other}.") for other in names)]
        made = []
        for root in sorted(roots, key=lambda name: self._since(moved(name, layer, followed))):
            inner = [name for name in names if name.startswith(f"{root}.")]
            made.append(self._box(root, layer, followed, self.boxes(inner, layer, followed)))
        return tuple(made)

    def _since(self, name: str) -> int:
        """When a module first did something; after all others where it did nothing."""
        return self.order.get(name, len(self.order))

    def _box(self, name: str, layer: str, followed: str, inner: tuple[Box, ...]) -> Box:
        steps = self.steps.get(moved(name, layer, followed), ())
        marks = [step for step in steps if isinstance(step, Mark)]
        entries = () if self.table is None else self.table.modules.get(name, ())
        own = self.spec.modules[name]
        return Box(
            name=within(name, layer),
            kind=own.type,
            styles=self._styles(name),
            leaves=next((entry.style.leaves for entry in entries if entry.over is not None), ""),
            parameters=tuple(self._parameter(each) for each in own.parameters),
            value=next((step for step in reversed(steps) if isinstance(step, Value)), None),
            forward=_grouped(mark for mark in marks if not mark.backward),
            backward=_grouped(mark for mark in marks if mark.backward),
            badges=tuple(self.badges.get(name, ())),
            inner=inner,
        )

    def _styles(self, name: str) -> tuple[tuple[str, int | None], ...]:
        if self.table is None:
            return ()
        rules = {entry.rule: entry.style.name for entry in self.table.modules.get(name, ())}
        for parameter in self.spec.modules[name].parameters:
            if parameter in self.table.parameters:
                entry = self.table.parameters[parameter]
                rules |= {use.rule: use.style.name for use in entry.uses if use.letter == "S" or len(entry.uses) == 1}
        return tuple((style, rule.line) for rule, style in rules.items())

    def _parameter(self, name: str) -> Shown:
        entry = None if self.table is None else self.table.parameters.get(name)
        short = name.rpartition(".")[2]
        if entry is None:
            return Shown(name=short, shape=str(list(self.spec.parameters[name].shape)))
        return Shown(name=short, shape=str(entry.layout), letters=letters_of(entry))


def _grouped(marks: Iterable[Mark]) -> tuple[Passed, ...]:
    counts: Counter[tuple[str, str]] = Counter()
    sizes: Counter[tuple[str, str]] = Counter()
    for mark in marks:
        counts[mark.op, mark.axis] += 1
        sizes[mark.op, mark.axis] += mark.bytes
    return tuple(Passed(op=op, axis=axis, count=counts[op, axis], bytes=sizes[op, axis]) for op, axis in counts)


def picture_of(report: Report) -> Picture | None:
    """The picture of what a report is about; None where there was no model to draw."""
    if report.spec is None:
        return None
    spec, flow = report.spec, report.flow or Flow(steps=(), times={})
    steps: dict[str, list[Value | Mark]] = {}
    for step in flow.steps:
        steps.setdefault(step.module, []).append(step)
    kinds = kinds_drawn(spec, report.table, flow, steps.keys())
    badges, elsewhere = places_of(report, spec, kinds)
    sketch = _Sketch(spec=spec, table=report.table, steps=steps, order=_order(flow), badges=badges)
    return Picture(parts=tuple(_parts(sketch, kinds)), elsewhere=elsewhere)


def _order(flow: Flow) -> dict[str, int]:
    """Module -> when it, or one within it, first gave something."""
    order: dict[str, int] = {}
    for number, step in enumerate(flow.steps):
        segments = step.module.split(".")
        for stop in range(1, len(segments) + 1):
            order.setdefault(".".join(segments[:stop]), number)
    return order


def _parts(sketch: _Sketch, kinds: Sequence[Kind]) -> list[Part]:
    """The parts in forward order."""
    heads = {kind.layers[0]: kind for kind in kinds}
    around = [name for name in sketch.spec.modules if not layer_of(name) and _is_drawn(sketch, name)]
    places = sorted([*around, *heads], key=_place(sketch, kinds))
    parts: list[Part] = []
    loose: list[str] = []
    for place in (*places, None):
        if place in heads or place is None:
            if loose:
                title = "before the layers" if not any(part.layers for part in parts) else "after the layers"
                boxes = sketch.boxes(loose, "", "")
                parts.append(Part(title=title if heads else "the model", layers=(), boxes=boxes))
                loose = []
        else:
            loose.append(place)
        if place in heads:
            parts.append(_layer_part(sketch, heads[place]))
    return parts


def _place(sketch: _Sketch, kinds: Sequence[Kind]) -> Callable[[str], tuple[int, int]]:
    """The key by which modules and layers stand in forward order; in the model's order where nothing was followed."""
    followed = dict(kind.drawn for kind in kinds)
    index = {name: number for number, name in enumerate(sketch.spec.modules)}
    return lambda name: (sketch.order.get(followed.get(name, name), len(sketch.order)), index.get(name, 0))


def _is_drawn(sketch: _Sketch, name: str) -> bool:
    """Whether a module around the layers is more than a container of others."""
    is_leaf = not any(other.startswith(f"{name}.") or not name for other in sketch.spec.modules if other != name)
    does = any(isinstance(step, Mark) for step in sketch.steps.get(name, ())) or name in sketch.badges
    return bool(sketch.spec.modules[name].parameters) or does or (is_leaf and name in sketch.steps)


def _layer_part(sketch: _Sketch, kind: Kind) -> Part:
    layer, followed = kind.drawn
    names = [name for name in sketch.spec.modules if name == layer or name.startswith(f"{layer}.")]
    names = [name for name in names if _is_told(sketch, name, moved(name, layer, followed))]
    return Part(title=_shared_name(kind.layers), layers=tuple(kind.layers), boxes=sketch.boxes(names, layer, followed))


def _is_told(sketch: _Sketch, name: str, followed: str) -> bool:
    """Whether there is something to say of a module in a layer, or of one within it."""
    own = [each for each in sketch.spec.modules if each == name or each.startswith(f"{name}.")]
    return followed in sketch.order or any(
        sketch.spec.modules[each].parameters or each in sketch.badges for each in own
    )


def _shared_name(layers: Sequence[str]) -> str:
    """`model.layers.*`, or the layer's own name where it is the only one."""
    return layers[0] if len(layers) == 1 else f"{layers[0].rpartition('.')[0]}.*"
