"""A parallelized model's gradients: their mean over batches, and their norm, which counts every parameter once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel_plans.collectives import Axis
from parallel_plans.data_parallel.chunks import chunked
from parallel_plans.data_parallel.copies import copies_of
from parallel_plans.data_parallel.fully_sharded import averaged_by_torch
from parallel_plans.data_parallel.wrapped import averaged_by_wrapper
from parallel_plans.dealing import between
from parallel_plans.layouts import Layout
from parallel_plans.mesh import Place, device_of
from parallel_plans.state import Parallel, local_part, parallel_of
from parallel_plans.views import DATA_AXIS

BUCKET_BYTES = 25 * 2**20  # of gradients in one all-reduce

Named = list[tuple[str, nn.Parameter]]


def _axes(layout: Layout | None) -> tuple[str, ...]:
    return () if layout is None else tuple(sorted(split.axis for split in layout.splits))


def _spread_over(name: str, parameter: Tensor, parallel: Parallel | None) -> tuple[Axis, ...]:
    """The axes over whose ranks a parameter's elements are dealt: those of its layout, and that of its chunks."""
    if parallel is None:
        return ()
    layout, place = parallel.layout(name), parallel.place
    over, chunks = tuple(place.axes[axis] for axis in _axes(layout)), chunked(parameter, layout, place)
    return over if chunks is None else (*over, chunks.axis)


def _counted(name: str, parameter: Tensor, parallel: Parallel | None) -> Tensor:
    """What this rank has of a gradient and no rank before it, so that nothing is counted twice."""
    assert parameter.grad is not None
    gradient, layout = local_part(parameter.grad), None if parallel is None else parallel.layout(name)
    if parallel is None or layout is None:
        return gradient
    for split in layout.splits:
        if split.is_disjoint:
            continue
        rank, chunks = parallel.place.axes[split.axis].rank, chunked(parameter, layout, parallel.place)
        ranges = split.counted(rank)
        if chunks is not None and chunks.dim == split.dim:
            ranges = between(ranges, *chunks.stretch(split.local_sizes[rank]))
        pieces = [gradient.narrow(split.dim, start, stop - start) for start, stop in ranges]
        gradient = torch.cat([gradient.narrow(split.dim, 0, 0), *pieces], split.dim)
    return gradient


@torch.no_grad()
def gradient_norm(model: nn.Module, norm_type: float = 2.0) -> Tensor:
    """The p-norm of all gradients of `model`, as of one whole vector; a float32 scalar, the same on every rank.

    Every rank calls it. A parameter that is whole on every rank is counted once, a tied one too; parts and the chunks
    of `fully_shard` are summed over the ranks that hold them. `norm_type` may be `math.inf`.
    """
    parallel = parallel_of(model)
    device = next(model.parameters()).device
    # the axes over which parameters are dealt -> what the parts add up to; the same axes on every rank
    totals: dict[tuple[str, ...], Tensor] = {}
    over: dict[tuple[str, ...], tuple[Axis, ...]] = {}
    for name, parameter in model.named_parameters():
        axes = _spread_over(name, parameter, parallel)
        key = tuple(axis.name for axis in axes)
        over[key] = axes
        before = totals.setdefault(key, torch.zeros((), device=device))
        if parameter.grad is None:
            continue
        size = _counted(name, parameter, parallel).abs().float()
        if norm_type == math.inf:
            totals[key] = torch.maximum(before, size.max()) if size.numel() else before
        else:
            totals[key] = before + size.pow(norm_type).sum()
    operation = dist.ReduceOp.MAX if norm_type == math.inf else dist.ReduceOp.SUM
    for key in sorted(totals):  # every rank in the same order
        for axis in over[key]:
            dist.all_reduce(totals[key], op=operation, group=axis.group)
    sums = torch.stack([totals[key] for key in sorted(totals)])
    return sums.max() if norm_type == math.inf else sums.sum().pow(1 / norm_type)


def _with_gradient_somewhere(parameters: Named, place: Place) -> Named:
    """The parameters that have a gradient on this rank or on another, the same on every rank."""
    has = torch.tensor([parameter.grad is not None for _, parameter in parameters], dtype=torch.uint8)
    has = has.to(device_of(place))
    for axis in place.all_axes:
        dist.all_reduce(has, op=dist.ReduceOp.MAX, group=axis.group)
    return [each for each, has_one in zip(parameters, has.tolist(), strict=True) if has_one]


@torch.no_grad()
def average_gradients(model: nn.Module) -> None:
    """Averages `model`'s gradients over the batches of all ranks, in place; every rank calls it after backward.

    Dense layers have as many copies of a parameter as there are batches, and their gradients are averaged over the
    copies. An expert that tokens travel to has seen several batches already: its gradients are summed over its copies,
    and divided by the number of batches. With losses that are means over batches of one size, the result is the
    gradient of the mean over all of them.

    2 batches on 4 ranks, tp = 2, ep = 4:

        rank                0      1      2      3
        dense gradients     a      b      c      d       -> (a+c)/2, (b+d)/2, (a+c)/2, (b+d)/2
        expert gradients    e      f      g      h       -> e/2, f/2, g/2, h/2

    What `DistributedDataParallel` or `fully_shard` has averaged in backward is left as it is.
    """
    if parallel_of(model) is None or averaged_by_wrapper(model):
        return
    done = averaged_by_torch(model)
    average(model, [(name, parameter) for name, parameter in model.named_parameters() if id(parameter) not in done])


@torch.no_grad()
def average(model: nn.Module, parameters: Named) -> None:
    """`average_gradients` of some of the model's parameters, the same on every rank."""
    parallel = parallel_of(model)
    assert parallel is not None
    place = parallel.place
    batches = place.axes[DATA_AXIS].size
    over: dict[tuple[str, torch.dtype], tuple[Axis, list[Tensor]]] = {}
    for name, parameter in _with_gradient_somewhere(parameters, place) if parameters else ():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        copies, gradient = copies_of(parallel.layout(name), place), local_part(parameter.grad)
        over.setdefault((copies.name, gradient.dtype), (copies, []))[1].append(gradient)
    for copies, gradients in over.values():
        if copies.size > 1:
            for bucket in _buckets(gradients):
                _add_up(bucket, copies)
        torch._foreach_div_(gradients, float(batches))


def _buckets(gradients: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """The gradients in order, as many at a time as make a bucket."""
    bucket, size = list[Tensor](), 0
    for gradient in gradients:
        bucket.append(gradient)
        size += gradient.nbytes
        if size >= BUCKET_BYTES:
            yield bucket
            bucket, size = [], 0
    if bucket:
        yield bucket


def _add_up(bucket: Sequence[Tensor], copies: Axis) -> None:
    """Puts the sums over the copies in the place of the gradients, in one collective."""
    if len(bucket) == 1 and bucket[0].is_contiguous():
        dist.all_reduce(bucket[0], group=copies.group)
        return
    flat = torch.cat([each.reshape(-1) for each in bucket])
    dist.all_reduce(flat, group=copies.group)
    sums = [
        part.view_as(each) for part, each in zip(flat.split([each.numel() for each in bucket]), bucket, strict=True)
    ]
    torch._foreach_copy_(list(bucket), sums)


@torch.no_grad()
def clip_grad_norm_(model: nn.Module, max_norm: float, norm_type: float = 2.0) -> Tensor:
    """The norm of `model`'s gradients before they are scaled, in place, to at most `max_norm`; every rank calls it.

    As `torch.nn.utils.clip_grad_norm_`, but given the model, and right in both storages: torch's own cannot know that a
    plain tensor is one rank's part.
    """
    norm = gradient_norm(model, norm_type)
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for parameter in model.parameters():
        if parameter.grad is not None:
            gradient = local_part(parameter.grad)
            gradient.mul_(scale.to(gradient.dtype))
    return norm
