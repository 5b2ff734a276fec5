"""When the value of a partial sum is asked for, and what is refused; how it and autograd get on."""

from __future__ import annotations

import gc
import time
import weakref
from collections import namedtuple
from typing import Any

import pytest
import torch
from partial_cases import HIDDEN, TOKENS, Numbers, off, part_of, sums, weighed, world
from ranks import outcomes, run_on_ranks
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from parallel_plans.collectives import record_collectives
from parallel_plans.partial import contribute, partial, whole, whole_tree

EXACT = 1e-12  # of the largest value, in float64
T, H = TOKENS, HIDDEN

Pair = namedtuple("Pair", "first second")


def in_outputs(ranks: int) -> list[bool]:
    axis, plain = world(ranks), torch.ones(2)
    p, q = sums(axis, 2)
    ours = {"a": p, "b": [plain, {"c": q}]}
    output = BaseModelOutput(last_hidden_state=p, attentions=(q, plain))
    with record_collectives() as calls:
        trees: list[Any] = [whole_tree(tree) for tree in (p, (p, plain, 3), [q], Pair(p, plain), ours, output)]
    untouched: list[Any] = [plain, (plain, None), [1], Pair(1, plain), {"a": plain}, torch.Size([2]), "text"]
    return [
        len(calls) == 2,
        [type(tree) for tree in trees] == [Tensor, tuple, list, Pair, dict, BaseModelOutput],
        trees[3].second is plain and trees[1][1:] == (plain, 3),
        trees[4]["b"][1]["c"] is trees[2][0] and ours["b"][1]["c"] is q,  # type: ignore[index]
        trees[5].last_hidden_state is trees[0] and trees[5][1][1] is plain and output[0] is p,
        all(whole_tree(tree) is tree for tree in untouched) and whole("text") == "text",
    ]


def test_sums_in_outputs_are_made_whole_and_nothing_else_is_touched() -> None:
    assert all(all(checks) for checks in run_on_ranks(in_outputs, 2, 2))


def metadata(ranks: int) -> tuple[int, list[bool]]:
    axis = world(ranks)
    (p,) = sums(axis, 1)
    leaf = torch.ones(T, H, requires_grad=True)
    with record_collectives() as calls:
        checks = [
            isinstance(p, Tensor) and torch.is_tensor(p),
            p.shape == p.size() == (T, H) and p.dim() == p.ndim == 2 and len(p) == T,
            p.dtype == torch.float64 and p.element_size() == p.itemsize == 8 and p.is_floating_point(),
            p.device.type == "cpu" and not p.is_cuda and p.layout == torch.strided,
            p.numel() == torch.numel(p) == T * H and p.stride() == (H, 1) and p.is_contiguous(),
            not p.t().is_contiguous() and p.type() == "torch.DoubleTensor",
            not p.requires_grad and (p + leaf).requires_grad and partial(leaf, axis).requires_grad,
            not partial(leaf, axis).detach().requires_grad and (partial(leaf, axis) * 1).grad_fn is not None,
            type(torch.zeros_like(p)) is type(p.new_empty(3)) is type(torch.full_like(p, 2)) is Tensor,
            type(leaf.view_as(p)) is type(leaf.type_as(p)) is type(leaf.to(p)) is Tensor,
            repr(p) == f"{p}" == "Partial([6, 4], torch.float64, over tp, not reduced)",
            p.contiguous() is p.to(torch.float64) is p,
        ]
    return len(calls), checks


def test_what_needs_no_value_reduces_nothing() -> None:
    assert run_on_ranks(metadata, 2, 2) == [(0, [True] * 12)] * 2


def asked_without_autograd(ranks: int) -> float:
    numbers = Numbers(ranks)
    p, true = numbers.partial(world(ranks), T, H)
    flat, copy = p.view(-1), p.clone()
    with torch.no_grad():
        assert p.norm() > 0
        assert flat.norm() > 0
    weighed([p.tanh(), flat.tanh(), copy.tanh()]).backward()
    weighed([true.tanh(), true.view(-1).tanh(), true.tanh()]).backward()
    return max(off(a.grad, b.grad) for a, b in numbers.leaves)  # type: ignore[arg-type]


def test_who_asks_first_without_autograd_takes_no_gradient_away() -> None:
    assert all(worst <= EXACT for worst in run_on_ranks(asked_without_autograd, 2, 2))


def gained_in_place(ranks: int) -> list[float]:
    """Gradients that only come with a change in place, also of a detached view."""
    worst = []
    for trained, view in [(False, Tensor.clone), (False, Tensor.detach), (True, Tensor.detach)]:
        (p, true_p), (w, true_w) = (
            Numbers(ranks, trained=trained).partial(world(ranks), T, H),
            Numbers(ranks).whole(T, H),
        )
        got, want = view(p).add_(w).tanh(), view(true_p).add_(true_w).tanh()
        gradients = torch.autograd.grad(weighed([got]), w), torch.autograd.grad(weighed([want]), true_w)
        worst += [off(got, want), off(gradients[0][0], gradients[1][0])]
    return worst


def test_a_gradient_that_comes_with_a_change_in_place_is_not_forgotten() -> None:
    assert max(max(worst) for worst in run_on_ranks(gained_in_place, 2, 2)) <= EXACT


def of_a_frozen_sum(ranks: int) -> list[float]:
    (p, true_p), (w, true_w) = Numbers(ranks, trained=False).partial(world(ranks), T, H), Numbers(ranks).whole(T, H)
    worst = []
    for function in (lambda p, w: p * w, lambda p, w: p + w, lambda p, w: (p + w) * 2 + p, lambda p, w: p * w + p):
        got, want = function(p * 1, w).tanh(), function(true_p, true_w).tanh()
        gradients = torch.autograd.grad(weighed([got]), w), torch.autograd.grad(weighed([want]), true_w)
        worst += [off(got, want), off(gradients[0][0], gradients[1][0])]
    return worst


def test_whole_tensors_have_their_gradients_where_the_sum_has_none() -> None:
    assert max(max(worst) for worst in run_on_ranks(of_a_frozen_sum, 2, 2)) <= EXACT


def in_inference_mode(ranks: int) -> tuple[float, int]:
    with torch.inference_mode(), record_collectives() as calls:
        numbers = Numbers(ranks, trained=False)
        (p, true_p), (q, true_q) = (numbers.partial(world(ranks), T, H) for _ in range(2))
        w, true_w = numbers.whole(T, H)
        got, want = (p + w) + q * w, true_p + true_w + true_q * true_w
        w.zero_()  # what was added is what it was
        rows = got[:2].add_(1)
        want[:2].add_(1)
        return max(off(whole(got), want), off(whole(rows), want[:2])), len(calls)


def test_inference_mode_is_like_no_grad() -> None:
    assert all(worst <= EXACT and count == 1 for worst, count in run_on_ranks(in_inference_mode, 2, 2))


def nothing_kept(ranks: int) -> bool:
    p, q = (Numbers(ranks).partial(world(ranks), T, H)[0] for _ in range(2))
    made = [p, q, p + q, p + 1, p * q.sum(), p.t()[1:], p.t().flatten(), p.half(), (p * 1).add_(q)]
    made += [whole(x) for x in made]
    gone = [weakref.ref(x) for x in made]
    gc.disable()
    del made, p, q
    for _ in range(200):  # a thread of gloo may still be letting go of what it reduced
        if all(reference() is None for reference in gone):
            return True
        time.sleep(0.02)
    return False


def test_nothing_is_kept_longer_than_it_is_used() -> None:
    assert run_on_ranks(nothing_kept, 2, 2) == [True, True]


# What cannot be done says so.


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 2


def gained_before(p: Tensor) -> None:
    """A sum that did not need a gradient when it was made."""
    p = p.detach().clone()
    rows = p[1:]
    p[0] = torch.ones(H, dtype=p.dtype, requires_grad=True)
    p += torch.ones(T, H, dtype=p.dtype, requires_grad=True)
    Double.apply(rows).sum().backward()


class Same(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def past_torch_function(p: Tensor) -> Tensor:
    with torch._C.DisableTorchFunctionSubclass():
        return torch.relu(p)


def changed_before_it_was_added(p: Tensor) -> Tensor:
    w = torch.ones(T, H, dtype=p.dtype)
    p = p + w
    w.zero_()
    return p.tanh()


REFUSALS = {
    "autograd function": (lambda p: Double.apply(p).sum().backward(), "TypeError", "torch.autograd.Function.apply"),
    "autograd identity": (lambda p: Same.apply(p).sum().backward(), "TypeError", "torch.autograd.Function.apply"),
    "autograd function of what changed": (gained_before, "TypeError", "torch.autograd.Function.apply"),
    "past torch function": (past_torch_function, "TypeError", "aten.relu.default was about to compute with one rank's"),
    "another shape in place": (lambda p: p.unsqueeze_(0), "TypeError", "unsqueeze_ cannot change in place"),
    "changed beside": (changed_before_it_was_added, "RuntimeError", "a tensor [6, 4] was added to a partial sum and"),
}


def refused(name: str) -> None:
    REFUSALS[name][0](Numbers(2).partial(world(2), T, H)[0])


@pytest.mark.parametrize("name", REFUSALS)
def test_what_would_be_wrong_is_an_error_that_says_why(name: str) -> None:
    _, kind, message = REFUSALS[name]
    for end, outcome in outcomes(refused, 2, name):
        assert end == "raised"
        assert outcome[0] == kind
        assert message in outcome[1]


def in_a_function(ranks: int) -> float:
    p, true = Numbers(ranks).partial(world(ranks), T, H)
    with torch.no_grad():
        without = off(whole(Double.apply(p)), true * 2)
    w = torch.ones(T, H, dtype=torch.float64, requires_grad=True)
    (Double.apply(p.detach()) * w).sum().backward()  # no gradient is lost where none is due
    assert w.grad is not None
    return max(without, off(whole(Double.apply(p)), true * 2), off(w.grad, true * 2))


def test_what_an_autograd_function_computes_of_a_sum_is_right() -> None:
    assert all(worst <= EXACT for worst in run_on_ranks(in_a_function, 2, 2))


# I -> P


def contributed(ranks: int) -> tuple[float, float, bool, list[str]]:
    axis, numbers = world(ranks), Numbers(ranks)
    (p, true_p), (bias, true_bias) = numbers.partial(axis, T, H), numbers.whole(H)
    mine = contribute(bias, axis)
    with record_collectives() as calls:
        got = whole(partial(part_of(p) + mine, axis))
        weighed([got]).backward()
    want = true_p + true_bias
    weighed([want]).backward()
    with torch.no_grad():
        is_same = torch.equal(contribute(bias, axis), mine)
    gradients = max(off(a.grad, b.grad) for a, b in numbers.leaves)  # type: ignore[arg-type]
    return off(got, want), gradients, is_same, [call.op for call in calls]


@pytest.mark.parametrize("ranks", [2, 3])
def test_what_is_contributed_counts_once_and_has_its_gradient_everywhere(ranks: int) -> None:
    for worst, gradients, is_same, calls in run_on_ranks(contributed, ranks, ranks):
        assert worst <= EXACT
        assert gradients <= EXACT
        assert is_same
        assert calls == ["all_reduce"]
