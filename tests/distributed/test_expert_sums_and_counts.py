"""Mistakes of sums that wait and of counts of tokens: a reduction that is not delayed, counts that only padding gives.

As in `test_expert_regressions`, every test also takes its guard away and sees its own check fail.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from expert_runs import (
    EP4,
    FAR,
    IMPLEMENTATIONS,
    TP4_EP2_ETP2_DISPATCH,
    Run,
    Starts,
    changed,
    off,
    patched,
    plan_of,
    split,
    style_of,
)
from rows import Row
from tiny import tiny_model, tokens
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from parallel_plans import full_gradients, parallelize, partial_rules
from parallel_plans.collectives import record_collectives
from parallel_plans.experts.dispatch import DispatchBoundary
from parallel_plans.experts.permutation import Permutation, permutation_of
from parallel_plans.partial_tensor import Partial
from parallel_plans.state import local_part

EXACT = 1e-12  # of the largest value, in float64


# ---- a delayed reduction that something between the experts and the sum keeps from being delayed

HIDDEN, FFN, EXPERTS = 12, 10, 4


class Stack(nn.Module):
    """Experts of two layers, as most models call them."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.zeros(EXPERTS, FFN, HIDDEN))
        self.down = nn.Parameter(torch.zeros(EXPERTS, HIDDEN, FFN))

    def forward(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        rows = torch.einsum("th,tkfh->tkf", hidden, self.up[ids]).tanh()
        return (torch.einsum("tkf,tkhf->tkh", rows, self.down[ids]) * weights[..., None]).sum(1)


class Block(nn.Module):
    """routed + gate2 * (gate1 * shared), and much between them that has nothing to do with it."""

    def __init__(self, busy: bool) -> None:
        super().__init__()
        self.busy, self.seen = busy, torch.zeros(())
        self.router = nn.Linear(HIDDEN, EXPERTS)
        self.experts = Stack()
        self.shared_up, self.shared_down = nn.Linear(HIDDEN, FFN), nn.Linear(FFN, HIDDEN)
        self.gate1, self.gate2 = nn.Linear(HIDDEN, 1), nn.Linear(HIDDEN, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        weights, ids = self.router(hidden).softmax(-1).topk(2)
        routed = self.experts(hidden, ids, weights)
        if self.busy:
            routed = routed.view(1, *routed.shape).to(hidden.dtype).squeeze(0)
            self.seen = ids.flatten().bincount(minlength=EXPERTS) / ids.numel() + hidden.detach().norm()
        shared = self.shared_down(self.shared_up(hidden).tanh())
        inner = self.gate1(hidden).sigmoid() * shared
        if self.busy:
            inner = nn.functional.dropout(inner.transpose(0, 1).contiguous().transpose(0, 1), training=False)
            self.seen = self.seen + weights.detach().log().sum() + len(inner) + inner.dim()
        outer = self.gate2(hidden).tanh() * inner
        return (routed + outer) / 2 + hidden if self.busy else routed + outer


BLOCK_PLAN = {
    "block.router": "replicate",
    "block.experts.up": {"style": "moe_tp_gate_up_colwise", "parts": 1},
    "block.experts.down": "moe_tp_down_rowwise",
    "block.experts": "moe_experts_allreduce",
    "block.shared_up": "colwise",
    "block.shared_down": "rowwise",
    "block.gate1": "replicate",
    "block.gate2": "replicate",
}


def block_of(busy: bool) -> nn.Module:
    torch.manual_seed(3)
    model = nn.Module()
    model.block = Block(busy).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def block_input() -> Tensor:
    return torch.linspace(-1, 1, 5 * HIDDEN, dtype=torch.float64).sin().view(5, HIDDEN).requires_grad_()


def block_truth(busy: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """The output, and every gradient, the input's among them."""
    model, x = block_of(busy), block_input()
    output = model.block(x)
    output.pow(3).sum().backward()
    return output.detach(), {"x": x.grad, **{name: p.grad for name, p in model.named_parameters()}}


def block_on_ranks(busy: bool, without: AbstractContextManager[None]) -> dict[str, Any]:
    """How many all-reduces there are forward, and how far the output and all gradients are off on this rank."""
    output, gradients = block_truth(busy)
    mesh, x = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",)), block_input()
    with without:
        model = parallelize(block_of(busy), {"tp_plan": BLOCK_PLAN}, mesh)
        with record_collectives() as calls:
            made = model.block(x)
            made.pow(3).sum().backward()
    ours = {"x": x.grad, **full_gradients(model)}  # those of gates are whole, so these are this rank's own
    return {
        "forward": [call.op for call in calls if not call.backward],
        "output": off(made.detach(), output),
        "gradients": {name: off(ours[name], want) for name, want in gradients.items()},
    }


MULTIPLYING = ("mul", "multiply", "__mul__", "__rmul__", "div", "divide", "true_divide", "__truediv__")


def without_factors() -> AbstractContextManager[None]:
    """A sum that is multiplied is reduced first."""
    functions = {getattr(holder, name) for holder in (torch, Tensor) for name in MULTIPLYING if hasattr(holder, name)}
    rules = {function: rule for function, rule in Partial.rules.items() if function not in functions}
    return patched((Partial, "rules", rules))


def without_views() -> AbstractContextManager[None]:
    """A sum that is looked at in another way is reduced first."""
    functions = {Tensor.view, Tensor.transpose, Tensor.squeeze}
    return patched((Partial, "rules", {f: rule for f, rule in Partial.rules.items() if f not in functions}))


def factors_as_they_are() -> AbstractContextManager[None]:
    """Factors of a sum do not go from I to R."""
    return patched((partial_rules, "_for_part", lambda factor, x: factor))


@cache
def block_runs() -> Starts:
    without: dict[str, Callable[[], AbstractContextManager[None]]] = {
        "sound": patched,
        "factors reduce": without_factors,
        "views reduce": without_views,
        "factors as they are": factors_as_they_are,
    }
    runs = {
        f"{name}, {'busy' if busy else 'plain'}": (2, lambda busy=busy, make=make: block_on_ranks(busy, make()))
        for name, make in without.items()
        for busy in (False, True)
    }
    return Starts(runs)


@pytest.mark.parametrize("kind", ["plain", "busy"])
def test_a_block_is_reduced_once_through_factors_and_whatever_lies_between(kind: str) -> None:
    for one in block_runs()[f"sound, {kind}"]:
        assert one["forward"] == ["all_reduce"]
        assert one["output"] <= EXACT
        assert max(one["gradients"].values()) <= EXACT, one["gradients"]


@pytest.mark.parametrize("name", ["factors reduce, plain", "factors reduce, busy", "views reduce, busy"])
def test_a_block_would_be_reduced_more_often_if_some_operation_had_no_rule(name: str) -> None:
    for one in block_runs()[name]:
        assert one["forward"].count("all_reduce") > 1
        assert one["output"] <= EXACT
        assert max(one["gradients"].values()) <= EXACT


def test_gates_would_have_partial_gradients_if_factors_of_a_sum_were_not_replicated() -> None:
    for one in block_runs()["factors as they are, busy"]:
        assert one["forward"] == ["all_reduce"]
        assert one["output"] <= EXACT
        assert min(one["gradients"][f"block.{gate}.weight"] for gate in ("gate1", "gate2")) > FAR


# ---- tokens per expert that are there only with padding


def ids_of(case: int) -> Tensor:
    return torch.randint(EXPERTS + 3, (case, 2), generator=torch.Generator().manual_seed(case))


def counted(make: Callable[..., Permutation]) -> None:
    """Raises unless tokens per expert are the same numbers, with padding and without."""
    for case in (0, 1, 2, 9):
        ids = ids_of(case)
        want = [(ids == expert).sum().item() for expert in range(EXPERTS + 3)]
        for align_size in (1, 2, 8):
            counts = make(ids, EXPERTS + 3, align_size).tokens_per_expert_E
            assert counts is not None
            assert counts.tolist() == want


def test_tokens_per_expert_are_the_same_with_padding_and_without() -> None:
    counted(permutation_of)


def test_tokens_per_expert_that_only_padding_gives_would_be_found() -> None:
    def only_padded(ids: Tensor, experts: int, align_size: int) -> Permutation:
        made = permutation_of(ids, experts, align_size)
        return made if align_size > 1 else replace(made, tokens_per_expert_E=None)

    def padded_for_real(ids: Tensor, experts: int, align_size: int) -> Permutation:
        made = permutation_of(ids, experts, align_size)
        return replace(made, tokens_per_expert_E=made.padded_per_expert_E)

    for wrong in (only_padded, padded_for_real):
        with pytest.raises(AssertionError):
            counted(wrong)


def aligned_plan(model_type: str, align_size: int) -> dict[str, Any]:
    """The bundled plan, with the groups of every expert's rows rounded up."""
    plan = plan_of(model_type)
    at = next(name for name, rule in plan["dispatch_plan"].items() if style_of(rule) == "ep_dispatch")
    return changed(plan, "dispatch_plan", at, {"style": "ep_dispatch", "align_size": align_size})


def dispatched(model: Any, row: Row, plan: Any, implementation: str) -> dict[str, Tensor]:
    """Logits and this rank's gradients."""
    run = Run(model=model, row=row, plan=plan, implementation=implementation)
    parallel = split(run)
    logits, loss = run.loss(parallel, tokens(seed=dist.get_rank() // row.tp))
    loss.backward()
    local = {name: p.grad for name, p in parallel.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **{name: local_part(gradient) for name, gradient in local.items()}}


def aligned_and_not(model: Any, row: Row, model_type: str, implementation: str) -> dict[int, tuple[float, list[int]]]:
    """For groups of whole multiples: by how much dispatch is off from dispatch without, and rows that experts got."""
    plain, aligned = dispatched(model, row, None, implementation), DispatchBoundary._aligned
    found: dict[int, tuple[float, list[int]]] = {}
    for align_size in (3, 8):
        rows: list[int] = []

        def noting(self: Any, rows_BH: Tensor, own: Permutation, rows: list[int] = rows) -> Any:
            made = aligned(self, rows_BH, own)
            rows.append(made[0].shape[0])
            return made

        with patched((DispatchBoundary, "_aligned", noting)):
            made = dispatched(model, row, aligned_plan(model_type, align_size), implementation)
        assert made.keys() == plain.keys()
        found[align_size] = max(off(made[name], want) for name, want in plain.items()), rows
    return found


ALIGNED = [*(("mixtral", how) for how in IMPLEMENTATIONS), ("gpt_oss", "eager")]


@cache
def aligned_runs() -> Starts:
    runs: dict[str, tuple[int, Callable[[], Any]]] = {}
    for kind, how in ALIGNED:
        model = tiny_model(kind, tied=False).double()
        for row in (EP4, TP4_EP2_ETP2_DISPATCH):
            runs[f"{kind} {how} {row}"] = (row.world, partial(aligned_and_not, model, row, kind, how))
    return Starts(runs)


@pytest.mark.parametrize("row", [EP4, TP4_EP2_ETP2_DISPATCH], ids=str)
@pytest.mark.parametrize(("model_type", "implementation"), ALIGNED)
def test_dispatch_in_whole_multiples_equals_dispatch_without(model_type: str, implementation: str, row: Row) -> None:
    for one in aligned_runs()[f"{model_type} {implementation} {row}"]:
        for align_size, (worst, rows) in one.items():
            assert worst <= EXACT
            assert rows
            assert all(count % align_size == 0 for count in rows)
