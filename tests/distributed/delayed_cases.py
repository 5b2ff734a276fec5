"""Layers in which attention's place and the MLP's are taken by two small branches, joined in many ways."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HIDDEN, FFN, ROWS = 8, 12, 5
PLAN = {
    "layers.*.*.up": "colwise",
    "layers.*.*.down": "rowwise",
    "layers.*.norm": "replicate",
    "layers.*.scale": "replicate",
}


class Branch(nn.Module):
    """A split layer whose output is a partial sum, with a bias and dropout behind it."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.up, self.down, self.dropout = nn.Linear(HIDDEN, FFN), nn.Linear(FFN, HIDDEN), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.down(F.silu(self.up(x))))


class Layer(nn.Module):
    """Two branches, a norm and a trained factor; `join(layer, x)` makes the output of them."""

    def __init__(self, join: Callable[[Any, Tensor], Any], dropout: float) -> None:
        super().__init__()
        self.one, self.two, self.norm = Branch(dropout), Branch(dropout), nn.LayerNorm(HIDDEN)
        self.scale, self.join = nn.Parameter(torch.ones(HIDDEN)), join

    def forward(self, x: Tensor) -> Any:
        return self.join(self, x)


class Model(nn.Module):
    def __init__(self, join: Callable[[Any, Tensor], Any], dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(join, dropout) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
            x = sum(x[1:], x[0]) if isinstance(x, tuple) else x
        return x


def side_by_side(layer: Any, x: Tensor) -> Tensor:
    n = layer.norm(x)
    return x + layer.one(n) + layer.two(n)


def in_a_row(layer: Any, x: Tensor) -> Tensor:
    x = x + layer.one(layer.norm(x))
    return x + layer.two(layer.norm(x))


def in_a_row_with_factors(layer: Any, x: Tensor) -> Tensor:
    x = x + layer.one(layer.norm(x)) * layer.scale
    return x + layer.two(layer.norm(x)) * layer.scale * 0.7


def with_factors(layer: Any, x: Tensor) -> Tensor:
    n = layer.norm(x)
    return x + layer.one(n) * layer.scale * 0.3 + layer.two(n) / 2


def with_unrelated_work(layer: Any, x: Tensor) -> Tensor:
    n = layer.norm(x)
    one = layer.one(n)
    gate = torch.sigmoid(x.mean(-1, keepdim=True)).exp()
    assert one.shape == x.shape
    two = layer.two(n).view(-1, HIDDEN).reshape(x.shape)
    return (one * gate + two) + x.tanh()


def in_place(layer: Any, x: Tensor) -> Tensor:
    n = layer.norm(x)
    one, two = layer.one(n), layer.two(n) * 1
    two += one
    rows = two.view(-1, HIDDEN)
    rows[1:3] += one.view(-1, HIDDEN)[1:3]
    return two + x


def into_a_whole_value(layer: Any, x: Tensor) -> Tensor:
    n, out = layer.norm(x), x * 1
    out.view(-1, HIDDEN).add_(layer.one(n).view(-1, HIDDEN))
    out += layer.two(n)
    return out


def as_a_tuple(layer: Any, x: Tensor) -> tuple[Tensor, ...]:
    n = layer.norm(x)
    return x, layer.one(n), layer.two(n)


def by_way_of_a_norm(layer: Any, x: Tensor) -> Tensor:
    return x + layer.norm(layer.one(x)) + layer.two(x)


class Thrice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value * 3

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 3


class Own(nn.LayerNorm):
    """A norm with code of its own, as kernels have."""

    def forward(self, x: Tensor) -> Tensor:
        assert type(x) is Tensor
        return Thrice.apply(super().forward(x))


@dataclass(frozen=True, kw_only=True)
class Case:
    """A way to join, and the reductions of a layer: outside of training, and in it where dropout drops."""

    join: Callable[[Any, Tensor], Any]
    count: int
    training: int | None = None
    dropout: float = 0.0


CASES = {
    "side by side": Case(join=side_by_side, count=1),
    "side by side, with dropout": Case(join=side_by_side, count=1, training=2, dropout=0.4),
    "in a row": Case(join=in_a_row, count=2),
    "in a row, with dropout": Case(join=in_a_row, count=2, training=2, dropout=0.4),
    "in a row, with trained factors": Case(join=in_a_row_with_factors, count=2),
    "with factors": Case(join=with_factors, count=1),
    "with unrelated work in between": Case(join=with_unrelated_work, count=1),
    "in place and into a view": Case(join=in_place, count=1),
    "in place into a whole value": Case(join=into_a_whole_value, count=2),
    "as a tuple": Case(join=as_a_tuple, count=1),
    "one of them through a norm": Case(join=by_way_of_a_norm, count=2),
}
