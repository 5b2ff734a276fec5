"""A plain module of one's own under a plan: checked, split, trained, and held against one process.

python examples/own_model.py                                # checks the plan on 2, 3 and 4 ranks, without any
torchrun --nproc-per-node 3 examples/own_model.py           # trains on 3, and compares with one process
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from parallel_plans import full_state_dict, parallelize, verify_plan, watch_ranks
from parallel_plans.mesh import local_device, started_ranks

VOCAB, HIDDEN, FFN, HEADS, LAYERS, LENGTH = 97, 48, 100, 6, 2, 24

# Every parameter has a rule. Heads are units: no rank gets part of one, and 4 ranks have 2, 2, 1 and 1 of the 6.
PLAN = {
    "embed": "embedding_rowwise",  # [vocab@tp, hidden]
    "blocks.*.norm": "replicate",
    "blocks.*.attention.query": {"style": "colwise", "unit": HIDDEN // HEADS},  # [heads*8@tp, hidden]
    "blocks.*.attention.key": {"style": "colwise", "unit": HIDDEN // HEADS},
    "blocks.*.attention.value": {"style": "colwise", "unit": HIDDEN // HEADS},
    "blocks.*.attention.out": {"style": "rowwise", "unit": HIDDEN // HEADS},  # [hidden, heads*8@tp]
    "blocks.*.up": "colwise",  # [ffn@tp, hidden]
    "blocks.*.down": "rowwise",  # [hidden, ffn@tp]
    "head": "colwise_gather_output",  # [vocab@tp, hidden]
}


class Attention(nn.Module):
    """Causal attention that asks its inputs how many heads it has: on a rank it has fewer."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(HIDDEN, HIDDEN) for _ in range(3))
        self.out = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (self.by_head(linear(x)) for linear in (self.query, self.key, self.value))
        scores = query @ key.transpose(2, 3) / query.shape[-1] ** 0.5
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
        mixed = scores.masked_fill(later, float("-inf")).softmax(-1) @ value
        return self.out(mixed.transpose(1, 2).flatten(2))

    @staticmethod
    def by_head(x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, HIDDEN // HEADS)).transpose(1, 2)


class Block(nn.Module):
    """Attention and an MLP, each added to what came."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(HIDDEN), Attention()
        self.up, self.down = nn.Linear(HIDDEN, FFN), nn.Linear(FFN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x))
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Model(nn.Module):
    """A small language model."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.head = nn.Linear(HIDDEN, VOCAB)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def new_model() -> nn.Module:
    """The same model wherever it is made."""
    torch.manual_seed(0)
    return Model()


def batch_of(step: int) -> Tensor:
    return torch.randint(VOCAB, (4, LENGTH), generator=torch.Generator().manual_seed(step))


def trained(model: nn.Module, steps: int, device: torch.device) -> list[float]:
    """The losses of some steps of AdamW; nothing in it knows of ranks."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for step in range(steps):
        tokens = batch_of(step).to(device)
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def check() -> bool:
    """Whether the plan is sound on some numbers of ranks; prints what is wrong where it is not."""
    reports = [verify_plan(new_model(), plan=PLAN, tp=tp, inputs=(batch_of(0),)) for tp in (2, 3, 4)]
    for report in reports:
        print(f"tp {report.mesh['tp']}: {'sound' if report.ok else 'wrong'}", *report.findings, sep="\n  ")
    return all(report.ok for report in reports)


def compare(steps: int) -> bool:
    """Whether the ranks train as one process does; rank 0 prints both."""
    device = local_device()
    if not dist.is_initialized():
        dist.init_process_group()
    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("tp",))
    with watch_ranks():
        alone = new_model().to(device)
        model = parallelize(new_model().to(device), PLAN, mesh)
        expected, losses = trained(alone, steps, device), trained(model, steps, device)
        weights = full_state_dict(model)
    whole = alone.state_dict()
    furthest = max(float((weights[name] - tensor).abs().max() / tensor.abs().max()) for name, tensor in whole.items())
    is_same = furthest < 1e-3 and all(abs(a - b) < 1e-4 * b for a, b in zip(losses, expected, strict=True))
    if dist.get_rank() == 0:
        print(f"losses on {mesh.size()} ranks:  ", *(f"{loss:.5f}" for loss in losses))
        print("losses in one process:", *(f"{loss:.5f}" for loss in expected))
        print(f"weights differ by {furthest:.1e} of the largest: {'the same' if is_same else 'NOT the same'}")
    dist.destroy_process_group()
    return is_same


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5)
    chosen = parser.parse_args(arguments)
    if not (check() if started_ranks() == 1 else compare(chosen.steps)):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
