"""Norms over a dim that is sharded: the module's own arithmetic, with its means taken over all ranks.

olmo2 normalizes its queries over all heads at once. Gathering them costs an all-gather of the whole width; the only
thing a rank does not know is one number per token, the mean of squares. So the module runs as it is on its own part,
and every mean over the sharded dim is summed over the ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from parallel_plans.boundary import Arguments, Boundary, Forward, Keywords, Site
from parallel_plans.transitions import reduce_for_use


def _holders(site: Site) -> int:
    """How many ranks have what this one has."""
    assert site.split is not None
    (ranks,) = site.split.holders(site.own.rank)
    return len(ranks)


class _MeansOverRanks(TorchFunctionMode):
    """Inside it, a mean over the last dim of a value as wide as this rank's part is the mean over all ranks."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.site, self.width, self.taken = site, site.local_size, 0
        assert site.split is not None
        self.whole = site.split.size
        self.holders = _holders(site)  # of several ranks that have the same, each adds its share

    def mean(self, value: Tensor, keepdim: bool = True) -> Tensor:
        self.taken += 1
        own = value.sum(-1, keepdim=keepdim)
        return reduce_for_use(own if self.holders == 1 else own / self.holders, self.site.axis) / self.whole

    def _mean(self, value: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Tensor:
        dims = tuple(dim) if isinstance(dim, (tuple, list)) else (dim,)
        if dims not in ((-1,), (value.dim() - 1,)) or value.shape[-1] != self.width:
            return value.mean(dim, keepdim, dtype=dtype)
        return self.mean(value if dtype is None else value.to(dtype), keepdim)

    def _rms_norm(self, value: Tensor, shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
        wide = value.to(torch.promote_types(value.dtype, torch.float32))  # torch too rounds once, at the end
        eps = torch.finfo(wide.dtype).eps if eps is None else eps
        result = wide * torch.rsqrt(self.mean(wide.pow(2)) + eps)
        return (result if weight is None else result * weight.to(wide.dtype)).to(value.dtype)

    def _layer_norm(
        self, value: Tensor, shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
    ) -> Tensor:
        wide = value.to(torch.promote_types(value.dtype, torch.float32))
        centred = wide - self.mean(wide)
        result = centred * torch.rsqrt(self.mean(centred.pow(2)) + eps)
        result = result if weight is None else result * weight.to(wide.dtype)
        return (result if bias is None else result + bias.to(wide.dtype)).to(value.dtype)

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Arguments = (), kwargs: Keywords | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = _STATISTICS.get(function)
        if name is None:
            return function(*args, **kwargs)
        return getattr(self, name)(*args, **kwargs)


_STATISTICS: dict[Callable[..., Any], str] = {
    Tensor.mean: "_mean",
    torch.mean: "_mean",
    F.rms_norm: "_rms_norm",
    torch.rms_norm: "_rms_norm",
    F.layer_norm: "_layer_norm",
}


class ShardedNormBoundary(Boundary):
    """`sharded_norm`: a norm whose normalized dim is sharded; its means are taken over all ranks."""

    def __init__(self, site: Site, module: nn.Module) -> None:
        super().__init__(site, module)
        self.kind = type(module).__name__

    def __call__(self, forward: Forward, args: Arguments, kwargs: Keywords) -> Any:
        means = _MeansOverRanks(self.site)
        with means:  # what `with` gives is lost on torch.compile
            output = forward(*args, **kwargs)
        if not means.taken:
            raise TypeError(
                f"{self.site.name}: sharded_norm found no mean over a last dim of {means.width} in the forward of "
                f"{self.kind}, so its statistics cannot be taken over all ranks; gather before it instead "
                "(colwise_gather_output, then rowwise_split_input)"
            )
        return output
