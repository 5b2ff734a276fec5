"""Statistics over a dim that is sharded: the module's own arithmetic, with its means taken over all ranks.

olmo2 normalizes its queries over all heads at once. Gathering them costs an all-gather of the whole width; the only
thing a rank does not know is one number per token, the mean of squares. So the module runs as it is on its own part,
and every mean over the sharded dim is summed over the ranks. gemma3n does the same within an MLP: it keeps the features
of the gate that are so many deviations above their mean.

A norm may take its features in groups, each with a mean of its own, as the gated norms of state space models do. Where
every rank has whole groups it knows their means. Where ranks share a group, each puts its sum in that group's place:

    2 groups of 6 on 4 ranks    0: 3 of group 0    1: 3 of group 0    2: 3 of group 1    3: 3 of group 1
    summed over the ranks       [a, 0]             [b, 0]             [0, c]             [0, d]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from parallel_plans.boundary import Arguments, Boundary, Forward, Keywords, Site
from parallel_plans.layouts import Split
from parallel_plans.transitions import reduce_for_use, vouch


def groups_of(split: Split, rank: int, groups: int) -> dict[int, int]:
    """Group -> how many of its features a rank has, of those that it has some of."""
    size, found = split.size // groups, dict[int, int]()
    for start, stop in split.ranges[rank]:
        for group in range(start // size, -(-stop // size)):
            inside = min(stop, (group + 1) * size) - max(start, group * size)
            found[group] = found.get(group, 0) + inside
    return found


def shares_groups(split: Split, groups: int) -> bool:
    """Whether any rank has a part of a group only."""
    every = (groups_of(split, rank, groups).values() for rank in range(split.ranks))
    return any(width != split.size // groups for widths in every for width in widths)


def _holders(site: Site) -> int:
    """How many ranks have what this one has."""
    assert site.split is not None
    (ranks,) = site.split.holders(site.own.rank)
    return len(ranks)


class _MeansOverRanks(TorchFunctionMode):
    """Inside it, a mean over the last dim of a value as wide as this rank's part is the mean over all ranks.

    A variance or deviation over it is one of the same means.
    """

    def __init__(self, site: Site) -> None:
        super().__init__()
        assert site.split is not None
        self.site, self.taken = site, 0
        self.groups = int(site.options.get("groups", 1))
        own = groups_of(site.split, site.own.rank, self.groups)
        self.width, self.whole = next(iter(own.values())), site.split.size // self.groups
        self.first, self.count = min(own), len(own)
        self.holders = _holders(site)  # of several ranks that have the same, each adds its share

    def mean(self, value: Tensor, keepdim: bool = True) -> Tensor:
        self.taken += 1
        own = value.sum(-1, keepdim=True)
        own = own if self.holders == 1 else own / self.holders
        if self.groups == 1:  # a part of the one group, wherever code has put its features
            total = reduce_for_use(vouch(own, self.site.axis, "P", "I"), self.site.axis)
            mean = vouch(total, self.site.axis, "I", "P") / self.whole
        else:
            after = self.groups - self.first - self.count
            places = reduce_for_use(F.pad(own, (0, 0, self.first, after)), self.site.axis) / self.whole
            mean = places.narrow(-2, self.first, self.count)
        return mean if keepdim else mean.squeeze(-1)

    def _mean(self, value: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Tensor:
        if not self._is_over_part(value, dim):
            return value.mean(dim, keepdim, dtype=dtype)
        return self.mean(value if dtype is None else value.to(dtype), keepdim)

    def _variance(
        self,
        value: Tensor,
        dim: Any = None,
        unbiased: bool = True,
        keepdim: bool = False,
        *,
        correction: float | None = None,
    ) -> Tensor:
        less = float(unbiased) if correction is None else correction
        if not self._is_over_part(value, dim):
            return value.var(dim, correction=less, keepdim=keepdim)
        squares = (value - self.mean(value)).pow(2)
        return self.mean(squares, keepdim) * (self.whole / (self.whole - less))

    def _deviation(self, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self._variance(value, *args, **kwargs).sqrt()

    def _is_over_part(self, value: Tensor, dim: Any) -> bool:
        dims = tuple(dim) if isinstance(dim, (tuple, list)) else (dim,)
        is_of_groups = self.groups == 1 or (value.dim() > 1 and value.shape[-2] == self.count)
        return dims in ((-1,), (value.dim() - 1,)) and value.shape[-1] == self.width and is_of_groups

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
    Tensor.var: "_variance",
    torch.var: "_variance",
    Tensor.std: "_deviation",
    torch.std: "_deviation",
    F.rms_norm: "_rms_norm",
    torch.rms_norm: "_rms_norm",
    F.layer_norm: "_layer_norm",
}


class ShardedNormBoundary(Boundary):
    """`sharded_norm`: a norm whose normalized dim is sharded; its means are taken over all ranks."""

    def __init__(self, site: Site, module: nn.Module) -> None:
        super().__init__(site, module)
        self.kind = type(module).__name__
        assert site.split is not None
        self.is_shared = shares_groups(site.split, int(site.options.get("groups", 1)))

    def __call__(self, forward: Forward, args: Arguments, kwargs: Keywords) -> Any:
        if not self.is_shared:
            return forward(*args, **kwargs)
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


class ShardedStatisticsBoundary(Boundary):
    """`sharded_statistics`: within the module, means and deviations over a part of a dim are those over all ranks.

    A module may take none: layers of one model differ in that.
    """

    def __call__(self, forward: Forward, args: Arguments, kwargs: Keywords) -> Any:
        with _MeansOverRanks(self.site):
            return forward(*args, **kwargs)
