"""A style's cut applied to a shape: parts, units and counts as numbers, and what to do where they do not fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, lru_cache
from typing import Any

from parallel_plans.expressions import ExpressionError, evaluate_size
from parallel_plans.layouts import Split, deal, scaled, split_dim
from parallel_plans.model_spec import ModuleInfo
from parallel_plans.plan import Rule
from parallel_plans.styles import Style
from parallel_plans.table import ParameterEntry


class CannotSplit(Exception):
    """A shape that a style does not fit: the code of the finding, what cannot be split, what was expected, a fix."""

    def __init__(self, code: str, what: str, expected: str | None = None, fix: str | None = None) -> None:
        super().__init__(what)
        self.code, self.what, self.expected, self.fix = code, what, expected, fix


MOST_RANKS = 256  # as many are tried


def sizes_that_do(axis: str, does: Callable[[int], bool]) -> str:
    """What to do, with every number of ranks up to `MOST_RANKS` that was tried and does: `use tp = 1, 2, 4 or 8`."""
    fit = [ranks for ranks in range(1, MOST_RANKS + 1) if does(ranks)]
    if not fit:
        return f"use another style: no {axis} up to {MOST_RANKS} would do"
    if len(fit) == 1:
        return f"use {axis} = {fit[0]}"
    if fit == list(range(1, fit[-1] + 1)):
        return f"use {axis} = {fit[-1]} or fewer"
    runs = [f"{low}" if low == high else f"{low} to {high}" for low, high in _runs(fit)]
    return f"use {axis} = {', '.join(runs[:-1])} or {runs[-1]}"


def _runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """The numbers, in order, with three and more that follow each other as one run.

    >>> _runs([1, 2, 4, 6, 7, 8])
    [(1, 1), (2, 2), (4, 4), (6, 8)]
    """
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return [
        pair for run in runs for pair in ([(run[0], run[-1])] if len(run) > 2 else [(number, number) for number in run])
    ]


@lru_cache(maxsize=1024)
def _split_of(dim: int, axis: str, ranks: int, parts: tuple[int, ...], units: tuple[int, ...]) -> Split:
    """The split of a dim made of these parts: made once for all layers, since each says what every rank holds."""
    return split_dim(dim=dim, size=sum(parts), axis=axis, ranks=ranks, parts=parts, units=units)


@cache
def _sizes_for(axis: str, parts: tuple[int, ...], units: tuple[int, ...]) -> str:
    """The numbers of ranks over which these parts can be dealt in these units, each tried."""

    def does(ranks: int) -> bool:
        try:
            return bool(split_dim(dim=0, size=sum(parts), axis=axis, ranks=ranks, parts=parts, units=units))
        except ValueError:
            return False

    return sizes_that_do(axis, does)


class Geometry:
    """Shapes under one axis of `ranks` ranks, for a model whose config has these `fields`."""

    def __init__(self, fields: Mapping[str, int], axis: str, ranks: int) -> None:
        self.fields, self.axis, self.ranks = fields, axis, ranks

    def size(self, value: Any) -> int:
        """A size option as a number."""
        try:
            return evaluate_size(value, self.fields)
        except ExpressionError as error:
            code = "PP107" if error.missing is not None else "PP201"
            near = ", ".join(sorted(self.fields)) or "no whole numbers at all"
            fix = f"write a number, or one of the config's fields: {near}" if error.missing is not None else None
            raise CannotSplit(code, f"by the size `{value}`: {error}", fix=fix) from None

    def dim(self, shape: Sequence[int], style: Style, options: Mapping[str, object]) -> int | None:
        """The dim along which the style splits a parameter of this shape, counted from 0; None where it does not."""
        dim = style.split_dim(len(shape))
        if dim is None:
            return None
        if "dim" in options and len(shape) > 1:  # a bias has but one
            dim = int(options["dim"])  # type: ignore[call-overload]
        if not -len(shape) <= dim < len(shape):
            raise CannotSplit("PP201", f"dim {dim}", f"a dim between {-len(shape)} and {len(shape) - 1}")
        return dim % len(shape)

    def split(self, shape: Sequence[int], style: Style, options: Mapping[str, object]) -> Split | None:
        """How the style splits a parameter of this shape; None where it leaves it whole.

        Raises:
            CannotSplit: parts, units or dim that the shape does not have, or fewer units than ranks.
        """
        dim = self.dim(shape, style, options)
        if dim is None:
            return None
        options = {**style.defaults, **options}
        parts = self._parts(shape[dim], dim, options.get("parts", 1))
        units = self._units(parts, dim, options.get("unit", 1))
        if options.get("interleaved"):  # the parts lie like the teeth of two combs: one part, dealt in whole rounds
            parts, units = (sum(parts),), (sum(units),)
        for part, unit in zip(parts, units, strict=True):
            if part % unit:
                raise CannotSplit(
                    "PP201", f"dim {dim}", f"{part} a whole number of units of {unit}", "correct the unit"
                )
        for part, unit in zip(parts, units, strict=True):
            if part // unit < self.ranks:
                raise self._too_few(part, unit, dim, style, _sizes_for(self.axis, parts, units))
        if self.ranks == 1:
            return None
        return _split_of(dim, self.axis, self.ranks, parts, units)

    def _parts(self, size: int, dim: int, given: Any) -> tuple[int, ...]:
        if isinstance(given, (list, tuple)):
            parts = tuple(self.size(part) for part in given)
            if sum(parts) != size:
                added = " + ".join(map(str, parts))
                raise CannotSplit("PP201", f"dim {dim}", f"parts that add up to {size}, not {added} = {sum(parts)}")
            return parts
        count = self.size(given)
        if size % count:
            expected = f"{size} divisible into {count} equal parts"
            raise CannotSplit("PP201", f"dim {dim}", expected, "give the parts by size, `parts: [..., ...]`")
        return (size // count,) * count

    def _units(self, parts: tuple[int, ...], dim: int, given: Any) -> tuple[int, ...]:
        if not isinstance(given, (list, tuple)):
            return (self.size(given),) * len(parts)
        units = tuple(self.size(unit) for unit in given)
        if len(units) != len(parts):
            expected = f"one unit, or one for each of the {len(parts)} parts, not {len(units)}"
            raise CannotSplit("PP201", f"dim {dim}", expected)
        return units

    def _too_few(self, part: int, unit: int, dim: int, style: Style, sizes: str) -> CannotSplit:
        count = part // unit
        deals_experts = style.role == "weight"
        things = f"{part} elements" if unit == 1 else f"{count} unit{'s' * (count > 1)} of {unit}"
        things, thing = (f"{count} experts", "expert") if deals_experts else (things, "unit")
        expected = f"at least one {thing} per rank: {things}, {self.axis} = {self.ranks}"
        fix = sizes + ("" if deals_experts else ", or write the block as `replicate`")
        return CannotSplit("PP202", f"dim {dim}", expected, fix)

    def options(self, info: ModuleInfo, style: Style, rule: Rule) -> dict[str, object]:
        """The rule's options with sizes as numbers; counts as the number that each rank gets."""
        options: dict[str, object] = {**style.defaults, **rule.options}
        counts = options.get("counts")
        if isinstance(counts, Mapping):
            options["counts"] = {name: self._local_counts(info, name, unit) for name, unit in counts.items()}
        for name in ("rope", "align_size"):
            if name in options:
                options[name] = self.size(options[name])
        return options

    def _local_counts(self, info: ModuleInfo, name: str, unit: Any) -> tuple[int, ...]:
        where = self.fields if name.startswith("config.") else info.counts
        field = name.removeprefix("config.")
        if field not in where:
            owner = "its config" if name.startswith("config.") else f"the {info.type}"
            raise CannotSplit("PP203", f"{owner} keeps no whole number called {field}", fix="correct the name")
        count, size = where[field], self.size(unit)
        if count % size or count // size < self.ranks:
            raise CannotSplit(
                "PP203",
                f"{name} = {count} cannot be dealt over {self.ranks} ranks",
                f"at least {self.ranks} whole units of {size}",
                f"{_sizes_for(self.axis, (count,), (size,))}, or correct the unit"
                if count % size == 0
                else "correct the unit",
            )
        return tuple(size * share for share in deal(count // size, self.ranks))


def check_rope(rope: Any, own: Sequence[ParameterEntry]) -> None:
    """Raises where the rope part is to be as wide as the whole output of a module, or wider."""
    width = min((entry.info.shape[0] for entry in own), default=None)
    if rope is not None and width is not None and rope >= width:
        expected = f"a rope part of less than the {width} features of the output"
        raise CannotSplit("PP201", f"a rope part of {rope} features cannot be cut off here", expected, "correct `rope`")


def shared_out(split: Split | None, own: Sequence[ParameterEntry]) -> Split:
    """How a layer's outputs are dealt where each rank has the share that it has of the inputs, dealt by `split`.

    Raises:
        CannotSplit: a rank's share of the outputs would be no whole number.
    """
    assert split is not None
    outputs = max(entry.info.shape[0] for entry in own if len(entry.info.shape) > 1)
    if (dealt := scaled(split, outputs)) is None:
        what = f"{outputs} outputs cannot be dealt as the {split.size} inputs are, {split.local_sizes}"
        fix = f"give `unit: {split.size // outputs}`, the inputs for one output" if split.size % outputs == 0 else None
        raise CannotSplit("PP201", what, "for every rank's share of the inputs a whole number of outputs", fix)
    return dealt
