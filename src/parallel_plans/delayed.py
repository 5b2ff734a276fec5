"""What a delayed reduction is made of: this rank's part, what is to be added once, and what else hangs on the sum.

`parallel_plans.partial_tensor` has the tensor that models see of it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from parallel_plans.collectives import Axis
from parallel_plans.transitions import reduce

if TYPE_CHECKING:
    from parallel_plans.partial_tensor import Partial

Step = Callable[[Tensor], Tensor]


def recording(wanted: bool) -> AbstractContextManager[Any]:
    """Inside the block autograd records, or does not; nothing where that is so already, which is most of the time."""
    return _AS_IT_IS if torch.is_grad_enabled() == wanted else torch.set_grad_enabled(wanted)


_AS_IT_IS = nullcontext()


class Kept:
    """A tensor that is read later and may be somebody else's: read, it is what it was, or that is an error.

    Tensors of inference mode do not count their changes, so of those it keeps a copy.
    """

    __slots__ = ("_tensor", "_version")

    def __init__(self, tensor: Tensor) -> None:
        counts = not tensor.is_inference()
        self._tensor = tensor if counts else tensor.clone()
        self._version = tensor._version if counts else None

    @property
    def is_same(self) -> bool:
        return self._version is None or self._tensor._version == self._version

    @property
    def tensor(self) -> Tensor:
        if self.is_same:
            return self._tensor
        raise RuntimeError(
            f"a tensor {list(self._tensor.shape)} was added to a partial sum and changed in place before the sum was "
            "reduced; change a copy of it, or take `parallel_plans.partial.whole(sum)` before the change"
        )


class Link:
    """How a copy follows from what it was copied from, for as long as neither changes: `step(source)`."""

    __slots__ = ("_graded", "_step", "_uses", "source")

    def __init__(self, source: Partial, step: Step, uses: Iterable[Kept] = ()) -> None:
        self.source, self._step, self._uses = source, step, tuple(uses)
        self._graded = torch.is_grad_enabled()

    @property
    def is_valid(self) -> bool:
        return all(kept.is_same for kept in self._uses)

    def value(self) -> Tensor:
        with recording(self._graded):
            return self._step(self.source.held).contiguous()


@dataclass
class Tally:
    """Sums that came to wait, and reductions that were made of them: how many, and of how many bytes."""

    sums: int = 0
    sums_bytes: int = 0
    reductions: int = 0
    reduced_bytes: int = 0
    is_recorded: bool = field(default_factory=torch.is_grad_enabled)  # by autograd

    def came(self, state: Delayed) -> None:
        """This sum waits, and is counted here when it is reduced."""
        state.tally = self
        self.sums += 1
        self.sums_bytes += state.bytes

    def made(self, size: int) -> None:
        """A reduction of so many bytes."""
        self.reductions += 1
        self.reduced_bytes += size

    @property
    def is_less(self) -> bool:
        """Whether it took less than to reduce every sum on its own."""
        mine, apart = (self.reductions, self.reduced_bytes), (self.sums, self.sums_bytes)
        return mine != apart and all(one <= other for one, other in zip(mine, apart, strict=True))


class Delayed:
    """What a `Partial` and all views of it share.

    Args:
        tensor: this rank's part; from the reduction on, the whole value.
        axis: over whose ranks the parts are to be summed.
        beside: a whole value to be added once, after the reduction.
        link: what it is a copy of, so that one reduction serves both.
        is_lent: whether another `Delayed` holds the same tensor, so that a change in place needs a copy first.
        tally: where its reduction is counted.
    """

    __slots__ = ("__weakref__", "axis", "beside", "copies", "is_lent", "is_reduced", "link", "tally", "tensor")
    joins_others = True  # whether its reduction may be one with that of others

    def __init__(
        self,
        tensor: Tensor,
        axis: Axis,
        beside: Kept | None = None,
        link: Link | None = None,
        is_lent: bool = False,
        tally: Tally | None = None,
    ) -> None:
        assert tensor.is_contiguous()  # so that a view of it is a view of its reduction and of what is beside it
        self.tensor, self.axis, self.beside = tensor, axis, beside
        self.link, self.is_lent, self.is_reduced, self.tally = link, is_lent, False, tally
        self.copies: list[weakref.ref[Delayed]] = []
        if link is not None:
            link.source.state.copies.append(weakref.ref(self))

    @property
    def requires_grad(self) -> bool:
        return self.tensor.requires_grad or (self.beside is not None and self.beside.tensor.requires_grad)

    @property
    def bytes(self) -> int:
        """How many bytes each rank's part has that travels when this is asked for."""
        return self.tensor.nbytes if self.link is None else self.link.source.state.bytes

    @property
    def root(self) -> Delayed:
        """What is reduced when this is asked for: what it is a copy of, where it still is one."""
        source = None if self.link is None or not self.link.is_valid else self.link.source.state
        return self if source is None or source.is_reduced else source.root

    def reduce(self) -> Tensor:
        """The whole value; the first time, this is where the ranks communicate."""
        if not self.is_reduced and self.link is not None and self.link.is_valid:
            self.link.source.state.reduce()  # its copies get their values with it, and this is one
        if not self.is_reduced:
            if self.tally is not None:
                self.tally.made(self.tensor.nbytes)
            with recording(self.requires_grad):  # it is remembered, also where the first to ask has none
                self.take(reduce(self.tensor, self.axis))
        return self.tensor

    def take(self, total: Tensor) -> None:
        """The sum of the ranks' parts is this."""
        self._become(total if self.beside is None else total + self.beside.tensor)

    def _become(self, value: Tensor) -> None:
        self.tensor, self.is_reduced, self.beside, self.link = value, True, None, None
        copies, self.copies = self.copies, []
        for made in (reference() for reference in copies):  # now: the value may be changed in place later
            if made is None or made.link is None:
                continue
            if made.link.is_valid:
                made._become(made.link.value())
            else:
                made.link = None

    def before_change(self) -> None:
        """Parts from what must not change with this: its copies, what it is a copy of, others with the same tensor."""
        for made in (reference() for reference in self.copies):
            if made is not None:
                made.link = None
        self.copies, self.link = [], None
        if self.is_lent:
            self.tensor, self.is_lent = self.tensor.clone(), False
