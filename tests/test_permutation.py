"""The permutation into expert order, held against plain loops over tokens and slots.

T tokens    K slots    S pairs, T * K    E experts    H hidden    B rows of the buffer
"""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from parallel_plans.experts.permutation import (
    Permutation,
    combine,
    permutation_of,
    permute,
    permute_pairs,
    unpermute,
    worst_case_rows,
)

HIDDEN = 3


def drawn(tokens: int, slots: int, experts: int, seed: int = 0) -> Tensor:
    return torch.randint(experts, (tokens, slots), generator=torch.Generator().manual_seed(seed))


# name -> expert of every (token, slot) pair, number of experts
ROUTINGS: dict[str, tuple[Tensor, int]] = {
    "random": (drawn(23, 2, 5), 5),
    "many slots": (drawn(7, 4, 6, seed=1), 6),
    "one slot": (drawn(17, 1, 3, seed=2), 3),
    "fewer pairs than experts": (drawn(2, 2, 9, seed=3), 9),
    "no tokens": (drawn(0, 2, 4), 4),
    "one token": (drawn(1, 2, 4, seed=4), 4),
    "all to one expert": (torch.full((6, 2), 2), 4),
    "experts without tokens": (drawn(9, 2, 3, seed=5) * 2 + 1, 8),  # only 1, 3 and 5
    "one expert": (torch.zeros(5, 2, dtype=torch.int64), 1),
}
ALIGN_SIZES = (1, 2, 8)
each_routing = pytest.mark.parametrize("routing", ROUTINGS)
each_align_size = pytest.mark.parametrize("align_size", ALIGN_SIZES)


def pair_of_row(routing: str, align_size: int) -> list[int | None]:
    """For every row the pair it holds, by plain loops; None in padding."""
    ids, experts = ROUTINGS[routing]
    rows: list[int | None] = []
    for expert in range(experts):
        rows += [pair for pair, of in enumerate(ids.flatten().tolist()) if of == expert]
        rows += [None] * (-len(rows) % align_size)
    return rows + [None] * (worst_case_rows(ids.numel(), experts, align_size) - len(rows))


def made(routing: str, align_size: int) -> Permutation:
    ids, experts = ROUTINGS[routing]
    return permutation_of(ids, experts, align_size)


def numbers(*shape: int, seed: int = 7) -> Tensor:
    """Small integers in float64, none of them zero: sums and products are exact in any order."""
    return torch.randint(1, 50, shape, generator=torch.Generator().manual_seed(seed)).double()


def tokens_of(routing: str) -> Tensor:
    return numbers(len(ROUTINGS[routing][0]), HIDDEN)


def padding_of(routing: str, align_size: int) -> Tensor:
    return torch.tensor([pair is None for pair in pair_of_row(routing, align_size)], dtype=torch.bool)


def test_the_drawing_in_the_module_is_what_happens() -> None:
    permutation = permutation_of(torch.tensor([[2, 0], [0, 2], [2, 0]]), 3, 2)
    assert permutation.source_B.tolist() == [1, 2, 5, 6, 0, 3, 4, 6, 6]
    assert permutation.tokens_per_expert_E.tolist() == [3, 0, 3]
    assert permutation.padded_per_expert_E.tolist() == [4, 0, 4]
    assert (worst_case_rows(6, 3, 1), worst_case_rows(6, 3, 2), worst_case_rows(2, 3, 4)) == (6, 9, 8)


@each_align_size
@each_routing
def test_tokens_per_expert_are_counted_without_padding(routing: str, align_size: int) -> None:
    ids, experts = ROUTINGS[routing]
    counts = made(routing, align_size).tokens_per_expert_E
    assert counts.dtype == torch.int64
    assert counts.tolist() == [ids.flatten().tolist().count(expert) for expert in range(experts)]


@each_align_size
@each_routing
def test_padded_counts_are_the_next_whole_multiple_and_zero_stays_zero(routing: str, align_size: int) -> None:
    permutation = made(routing, align_size)
    padded = permutation.padded_per_expert_E
    assert padded.dtype == torch.int64
    assert padded.tolist() == [-(-n // align_size) * align_size for n in permutation.tokens_per_expert_E.tolist()]


@each_align_size
@each_routing
def test_rows_lie_by_expert_then_by_token_then_by_slot(routing: str, align_size: int) -> None:
    permutation, pairs = made(routing, align_size), ROUTINGS[routing][0].numel()
    rows = pair_of_row(routing, align_size)
    assert permutation.source_B.tolist() == [pairs if pair is None else pair for pair in rows]
    assert permutation.place_S.tolist() == [rows.index(pair) for pair in range(pairs)]


@pytest.mark.parametrize(("experts", "align_size"), list(product((1, 2, 3), (1, 2, 3))))
@pytest.mark.parametrize("pairs", range(5))
def test_no_routing_needs_more_than_the_worst_case_and_some_needs_that(
    pairs: int, experts: int, align_size: int
) -> None:
    used = []
    for ids in product(range(experts), repeat=pairs):
        permutation = permutation_of(torch.tensor(ids, dtype=torch.int64).view(pairs, 1), experts, align_size)
        assert permutation.source_B.shape == (worst_case_rows(pairs, experts, align_size),)
        used.append(int(permutation.padded_per_expert_E.sum()))
    # groups are whole multiples, so of a worst case between two multiples the lower one is reached
    assert max(used) == worst_case_rows(pairs, experts, align_size) // align_size * align_size


@each_align_size
@each_routing
def test_every_row_is_its_pairs_token_and_padding_is_zero_whatever_the_tokens(routing: str, align_size: int) -> None:
    tokens, slots = tokens_of(routing), ROUTINGS[routing][0].shape[1]
    rows = permute(tokens, made(routing, align_size))
    plain = [[0.0] * HIDDEN if p is None else tokens[p // slots].tolist() for p in pair_of_row(routing, align_size)]
    assert rows.tolist() == plain
    nowhere = permute(torch.full_like(tokens, torch.nan), made(routing, align_size)).nan_to_num(1)
    assert torch.equal(nowhere.eq(0).all(-1), padding_of(routing, align_size))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@each_align_size
@each_routing
def test_unpermute_gives_back_every_pair_bit_by_bit(routing: str, align_size: int, dtype: torch.dtype) -> None:
    (ids, _), permutation = ROUTINGS[routing], made(routing, align_size)
    draw = torch.Generator().manual_seed(3)
    tokens = torch.randn(len(ids), HIDDEN, generator=draw, dtype=torch.float64).to(dtype)
    pairs = torch.randn(ids.numel(), 2, 2, generator=draw, dtype=torch.float64).to(dtype)
    weights = torch.randn(ids.numel(), generator=draw, dtype=torch.float64).to(dtype)
    assert torch.equal(unpermute(permute(tokens, permutation), permutation), tokens.repeat_interleave(ids.shape[1], 0))
    assert torch.equal(unpermute(permute_pairs(pairs, permutation), permutation), pairs)
    assert torch.equal(unpermute(permute_pairs(weights, permutation), permutation), weights)
    assert permute(tokens, permutation).dtype == dtype


@each_align_size
@each_routing
def test_combine_is_the_plain_sum_over_slots(routing: str, align_size: int) -> None:
    (ids, _), permutation = ROUTINGS[routing], made(routing, align_size)
    rows = numbers(len(permutation.source_B), HIDDEN)
    weights = numbers(*ids.shape, seed=8)
    plain, place = torch.zeros(len(ids), HIDDEN, dtype=torch.float64), permutation.place_S.tolist()
    for token, slot in product(range(ids.shape[0]), range(ids.shape[1])):
        plain[token] += weights[token, slot] * rows[place[token * ids.shape[1] + slot]]
    assert torch.equal(combine(rows, permutation, weights), plain)


# Two slots whose weighted rows cancel but for what the narrower dtype cannot hold, whichever is added first.
@pytest.mark.parametrize(
    ("row_dtype", "weight_dtype", "rows", "weights", "rest"),
    [
        (torch.bfloat16, torch.bfloat16, (1 + 2**-7, -1), (1 + 2**-7, 1 + 2**-6), 2**-14),
        (torch.float16, torch.float16, (1 + 2**-10, -1), (1 + 2**-10, 1 + 2**-9), 2**-20),
        (torch.bfloat16, torch.float32, (1, -1), (1 + 2**-20, 1), 2**-20),
        (torch.float32, torch.float64, (1, -1), (1 + 2**-40, 1), 2**-40),
        (torch.float64, torch.bfloat16, (1 + 2**-40, -1), (1, 1), 2**-40),
    ],
)
def test_combine_sums_in_float32_or_wider_and_returns_the_rows_dtype(
    row_dtype: torch.dtype, weight_dtype: torch.dtype, rows: tuple, weights: tuple, rest: float
) -> None:
    permutation = permutation_of(torch.tensor([[0, 1]]), 2)
    given = torch.tensor(rows, dtype=row_dtype).unsqueeze(1)
    combined = combine(given, permutation, torch.tensor([weights], dtype=weight_dtype))
    assert combined.dtype == row_dtype
    assert combined.item() == rest


@each_align_size
@pytest.mark.parametrize("routing", ["random", "fewer pairs than experts", "one token", "all to one expert"])
def test_gradients_and_their_gradients_are_those_of_finite_differences(routing: str, align_size: int) -> None:
    (ids, _), permutation = ROUTINGS[routing], made(routing, align_size)

    def leaf(*shape: int) -> Tensor:
        draw = torch.Generator().manual_seed(len(shape))
        return torch.randn(shape, generator=draw, dtype=torch.float64).requires_grad_()

    rows = leaf(len(permutation.source_B), 2)
    for function, values in (
        (lambda tokens: permute(tokens, permutation) ** 2, (leaf(len(ids), 2),)),
        (lambda pairs: permute_pairs(pairs, permutation) ** 2, (leaf(ids.numel()),)),
        (lambda rows: unpermute(rows, permutation) ** 2, (rows,)),
        (lambda rows, weights: combine(rows, permutation, weights), (rows, leaf(*ids.shape))),
    ):
        assert gradcheck(function, values)
        assert gradgradcheck(function, values)


@each_align_size
@each_routing
def test_a_tokens_gradient_sums_over_its_pairs_and_padding_gives_none(routing: str, align_size: int) -> None:
    (ids, _), permutation = ROUTINGS[routing], made(routing, align_size)
    tokens = tokens_of(routing).requires_grad_()
    gradient = numbers(len(permutation.source_B), HIDDEN)
    plain = torch.zeros_like(tokens)
    for row, pair in enumerate(pair_of_row(routing, align_size)):
        if pair is None:
            gradient[row] = torch.nan  # were it looked at, it would be seen
        else:
            plain[pair // ids.shape[1]] += gradient[row]
    permute(tokens, permutation).backward(gradient)
    assert tokens.grad is not None
    assert torch.equal(tokens.grad, plain)


def test_a_tokens_gradient_is_rounded_once() -> None:
    tokens = torch.zeros(1, 1, dtype=torch.bfloat16, requires_grad=True)
    rows = permute(tokens, permutation_of(torch.tensor([[0, 1, 2]]), 3))
    rows.backward(torch.tensor([[256.0], [1.0], [1.0]], dtype=torch.bfloat16))  # in bfloat16, 256 + 1 is 256
    assert tokens.grad is not None
    assert tokens.grad.item() == 258


@each_align_size
@each_routing
def test_rows_of_padding_get_a_gradient_of_zero(routing: str, align_size: int) -> None:
    permutation = made(routing, align_size)
    rows = numbers(len(permutation.source_B), HIDDEN).requires_grad_()
    weights = numbers(*ROUTINGS[routing][0].shape)
    for output in (unpermute(rows, permutation), combine(rows, permutation, weights)):
        (gradient,) = torch.autograd.grad(output.sum(), rows)
        assert torch.equal(gradient.eq(0).all(-1), padding_of(routing, align_size))


@each_align_size
def test_without_tokens_every_gradient_is_there_and_empty(align_size: int) -> None:
    permutation = made("no tokens", align_size)
    leaves = [numbers(0, HIDDEN), numbers(0), numbers(0, 2)]
    tokens, scales, weights = (leaf.requires_grad_() for leaf in leaves)
    rows = permute(tokens, permutation) * permute_pairs(scales, permutation).unsqueeze(-1)
    (combine(rows, permutation, weights).sum() + unpermute(rows, permutation).sum()).backward()
    assert [None if leaf.grad is None else leaf.grad.shape for leaf in leaves] == [leaf.shape for leaf in leaves]


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_ids_may_be_any_integers_in_any_strides(dtype: torch.dtype) -> None:
    ids, experts = ROUTINGS["random"]
    strided = ids.to(dtype).t().contiguous().t()
    assert not strided.is_contiguous()
    assert torch.equal(permutation_of(strided, experts, 2).source_B, made("random", 2).source_B)
    assert torch.equal(permutation_of(strided, experts, 2).place_S, made("random", 2).place_S)


def test_nothing_waits_for_the_device() -> None:
    """Meta tensors have no numbers, so whatever would read one on the host raises."""
    ids = torch.zeros(6, 2, dtype=torch.int64, device="meta")
    for waiting in (Tensor.tolist, Tensor.item, Tensor.cpu, Tensor.bincount, Tensor.nonzero):
        with pytest.raises((RuntimeError, NotImplementedError)):
            waiting(ids.flatten())
    permutation = permutation_of(ids, 4, 8)
    tokens, weights = (torch.zeros(6, n, device="meta", requires_grad=True) for n in (HIDDEN, 2))
    rows = permute(tokens, permutation) * permute_pairs(weights.flatten(), permutation).unsqueeze(-1)
    (combine(rows, permutation, weights).sum() + unpermute(rows, permutation).sum()).backward()
    assert rows.shape == (worst_case_rows(12, 4, 8), HIDDEN)
    assert tokens.grad is not None
    assert weights.grad is not None
    assert {tokens.grad.device.type, weights.grad.device.type} == {"meta"}
