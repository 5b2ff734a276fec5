"""Training in bfloat16 without losing small steps: the optimizer steps copies in float32.

A weight in bfloat16 has 8 bits. A step that is less than 1/512 of it is rounded away, however often it is made:

    weight            1.0        step 0.001
    bfloat16          1.0        1.0 - 0.001 -> 1.0, for ever
    float32 master    1.0        0.999, 0.998, 0.997, ... of which the weight is 1.0, 1.0, 0.996
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from parallel_plans.state import local_part

_KEY = "master"  # what an optimizer's state calls the copy


class MasterWeights(Optimizer):
    """An optimizer that steps float32 copies of what is kept in less, and writes them back, rounded.

    Its groups and its state are those of the model's parameters, the copies among the state, so learning rate
    schedulers and checkpoints take it for what it wraps. Of parameters in float32 there is no copy.

    Args:
        optimizer: over a model's parameters, before its first step; it is used by this one alone from now on.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        if optimizer.state:
            raise ValueError("the optimizer has made steps; wrap it before its first one")
        self.inner: Optimizer | None = None
        super().__init__([dict(group) for group in optimizer.param_groups], dict(optimizer.defaults))
        self.masters = {parameter: _master(parameter) for parameter in self._parameters()}
        self._versions = {parameter: _version(parameter) for parameter in self.masters}
        for group in optimizer.param_groups:
            group["params"] = [self.masters[parameter] for parameter in group["params"]]
        self.inner = optimizer

    def _parameters(self) -> Iterator[nn.Parameter]:
        for group in self.param_groups:
            yield from group["params"]

    def _copied(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """Each parameter that has a copy, and the copy."""
        return [(parameter, master) for parameter, master in self.masters.items() if master is not parameter]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Takes more parameters in."""
        super().add_param_group(param_group)
        if self.inner is None:  # as it is made
            return
        added = self.param_groups[-1]
        for parameter in added["params"]:
            self.masters[parameter] = _master(parameter)
            self._versions[parameter] = _version(parameter)
        self.inner.add_param_group({**added, "params": [self.masters[parameter] for parameter in added["params"]]})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """What the closure gives, if there is one; it is called once, before the step."""
        assert self.inner is not None
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for own, of_inner in zip(self.param_groups, self.inner.param_groups, strict=True):
            of_inner.update({key: value for key, value in own.items() if key != "params"})
        copied = self._copied()
        for parameter, master in copied:
            if self._versions[parameter] != _version(parameter):
                _take_over(parameter, master)
            master.grad = None if parameter.grad is None else parameter.grad.to(master.dtype)
        self.inner.step()
        for _, master in copied:
            master.grad = None
        self._write_back()
        return loss

    def _write_back(self) -> None:
        """Rounds the copies into the parameters, and shows the state that belongs to these."""
        assert self.inner is not None
        copied = self._copied()
        if copied:
            torch._foreach_copy_([local_part(each) for each, _ in copied], [local_part(each) for _, each in copied])
        for parameter, master in self.masters.items():
            kept = dict(self.inner.state.get(master, {}))
            self.state[parameter] = kept if master is parameter else {**kept, _KEY: master.detach()}
            self._versions[parameter] = _version(parameter)

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from what `state_dict` gave; the parameters become what the copies in it are, rounded."""
        assert self.inner is not None
        kept: dict[Any, dict[str, Any]] = state_dict["state"]
        others = {at: {key: value for key, value in of.items() if key != _KEY} for at, of in kept.items()}
        self.inner.load_state_dict({**state_dict, "state": {at: of for at, of in others.items() if of}})
        places = [at for group in state_dict["param_groups"] for at in group["params"]]
        for at, (parameter, master) in zip(places, self.masters.items(), strict=True):
            loaded = kept.get(at, {}).get(_KEY, parameter)
            local_part(master).copy_(local_part(loaded))
        for own, of_inner in zip(self.param_groups, self.inner.param_groups, strict=True):
            own.update({key: value for key, value in of_inner.items() if key != "params"})
        self._write_back()


def _master(parameter: nn.Parameter) -> nn.Parameter:
    """The copy in float32; the parameter itself where it is as precise."""
    if not parameter.is_floating_point() or parameter.dtype.itemsize >= torch.float32.itemsize:
        return parameter
    master = nn.Parameter(parameter.detach().to(torch.float32), requires_grad=parameter.requires_grad)
    vars(master).update(vars(parameter))  # what it is marked with
    return master


def _version(parameter: Tensor) -> int:
    """A number that changes with the parameter's values."""
    return local_part(parameter)._version


def _take_over(parameter: Tensor, master: Tensor) -> None:
    """What somebody has set in the parameter since the last step; where it is the copy, rounded, that stays."""
    own, copy = local_part(parameter), local_part(master)
    copy.copy_(torch.where(copy.to(own.dtype) == own, copy, own.to(copy.dtype)))
