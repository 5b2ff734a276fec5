"""Finding the model under a plan in what tools are given."""

from __future__ import annotations

from torch import nn

from parallel_plans.integrations import refusals
from parallel_plans.state import Parallel, parallel_of


def planned(model: nn.Module) -> nn.Module | None:
    """The module under a plan that `model` is, or wraps; None where there is none.

    Raises:
        LaunchError: PP733 where `model` has parameters beside those of the module under the plan.
    """
    root = next((module for module in model.modules() if "_parallel" in vars(module)), None)
    if root is None or root is model:
        return root
    inside = set(root.parameters())
    beside = [name for name, parameter in model.named_parameters() if parameter not in inside]
    if beside:
        raise refusals.refusal(refusals.beside(beside[0]))
    return root


def parallel_in(root: nn.Module) -> Parallel:
    """What a model under a plan knows about itself."""
    parallel = parallel_of(root)
    assert parallel is not None
    return parallel
