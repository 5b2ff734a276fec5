"""Small mixtures of experts that call routers and experts in each of the ways that are understood; no transformers.

Legend of shape suffixes: T tokens, K slots (top-k), S = T*K pairs, E experts, H hidden, F an expert's width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HIDDEN, FFN = 12, 8
EXPERTS, SLOTS = 5, 2  # 5 experts do not divide by 2 or 4


class Router(nn.Module):
    """Gives logits [T, E], weights [T, K] and ids [T, K]."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(HIDDEN, EXPERTS)

    def forward(self, hidden_TH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits_TE = self.layer(hidden_TH)
        weights_TK, ids_TK = logits_TE.softmax(-1).topk(SLOTS)
        return logits_TE, weights_TK / weights_TK.sum(-1, keepdim=True), ids_TK


class Experts(nn.Module):
    """A loop over stacked experts, gated, with biases."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts = EXPERTS
        self.gate_up = nn.Parameter(torch.zeros(EXPERTS, 2 * FFN, HIDDEN))
        self.gate_up_bias = nn.Parameter(torch.zeros(EXPERTS, 2 * FFN))
        self.down = nn.Parameter(torch.zeros(EXPERTS, HIDDEN, FFN))
        self.down_bias = nn.Parameter(torch.zeros(EXPERTS, HIDDEN))

    def forward(self, hidden_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        output_TH = torch.zeros_like(hidden_TH)
        for expert in range(self.num_experts):
            token_N, slot_N = (ids_TK == expert).nonzero(as_tuple=True)
            rows_NF = F.linear(hidden_TH[token_N], self.gate_up[expert], self.gate_up_bias[expert])
            gate_NF, up_NF = rows_NF.chunk(2, dim=-1)
            made_NH = F.linear(gate_NF.tanh() * up_NF, self.down[expert], self.down_bias[expert])
            output_TH = output_TH.index_add(0, token_N, made_NH * weights_TK[token_N, slot_N, None])
        return output_TH


class Routed(nn.Module):
    """A router and its experts, with a residual and something of the logits themselves, as auxiliary losses have."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = Router(), Experts()

    def forward(self, hidden: Tensor) -> Tensor:
        hidden_TH = hidden.flatten(0, -2)
        logits_TE, weights_TK, ids_TK = self.router(hidden_TH)
        routed_TH = self.experts(hidden_TH, ids_TK, weights_TK)
        return hidden + routed_TH.view(hidden.shape) + logits_TE.square().mean()


class ScoringRouter(nn.Module):
    """Gives a score for each expert, zero where a token does not go, and the logits; both [T, E]."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(HIDDEN, EXPERTS)

    def forward(self, hidden_TH: Tensor) -> tuple[Tensor, Tensor]:
        logits_TE = self.layer(hidden_TH)
        top_TK, ids_TK = logits_TE.topk(SLOTS)
        return torch.zeros_like(logits_TE).scatter(1, ids_TK, top_TK.sigmoid()), logits_TE


class EqualExperts(nn.Module):
    """Experts that take as many rows each, one group behind the other, and give zeros for zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts = EXPERTS
        self.gate_up = nn.Parameter(torch.zeros(EXPERTS, HIDDEN, 2 * FFN))
        self.down = nn.Parameter(torch.zeros(EXPERTS, FFN, HIDDEN))

    def forward(self, rows_NH: Tensor) -> Tensor:
        gate, up = torch.bmm(rows_NH.view(self.num_experts, -1, HIDDEN), self.gate_up).chunk(2, dim=-1)
        return torch.bmm(gate.tanh() * up, self.down).reshape(-1, HIDDEN)


class Scored(nn.Module):
    """A block that gives every token to every expert, times its score, beside an expert that all share."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = ScoringRouter(), EqualExperts()
        self.up, self.down = nn.Linear(HIDDEN, FFN, bias=False), nn.Linear(FFN, HIDDEN, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden_TH = hidden.flatten(0, -2)
        scores_TE, logits_TE = self.router(hidden_TH)
        rows_NH = hidden_TH.repeat(scores_TE.shape[1], 1) * scores_TE.transpose(0, 1).reshape(-1, 1)
        routed_TH = self.experts(rows_NH).view(scores_TE.shape[1], *hidden_TH.shape).sum(0)
        shared_TH = self.down(self.up(hidden_TH).tanh())
        return (shared_TH + routed_TH).view(hidden.shape) + logits_TE.square().mean()


class SortingRouter(nn.Module):
    """Gives the pairs in expert order, their tokens, their weights, how many each expert has, and the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(HIDDEN, EXPERTS)

    def forward(self, hidden_TH: Tensor) -> tuple[Tensor, Tensor, Tensor, list[int], Tensor]:
        logits_TE = self.layer(hidden_TH)
        weights_TK, ids_TK = logits_TE.topk(SLOTS)
        order_S = ids_TK.flatten().argsort(stable=True)
        sizes = ids_TK.flatten().bincount(minlength=EXPERTS).tolist()
        return order_S, order_S // SLOTS, weights_TK.softmax(-1).flatten()[order_S], sizes, logits_TE


class SortedExperts(nn.Module):
    """One linear layer of every expert, for rows in expert order."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.num_experts = EXPERTS
        self.weight = nn.Parameter(torch.zeros(EXPERTS, outputs, inputs))

    def forward(self, rows_SH: Tensor, sizes: list[int]) -> Tensor:
        groups = rows_SH.split(sizes)
        return torch.cat([F.linear(groups[expert], self.weight[expert]) for expert in range(self.num_experts)])


class Sorted(nn.Module):
    """A block that sorts its tokens by expert itself, and adds a bias to what they make."""

    def __init__(self) -> None:
        super().__init__()
        self.router = SortingRouter()
        self.up, self.down = SortedExperts(HIDDEN, 2 * FFN), SortedExperts(FFN, HIDDEN)
        self.bias = nn.Parameter(torch.zeros(HIDDEN))

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        hidden_TH = hidden.flatten(0, -2)
        _, token_S, weights_S, sizes, logits_TE = self.router(hidden_TH)
        gate_SF, up_SF = self.up(hidden_TH[token_S], sizes).chunk(2, dim=-1)
        made_SH = self.down(gate_SF.tanh() * up_SF, sizes) * weights_S.unsqueeze(-1)
        output_TH = torch.zeros_like(hidden_TH).index_add(0, token_S, made_SH)
        return output_TH.view(hidden.shape) + self.bias, logits_TE


class Layer(nn.Module):
    """Around a mixture, called `mixture`, a residual."""

    def __init__(self, mixture: nn.Module) -> None:
        super().__init__()
        self.mixture = mixture

    def forward(self, hidden: Tensor) -> Tensor:
        output = self.mixture(hidden)
        if isinstance(output, tuple):
            output, logits_TE = output
            output = output + logits_TE.square().mean()
        return hidden + output
