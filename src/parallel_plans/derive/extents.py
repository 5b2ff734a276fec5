"""What the dims of tensors are made of, learned from how they meet: factors, parts, and which are the same thing.

A linear layer gives 4096 features; a view makes 8 groups of 4 heads of 128 of them, and a repetition of keys says that
the 8 are those of another layer's 1024. Nothing says so beforehand, so a dim begins as one extent of its size, is cut
into factors (a view) or parts (a slice, a `cat`) when that is seen, and is joined with what it meets in a product:

    q_proj, dim 0    4096 = 8 * 4 * 128
    k_proj, dim 0    1024 = 8 * 128                the same 8 and 128: split the 8, and whole groups stay together
    qkv_proj, dim 0  6144 = 8*4*128 + 8*128 + 8*128

A cut is seen by all that share the extent. What is noted of an extent (`marks`) holds for everything it is made of.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence

PRODUCT, SUM = "product", "sum"


class Clash(Exception):
    """Two ways to see one dim that fit into no common one."""


class Extent:
    """A dim of so many elements, or what a dim is made of: the first factor is the outermost, parts lie in order."""

    __slots__ = ("form", "marks", "pieces", "same_as", "size")

    def __init__(self, size: int, form: str | None = None, pieces: Sequence[Extent] = ()) -> None:
        self.size, self.form, self.pieces = size, form, tuple(pieces)
        self.same_as: Extent | None = None
        self.marks: set[Hashable] = set()

    def __repr__(self) -> str:
        me = found(self)
        sign = {PRODUCT: "*", SUM: "+"}.get(me.form or "", "")
        return f"({sign.join(map(repr, me.pieces))})" if me.form else str(me.size)


def found(extent: Extent) -> Extent:
    """The extent that stands for all that were joined with this one."""
    while extent.same_as is not None:
        if extent.same_as.same_as is not None:
            extent.same_as = extent.same_as.same_as
        extent = extent.same_as
    return extent


def leaves(extent: Extent) -> Iterator[Extent]:
    """What it is made of in the end, more than once what is there more than once."""
    extent = found(extent)
    if extent.form is None:
        yield extent
    for piece in extent.pieces:
        yield from leaves(piece)


def mark(extent: Extent, what: Hashable) -> None:
    """Notes something of all that an extent is made of."""
    for leaf in leaves(extent):
        leaf.marks.add(what)


def made_of(form: str, pieces: Sequence[Extent]) -> Extent:
    """The extent of factors, or of parts, those that say nothing left out."""
    nothing = 1 if form == PRODUCT else 0
    left = [found(piece) for piece in pieces if piece.size != nothing]
    if len(left) == 1:
        return left[0]
    size = math.prod(piece.size for piece in left) if form == PRODUCT else sum(piece.size for piece in left)
    return Extent(size, form if left else None, left)


def _become(extent: Extent, form: str, pieces: Sequence[Extent]) -> None:
    """A leaf is seen to have pieces."""
    assert extent.form is None
    extent.form, extent.pieces = form, tuple(pieces)
    for what in extent.marks:
        mark(extent, what)


def _flat(extent: Extent, form: str) -> list[Extent]:
    """Its factors, or its parts; itself alone where it has none."""
    extent = found(extent)
    if extent.form != form:
        return [extent]
    return [each for piece in extent.pieces for each in _flat(piece, form)]


def factors(extent: Extent) -> list[Extent]:
    """Its factors, outermost first."""
    return _flat(extent, PRODUCT)


def outer_and_inner(extent: Extent, outer: int) -> tuple[Extent, Extent]:
    """The extent as a product whose outer factor has this size.

    Raises:
        Clash: it is known to be made of something else.
    """
    extent = found(extent)
    if outer == 1 or outer == extent.size:
        return (Extent(1), extent) if outer == 1 else (extent, Extent(1))
    if extent.size % outer:
        raise Clash
    if extent.form is None:
        _become(extent, PRODUCT, (Extent(outer), Extent(extent.size // outer)))
    if extent.form == SUM:
        _factor_out(extent, extent.size // outer)
    return _cut(factors(extent), outer, lambda each: each.size, outer_and_inner, PRODUCT, 1)


def first_and_rest(extent: Extent, first: int) -> tuple[Extent, Extent]:
    """The extent as two parts, the first of this size.

    Raises:
        Clash: it is known to be made of something else.
    """
    extent = found(extent)
    if first in (0, extent.size):
        return (Extent(0), extent) if first == 0 else (extent, Extent(0))
    if extent.form is None:
        _become(extent, SUM, (Extent(first), Extent(extent.size - first)))
    if extent.form == PRODUCT:
        outer, *inner = factors(extent)
        size = extent.size // outer.size
        if first % size:
            raise Clash
        one, other = first_and_rest(outer, first // size)
        return made_of(PRODUCT, [one, *inner]), made_of(PRODUCT, [other, *inner])
    return _cut(_flat(extent, SUM), first, lambda each: each.size, first_and_rest, SUM, 0)


def _cut(
    pieces: Sequence[Extent],
    wanted: int,
    size_of: Callable[[Extent], int],
    cut: Callable[[Extent, int], tuple[Extent, Extent]],
    form: str,
    nothing: int,
) -> tuple[Extent, Extent]:
    """Pieces in two, the first of them of the size that is wanted, one of them cut where that lies within it."""
    ahead: list[Extent] = []
    reached = nothing
    for at, piece in enumerate(pieces):
        if reached == wanted:
            return made_of(form, ahead), made_of(form, pieces[at:])
        size = size_of(piece)
        after = reached * size if form == PRODUCT else reached + size
        if after > wanted:
            if form == PRODUCT and wanted % reached:
                raise Clash
            one, other = cut(piece, wanted // reached if form == PRODUCT else wanted - reached)
            return made_of(form, [*ahead, one]), made_of(form, [other, *pieces[at + 1 :]])
        ahead.append(piece)
        reached = after
    if reached != wanted:
        raise Clash
    return made_of(form, ahead), Extent(nothing)


def _factor_out(extent: Extent, inner: int) -> None:
    """A sum of parts becomes a product: heads of queries and keys, one behind the other, times what a head has."""
    parts = _flat(extent, SUM)
    if any(part.size % inner for part in parts):
        raise Clash
    cut = [outer_and_inner(part, part.size // inner) for part in parts]
    for _, other in cut[1:]:
        _join(cut[0][1], other)
    extent.form, extent.pieces = PRODUCT, (made_of(SUM, [outer for outer, _ in cut]), cut[0][1])


def join(one: Extent, other: Extent) -> bool:
    """Makes two extents the same; False where they are seen in ways that do not fit, which nothing can be said of."""
    try:
        _join(one, other)
    except Clash:
        for extent in (one, other):
            mark(extent, ("bound", "", "is viewed in two ways that do not fit"))
        return False
    return True


def _join(one: Extent, other: Extent) -> None:
    one, other = found(one), found(other)
    if one is other:
        return
    if one.size != other.size:
        raise Clash
    if one.form is not None and other.form is not None:
        _join_forms(one, other)
        one, other = found(one), found(other)
        if one is other:
            return
    if one.form is not None:
        one, other = other, one
    one.same_as = other
    for what in one.marks:
        mark(other, what)


def _join_forms(one: Extent, other: Extent) -> None:
    """Makes what two extents are made of the same."""
    if one.form != other.form:
        product, parts = (one, other) if one.form == PRODUCT else (other, one)
        _factor_out(parts, product.size // factors(product)[0].size)
    if found(one).form == PRODUCT:
        _zip(factors(one), factors(other), outer_and_inner)
    else:
        _zip(_flat(one, SUM), _flat(other, SUM), first_and_rest)


def _zip(ones: list[Extent], others: list[Extent], cut: Callable[[Extent, int], tuple[Extent, Extent]]) -> None:
    """Joins pieces one by one, the larger cut where the smaller ends."""
    while ones and others:
        one, other = ones.pop(0), others.pop(0)
        if one.size == other.size:
            _join(one, other)
        elif one.size > other.size:
            first, rest = cut(one, other.size)
            _join(first, other)
            ones.insert(0, rest)
        else:
            first, rest = cut(other, one.size)
            _join(one, first)
            others.insert(0, rest)


def stretch(extent: Extent, start: int, length: int) -> Extent:
    """A part of a dim.

    Raises:
        Clash: it is known to be made of something else.
    """
    _, rest = first_and_rest(extent, start)
    return first_and_rest(rest, length)[0]


def regrouped(dims: Sequence[Extent], sizes: Sequence[int]) -> list[Extent]:
    """The dims of a view of these sizes.

    Raises:
        Clash: it is no view of these dims that could be told.
    """
    left = [found(dim) for dim in dims if dim.size != 1]
    result = []
    for size in sizes:
        taken: list[Extent] = []
        while (have := math.prod(each.size for each in taken)) < size:
            if not left:
                raise Clash
            wanted, following = size // have, left.pop(0)
            if size % have:
                raise Clash
            if following.size > wanted:
                following, rest = outer_and_inner(following, wanted)
                left.insert(0, rest)
            taken.append(following)
        result.append(made_of(PRODUCT, taken) if taken else Extent(1))
    return result
