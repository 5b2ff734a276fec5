"""Experts on ranks with batches of their own: tokens travel to their experts and come back.

2 experts on 2 ranks, one batch each; a1 and a2 are rank 0's tokens, b1 is rank 1's, and a2 wants expert 1:

    rank          0                  1
    experts       0                  1
    tokens        a1 a2              b1
    travel to     a1                 a2 b1          all-to-all, as many rows as the routing says
    come back     E0(a1) E1(a2)      E1(b1)         and are weighted where they came from

Ranks of a tp group share a batch: each sends its slice of the tokens, and the slices are gathered in the end, so no
token travels twice. No token is ever left out. Where the sequence is split, each sends the part that it has.

Legend of shape suffixes: T tokens, K slots (top-k), S = T*K pairs, E experts, H hidden, N rows that arrived here.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from parallel_plans.boundary import Arguments, Boundary, Forward, Keywords, Site
from parallel_plans.collectives import declare, listeners
from parallel_plans.compiling import untraced
from parallel_plans.experts.alignment import allow_any_width
from parallel_plans.experts.call import ExpertsCall
from parallel_plans.experts.exchange import Exchange, exchange_of
from parallel_plans.experts.permutation import Permutation, combine, permutation_of, permute, unpermute
from parallel_plans.experts.routing import Ownership, is_weights, with_identity_slot
from parallel_plans.experts.taking_part import taking_part, weights_below
from parallel_plans.layouts import Split, dealt_tokens
from parallel_plans.transitions import gather, take_own, vouch

Rows = Callable[[Tensor, Exchange], Tensor]  # what becomes of the rows that arrived


class DispatchBoundary(Boundary):
    """`ep_dispatch`: tokens to their experts and back; routing weights stay and are applied where a token came from."""

    def __init__(self, site: Site, module: nn.Module) -> None:
        super().__init__(site, module)
        allow_any_width()
        assert site.split is not None
        self.ownership = Ownership(site.split, site.own.rank, bool(site.options.get("has_identities")))
        self.experts, self.rank = site.split, site.own.rank
        self.identities = int(self.ownership.has_identities)  # ids behind the experts, served at home
        self.owned = tuple(count + self.identities for count in site.split.local_sizes)
        self.align_size = int(site.options.get("align_size", 1))

    def __call__(self, forward: Forward, args: Arguments, kwargs: Keywords) -> Any:
        if torch.compiler.is_dynamo_compiling():  # how many rows travel is known when they do
            return untraced(self, forward, args, kwargs)
        call = ExpertsCall(args, kwargs)
        is_part = self._are_split
        given: Any = call.hidden if is_part else "I"  # of a part of a sequence, what comes back lies as what set out
        call = call.mapped(lambda value: self._vouched(value, "V", value if is_part else "I"))
        if call.sizes is not None:
            output = self._of_sizes(forward, call, call.sizes)
        elif call.ids is None:
            output = self._of_stacked(forward, call)
        else:
            output = self._of_routes(forward, call).view(call.hidden.shape)
        return self._vouched(output, given, "V")

    def _vouched(self, value: Any, letter: str | Tensor, gradient: str | Tensor) -> Any:
        """The value, of which only this class knows how it lies on the ranks until the tokens are back."""
        axes = {axis.name: axis for axis in (self.site.axis, self.site.slices) if axis.size > 1}
        for axis in axes.values() if is_weights(value) else ():
            value = vouch(value, axis, letter, gradient)
        return value

    def _of_routes(self, forward: Forward, call: ExpertsCall) -> Tensor:
        """The weighted sums [T, H] for hidden states, ids and weights."""
        hidden_TH = call.hidden.reshape(-1, call.hidden.shape[-1])
        assert call.ids is not None
        assert call.weights is not None
        slices = self._slices(hidden_TH.shape[0])
        ids_TK, weights_TK = self._sliced(call.ids, slices), self._sliced(call.weights, slices)
        hidden_TH = self._sliced(hidden_TH, slices)
        permutation = permutation_of(self._addressed(ids_TK), sum(self.owned))

        def run(rows_NH: Tensor, exchange: Exchange) -> Tensor:
            return self._by_ids(forward, call, rows_NH, exchange)

        rows_SH = self._travelled(permute(hidden_TH, permutation), permutation, run)
        return self._gathered(combine(rows_SH, permutation, weights_TK).to(hidden_TH.dtype), slices)

    def _addressed(self, ids: Tensor) -> Tensor:
        """The ids in the order in which ranks own experts: each rank's, and behind them its own identity."""
        if not self.identities:
            return ids
        stops = torch.tensor(list(accumulate(self.experts.local_sizes)), device=ids.device)
        own = stops[self.rank] + self.rank
        ranks_before = torch.searchsorted(stops, ids, right=True)
        return torch.where(ids >= self.experts.size, own, ids + ranks_before)

    def _travelled(self, rows_SH: Tensor, permutation: Permutation, run: Rows, keeps_width: bool = True) -> Tensor:
        exchange = exchange_of(permutation.tokens_per_expert_E, self.owned, self.site.axis, rows_SH.shape[0])
        rows_NH = exchange.there(rows_SH)
        if rows_NH.shape[0] == 0 and keeps_width:
            output_NH = taking_part(rows_NH, *weights_below(self.module))
        else:
            output_NH = run(rows_NH, exchange)
            if self.identities:  # they may be all there was to do
                output_NH = taking_part(output_NH, *weights_below(self.module))
        return exchange.back(output_NH)

    def _by_ids(self, forward: Forward, call: ExpertsCall, rows_NH: Tensor, exchange: Exchange) -> Tensor:
        """The experts' output for every row, each row a token with one route of weight one."""
        ids_N1, permutation = exchange.local_ids().unsqueeze(1), None
        if self.align_size > 1:
            permutation = permutation_of(ids_N1, self.owned[self.rank], self.align_size)
            rows_NH, ids_N1 = self._aligned(permute(rows_NH, permutation), permutation)
        routes = with_identity_slot(ids_N1, rows_NH.new_ones(ids_N1.shape), self.ownership)
        own = call.replaced(rows_NH, *routes)
        output_NH = forward(*own.args, **own.kwargs).reshape(-1, rows_NH.shape[-1])
        if permutation is None:
            return output_NH
        return unpermute(output_NH[: permutation.source_B.shape[0]], permutation)

    def _aligned(self, rows_BH: Tensor, permutation: Permutation) -> tuple[Tensor, Tensor]:
        """The rows and their experts' ids; what lies behind the last group counts as the last expert's."""
        missing = -rows_BH.shape[0] % self.align_size
        rows_BH = torch.nn.functional.pad(rows_BH, (0, 0, 0, missing))
        stops_E = permutation.padded_per_expert_E.cumsum(0)
        places_B = torch.arange(rows_BH.shape[0], device=rows_BH.device)
        ids_B = torch.searchsorted(stops_E, places_B, right=True).clamp_(max=stops_E.shape[0] - 1)
        return rows_BH, ids_B.unsqueeze(1)

    def _of_sizes(self, forward: Forward, call: ExpertsCall, sizes: list[int]) -> Any:
        """What the experts make of rows [S, H] in expert order, whose experts' sizes are given."""
        slices = self._slices(call.hidden.shape[0])
        rows_SH = self._sliced(call.hidden, slices)
        device = rows_SH.device
        ids_S = torch.arange(len(sizes), device=device).repeat_interleave(torch.tensor(sizes, device=device))
        permutation = permutation_of(self._sliced(ids_S, slices).unsqueeze(1), len(sizes))

        def run(rows_NH: Tensor, exchange: Exchange) -> Tensor:
            own = permutation_of(exchange.local_ids().unsqueeze(1), self.owned[self.rank])
            counts = own.tokens_per_expert_E.tolist()
            there = call.replaced(permute(rows_NH, own), sizes=counts)
            return unpermute(forward(*there.args, **there.kwargs), own)

        return self._gathered(self._travelled(rows_SH, permutation, run, keeps_width=False), slices)

    def _of_stacked(self, forward: Forward, call: ExpertsCall) -> Any:
        """What the experts make of rows [E*T, H], all tokens for each expert; only rows that are not zero travel.

        A token that is not routed to an expert stands there as zeros, and gated experts without biases make zeros of
        zeros, with a gradient of zeros.
        """
        experts, width = self.experts.size, call.hidden.shape[-1]
        rows_TEH = call.hidden.unflatten(0, (experts, call.hidden.shape[0] // experts)).transpose(0, 1)
        slices = self._slices(rows_TEH.shape[0])
        rows_ETH = self._sliced(rows_TEH, slices).transpose(0, 1)
        expert_S, token_S = rows_ETH.detach().any(-1).nonzero(as_tuple=True)
        permutation = permutation_of(expert_S.unsqueeze(1), experts)

        def run(rows_NH: Tensor, exchange: Exchange) -> Tensor:
            own = permutation_of(exchange.local_ids().unsqueeze(1), self.owned[self.rank])
            return self._in_equal_groups(forward, call, permute(rows_NH, own), own)

        output_SH = self._travelled(rows_ETH[expert_S, token_S], permutation, run)
        empty = output_SH.new_zeros(rows_ETH.shape)
        output_ETH = empty.index_put((expert_S, token_S), output_SH)
        whole_TEH = self._gathered(output_ETH.transpose(0, 1), slices)
        return whole_TEH.transpose(0, 1).reshape(-1, width)

    def _in_equal_groups(self, forward: Forward, call: ExpertsCall, rows_NH: Tensor, own: Permutation) -> Tensor:
        """What experts that want as many rows each make of groups of any size."""
        counts = own.tokens_per_expert_E
        longest = int(counts.max().item())
        ids_N = torch.arange(counts.shape[0], device=counts.device).repeat_interleave(counts)
        place_N = torch.arange(rows_NH.shape[0], device=counts.device) - (counts.cumsum(0) - counts)[ids_N]
        place_N = place_N + ids_N * longest
        equal = rows_NH.new_zeros((counts.shape[0] * longest, rows_NH.shape[1])).index_put((place_N,), rows_NH)
        there = call.replaced(equal)
        return unpermute(forward(*there.args, **there.kwargs)[place_N], own)

    def _slices(self, tokens: int) -> Split | None:
        """How the tokens of a shared batch are dealt over the ranks that share it; None where nobody does."""
        axis = self.site.slices
        if axis.size == 1 or tokens == 0 or self._are_split:
            return None
        return dealt_tokens(0, tokens, axis.name, axis.size)

    @property
    def _are_split(self) -> bool:
        """Whether the tokens that come are this rank's part of a sequence."""
        sequence = self.site.sequence
        is_split = sequence is not None and sequence.split is not None
        return is_split and bool(self.site.options.get("sets_out_split"))

    def _sliced(self, value: Tensor, slices: Split | None) -> Tensor:
        if slices is not None:
            return declare(take_own(value, self.site.slices, slices, 0), self.site.slices, "V")
        return declare(value.clone(), self.site.slices, "V") if self._are_split and listeners else value

    def _gathered(self, value: Tensor, slices: Split | None) -> Tensor:
        return value if slices is None else gather(value, self.site.slices, slices, 0)
