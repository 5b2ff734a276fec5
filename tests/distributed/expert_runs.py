"""Mixtures run on ranks, many to one start of the ranks: how far each is off from one process, and what each sent.

A run may take a part of the library away (`without`): the test then sees that the mistake it guards against is found.
"""

from __future__ import annotations

import copy
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch.distributed as dist
import yaml
from ranks import run_on_ranks
from rows import Row
from tiny import tiny_model, tokens
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from parallel_plans import average_gradients, full_gradients, parallelize
from parallel_plans.collectives import Call, record_collectives
from parallel_plans.lookup import bundled_folder
from parallel_plans.state import local_part

TP2, TP2_EP2 = Row(world=2, tp=2), Row(world=2, tp=2, ep=2, etp=1)
TP2_DISPATCH = Row(world=2, tp=2, ep=2, etp=1, dispatch=True)
TP4_EP4 = Row(world=4, tp=4, ep=4, etp=1)
TP4_EP2_ETP2 = Row(world=4, tp=4, ep=2, etp=2)
TP4_EP2_ETP2_DISPATCH = replace(TP4_EP2_ETP2, dispatch=True)
EP4 = Row(world=4, tp=1, ep=4, etp=1)

FAR = 0.1  # what is off by more is off by a hundred times what rounding may do
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
OWN_LOOPS = ("dbrx", "jetmoe", "llama4_text", "longcat_flash")  # their experts know no other implementation

Loss = Callable[[Any, Tensor], tuple[Tensor, Tensor]]  # model and batch -> logits and loss


def squared(model: Any, batch: Tensor) -> tuple[Tensor, Tensor]:
    """A loss that even a batch of one token has."""
    logits = model(input_ids=batch).logits
    return logits, logits.square().mean()


def labelled(model: Any, batch: Tensor) -> tuple[Tensor, Tensor]:
    """The loss that the model itself computes, auxiliary losses included."""
    output = model(input_ids=batch, labels=batch)
    return output.logits, output.loss


@dataclass(frozen=True, kw_only=True)
class Run:
    """One model on one row of ranks, once forward and backward.

    Args:
        model: the whole model, the same on every rank; a copy of it is split.
        row: how the ranks are dealt out.
        batches: the batch of every tp group.
        plan: None for the bundled one.
        implementation: of the experts, on the ranks; one process runs them in a loop.
        loss: what is computed forward.
        prepare: what becomes of the split model first.
        without: a context in which some part of the library is missing.
    """

    model: Any
    row: Row
    batches: tuple[Tensor, ...] = field(default_factory=lambda: (tokens(),))
    plan: Any = None
    implementation: str | None = None
    loss: Loss = labelled
    prepare: Callable[[Any], Any] = lambda model: model
    storage: Any = "dtensor"
    without: Callable[[], AbstractContextManager[Any]] = nullcontext


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a rank found: how far it is off, of the largest true value; its own gradients of the routers; its calls."""

    logits: float
    loss: float
    gradients: Mapping[str, float]
    routers: Mapping[str, Tensor]
    missing: tuple[str, ...]  # what has a gradient in one process and, before gradients are averaged, none here
    held: Mapping[str, float]  # of every parameter of two or more dims, the share that this rank has in memory
    calls: tuple[Call, ...]

    @property
    def router(self) -> float:
        """How far the worst gradient of a router is off."""
        return max(worst for name, worst in self.gradients.items() if is_router(name))

    @property
    def gradient(self) -> float:
        """How far the worst gradient is off."""
        return max(self.gradients.values())


def is_router(name: str) -> bool:
    """Whether a parameter belongs to a router."""
    return ".gate." in name or ".router." in name


def off(got: Tensor, want: Tensor) -> float:
    """By how much of the largest true value the worst one is off; infinite where the shapes differ."""
    if got.shape != want.shape:
        return float("inf")
    if not want.numel():
        return 0.0
    worst = (got.double() - want.double()).abs().max() / want.double().abs().max().clamp(min=1e-12)
    return float("inf") if worst.isnan() else worst.item()


def plan_of(model_type: str) -> dict[str, Any]:
    """The bundled plan as a mapping."""
    plan: dict[str, Any] = yaml.safe_load((bundled_folder() / f"{model_type}.yaml").read_text(encoding="utf-8"))
    return plan


def changed(plan: Mapping[str, Any], section: str, name: str, rule: Any) -> dict[str, Any]:
    """The plan with another rule for a name."""
    return {**plan, section: {**plan[section], name: rule}}


def style_of(rule: Any) -> str:
    """The style that a rule of a mapping names."""
    return str(rule["style"] if isinstance(rule, dict) else rule)


@cache
def mixture(model_type: str, **changes: Any) -> Any:
    """A tiny mixture, its experts in a loop; nobody may change it."""
    return with_experts(tiny_model(model_type, tied=False, **changes), "eager")


def with_experts(model: Any, implementation: str | None) -> Any:
    """The model, which runs its experts in this way from now on, if it knows more than one; None leaves it."""
    if implementation is not None and model._can_set_experts_implementation():
        model.set_experts_implementation(implementation)
    return model


def truth(run: Run) -> dict[str, Any]:
    """Logits and loss of every batch, and the gradients of the mean of the losses, in one process."""
    model, logits, losses = copy.deepcopy(run.model), [], []
    for batch in run.batches:
        made, loss = run.loss(model, batch)
        (loss / len(run.batches)).backward()
        logits.append(made.detach())
        losses.append(loss.detach())
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits, "losses": losses, "gradients": gradients}


def split(run: Run) -> Any:
    """A copy of the run's model, split over the ranks."""
    row, model = run.row, copy.deepcopy(run.model)
    mesh = init_device_mesh("cpu", (row.batches, row.tp), mesh_dim_names=("dp", "tp"))
    plan = bundled_folder() / f"{model.config.model_type}.yaml" if run.plan is None else run.plan
    how = "dispatch" if row.dispatch else "auto"
    parallelize(model, plan, mesh, ep_plan=how, ep_size=row.ep, etp_size=row.etp, storage=run.storage)
    return run.prepare(with_experts(model, run.implementation))


def found(run: Run, true: Mapping[str, Any]) -> Found:
    """What this rank finds."""
    index = dist.get_rank() // run.row.tp
    with run.without():
        model = split(run)
        with record_collectives() as calls:
            logits, loss = run.loss(model, run.batches[index])
            loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    routers = {name: local_part(g) for name, g in gradients.items() if g is not None and is_router(name)}
    routers = {name: gradient.clone() for name, gradient in routers.items()}
    average_gradients(model)
    whole = full_gradients(model)
    assert whole.keys() == true["gradients"].keys(), set(true["gradients"]) - set(whole)
    return Found(
        logits=off(logits.detach(), true["logits"][index]),
        loss=off(loss.detach(), true["losses"][index]),
        gradients={name: off(whole[name], want) for name, want in true["gradients"].items()},
        routers=routers,
        missing=tuple(name for name in true["gradients"] if gradients[name] is None),
        held=shares(model, run.model),
        calls=tuple(calls),
    )


def shares(model: nn.Module, whole: nn.Module) -> dict[str, float]:
    """Of every matrix, the share of its elements that this rank has in memory."""
    sizes = {name: p.numel() for name, p in whole.named_parameters()}
    return {name: local_part(p).numel() / sizes[name] for name, p in model.named_parameters() if p.dim() > 1}


def _all_found(runs: Mapping[str, Callable[[], Any]]) -> dict[str, tuple[str, Any]]:
    """Name -> ("returned", what it returns) or ("raised", the traceback), up to the first that raises."""
    results: dict[str, tuple[str, Any]] = {}
    for name, run in runs.items():
        try:
            results[name] = ("returned", run())
            dist.barrier()
        except Exception:
            results[name] = ("raised", traceback.format_exc())
            break
    return results


class Starts:
    """Things to do on ranks that share one start for each number of ranks: `starts[name]` is what every rank returned.

    They start when the first is asked for. One that raises on some rank keeps those behind it from being reached.
    """

    def __init__(self, runs: Mapping[str, tuple[int, Callable[[], Any]]]) -> None:
        self.runs = dict(runs)
        self.results: dict[int, list[dict[str, tuple[str, Any]]]] = {}

    def __getitem__(self, name: str) -> list[Any]:
        world = self.runs[name][0]
        if world not in self.results:
            mine = {each: call for each, (ranks, call) in self.runs.items() if ranks == world}
            self.results[world] = run_on_ranks(_all_found, world, mine)
        results = self.results[world]
        outcomes = [result.get(name, ("raised", f"not reached: {[*result.items()][-1]}")) for result in results]
        bad = [f"rank {rank}: {value}" for rank, (kind, value) in enumerate(outcomes) if kind == "raised"]
        assert not bad, "\n".join(bad)
        return [value for _, value in outcomes]


def starts(runs: Mapping[str, Run]) -> Starts:
    """Every run on ranks; gives what every rank found."""

    def call(run: Run) -> Callable[[], Found]:
        true = truth(run)  # in the process that all ranks are forked from
        return lambda: found(run, true)

    return Starts({name: (run.row.world, call(run)) for name, run in runs.items()})


@contextmanager
def patched(*replacements: tuple[Any, str, Any]) -> Iterator[None]:
    """Inside the block, attributes of modules or classes are others: (owner, name, its value)."""
    before = [(owner, name, owner.__dict__[name]) for owner, name, _ in replacements]
    for owner, name, value in replacements:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)
