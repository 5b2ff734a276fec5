"""Rows exchanged between real ranks: where they arrive, how they come back, gradients, collectives, and waits.

The truth is one process that has all ranks' tokens and all experts, in float64.

    T tokens    K slots    S pairs, T * K    E experts    H hidden    R rows received
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_on_ranks
from torch import Tensor
from waits import noted_waits

from parallel_plans.collectives import Axis, Call, record_collectives
from parallel_plans.experts.exchange import Exchange, exchange_of
from parallel_plans.experts.permutation import Permutation, combine, permutation_of, permute
from parallel_plans.transitions import exchange

EXACT = 1e-12  # of the largest value, in float64
HIDDEN = 3
SLOTS = 2
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64)


@dataclass(frozen=True)
class Case:
    """Experts that each rank owns, tokens that each rank has, experts that tokens choose from (None: all)."""

    owned: tuple[int, ...]
    tokens: tuple[int, ...]
    chosen: tuple[int, ...] | None = None

    @property
    def ranks(self) -> int:
        return len(self.owned)


CASES = {
    "even, 2 ranks": Case((2, 2), (5, 5)),
    "uneven, 2 ranks": Case((3, 1), (4, 7)),
    "a rank that owns none, 2 ranks": Case((0, 3), (3, 2)),
    "a rank without tokens, 2 ranks": Case((2, 2), (0, 6)),
    "a rank whose experts get none, 2 ranks": Case((2, 2), (5, 4), (0, 1)),
    "no tokens at all, 2 ranks": Case((2, 2), (0, 0)),
    "all to one expert, 2 ranks": Case((1, 3), (4, 3), (2,)),
    "even, 4 ranks": Case((2, 2, 2, 2), (5, 5, 5, 5)),
    "uneven, 4 ranks": Case((2, 1, 3, 1), (6, 2, 9, 4)),
    "a rank that owns none, 4 ranks": Case((3, 0, 0, 2), (3, 4, 1, 2)),
    "ranks without tokens, 4 ranks": Case((2, 1, 3, 1), (0, 7, 0, 3)),
    "ranks whose experts get none, 4 ranks": Case((2, 1, 3, 1), (4, 4, 4, 4), (1, 5)),
    "no tokens at all, 4 ranks": Case((2, 1, 3, 1), (0, 0, 0, 0)),
    "all to one expert, 4 ranks": Case((2, 1, 3, 1), (4, 3, 2, 1), (4,)),
}
each_case = pytest.mark.parametrize("name", CASES)


class Problem:
    """What all ranks have together, the same numbers on every rank."""

    def __init__(self, case: Case) -> None:
        draw = torch.Generator().manual_seed(11)
        self.owned, self.tokens, self.experts = case.owned, case.tokens, sum(case.owned)
        chosen = torch.tensor(case.chosen or range(self.experts))
        count = sum(case.tokens)
        self.ids_TK = chosen[torch.randint(len(chosen), (count, SLOTS), generator=draw)]
        self.x_TH, self.factor_TH = (torch.randn(count, HIDDEN, generator=draw, dtype=torch.float64) for _ in "xf")
        self.weights_TK = torch.rand(count, SLOTS, generator=draw, dtype=torch.float64)
        self.w_EHH = torch.randn(self.experts, HIDDEN, HIDDEN, generator=draw, dtype=torch.float64)

    def tokens_on(self, rank: int) -> slice:
        ends = [0, *accumulate(self.tokens)]
        return slice(ends[rank], ends[rank + 1])

    def experts_on(self, rank: int) -> range:
        ends = [0, *accumulate(self.owned)]
        return range(ends[rank], ends[rank + 1])

    def permutation(self, rank: int) -> Permutation:
        return permutation_of(self.ids_TK[self.tokens_on(rank)], self.experts)

    def sent(self, rank: int) -> list[tuple[int, int, int]]:
        """(source rank, expert, pair) of the rows that a rank sends, by a plain sort."""
        ids = self.ids_TK[self.tokens_on(rank)].flatten().tolist()
        return [(rank, expert, pair) for expert, pair in sorted(zip(ids, range(len(ids)), strict=True))]

    def arriving(self, rank: int) -> list[tuple[int, int, int]]:
        """Those that a rank is sent."""
        mine = self.experts_on(rank)
        return [row for source in range(len(self.owned)) for row in self.sent(source) if row[1] in mine]

    def told(self, rows: list[tuple[int, int, int]]) -> Tensor:
        """Rows that say who they are."""
        return torch.tensor(rows, dtype=torch.int64).view(-1, 3)

    def leaves(self, rank: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, routing weights and expert weights, of one rank or of all."""
        tokens = slice(None) if rank is None else self.tokens_on(rank)
        experts = list(range(self.experts) if rank is None else self.experts_on(rank))
        leaves = self.x_TH[tokens], self.weights_TK[tokens], self.w_EHH[experts]
        return tuple(leaf.clone().requires_grad_() for leaf in leaves)


def applied(rows_RH: Tensor, ids_R: Tensor, w_EHH: Tensor) -> Tensor:
    """What the experts make of rows."""
    return torch.tanh(rows_RH.unsqueeze(1) @ w_EHH.index_select(0, ids_R)).squeeze(1)


def output_and_gradients(outputs: Callable[..., Tensor], leaves: Sequence[Tensor], factor: Tensor) -> list[Tensor]:
    output = outputs(*leaves)
    return [output.detach(), *torch.autograd.grad((factor * output**3).sum(), leaves)]


def in_one_process(problem: Problem) -> list[Tensor]:
    """Output and gradients of all ranks together: every slot's expert, weighted and summed."""

    def outputs(x_TH: Tensor, weights_TK: Tensor, w_EHH: Tensor) -> Tensor:
        slots = [applied(x_TH, problem.ids_TK[:, k], w_EHH) * weights_TK[:, k, None] for k in range(SLOTS)]
        return torch.stack(slots).sum(0)

    return output_and_gradients(outputs, problem.leaves(), problem.factor_TH)


def on_ranks(problem: Problem, axis: Axis, *, gradients: bool = True) -> list[Tensor]:
    """This rank's output and gradients, its rows sent to the ranks of their experts and back."""
    permutation = problem.permutation(axis.rank)

    def outputs(x_TH: Tensor, weights_TK: Tensor, w_EHH: Tensor) -> Tensor:
        route = exchange_of(permutation.tokens_per_expert_E, problem.owned, axis, problem.ids_TK.numel())
        rows = applied(route.there(permute(x_TH, permutation)), route.local_ids(), w_EHH)
        return combine(route.back(rows), permutation, weights_TK)

    leaves = problem.leaves(axis.rank)
    if not gradients:
        return [outputs(*(leaf.detach() for leaf in leaves))]
    return output_and_gradients(outputs, leaves, problem.factor_TH[problem.tokens_on(axis.rank)])


def off(got: Tensor, want: Tensor) -> float:
    """By how much of the largest true value the worst one is off; infinite where the shapes differ."""
    if got.shape != want.shape:
        return float("inf")
    return float(((got - want).abs().max() / want.abs().max().clamp(min=1e-300)) if want.numel() else 0)


def parts(problem: Problem, whole: list[Tensor], rank: int) -> list[Tensor]:
    tokens, experts = problem.tokens_on(rank), list(problem.experts_on(rank))
    return [whole[0][tokens], whole[1][tokens], whole[2][tokens], whole[3][experts]]


def journey(problem: Problem, route: Exchange, rank: int) -> dict[str, Any]:
    """Rows that say who they are, there and back, in every dtype."""
    sent, arrived = problem.told(problem.sent(rank)), problem.told(problem.arriving(rank))
    there = {dtype: route.there(sent.to(dtype)) for dtype in DTYPES}
    return {
        "arrived": [torch.equal(there[dtype], arrived.to(dtype)) for dtype in DTYPES],
        "came back": [torch.equal(route.back(there[dtype]), sent.to(dtype)) for dtype in DTYPES],
        "one dim": torch.equal(route.there(sent[:, 2]), arrived[:, 2]),
        "local ids": route.local_ids().tolist(),
        "received": route.received.tolist(),
        "splits": (route.send, route.receive),
    }


def strided_gradients(problem: Problem, route: Exchange, rank: int) -> tuple[bool, bool]:
    """Whether gradients that are expanded, and transposed, come back to the rows they belong to."""
    rows = problem.told(problem.sent(rank)).double().requires_grad_()
    (expanded,) = torch.autograd.grad(route.there(rows).sum(), rows)
    there = route.there(rows).t()
    (transposed,) = torch.autograd.grad((there * there.detach()).sum(), rows)
    return torch.equal(expanded, torch.ones_like(rows)), torch.equal(transposed, rows.detach())


def second_order(problem: Problem, route: Exchange, rank: int) -> float:
    """How far the gradient of the sum of squares of a gradient is off, of a loss that every rank scales on its own."""
    x = problem.x_TH[problem.tokens_on(rank)].repeat_interleave(SLOTS, 0).requires_grad_()
    loss = (rank + 2) * (route.there(x) ** 3).sum()
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    (second,) = torch.autograd.grad((gradient**2).sum(), x)
    owners = [owner for owner, rows in enumerate(route.send) for _ in range(rows)]
    scale = torch.tensor(owners, dtype=torch.float64).unsqueeze(1) + 2
    return off(second, 36 * scale**2 * x.detach() ** 3)  # of (3 s x^2)^2


def trial(case: Case, axis: Axis) -> dict[str, Any]:
    problem, rank = Problem(case), axis.rank
    route = exchange_of(problem.permutation(rank).tokens_per_expert_E, problem.owned, axis, problem.ids_TK.numel())
    with record_collectives() as calls:
        ours = on_ranks(problem, axis)
    with record_collectives() as without, torch.no_grad():
        plain = on_ranks(problem, axis, gradients=False)
    with noted_waits() as waits:
        on_ranks(problem, axis)
    wanted = parts(problem, in_one_process(problem), rank)
    return {
        "journey": journey(problem, route, rank),
        "off": [off(got, want) for got, want in zip(ours, wanted, strict=True)],
        "calls": calls,
        "without": without,
        "same": torch.equal(plain[0], ours[0]),
        "waits": waits,
        "strided": strided_gradients(problem, route, rank),
        "second": second_order(problem, route, rank),
    }


def whole_axis(ranks: int) -> Axis:
    return Axis(name="ep", group=dist.group.WORLD, size=ranks, rank=dist.get_rank())


def on_a_rank(ranks: int) -> dict[str, Any]:
    return {name: trial(case, whole_axis(ranks)) for name, case in CASES.items() if case.ranks == ranks}


@cache
def results(ranks: int) -> list[dict[str, Any]]:
    """What every rank found, all cases in one start of the ranks."""
    return run_on_ranks(on_a_rank, ranks, ranks)


def trials(name: str) -> list[dict[str, Any]]:
    return [result[name] for result in results(CASES[name].ranks)]


@each_case
def test_every_row_reaches_the_rank_of_its_expert_by_source_then_by_expert(name: str) -> None:
    for trial in trials(name):
        assert all(trial["journey"]["arrived"])
        assert trial["journey"]["one dim"]


@each_case
def test_every_row_comes_back_to_its_place_bit_by_bit(name: str) -> None:
    assert all(all(trial["journey"]["came back"]) for trial in trials(name))


@each_case
def test_sizes_and_local_ids_are_those_of_the_rows(name: str) -> None:
    problem = Problem(CASES[name])
    ranks = range(len(problem.owned))
    for rank, trial in enumerate(trials(name)):
        mine, arriving = problem.experts_on(rank), problem.arriving(rank)
        sources = [[row[1] for row in arriving if row[0] == source] for source in ranks]
        send = tuple(sum(row[1] in problem.experts_on(owner) for row in problem.sent(rank)) for owner in ranks)
        assert trial["journey"]["splits"] == (send, tuple(len(experts) for experts in sources))
        assert trial["journey"]["received"] == [[experts.count(e) for e in mine] for experts in sources]
        assert trial["journey"]["local ids"] == [row[1] - mine.start for row in arriving]


@each_case
def test_outputs_and_gradients_are_those_of_one_process(name: str) -> None:
    for trial in trials(name):
        assert all(worst <= EXACT for worst in trial["off"]), trial["off"]


@each_case
def test_counts_travel_once_and_rows_once_each_way_forward_and_backward(name: str) -> None:
    problem = Problem(CASES[name])
    for rank, trial in enumerate(trials(name)):
        counts = problem.experts * 8
        sent, arrived = (len(rows) * HIDDEN * 8 for rows in (problem.sent(rank), problem.arriving(rank)))
        sizes = [(counts, False), (sent, False), (arrived, False), (sent, True), (arrived, True)]
        want = [Call(op="all_to_all", axis="ep", bytes=size, backward=backward) for size, backward in sizes]
        assert trial["calls"] == want
        assert trial["without"] == want[:3]
        assert trial["same"]


@each_case
def test_the_host_waits_for_the_device_once(name: str) -> None:
    assert all(trial["waits"] == ["tolist"] for trial in trials(name))


@each_case
def test_gradients_in_any_strides_come_back_to_their_rows(name: str) -> None:
    assert all(trial["strided"] == (True, True) for trial in trials(name))


@each_case
def test_gradients_of_gradients_are_true_too(name: str) -> None:
    assert all(trial["second"] <= EXACT for trial in trials(name))


def test_waits_are_noted_in_python_and_below_it() -> None:
    ones = torch.ones(2, dtype=torch.int64)
    with noted_waits() as waits:
        ones.tolist()
        ones[ones > 0]
        ones.repeat_interleave(ones)
        torch.ops.aten.item(ones[0])
        ones[:1].repeat_interleave(ones[:1], output_size=1)
    assert waits == ["tolist", "index", "repeat_interleave", "_local_scalar_dense"]


def test_the_drawing_in_the_module_is_what_happens() -> None:
    (there, ids), (others, other_ids) = run_on_ranks(_drawing, 2)
    assert (there, ids) == ([0, 0, 2, 1], [0, 0, 2, 1])
    assert (others, other_ids) == ([3, 3, 3], [0, 0, 0])


def _drawing() -> tuple[list[int], list[int]]:
    axis = whole_axis(2)
    rows = torch.tensor([[0, 0, 2, 3], [1, 3, 3]][axis.rank])
    route = exchange_of(rows.bincount(minlength=4), (3, 1), axis, rows.numel())
    return route.there(rows).tolist(), route.local_ids().tolist()


def test_the_drawing_of_all_to_all_is_what_happens() -> None:
    assert run_on_ranks(_letters, 2) == [[1], [2, 3]]


def _letters() -> list[int]:
    axis = whole_axis(2)
    value, send, receive = [([1, 2, 3], (1, 2), (1, 0)), ([], (0, 0), (2, 0))][axis.rank]
    return exchange(torch.tensor(value, dtype=torch.int64), axis, send, receive).tolist()
