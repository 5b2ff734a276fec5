"""What a layer's parameters are used as, made in one step of autograd as the layer begins.

Where they are kept as `DTensor`s, that is their local tensors; where each rank uses whole ones on its own part of the
sequence, their R, of which the gradients are summed in one reduction.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from parallel_plans.collectives import Axis
from parallel_plans.forks import lay_out, replicate_parameters, share_parameters

if TYPE_CHECKING:
    from parallel_plans.local_parameters import LocalParameters
    from parallel_plans.sharing import Shared


class LaidOut:
    """The parameters in a layer of which is taken, as it begins, what they are used as.

    Args:
        below: what the modules in it keep.
        axis: the ranks over which a sequence is split; None where none is.
    """

    def __init__(self, below: tuple[LocalParameters, ...], axis: Axis | None = None) -> None:
        self.below, self.axis = below, axis
        self._summed = [] if axis is None else [(own.module, name) for own in below for name in own.joined_on(axis)]
        apart = [(own.module, name) for own in below for name in own.plain]
        self._shared = _by_axis(below)
        self._kept = apart + [(module, name) for module, name in self._summed if _is_dtensor(module, name)]

    @property
    def is_needed(self) -> bool:
        """Whether there is anything to take."""
        return bool(self._kept or self._summed or self._shared)

    def on(self, memo: dict[int, Any]) -> LaidOut:
        """The same for a copy, with the modules that it has made or will make."""
        return LaidOut(tuple(own.on(copy.deepcopy(own.module, memo)) for own in self.below), self.axis)

    def begin(self) -> None:
        """Takes their local tensors, inside the scope that is open."""
        lay_out(_found(self._kept))
        if self.axis is not None:
            replicate_parameters(_found(self._summed), self.axis)
        for each in self._shared:
            share_parameters([(module._parameters[name], how) for module, name, how in each])


def _by_axis(below: tuple[LocalParameters, ...]) -> list[list[tuple[nn.Module, str, Shared]]]:
    """The parameters of which the same ranks hold some too, by these ranks; not those that several sets of ranks do."""
    found: dict[Axis, list[tuple[nn.Module, str, Shared]]] = {}
    for own in below:
        for name, shared in own.shared.items():
            if len(shared) == 1 and name not in own.summed and name not in own.once:
                found.setdefault(shared[0].axis, []).append((own.module, name, shared[0]))
    return list(found.values())


def _is_dtensor(module: nn.Module, name: str) -> bool:
    return isinstance(module._parameters[name], DTensor)


def _found(places: Sequence[tuple[nn.Module, str]]) -> list[Tensor]:
    found = (module._parameters[name] for module, name in places)
    return [parameter for parameter in found if parameter is not None]
