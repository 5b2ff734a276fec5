"""Boundaries of the styles whose row says more than letters can."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from parallel_plans.boundary import Arguments, Boundary, Forward, Keywords, Site, change_first
from parallel_plans.collectives import declare
from parallel_plans.sums import deliver_sum
from parallel_plans.transitions import replicate, vouch


class VocabularyBoundary(Boundary):
    """`embedding_rowwise`: every rank looks up the tokens it holds, the others give zeros, the sum is the embedding.

    ranks      0: rows 0 to 3        1: rows 4 to 7
    tokens     [2, 5]                [2, 5]
    looked up  [row 2, zeros]        [zeros, row 5]
    """

    def __init__(self, site: Site, module: nn.Module) -> None:
        super().__init__(site, module)
        assert site.split is not None
        self.start, self.stop = site.split.ranges[site.axis.rank][0]
        # The padding row's gradient is zero on the rank that holds it; the index is a local one, for all but others.
        # What the whole embedding has is kept: the boundary may be attached again.
        padding = vars(module).setdefault("whole_padding_idx", getattr(module, "padding_idx", None))
        if padding is not None:
            is_here = self.start <= padding < self.stop
            module.padding_idx = padding - self.start if is_here else None  # type: ignore[assignment]
        self.last = max(self.stop - self.start - 1, 0)
        # torch's own gives a new tensor, which its backward does not read
        self.is_new = getattr(module.forward, "__func__", None) is nn.Embedding.forward

    def __call__(self, forward: Forward, args: Arguments, kwargs: Keywords) -> Any:
        absent: Tensor | None = None

        def localize(tokens: Tensor) -> Tensor:
            nonlocal absent
            own = tokens - self.start
            index = own.clamp(0, self.last)
            absent = index != own
            return declare(index, self.site.axis, "V")

        args, kwargs = change_first(localize, args, kwargs)
        output = forward(*args, **kwargs)
        assert absent is not None
        absent = absent.unsqueeze(-1)
        own = output.masked_fill_(absent, 0) if self.is_new else output.masked_fill(absent, 0)
        own = vouch(own, self.site.axis, "P", "V")
        return deliver_sum(own, self.site.axis, in_place=True, delay=self.site.may_delay)


class RopePartBoundary(Boundary):
    """`mla_kv_a_proj`: the last `rope` features of the output go to every rank's heads, so their gradient is summed."""

    def __init__(self, site: Site, module: nn.Module) -> None:
        super().__init__(site, module)
        self.rope = int(site.options["rope"])

    def __call__(self, forward: Forward, args: Arguments, kwargs: Keywords) -> Any:
        output = forward(*args, **kwargs)
        latent, rope = output.split([output.shape[-1] - self.rope, self.rope], dim=-1)
        return torch.cat([latent, replicate(rope, self.site.axis)], dim=-1)


class IdentityExpertBoundary(Boundary):
    """`moe_identity_expert`: a module that passes its input on, in a block whose output is summed over the ranks."""

    def __call__(self, forward: Forward, args: Arguments, kwargs: Keywords) -> Any:
        axis = self.site.axis
        args, kwargs = change_first(lambda value: vouch(value / axis.size, axis, "P", "P"), args, kwargs)
        return forward(*args, **kwargs)
