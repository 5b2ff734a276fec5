"""Rules of what runs along a dim: statistics, norms, sums so far."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from parallel_plans.derive.extents import Extent, join, mark
from parallel_plans.derive.learning import Dims, Learned, Normed
from parallel_plans.derive.meeting import Rule, several
from parallel_plans.derive.step import Operation


def reduced(learned: Learned, op: Operation) -> Sequence[Dims]:
    """A statistic over some dims; a mean in a norm's own module is one that ranks can take together."""
    dims = learned.of(op.args[0])
    given = op.get(1, "dim")
    if isinstance(given, bool) or given is None or given == []:
        given = tuple(range(len(dims)))
    among = {at % len(dims) for at in several(given)}
    over = [dims[at] for at in among]
    if op.name == "mean" and among == {len(dims) - 1} and _is_norm(learned, op.module, dims[-1].size):
        mark(dims[-1], Normed(module=op.module))
    else:
        learned.bind(over, op.module, f"is a dim over which `{op.name}` is taken")
    results = op.results
    keeps = results[0].dim() == len(dims)
    found = [Extent(1) if at in among else dim for at, dim in enumerate(dims) if keeps or at not in among]
    return [list(found) for _ in results]


def _is_norm(learned: Learned, module: str, size: int) -> bool:
    """Whether a module is a norm of this many features: nothing in it, and a weight for each."""
    owner = learned.modules.get(module)
    own = [] if owner is None or any(True for _ in owner.children()) else list(owner.parameters())
    return bool(own) and all(tuple(each.shape) == (size,) for each in own)


def along(at: int, default: int = -1) -> Rule:
    """The rule of what is done along a dim, the argument at a place: it stays whole."""

    def rule(learned: Learned, op: Operation) -> Sequence[Dims]:
        dims = learned.of(op.args[0])
        given = op.get(at, "dim", default)
        over = range(len(dims)) if given is None else several(given)
        learned.bind([dims[each] for each in over], op.module, f"is a dim along which `{op.name}` runs")
        found = []
        for each in op.results:
            sizes = zip(dims, each.shape, strict=True)
            found.append([mine if mine.size == size else Extent(size) for mine, size in sizes])
        return found

    return rule


def normed(learned: Learned, op: Operation) -> Sequence[Dims]:
    """`native_layer_norm`, `_fused_rms_norm`: a norm over the last dims."""
    value, shape = op.args[0], op.args[1]
    dims = list(learned.of(value))
    last = dims[len(dims) - len(shape) :]
    for each in op.args[2:4]:
        if isinstance(each, Tensor):
            for one, other in zip(last, learned.of(each), strict=True):
                join(one, other)
    if len(shape) == 1 and _is_norm(learned, op.module, shape[0]):
        mark(last[0], Normed(module=op.module))
    else:
        learned.bind(last, op.module, "is a dim that a norm runs over")
    rest = dims[: len(dims) - len(shape)]
    ones = [Extent(1) for _ in shape]
    return [dims, *([*rest, *ones] for _ in op.results[1:])]


def turned(learned: Learned, op: Operation) -> Sequence[Dims]:
    dims = learned.of(op.args[0])
    given = op.args[2] if op.name == "roll" and len(op.args) > 2 else op.args[1]
    learned.bind([dims[at] for at in several(given)], op.module, f"is a dim along which `{op.name}` runs")
    return [dims]


def triangle(learned: Learned, op: Operation) -> Sequence[Dims]:
    dims = learned.of(op.args[0])
    learned.bind(dims[-2:], op.module, "is a side of a triangle")
    return [dims]
