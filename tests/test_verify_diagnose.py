"""A value on the ranks is told by its letter, and by its kind where it is wrong."""

from __future__ import annotations

import torch
from torch import Tensor

from parallel_plans.verify.compare import Run, first_wrong, wrong_gradients
from parallel_plans.verify.diagnose import letter_of, wrong_how
from parallel_plans.verify.observed import Observed


def test_a_value_is_told_by_its_letter() -> None:
    whole = torch.arange(24, dtype=torch.float64).view(4, 6) + 1
    assert letter_of([whole, whole], whole) == "I"
    assert letter_of([whole * 0.25, whole * 0.75], whole) == "P"
    assert letter_of([whole[:, :4], whole[:, 4:]], whole) == "S(1)"
    assert letter_of([whole[[0, 2]], whole[[1, 3]]], whole) == "S(0)"
    assert letter_of([whole, whole * 2], whole) is None
    assert letter_of([whole[:1], whole[:1]], whole) == "?"


def test_what_is_wrong_is_told_by_its_kind() -> None:
    torch.manual_seed(0)
    whole = torch.randn(4, 6, dtype=torch.float64)
    assert wrong_how([whole, whole.clone()], whole) is None
    kinds = {
        "3 times too big": [whole * 3] * 2,
        "2 times too small": [whole / 2] * 2,
        "never reduced": [whole * 0.3, whole * 0.7],
        "slices of dim 0 in the wrong order": [whole[[2, 0, 1, 3]]] * 2,
        "differs between": [whole, whole + 1],
        "not finite": [whole * float("nan")] * 2,
        "off by the same row everywhere": [whole + torch.randn(6, dtype=torch.float64)] * 2,
        "only a part, S(1), on every rank": [whole[:, :3], whole[:, 3:]],
        "not what the ranks' parts make up": [whole[:, :3], whole[:, :3]],
        "is wrong": [whole.abs() + 1] * 2,
    }
    for words, found in kinds.items():
        how = wrong_how(found, whole)
        assert how is not None
        assert words in how[0], how


def test_what_float32_rounds_away_is_wrong_and_what_float64_rounds_is_not() -> None:
    torch.manual_seed(0)
    whole = torch.randn(40, 60, dtype=torch.float64)
    assert wrong_how([whole.float().double()] * 2, whole) is not None
    assert wrong_how([whole * (1 + 1e-13)] * 2, whole) is None


def seen(gradients: dict[str, Tensor], values: dict[str, Tensor]) -> Observed:
    return Observed(gradients=gradients, values={(name, "delivers"): value for name, value in values.items()})


def test_gradients_are_told_in_the_order_of_backward_and_those_that_are_missing_too() -> None:
    one = torch.ones(2, dtype=torch.float64)
    truth = seen({"a.weight": one, "c.weight": one, "b.weight": one}, {"a": one, "b": one, "c": one})
    ranks = [
        seen({"a.weight": one, "b.weight": 2 * one, "c.weight": one}, {"a": one, "b": one, "c": one}),
        seen({"a.weight": one, "b.weight": 2 * one}, {"a": one, "b": one}),
    ]
    wrong = wrong_gradients(Run(truths=[truth], seen=ranks))
    assert list(wrong) == ["c.weight", "b.weight"]
    assert wrong["c.weight"][0] == "is missing on rank 1"
    assert wrong["b.weight"][0] == "is 2 times too big"


def test_the_first_wrong_value_is_the_first_in_forward_order() -> None:
    one = torch.ones(2, dtype=torch.float64)
    truth = seen({}, {"a": one, "b": one, "c": one})
    right = seen({}, {"a": one, "b": one, "c": one})
    wrong = seen({}, {"a": one, "b": 3 * one, "c": 3 * one})
    assert first_wrong(Run(truths=[truth], seen=[right, wrong])) == (1, ("b", "delivers"))
    assert first_wrong(Run(truths=[truth], seen=[right, right])) == (3, None)
    short = seen({}, {"a": one})
    assert first_wrong(Run(truths=[truth], seen=[right, short], failure=ValueError())) == (1, None)
