"""Rules of letters against arithmetic: what each rank computes of its parts is what the rule says of the whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
import transformers.integrations.moe  # noqa: F401  registers its own products
from torch import Tensor

from parallel_plans.verify.letters.lay import Block, Lay, Mismatch, NoRule, Shard
from parallel_plans.verify.letters.operation import Operation, tensors_in
from parallel_plans.verify.letters.rules import rule_of

RANKS = 2
TP = frozenset({"tp"})
ATEN, THEIRS = torch.ops.aten, torch.ops.transformers


def shard(*wholes: int) -> Shard:
    """A dim of these parts, one behind the other, each split on its own."""
    return Shard(over=TP, blocks=tuple(Block(size // RANKS, size) for size in wholes))


def lay(*shards: Shard | None, partial: bool = False) -> Lay:
    return Lay(shards=shards, partial=TP if partial else frozenset())


def of_rank(whole: Tensor, how: Lay, rank: int) -> Tensor:
    """What a rank has of a value: its blocks of each dim, and of a partial sum one summand."""
    if how.partial:
        generator = torch.Generator().manual_seed(whole.numel())
        one = torch.randn(whole.shape, generator=generator, dtype=whole.dtype)
        whole = one if rank == 0 else whole - one
    for dim, split in enumerate(how.shards):
        if split is None or not split.over:
            continue
        starts = [sum(block.whole for block in split.blocks[:at]) for at in range(len(split.blocks))]
        pieces = [
            whole.narrow(dim, start + rank * block.local, block.local)
            for start, block in zip(starts, split.blocks, strict=True)
        ]
        whole = torch.cat(pieces, dim)
    return whole.contiguous()


def said(operation: Any, args: Sequence[Any], lays: Mapping[int, Lay], output: Any) -> list[Lay]:
    """What the rule says of an operation of one rank."""
    name = operation._schema.name.partition("::")[2]
    known = [(args[at], each) for at, each in lays.items()]

    def lay_of(tensor: Tensor) -> Lay:
        return next((each for other, each in known if other is tensor), Lay(shards=(None,) * tensor.dim()))

    rule = rule_of(operation, name)
    assert rule is not None, name
    found = rule(Operation(name=name, args=tuple(args), kwargs={}, output=output, lay_of=lay_of))
    return [found] * len(list(tensors_in(output))) if isinstance(found, Lay) else list(found)


def assert_holds(operation: Any, args: Sequence[Any], lays: Mapping[int, Lay]) -> list[Lay]:
    """What the rule says, once the ranks' results have been held to it."""
    whole = list(tensors_in(operation(*args)))
    of_ranks, told = [], []
    for rank in range(RANKS):
        own = [of_rank(arg, lays[at], rank) if at in lays else arg for at, arg in enumerate(args)]
        output = operation(*own)
        of_ranks.append(list(tensors_in(output)))
        told.append(said(operation, own, lays, output))
    assert told[0] == told[1]
    for each, right, *given in zip(told[0], whole, *of_ranks, strict=True):
        if each.partial:
            right = of_rank(right, Lay(shards=each.shards), 0) if not each.over else right
            torch.testing.assert_close(sum(given), right)
            continue
        for rank, found in enumerate(given):
            torch.testing.assert_close(found, of_rank(right, each, rank))
    return told[0]


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


# the gradient of a function of one value, element by element, with what else it is given
GRADIENTS: tuple[tuple[Any, Callable[[Tensor, Tensor], list[Any]]], ...] = (
    (ATEN.softplus_backward.default, lambda g, x: [g, x, 1.0, 20.0]),
    (ATEN.hardtanh_backward.default, lambda g, x: [g, x, -1.0, 1.0]),
    (ATEN.elu_backward.default, lambda g, x: [g, 1.0, 1.0, 1.0, False, x]),
    (ATEN.leaky_relu_backward.default, lambda g, x: [g, x, 0.1, False]),
    (ATEN.hardswish_backward.default, lambda g, x: [g, x]),
    (ATEN.hardsigmoid_backward.default, lambda g, x: [g, x]),
    (ATEN.mish_backward.default, lambda g, x: [g, x]),
)


@pytest.mark.parametrize(("operation", "arguments"), GRADIENTS, ids=lambda each: getattr(each, "__name__", ""))
def test_the_gradient_of_a_function_is_linear_in_the_gradient_alone(
    operation: Any, arguments: Callable[[Tensor, Tensor], list[Any]]
) -> None:
    gradient, value = drawn(3, 8), drawn(8, 3).t().contiguous()
    args = arguments(gradient, value)
    at = next(place for place, arg in enumerate(args) if arg is value)
    part, summand = lay(None, shard(4, 4)), lay(None, None, partial=True)
    assert assert_holds(operation, args, {0: part, at: part}) == [part]
    assert assert_holds(operation, args, {0: summand}) == [summand]
    with pytest.raises(Mismatch, match="it is not linear"):
        said(operation, args, {at: summand}, gradient)
    with pytest.raises(Mismatch, match="meets a whole dim"):
        said(operation, args, {0: part}, gradient)


def test_the_logarithm_of_a_sigmoid_and_its_gradient_keep_parts() -> None:
    value, gradient, part = drawn(3, 8), drawn(3, 8), lay(None, shard(8))
    found = assert_holds(ATEN.log_sigmoid_forward.default, [value], {0: part})
    assert found[0] == part
    buffer = ATEN.log_sigmoid_forward(value)[1]
    lays = {0: lay(None, None, partial=True)}
    assert assert_holds(ATEN.log_sigmoid_backward.default, [gradient, value, buffer], lays) == [lays[0]]
    with pytest.raises(Mismatch, match="it is not linear"):
        said(ATEN.log_sigmoid_forward.default, [value], lays, (value, value))


ROWS, MATRICES, STOPS = drawn(6, 4), drawn(3, 4, 8), torch.tensor([2, 2, 6], dtype=torch.int32)


def test_products_of_groups_sum_over_what_is_contracted_and_keep_columns() -> None:
    operation, args = THEIRS.grouped_mm_fallback.default, [ROWS, MATRICES, STOPS]
    columns = lay(None, None, shard(4, 4))
    assert assert_holds(operation, args, {1: columns}) == [lay(None, shard(4, 4))]
    found = assert_holds(operation, args, {0: lay(None, shard(4)), 1: lay(None, shard(4), None)})
    assert found == [lay(None, None, partial=True)]
    assert assert_holds(operation, args, {0: lay(None, None, partial=True)}) == found
    output = operation(*args)
    with pytest.raises(Mismatch, match="contracted with a whole dim"):
        said(operation, args, {1: lay(None, shard(4), None)}, output)
    with pytest.raises(Mismatch, match="a part of the experts"):
        said(operation, args, {1: lay(shard(3), None, None)}, output)


def test_gradients_of_products_of_groups_lie_as_rows_and_matrices_do() -> None:
    operation = THEIRS.grouped_mm_fallback_backward.default
    args = [ROWS, MATRICES, STOPS, drawn(6, 8)]
    columns, summand = lay(None, None, shard(8)), lay(None, None, partial=True)
    assert assert_holds(operation, args, {1: columns, 3: lay(None, shard(8))}) == [summand, columns]
    lays = {0: lay(None, shard(2, 2)), 1: lay(None, shard(2, 2), None)}
    assert assert_holds(operation, args, lays) == [lays[0], lays[1]]
    assert assert_holds(operation, args, {3: summand}) == [summand, lay(None, None, None, partial=True)]
    output = operation(*args)
    with pytest.raises(Mismatch, match="contracted with a whole dim"):
        said(operation, args, {1: columns}, output)
    with pytest.raises(Mismatch, match="rows of which each rank has a part"):
        said(operation, args, {0: lay(shard(6), None)}, output)
    with pytest.raises(Mismatch, match="the product of two partial sums"):
        said(operation, args, {0: summand, 3: summand}, output)


def test_strides_that_show_all_of_a_value_again_move_its_parts_and_others_have_no_rule() -> None:
    def turned(value: Tensor) -> list[Any]:
        return [value, [value.shape[1], 3, value.shape[0]], [value.stride(1), 0, value.stride(0)]]

    value, operation = drawn(5, 8), ATEN.as_strided.default
    for rank in range(RANKS):
        own = of_rank(value, part := lay(None, shard(8)), rank)
        (found,) = said(operation, turned(own), {0: part}, operation(*turned(own)))
        right = operation(*turned(value))
        assert [each is not None and bool(each.over) for each in found.shards] == [True, False, False]
        torch.testing.assert_close(operation(*turned(own)), of_rank(right, found, rank))
    args = turned(value)
    (found,) = assert_holds(operation, args, {0: lay(None, None, partial=True)})
    assert found.partial == TP
    for wrong in ([value, [39], [1]], [value, [8], [1]], [value, [5, 4], [8, 2]], [value, [4, 8], [8, 1], 4]):
        with pytest.raises(NoRule):
            said(operation, wrong, {0: lay(None, shard(8))}, operation(*wrong))


def test_strides_that_cut_a_box_out_of_a_value_are_stretches_of_its_dims() -> None:
    value, operation = drawn(6, 5, 8), ATEN.as_strided.default
    heads = lay(shard(6), None, None)
    for width, start in ((3, 0), (5, 3), (4, 8)):  # the last begins in the second row
        for rank in range(RANKS):
            own = of_rank(value, heads, rank)
            rows = 5 - start // 8
            args = [own, [3, rows, width], list(own.stride()), start]
            (found,) = said(operation, args, {0: heads}, operation(*args))
            assert found == heads
            right = of_rank(value, heads, rank)[:, start // 8 :, start % 8 : start % 8 + width]
            torch.testing.assert_close(operation(*args), right)
    args = [value, [6, 5, 2], list(value.stride()), 1]
    with pytest.raises(Mismatch, match="cuts through the parts of a dim"):
        said(operation, args, {0: lay(None, None, shard(16))}, operation(*args))


def test_a_view_of_no_elements_keeps_the_parts_behind_and_has_no_rule_for_others() -> None:
    value, operation = torch.zeros(0, 8), ATEN.view.default
    for rank in range(RANKS):
        own = of_rank(value, lay(None, shard(8)), rank)
        args = [own, [0, 7, own.shape[1]]]
        (found,) = said(operation, args, {0: lay(None, shard(8))}, operation(*args))
        assert found.shards == (None, None, shard(8))
        args = [own, [0, 7, 2, own.shape[1] // 2]]
        with pytest.raises(NoRule):
            said(operation, args, {0: lay(None, shard(8))}, operation(*args))
