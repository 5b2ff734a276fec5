"""Optimizers that cannot work on parts of parameters, refused by name before their first step.

Most optimizers treat each element by itself. Some look at whole matrices, and would take a rank's part for one: nothing
tells, and what is trained is not what one process trains.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from parallel_plans.errors import Finding, PlanError

PART = "_is_part_of_a_rank"  # the mark of a parameter of which this rank has a part

# class -> what it takes of a whole parameter; torch's, and those of libraries that go by the same name
_MIXING = {
    "Adafactor": "the means of rows and columns",
    "Muon": "the singular vectors of a matrix",
    "LBFGS": "scalar products of all gradients",
    "Lamb": "the norm of a parameter",
    "LARS": "the norm of a parameter",
}


def mixes(optimizer: Optimizer) -> str | None:
    """What the optimizer takes of whole parameters; None where it is not known to take more than each element."""
    return next((_MIXING[kind.__name__] for kind in type(optimizer).__mro__ if kind.__name__ in _MIXING), None)


def check_before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """A hook before any optimizer's step.

    Raises:
        PlanError: PP720 where it would mix the elements of a parameter that is split over ranks.
    """
    what = mixes(optimizer)
    if what is None:
        return
    parts: list[Tensor] = [p for group in optimizer.param_groups for p in group["params"] if hasattr(p, PART)]
    if parts:
        raise PlanError(
            Finding(
                code="PP720",
                message=f"{type(optimizer).__name__} takes {what}, and of {len(parts)} parameters this rank has a part",
                expected="an optimizer that treats each element by itself",
                fix="take AdamW, Adam or SGD for them; parameters that are whole on every rank it can have",
            )
        )


@functools.cache
def check_optimizers() -> None:
    """From now on every optimizer is looked at before its steps."""
    register_optimizer_step_pre_hook(check_before_step)
