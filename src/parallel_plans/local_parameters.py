"""A module's parameters as its forward sees them on this rank: local tensors, in the letter in which they are used."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from parallel_plans.collectives import Axis
from parallel_plans.forks import in_use, replicated_in_use
from parallel_plans.joint import replicate_together
from parallel_plans.layouts import Split
from parallel_plans.partial import contribute
from parallel_plans.sharing import Shared, share_together
from parallel_plans.transitions import gather, replicate

if TYPE_CHECKING:
    from parallel_plans.boundary import Forward


NOTHING_SHARED: Mapping[str, tuple[Shared, ...]] = MappingProxyType({})
NOTHING_GATHERED: Mapping[str, tuple[Axis, Split]] = MappingProxyType({})


class LocalParameters:
    """A module's own parameters as this rank computes with them.

    Args:
        module: the module that keeps them.
        summed: those whose gradients are summed, each with the axes.
        once: those that one rank alone adds to a sum, each with the axes.
        after: those that are hidden from the forward and added to the delivered output.
        shared: those of which other ranks hold some too, each with what they hold.
        gathered: those that are used whole, each with the ranks among which it is split, and how.
        kept: all of them, and whether each is kept in another form than the module computes with; None: look.
    """

    def __init__(
        self,
        module: nn.Module,
        summed: dict[str, tuple[Axis, ...]],
        once: dict[str, tuple[Axis, ...]],
        after: tuple[str, ...] = (),
        kept: dict[str, bool] | None = None,
        shared: Mapping[str, tuple[Shared, ...]] = NOTHING_SHARED,
        gathered: Mapping[str, tuple[Axis, Split]] = NOTHING_GATHERED,
    ) -> None:
        self.module, self.summed, self.once, self.after = module, summed, once, after
        self.shared, self.gathered = dict(shared), dict(gathered)  # a tracer follows no view of a dict
        self.kept = self._kept() if kept is None else kept
        self.apart = tuple(name for name, is_apart in self.kept.items() if is_apart)
        # any is used in another letter than that in which it lies
        self.is_special = bool(summed or once or after or shared or gathered)

    def on(self, module: nn.Module) -> LocalParameters:
        """The same for a copy of the module, which may have no parameters yet."""
        return LocalParameters(module, self.summed, self.once, self.after, self.kept, self.shared, self.gathered)

    def around(self, forward: Forward) -> Forward:
        """`forward` with local tensors in the parameters' place while it runs; itself where they lie there anyway."""
        if self.is_special:
            return self._around_special(forward)
        if not self.apart:
            return forward
        if len(self.apart) == 1:
            return self._around_one(forward, *self.apart)
        if len(self.apart) == 2:
            return self._around_two(forward, *self.apart)
        module, apart = self.module, self.apart

        def run(*args: Any, **kwargs: Any) -> Any:
            kept: dict[str, Any] = module._parameters
            originals = [kept[name] for name in apart]
            for name in apart:
                kept[name] = in_use(kept[name])
            try:
                return forward(*args, **kwargs)
            finally:
                for name, parameter in zip(apart, originals, strict=True):
                    kept[name] = parameter

        return run

    def _around_one(self, forward: Forward, name: str) -> Forward:
        """The same with one parameter, as norms have."""
        module = self.module

        def run(*args: Any, **kwargs: Any) -> Any:
            kept: dict[str, Any] = module._parameters
            parameter = kept[name]
            kept[name] = in_use(parameter)
            try:
                return forward(*args, **kwargs)
            finally:
                kept[name] = parameter

        return run

    def _around_two(self, forward: Forward, first: str, second: str) -> Forward:
        """The same with two parameters, as experts and layers with a bias have."""
        module = self.module

        def run(*args: Any, **kwargs: Any) -> Any:
            kept: dict[str, Any] = module._parameters
            one, other = kept[first], kept[second]
            kept[first], kept[second] = in_use(one), in_use(other)
            try:
                return forward(*args, **kwargs)
            finally:
                kept[first], kept[second] = one, other

        return run

    def _kept(self) -> dict[str, bool]:
        found = self.module._parameters.items()
        return {name: isinstance(parameter, DTensor) for name, parameter in found if parameter is not None}

    def _around_special(self, forward: Forward) -> Forward:
        only_summed = not (self.once or self.after or self.shared or self.gathered)
        if only_summed and len(self.summed) == len(self.kept) == 1:
            return self._around_summed(forward, *self.summed)
        only_gradients, are_plain = not (self.once or self.after or self.gathered), not self.apart

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

    def _around_summed(self, forward: Forward, name: str) -> Forward:
        """The same with one parameter, as norms have, of which the gradients are summed."""
        module, are_plain = self.module, not self.apart

        def run(*args: Any, **kwargs: Any) -> Any:
            is_recorded = torch.is_grad_enabled()
            if are_plain and not is_recorded:
                return forward(*args, **kwargs)
            kept: dict[str, Any] = module._parameters
            parameter = kept[name]
            local = replicated_in_use(parameter) if is_recorded else in_use(parameter)
            if local is None:  # what is no nn.Parameter, a module around has laid out
                local = self._in_use(name, parameter) if isinstance(parameter, nn.Parameter) else parameter
            kept[name] = local
            try:
                return forward(*args, **kwargs)
            finally:
                kept[name] = parameter

        return run

    def _lay_out(self, kept: dict[str, Any]) -> tuple[dict[str, Any], Tensor | None]:
        """Puts local tensors in the parameters' place; gives what was there, and what is to be added to the output."""
        originals, added = kept.copy(), None
        together = self._replicated_together(originals) if len(self.summed) > 1 else {}
        for name, parameter in originals.items():
            if parameter is None:
                continue
            local = together.get(name)
            if local is None:  # what is no nn.Parameter, a module around has laid out
                local = self._in_use(name, parameter) if isinstance(parameter, nn.Parameter) else parameter
            kept[name] = local
            if name in self.after:
                # some layers cannot do without a bias: they get one that adds nothing
                added, kept[name] = local, None if isinstance(self.module, nn.Linear) else torch.zeros_like(local)
        return originals, added

    def _replicated_together(self, kept: dict[str, Any]) -> dict[str, Tensor]:
        """The R of those whose gradients can be summed in one reduction, as those of a norm with a bias; or none."""
        axes = set(self.summed.values())
        found = {name: kept[name] for name in self.summed if isinstance(kept[name], nn.Parameter)}
        is_joint = len(found) > 1 and len(axes) == 1 and not self.once and torch.is_grad_enabled()
        if not is_joint or any(replicated_in_use(parameter) is not None for parameter in found.values()):
            return {}
        values = [in_use(parameter) for parameter in found.values()]
        for axis in axes.pop():
            values = list(replicate_together(values, axis))
        return dict(zip(found, values, strict=True))

    @property
    def plain(self) -> list[str]:
        """The names of those that are kept apart and used as they are."""
        special = (self.summed, self.once, self.gathered)
        return [name for name in self.apart if not any(name in each for each in special)]

    def joined_on(self, axis: Axis) -> list[str]:
        """The names of the parameters that become R over this axis alone, and nothing else."""
        return [name for name, axes in self.summed.items() if axes == (axis,) and name not in self.once]

    def _in_use(self, name: str, parameter: Tensor) -> Tensor:
        local = replicated_in_use(parameter)
        if local is not None:
            return local
        local = in_use(parameter)
        if name in self.gathered:
            axis, split = self.gathered[name]
            local = gather(local, axis, split, split.dim)
        for axis in self.summed.get(name, ()):
            local = replicate(local, axis)
        for axis in self.once.get(name, ()):
            local = contribute(local, axis)
        for shared in self.shared.get(name, ()) if torch.is_grad_enabled() and local.requires_grad else ():
            (local,) = share_together([local], [shared])
        return local
