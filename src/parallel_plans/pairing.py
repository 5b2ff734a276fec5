"""Weights that work together must be cut alike: the heads of an attention, the halves of an MLP, an expert's weights.

Which work together is told by names that transformers gives everywhere, and by widths. Where that leaves a doubt,
nothing is said: `verify_plan` looks at what the model computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property

from parallel_plans.accounting import Report
from parallel_plans.geometry import CannotSplit, Geometry, sizes_that_do
from parallel_plans.layouts import Split, merged
from parallel_plans.model_spec import ModelSpec
from parallel_plans.table import ParameterEntry, Table, Use

QUERY = ("q_proj", "q_b_proj", "query", "wq", "q_lin")
KEY = ("k_proj", "v_proj", "kv_b_proj", "key", "value", "wk", "wv", "k_lin", "v_lin")
OUTPUT = ("o_proj", "out_proj", "wo", "dense", "out_lin")


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A weight on the axis of its rule in `tp_plan`, and how it would lie on any number of ranks.

    `tried` keeps what was found for weights like it, so that it is worked out once for all layers.
    """

    name: str
    entry: ParameterEntry
    spec: ModelSpec
    ranks: int
    tried: dict[tuple[object, ...], str] = field(default_factory=dict)

    @property
    def use(self) -> Use:
        """What its rule in `tp_plan` makes of it."""
        return self.entry.uses[0]

    @cached_property
    def split(self) -> Split | None:
        """How it is split; None where every rank has the whole."""
        return self.at(self.ranks) if self.use.letter == "S" else None

    @property
    def is_given_on(self) -> bool:
        """Whether each rank hands on the features that it computes."""
        return self.split is not None and self.use.style.delivers.startswith("S")

    @property
    def parts(self) -> object:
        """What its rule says is fused in it: a number of equal parts, or their sizes."""
        return {**self.use.style.defaults, **self.use.rule.options}.get("parts", 1)

    @property
    def takes_parts(self) -> bool:
        """Whether each rank is given the features that it computes with."""
        return self.split is not None and self.use.style.arrives.startswith("S")

    def at(self, ranks: int, unit: int | None = None) -> Split | None:
        """How it would be split over so many ranks, in other units where they are given.

        Raises:
            CannotSplit: it could not be.
        """
        options = self.use.rule.options if unit is None else {**self.use.rule.options, "unit": unit}
        geometry = Geometry(self.spec.fields_at(self.name), self.use.axis, ranks)
        return geometry.split(self.entry.info.shape, self.use.style, options)

    def sizes(self, holds: Callable[[int], bool], what: object) -> str:
        """The numbers of ranks for which the rule can be resolved and `holds`, in words; `what` names the question."""

        def does(ranks: int) -> bool:
            try:
                return ranks == 1 or (self.at(ranks) is not None and holds(ranks))
            except CannotSplit:
                return False

        question = (what, id(self.use.rule), self.entry.info.shape, id(self.spec.fields_at(self.name)))
        if question not in self.tried:
            self.tried[question] = sizes_that_do(self.use.axis, does)
        return self.tried[question]


def _shares(split: Split) -> list[list[tuple[Fraction, Fraction]]]:
    return [[(Fraction(a, split.size), Fraction(b, split.size)) for a, b in rank] for rank in split.ranges]


def is_in_proportion(one: Split | None, other: Split | None) -> bool:
    """Whether every rank holds the same share of both; none of either counts as the same."""
    if one is None or other is None:
        return one is other
    return _shares(one) == _shares(other)


def pairs_up(wide: Split, narrow: Split) -> bool:
    """Whether every rank's part of a fused dim, two features for one of `narrow`, belongs to its part of that.

    The two may lie one half behind the other, or alternate; a dim of the same width is told of too.
    """
    if wide.size == narrow.size:
        return wide.ranges == narrow.ranges
    size = narrow.size
    halves = tuple(merged([*rank, *((a + size, b + size) for a, b in rank)]) for rank in narrow.ranges)
    alternating = tuple(merged([(2 * a, 2 * b) for a, b in rank]) for rank in narrow.ranges)
    return wide.ranges in (halves, alternating)


class Pairing:
    """The findings about weights that work together and are cut differently.

    Args:
        table: the plan, every rule of which fits by itself.
    """

    def __init__(self, report: Report, table: Table) -> None:
        self.report, self.table, self.spec = report, table, table.spec
        self.tried: dict[tuple[object, ...], str] = {}

    def check(self) -> None:
        """Reports all of them."""
        for module, pieces in self._linears().items():
            query = [piece for last, piece in pieces.items() if last in QUERY]
            key = [piece for last, piece in pieces.items() if last in KEY]
            if query and key:
                output = [piece for last, piece in pieces.items() if last in OUTPUT]
                Attention(self.report, self.spec, module, query[-1], key, output, self._counts(module)).check()
            else:
                self._check_widths(list(pieces.values()))
        for wide, narrow in self._stacks():
            self._check_experts(wide, narrow)

    def _piece(self, name: str) -> Piece:
        entry = self.table.parameters[name]
        ranks = self.table.sizes[entry.uses[0].axis]
        return Piece(name=name, entry=entry, spec=self.spec, ranks=ranks, tried=self.tried)

    def _linears(self) -> dict[str, dict[str, Piece]]:
        """Module -> the last segment of each linear layer directly in it -> its weight, where the axis has ranks."""
        found: dict[str, dict[str, Piece]] = {}
        for name, module in self.spec.modules.items():
            weight = f"{name}.weight"
            if module.kind == "linear":
                parent, _, last = name.rpartition(".")
                piece = self._piece(weight)
                if piece.ranks > 1:
                    found.setdefault(parent, {})[last] = piece
        return found

    def _counts(self, module: str) -> bool:
        return any("counts" in entry.options for entry in self.table.modules.get(module, ()))

    def _check_widths(self, pieces: Sequence[Piece]) -> None:
        """Within one module, features that are handed on in parts and taken in parts are the same ones.

        They are told by their number, or by twice that where a rule says that two parts are fused.
        """
        for taker in pieces:
            for giver in pieces:
                one, other = giver.split, taker.split
                if not giver.is_given_on or not taker.takes_parts or one is None or other is None:
                    continue
                is_fused = one.size == 2 * other.size and giver.parts == 2
                if (one.size == other.size or is_fused) and not pairs_up(one, other):
                    self._differ(giver, taker, pairs_up)
                    break  # what differs from one differs from the others

    def _differ(self, one: Piece, other: Piece, fit: Callable[[Split, Split], bool]) -> None:
        def holds(ranks: int) -> bool:
            splits = one.at(ranks), other.at(ranks)
            return splits[0] is not None and splits[1] is not None and fit(splits[0], splits[1])

        self._tell(
            other,
            f"{other.use.rule.style} gives a rank other features here than {one.use.rule.style} does in {one.name}",
            expected=f"the same features on a rank as in {one.entry.layout} of {one.name}",
            fix=f"give both the same `unit`, or {one.sizes(holds, 'width')}",
        )

    def _tell(self, piece: Piece, message: str, *, expected: str, fix: str, code: str = "PP204") -> None:
        found = str(piece.entry.layout)
        self.report.add(
            code, message, piece.use.rule, level="geometry", name=piece.name, found=found, expected=expected, fix=fix
        )

    def _stacks(self) -> Iterator[tuple[Piece, Piece]]:
        """The two weights of each module of experts, the wider first: gate and up projection fused, and the down."""
        for module in self.spec.modules.values():
            names = [name for name in module.parameters if len(self.spec.parameters[name].shape) == 3]
            if module.kind != "other" or len(names) != 2:
                continue
            one, other = sorted(map(self._piece, names), key=lambda piece: -piece.entry.info.bytes)
            if one.ranks > 1 and one.entry.info.shape[0] == other.entry.info.shape[0]:
                yield one, other

    def _check_experts(self, wide: Piece, narrow: Piece) -> None:
        """Fused gate and up, `[experts, 2*ffn, hidden]` or transposed, and down are both split along ffn, and alike."""
        if (inner := _inner(wide, narrow)) is None or (wide.split is None and narrow.split is None):
            return
        for piece, other, size in ((wide, narrow, 2 * inner), (narrow, wide, inner)):
            if piece.split is None:
                self._tell(
                    piece,
                    f"{piece.use.rule.style} leaves this weight of the experts whole, and {other.name} is split",
                    expected=f"the dim of {size} split over {piece.use.axis}",
                    fix="write a style that splits it, or `replicate` for all weights of the experts",
                )
                return
            if piece.split.size != size:
                dim = next(dim for dim in (1, 2) if piece.entry.info.shape[dim] == size) - 3
                self._tell(
                    piece,
                    f"{piece.use.rule.style} splits dim {piece.split.dim} of {piece.split.size}, which is that of the "
                    "tokens' own features, and these are whole",
                    expected=f"the dim of {size} split over {piece.use.axis}",
                    fix=f"write `dim: {dim}`",
                    code="PP206",
                )
                return
        assert wide.split is not None
        assert narrow.split is not None
        if not pairs_up(wide.split, narrow.split):
            self._differ(wide, narrow, pairs_up)


def _inner(wide: Piece, narrow: Piece) -> int | None:
    """An expert's own features: the dim that is twice as wide where gate and up are fused; None where none is sure."""
    one, other = wide.entry.info.shape[1:], narrow.entry.info.shape[1:]
    readings = {
        other[j] for i in (0, 1) for j in (0, 1) if one[i] == 2 * other[j] and one[1 - i] == other[1 - j]
    }  # fmt: skip
    return readings.pop() if len(readings) == 1 else None


class Attention:
    """One attention: its query, what goes with it, and the heads that a rank must have whole.

    Args:
        key: the projections of keys and values; `output` may be none.
        has_counts: whether the plan sets numbers of the module, of heads for instance.
    """

    def __init__(
        self,
        report: Report,
        spec: ModelSpec,
        module: str,
        query: Piece,
        key: Sequence[Piece],
        output: Sequence[Piece],
        has_counts: bool,
    ) -> None:
        self.report, self.query, self.key, self.output, self.has_counts = report, query, key, output, has_counts
        fields, counts = spec.fields_at(query.name), spec.modules[module].counts
        self.heads = fields.get("num_attention_heads", 0)
        self.groups = fields.get("num_key_value_heads", 0)
        self.width = counts.get("head_dim")

    def check(self) -> None:
        """Reports heads that a rank has in part, and ranks that have other heads of one than of another."""
        if not self._is_understood():
            return
        for piece in self.key:
            if piece.is_given_on != self.query.is_given_on:
                self._check_whole(piece)
        pieces = [piece for piece in (self.query, *self.key) if piece.is_given_on]
        pieces += [piece for piece in self.output if piece.takes_parts and self.query.is_given_on]
        sound = [piece for piece in pieces if self._has_whole_heads(piece)]
        if len(sound) == len(pieces) and any(piece in self.key for piece in pieces):
            self._check_shares(pieces)

    def _is_understood(self) -> bool:
        """Whether the widths are what the config's numbers of heads make of them."""
        if not self.heads or not self.groups or self.heads % self.groups:
            return False
        outputs = [piece.entry.info.shape[1] % self.heads for piece in self.output]
        if self.query.entry.info.shape[0] % self.heads or any(outputs):
            return False
        widths = [divmod(piece.entry.info.shape[0], self.groups) for piece in self.key]
        return all(rest == 0 and self.width in (None, width) for width, rest in widths)

    def _head(self, piece: Piece) -> tuple[int, int]:
        """How many heads the weight is made of, and the features of one."""
        dim = 1 if piece in self.output else 0
        heads = self.groups if piece in self.key else self.heads
        return heads, piece.entry.info.shape[dim] // heads

    def _has_whole_heads(self, piece: Piece) -> bool:
        heads, width = self._head(piece)
        if piece.split is None or is_cut_at(piece.split, width):
            return True

        def holds(ranks: int) -> bool:
            split = piece.at(ranks)
            return split is not None and is_cut_at(split, width)

        self._tell(
            piece,
            "PP205",
            f"{piece.use.rule.style} cuts a head in two",
            expected=f"whole heads of {width} on every rank: {heads} heads, {piece.use.axis} = {piece.ranks}",
            fix=self._in_units(piece, holds, "head"),
        )
        return False

    def _unit(self, piece: Piece) -> int:
        """The features that go with one key/value head."""
        heads, width = self._head(piece)
        return width * heads // self.groups

    def _in_units(self, piece: Piece, holds: Callable[[int], bool], what: object) -> str:
        """What would do: units, where there are as many key/value heads as ranks, and other numbers of ranks."""
        unit = self._unit(piece)
        try:
            piece.at(piece.ranks, unit)
        except CannotSplit:
            return piece.sizes(holds, what)
        return f"give `unit: {unit}`, what goes with one key/value head, or {piece.sizes(holds, what)}"

    def _check_shares(self, pieces: Sequence[Piece]) -> None:
        model = next(piece for piece in pieces if piece in self.key)
        for piece in pieces:
            if is_in_proportion(piece.split, model.split):
                continue

            def holds(ranks: int, piece: Piece = piece) -> bool:
                return is_in_proportion(piece.at(ranks), model.at(ranks))

            style = model.use.rule.style
            self._tell(
                piece,
                "PP204",
                f"{piece.use.rule.style} gives a rank other heads here than {style} does in {model.name}",
                expected=f"the heads that go with those of {model.entry.layout} of {model.name}",
                fix=self._in_units(piece, holds, "share"),
            )

    def _check_whole(self, piece: Piece) -> None:
        """Keys whole beside queries in parts, or the reverse: each rank would pair its heads with the wrong ones.

        One key/value head serves all queries, and a plan that sets numbers of the module may have seen to it.
        """
        if self.groups == 1 or self.has_counts or not (piece.is_given_on or self.query.is_given_on):
            return
        whole, parts = (self.query, piece) if piece.is_given_on else (piece, self.query)
        style, unit = parts.use.rule.style, self._unit(whole)
        fix = f"split it too, `{{style: {style}, unit: {unit}}}`, or write the whole block as `replicate`"
        self._tell(
            whole,
            "PP204",
            f"{whole.use.rule.style} gives every rank all heads here, and {style} a part of them in {parts.name}",
            expected=f"on every rank the heads that go with its own of {parts.entry.layout}",
            fix=fix if self.groups >= whole.ranks else "write the whole block as `replicate`",
        )

    def _tell(self, piece: Piece, code: str, message: str, *, expected: str, fix: str) -> None:
        found = str(piece.entry.layout)
        self.report.add(
            code, message, piece.use.rule, level="geometry", name=piece.name, found=found, expected=expected, fix=fix
        )


def is_cut_at(split: Split, width: int) -> bool:
    """Whether every cut is at a multiple of `width`, or at the end of the dim."""
    cuts = {cut for rank in split.ranges for piece in rank for cut in piece}
    return all(cut % width == 0 for cut in cuts - {split.size})
