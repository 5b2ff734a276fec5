"""Grouped products of experts in any width: with the kernel where it can, in a loop where it cannot."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from transformers.integrations import moe

from parallel_plans.experts.alignment import allow_any_width

OFFSETS = torch.tensor([2, 2, 6, 10], dtype=torch.int32)
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
WIDTHS = ((48, 32), (32, 48), (48, 34), (34, 48), (36, 36), (36, 48), (35, 48), (48, 35), (33, 17))


@pytest.fixture(autouse=True)
def _any_width() -> Iterator[None]:
    """Any width for these tests; other tests decide for themselves."""
    before = moe._can_use_grouped_mm
    allow_any_width.__wrapped__()
    yield
    moe._can_use_grouped_mm = before


def operands(inner: int, outer: int, dtype: torch.dtype, *, is_transposed: bool) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(inner * outer)
    shape = (4, inner, outer) if is_transposed else (4, outer, inner)
    weight = torch.randn(shape, generator=draw).to(dtype)
    return torch.randn(10, inner, generator=draw).to(dtype), weight if is_transposed else weight.transpose(-2, -1)


def by_hand(rows: Tensor, weight: Tensor) -> Tensor:
    stops = [0, *OFFSETS.tolist()]
    return torch.cat([rows[a:b] @ weight[at] for at, (a, b) in enumerate(pairwise(stops))])


@pytest.mark.parametrize("is_transposed", [False, True], ids=["[out, in]", "[in, out]"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("inner", "outer"), WIDTHS)
def test_any_width_has_the_output_and_the_gradients_of_a_loop(
    inner: int, outer: int, dtype: torch.dtype, is_transposed: bool
) -> None:
    pair = operands(inner, outer, dtype, is_transposed=is_transposed)
    ours, loop = ([value.clone(memory_format=torch.preserve_format) for value in pair] for _ in range(2))
    made, want = moe._grouped_mm(*map(Tensor.requires_grad_, ours), OFFSETS), by_hand(*map(Tensor.requires_grad_, loop))
    factor = torch.linspace(-1, 1, want.numel()).view(want.shape).to(dtype)
    (made * factor).sum().backward()
    (want * factor).sum().backward()
    tolerance = 2e-2 if dtype is torch.bfloat16 else 1e-5
    torch.testing.assert_close(made, want, atol=tolerance * want.abs().max().item(), rtol=0)
    for got, true in zip(ours, loop, strict=True):
        assert got.grad is not None
        assert true.grad is not None
        torch.testing.assert_close(got.grad, true.grad, atol=tolerance * true.grad.abs().max().item(), rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(moe._grouped_mm(*ours, OFFSETS), made, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("is_transposed", [False, True], ids=["[out, in]", "[in, out]"])
@pytest.mark.parametrize(("inner", "outer"), WIDTHS)
def test_an_input_may_be_wider_in_bytes_than_the_weight_it_is_cast_for(
    inner: int, outer: int, is_transposed: bool
) -> None:
    rows, weight = operands(inner, outer, torch.bfloat16, is_transposed=is_transposed)
    made = moe._grouped_mm(rows.float(), weight, OFFSETS)
    torch.testing.assert_close(made, by_hand(rows, weight), atol=0.2, rtol=0)


@pytest.mark.parametrize(
    ("widths", "with_gradients", "without"), [((48, 32), 1, 1), ((48, 34), 0, 1), ((34, 48), 0, 0)]
)
def test_the_kernel_runs_wherever_it_can(
    widths: tuple[int, int], with_gradients: int, without: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel, ran = torch.nn.functional.grouped_mm, []
    monkeypatch.setattr(torch.nn.functional, "grouped_mm", lambda *a, **k: ran.append(1) or kernel(*a, **k))
    rows, weight = operands(*widths, torch.float32, is_transposed=False)
    moe._grouped_mm(rows.requires_grad_(), weight, OFFSETS)
    assert len(ran) == with_gradients
    with torch.no_grad():
        moe._grouped_mm(rows, weight, OFFSETS)
    assert len(ran) == with_gradients + without
