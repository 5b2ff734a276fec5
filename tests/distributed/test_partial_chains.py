"""Random chains of operations on partial sums give what they give on whole tensors: values, gradients, layouts."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from partial_cases import HIDDEN, TOKENS, Numbers, off, weighed, world
from ranks import run_on_ranks
from torch import Tensor

from parallel_plans.collectives import Axis
from parallel_plans.partial import Partial, whole

T, H = TOKENS, HIDDEN
SEEDS, STEPS = 100, 14
CLOSE = 1e-10  # of the largest value, in float64

# An operation is drawn from the true value alone, and then done to both.
Operation = Callable[..., Any]


def rows(draw: random.Random, size: int, count: int) -> Tensor:
    return torch.tensor([draw.randrange(size) for _ in range(count)])


def unary(draw: random.Random, x: Tensor) -> Operation:
    """One of what torch can do to `x`."""
    dim, other = draw.randrange(x.dim()), draw.randrange(x.dim())
    size, number = x.shape[dim], draw.choice([-2.0, 0.5, 3])
    some = (slice(None),) * dim + (slice(size // 2, None),)
    picked = rows(draw, size, draw.randint(1, size))
    choices: list[Operation] = [
        lambda x: x.transpose(dim, other),
        lambda x: x.reshape(-1, x.shape[-1]),
        lambda x: x.flatten(),
        lambda x: x.view(x.shape),
        lambda x: x.unsqueeze(dim),
        lambda x: x.squeeze(),
        lambda x: x.contiguous(),
        lambda x: x.clone(),
        lambda x: x[some],
        lambda x: x.narrow(dim, 0, max(1, size - 1)),
        lambda x: x.chunk(2, dim)[-1],
        lambda x: x.split(2, dim)[0],
        lambda x: x.unbind(dim)[0],
        lambda x: x.index_select(dim, picked),
        lambda x: x[(slice(None),) * dim + (picked,)],
        lambda x: x.sum(dim, keepdim=number > 0),
        lambda x: x.mean(dim, keepdim=number > 0),
        lambda x: -x,
        lambda x: x * number,
        lambda x: number * x,
        lambda x: x / number,
        lambda x: x + number,
        lambda x: number - x,
        lambda x: x.unsqueeze(0).expand(2, *x.shape),
        lambda x: x.repeat(2, *[1] * (x.dim() - 1)),
        lambda x: x.tanh(),
    ]
    return draw.choice(choices)


def binary(draw: random.Random, x: Tensor, y: Tensor) -> Operation:
    """One of what torch can do to two of which `y` broadcasts to `x`."""
    alpha = draw.choice([1, -0.5])
    choices: list[Operation] = [
        lambda x, y: x + y,
        lambda x, y: y + x,
        lambda x, y: torch.sub(x, y, alpha=alpha),
        lambda x, y: torch.add(y, x, alpha=alpha),
        lambda x, y: x * y,
        lambda x, y: y * x,
        lambda x, y: x / (y * y + 1),
    ]
    if x.shape == y.shape:
        dim = draw.randrange(x.dim())
        index = rows(draw, x.shape[dim], x.shape[dim])
        choices += [lambda x, y: torch.cat([x, y], dim), lambda x, y: torch.stack((y, x), dim)]
        choices += [lambda x, y: x.index_add(dim, index, y, alpha=alpha)]
    return draw.choice(choices)


def in_place(draw: random.Random) -> Operation:
    alpha = draw.choice([1, -0.5])
    return draw.choice(
        [
            lambda x, y: x.add_(y),
            lambda x, y: x.sub_(y, alpha=alpha),
            lambda x, y: x.mul_(alpha),
            lambda x, y: x.mul_(y),
            lambda x, y: x.div_(2),
            lambda x, y: x.tanh_(),
            lambda x, y: x.copy_(y),
        ]
    )


def broadcasts(small: Tensor, large: Tensor) -> bool:
    sizes = zip(reversed(small.shape), reversed(large.shape), strict=False)
    return small.dim() <= large.dim() and all(a in (1, b) for a, b in sizes)


class Chain:
    """Some sums and whole tensors, and what is made of them, each with its truth."""

    def __init__(self, axis: Axis, seed: int, *, trained: bool, changing: bool) -> None:
        self.draw, self.changing = random.Random(seed), changing
        self.numbers = Numbers(axis.size, trained=trained, seed=seed)
        self.pool = [self.numbers.partial(axis, *shape) for shape in ((T, H), (T, H), (2, 3, H))]
        self.pool += [self.numbers.whole(*shape) for shape in ((T, H), (T, 1), (H,))]

    def do(self, operation: Operation, *operands: tuple[Tensor, Tensor]) -> None:
        try:
            true = operation(*(true for _, true in operands))
        except (RuntimeError, IndexError):
            return  # torch does not do that to these
        self.pool.append((operation(*(mine for mine, _ in operands)), true))

    def step(self) -> None:
        x, y = self.draw.choice(self.pool), self.draw.choice(self.pool)
        kind = self.draw.random()
        if kind < 0.5 and x[1].dim():
            self.do(unary(self.draw, x[1]), x)
        elif kind < 0.85 and x[1].dim() > 0 and x[1].numel() < 500 and broadcasts(y[1], x[1]):
            self.do(binary(self.draw, x[1], y[1]), x, y)
        elif kind < 0.9:
            whole(x[0])  # whenever something else asks
        elif self.changing and broadcasts(y[1], x[1]):
            self.do(in_place(self.draw), x, y)

    def gradients(self) -> tuple[float, str]:
        """How far off they are; where torch itself refuses the backward after a change in place, they are not taken."""
        try:
            weighed([true for _, true in self.pool]).backward()
        except RuntimeError:
            return 0.0, "refused by torch"
        weighed([whole(mine) for mine, _ in self.pool]).backward()
        pairs = [(mine.grad, true.grad) for mine, true in self.numbers.leaves]
        return max(off(mine, true) for mine, true in pairs if mine is not None and true is not None), "compared"


def lies_alike(mine: Tensor, true: Tensor) -> bool:
    """Whether both have the same strides, so that both can be viewed in the same ways."""
    steps = [[step for step, size in zip(x.stride(), x.shape, strict=True) if size > 1] for x in (mine, true)]
    return steps[0] == steps[1]


def run_chain(chain: Chain, trained: bool) -> tuple[str, bool]:
    """How it ended, and whether all that it made is right."""
    try:
        for _ in range(STEPS):
            chain.step()
        is_right = all(lies_alike(*pair) for pair in chain.pool)
        is_right &= all(off(whole(mine), true) <= CLOSE for mine, true in chain.pool)
    except RuntimeError as error:
        if "was added to a partial sum and changed in place" not in str(error):
            raise
        return "refused", True
    if not trained:
        return "compared", is_right
    gradients, end = chain.gradients()
    return end, is_right and gradients <= CLOSE


def run_chains(ranks: int, trained: bool, changing: bool) -> tuple[Counter[str], list[int]]:
    ends, wrong, axis = Counter[str](), [], world(ranks)
    for seed in range(SEEDS):
        with torch.set_grad_enabled(trained):
            chain = Chain(axis, seed, trained=trained, changing=changing)
            end, is_right = run_chain(chain, trained)
        ends[end] += 1
        ends["sums"] += sum(isinstance(mine, Partial) for mine, _ in chain.pool)
        if not is_right:
            wrong.append(seed)
    return ends, wrong


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize(
    ("trained", "changing"),
    [(True, False), (False, True), (True, True)],
    ids=["trained", "in place", "trained and in place"],
)
def test_random_chains_give_what_they_give_on_whole_tensors(trained: bool, changing: bool, ranks: int) -> None:
    for ends, wrong in run_on_ranks(run_chains, ranks, ranks, trained, changing):
        assert wrong == []
        assert ends["compared"] >= 0.8 * SEEDS
        assert ends["refused"] <= (0.05 * SEEDS if changing else 0)
        assert ends["sums"] >= 5 * SEEDS  # the chains are about something
