"""Batches and ranks: gradients averaged over batches as a backward ends, and one batch for ranks that share it."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Container, Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Variable
from torch.utils._pytree import tree_flatten

from parallel_plans.data_parallel.copies import copies_of
from parallel_plans.data_parallel.fully_sharded import averaged_by_torch
from parallel_plans.data_parallel.wrapped import averaged_by_wrapper
from parallel_plans.errors import Finding, LaunchError
from parallel_plans.gradients import average
from parallel_plans.integrations.refusals import AVERAGED_TWICE, refusal
from parallel_plans.mesh import Place
from parallel_plans.state import local_part, parallel_of
from parallel_plans.views import DATA_AXIS, TENSOR_AXIS


class AveragedInBackward:
    """Averages a model's gradients over all batches as each backward ends, but within `no_sync`.

    As `DistributedDataParallel` does it, so that what clips, scales or steps afterwards finds them averaged. Gradients
    that have been averaged once may be added to by a further backward.
    """

    def __init__(
        self, model: nn.Module, names: Container[str] | None = None, is_on: Callable[[], bool] | None = None
    ) -> None:
        """`names` are those to average, all where it is None; `is_on` is asked beside `no_sync`."""
        parallel = parallel_of(model)
        assert parallel is not None
        self.model, self.place, self.names = model, parallel.place, names
        self.is_on, self.is_queued, self.is_asked_too = True, False, is_on
        self.averaged: set[nn.Parameter] = set()
        self.share = {
            p: self._share(copies_of(parallel.layout(n), self.place).size) for n, p in model.named_parameters()
        }
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_hook(partial(self.before_gradient, parameter))

    def _share(self, copies: int) -> float:
        """What an averaged gradient has to be multiplied by, so that averaging it again leaves it as it is.

        An expert's gradients are summed over its copies, and divided by the number of batches.
        """
        return self.place.axes[DATA_AXIS].size / copies

    def before_gradient(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        """Runs in backward, before the gradient is added to what is there."""
        self._reopen(parameter)
        if self.is_on and not self.is_queued and (self.is_asked_too is None or self.is_asked_too()):
            self.is_queued = True
            Variable._execution_engine.queue_callback(self.after_backward)

    def _reopen(self, parameter: nn.Parameter) -> None:
        if parameter in self.averaged:
            self.averaged.discard(parameter)
            if parameter.grad is not None and self.share.get(parameter, 1) != 1:
                local_part(parameter.grad).mul_(self.share[parameter])

    def after_backward(self) -> None:
        """Runs when the backward has ended."""
        self.is_queued = False
        for parameter in list(self.averaged):
            self._reopen(parameter)
        own = [(name, p) for name, p in self.model.named_parameters() if self.names is None or name in self.names]
        average(self.model, own)
        self.averaged = {parameter for _, parameter in own if parameter.grad is not None}

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Inside the block gradients are added up on each rank by itself."""
        before, self.is_on = self.is_on, False
        try:
            yield
        finally:
            self.is_on = before


def average_in_backward(model: nn.Module) -> None:
    """Averages `model`'s gradients over batches as each backward ends; gives it the `no_sync` that tools look for.

    Raises:
        LaunchError: PP746 where torch averages them already.
    """
    if averaged_by_wrapper(model) or averaged_by_torch(model):
        raise refusal(AVERAGED_TWICE)
    if not hasattr(model, "no_sync"):
        model.no_sync = AveragedInBackward(model).no_sync  # type: ignore[assignment]


class SameBatch:
    """Compares what the ranks of a batch are given, in the first forward of training and in the first of evaluation."""

    def __init__(self, place: Place) -> None:
        self.axis = place.axes[TENSOR_AXIS]
        self.seen: set[bool] = set()

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Runs before a forward."""
        if model.training in self.seen:
            return
        self.seen.add(model.training)
        told: list[Any] = [None] * self.axis.size
        dist.all_gather_object(told, _digest(args, kwargs), group=self.axis.group)
        if len(set(told)) > 1:
            raise LaunchError(_differing(told))


def _digest(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    tensors = [value for value in tree_flatten((args, sorted(kwargs.items())))[0] if isinstance(value, Tensor)]
    return ", ".join(f"{list(tensor.shape)} {_checksum(tensor):08x}" for tensor in tensors)


def _checksum(tensor: Tensor) -> int:
    return zlib.crc32(tensor.detach().contiguous().flatten().view(torch.uint8).to("cpu").numpy().tobytes())


def _differing(told: list[str]) -> Finding:
    return Finding(
        code="PP731",
        message="the ranks of one tp group were given different batches",
        found="; ".join(f"{digest} on rank {rank} of the group" for rank, digest in enumerate(told)),
        expected="the same tensors (shape, checksum) on all ranks that hold one model together",
        fix="prepare the data loader together with the model or after it, and seed what shuffles alike on every rank",
    )


def compare_batches(model: nn.Module, place: Place) -> None:
    """Makes `model` refuse different batches on ranks that share one (PP731)."""
    if place.axes[TENSOR_AXIS].size > 1 and not getattr(model, "_compares_batches", False):
        model._compares_batches = True  # type: ignore[assignment]
        model.register_forward_pre_hook(SameBatch(place), with_kwargs=True)
