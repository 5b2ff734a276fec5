"""A style's cut applied to a shape: parts, units and counts as numbers, and what to do where they do not fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, lru_cache
from typing import Any

from parallel_plans.dealing import WHOLE, Part
from parallel_plans.expressions import ExpressionError, evaluate_size
from parallel_plans.layouts import Split, scaled, split_dim
from parallel_plans.model_spec import ModelSpec, ModuleInfo
from parallel_plans.plan import Rule
from parallel_plans.styles import Style
from parallel_plans.styles.buffers import SplitBuffer
from parallel_plans.styles.draws import SplitDraws
from parallel_plans.styles.inputs import SplitInput
from parallel_plans.styles.statistics import groups_of
from parallel_plans.table import ParameterEntry


class CannotSplit(Exception):
    """A shape that a style does not fit: the code of the finding, what cannot be split, what was expected, a fix."""

    def __init__(self, code: str, what: str, expected: str | None = None, fix: str | None = None) -> None:
        super().__init__(what)
        self.code, self.what, self.expected, self.fix = code, what, expected, fix


MOST_RANKS = 256  # as many are tried
SIZE = "size"  # in the expression of a unit: what is dealt in such units


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


Parts = tuple[Part, ...]
Proportions = tuple[int, ...]


@lru_cache(maxsize=1024)
def _split_of(dim: int, axis: str, ranks: int, parts: Parts, proportions: Proportions | None = None) -> Split:
    """The split of a dim made of these parts: made once for all layers, since each says what every rank holds."""
    sizes, units, shares = zip(*((part.size, part.unit, part.share) for part in parts), strict=True)
    return split_dim(
        dim=dim,
        size=sum(sizes),
        axis=axis,
        ranks=ranks,
        parts=sizes,
        units=units,
        shares=shares,
        proportions=proportions,
    )


@cache
def _sizes_for(axis: str, parts: Parts) -> str:
    """The numbers of ranks over which these parts can be dealt in these units, each tried."""

    def does(ranks: int) -> bool:
        try:
            return bool(_split_of(0, axis, ranks, parts))
        except ValueError:
            return False

    return sizes_that_do(axis, does)


def _can_be_dealt(part: Part, ranks: int) -> bool:
    try:
        return bool(part.ranges(ranks))
    except ValueError:
        return False


class Geometry:
    """Shapes under one axis of `ranks` ranks, for a model whose config has these `fields`.

    `proportions` say how much each rank gets, where it is not alike; they are idle on another number of ranks.
    `is_transposed`: the weight is that of a linear layer, and `[in, out]`.
    """

    def __init__(
        self,
        fields: Mapping[str, int],
        axis: str,
        ranks: int,
        proportions: Proportions | None = None,
        *,
        is_transposed: bool = False,
    ) -> None:
        self.fields, self.axis, self.ranks, self.is_transposed = fields, axis, ranks, is_transposed
        self.proportions = proportions if proportions is not None and len(proportions) == ranks else None

    @classmethod
    def at(cls, spec: ModelSpec, name: str, axis: str, ranks: int, proportions: Proportions | None = None) -> Geometry:
        """Shapes of what stands at `name`, where a layer may have sizes of its own."""
        is_transposed = name in spec.parameters and spec.is_transposed(name)
        return cls(spec.fields_at(name), axis, ranks, proportions, is_transposed=is_transposed)

    def size(self, value: Any, least: int = 1, of: int | None = None) -> int:
        """A size option as a number; in one that says how `of` elements are dealt, these are called `size`."""
        try:
            return evaluate_size(value, self.fields if of is None else {**self.fields, SIZE: of}, least)
        except ExpressionError as error:
            code = "PP107" if error.missing is not None else "PP201"
            near = ", ".join(sorted(_whole_numbers(self.fields))) or "no whole numbers at all"
            fix = f"write a number, or one of the config's fields: {near}" if error.missing is not None else None
            raise CannotSplit(code, f"by the size `{value}`: {error}", fix=fix) from None

    def dim(self, shape: Sequence[int], style: Style, options: Mapping[str, object]) -> int | None:
        """The dim along which the style splits a parameter of this shape, counted from 0; None where it does not."""
        dim = style.split_dim(len(shape))
        if dim is None:
            return None
        if "dim" in options and len(shape) > 1:  # a bias has but one
            dim = int(options["dim"])  # type: ignore[call-overload]
        elif self.is_transposed and len(shape) == 2 and dim < 0:
            dim = -3 - dim
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
        parts = self.parts(shape[dim], dim, {**style.defaults, **options})
        for part in parts:
            self._check(part, parts, dim, style)
        if self.ranks == 1:
            return None
        return _split_of(dim, self.axis, self.ranks, parts, self.proportions)

    def parts(self, size: int, dim: int, options: Mapping[str, Any]) -> Parts:
        """The parts of a dim of this size that are dealt on their own; `options` are with the style's defaults.

        Those that a config does not have, which are of no size, are left out.
        """
        sizes = self._parts(size, dim, options.get("parts", 1))
        units = self._units(sizes, dim, options.get("unit", 1))
        shares = self._shares(units, dim, options.get("shared", False))
        if options.get("interleaved"):  # the parts lie like the teeth of two combs: one part, dealt in whole rounds
            sizes, units, shares = (sum(sizes),), (sum(units),), (None,)
        made = zip(sizes, units, shares, strict=True)
        return tuple(Part(size=size, unit=unit, share=share) for size, unit, share in made if size)

    def _check(self, part: Part, parts: Parts, dim: int, style: Style) -> None:
        if part.size % part.unit:
            expected = f"{part.size} a whole number of units of {part.unit}"
            raise CannotSplit("PP201", f"dim {dim}", expected, "correct the unit")
        if not part.has_whole_shares(self.ranks):
            expected = f"a unit of {part.unit} a whole number of shares of {part.share}"
            raise CannotSplit("PP201", f"dim {dim}", expected, "correct `shared`")
        if part.most_ranks is not None and part.most_ranks < self.ranks:
            raise self._too_few(part, dim, style, _sizes_for(self.axis, parts))

    def _parts(self, size: int, dim: int, given: Any) -> tuple[int, ...]:
        if isinstance(given, (list, tuple)):
            parts = tuple(self.size(part, least=0) for part in given)
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
            given = (given,) * len(parts)
        if len(given) != len(parts):
            expected = f"one unit, or one for each of the {len(parts)} parts, not {len(given)}"
            raise CannotSplit("PP201", f"dim {dim}", expected)
        return tuple(self.size(unit, of=part) if part else 1 for unit, part in zip(given, parts, strict=True))

    def _shares(self, units: Sequence[int], dim: int, given: Any) -> tuple[int | None, ...]:
        """For each part, what ranks that share a unit have of it (see `Part`)."""
        each = given if isinstance(given, (list, tuple)) else (given,) * len(units)
        if len(each) != len(units):
            expected = f"one value of `shared`, or one for each of the {len(units)} parts, not {len(each)}"
            raise CannotSplit("PP201", f"dim {dim}", expected)
        flags = {True: WHOLE, False: None}
        return tuple(flags[one] if isinstance(one, bool) else self.size(one) for one in each)

    def _too_few(self, part: Part, dim: int, style: Style, sizes: str) -> CannotSplit:
        unit, count = part.share or part.unit, part.most_ranks
        assert count is not None
        deals_experts = style.role == "weight"
        things = f"{part.size} elements" if unit == 1 else f"{count} unit{'s' * (count > 1)} of {unit}"
        things, thing = (f"{count} experts", "expert") if deals_experts else (things, "unit")
        expected = f"at least one {thing} per rank: {things}, {self.axis} = {self.ranks}"
        fix = sizes + ("" if deals_experts else ", or write the block as `replicate`")
        return CannotSplit("PP202", f"dim {dim}", expected, fix)

    def options(self, info: ModuleInfo, style: Style, rule: Rule) -> dict[str, object]:
        """The rule's options with sizes as numbers; counts as the number that each rank gets."""
        options: dict[str, object] = {**style.defaults, **rule.options}
        counts = options.get("counts")
        if isinstance(counts, Mapping):
            kept = {name: given for name, given in counts.items() if not rule.optional or self._keeps(info, name)}
            options["counts"] = {name: self._local_counts(info, name, given) for name, given in kept.items()}
        inputs = options.get("inputs")
        if isinstance(inputs, Mapping):
            options["inputs"] = {name: self._input(info, name, given) for name, given in inputs.items()}
        if isinstance(draws := options.get("draws"), Mapping):
            split = self._given("the size of what is drawn", draws)
            options["draws"] = SplitDraws(dim=int(draws["dim"]), split=split)
        for name in ("rope", "align_size", "groups"):
            if name in options:
                options[name] = self.size(options[name])
        return options

    def buffer(self, name: str, shape: Sequence[int], given: Mapping[str, Any], style: Style) -> SplitBuffer:
        """How each part of a buffer of this shape is split."""
        dim = int(given["dim"])
        if not -len(shape) <= dim < len(shape):
            expected = f"a dim between {-len(shape)} and {len(shape) - 1}"
            raise CannotSplit("PP201", f"dim {dim} of the buffer {name}", expected)
        dim %= len(shape)
        parts = self.parts(shape[dim], dim, given)
        for part in parts:
            self._check(part, parts, dim, style)
        splits = tuple(_split_of(dim, self.axis, self.ranks, (part,), self.proportions) for part in parts)
        return SplitBuffer(name=name, dim=dim, parts=splits)

    def _keeps(self, info: ModuleInfo, name: str) -> bool:
        return name.startswith("config.") or name in info.counts

    def _local_counts(self, info: ModuleInfo, name: str, given: Any) -> tuple[int, ...]:
        """What every rank has of a number that the module keeps, or that each of so many things has of its own."""
        where = _whole_numbers(self.fields) if name.startswith("config.") else info.counts
        field = name.removeprefix("config.")
        if field not in where:
            owner = "its config" if name.startswith("config.") else f"the {info.type}"
            raise CannotSplit("PP203", f"{owner} keeps no whole number called {field}", fix="correct the name")
        more = given if isinstance(given, Mapping) else {"unit": given}
        count = where[field]
        if count < 1:
            raise CannotSplit("PP203", f"{name} = {count} cannot be dealt", "at least 1", "correct the config")
        if "each" in more:
            own = self.size(more.get("unit", 1), of=count)
            parts: Parts = (Part(size=count * self.size(more["each"]), unit=count, share=own),)
        else:
            parts = self._count_parts(name, count, more)
        try:
            ranges = [part.ranges(self.ranks, self.proportions) for part in parts]
        except ValueError:
            raise self._undealt(name, count, parts) from None
        if "each" in more and self.ranks <= parts[0].size // parts[0].unit:
            return (count,) * self.ranks  # whole things on every rank, each with all that it has
        return tuple(sum(stop - start for start, stop in held) for held in zip(*ranges, strict=True))

    def _count_parts(self, name: str, count: int, given: Mapping[str, Any]) -> Parts:
        try:
            return self.parts(count, 0, given)
        except CannotSplit as problem:
            code = "PP203" if problem.code == "PP201" else problem.code
            what = f"{name} = {count}" if problem.what == "dim 0" else problem.what
            raise CannotSplit(code, what, problem.expected, problem.fix) from None

    def _undealt(self, name: str, count: int, parts: Parts) -> CannotSplit:
        part = next(part for part in parts if not _can_be_dealt(part, self.ranks))
        unit = part.share or part.unit
        told = f"{name} = {count}" if count >= part.size else f"{name} = {count} for each of {part.size // count}"
        divides = part.size % unit == 0 and part.unit % unit == 0
        fix = f"{_sizes_for(self.axis, parts)}, or correct the unit" if divides else "correct the unit"
        expected = f"at least {self.ranks} whole units of {unit}"
        return CannotSplit("PP203", f"{told} cannot be dealt over {self.ranks} ranks", expected, fix)

    def _input(self, info: ModuleInfo, name: str, given: Mapping[str, Any]) -> SplitInput:
        if name not in info.inputs:
            fix = f"name one of {', '.join(info.inputs)}" if info.inputs else "remove the rule"
            raise CannotSplit("PP203", f"the forward of {info.type} takes no input called {name}", fix=fix)
        split = self._given(f"the size of the input {name}", given)
        return SplitInput(name=name, place=info.inputs.index(name), dim=int(given["dim"]), split=split)

    def _given(self, what: str, given: Mapping[str, Any]) -> Split:
        """How something of the size that an option gives is split."""
        unit, size = self.size(given.get("unit", 1)), self.size(given["size"])
        (share,) = self._shares((unit,), 0, given.get("shared", False))
        part = Part(size=size, unit=unit, share=share)
        try:
            return _split_of(0, self.axis, self.ranks, (part,), self.proportions)
        except ValueError:
            raise self._undealt(what, size, (part,)) from None


def _whole_numbers(fields: Mapping[str, int]) -> dict[str, int]:
    return {name: value for name, value in fields.items() if not isinstance(value, bool)}


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


def check_groups(groups: Any, split: Split | None) -> None:
    """Raises where features are normalized in groups, and a rank has of one more than of another."""
    if groups is None or split is None:
        return
    if split.size % groups:
        expected = f"{split.size} divisible into {groups} groups"
        raise CannotSplit("PP201", f"dim {split.dim} in groups", expected, "correct `groups`")
    for rank in range(split.ranks):
        widths = set(groups_of(split, rank, groups).values())
        if len(widths) > 1:
            expected = f"whole groups of {split.size // groups} on each rank, or parts of one group"
            fix = f"write `unit: {split.size // groups}`, and `shared` where there are fewer groups than ranks"
            raise CannotSplit("PP201", f"dim {split.dim} in groups", expected, fix)
