"""Routes on ranks that share one batch: each rank keeps those to its own experts, the others get a sentinel.

4 experts on 2 ranks, top-2; a token picks experts 1 and 2 with the weights w and v:

    rank            0              1
    experts         0 1            2 3
    ids             [1, 2]         [2, 0]         2 is the sentinel: as many as the rank has experts
    weights         [w, 0]         [0, v]

Legend of shape suffixes: T tokens, K slots (top-k), S = T*K pairs, E experts, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from parallel_plans.boundary import Arguments, Boundary, Forward, Keywords, Site, change_first
from parallel_plans.collectives import Axis, declare
from parallel_plans.forks import remember_replicated, replicate_group, replicate_once, whole_of
from parallel_plans.layouts import Split

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8)


class Ownership:
    """Which experts this rank holds, and what their ids are here.

    `has_identities`: ids behind the last expert mean experts without weights; one rank takes all of these.
    """

    def __init__(self, split: Split, rank: int, has_identities: bool = False) -> None:
        self.split, self.rank, self.has_identities = split, rank, has_identities
        ranges = split.ranges[rank]
        assert len(ranges) <= 1, "a rank's experts lie side by side"
        self.start, self.stop = ranges[0] if ranges else (0, 0)
        self.count = self.stop - self.start

    @property
    def sentinel(self) -> int:
        """The id of a route to an expert of another rank."""
        return self.count + self.has_identities

    def local_ids(self, ids: Tensor, identities_here: bool) -> tuple[Tensor, Tensor]:
        """The ids as this rank counts its experts, with the sentinel for those of others; and where these are."""
        absent = (ids < self.start) | (ids >= self.stop)
        local = (ids - self.start).masked_fill(absent, self.sentinel)
        if self.has_identities and identities_here:
            identity = ids >= self.split.size
            local, absent = local.masked_fill(identity, self.count), absent & ~identity
        return local, absent


def masked_routes(ids: Tensor, weights: Tensor, owned: Ownership, axis: Axis) -> tuple[Tensor, Tensor]:
    """The routes to this rank's experts, the others with the sentinel for an id and zero for a weight."""
    local, absent = owned.local_ids(ids, identities_here=owned.rank == 0)
    return declare(local, axis, "V"), declare(weights.masked_fill(absent, 0), axis, "V")


def is_ids(value: Any) -> bool:
    """Whether a value can be the ids of experts."""
    return isinstance(value, Tensor) and value.dtype in _INTEGERS


def is_weights(value: Any) -> bool:
    """Whether a value can be routing weights, or hidden states."""
    return isinstance(value, Tensor) and value.is_floating_point()


class RouterBoundary(Boundary):
    """`ep_router`, `moe_router`: what a router gives out, as the ranks of a shared batch need it.

    It routes by what is the same on every rank; the weights it gives are used differently by each (I -> R).

    What routers give, and what becomes of it:
      (logits, weights [T, K], ids [T, K]) or (weights, ids) in any order: weights I -> R and zero, ids with the
        sentinel, for routes to other ranks. Weights are the float tensor of the ids' shape that is nearest before them.
      (scores [T, E], logits [T, E]) (llama4): the scores I -> R, and of them this rank's columns.
      (pairs in expert order, their tokens, their weights, experts' sizes as a list, logits) (jetmoe): this rank's
        stretch of the pairs, weights I -> R, and its experts' sizes.
    Logits stay whole: losses on them are the same on every rank.
    """

    def __init__(self, site: Site, module: nn.Module) -> None:
        super().__init__(site, module)
        identities = bool(site.options.get("has_identities"))
        self.owned = None if site.split is None else Ownership(site.split, site.own.rank, identities)

    def __call__(self, forward: Forward, args: Arguments, kwargs: Keywords) -> Any:
        # what routes is the same on every rank, also where the block around it has made its input an R
        taken: list[Tensor] = []

        def whole(value: Tensor) -> Tensor:
            taken.append(whole_of(value))
            return taken[0]

        args, kwargs = change_first(whole, args, kwargs)
        output = forward(*args, **kwargs)
        items = list(output) if isinstance(output, (tuple, list)) else [output]
        self._route(items, taken[0])
        return items[0] if isinstance(output, Tensor) else type(output)(items)

    def _used(self, weights: Tensor) -> Tensor:
        return replicate_once(weights, self.site.axis)

    def _route(self, items: list[Any], hidden: Tensor) -> None:
        sizes = next((at for at, item in enumerate(items) if isinstance(item, list)), None)
        if sizes is not None:
            self._stretch(items, sizes)
            return
        ids = next((at for at, item in enumerate(items) if is_ids(item)), None)
        if ids is None:
            self._columns(items)
            return
        order = [*range(ids - 1, -1, -1), *range(ids + 1, len(items))]
        fitting = (at for at in order if is_weights(items[at]) and items[at].shape == items[ids].shape)
        weights = next(fitting, None)
        if weights is None:
            raise TypeError(f"{self.site.name} gives expert ids without weights of their shape; ep_router wants both")
        whole = items[weights]
        # the experts most often take what their router takes, and their gradients come at the same time
        items[weights] = replicate_group((hidden, whole), self.site.axis)[1]
        if self.owned is not None:
            items[ids], items[weights] = masked_routes(items[ids], items[weights], self.owned, self.site.own)
            remember_replicated(items[weights], self.site.axis, whole)

    def _columns(self, items: list[Any]) -> None:
        at = next((at for at, item in enumerate(items) if is_weights(item)), None)
        if at is None or (self.owned is not None and items[at].shape[-1] != self.owned.split.size):
            raise TypeError(f"{self.site.name} gives neither expert ids nor a score for each of the experts")
        whole = items[at]
        items[at] = self._used(whole)
        if self.owned is not None:
            items[at] = declare(items[at].narrow(-1, self.owned.start, self.owned.count), self.site.own, "V")
            remember_replicated(items[at], self.site.axis, whole)

    def _stretch(self, items: list[Any], at: int) -> None:
        sizes, owned = items[at], self.owned
        pairs = sum(sizes)
        start, stop = (0, len(sizes)) if owned is None else (owned.start, owned.stop)
        items[at] = sizes[start:stop]
        for index, whole in enumerate(items):
            if not isinstance(whole, Tensor) or whole.dim() != 1 or whole.shape[0] != pairs:
                continue
            own = self._used(whole) if is_weights(whole) else whole
            items[index] = own.narrow(0, sum(sizes[:start]), sum(items[at]))
            if is_weights(whole):
                remember_replicated(items[index], self.site.axis, whole)


def with_identity_slot(ids_N1: Tensor, weights_N1: Tensor, owned: Ownership) -> tuple[Tensor, Tensor]:
    """The routes with a second slot of weight zero that costs nothing, where there are identities: longcat_flash's loop
    over experts fails on a single slot.
    """
    if not owned.has_identities:
        return ids_N1, weights_N1
    idle_N1 = torch.full_like(ids_N1, owned.count)
    return torch.cat([ids_N1, idle_N1], dim=1), torch.cat([weights_N1, torch.zeros_like(weights_N1)], dim=1)


Experts = Callable[[Tensor, Tensor, Tensor], Tensor]


def on_own_routes(experts: Experts, hidden: Tensor, ids_TK: Tensor, weights_TK: Tensor, owned: Ownership) -> Tensor:
    """The experts' weighted sum for hidden states `[..., H]`, run on the routes to this rank alone, one row each.

    For experts that have no room for a sentinel. The sum is zero for a token without such a route.
    """
    hidden_TH = hidden.reshape(-1, hidden.shape[-1])
    token_N, slot_N = (ids_TK != owned.sentinel).nonzero(as_tuple=True)
    output_TH = torch.zeros_like(hidden_TH)
    if token_N.shape[0] == 0:
        return output_TH.view(hidden.shape)
    routes = with_identity_slot(ids_TK[token_N, slot_N, None], weights_TK[token_N, slot_N, None], owned)
    rows_NH = experts(hidden_TH[token_N], *routes).reshape(-1, hidden.shape[-1])
    return output_TH.index_add(0, token_N, rows_NH.to(output_TH.dtype)).view(hidden.shape)
