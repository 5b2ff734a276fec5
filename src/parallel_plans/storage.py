"""How a rank keeps its part of a parameter: as a `DTensor` for the outside world, or as a plain tensor.

With `dtensor` storage every parameter is a `DTensor` on one mesh, whole ones too (as `Replicate`), so that optimizers
and `torch.nn.utils.clip_grad_norm_` see one kind. Compute runs on local tensors all the
same: `local_tensor` gives the part that lies underneath, and its gradient comes back as a `DTensor`.
With `local` storage a parameter is the rank's part itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from parallel_plans.dtensors import take_over
from parallel_plans.layouts import Layout
from parallel_plans.mesh import Place
from parallel_plans.placements import placements

take_over()  # whole tensors and distributed checkpoints are right then, also of what torch has no placement for

Storage = Literal["dtensor", "local"]
STORAGES: tuple[Storage, ...] = ("dtensor", "local")


def stored(local: Tensor, layout: Layout, place: Place, storage: Storage, requires_grad: bool) -> nn.Parameter:
    """The parameter that a module keeps for this rank's part `local`."""
    if storage == "local":
        return nn.Parameter(local, requires_grad=requires_grad)
    stride = torch.empty(layout.shape, device="meta").stride()
    wrapped = DTensor.from_local(
        local, place.mesh, placements(layout, place), run_check=False, shape=torch.Size(layout.shape), stride=stride
    )
    # what `nn.Parameter` makes of it, without its `detach`: to find out how that lies takes a DTensor milliseconds
    kept: Any = DTensor.__new__(DTensor, local.detach(), wrapped._spec, requires_grad=requires_grad)
    kept._is_param = True
    return cast(nn.Parameter, kept)


class _Local(torch.autograd.Function):
    """The local tensor of a DTensor; the gradient goes back as a DTensor that lies as the parameter does."""

    @staticmethod
    def forward(ctx: Any, value: DTensor) -> Tensor:
        ctx.like = value
        local = value._local_tensor
        return local.view_as(local)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> DTensor:
        return _wrapped(gradient, ctx.like)


def _wrapped(gradient: Tensor, like: DTensor) -> DTensor:
    """A gradient that lies as its parameter does; `from_local` takes ten times as long to find that out again."""
    return DTensor.__new__(DTensor, gradient.contiguous(), like._spec, requires_grad=False)


class _LocalTogether(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *values: DTensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)  # what is not used has no gradient
        ctx.likes = values
        return tuple([value._local_tensor.view_as(value._local_tensor) for value in values])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[DTensor | None, ...]:
        return tuple(
            [
                None if gradient is None else _wrapped(gradient, like)
                for gradient, like in zip(gradients, ctx.likes, strict=True)
            ]
        )


def local_tensors(values: Sequence[DTensor]) -> tuple[Tensor, ...]:
    """`local_tensor` of parameters that take gradients, in one step of autograd, which is most of what one takes."""
    return _LocalTogether.apply(*values)


def local_tensor(value: Tensor) -> Tensor:
    """This rank's part of a parameter, with gradients where they are on; a plain tensor is its own part."""
    if not isinstance(value, DTensor):
        return value
    if torch.compiler.is_dynamo_compiling():
        return value.to_local()  # what follows is made for speed, and of what a compiler cannot trace
    if torch.is_grad_enabled() and value.requires_grad:
        return cast(Tensor, _Local.apply(value))
    return value._local_tensor
