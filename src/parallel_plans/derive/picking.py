"""Rules of places that are picked from a dim, or written into it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from parallel_plans.derive.extents import Clash, Extent, join, stretch
from parallel_plans.derive.learning import Dims, Learned
from parallel_plans.derive.meeting import dim_at, met, unknown
from parallel_plans.derive.step import Operation


def looked_up(learned: Learned, op: Operation) -> Sequence[Dims]:
    weight, ids = op.args[0], op.args[1]
    return [[*learned.of(ids), *learned.of(weight)[1:]]]


def indexed(learned: Learned, op: Operation) -> Sequence[Dims]:
    """`x[ids]`, `x[:, ids]`: the dims that are picked from stay whole."""
    value, indices = op.args[0], op.args[1]
    dims = learned.of(value)
    at = [place for place, index in enumerate(indices) if index is not None]
    if len(at) == 1 and (place := _place(learned, indices[at[0]])) is not None and _is_cut(dims[at[0]], place):
        return [[*dims[: at[0]], *(Extent(1) for _ in indices[at[0]].shape), *dims[at[0] + 1 :]]]
    if at != list(range(at[0], at[0] + len(at))):
        return unknown(learned, op)
    picked = [indices[place] for place in at]
    learned.bind([dims[place] for place in at], op.module, "is a dim from which places are picked")
    shape = op.results[0].shape[at[0] : op.results[0].dim() - (len(dims) - at[-1] - 1)]
    return [[*dims[: at[0]], *met(learned, picked, shape), *dims[at[-1] + 1 :]]]


def _place(learned: Learned, index: Tensor) -> int | None:
    """The one place that the code itself names, as in `x[..., [-2], :]`; None where it is found by a computation."""
    if index.numel() != 1 or index.dtype is torch.bool:
        return None
    op = learned.producers.get(id(index))
    if op is not None and op.name != "lift_fresh":
        return None
    known = index.constant if isinstance(index, FakeTensor) else index if op is not None else None
    return None if known is None else int(known)


def _is_cut(dim: Extent, place: int) -> bool:
    """Whether a dim could be seen as what is at a place, and what is beside it."""
    try:
        stretch(dim, place % dim.size, 1)
    except Clash:
        return False
    return True


def index_selected(learned: Learned, op: Operation) -> Sequence[Dims]:
    dims, at = list(learned.of(op.args[0])), dim_at(op, 1)
    learned.bind([dims[at]], op.module, "is a dim from which places are picked")
    dims[at] = learned.of(op.args[2])[0] if op.args[2].dim() else Extent(1)
    return [dims]


def gathered(learned: Learned, op: Operation) -> Sequence[Dims]:
    """`gather`: one dim is picked from, the others meet those of the index."""
    value, at, index = op.args[0], dim_at(op, 1), op.args[2]
    dims, picked = learned.of(value), list(learned.of(index))
    learned.bind([dims[at], picked[at]], op.module, "is a dim from which places are picked")
    for place, (one, other) in enumerate(zip(dims, picked, strict=True)):
        if place != at and one.size == other.size:
            join(one, other)
    return [picked]


def scattered(learned: Learned, op: Operation) -> Sequence[Dims]:
    """`scatter`, `index_add`, `index_copy`: places of one dim are written, the others meet what is written."""
    dims, at, source = learned.of(op.args[0]), dim_at(op, 1), op.args[3] if len(op.args) > 3 else None
    learned.bind([dims[at]], op.module, "is a dim in which places are written")
    if isinstance(source, Tensor) and source.dim() == len(dims):
        for place, (one, other) in enumerate(zip(dims, learned.of(source), strict=True)):
            if place == at:
                learned.bind([other], op.module, "is a dim in which places are written")
            elif one.size == other.size:
                join(one, other)
    return [dims]


def put(learned: Learned, op: Operation) -> Sequence[Dims]:
    """`index_put`: the dims that are written by place stay whole, the others meet what is written."""
    dims, indices, values = learned.of(op.args[0]), op.args[1], op.args[2]
    at = [place for place, index in enumerate(indices) if index is not None]
    learned.bind([dims[place] for place in at], op.module, "is a dim in which places are written")
    rest = dims[at[-1] + 1 :] if at else []
    for one, other in zip(reversed(rest), reversed(learned.of(values)), strict=False):
        if one.size == other.size:
            join(one, other)
    return [dims]
