"""Queries, keys and values in one weight: which heads a rank gets of it.

They lie one after the other, or with each key/value head the queries that go with it, and its value. Two queries
for each of two key/value heads:

    one after the other    q0 q1 q2 q3 k0 k1 v0 v1
    by key/value head      q0 q1 k0 v0 q2 q3 k1 v1

A rule that knows of no parts can be right for the second only, one that gives three parts for the first only; in both
every cut is at the end of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from parallel_plans.accounting import Report
from parallel_plans.dealing import Range
from parallel_plans.layouts import Split, merged, split_dim
from parallel_plans.model_spec import ModelSpec
from parallel_plans.pieces import Piece, is_cut_at

FUSED = ("qkv_proj", "query_key_value", "Wqkv", "wqkv", "qkv", "c_attn", "qkv_linear")


@dataclass(frozen=True, kw_only=True)
class FusedHeads:
    """A weight with so many heads of queries, so many of keys and of values, each of `width` features."""

    piece: Piece
    heads: int
    groups: int
    width: int

    @property
    def unit(self) -> int:
        """The features of a key/value head with its queries and its value."""
        return self.width * (self.heads // self.groups + 2)

    @property
    def parts(self) -> tuple[int, int, int]:
        """The features of all queries, of all keys, of all values."""
        return self.heads * self.width, self.groups * self.width, self.groups * self.width

    def has_whole_heads(self, split: Split) -> bool:
        """Whether no head is cut in two."""
        return is_cut_at(split, self.width)

    def is_together(self, split: Split) -> bool:
        """Whether every rank has the queries that go with its keys and values, in one of the two orders."""
        return self.has_whole_heads(split) and (is_cut_at(split, self.unit) or self._shares_alike(split))

    def _shares_alike(self, split: Split) -> bool:
        begin, shares = 0, []
        for size in self.parts:
            shares.append(list(_heads(split, begin, begin + size, size // self.groups)))
            begin += size
        return shares[0] == shares[1] == shares[2]


def _heads(split: Split, begin: int, end: int, unit: int) -> Iterator[tuple[Range, ...]]:
    """For each rank, of which key/value heads it has anything in a stretch of the dim with `unit` elements of each."""
    for ranges in split.ranges:
        own = [(max(start, begin), min(stop, end)) for start, stop in ranges if start < end and begin < stop]
        yield merged([((a - begin) // unit, -((begin - b) // unit)) for a, b in own])


def fused_heads(piece: Piece, spec: ModelSpec) -> FusedHeads | None:
    """The heads of a weight, where its name says that it is fused and its width is what the model's numbers make."""
    owner, _, _ = piece.name.rpartition(".")
    parent, _, last = owner.rpartition(".")
    if last not in FUSED or spec.modules[owner].kind != "linear" or spec.modules[owner].is_transposed:
        return None
    fields, counts = spec.fields_at(piece.name), spec.modules[parent].counts
    heads = counts.get("num_heads") or fields.get("num_attention_heads", 0)
    groups = counts.get("num_key_value_heads") or fields.get("num_key_value_heads", 0)
    width = counts.get("head_dim") or fields.get("head_dim", 0)
    if not width or groups < 2 or heads % groups or piece.entry.info.shape[0] != (heads + 2 * groups) * width:
        return None  # one key/value head serves all queries, and a plan may leave it whole in its own way
    return FusedHeads(piece=piece, heads=heads, groups=groups, width=width)


def check_fused_heads(report: Report, piece: Piece) -> None:
    """Reports heads that a rank has in part, and queries that it has without their keys and values."""
    found, split = fused_heads(piece, piece.spec), piece.split
    if found is None or split is None or split.dim != 0 or not piece.is_given_on:
        return
    style = piece.use.rule.style
    if not found.has_whole_heads(split):
        expected = f"whole heads of {found.width} on every rank: {found.heads} of queries, {found.groups} of keys"
        _tell(report, found, "PP205", f"{style} cuts a head in two", expected, found.has_whole_heads)
    elif not found.is_together(split):
        expected = f"with every key/value head its value and its {found.heads // found.groups} of {found.heads} queries"
        message = f"{style} gives a rank queries without their keys and values here"
        _tell(report, found, "PP204", message, expected, found.is_together)


def _tell(
    report: Report, found: FusedHeads, code: str, message: str, expected: str, suits: Callable[[Split], bool]
) -> None:
    piece = found.piece

    def holds(ranks: int) -> bool:
        split = piece.at(ranks)
        return split is not None and suits(split)

    report.add(
        code,
        message,
        piece.use.rule,
        level="geometry",
        name=piece.name,
        found=str(piece.entry.layout),
        expected=f"{expected}, {piece.use.axis} = {piece.ranks}",
        fix=_with_unit(found, piece.sizes(holds, code)),
    )


def _with_unit(found: FusedHeads, sizes: str) -> str:
    """What would do: units, which were tried, for the order that the rule has in mind, or other numbers of ranks."""
    piece, units = found.piece, [found.width * (found.heads // found.groups), found.width, found.width]
    by_head = f"`unit: {found.unit}`, what goes with one key/value head"
    in_parts = f"`parts: {list(found.parts)}, unit: {units}`"
    tried: list[tuple[str, Sequence[int], Sequence[int]]]
    if piece.parts != 1:
        tried = [(in_parts, found.parts, units)]
    else:
        in_parts = f"{in_parts} with `packed_colwise` where they lie one after the other"
        tried = [(by_head, (sum(found.parts),), [found.unit]), (in_parts, found.parts, units)]
    fitting = [told for told, parts, each in tried if _fits(found, parts, each)]
    return f"give {', or '.join([*fitting, sizes])}" if fitting else sizes


def _fits(found: FusedHeads, parts: Sequence[int], units: Sequence[int]) -> bool:
    piece = found.piece
    try:
        split = split_dim(
            dim=0, size=sum(parts), axis=piece.use.axis, ranks=piece.ranks, parts=tuple(parts), units=tuple(units)
        )
    except ValueError:
        return False
    return found.is_together(split)
