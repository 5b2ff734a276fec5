"""The permutation that puts (token, slot) pairs into expert order, and back; tokens per expert always come with it.

    T tokens    K slots, the top-k    S pairs, T * K    E experts    H hidden    B rows of the buffer

Pair s is slot s % K of token s // K. Three tokens with two slots each, three experts, groups aligned to 2 rows:

    expert of each pair    2 0 | 0 2 | 2 0            token by token
    pair in each row       1 2 5 - | 0 3 4 - | -      expert 0, expert 2, the rest; expert 1 has no rows
    tokens per expert      3 0 3, padded 4 0 4

The buffer has as many rows as the worst routing could need, so its size is known without asking the device; nothing
here waits for it. That every permutation counts the tokens of its experts is as in TransformerEngine's moe_permute.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def worst_case_rows(pairs: int, experts: int, align_size: int) -> int:
    """Rows of the buffer: at most `align_size - 1` of padding for every expert that can have a pair at all.

    >>> worst_case_rows(6, 3, 1), worst_case_rows(6, 3, 2), worst_case_rows(2, 3, 4)
    (6, 9, 8)
    """
    return pairs + min(experts, pairs) * (align_size - 1)


@dataclass(frozen=True, kw_only=True)
class Permutation:
    """Where every (token, slot) pair lies in a buffer in expert order.

    Args:
        source_B: for every row the pair it holds; S where it holds none, between the groups and behind the last.
        place_S: for every pair its row.
        top_k: slots of a token, K.
        tokens_per_expert_E: pairs of every expert, int64, without padding.
        padded_per_expert_E: rows of every expert's group, int64: those counts rounded up to whole `align_size`.
        align_size: rows of which a group has a whole number.
    """

    source_B: Tensor
    place_S: Tensor
    top_k: int
    tokens_per_expert_E: Tensor
    padded_per_expert_E: Tensor
    align_size: int


def permutation_of(expert_ids_TK: Tensor, experts: int, align_size: int = 1) -> Permutation:
    """The permutation into expert order; pairs of one expert keep their order. Ids are integers in [0, experts)."""
    assert experts > 0, experts
    assert align_size > 0, align_size
    assert expert_ids_TK.dim() == 2, tuple(expert_ids_TK.shape)
    ids_S, pairs_S = expert_ids_TK.long().flatten().sort(stable=True)  # in expert order from here
    # not bincount, which asks the device for the largest id
    stops_E = torch.searchsorted(ids_S, torch.arange(experts, device=ids_S.device), right=True)
    counts_E = stops_E.diff(prepend=stops_E.new_zeros(1))
    padded_E = (counts_E + (align_size - 1)) // align_size * align_size
    padding_before_E = (padded_E.cumsum(0) - padded_E) - (stops_E - counts_E)
    pairs = ids_S.numel()
    rows_S = torch.arange(pairs, device=ids_S.device) + padding_before_E.index_select(0, ids_S)
    empty_B = ids_S.new_full((worst_case_rows(pairs, experts, align_size),), pairs)
    return Permutation(
        source_B=empty_B.scatter(0, rows_S, pairs_S),
        place_S=torch.empty_like(rows_S).scatter(0, pairs_S, rows_S),
        top_k=expert_ids_TK.shape[1],
        tokens_per_expert_E=counts_E,
        padded_per_expert_E=padded_E,
        align_size=align_size,
    )


# Autograd's own gradient of a gather is a scatter that adds, in an order that varies on a GPU and in the precision of
# the values. Each of these two gathers is the gradient of the other, so gradients of gradients are right too.


class _Spread(torch.autograd.Function):
    """Rows [B, ...] of values [S / copies, ...], each shared by `copies` pairs in a row; zeros where no pair is."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, source_B: Tensor, place_S: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(source_B, place_S)
        ctx.copies = copies
        if source_B.numel() > place_S.numel():
            values = torch.cat([values, values.new_zeros(1, *values.shape[1:])])  # what S // copies points at
        return values.index_select(0, source_B // copies)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return _Collect.apply(gradient, *ctx.saved_tensors, ctx.copies), None, None, None


class _Collect(torch.autograd.Function):
    """Values [S / copies, ...], each the sum of the rows of its `copies` pairs; the other rows are not looked at."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, source_B: Tensor, place_S: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(source_B, place_S)
        ctx.copies = copies
        pairs = rows.index_select(0, place_S)
        return pairs if copies == 1 else pairs.unflatten(0, (place_S.numel() // copies, copies)).sum(1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return _Spread.apply(gradient, *ctx.saved_tensors, ctx.copies), None, None, None


def _spread(values: Tensor, permutation: Permutation, copies: int) -> Tensor:
    assert values.shape[0] * copies == permutation.place_S.numel(), (tuple(values.shape), copies)
    return _Spread.apply(values, permutation.source_B, permutation.place_S, copies)


def permute(tokens_TH: Tensor, permutation: Permutation) -> Tensor:
    """Rows [B, H] in expert order: every pair's token, zeros in padding. A token's gradient sums over its pairs."""
    return _spread(tokens_TH, permutation, permutation.top_k)


def permute_pairs(values_S: Tensor, permutation: Permutation) -> Tensor:
    """Rows [B, ...] in expert order of values [S, ...] that each pair has of its own, such as routing weights."""
    return _spread(values_S, permutation, 1)


def unpermute(rows_BH: Tensor, permutation: Permutation) -> Tensor:
    """Every pair's row [S, H], in the order of tokens and slots, bit by bit."""
    assert rows_BH.shape[0] == permutation.source_B.numel(), tuple(rows_BH.shape)
    return _Collect.apply(rows_BH, permutation.source_B, permutation.place_S, 1)


def combine(rows_BH: Tensor, permutation: Permutation, weights_TK: Tensor) -> Tensor:
    """Tokens [T, H], each the weighted sum of its slots' rows, in the rows' dtype.

    Summed in float32, or wider where the rows or the weights are, in the same order in every run.
    """
    assert weights_TK.numel() == permutation.place_S.numel(), tuple(weights_TK.shape)
    pairs_TKH = unpermute(rows_BH, permutation).unflatten(0, weights_TK.shape)
    weights_TK1 = weights_TK.to(torch.promote_types(weights_TK.dtype, torch.float32)).unsqueeze(-1)
    return (pairs_TKH * weights_TK1).sum(1).to(rows_BH.dtype)
