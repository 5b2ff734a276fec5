"""The laws of partial sums, by name. P stands for a partial sum, w for a whole tensor."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from partial_cases import FULL, HIDDEN, TOKENS, Law
from torch import Tensor

T, H, E = TOKENS, HIDDEN, 2
P, W = ("P", T, H), ("w", T, H)
GATE = T * 8  # bytes of a gate [T, 1]


def gated(routed: Tensor, shared: Tensor, gate: Tensor) -> Tensor:
    return routed + torch.sigmoid(gate) * shared


def with_unrelated_work(routed: Tensor, shared: Tensor, x: Tensor) -> Tensor:
    logits = (x @ x.t()).softmax(-1)
    scaled = shared * logits[:, :1].exp()
    noise = torch.zeros_like(routed) + logits.sum()
    assert routed.shape == shared.shape == scaled.shape
    assert routed.dtype == torch.float64
    assert len(routed) == routed.size(0) == T
    assert routed.dim() == 2
    assert routed.is_floating_point()
    return (routed + scaled) + noise


def llama4(shared: Tensor, routed: Tensor) -> Tensor:
    out = shared * 1
    out.add_(routed.reshape(E, -1, routed.shape[-1]).sum(dim=0))
    return out


def add_into_a_view(p: Tensor, q: Tensor) -> tuple[Tensor, ...]:
    p = p * 1
    rows, flat = p[2:4], p.view(-1)
    rows += q[2:4]
    flat[:3].sub_(q[0, :3], alpha=2)
    return p, rows, flat


def add_whole_in_place(p: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    p = p * 1
    before = p.t()
    p += w
    before -= 2 * w.t()
    return p, before


def scale_in_place(p: Tensor, w: Tensor, factor: Tensor) -> tuple[Tensor, ...]:
    p = p * 1
    before = p[1:]
    p = p.mul_(factor)
    before += w[1:]
    before /= 3
    return p, before


def change_the_source_of_copies(p: Tensor, q: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    p = p * 1
    copies = p.clone(), p + w, p.t().reshape(-1), p * 2
    p.add_(q)
    return p, *copies


def change_copies(p: Tensor, q: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    p = p * 1
    copies = p.clone(), p + w, p.t().reshape(-1), p * 2
    for made in copies:
        made += q.reshape(made.shape)
    return p, *copies


def change_after_it_was_asked_for(p: Tensor, q: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    p = p * 1
    rows, copy = p[:2], p.clone()
    asked = p.tanh()  # reduces
    p += q
    rows *= 2
    return p, rows, copy, asked + w


def change_without_a_rule(p: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    p, w = p * 1, w * 1
    rows = p[1:3]
    rows.clamp_(min=0.1)
    p[0] = 5.0
    w.add_(p)
    return p, rows, w


def index_add(routed: Tensor, base: Tensor, rows: Tensor) -> Tensor:
    index = torch.tensor([0, 3, 3, 5])
    return torch.index_add(base, 0, index, routed[:4]).index_add(0, index, rows, alpha=2)


def pieces(p: Tensor, q: Tensor) -> tuple[Tensor, ...]:
    first, second = p.chunk(2, dim=-1)
    rows = torch.split(q, [2, 3, 1])[1]
    return first + second, torch.cat((-second, first), dim=-1), rows.unbind(0)[2], torch.stack([first, second], 1)


def row_by_a_scalar(p: Tensor, q: Tensor) -> tuple[Tensor, ...]:
    p, index = p * 1, torch.tensor(2)
    row = p[index]
    p += q
    index += 1
    return p, row


def viewed_by_a_list(p: Tensor) -> Tensor:
    sizes = [2, 3, HIDDEN]
    viewed = p.view(sizes)
    sizes[:2] = [3, 2]
    return viewed.tanh()


def moved(p: Tensor, q: Tensor) -> Tensor:
    x = p.unflatten(0, (2, 3)).permute(2, 0, 1).contiguous().flatten(1).T.unsqueeze(1).expand(T, -1, H)
    y = q.reshape(3, 2, H).transpose(0, 1).reshape_as(q)[None, :, None].squeeze(0)
    return (2 * x + y).narrow(1, 0, 1).swapaxes(0, 1) - torch.movedim(p[None], 0, 0)


LAWS = {
    "a gated sum is reduced once": Law(gated, (P, P, ("w", T, 1)), [FULL], [GATE]),
    "unrelated work in between blocks nothing": Law(with_unrelated_work, (P, P, W), [FULL], [GATE]),
    "a sum of many is reduced once": Law(lambda *p: sum(p[1:], p[0]), (P,) * 5, [FULL]),
    "factors in a chain keep it partial": Law(
        lambda p, q, f, g, h: p + (f * q * 2 / g.exp()) * h,
        (P, P, ("w", T, 1), ("w", H), ("w",)),
        [FULL],
        [8, H * 8, GATE],
    ),
    "a whole residual is added once": Law(lambda p, q, w: w + p + q, (P, P, W), [FULL]),
    "a bias is added once": Law(lambda p, q, b: (p + b) - (2 - q), (P, P, ("w", H)), [FULL]),
    "what is beside either of two is added": Law(
        lambda p, q, v, w: ((p + v) - q, p - (q + v), (p + v) - (q - w)), (P, P, W, W), [FULL] * 3
    ),
    "what is beside takes part in all that follows": Law(
        lambda p, w, q, f: ((p - w).view(2, 3, H) * f).sum(0)[1:] + q[:2], (P, W, P, ("w", H)), [FULL // 3], [H * 8]
    ),
    "a factor on its own comes after the reduction": Law(lambda p, f: p * f, (P, ("w", T, 1)), [FULL]),
    "a factor has its gradient where it is used twice": Law(
        lambda p, q, f: (p * f + q, p * f), (P, P, ("w", T, 1)), [FULL, FULL], [GATE]
    ),
    "asked for twice it is reduced once": Law(lambda p: (p.tanh(), p.exp(), p), (P,), [FULL]),
    "a view and its source are reduced once": Law(lambda p: (p.view(2, 3, H).tanh(), p.tanh()), (P,), [FULL]),
    "a source and its view are reduced once": Law(lambda p: (p.tanh(), p.t().reshape(-1).tanh()), (P,), [FULL]),
    "slices are reduced with what they are cut from": Law(lambda p: (p[:2].tanh(), p[..., 1].tanh()), (P,), [FULL]),
    "a sum and the same with a residual are reduced once": Law(lambda p, w: (p + w, p.tanh()), (P, W), [FULL]),
    "repeated rows are reduced once": Law(lambda p: p.repeat(2, 1), (P,), [FULL]),
    "broadcast rows are reduced before": Law(lambda p, w: p + w, (("P", T, 1), W), [GATE]),
    "factors that broadcast it act on the reduced": Law(lambda p, w: w * p, (("P", H), W), [H * 8]),
    "partial rows are broadcast": Law(lambda p, q: p + q, (("P", H), P), [FULL]),
    "what is not linear gets the whole value": Law(lambda p: F.silu(p), (P,), [FULL]),
    "a product of two is one of whole values, reduced together": Law(lambda p, q: p * q, (P, P), [2 * FULL]),
    "a quotient by a sum is one of the whole value": Law(lambda p, w: w / p, (P, W), [FULL]),
    "a matrix product gets the whole value": Law(lambda p, w: p @ w.t(), (P, W), [FULL]),
    "arguments by name and in lists are made whole together": Law(
        lambda p, q: torch.add(input=torch.hstack([p, q]), other=torch.hstack((q, p))), (P, P), [2 * FULL]
    ),
    "sums over dims stay partial": Law(lambda p, q: p.sum(0, keepdim=True) + q.sum(0), (P, P), [H * 8]),
    "means stay partial": Law(lambda p, q: torch.mean(p, dim=1) - q.mean(-1), (P, P), [T * 8]),
    "picked rows stay partial": Law(
        lambda p, q: p[torch.tensor([4, 0])] + q.index_select(0, torch.tensor([1, 1])), (P, P), [2 * H * 8]
    ),
    "rows picked more often are picked of the reduced": Law(
        lambda p, q: p[torch.arange(2 * T) % T] + q.repeat(2, 1), (P, P), [FULL, FULL]
    ),
    "sums that broadcast each other are reduced before, together": Law(
        lambda p, q: p + q, (("P", T, 1), ("P", 1, H)), [GATE + H * 8]
    ),
    "a row picked by a scalar tensor is a view": Law(row_by_a_scalar, (P, P), [FULL, FULL]),
    "rows picked by a mask stay partial": Law(lambda p, q: (p + q)[torch.arange(T) % 2 == 0], (P, P), [FULL // 2]),
    "joined sums are reduced together": Law(lambda p, q: torch.cat([p, q]), (P, P), [2 * FULL]),
    "a sum joined to itself is reduced before": Law(lambda p: torch.cat([p, p]), (P,), [FULL]),
    "a whole tensor joined does not travel": Law(lambda p, w: torch.cat([w, p]), (P, W), [FULL]),
    "pieces and what is put together of them stay partial": Law(
        lambda p, q: pieces(p + q, q), (P, P), [FULL // 2, FULL, FULL, FULL]
    ),
    "views in a chain stay partial": Law(moved, (P, P), [FULL]),
    "a view stays as it is when the list of its sizes changes": Law(viewed_by_a_list, (P,), [FULL]),
    "rows are added to partial ones": Law(index_add, (P, P, ("w", 4, H)), [FULL]),
    "partial rows are added to whole ones": Law(index_add, (P, W, ("w", 4, H)), [FULL]),
    "dropout in evaluation keeps it partial": Law(lambda p, q: F.dropout(p, 0.5, False) + q, (P, P), [FULL]),
    "an in-place sum is reduced once": Law(llama4, (P, ("P", E * T, H)), [FULL]),
    "in place, views and their source change together": Law(add_into_a_view, (P, P), [FULL]),
    "in place, a whole tensor is added once": Law(add_whole_in_place, (P, W), [FULL]),
    "in place, factors reach views and what was added before": Law(scale_in_place, (P, W, ("w", H)), [FULL], [H * 8]),
    "copies stay as they are when their source changes": Law(change_the_source_of_copies, (P, P, W), [FULL] * 5),
    "a source stays as it is when its copies change": Law(change_copies, (P, P, W), [FULL] * 5),
    "changes after it was asked for are changes of its value": Law(
        change_after_it_was_asked_for, (P, P, W), [FULL, FULL]
    ),
    "in place, what has no rule changes the whole value": Law(change_without_a_rule, (P, W), [FULL]),
}
