"""The mistakes that expert parallelism is known for: each is found, and nothing else finds it if its guard is away.

Outputs and loss of most of these are right, so every test also takes the guard away and sees its own check fail.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cache
from math import prod
from typing import Any

import pytest
import torch
from expert_runs import (
    FAR,
    IMPLEMENTATIONS,
    TP2,
    TP2_DISPATCH,
    TP2_EP2,
    TP4_EP2_ETP2,
    TP4_EP2_ETP2_DISPATCH,
    TP4_EP4,
    Found,
    Run,
    Starts,
    changed,
    mixture,
    patched,
    plan_of,
    starts,
    style_of,
)
from rows import GRADIENTS, LOGITS, ROWS, Row
from tiny import MOE_TYPES, tiny_config, tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from parallel_plans import PlanError, forks, load_plan, local_parameters, resolve
from parallel_plans.collectives import Axis
from parallel_plans.experts import dispatch, routing
from parallel_plans.experts.routing import Ownership, RouterBoundary, is_ids, masked_routes
from parallel_plans.geometry import Geometry
from parallel_plans.matching import assign
from parallel_plans.model_spec import ModelSpec, describe
from parallel_plans.styles import get_style
from parallel_plans.table import Table
from parallel_plans.transitions import replicate
from parallel_plans.views import BLOCK_AXIS, EXPERT_AXIS, EXPERT_TENSOR_AXIS, TENSOR_AXIS, Views

EXPERT_SECTIONS = ("ep_plan", "dispatch_plan")


@cache
def spec(model_type: str) -> ModelSpec:
    """The tiny mixture as plans see it."""
    with torch.device("meta"):
        return describe(AutoModelForCausalLM.from_config(tiny_config(model_type, tied=False)))


def views_of(row: Row) -> Views:
    """How a row deals its ranks out."""
    return Views(world=row.world, tp=row.tp, ep=row.ep, etp=row.etp or row.tp)


# ---- an expert's parameter left whole, while outputs agree


def dealing_rules() -> Iterator[tuple[str, str, str]]:
    """Model type, section and name of every rule that deals experts."""
    for model_type in MOE_TYPES:
        for section in EXPERT_SECTIONS:
            for name, rule in plan_of(model_type)[section].items():
                if get_style(style_of(rule)).role == "weight":
                    yield model_type, section, name


def refused(plan: Mapping[str, Any], model_type: str, section: str) -> list[str]:
    """The codes that a plan is refused with where it deals experts by this section."""
    sizes = views_of(TP2_EP2).sizes
    try:
        resolve.resolve(load_plan(plan), spec(model_type), sizes, dispatch=section == "dispatch_plan")
    except PlanError as error:
        return [finding.code for finding in error.findings]
    return []


@pytest.mark.parametrize(("model_type", "section", "name"), list(dealing_rules()))
def test_an_experts_parameter_left_whole_is_refused(model_type: str, section: str, name: str) -> None:
    plan = changed(plan_of(model_type), section, name, {"style": "replicate", "optional": True})
    assert "PP110" in refused(plan, model_type, section)


def zero_biases() -> Any:
    """A gpt_oss as training begins: biases of its experts are zero."""
    model = tiny_model("gpt_oss", tied=False)
    model.set_experts_implementation("eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("down_proj_bias"):
                parameter.zero_()
    return model


@cache
def whole_runs() -> Starts:
    model, plan = zero_biases(), plan_of("gpt_oss")
    left = changed(plan, "ep_plan", "model.layers.*.mlp.experts.down_proj_bias", "replicate")
    runs = {
        "sound": Run(model=model, row=TP2_EP2),
        "sound, experts split too": Run(model=model, row=TP4_EP2_ETP2),
        "left whole": Run(model=model, row=TP2_EP2, plan=left, without=unreported),
    }
    return starts(runs)


def unreported() -> AbstractContextManager[None]:
    """Plans that deal experts in part are not refused."""
    return patched((resolve, "report_incomplete", lambda *args: None))


def expert_shares(one: Found) -> dict[str, float]:
    return {name: share for name, share in one.held.items() if ".experts." in name and not name.endswith("_bias")}


def bias_shares(one: Found) -> set[float]:
    return {share for name, share in one.held.items() if name.endswith("down_proj_bias")}


def test_every_rank_holds_only_its_part_of_every_expert() -> None:
    for one in whole_runs()["sound"]:
        assert set(expert_shares(one).values()) == bias_shares(one) == {1 / 2}
    for one in whole_runs()["sound, experts split too"]:
        assert set(expert_shares(one).values()) == {1 / 4}


def test_an_experts_parameter_left_whole_would_not_show_in_any_output() -> None:
    for one in whole_runs()["left whole"]:
        assert one.logits <= LOGITS
        assert one.loss <= LOGITS
        assert bias_shares(one) == {1.0}  # which the test above refuses


# ---- a router's gradient left partial


def unreduced_weights() -> AbstractContextManager[None]:
    """The routing weights go from I to R, and from slices back, without a reduction of their gradient."""
    take_own, once, together = dispatch.take_own, forks.replicate, forks.replicate_together

    def is_routing(value: Tensor) -> bool:
        return value.shape[-1] in (2, 8)  # for each choice, or for each expert

    def used(value: Tensor, axis: Any) -> Tensor:
        return value if is_routing(value) else once(value, axis)

    def used_together(values: Sequence[Tensor], axis: Any) -> tuple[Tensor, ...]:
        rest = iter(together([value for value in values if not is_routing(value)], axis))
        return tuple(value if is_routing(value) else next(rest) for value in values)

    def sliced(value: Tensor, axis: Any, dealt: Any, dim: int) -> Tensor:
        if is_routing(value) or value.dim() == 3:  # rows [T, E, H] that scores have been applied to
            return dealt.take(value, axis.rank, dim)
        return take_own(value, axis, dealt, dim)

    return patched(
        (forks, "replicate", used), (forks, "replicate_together", used_together), (dispatch, "take_own", sliced)
    )


ROUTED = ("mixtral", "llama4_text")  # weights are applied after the experts, and before
ROUTED_ROWS = (TP2, TP2_EP2, TP4_EP2_ETP2, TP2_DISPATCH, TP4_EP2_ETP2_DISPATCH)


@cache
def router_runs() -> Starts:
    runs = {f"{kind} {row}": Run(model=mixture(kind), row=row) for kind in ROUTED for row in ROUTED_ROWS}
    return starts({**runs, **{f"{name} broken": replace(run, without=unreduced_weights) for name, run in runs.items()}})


@pytest.mark.parametrize("row", ROUTED_ROWS, ids=str)
@pytest.mark.parametrize("model_type", ROUTED)
def test_a_routers_gradient_is_whole_on_every_rank(model_type: str, row: Row) -> None:
    ranks = router_runs()[f"{model_type} {row}"]
    for one in ranks:
        assert one.logits <= LOGITS
        assert one.loss <= LOGITS
        assert one.gradient <= GRADIENTS, one.gradients
        assert all(torch.equal(one.routers[name], ranks[0].routers[name]) for name in ranks[0].routers)


@pytest.mark.parametrize("row", ROUTED_ROWS, ids=str)
@pytest.mark.parametrize("model_type", ROUTED)
def test_a_routers_gradient_left_partial_would_show_in_nothing_else(model_type: str, row: Row) -> None:
    for one in router_runs()[f"{model_type} {row} broken"]:
        assert one.logits <= LOGITS
        assert one.loss <= LOGITS
        assert one.router > FAR


MLP = "model.layers.*.mlp"


def differing_plans() -> dict[str, dict[str, Any]]:
    """Plans for mixtral right over tp and right over ep, whose two sections do not say the same of the experts."""
    whole = plan_of("mixtral")
    dense = {name: rule for name, rule in whole["tp_plan"].items() if name != f"{MLP}.experts"}
    dealing = {name: rule for name, rule in whole["ep_plan"].items() if name != f"{MLP}.experts"}
    return {
        "block in tp_plan": {**whole, "tp_plan": {**dense, MLP: "moe_block_allreduce", f"{MLP}.gate": "moe_router"}},
        "block in ep_plan": {**whole, "ep_plan": {**dealing, MLP: "moe_block_allreduce"}},
    }


@cache
def differing_runs() -> Starts:
    rows, plans = (TP2, TP2_EP2), differing_plans().items()
    return starts(
        {f"{name} {row}": Run(model=mixture("mixtral"), row=row, plan=p) for name, p in plans for row in rows}
    )


@pytest.mark.parametrize("row", [TP2, TP2_EP2], ids=str)
@pytest.mark.parametrize("name", differing_plans())
def test_each_section_may_bring_tokens_to_experts_in_its_own_way(name: str, row: Row) -> None:
    for one in differing_runs()[f"{name} {row}"]:
        assert one.gradient <= GRADIENTS, one.gradients


@pytest.mark.parametrize("name", differing_plans())
def test_sections_that_differ_are_refused_where_both_act(name: str) -> None:
    sizes = views_of(TP4_EP2_ETP2).sizes
    with pytest.raises(PlanError, match="PP111"):
        resolve.resolve(load_plan(differing_plans()[name]), spec("mixtral"), sizes)


# ---- a style that degrades to replicated without a word


def split_on(table: Table, name: str) -> set[str]:
    """The axes on which a parameter is split; experts split twice along one dim lie on an axis that is both."""
    axes = {part.axis for part in table.parameters[name].layout.splits}
    return axes | ({EXPERT_AXIS, EXPERT_TENSOR_AXIS} if BLOCK_AXIS in axes else set())


def degraded(model_type: str, row: Row) -> list[str]:
    """Parameters that a rule was to split over more than one rank, and that are not, or that some rank has whole."""
    views, plan, shapes = views_of(row), load_plan(plan_of(model_type)), spec(model_type).parameters
    names = list(shapes), list(spec(model_type).modules)
    dealing = assign(plan.rules("ep_plan"), *names).parameters
    section = ("ep_plan" if views.shares_batch else "dispatch_plan") if row.ep > 1 else None
    experts = {name for name, rule in dealing.items() if section and rule and get_style(rule.style).role == "weight"}
    table, wrong = resolve.resolve(plan, spec(model_type), views.sizes), []
    for kind in ("tp_plan", section) if section else ("tp_plan",):
        for name, rule in assign(plan.rules(kind), *names).parameters.items():
            axis = EXPERT_AXIS if kind != "tp_plan" else EXPERT_TENSOR_AXIS if name in experts else TENSOR_AXIS
            shape, layout = shapes[name].shape, table.parameters[name].layout
            if rule is None or get_style(rule.style).split_dim(len(shape)) is None or views.sizes[axis] == 1:
                continue
            held = [prod(layout.local_shape(views.coordinates(rank))) for rank in range(row.world)]
            if axis not in split_on(table, name) or max(held) >= prod(shape):
                wrong.append(name)
    return wrong


@pytest.mark.parametrize("row", ROWS, ids=str)
@pytest.mark.parametrize("model_type", MOE_TYPES)
def test_what_a_style_splits_is_split_on_every_rank(model_type: str, row: Row) -> None:
    assert degraded(model_type, row) == []


@pytest.mark.parametrize("name", ["grouped_gemm", "moe_tp_gate_up_colwise", "moe_tp_down_rowwise"])
def test_a_style_that_degrades_to_replicated_would_be_found(name: str) -> None:
    row, cut = TP4_EP2_ETP2, Geometry.split

    def silent(self: Geometry, shape: Any, style: Any, options: Any) -> Any:
        return None if style.name == name else cut(self, shape, style, options)

    assert degraded("mixtral", row) == []
    with patched((Geometry, "split", silent)):
        assert degraded("mixtral", row) != []


# ---- an expert's bias added once per rank


def biases_everywhere() -> AbstractContextManager[None]:
    """Every rank adds the bias to its part of the sum."""
    return patched((local_parameters, "contribute", lambda value, axis: value))


def routes_clamped() -> AbstractContextManager[None]:
    """A route to an expert of another rank goes to one of this rank's, with its weight."""

    def clamped(ids: Tensor, weights: Tensor, owned: Ownership, axis: Axis) -> tuple[Tensor, Tensor]:
        return (ids - owned.start).clamp(0, owned.count - 1), weights

    return patched((routing, "masked_routes", clamped))


@cache
def bias_runs() -> Starts:
    model, rows = mixture("gpt_oss"), (TP2, TP2_EP2, TP4_EP2_ETP2, TP4_EP2_ETP2_DISPATCH)
    runs = {str(row): Run(model=model, row=row) for row in rows}
    with torch.no_grad():
        small = tiny_model("gpt_oss", tied=False)
        small.set_experts_implementation("eager")
        for name, parameter in small.named_parameters():
            if ".experts." in name and not name.endswith("down_proj_bias"):
                parameter.zero_()  # the bias is all that the experts give
    runs |= {
        "every rank adds it, ffn": Run(model=model, row=TP2, without=biases_everywhere),
        "every rank adds it, both": Run(model=model, row=TP4_EP2_ETP2, without=biases_everywhere),
        "every rank adds it, dispatch": Run(model=model, row=TP4_EP2_ETP2_DISPATCH, without=biases_everywhere),
        "every rank adds it, experts": Run(model=small, row=TP2_EP2, without=routes_clamped),
        "nothing but it, experts": Run(model=small, row=TP2_EP2),
    }
    return starts(runs)


@pytest.mark.parametrize("row", [TP2, TP2_EP2, TP4_EP2_ETP2, TP4_EP2_ETP2_DISPATCH, "nothing but it, experts"], ids=str)
def test_an_experts_bias_is_added_once(row: Row | str) -> None:
    for one in bias_runs()[str(row)]:
        assert one.logits <= LOGITS
        assert one.loss <= LOGITS
        assert one.gradient <= GRADIENTS, one.gradients


@pytest.mark.parametrize("where", ["ffn", "both", "dispatch", "experts"])
def test_an_experts_bias_added_once_per_rank_would_be_found(where: str) -> None:
    assert all(one.logits > FAR for one in bias_runs()[f"every rank adds it, {where}"])


# ---- routes to experts of other ranks, whose gradients are garbage


def clamped_mm(self: Any, hidden_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """Experts in one batched product, as `batched_mm` once was: a route to no expert here runs the last one all the
    same, and nothing but its weight keeps it out.
    """
    ids_S = ids_TK.flatten().clamp(0, self.num_experts - 1)
    rows_SH1 = hidden_TH.repeat_interleave(ids_TK.shape[1], 0).unsqueeze(-1)
    gated_SF = self._apply_gate((self.gate_up_proj[ids_S] @ rows_SH1).squeeze(-1))
    rows_SH = (self.down_proj[ids_S] @ gated_SF.unsqueeze(-1)).squeeze(-1)
    return (rows_SH.unflatten(0, ids_TK.shape) * weights_TK.unsqueeze(-1)).sum(1)


def clamping(model: Any) -> Any:
    """The model with experts that clamp."""
    ALL_EXPERTS_FUNCTIONS["clamped"] = clamped_mm  # in this rank's process
    model.config._experts_implementation = "clamped"
    return model


def unmasked() -> AbstractContextManager[None]:
    """Weights stay what they are at routes to other ranks: only the sentinel says which these are."""

    def masked(ids: Tensor, weights: Tensor, owned: Ownership, axis: Axis) -> tuple[Tensor, Tensor]:
        return masked_routes(ids, weights, owned, axis)[0], weights

    return patched((routing, "masked_routes", masked))


def masked_before() -> AbstractContextManager[None]:
    """Weights are masked first, each rank its own, and go from I to R then."""

    def route(self: RouterBoundary, items: list[Any], *_: Any) -> None:
        ids = next(at for at, item in enumerate(items) if is_ids(item))
        weights = next(at for at in range(len(items)) if at != ids and items[at].shape == items[ids].shape)
        items[ids], masked = masked_routes(items[ids], items[weights], self.owned, self.site.own)  # type: ignore[arg-type]
        items[weights] = replicate(masked, self.site.axis)
        routing.remember_replicated(items[weights], self.site.axis, masked)

    return patched((RouterBoundary, "_route", route))


@cache
def garbage_runs() -> Starts:
    runs: dict[str, Run] = {}
    for row in (TP2_EP2, TP4_EP4, TP4_EP2_ETP2):
        for how in IMPLEMENTATIONS:
            runs[f"{how} {row}"] = Run(model=mixture("mixtral"), row=row, implementation=how)
        runs[f"clamped {row}"] = clamped = Run(model=mixture("mixtral"), row=row, implementation=None, prepare=clamping)
        runs[f"masked before {row}"] = replace(clamped, without=masked_before)
        runs[f"not masked {row}"] = replace(clamped, without=unmasked)
    return starts(runs)


MASKING_ROWS = [TP2_EP2, TP4_EP4, TP4_EP2_ETP2]


@pytest.mark.parametrize("row", MASKING_ROWS, ids=str)
@pytest.mark.parametrize("how", [*IMPLEMENTATIONS, "clamped"])
def test_routes_to_other_ranks_give_routing_weights_no_gradient(how: str, row: Row) -> None:
    for one in garbage_runs()[f"{how} {row}"]:
        assert one.logits <= LOGITS
        assert one.gradient <= GRADIENTS, one.gradients


@pytest.mark.parametrize("row", MASKING_ROWS, ids=str)
def test_weights_masked_before_they_go_from_i_to_r_would_show_in_the_routers_gradient_alone(row: Row) -> None:
    for one in garbage_runs()[f"masked before {row}"]:
        assert one.logits <= LOGITS
        assert one.loss <= LOGITS
        assert one.router > FAR


@pytest.mark.parametrize("row", MASKING_ROWS, ids=str)
def test_weights_that_are_not_masked_would_let_experts_run_that_nobody_chose(row: Row) -> None:
    assert all(one.logits > FAR for one in garbage_runs()[f"not masked {row}"])
