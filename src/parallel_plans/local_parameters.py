"""A module's parameters as its forward sees them on this rank: local tensors, in the letter in which they are used."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from parallel_plans.collectives import Axis, replicate
from parallel_plans.partial import contribute
from parallel_plans.storage import local_tensor


class LocalParameters:
    """A module's own parameters as this rank computes with them.

    Args:
        module: the module that keeps them.
        summed: those whose gradients are summed, each with the axes.
        once: those that one rank alone adds to a sum, each with the axes.
        after: those that are hidden from the forward and added to the delivered output.
    """

    def __init__(
        self,
        module: nn.Module,
        summed: dict[str, tuple[Axis, ...]],
        once: dict[str, tuple[Axis, ...]],
        after: tuple[str, ...] = (),
    ) -> None:
        self.module, self.summed, self.once, self.after = module, summed, once, after

    @property
    def is_special(self) -> bool:
        """Whether any is used in another letter than that in which it lies."""
        return bool(self.summed or self.once or self.after)

    def on(self, module: nn.Module) -> LocalParameters:
        """The same for a copy of the module."""
        return LocalParameters(module, self.summed, self.once, self.after)

    def lay_out(self) -> tuple[dict[str, Any], Tensor | None]:
        """Puts local tensors in the parameters' place; gives what was there, and what is to be added to the output."""
        kept: dict[str, Any] = self.module._parameters
        originals, added = kept.copy(), None
        for name, parameter in originals.items():
            if parameter is None:
                continue
            local = parameter
            if isinstance(parameter, nn.Parameter):  # if not, a module around this one has laid it out
                local = local_tensor(parameter)
                for axis in self.summed.get(name, ()):
                    local = replicate(local, axis)
                for axis in self.once.get(name, ()):
                    local = contribute(local, axis)
            kept[name] = local
            if name in self.after:
                # some layers cannot do without a bias: they get one that adds nothing
                added, kept[name] = local, None if isinstance(self.module, nn.Linear) else torch.zeros_like(local)
        return originals, added
