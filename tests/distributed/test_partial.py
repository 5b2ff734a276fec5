"""A partial sum stays partial through what is linear: values, gradients and reductions against plain tensors."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from partial_cases import FULL, HIDDEN, TOKENS, Found, Numbers, off, part_of, sums, weighed, world
from partial_laws import LAWS
from ranks import run_on_ranks
from torch import Tensor

from parallel_plans.collectives import Axis, record_collectives
from parallel_plans.partial import Partial, partial, whole

EXACT = 1e-12  # of the largest value, in float64
RANKS = (2, 3)
T, H = TOKENS, HIDDEN

each_size = pytest.mark.parametrize("ranks", RANKS)
each_law = pytest.mark.parametrize("name", LAWS)


@cache
def found(ranks: int) -> list[dict[str, Found]]:
    """What every rank found, all laws in one start of the ranks."""
    return run_on_ranks(lambda: {name: law.find(world(ranks)) for name, law in LAWS.items()}, ranks)


@each_size
@each_law
def test_values_and_gradients_are_those_of_whole_tensors(name: str, ranks: int) -> None:
    for result in found(ranks):
        assert result[name].values <= EXACT
        assert result[name].gradients <= EXACT


@each_size
@each_law
def test_only_what_is_asked_for_is_reduced(name: str, ranks: int) -> None:
    for result in found(ranks):
        assert result[name].forward == LAWS[name].forward
        assert sorted(result[name].backward) == sorted(LAWS[name].backward)


@each_size
@each_law
def test_without_autograd_all_is_the_same(name: str, ranks: int) -> None:
    for result in found(ranks):
        worst, reduced = result[name].untrained
        assert worst <= EXACT
        assert reduced == LAWS[name].forward


# Dtypes: the narrower one travels.


def narrower(ranks: int) -> tuple[Any, ...]:
    axis = world(ranks)
    p, q = sums(axis, 2, torch.float32)
    with record_collectives() as calls:
        cast, other = p.bfloat16(), q.to(torch.float32).to("cpu", torch.float16)
        values = whole(cast), whole(p), whole(q), whole(other)
    same = torch.equal(values[0], values[1].bfloat16()), torch.equal(values[3], values[2].half())
    return [call.bytes for call in calls], same, isinstance(cast, Partial), isinstance(other, Partial)


@each_size
def test_a_sum_and_its_cast_to_a_narrower_dtype_are_reduced_once(ranks: int) -> None:
    for result in run_on_ranks(narrower, ranks, ranks):
        assert result == ([FULL // 2, FULL // 2], (True, True), True, True)


WIDER = {
    "float": lambda p, w: p.float(),
    "to a dtype": lambda p, w: p.to(dtype=torch.float64),
    "to a tensor's dtype": lambda p, w: p.type_as(w),
    "a wider tensor added": lambda p, w: p + w,
    "a wider factor": lambda p, w: w * p,
}


def wider(ranks: int) -> dict[str, tuple[bool, list[int]]]:
    axis, results = world(ranks), {}
    for name, function in WIDER.items():
        (p,), w = sums(axis, 1, torch.bfloat16), torch.ones(T, H)
        want = function(whole(partial(part_of(p).clone(), axis)), w)
        with record_collectives() as calls:
            got = function(p, w)
        results[name] = type(got) is Tensor and torch.equal(got, want), [call.bytes for call in calls]
    return results


@each_size
def test_before_a_cast_to_a_wider_dtype_the_narrow_one_is_reduced(ranks: int) -> None:
    for results in run_on_ranks(wider, ranks, ranks):
        assert results == dict.fromkeys(WIDER, (True, [FULL // 4]))


# More than one axis.


def on_two_axes(ranks: int) -> list[tuple[float, list[str]]]:
    numbers, tp, ep = Numbers(ranks), world(ranks), world(ranks, "ep", is_new=True)
    again = Axis(name="tp too", group=tp.group, size=ranks, rank=tp.rank)
    (p, true_p), (q, true_q), (r, true_r) = (numbers.partial(axis, T, H) for axis in (tp, ep, again))
    cases = [
        (lambda: -p + -q, -true_p - true_q),
        (lambda: (-p).add_(-q), -true_p - true_q),
        (lambda: -p - -r, true_r - true_p),
        (lambda: torch.cat([-p, -q]), torch.cat([-true_p, -true_q])),
    ]
    values, results = [], []
    for got, want in cases:
        with record_collectives() as calls:
            values.append(whole(got()))
        results.append((off(values[-1], want), [call.axis for call in calls]))
    weighed(values).backward()
    weighed([want for _, want in cases]).backward()
    results += [(off(a.grad, b.grad), []) for a, b in numbers.leaves]  # type: ignore[arg-type]
    return results


@each_size
def test_sums_over_different_axes_are_reduced_each_over_its_own(ranks: int) -> None:
    for results in run_on_ranks(on_two_axes, ranks, ranks):
        assert max(worst for worst, _ in results) <= EXACT
        assert [axes for _, axes in results][:4] == [["ep", "tp"], ["ep", "tp"], ["tp"], ["tp", "ep"]]


def over_both(ranks: int) -> tuple[float, list[str]]:
    """A value that is partial over two axes, here the same ranks twice."""
    axis = world(ranks)
    p, true = Numbers(ranks, trained=False).partial(world(ranks, "ep", is_new=True), T, H)
    with record_collectives() as calls:
        value = whole(partial(p, axis))
    return off(value, true * ranks), [call.axis for call in calls]


def test_a_sum_over_two_axes_is_reduced_over_both() -> None:
    assert all(worst <= EXACT and axes == ["ep", "tp"] for worst, axes in run_on_ranks(over_both, 2, 2))


def test_on_an_axis_of_one_rank_a_part_is_the_value() -> None:
    value = torch.ones(3)
    assert partial(value, Axis(name="tp", group=None, size=1, rank=0)) is value


# Layouts

LAYOUTS = {
    "scaled": lambda p, w: p.t() * 2,
    "factor first": lambda p, w: w * p.t(),
    "factor last": lambda p, w: p.t() * w,
    "added first": lambda p, w: w + p.t(),
    "added first, turned": lambda p, w: w.t() + p,
    "added last": lambda p, w: p.t() + w,
    "subtracted": lambda p, w: w - p.t(),
    "added up": lambda p, w: p.t() + (p * 2).view(2, 3, H).permute(2, 0, 1).flatten(1),
    "copied": lambda p, w: p[None].permute(2, 0, 1).clone(),
    "cast": lambda p, w: p.t().half(),
    "cut": lambda p, w: p[:, 1:].t().neg(),
    "picked": lambda p, w: p.t()[:, torch.tensor([1, 0])],
}


def layouts(ranks: int) -> dict[str, bool]:
    axis, w, results = world(ranks), torch.ones(H, T, dtype=torch.float64), {}
    for name, function in LAYOUTS.items():
        (p,) = sums(axis, 1)
        mine, true = function(p, w), function(whole(partial(part_of(p), axis)), w)
        is_same = isinstance(mine, Partial) and mine.stride() == true.stride()
        results[name] = is_same and whole(mine).stride() == true.stride()
    return results


def test_elements_lie_in_memory_as_those_of_whole_tensors() -> None:
    assert run_on_ranks(layouts, 2, 2) == [dict.fromkeys(LAYOUTS, True)] * 2


# Dropout


@each_size
def test_dropout_in_training_drops_from_the_whole_value(ranks: int) -> None:
    for dropped, of in run_on_ranks(dropout, ranks, ranks):
        assert torch.equal(dropped, of)


def dropout(ranks: int) -> tuple[Tensor, Tensor]:
    p = sums(world(ranks), 1)[0] + 1
    torch.manual_seed(0)
    dropped = whole(F.dropout(p, 0.5))
    torch.manual_seed(0)
    return dropped, F.dropout(whole(p), 0.5)
