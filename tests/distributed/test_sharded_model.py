"""What people do with a model: copy it, train it, checkpoint its activations, make mistakes. Against one process."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import cache
from typing import Any

import pytest
import torch
from ranks import run_on_ranks
from tiny import randomized
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from toys import FFN, HIDDEN, VOCAB, Gated, Heads, Pair, Rms

from parallel_plans import full_gradients, full_state_dict, parallelize
from parallel_plans.collectives import record_collectives
from parallel_plans.storage import STORAGES, Storage

RANKS = (2, 3)
EXACT = 1e-10  # of the largest value, in float64
TIED = "embed.weight"


class Small(nn.Module):
    """A language model of every kind of part, its head tied to its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.heads = Heads()
        self.config = self.heads.config
        self.gated = Gated(FFN)
        self.pair = Pair(FFN, Rms(FFN))
        self.norm = Rms(HIDDEN)
        self.head = nn.Linear(HIDDEN, VOCAB, bias=False)
        self.head.weight = self.embed.weight
        self.is_checkpointed = False

    def layers(self, hidden: Tensor) -> Tensor:
        return self.norm(self.pair(self.gated(self.heads(hidden) + hidden) + hidden))

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        if self.is_checkpointed:
            return self.head(checkpoint(self.layers, hidden, use_reentrant=False))
        return self.head(self.layers(hidden))


PLAN: dict[str, Any] = {
    "embed": "embedding_rowwise",
    "heads": {"style": "local_counts", "counts": {"count": 1, "config.heads": 1}},
    "heads.query": {"style": "colwise", "unit": 4},
    "heads.norm": "replicated_with_grad_allreduce",
    "heads.out": {"style": "rowwise", "unit": 4},
    "gated.gate_up": "packed_colwise",
    "gated.down": "rowwise",
    "pair.up": "colwise",
    "pair.norm": "sharded_norm",
    "pair.down": "rowwise",
    "norm": "replicate",
    "head": "colwise_gather_output",
}


def small() -> nn.Module:
    return randomized(Small().double())


def tokens(seed: int) -> Tensor:
    return torch.randint(0, VOCAB, (3, 9), generator=torch.Generator().manual_seed(seed))


def loss_of(model: nn.Module, seed: int) -> Tensor:
    logits = model(tokens(seed))
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens(seed + 100).flatten())


def off(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """By how much of the largest true value the worst tensor is off; `got` and `want` have the same names."""
    assert got.keys() == want.keys()
    return max(float((got[name] - want[name]).abs().max() / want[name].abs().max()) for name in want)


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def mesh_of(ranks: int) -> DeviceMesh:
    return init_device_mesh("cpu", (ranks,), mesh_dim_names=("tp",))


def copying(ranks: int, storage: Storage) -> dict[str, Any]:
    """A copy and its original, one after the other through a backward, and the copy changed."""
    whole = small()
    loss_of(whole, 1).backward()
    original = parallelize(small(), PLAN, mesh_of(ranks), storage=storage)
    copy = deepcopy(original)
    loss_of(copy, 1).backward()
    found = {"untouched": not gradients_of(original), "copy": off(full_gradients(copy), gradients_of(whole))}
    kept = {name: gradient.clone() for name, gradient in full_gradients(copy).items()}
    before = loss_of(original, 2).detach()
    with torch.no_grad():
        for parameter in copy.parameters():
            parameter.mul_(0.5)
    found["independent"] = torch.equal(loss_of(original, 2), before) and not torch.equal(loss_of(copy, 2), before)
    loss_of(original, 1).backward()
    found["original"] = off(full_gradients(original), gradients_of(whole))
    found["copy kept"] = all(torch.equal(value, kept[name]) for name, value in full_gradients(copy).items())
    found["tied"] = copy.head.weight is copy.embed.weight and copy.head.weight is not original.head.weight
    return found


def checkpointing(ranks: int, storage: Storage) -> dict[str, Any]:
    whole = small()
    loss_of(whole, 1).backward()
    split = parallelize(small(), PLAN, mesh_of(ranks), storage=storage)
    split.is_checkpointed = True
    with record_collectives() as calls:
        loss = loss_of(split, 1)
        forward = len(calls)
        loss.backward()
    return {
        "gradients": off(full_gradients(split), gradients_of(whole)),
        "recomputed": [call.op for call in calls if call.backward].count("all_reduce"),
        "forward": forward,
    }


def training(ranks: int, storage: Storage) -> dict[str, Any]:
    """Three steps of AdamW with clipped gradients, side by side with one process."""
    models = [small(), parallelize(small(), PLAN, mesh_of(ranks), storage=storage)]
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1) for model in models]
    norms: list[list[float]] = []
    for step in range(3):
        norms.append([])
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            loss_of(model, step).backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            norms[-1].append(float(norm.full_tensor() if isinstance(norm, DTensor) else norm))
            optimizer.step()
    moved = off(small().state_dict(), dict(models[0].state_dict()))
    return {"norms": norms, "moved": moved, "state": off(full_state_dict(models[1]), dict(models[0].state_dict()))}


def failing(ranks: int, storage: Storage) -> dict[str, Any]:
    """Calls that raise inside a forward: a rowwise layer, which hides its bias, and a split norm without a mean."""
    split = parallelize(small(), PLAN, mesh_of(ranks), storage=storage)
    before = {name: id(parameter) for name, parameter in split.named_parameters()}
    with pytest.raises(RuntimeError):
        split.gated.down(torch.zeros(2, HIDDEN + 1, dtype=torch.float64))
    after = {name: id(parameter) for name, parameter in split.named_parameters()}
    loss = loss_of(split, 1)
    return {"same": before == after, "works": float((loss - loss_of(small(), 1)).detach().abs() / loss.detach())}


class Scale(nn.Module):
    """No norm at all."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(FFN))

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden * self.weight


def meanless(ranks: int, storage: Storage) -> dict[str, Any]:
    plan = {"up": "colwise", "norm": "sharded_norm", "down": "rowwise"}
    split = parallelize(Pair(FFN, Scale()), plan, mesh_of(ranks), storage=storage)
    before = {name: id(parameter) for name, parameter in split.named_parameters()}
    with pytest.raises(TypeError) as caught:
        split(torch.randn(2, HIDDEN))
    return {
        "message": str(caught.value),
        "same": before == {name: id(parameter) for name, parameter in split.named_parameters()},
        "width": split.norm.weight.to_local().numel() if storage == "dtensor" else split.norm.weight.numel(),
    }


def in_half_precision(ranks: int, storage: Storage) -> dict[str, float]:
    """Elements of a split norm's output that are not, bit by bit, what one process computes; as a share."""
    found = {}
    for name, norm in {"rms": nn.RMSNorm(96), "layer": nn.LayerNorm(96)}.items():
        whole = nn.Sequential(randomized(norm)).to(torch.bfloat16)
        hidden = 0.01 * torch.randn(64, 96, generator=torch.Generator().manual_seed(4))  # small, so that eps counts
        hidden = hidden.to(torch.bfloat16)
        split = parallelize(deepcopy(whole), {"0": "sharded_norm"}, mesh_of(ranks), storage=storage)
        rank = torch.distributed.get_rank()
        want = whole(hidden).detach().chunk(ranks, dim=-1)[rank]
        got = split(hidden.chunk(ranks, dim=-1)[rank]).detach()
        found[name] = float((got != want).double().mean())
    return found


PROBES: tuple[Callable[..., dict[str, Any]], ...] = (
    copying,
    checkpointing,
    training,
    failing,
    meanless,
    in_half_precision,
)


def on_a_rank(ranks: int) -> dict[tuple[str, str], Any]:
    found: dict[tuple[str, str], Any] = {}
    for probe in PROBES:
        for storage in STORAGES:
            if (probe, storage) == (training, "local"):
                continue  # plain local parameters are not for norms over all ranks
            found[probe.__name__, storage] = probe(ranks, storage)
    return found


@cache
def results(ranks: int) -> list[dict[tuple[str, str], Any]]:
    return run_on_ranks(on_a_rank, ranks, ranks)


each_size = pytest.mark.parametrize("ranks", RANKS)
each_storage = pytest.mark.parametrize("storage", STORAGES)


@each_size
@each_storage
def test_a_copy_computes_on_its_own_parameters_and_the_original_on_its_own(ranks: int, storage: str) -> None:
    for found in (result["copying", storage] for result in results(ranks)):
        assert found["untouched"]
        assert found["independent"]
        assert found["tied"]
        assert found["copy kept"]
        assert max(found["copy"], found["original"]) <= EXACT


@each_size
@each_storage
def test_checkpointed_activations_give_the_same_gradients(ranks: int, storage: str) -> None:
    for found in (result["checkpointing", storage] for result in results(ranks)):
        assert found["gradients"] <= EXACT
        # heads, gated, pair and the mean of its norm; besides, the embedding and the gathered logits
        assert found["forward"] == 4 + 2
        # the four again; then back: the head's input, the inputs of three layers, the heads' norm, the mean
        assert found["recomputed"] == 4 + 1 + 3 + 1 + 1


@each_size
def test_clipping_and_adamw_steps_are_those_of_one_process(ranks: int) -> None:
    for found in (result["training", "dtensor"] for result in results(ranks)):
        for true, got in found["norms"]:
            assert true > 0.1  # clipped indeed
            assert abs(got - true) <= EXACT * true
        assert found["moved"] > 1e-3
        assert found["state"] <= EXACT


@each_size
@each_storage
def test_an_error_inside_a_forward_leaves_the_parameters_in_place(ranks: int, storage: str) -> None:
    for found in (result["failing", storage] for result in results(ranks)):
        assert found["same"]
        assert found["works"] <= EXACT


@each_size
@each_storage
def test_a_module_without_a_mean_is_no_norm(ranks: int, storage: str) -> None:
    for found in (result["meanless", storage] for result in results(ranks)):
        assert found["same"]
        assert found["message"] == (
            f"norm: sharded_norm found no mean over a last dim of {found['width']} in the forward of Scale, so its "
            "statistics cannot be taken over all ranks; gather before it instead (colwise_gather_output, then "
            "rowwise_split_input)"
        )


@each_size
@each_storage
def test_split_norms_round_where_torch_rounds(ranks: int, storage: str) -> None:
    for found in (result["in_half_precision", storage] for result in results(ranks)):
        assert all(share < 0.01 for share in found.values()), found  # a sum in another order may tip a rounding
