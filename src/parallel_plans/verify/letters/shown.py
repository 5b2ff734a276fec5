"""What the views of the whole model give: where a rank has one head, only they show which dim it is in."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from fractions import Fraction
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from parallel_plans.verify.letters.lay import Lay, Shard
from parallel_plans.verify.short_steps import TooLong
from parallel_plans.verify.whereabouts import Whereabouts

# module, in backward or not, whether it repeats -> what the operations gave that show a dim in another shape, in order
Seen = dict[tuple[str, bool, bool], list[tuple[int, ...]]]


class ViewsSeen(TorchDispatchMode):
    """What the views of a model give, module by module; asked for of the whole model, to know which dim is a part.

    A step of more than `most` operations ends with `TooLong`.
    """

    def __init__(self, where: Whereabouts, most: float = math.inf) -> None:
        super().__init__()
        self.where, self._left = where, most
        self._ends = _Ends(self)
        self.seen: Seen = {}

    @property
    def is_over(self) -> bool:
        """Whether the step had all its operations."""
        return self._left < 0

    def __enter__(self) -> ViewsSeen:
        self._ends.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._ends.__exit__(*error)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self._left -= 1
        if self.is_over and self.where.is_backward:
            raise TooLong
        output = func(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")[2]
        if name in SHOWING:
            key = self.where(), self.where.is_backward, name in REPEATING
            self.seen.setdefault(key, []).append(tuple(output.shape))
        return output


class _Ends(TorchFunctionMode):
    """Ends forward between two operations: inside of one autograd records it, and some builds of torch abort there."""

    def __init__(self, views: ViewsSeen) -> None:
        super().__init__()
        self.views = views

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if self.views.is_over and not self.views.where.is_backward:
            raise TooLong
        return func(*args, **(kwargs or {}))


REPEATING = ("expand", "repeat")  # the same elements again
SHOWING = ("view", "_unsafe_view", "reshape", *REPEATING)  # the same elements in another shape, or the same ones again


def shows(value: Tensor, lay: Lay, output: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether a shape can be that of a view in the whole model: as many elements, dims in proportion."""
    parts = [lay.part(dim) for dim in range(value.dim())]
    ratios = {(1, 1)} | {(part.whole, part.local) for part in parts if part is not None}
    in_proportion = all(
        any(wanted * local == size * whole_ for whole_, local in ratios)
        for size, wanted in zip(output.shape, shape, strict=True)
    )
    return in_proportion and math.prod(shape) == math.prod(lay.whole_sizes(value.shape))


def repeats(value: Tensor, lay: Lay, output: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether a shape can be that of the whole model where a tensor is repeated: alike in all that is not."""
    more = output.dim() - value.dim()
    for dim, (size, wanted) in enumerate(zip(output.shape, shape, strict=True)):
        part = None if dim < more else lay.part(dim - more)
        is_repeated = dim < more or value.shape[dim - more] == 1
        if wanted != (size if part is None else part.whole) and (part is not None or not is_repeated):
            return False
    return True


def in_shares(lay: Lay, ranks: int, share: Fraction) -> Lay:
    """The lay in which what counts once for each rank counts as it does in the whole model: a share is in it so often.

    1 of 2 key/value heads on 4 ranks is seen as 1 of 4, as if each rank had one of its own.
    """

    def counted(shard: Shard) -> Shard:
        blocks = (
            replace(block, whole=int(block.local * share)) if block.whole == block.local * ranks else block
            for block in shard.blocks
        )
        return replace(shard, blocks=tuple(blocks))

    return replace(lay, shards=tuple(None if shard is None else counted(shard) for shard in lay.shards))


def in_ranks(shape: tuple[int, ...], local: tuple[int, ...], lay: Lay, share: Fraction) -> tuple[int, ...]:
    """The shape that the whole model would have if each rank had a share of its own, as the lay says."""
    blocks = (block for shard in lay.shards if shard is not None and shard.over for block in shard.blocks)
    times = max((block.whole // block.local for block in blocks if not block.free), default=1)
    pairs = zip(shape, local, strict=True)
    return tuple(size * times if wanted == size * share else wanted for wanted, size in pairs)
