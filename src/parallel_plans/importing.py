"""A plan that a model's class carries, as the text of a plan file: every rule by name, with the shapes it reaches."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import transformers

from parallel_plans.errors import PlanError
from parallel_plans.lookup import Carried, carried_plan, with_tied_embeddings
from parallel_plans.matching import Assignment, assign
from parallel_plans.model_spec import ModelSpec
from parallel_plans.plan import EXPERT_SECTIONS, Plan, Rule
from parallel_plans.resolve import resolve
from parallel_plans.table import Table, wildcarded

RANKS = {"tp": 2}  # for the marks in shapes: on how many ranks does not matter
EXPERT_RANKS = {"tp": 2, "ep": 2}
_PLAIN = re.compile(r"[A-Za-z_][\w.*]*")  # a name that YAML reads as it stands
_CATCH_ALL = "**"


def imported(spec: ModelSpec, carried: Carried) -> str:
    """The plan that the class of a model carries, as YAML; what it leaves out stands there as whole.

    Raises:
        LaunchError: PP704 where it carries none.
    """
    known = Carried(tp=with_tied_embeddings(spec, carried.tp or {}), ep=carried.ep)
    plan = carried_plan(spec, known)
    lines = [
        f"# {spec.model_type}: the plan that its class in transformers {transformers.__version__} carries, translated.",
        "# Shapes are those of the config that it was asked for.",
        *(f"# Left out, since it does nothing in this model: {rule.pattern}: {rule.style}" for rule in plan.dropped),
        "version: 1",
        f"model_type: {spec.model_type}",
    ]
    for section in plan.sections:
        lines += [f"{section}:", *_lines(plan, spec, section)]
    return "\n".join(lines) + "\n"


def _lines(plan: Plan, spec: ModelSpec, section: str) -> Iterator[str]:
    rules = plan.rules(section)
    assignment, table = assign(rules, list(spec.parameters), list(spec.modules)), _table(plan, spec, section)
    for rule in rules:
        if rule.pattern != _CATCH_ALL:
            yield _line(rule.pattern, rule.style, _shape(rule, spec, assignment, table))
    whole = next((rule for rule in rules if rule.pattern == _CATCH_ALL), None)
    if whole is not None and (names := _named(whole, spec, assignment)):
        yield "  # whole on every rank"
        for name, shape in names.items():
            yield _line(name, whole.style, shape)


def _line(pattern: str, style: str, shape: str) -> str:
    name = pattern if _PLAIN.fullmatch(pattern) else f'"{pattern}"'
    return f"  {name}: {style}{shape and f'  # {shape}'}"


def _table(plan: Plan, spec: ModelSpec, section: str) -> Table | None:
    """The plan resolved, for its marks; None where it does not fit, which is for the verifier to say."""
    sizes: Mapping[str, int] = EXPERT_RANKS if section in EXPERT_SECTIONS else RANKS
    try:
        return resolve(plan, spec, sizes, dispatch=section == "dispatch_plan")
    except PlanError:
        return None


def _shape(rule: Rule, spec: ModelSpec, assignment: Assignment, table: Table | None) -> str:
    """The shape of the largest parameter that a rule reaches first, marked where it is split; nothing for none."""
    reached = [name for name, other in assignment.parameters.items() if other is rule]
    if not reached:
        return ""
    form = wildcarded(reached[0]).rpartition(".")[0]
    alike = [name for name in reached if wildcarded(name).rpartition(".")[0] == form]
    name = max(alike, key=lambda name: spec.parameters[name].bytes)
    if table is None or name not in table.parameters:
        return f"[{', '.join(map(str, spec.parameters[name].shape))}]"
    return str(table.parameters[name].layout)


def _named(rule: Rule, spec: ModelSpec, assignment: Assignment) -> dict[str, str]:
    """What the catch-all reaches, by name: modules of which it has all parameters, else single ones; with a shape."""
    named: dict[str, str] = {}
    for module in spec.modules.values():
        own = [name for name in module.parameters if assignment.parameters[name] is rule]
        is_all = bool(module.name) and len(own) == len(module.parameters)
        for name in own:
            shape = f"[{', '.join(map(str, spec.parameters[name].shape))}]"
            named.setdefault(wildcarded(module.name if is_all else name), shape)
    return named
