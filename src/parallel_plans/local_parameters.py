"""A module's parameters as its forward sees them on this rank: local tensors, in the letter in which they are used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional

from parallel_plans.collectives import Axis, replicate
from parallel_plans.partial import contribute
from parallel_plans.storage import local_tensor

if TYPE_CHECKING:
    from parallel_plans.boundary import Forward


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
        self.is_special = bool(summed or once or after)  # any is used in another letter than that in which it lies

    def on(self, module: nn.Module) -> LocalParameters:
        """The same for a copy of the module."""
        return LocalParameters(module, self.summed, self.once, self.after)

    def around(self, forward: Forward) -> Forward:
        """`forward` with local tensors in the parameters' place while it runs; itself where they lie there anyway."""
        if self.is_special:
            return self._around_special(forward)
        if getattr(forward, "__func__", None) is nn.Linear.forward:
            return self._linear
        if self._are_plain():
            return forward

        def run(*args: Any, **kwargs: Any) -> Any:
            kept: dict[str, Any] = self.module._parameters
            originals = list(kept.items())
            for name, parameter in originals:
                if isinstance(parameter, DTensor):
                    kept[name] = local_tensor(parameter)
            try:
                return forward(*args, **kwargs)
            finally:
                for name, parameter in originals:
                    kept[name] = parameter

        return run

    def _linear(self, input: Tensor) -> Tensor:
        """What `nn.Linear` computes: most of a model's modules are that, and need nothing put in anything's place."""
        kept: dict[str, Any] = self.module._parameters
        weight, bias = kept["weight"], kept["bias"]
        return functional.linear(input, local_tensor(weight), None if bias is None else local_tensor(bias))

    def _are_plain(self) -> bool:
        """Whether the module keeps what it computes with; not where a module around it has laid that out just now."""
        kept = [parameter for parameter in self.module._parameters.values() if parameter is not None]
        return all(isinstance(each, nn.Parameter) and not isinstance(each, DTensor) for each in kept)

    def _around_special(self, forward: Forward) -> Forward:
        only_gradients = not (self.once or self.after)
        are_plain = self._are_plain()

        def run(*args: Any, **kwargs: Any) -> Any:
            if only_gradients and are_plain and not torch.is_grad_enabled():
                return forward(*args, **kwargs)
            kept: dict[str, Any] = self.module._parameters
            originals, added = self._lay_out(kept)
            try:
                output = forward(*args, **kwargs)
            finally:
                kept.update(originals)
            return output if added is None else output + added.to(output.dtype)  # under autocast they differ

        return run

    def _lay_out(self, kept: dict[str, Any]) -> tuple[dict[str, Any], Tensor | None]:
        """Puts local tensors in the parameters' place; gives what was there, and what is to be added to the output."""
        originals, added = kept.copy(), None
        for name, parameter in originals.items():
            if parameter is None:
                continue
            local = kept[name] = local_tensor(parameter)
            if isinstance(parameter, nn.Parameter):  # if not, a module around has laid it out
                local = kept[name] = self._in_use(name, local)
            if name in self.after:
                # some layers cannot do without a bias: they get one that adds nothing
                added, kept[name] = local, None if isinstance(self.module, nn.Linear) else torch.zeros_like(local)
        return originals, added

    def _in_use(self, name: str, local: Tensor) -> Tensor:
        for axis in self.summed.get(name, ()):
            local = replicate(local, axis)
        for axis in self.once.get(name, ()):
            local = contribute(local, axis)
        return local
