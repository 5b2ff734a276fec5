"""Small modules that use one style each, as models use it, and no model of transformers."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

HIDDEN, FFN, VOCAB = 12, 10, 11  # 10 and 11 do not divide by 3


class Only(nn.Module):
    """One layer, called `layer`."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden: Tensor) -> Tensor:
        return self.layer(hidden)


class Pair(nn.Module):
    """One linear layer into another, by way of a norm where one is given."""

    def __init__(self, wide: int = FFN, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.up = nn.Linear(HIDDEN, wide)
        self.norm = nn.Identity() if norm is None else norm
        self.down = nn.Linear(wide, HIDDEN)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down(self.norm(self.up(hidden)).tanh())


class Gated(nn.Module):
    """A gate and an up projection fused into one."""

    def __init__(self, ffn: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(HIDDEN, 2 * ffn)
        self.down = nn.Linear(ffn, HIDDEN)

    def forward(self, hidden: Tensor) -> Tensor:
        gate, up = self.gate_up(hidden).chunk(2, dim=-1)
        return self.down(gate.tanh() * up)


class Partial(nn.Module):
    """Two layers without biases; whoever wraps the module sums what it gives."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(HIDDEN, FFN)
        self.down = nn.Linear(FFN, HIDDEN, bias=False)

    def forward(self, hidden: Tensor) -> tuple[Tensor, None]:
        return self.down(self.up(hidden).tanh()), None


class Summed(nn.Module):
    """Around `Partial`, whose first output is the value."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Partial()

    def forward(self, hidden: Tensor) -> Tensor:
        return self.inner(hidden)[0]


class Words(nn.Module):
    """An embedding, and a head that may be tied to it."""

    def __init__(self, padding: int | None = None, *, head: bool = False, wide: int = HIDDEN) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, wide, padding_idx=padding)
        self.head = nn.Linear(wide, VOCAB, bias=False) if head else None
        if self.head is not None:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        embedded = self.embed(tokens)
        return embedded if self.head is None else self.head(embedded.tanh())


class Rms(nn.Module):
    """The norm that model code writes out."""

    def __init__(self, wide: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(wide))

    def forward(self, hidden: Tensor) -> Tensor:
        return self.weight * hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + 1e-6)


class Layer(nn.Module):
    """A norm and a block, beside a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.block = Rms(HIDDEN), Pair()

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.block(self.norm(hidden))


class Stack(nn.Module):
    """Two layers and a last norm."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.norm = nn.ModuleList([Layer(), Layer()]), Rms(HIDDEN)

    def forward(self, hidden: Tensor) -> Tensor:
        for layer in self.layers:
            hidden = layer(hidden)
        return self.norm(hidden)


class Heads(nn.Module):
    """Three heads of four features, each normed by the same weights; how many there are is kept twice."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.config = 3, SimpleNamespace(heads=3, size=4)
        self.query = nn.Linear(HIDDEN, 12, bias=False)
        self.norm = Rms(4)
        self.out = nn.Linear(12, HIDDEN)

    def forward(self, hidden: Tensor) -> Tensor:
        by_head = self.query(hidden).view(*hidden.shape[:-1], self.count, self.config.size)
        normed = self.norm(by_head).reshape(*hidden.shape[:-1], self.config.heads * 4)
        return self.out(normed)


class DrawnHeads(nn.Module):
    """Three heads of four features, each turned by numbers that are drawn for it."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 3
        self.query = nn.Linear(HIDDEN, 12)
        self.out = nn.Linear(12, HIDDEN)

    def forward(self, hidden: Tensor) -> Tensor:
        by_head = self.query(hidden).view(*hidden.shape[:-1], self.count, 4)
        drawing = torch.Generator().manual_seed(3)
        turns = torch.randn(self.count, 4, 4, generator=drawing, dtype=hidden.dtype)
        shift = torch.rand((4,), generator=drawing, dtype=hidden.dtype)  # the same for all heads
        return self.out((torch.einsum("...hd,hde->...he", by_head, turns) + shift).flatten(-2))


class BiasedHeads(nn.Module):
    """Three heads of four features, to each of which a number is added that the caller knows."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 3
        self.query = nn.Linear(HIDDEN, 12)
        self.out = nn.Linear(12, HIDDEN)

    def forward(self, hidden: Tensor, mask: Tensor | None, bias: Tensor) -> Tensor:
        by_head = self.query(hidden).view(*hidden.shape[:-1], self.count, 4)
        by_head = torch.tanh(by_head + bias.view(hidden.shape[0], 1, self.count, 1))
        return self.out(by_head.flatten(-2) if mask is None else by_head.flatten(-2) * mask)


class Biased(nn.Module):
    """Heads that are handed what is worked out once, for all heads of all rows of a batch: `[batch * heads]`."""

    def __init__(self) -> None:
        super().__init__()
        self.slopes = nn.Parameter(torch.ones(3))
        self.inner = BiasedHeads()

    def forward(self, hidden: Tensor) -> Tensor:
        return self.inner(hidden, None, bias=self.slopes.repeat(hidden.shape[0]))


class Transposed(nn.Module):
    """Two layers that keep their weights as `[in, out]`."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = Conv1D(FFN, HIDDEN), Conv1D(HIDDEN, FFN)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(hidden)))


class Wrapped(nn.Module):
    """A module below the root, with the root's config, as models have it."""

    def __init__(self, inner: Heads) -> None:
        super().__init__()
        self.inner, self.config = inner, inner.config

    def forward(self, hidden: Tensor) -> Tensor:
        return self.inner(hidden)


class Latent(nn.Module):
    """Multi-head latent attention without the attention: one projection gives a latent part and one for all heads."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(HIDDEN, 3 * 6)
        self.kv_a = nn.Linear(HIDDEN, 5 + 2)
        self.kv_b = nn.Linear(5, 3 * 4)
        self.out = nn.Linear(3 * 6, HIDDEN)

    def forward(self, hidden: Tensor) -> Tensor:
        latent, rope = self.kv_a(hidden).split([5, 2], dim=-1)
        keys = self.kv_b(latent).unflatten(-1, (-1, 4))
        keys = torch.cat([keys, rope.unsqueeze(-2).expand(*keys.shape[:-1], 2)], dim=-1)
        return self.out((keys * self.query(hidden).unflatten(-1, (-1, 6))).flatten(-2).tanh())


class Mixer(nn.Module):
    """Channels with a filter of their own each, and features of all channels that every channel takes."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(HIDDEN, FFN)
        self.conv = nn.Conv1d(FFN, FFN, 2, groups=FFN, padding=1)
        self.shared = nn.Linear(FFN, 3)
        self.spread = nn.Linear(3, FFN, bias=False)
        self.out = nn.Linear(FFN, HIDDEN)

    def forward(self, hidden: Tensor) -> Tensor:
        channels = self.conv(self.up(hidden).transpose(1, 2))[..., :-1].transpose(1, 2).contiguous().tanh()
        return self.out(channels * nn.functional.linear(self.shared(channels), self.spread.weight))


class Grouped(nn.Module):
    """Heads of two features with a factor each, kept in a buffer, which are normalized in groups of heads."""

    def __init__(self, groups: int, heads: int) -> None:
        super().__init__()
        self.heads, self.groups = heads, groups
        self.up = nn.Linear(HIDDEN, 2 * heads)
        self.norm = GroupNorm(2 * heads, 2 * heads // groups)
        self.out = nn.Linear(2 * heads, HIDDEN)
        self.factors = nn.Buffer(torch.arange(1, heads + 1) / heads)

    def forward(self, hidden: Tensor) -> Tensor:
        heads = self.up(hidden).unflatten(-1, (self.heads, 2)) * self.factors[:, None]
        return self.out(self.norm(heads.flatten(-2)).tanh())


class GroupNorm(nn.Module):
    """A norm whose features are divided by the size of those in their group."""

    def __init__(self, wide: int, group_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(wide))
        self.group_size = group_size

    def forward(self, hidden: Tensor) -> Tensor:
        groups = hidden.unflatten(-1, (-1, self.group_size))
        groups = groups * torch.rsqrt(groups.pow(2).mean(-1, keepdim=True) + 1e-3)
        return self.weight * groups.flatten(-2)


class Scaled(nn.Module):
    """Features that are all scaled by one number of their token."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(HIDDEN, FFN)
        self.scale = nn.Linear(HIDDEN, 1)
        self.down = nn.Linear(FFN, HIDDEN)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down(self.up(hidden).tanh() * self.scale(hidden))


class Experts(nn.Module):
    """Three experts with fused weights, and one that passes its input on."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(3, 2 * FFN, HIDDEN))
        self.down_proj = nn.Parameter(torch.zeros(3, HIDDEN, FFN))
        self.zero = nn.Identity()

    def forward(self, hidden: Tensor, weights: Tensor) -> Tensor:
        gate, up = torch.einsum("...h,efh->...ef", hidden, self.gate_up_proj).chunk(2, dim=-1)
        each = torch.einsum("...ef,ehf->...eh", gate.tanh() * up, self.down_proj)
        return (each * weights[..., :3, None]).sum(-2) + self.zero(hidden) * weights[..., 3:]


class Mixture(nn.Module):
    """A router and its experts, with a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, 4)
        self.experts = Experts()

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.experts(hidden, weights=self.router(hidden).softmax(-1))


class Sparse(nn.Module):
    """Keeps the features that are more than a deviation above their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(HIDDEN, FFN), nn.Linear(FFN, HIDDEN)

    def forward(self, hidden: Tensor) -> Tensor:
        wide = self.up(hidden)
        limit = torch.mean(wide, dim=-1, keepdim=True) + wide.std(-1, keepdim=True, unbiased=False)
        return self.down(torch.nn.functional.relu(wide - limit / wide.var(-1, keepdim=True).add(1)))


class Weighed(nn.Module):
    """Three heads of four, each weighed by a number that is made of all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.values, self.weights, self.out = nn.Linear(HIDDEN, 12), nn.Linear(12, 3), nn.Linear(12, HIDDEN)

    def forward(self, hidden: Tensor) -> Tensor:
        values = self.values(hidden)
        weighed = values.unflatten(-1, (-1, 4)) * self.weights(values).unsqueeze(-1)
        return self.out(weighed.flatten(-2))


class PerHead(nn.Module):
    """A norm for every head, of [batch, heads, sequence, head_dim]."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(4) for _ in range(3))

    def forward(self, states: Tensor) -> Tensor:
        return torch.cat([norm(each) for norm, each in zip(self.norms, states.split(1, dim=1), strict=True)], dim=1)


class NormedHeads(nn.Module):
    """Three heads of four with a norm each."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.each, self.out = nn.Linear(HIDDEN, 12), PerHead(), nn.Linear(12, HIDDEN)

    def forward(self, hidden: Tensor) -> Tensor:
        states = self.query(hidden).unflatten(-1, (-1, 4)).transpose(1, 2)
        return self.out(self.each(states).transpose(1, 2).flatten(-2))
