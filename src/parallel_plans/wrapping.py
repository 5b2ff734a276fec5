"""What may not be done to a model under a plan: to be wrapped by what takes every rank for a copy of the whole."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from parallel_plans.errors import Finding, LaunchError

_REFUSAL = Finding(
    code="PP730",
    message="a model under a plan cannot be wrapped in DistributedDataParallel",
    expected="gradients that are summed over the ranks with other batches only; DistributedDataParallel would sum over "
    "all, and give every rank the parts that rank 0 holds",
    fix="leave it unwrapped and call `parallel_plans.average_gradients(model)` after backward; with accelerate or a "
    "Trainer, take `Accelerator` of `parallel_plans.integrations.accelerate`, `Trainer` of "
    "`parallel_plans.integrations.trainer`",
)


class _Refused:
    """What torch asks a module for when it wraps it, a list of names; to ask is the mistake."""

    def __iter__(self) -> Iterator[str]:
        raise LaunchError(_REFUSAL)


def refuse_wrapping(model: nn.Module) -> None:
    """Makes `DistributedDataParallel(model)` raise PP730, before it has overwritten a parameter."""
    model._ddp_params_and_buffers_to_ignore = _Refused()  # type: ignore[assignment]
