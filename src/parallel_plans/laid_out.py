"""The local tensors of a layer's parameters in one step of autograd, where they are kept as `DTensor`s."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from parallel_plans.forks import lay_out

if TYPE_CHECKING:
    from parallel_plans.local_parameters import LocalParameters


class LaidOut:
    """The parameters in a layer that are kept as `DTensor`s and used as they are.

    Args:
        below: what the modules in it keep.
    """

    def __init__(self, below: tuple[LocalParameters, ...]) -> None:
        self.below = below
        self._kept = [(own.module, name) for own in below for name in own.plain]

    def on(self, memo: dict[int, Any]) -> LaidOut:
        """The same for a copy, with the modules that it has made or will make."""
        return LaidOut(tuple(own.on(copy.deepcopy(own.module, memo)) for own in self.below))

    def begin(self) -> None:
        """Takes their local tensors, inside the scope that is open."""
        found = [module._parameters[name] for module, name in self._kept]
        lay_out([parameter for parameter in found if parameter is not None])
