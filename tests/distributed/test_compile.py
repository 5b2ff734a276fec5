"""A compiled model computes what it computes without torch.compile: in one graph, with as many reductions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ranks import run_on_ranks
from tiny import assert_close, tiny_model, tokens
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._functorch.aot_autograd import make_boxed_func
from torch.distributed.device_mesh import init_device_mesh

from parallel_plans import full_gradients, parallelize
from parallel_plans.collectives import Axis, record_collectives
from parallel_plans.lookup import bundled_folder
from parallel_plans.partial import partial

EXACT = 1e-5  # of the largest value, float32


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model, how it is stored and dealt, and by how much a compiled step reduces more often than an eager one."""

    model_type: str
    storage: str
    sizes: dict[str, int] = field(default_factory=dict)
    more: tuple[int, int] = (0, 0)  # forward and backward, in all

    def __str__(self) -> str:
        return "-".join([self.model_type, self.storage, *self.sizes])


CASES = (
    Case(model_type="llama", storage="local"),
    Case(model_type="llama", storage="dtensor"),
    Case(model_type="mixtral", storage="local"),
    Case(model_type="qwen3_moe", storage="dtensor", sizes={"ep_size": 2}),
    # sums wait for each other in eager code alone: those of routed and shared experts, those of attention and MLP
    Case(model_type="llama4_text", storage="local", more=(2, 0)),  # two of its layers are sparse
    Case(model_type="cohere", storage="local", more=(2, 0)),
)


class Reductions:
    """A backend that runs graphs as they are, and counts what they reduce."""

    def __init__(self) -> None:
        self.counts: Counter[bool] = Counter()
        self.ops: Counter[str] = Counter()  # of all kinds, in backward
        self.backend = aot_autograd(fw_compiler=self._counting(False), bw_compiler=self._counting(True))

    def _counting(self, backward: bool) -> Callable[..., Any]:
        def compile(graph: torch.fx.GraphModule, inputs: Any) -> Any:
            ops = [node.target for node in graph.graph.nodes]
            if backward:
                self.ops.update(str(op).split(".")[1] for op in ops if str(op).startswith("_c10d_functional."))
            self.counts[backward] += sum(op is torch.ops._c10d_functional.all_reduce.default for op in ops)
            return make_boxed_func(graph.forward)

        return compile


def parallelized(model_type: str, storage: Any, sizes: dict[str, int]) -> Any:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    model = tiny_model(model_type, tied=False)
    return parallelize(model, bundled_folder() / f"{model_type}.yaml", mesh, storage=storage, **sizes)


def step(run: Any, model: nn.Module, batch: Tensor) -> dict[str, Tensor]:
    """The logits, the loss and every gradient of a step."""
    model.zero_grad()
    output = run(input_ids=batch, labels=batch, use_cache=False)
    output.loss.backward()
    return {"logits": output.logits.detach(), "loss": output.loss.detach(), **full_gradients(model)}


def compiled(case: Case) -> tuple[list[Any], tuple[int, int], tuple[int, int], int]:
    """Steps without and with torch.compile, the reductions of one of each, and the graphs."""
    model, batches = parallelized(case.model_type, case.storage, case.sizes), [tokens(seed=seed) for seed in range(3)]
    step(model, model, batches[0])  # the first finds out where sums wait
    with record_collectives() as calls:
        truth = [step(model, model, batches[0])]
    eager = Counter(call.backward for call in calls if call.op == "all_reduce")
    truth += [step(model, model, batch) for batch in batches[1:]]
    found = Reductions()
    run = torch.compile(model, backend=found.backend, fullgraph=True)
    got = [step(run, model, batches[0])]
    with torch._dynamo.config.patch(error_on_recompile=True):
        got += [step(run, model, batch) for batch in batches[1:]]
    graphs = counters["stats"]["unique_graphs"]
    counts = (eager[False], eager[True]), (found.counts[False], found.counts[True])
    return list(zip(got, truth, strict=True)), *counts, graphs


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_model_is_one_graph_that_is_right_and_never_traced_again(case: Case) -> None:
    for steps, eager, counts, graphs in run_on_ranks(compiled, 2, case):
        assert graphs == 1
        assert counts == tuple(count + more for count, more in zip(eager, case.more, strict=True))
        for got, truth in steps:
            assert got.keys() == truth.keys()
            for name, value in got.items():
                assert_close(name, value, truth[name], relative=EXACT)


class Forked(nn.Module):
    """Two projections of one value, with something in between."""

    def __init__(self, between: str) -> None:
        super().__init__()
        self.between = between
        self.one, self.two, self.down = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = x.exp() + 1
        one = self.one(hidden.clone()) if self.between == "a change in place" else self.one(hidden)
        if self.between == "a change in place":
            hidden.mul_(2)
        if self.between == "a graph break":
            torch._dynamo.graph_break()
        if self.between == "a view":
            return self.down(F.silu(one) * self.two(hidden.view(1, *hidden.shape))[0])
        return self.down(F.silu(one) * self.two(hidden))


PLAN = {"one": "colwise", "two": "colwise", "down": "rowwise"}


def forked(betweens: dict[str, int]) -> dict[str, tuple[dict[str, Tensor], dict[str, Tensor], int]]:
    mesh, results = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",)), {}
    for between in betweens:
        torch.manual_seed(0)
        model = parallelize(Forked(between).double(), PLAN, mesh)
        found, both = Reductions(), []
        for run in (model, torch.compile(model, backend=found.backend)):
            x = torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4).requires_grad_()
            model.zero_grad()
            run(x).square().sum().backward()
            assert x.grad is not None
            both.append({"x": x.grad, **full_gradients(model)})
        results[between] = both[0], both[1], found.counts[True]
    return results


# what is between the projections -> reductions in compiled backwards; what cannot be traced whole is not compiled
BETWEEN = {"nothing": 1, "a view": 1, "a change in place": 2, "a graph break": 0}


def test_forks_are_told_apart_when_traced_and_run_eagerly_where_they_cannot_be() -> None:
    for results in run_on_ranks(forked, 2, BETWEEN):
        for between, (truth, got, reductions) in results.items():
            assert reductions == BETWEEN[between], between
            for name, value in got.items():
                assert_close(f"{between}, {name}", value, truth[name], relative=1e-12)


def of_sums() -> tuple[Tensor, Tensor]:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    axis = Axis(name="tp", group=mesh.get_group(), size=2, rank=mesh.get_local_rank())

    def function(value: Tensor) -> Tensor:
        return (value * 2 + 1).exp()

    part = torch.arange(6.0) * (1 + axis.rank)
    run = torch.compile(function, backend="aot_eager")
    return function(partial(part, axis)), run(partial(part, axis))


def test_a_sum_that_waits_is_reduced_where_compiled_code_needs_it() -> None:
    for eager, got in run_on_ranks(of_sums, 2):
        assert torch.equal(eager, (torch.arange(6.0) * 6 + 1).exp())
        assert torch.equal(got, eager)


def travelled() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("dp", "tp"))
    model = tiny_model("qwen3_moe", tied=False)
    plan = bundled_folder() / "qwen3_moe.yaml"
    parallelize(model, plan, mesh, ep_plan="dispatch", ep_size=2, storage="local")
    batch, found = tokens(), []
    for run in (model, torch.compile(model, backend="aot_eager")):
        model.zero_grad()
        output = run(input_ids=batch, labels=batch, use_cache=False)
        output.loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append({"logits": output.logits.detach(), **{name: g.clone() for name, g in gradients.items()}})
    return found[0], found[1]


def test_tokens_travel_in_a_compiled_model_as_they_do_without() -> None:
    for eager, got in run_on_ranks(travelled, 2):
        assert got.keys() == eager.keys()
        for name, value in got.items():
            assert_close(name, value, eager[name], relative=EXACT)
