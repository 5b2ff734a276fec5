"""Rules of another view of a tensor: other shapes, parts, what is put together."""

from __future__ import annotations

from collections.abc import Sequence

from parallel_plans.derive.extents import Clash, Extent, join, made_of, outer_and_inner, regrouped, stretch
from parallel_plans.derive.learning import Dims, Learned
from parallel_plans.derive.meeting import dim_at, met, several
from parallel_plans.derive.step import Operation


def viewed(learned: Learned, op: Operation) -> Sequence[Dims]:
    """Another shape of the same; dims in front that stay as they are do so whatever is made of those behind them."""
    dims, shape = learned.of(op.args[0]), op.results[0].shape
    try:
        return [regrouped(dims, shape)]
    except Clash:
        same = next((at for at, (dim, size) in enumerate(zip(dims, shape, strict=False)) if dim.size != size), 0)
        if not same:
            raise
    made = [Extent(size) for size in shape[same:]]
    learned.bind(
        [*(dim for dim in dims[same:] if dim.size > 1), *made], op.module, f"goes through `{op.name}` with others"
    )
    return [[*dims[:same], *made]]


def permuted(learned: Learned, op: Operation) -> Sequence[Dims]:
    dims = learned.of(op.args[0])
    return [[dims[at] for at in op.get(1, "dims")]]


def transposed(learned: Learned, op: Operation) -> Sequence[Dims]:
    dims = list(learned.of(op.args[0]))
    one, other = (0, -1) if op.name.startswith("t") and "ranspose" not in op.name else (op.args[1], op.args[2])
    if len(dims) > 1:
        dims[one], dims[other] = dims[other], dims[one]
    return [dims]


def unsqueezed(learned: Learned, op: Operation) -> Sequence[Dims]:
    dims, at = list(learned.of(op.args[0])), op.args[1]
    dims.insert(at if at >= 0 else at + len(dims) + 1, Extent(1))
    return [dims]


def squeezed(learned: Learned, op: Operation) -> Sequence[Dims]:
    dims = learned.of(op.args[0])
    given = op.get(1, "dim")
    among = range(len(dims)) if given is None else [at % len(dims) for at in several(given)]
    return [[dim for at, dim in enumerate(dims) if not (at in among and dim.size == 1)]]


def expanded(learned: Learned, op: Operation) -> Sequence[Dims]:
    shape = op.results[0].shape
    return [met(learned, op.args[:1], shape)]


def repeated(learned: Learned, op: Operation) -> Sequence[Dims]:
    times = op.args[1]
    dims = [Extent(1)] * (len(times) - op.args[0].dim()) + learned.of(op.args[0])
    return [[made_of("product", [Extent(count), dim]) for count, dim in zip(times, dims, strict=True)]]


def _stretch(learned: Learned, op: Operation, dim: Extent, start: int, length: int) -> Extent:
    """A part of a dim; one of which no more is known, where it cuts through what the dim is made of."""
    try:
        return stretch(dim, start, length)
    except Clash:
        part = Extent(length)
        learned.bind([dim, part], op.module, "is cut through")
        return part


def sliced(learned: Learned, op: Operation) -> Sequence[Dims]:
    dims, at = list(learned.of(op.args[0])), dim_at(op, 1)
    size = dims[at].size
    start, step = op.get(2, "start") or 0, op.get(4, "step", 1)
    start = min(start + size if start < 0 else start, size)
    length = op.results[0].shape[at]
    if length == size:
        return [dims]
    if step == 1:
        dims[at] = _stretch(learned, op, dims[at], start, length)
    elif size % step == 0 and length == size // step:
        dims[at] = outer_and_inner(dims[at], length)[0]
    else:
        raise Clash
    return [dims]


def selected(learned: Learned, op: Operation) -> Sequence[Dims]:
    dims, at = list(learned.of(op.args[0])), dim_at(op, 1)
    taken = dims.pop(at)
    if taken.size > 1:
        learned.bind([taken], op.module, "is a dim of which one place is taken")
    return [dims]


def split(learned: Learned, op: Operation) -> Sequence[Dims]:
    dims, at = learned.of(op.args[0]), dim_at(op, 2)
    found, start = [], 0
    for result in op.results:
        length = result.shape[at]
        found.append([*dims[:at], _stretch(learned, op, dims[at], start, length), *dims[at + 1 :]])
        start += length
    return found


def unbound(learned: Learned, op: Operation) -> Sequence[Dims]:
    dims, at = list(learned.of(op.args[0])), dim_at(op, 1)
    learned.bind([dims.pop(at)], op.module, "is a dim that is taken apart")
    return [list(dims) for _ in op.results]


def joined(learned: Learned, op: Operation) -> Sequence[Dims]:
    tensors = [each for each in op.args[0] if each.dim() > 1 or each.numel()]
    at = int(op.get(1, "dim", 0)) % tensors[0].dim()
    dims = [learned.of(tensor) for tensor in tensors]
    for other in dims[1:]:
        for place, (one, two) in enumerate(zip(dims[0], other, strict=True)):
            if place != at:
                join(one, two)
    return [[*dims[0][:at], made_of("sum", [each[at] for each in dims]), *dims[0][at + 1 :]]]


def stacked(learned: Learned, op: Operation) -> Sequence[Dims]:
    tensors = op.args[0]
    at = int(op.get(1, "dim", 0)) % (tensors[0].dim() + 1)
    dims = met(learned, tensors, tensors[0].shape)
    dims.insert(at, Extent(len(tensors)))
    return [dims]


def padded(learned: Learned, op: Operation) -> Sequence[Dims]:
    dims, shape = list(learned.of(op.args[0])), op.results[0].shape
    for at, size in enumerate(shape):
        if dims[at].size != size:
            learned.bind([dims[at]], op.module, "is a dim that is padded")
            dims[at] = Extent(size)
            learned.bind([dims[at]], op.module, "is a dim that is padded")
    return [dims]


def as_complex(learned: Learned, op: Operation) -> Sequence[Dims]:
    dims = learned.of(op.args[0])
    return [dims[:-1] if op.name == "view_as_complex" else [*dims, Extent(2)]]
