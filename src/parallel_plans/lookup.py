"""Where `tp_plan="auto"` finds a plan, in this order:

1. `parallel_plan.yaml` beside the checkpoint;
2. `<model_type>.yaml` in the folders of the environment variable PARALLEL_PLANS_PATH;
3. the plan for the model type that ships with this package;
4. the plan that the model's class carries, translated.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from parallel_plans.accounting import reaches
from parallel_plans.errors import Finding, LaunchError, PlanError
from parallel_plans.loader import load_plan
from parallel_plans.matching import assign
from parallel_plans.messages import tell, warn
from parallel_plans.model_spec import ModelSpec
from parallel_plans.plan import EXPERT_SECTIONS, SECTIONS, Plan, Rule
from parallel_plans.styles import get_style

BESIDE_CHECKPOINT = "parallel_plan.yaml"
DERIVE = "derive"  # for a plan that is found from a step of the model, by those who have the model
PATH_VARIABLE = "PARALLEL_PLANS_PATH"
PlanSource = Plan | str | os.PathLike[str] | Mapping[str, Any]


def bundled_folder() -> Path:
    """The folder of the plans that ship with this package: inside it when installed, beside `src` in a checkout."""
    here = Path(__file__).resolve().parent
    installed = here / "plans"
    return installed if installed.is_dir() else here.parents[1] / "plans"


def bundled_types() -> tuple[str, ...]:
    """The model types that a plan ships for, in alphabetical order."""
    return tuple(sorted(path.stem for path in bundled_folder().glob("*.yaml")))


@dataclass(frozen=True, kw_only=True)
class Carried:
    """The plans that a model's class carries, name -> style: for dense layers, and for experts dealt over ranks."""

    tp: Mapping[str, str] | None = None
    ep: Mapping[str, str] | None = None


def carried_by(model: Any) -> Carried:
    """What the class of `model` carries."""
    return Carried(tp=getattr(model, "tp_plan", None), ep=getattr(model, "ep_plan", None))


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Where the parts of a plan come from: `tp_plan`, `ep_plan` and `sp_plan` of `from_pretrained`.

    `proportions` are checked ones (see `parallel_plans.proportions`).
    """

    dense: PlanSource
    experts: PlanSource = "auto"
    sequence: PlanSource | None = None
    proportions: tuple[int, ...] | None = None

    @property
    def dispatches(self) -> bool:
        """Whether tokens are sent to their experts also where the ranks share a batch."""
        return self.experts == "dispatch"

    def plan(self, spec: ModelSpec, carried: Carried, beside: Callable[[], str | None]) -> Plan:
        """The plan for a model, put together of its parts; see `find_plan` for the arguments and the errors."""
        whole = with_experts(find_plan(self.dense, spec, carried, beside), self.experts)
        found = with_sequence(whole, self.sequence)
        return found if self.proportions is None else replace(found, proportions=self.proportions)


def find_plan(source: PlanSource, spec: ModelSpec, carried: Carried, beside: Callable[[], str | None]) -> Plan:
    """The plan that `source` means for this model.

    Args:
        source: `"auto"` (the lookup above), `"builtin"` (what the class carries), a path, a mapping, or a `Plan`.
        spec: the model.
        carried: the plans that the model's class carries.
        beside: gives the path of the plan beside the checkpoint, or None.

    Raises:
        PlanError: the plan that was found cannot be read.
        LaunchError: PP704 where there is none.
    """
    if isinstance(source, Plan):
        return source
    if source == "builtin":
        return carried_plan(spec, carried)
    if source != "auto":
        return load_plan(source)
    path = beside() or _on_path(spec.model_type) or _bundled(spec.model_type)
    if path is not None:
        plan = load_plan(path)
    elif carried.tp or carried.ep:
        plan = carried_plan(spec, Carried(tp=with_tied_embeddings(spec, carried.tp or {}), ep=carried.ep))
    else:
        raise LaunchError(_no_plan(spec))
    tell("tp_plan: %s", plan.source)
    return plan


def _on_path(model_type: str | None) -> str | None:
    folders = [folder for folder in os.environ.get(PATH_VARIABLE, "").split(os.pathsep) if folder]
    found = (str(path) for folder in folders if (path := Path(folder) / f"{model_type}.yaml").is_file())
    return next(found, None)


def _bundled(model_type: str | None) -> str | None:
    return str(bundled_folder() / f"{model_type}.yaml") if model_type in bundled_types() else None


def carried_plan(spec: ModelSpec, carried: Carried) -> Plan:
    """The plan a model's class carries, as ours: what it leaves out stays whole, what does nothing is dropped aloud.

    Its plan for experts sends tokens to them (`dispatch_plan`), and where ranks share a batch masks routes (`ep_plan`).

    Raises:
        LaunchError: PP704 where it carries none.
    """
    if not carried.tp and not carried.ep:
        raise LaunchError(_no_plan(spec))
    dense, idle = _useful(spec, carried.tp or {}, "tp_plan")
    experts, more = _useful(spec, carried.ep or {}, "ep_plan")
    if dropped := (*idle, *more):
        told = ", ".join(rule.pattern for rule in dropped)
        warn("the plan of the model's class has rules that do nothing in this model, dropped: %s", told)
    plan = load_plan({"version": 1, "tp_plan": {**dense, "**": "replicate"}, **_dealing(experts)})
    return Plan(source=f"carried by the model's class ({spec.model_type})", sections=plan.sections, dropped=dropped)


# what brings tokens to experts: on ranks that share a batch, and on ranks with batches of their own
_BRINGING = {"ep_plan": "moe_experts_allreduce", "dispatch_plan": "ep_dispatch"}


def _dealing(carried: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Both sections for experts out of the one that a class carries, in whichever of the two ways it brings tokens."""
    sections: dict[str, dict[str, str]] = {}
    for section, bringing in _BRINGING.items():
        rules = {
            name: bringing if get_style(style).role == "experts" else style
            for name, style in carried.items()
            if get_style(style).role == "experts" or section in get_style(style).sections
        }
        sections |= {section: rules} if rules else {}
    return sections


def _useful(spec: ModelSpec, carried: Mapping[str, str], section: str) -> tuple[dict[str, str], tuple[Rule, ...]]:
    """The rules that do something, and those that match nothing, or modules at which their style does nothing."""
    if not carried:
        return {}, ()
    rules = load_plan({"tp_plan": dict(carried)}).rules("tp_plan")
    uses = assign(rules, list(spec.parameters), list(spec.modules)).uses
    idle = tuple(replace(use.rule, section=section) for use in uses if not (reaches(use) or use.is_shadowed))
    names = {rule.pattern for rule in idle}
    return {name: style for name, style in carried.items() if name not in names}, idle


def with_experts(plan: Plan, source: PlanSource) -> Plan:
    """`plan` with the rules for experts that `source` holds: the sections of a plan, or rules for `ep_plan` alone.

    `"auto"` and `"dispatch"` mean the plan's own.
    """
    if source in ("auto", "dispatch"):
        return plan
    if isinstance(source, Mapping) and not set(source) & {*SECTIONS, "version", "model_type"}:
        source = {"ep_plan": source}
    given = source if isinstance(source, Plan) else load_plan(source)
    own = {section: rules for section, rules in given.sections.items() if section in EXPERT_SECTIONS}
    if not own:
        message = "the plan for experts has neither an ep_plan nor a dispatch_plan"
        raise PlanError(Finding(code="PP108", message=message, file=given.file, fix="name one of them above its rules"))
    dense = {section: rules for section, rules in plan.sections.items() if section not in EXPERT_SECTIONS}
    return replace(plan, sections={**dense, **own})


def with_sequence(plan: Plan, source: PlanSource | None) -> Plan:
    """`plan` with its `sp_plan` in use: its own (`"auto"`), that of another plan, or rules; as it is for None."""
    if source is None:
        return plan
    sections = plan.sections
    if source != "auto":
        if isinstance(source, Mapping) and not set(source) & {*SECTIONS, "version", "model_type"}:
            source = {"sp_plan": source}
        given = source if isinstance(source, Plan) else load_plan(source)
        sections = {**sections, "sp_plan": given.rules("sp_plan")}
    if not sections.get("sp_plan"):
        message, fix = "an sp_plan is asked for", "add an sp_plan section: see docs/sequence_parallelism.md; or drop it"
        expected = "an sp_plan that says where the sequence is split, and who wants all of it"
        found = f"only {', '.join(plan.sections)}"
        raise PlanError(Finding(code="PP108", message=message, file=plan.file, found=found, expected=expected, fix=fix))
    return replace(plan, sections=sections, splits_sequence=True)


def with_tied_embeddings(spec: ModelSpec, carried: Mapping[str, str]) -> dict[str, str]:
    """A carried plan, with a rule for an embedding that it forgot though it splits what the embedding is tied to.

    Several classes split the head alone, and stop working once the two are tied.
    """
    completed = dict(carried)
    if not completed:
        return completed
    ruled = assign(load_plan({"tp_plan": completed}).rules("tp_plan"), list(spec.parameters), list(spec.modules))
    for name, source in spec.tied.items():
        rule, owner = ruled.parameters[name], spec.modules[source.rpartition(".")[0]]
        if rule is None or ruled.parameters[source] is not None or owner.kind != "embedding":
            continue
        if get_style(rule.style).split_dim(2) in (0, -2):
            completed[owner.name] = "embedding_rowwise"
            warn("%s is tied to %s, which the plan of the model's class splits: split with it", source, name)
    return completed


def _no_plan(spec: ModelSpec) -> Finding:
    return Finding(
        code="PP704",
        message=f"there is no plan for model_type {spec.model_type}",
        expected=f"{BESIDE_CHECKPOINT} beside the checkpoint, {spec.model_type}.yaml in {PATH_VARIABLE}, "
        "or a plan in the package or in the model's class",
        fix='write one (plans/SPEC.md) and pass it: tp_plan="my_plan.yaml"',
    )
