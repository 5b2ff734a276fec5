"""Every transition between letters on real ranks: its value, its gradient and its collectives, against one process.

The truth is plain autograd over all ranks' values at once, in one process and in float64. What a loss is follows from
the letter that a value has: of an I there is one, counted once; R and S are used by every rank on its own, and the loss
is the sum over the ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_on_ranks
from torch import Tensor

from parallel_plans.collectives import Axis, Call, all_gather, record_collectives
from parallel_plans.layouts import Split, split_dim
from parallel_plans.transitions import TRANSITIONS, replicate

RANKS = (2, 3)
EXACT = 1e-10  # of the largest value, in float64
SHAPE = (5, 12, 4)  # the value; the split dim has the split's size in the place of one of these

# The transition table: (letter before, after) -> collectives forward, collectives backward.
COLLECTIVES: dict[tuple[str, str], tuple[list[str], list[str]]] = {
    ("I", "R"): ([], ["all_reduce"]),
    ("P", "I"): (["all_reduce"], []),
    ("P", "R"): (["all_reduce"], ["all_reduce"]),
    ("S", "I"): (["all_gather"], []),
    ("I", "S"): ([], ["all_gather"]),
    ("S", "R"): (["all_gather"], ["reduce_scatter"]),
    ("P", "S"): (["reduce_scatter"], ["all_gather"]),
}
SPLIT_NAMES = ("even", "uneven", "heads", "packed", "unequal parts", "shuffled")
DIMS = (0, 1, -1)


def splits(ranks: int) -> dict[str, Split]:
    """A split of every kind, of dim 0, none of an index held twice."""
    last_first = tuple(((12 - 4 * (rank + 1), 12 - 4 * rank),) for rank in range(3))
    made = {
        "even": split_dim(dim=0, size=12, axis="tp", ranks=ranks),
        "uneven": split_dim(dim=0, size=7, axis="tp", ranks=ranks),
        "heads": split_dim(dim=0, size=20, axis="tp", ranks=ranks, units=[4]),
        "packed": split_dim(dim=0, size=12, axis="tp", ranks=ranks, parts=[6, 6]),
        "unequal parts": split_dim(dim=0, size=17, axis="tp", ranks=ranks, parts=[10, 7], units=[2, 1]),
        "shuffled": Split(dim=0, size=12, axis="tp", ranges=last_first if ranks == 3 else (((5, 12),), ((0, 5),))),
    }
    assert tuple(made) == SPLIT_NAMES
    return made


def cases() -> Iterator[tuple[tuple[str, str], str, int]]:
    """Every transition; those with an S with every split and along every dim."""
    for letters in TRANSITIONS:
        with_split = "S" in letters
        for name in SPLIT_NAMES if with_split else SPLIT_NAMES[:1]:
            for dim in DIMS if with_split else DIMS[:1]:
                yield letters, name, dim


CASES = list(cases())


class Problem:
    """One transition's inputs and losses, the same numbers on every rank; what each rank has of them."""

    def __init__(self, letters: tuple[str, str], split: Split, dim: int, ranks: int) -> None:
        (self.before, self.after), self.split, self.dim, self.ranks = letters, split.at(dim % 3), dim, ranks
        shape = [split.size if "S" in letters and d == dim % 3 else size for d, size in enumerate(SHAPE)]
        draw = torch.Generator().manual_seed(3)
        count = ranks if self.before == "P" else 1  # of a partial value, every rank has another
        self.inputs = [torch.randn(shape, generator=draw, dtype=torch.float64) for _ in range(count)]
        self.factors = [torch.randn(shape, generator=draw, dtype=torch.float64) for _ in range(ranks)]

    def part(self, whole: Tensor, letter: str, rank: int) -> Tensor:
        """What a rank has of a whole value in this letter."""
        return self.split.take(whole, rank) if letter == "S" else whole

    def given(self, inputs: list[Tensor], rank: int) -> Tensor:
        """What the transition is given on a rank."""
        return self.part(inputs[rank if self.before == "P" else 0], self.before, rank)

    def loss(self, output: Tensor, rank: int) -> Tensor:
        """What a rank makes of the output: something else on every rank, unless the output is an I."""
        factor = self.factors[0] if self.after == "I" else self.factors[rank]
        return (self.part(factor, self.after, rank) * output**3).sum()

    def total(self, inputs: list[Tensor]) -> Tensor:
        """The loss of all ranks together, in one process."""
        whole = torch.stack(inputs).sum(0)
        if self.after == "I":
            return self.loss(whole, 0)
        losses = [self.loss(self.part(whole, self.after, rank), rank) for rank in range(self.ranks)]
        return torch.stack(losses).sum()

    def call(self, value: Tensor, axis: Axis) -> Tensor:
        where = (axis, self.split, self.dim) if "S" in (self.before, self.after) else (axis,)
        return TRANSITIONS[self.before, self.after](value, *where)


def whole_axis(ranks: int) -> Axis:
    assert dist.group.WORLD is not None
    return Axis(name="tp", group=dist.group.WORLD, size=ranks, rank=dist.get_rank())


def off(got: Tensor, want: Tensor) -> float:
    """By how much of the largest true value the worst one is off; infinite where the shapes differ."""
    if got.shape != want.shape:
        return float("inf")
    return float((got - want).abs().max() / want.abs().max())


def trial(problem: Problem, axis: Axis) -> dict[str, Any]:
    """Value, gradient and collectives of one transition on this rank, against one process."""
    truth = [value.clone().requires_grad_() for value in problem.inputs]
    problem.total(truth).backward()
    whole = torch.stack(problem.inputs).sum(0)
    leaf = problem.given(problem.inputs, axis.rank).clone().requires_grad_()
    before = leaf.detach().clone()
    with record_collectives() as calls:
        output = problem.call(leaf, axis)
        problem.loss(output, axis.rank).backward()
    with record_collectives() as without, torch.no_grad():
        plain = problem.call(leaf, axis)
    assert leaf.grad is not None
    gradients = [value.grad for value in truth if value.grad is not None]
    return {
        "value": off(output.detach(), problem.part(whole, problem.after, axis.rank)),
        "gradient": off(leaf.grad, problem.given(gradients, axis.rank)),
        "calls": calls,
        "without": without,
        "same": torch.equal(plain, output.detach()),
        "kept": torch.equal(leaf.detach(), before),
        "bytes": (before.numel() * 8, output.numel() * 8),
    }


def second_order(letters: tuple[str, str], name: str, axis: Axis) -> float:
    """How far the gradient of a loss of the gradient is off; the gradient of an I is an I, of an S an S."""
    problem = Problem(letters, splits(axis.size)[name], 1, axis.size)

    def loss_of(gradient: Tensor, rank: int) -> Tensor:
        return (problem.part(problem.factors[-1], problem.before, rank) * gradient**2).sum()

    truth = problem.inputs[0].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(problem.total([truth]), truth, create_graph=True)
    whole_loss = (problem.factors[-1] * gradient**2).sum()
    whole_loss.backward()
    leaf = problem.given(problem.inputs, axis.rank).clone().requires_grad_()
    output = problem.call(leaf, axis)
    (own,) = torch.autograd.grad(problem.loss(output, axis.rank), leaf, create_graph=True)
    loss_of(own, axis.rank).backward()
    assert leaf.grad is not None
    assert truth.grad is not None
    return off(leaf.grad, problem.part(truth.grad, problem.before, axis.rank))


def is_gathered(split: Split, axis: Axis) -> bool:
    """Whether `all_gather` rebuilds the whole tensor bit by bit."""
    whole = torch.randn(split.size, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return torch.equal(all_gather(split.take(whole, axis.rank), axis, split, 0), whole)


def held_twice(ranks: int) -> Split:
    """Key/value heads of which ranks 0 and 1 hold the same."""
    return Split(dim=0, size=8, axis="tp", ranges=(((0, 8),),) * 2 if ranks == 2 else (((0, 4),), ((0, 4),), ((4, 8),)))


def on_a_rank(ranks: int) -> dict[str, Any]:
    axis = whole_axis(ranks)
    made = splits(ranks)
    return {
        "trials": {case: trial(Problem(case[0], made[case[1]], case[2], ranks), axis) for case in CASES},
        "second": {
            (letters, name): second_order(letters, name, axis)
            for letters in (("I", "R"), ("S", "R"), ("I", "S"))
            for name in ("even", "uneven", "unequal parts")
        },
        "gathered": {name: is_gathered(split, axis) for name, split in made.items()},
        "held twice": is_gathered(held_twice(ranks), axis),
    }


@cache
def results(ranks: int) -> list[dict[str, Any]]:
    """What every rank found, all cases in one start of the ranks."""
    return run_on_ranks(on_a_rank, ranks, ranks)


def trials(ranks: int, case: tuple[tuple[str, str], str, int]) -> list[dict[str, Any]]:
    return [result["trials"][case] for result in results(ranks)]


def named(case: Any) -> str | None:
    return f"{'->'.join(case[0])}-{case[1]}-{case[2]}" if isinstance(case, tuple) else None


each_case = pytest.mark.parametrize("case", CASES, ids=named)
each_size = pytest.mark.parametrize("ranks", RANKS)


def test_every_transition_is_tried() -> None:
    assert set(COLLECTIVES) == set(TRANSITIONS) == {letters for letters, _, _ in CASES}


@each_size
@each_case
def test_forward_gives_each_rank_its_part_of_the_true_value(case: Any, ranks: int) -> None:
    assert all(trial["value"] <= EXACT for trial in trials(ranks, case))
    assert all(trial["kept"] for trial in trials(ranks, case))  # the input is nobody's to overwrite


@each_size
@each_case
def test_backward_gives_each_rank_its_part_of_the_true_gradient(case: Any, ranks: int) -> None:
    worst = max(trial["gradient"] for trial in trials(ranks, case))
    assert worst <= EXACT


@each_size
@each_case
def test_collectives_forward_and_backward_are_those_of_the_table(case: Any, ranks: int) -> None:
    forward, backward = COLLECTIVES[case[0]]
    for trial in trials(ranks, case):
        into, out_of = trial["bytes"]
        want = [Call(op=op, axis="tp", bytes=into, backward=False) for op in forward]
        want += [Call(op=op, axis="tp", bytes=out_of, backward=True) for op in backward]
        assert trial["calls"] == want


@each_size
@each_case
def test_without_gradients_only_the_forward_communicates(case: Any, ranks: int) -> None:
    for trial in trials(ranks, case):
        assert [call.op for call in trial["without"]] == COLLECTIVES[case[0]][0]
        assert not any(call.backward for call in trial["without"])
        assert trial["same"]


@each_size
def test_gradients_of_gradients_are_true_too(ranks: int) -> None:
    for result in results(ranks):
        assert all(worst <= EXACT for worst in result["second"].values()), result["second"]


@each_size
@pytest.mark.parametrize("name", SPLIT_NAMES)
def test_all_gather_gives_the_whole(name: str, ranks: int) -> None:
    assert all(result["gathered"][name] for result in results(ranks))


@each_size
def test_parts_that_several_ranks_hold_are_gathered_once(ranks: int) -> None:
    assert all(result["held twice"] for result in results(ranks))


def test_recorders_see_only_what_runs_inside_their_block() -> None:
    assert all(run_on_ranks(_nested_recorders, 2))


def _nested_recorders() -> bool:
    axis = whole_axis(2)
    value = torch.ones(3)
    reduce = TRANSITIONS["P", "I"]
    reduce(value, axis)
    with record_collectives() as outer:
        reduce(value, axis)
        with record_collectives() as inner:
            reduce(value, axis)
    reduce(value, axis)
    return (len(outer), len(inner)) == (2, 1)


def test_an_r_that_is_changed_in_place_is_an_error_and_no_gradient_without_its_sum() -> None:
    axis = Axis(name="tp", group=None, size=2, rank=0)
    replicated = replicate(torch.ones(3, requires_grad=True) * 1, axis)
    with pytest.raises(RuntimeError, match="inplace"):
        replicated.add_(1)
