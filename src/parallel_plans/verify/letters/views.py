"""What operations that look at the same elements in another shape make of shards."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import Tensor

from parallel_plans.verify.letters.lay import Block, Lay, Mismatch, NoRule, Shard, alike
from parallel_plans.verify.letters.operation import Operation


def _first(op: Operation) -> tuple[Tensor, Lay]:
    value = op.args[0]
    return value, op.lay(value)


def viewed(op: Operation) -> Lay:
    """`view` and `reshape`: dims are taken apart and put together, and a shard must stay one."""
    value, lay = _first(op)
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
        for dim, shard in zip(after, _taken_apart(merged, sizes, wholes, op.name), strict=True):
            shards[dim] = shard
    return replace(lay, shards=tuple(shards))


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


def _taken_apart(shard: Shard, sizes: Sequence[int], wholes: Sequence[int] | None, name: str) -> list[Shard | None]:
    """The shards of the dims that one dim is taken apart into; `wholes` are their sizes in the whole model."""
    shards: list[Shard | None] = [None] * len(sizes)
    if not sizes:
        raise Mismatch("PP303", f"{name}: a part of a dim is taken for all of it")
    dim, last = 0, len(sizes) - 1
    while dim < last and sizes[dim] > 1 and _is_even(shard.blocks, sizes[dim]):
        if wholes is not None and wholes[dim] != sizes[dim]:
            break
        shard = replace(shard, blocks=shard.blocks[: len(shard.blocks) // sizes[dim]])  # each has the same blocks
        dim += 1
    at = _place_of(shard, sizes, dim, wholes)
    divided = shard.divided(math.prod(sizes[at + 1 :]))
    if divided is None or (wholes is not None and wholes[at] != divided.whole):
        raise Mismatch("PP303", f"{name}: {list(sizes)} cuts through the parts of a dim: {shard}")
    shards[at] = divided
    return shards


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


def same(op: Operation) -> Lay:
    """`detach`, `alias`."""
    return _first(op)[1]


def copied(op: Operation) -> Lay:
    """`copy_`: the source, repeated where the target has more."""
    target, source = op.args[:2]
    lay, more = op.lay(source), target.dim() - source.dim()
    shards = list(lay.shards)
    for dim, size in enumerate(source.shape):
        if size != target.shape[more + dim]:
            shards[dim] = alike(target.shape[more + dim])
    return replace(lay, shards=(*(alike(size) for size in target.shape[:more]), *shards))


def permuted(op: Operation) -> Lay:
    """`permute`."""
    _, lay = _first(op)
    return replace(lay, shards=tuple(lay.shards[dim] for dim in op.args[1]))


def transposed(op: Operation) -> Lay:
    """`transpose`, `t`."""
    value, lay = _first(op)
    if value.dim() < 2:
        return lay
    one, other = (op.args[1], op.args[2]) if len(op.args) > 2 else (0, 1)
    shards = list(lay.shards)
    shards[one], shards[other] = shards[other], shards[one]
    return replace(lay, shards=tuple(shards))


def unsqueezed(op: Operation) -> Lay:
    """`unsqueeze`."""
    _, lay = _first(op)
    dim = op.args[1] % op.result.dim()
    return replace(lay, shards=(*lay.shards[:dim], None, *lay.shards[dim:]))


def squeezed(op: Operation) -> Lay:
    """`squeeze`: a dim of one element that is a part may not go."""
    value, lay = _first(op)
    given = op.get(1, "dim")
    dims = range(value.dim()) if given is None else [given] if isinstance(given, int) else given
    gone = {dim % value.dim() for dim in dims if value.shape[dim] == 1}
    if any(lay.part(dim) for dim in gone):
        raise Mismatch("PP303", f"{op.name}: a part of a dim is taken for all of it")
    return replace(lay, shards=tuple(shard for dim, shard in enumerate(lay.shards) if dim not in gone))


def expanded(op: Operation) -> Lay:
    """`expand`: new dims in front, dims of one element repeated."""
    value, lay = _first(op)
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
    """`repeat`: dims one behind the other so many times."""
    value, lay = _first(op)
    times = list(op.args[1])
    more = len(times) - value.dim()
    shards = [None if shard is None else shard.repeated(n) for shard, n in zip(lay.shards, times[more:], strict=True)]
    return replace(lay, shards=(*(None,) * more, *shards))


def sliced(op: Operation) -> Lay:
    """`slice`: all of a shard, or whole blocks of it."""
    value, lay = _first(op)
    dim = op.get(1, "dim", 0) % value.dim()
    start, stop, step = op.get(2, "start"), op.get(3, "end"), op.get(4, "step", 1)
    if not op.result.numel():
        return replace(lay.with_dim(dim, None), is_zero=True)
    ends = _clamped(start, stop, value.shape[dim])
    if lay.pieces is not None:
        return lay if ends == (0, value.shape[dim]) else _piece(op, lay, dim, *ends)
    return lay.with_dim(dim, _stretch(op, value, lay, dim, *ends, step))


def _clamped(start: int | None, stop: int | None, size: int) -> tuple[int, int]:
    low = 0 if start is None else start + size if start < 0 else start
    high = size if stop is None else stop + size if stop < 0 else stop
    return min(max(low, 0), size), min(max(high, 0), size)


def _piece(op: Operation, lay: Lay, dim: int, start: int, stop: int) -> Lay:
    """The lay of one of several values that stand one behind the other."""
    found = lay.piece(dim, start, stop)
    if found is None:
        raise Mismatch("PP302", f"{op.name}: something whole and a partial sum in one tensor")
    return found


def _stretch(op: Operation, value: Tensor, lay: Lay, dim: int, start: int, stop: int, step: int = 1) -> Shard | None:
    shard = lay.shards[dim]
    if shard is None or (start, stop, step) == (0, value.shape[dim], 1):
        return shard
    if start >= stop or not shard.over:
        return None
    if step > 1:
        return _every(op, shard, start, stop, step)
    cut = shard.cut(start, stop)
    if cut is None or not cut.blocks:
        raise Mismatch("PP303", f"{op.name}: {start} to {stop} cuts through the parts of a dim: {shard}")
    return cut


def _every(op: Operation, shard: Shard, start: int, stop: int, step: int) -> Shard:
    if stop != shard.local or start >= step:
        raise Mismatch("PP303", f"{op.name}: every {step}th element of parts of a dim: {shard}")
    divided = shard.divided(step)
    if divided is None:
        raise Mismatch("PP303", f"{op.name}: every {step}th element of parts of a dim: {shard}")
    return divided


def selected(op: Operation) -> Lay:
    """`select`: one element of a dim, which must be whole."""
    value, lay = _first(op)
    dim = op.args[1] % value.dim()
    if lay.part(dim) is not None:
        raise Mismatch("PP303", f"{op.name}: one element of a dim of which each rank has a part: {lay.shards[dim]}")
    return replace(lay, shards=(*lay.shards[:dim], *lay.shards[dim + 1 :]))


def split(op: Operation) -> list[Lay]:
    """`split`, `chunk`, `split_with_sizes`: stretches of a dim, one behind the other."""
    value, lay = _first(op)
    dim = op.get(2, "dim", 0) % value.dim()
    lays, at = [], 0
    for piece in op.output:
        end = at + piece.shape[dim]
        own = None if lay.pieces is None else _piece(op, lay, dim, at, end)
        lays.append(own or lay.with_dim(dim, _stretch(op, value, lay, dim, at, end)))
        at = end
    return lays


def unbound(op: Operation) -> list[Lay]:
    """`unbind`: every element of a dim, which must be whole."""
    value, lay = _first(op)
    dim = op.get(1, "dim", 0) % value.dim()
    if lay.part(dim) is not None:
        raise Mismatch("PP303", f"{op.name}: the elements of a dim of which each rank has a part: {lay.shards[dim]}")
    return [replace(lay, shards=(*lay.shards[:dim], *lay.shards[dim + 1 :]))] * len(op.output)


def slice_gradient(op: Operation) -> Lay:
    """`slice_backward`: the gradient of a stretch, zeros around it."""
    _, lay = _first(op)
    sizes, dim, start, stop, step = op.args[1:6]
    dim %= len(sizes)
    shard = lay.shards[dim]
    if shard is None or shard.local == sizes[dim]:
        return lay
    if step > 1:
        return lay.with_dim(dim, shard.scaled(step))
    low, high = _clamped(start, stop, sizes[dim])
    before, after = (tuple([Block(n, 0, True)] if n else []) for n in (low, sizes[dim] - high))
    return lay.with_dim(dim, replace(shard, blocks=(*before, *shard.blocks, *after)))


def select_gradient(op: Operation) -> Lay:
    """`select_backward`: the gradient of one element, zeros around it."""
    _, lay = _first(op)
    dim = op.args[2] % len(op.args[1])
    return replace(lay, shards=(*lay.shards[:dim], None, *lay.shards[dim:]))


def padded(op: Operation) -> Lay:
    """`constant_pad_nd`: more elements around dims, which must be whole where there are any."""
    value, lay = _first(op)
    for dim, shard in enumerate(lay.shards):
        if shard is not None and shard.over and op.result.shape[dim] != value.shape[dim]:
            raise Mismatch("PP303", f"{op.name}: a dim of which each rank has a part is padded: {shard}")
    if lay.partial and op.get(2, "value", 0) != 0:
        raise Mismatch("PP302", f"{op.name}: a partial sum is padded with what is not zero")
    return lay


def flipped(op: Operation) -> Lay:
    """`flip`, `roll`, `cumsum`: along dims that must be whole."""
    value, lay = _first(op)
    given = op.get(2, "dims") if op.name == "roll" else op.args[1]
    for dim in [given] if isinstance(given, int) else given or range(value.dim()):
        if lay.part(dim) is not None:
            raise Mismatch("PP303", f"{op.name} along a dim of which each rank has a part: {lay.shards[dim]}")
    return lay


def triangle(op: Operation) -> Lay:
    """`tril`, `triu`: of the last two dims, which must be whole."""
    _, lay = _first(op)
    if lay.part(-2) is not None or lay.part(-1) is not None:
        raise Mismatch("PP303", f"{op.name} of dims of which each rank has a part")
    return lay


def as_complex(op: Operation) -> Lay:
    """`view_as_complex`: pairs in the last dim, which must be whole, as one number each; `view_as_real`: back."""
    value, lay = _first(op)
    if op.name == "view_as_real":
        return replace(lay, shards=(*lay.shards, None))
    if lay.part(value.dim() - 1) is not None:
        raise Mismatch("PP303", f"{op.name}: pairs of which each rank has a part")
    return replace(lay, shards=lay.shards[:-1])
