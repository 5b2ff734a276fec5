"""What taking dims apart and putting them together, and repeating them, makes of shards."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from parallel_plans.verify.letters.lay import Block, Lay, Mismatch, NoRule, Shard, alike
from parallel_plans.verify.letters.operation import Operation, first


def viewed(op: Operation) -> Lay:
    """`view` and `reshape`: dims are taken apart and put together, and a shard must stay one."""
    value, lay = first(op)
    if not value.numel() and value.dim() != op.result.dim():
        return _viewed_nothing(op)
    shards: list[Shard | None] = [None] * op.result.dim()
    old, new = tuple(value.shape), tuple(op.result.shape)
    if op.whole_shape is not None:  # where a rank has one head, only the whole model shows which dim it is in
        old, new = lay.whole_sizes(old), op.whole_shape
    for before, after in _groups(old, new):
        if not any(lay.shards[dim] for dim in before):
            continue
        if not any(lay.part(dim) for dim in before):
            _view_alike(lay, value.shape, before, op.result.shape, after, shards)
            continue
        merged = _merged([value.shape[dim] for dim in before], [lay.shards[dim] for dim in before])
        sizes = [op.result.shape[dim] for dim in after]
        wholes = None if op.whole_shape is None else [op.whole_shape[dim] for dim in after]
        for dim, shard in zip(after, _taken_apart(merged, sizes, wholes, op.name, op.shares), strict=True):
            shards[dim] = shard
    return replace(lay, shards=tuple(shards))


def _viewed_nothing(op: Operation) -> Lay:
    """A view of no elements: of its dims those are known that are as before, from the last one on.

    Raises:
        NoRule: another dim is a part.
    """
    value, lay = first(op)
    behind = 0
    while behind < min(value.dim(), op.result.dim()) and value.shape[-1 - behind] == op.result.shape[-1 - behind]:
        behind += 1
    if any(lay.part(dim) is not None for dim in range(value.dim() - behind)):
        raise NoRule
    kept = lay.shards[value.dim() - behind :]
    return replace(lay, shards=(*(None,) * (op.result.dim() - behind), *kept))


def _view_alike(
    lay: Lay, old: Sequence[int], before: list[int], new: Sequence[int], after: list[int], shards: list[Shard | None]
) -> None:
    """Whole dims of which some hold elements that are all alike: so does what they become, where it can be seen."""
    if all(lay.shards[dim] is not None for dim in before if old[dim] > 1):
        for dim in after:
            shards[dim] = alike(new[dim])
        return
    last = before[-1]
    inner = lay.shards[last]
    if len(after) == 1 and inner is not None:  # repeated within: k heads, each so many times
        times = math.prod(old[dim] for dim in before[:-1])
        shards[after[0]] = inner.repeated(times)
    elif len(before) == 1 and inner is not None:
        for dim, shard in zip(after, _taken_apart(inner, [new[dim] for dim in after], None, "view"), strict=True):
            shards[dim] = shard


def _groups(before: Sequence[int], after: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
    """Dims before and after that hold the same elements, as few together as can be."""
    one, other = 0, 0
    while one < len(before) or other < len(after):
        mine, others = [], []
        size_mine = size_others = 1
        if one < len(before):
            mine, size_mine, one = [one], before[one], one + 1
        if other < len(after):
            others, size_others, other = [other], after[other], other + 1
        while size_mine != size_others:
            if size_mine < size_others and one < len(before):
                mine, size_mine, one = [*mine, one], size_mine * before[one], one + 1
            elif other < len(after):
                others, size_others, other = [*others, other], size_others * after[other], other + 1
            else:
                raise NoRule
        # what is left has one element
        if other == len(after):
            mine, one = [*mine, *range(one, len(before))], len(before)
        if one == len(before):
            others, other = [*others, *range(other, len(after))], len(after)
        yield mine, others


def _merged(sizes: Sequence[int], shards: Sequence[Shard | None]) -> Shard:
    """The shard of several dims put together."""
    found = [dim for dim, shard in enumerate(shards) if shard is not None]
    parts = [dim for dim in found if shards[dim].over]  # type: ignore[union-attr]
    if len(parts) > 1:
        raise NoRule
    at = (parts or found)[-1]
    shard = shards[at]
    assert shard is not None
    return shard.scaled(math.prod(sizes[at + 1 :])).repeated(math.prod(sizes[:at]))


def _taken_apart(
    shard: Shard, sizes: Sequence[int], wholes: Sequence[int] | None, name: str, shares: frozenset[int] = frozenset()
) -> list[Shard | None]:
    """The shards of the dims that one dim is taken apart into; `wholes` are their sizes in the whole model."""
    shards: list[Shard | None] = [None] * len(sizes)
    if not sizes:
        raise Mismatch("PP303", f"{name}: a part of a dim is taken for all of it")
    dim, last = 0, len(sizes) - 1
    while dim < last and sizes[dim] > 1 and _is_even(shard.blocks, sizes[dim]):
        if wholes[dim] != sizes[dim] if wholes is not None else _is_units(shard, sizes[dim + 1 :], shares):
            break
        shard = replace(shard, blocks=shard.blocks[: len(shard.blocks) // sizes[dim]])  # each has the same blocks
        dim += 1
    at = _place_of(shard, sizes, dim, wholes)
    divided = shard.divided(math.prod(sizes[at + 1 :]))
    if divided is None or (wholes is not None and wholes[at] != divided.whole):
        raise Mismatch("PP303", f"{name}: {list(sizes)} cuts through the parts of a dim: {shard}")
    shards[at] = divided
    return shards


def _is_units(shard: Shard, sizes: Sequence[int], shares: frozenset[int]) -> bool:
    """Whether a dim before these is one of shared units, several blocks of them: within these they would be cut."""
    if not all(block.whole in {block.local * times for times in shares} for block in shard.blocks):
        return False
    rests = (math.prod(sizes[dim + 1 :]) for dim in range(len(sizes)))
    return not any(rest % shard.unit == 0 for rest in rests) and shard.divided(math.prod(sizes)) is not None


def _place_of(shard: Shard, sizes: Sequence[int], first: int, wholes: Sequence[int] | None) -> int:
    """The dim, from the first on, of which ranks have parts: as the whole model says, or by what stays together.

    Raises:
        NoRule: it could be one of several.
    """
    if wholes is not None and (unlike := [dim for dim in range(len(sizes)) if sizes[dim] != wholes[dim]]):
        return unlike[0]
    rests = [math.prod(sizes[dim + 1 :]) for dim in range(len(sizes))]
    fitting = [dim for dim in range(first, len(sizes)) if rests[dim] >= shard.unit and rests[dim] % shard.unit == 0]
    large = [dim for dim in fitting or range(first, len(sizes)) if sizes[dim] > 1]
    if shard.unit > 1 and fitting:
        return large[0] if large else fitting[-1]
    small = [dim for dim in range(first, large[0] if large else len(sizes)) if sizes[dim] == 1]
    if small and not (len(small) == 1 and not large):
        raise NoRule
    return large[0] if large else small[0]


def _is_even(blocks: Sequence[Block], times: int) -> bool:
    """Whether the blocks are so many times the same ones."""
    each = len(blocks) // times
    return each * times == len(blocks) and all(blocks[at] == blocks[at % each] for at in range(len(blocks)))


def expanded(op: Operation) -> Lay:
    """`expand`: new dims in front, dims of one element repeated."""
    value, lay = first(op)
    more = op.result.dim() - value.dim()
    sizes, shards = op.result.shape, [*(None,) * more, *lay.shards]
    for dim, size in enumerate(sizes):
        shard = shards[dim]
        is_more_in_all = (
            op.whole_shape is not None and op.whole_shape[dim] != size and not (shard is not None and shard.over)
        )
        is_repeated = dim < more or size != value.shape[dim - more] or is_more_in_all
        if is_repeated and shard is not None and shard.over:
            raise Mismatch("PP303", f"{op.name}: a part of a dim, {shard}, is repeated as if it were all of it")
        if is_repeated:
            shards[dim] = alike(size)
    return replace(lay, shards=tuple(shards))


def repeated(op: Operation) -> Lay:
    """`repeat`: dims one behind the other so many times, of which the whole model may have more."""
    value, lay = first(op)
    times = list(op.args[1])
    more = len(times) - value.dim()
    shards = [None if shard is None else shard.repeated(n) for shard, n in zip(lay.shards, times[more:], strict=True)]
    shards = [*(None,) * more, *shards]
    for dim, wanted in enumerate(op.whole_shape or ()):
        size = op.result.shape[dim]
        if wanted != size and shards[dim] is None and (dim < more or value.shape[dim - more] == 1):
            shards[dim] = alike(size)
    return replace(lay, shards=tuple(shards))


def copied(op: Operation) -> Lay:
    """`copy_`: the source, repeated where the target has more."""
    target, source = op.args[:2]
    lay, more = op.lay(source), target.dim() - source.dim()
    shards = list(lay.shards)
    for dim, size in enumerate(source.shape):
        if size != target.shape[more + dim]:
            shards[dim] = alike(target.shape[more + dim])
    return replace(lay, shards=(*(alike(size) for size in target.shape[:more]), *shards))
