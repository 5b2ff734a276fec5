"""Every rule must do something and every parameter must stand under one: the findings where that is not so."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import replace

from parallel_plans.errors import Finding
from parallel_plans.geometry import CannotSplit
from parallel_plans.layouts import Layout
from parallel_plans.matching import Assignment, Pattern, RuleUse
from parallel_plans.model_spec import ModelSpec
from parallel_plans.plan import Plan, Rule
from parallel_plans.styles import get_style
from parallel_plans.table import ParameterEntry, wildcarded
from parallel_plans.views import EXPERT_AXIS, EXPERT_TENSOR_AXIS, TENSOR_AXIS

_WANTED = {
    "ep_plan": "`grouped_gemm` on the experts' weights, `ep_router` on their router, `moe_experts_allreduce` on the "
    "experts",
    "dispatch_plan": "`grouped_gemm` on the experts' weights, `ep_dispatch` on the experts",
}
_WITHOUT = "or drop ep_plan, ep_size and etp_size"


class Report:
    """The findings of one resolution."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.findings: list[Finding] = []

    def add(self, code: str, message: str, rule: Rule | None, **about: str | None) -> None:
        """A finding about a rule, or about the file where there is none."""
        place = {} if rule is None else {"file": rule.file, "line": rule.line, "rule": rule.pattern}
        self.findings.append(Finding(code=code, message=message, **{**place, **about}))  # type: ignore[arg-type]

    def unfit(self, problem: CannotSplit, message: str, rule: Rule, name: str, found: str | None) -> None:
        """A finding about a shape that a rule does not fit."""
        self.add(
            problem.code,
            message,
            rule,
            level="geometry",
            name=name,
            found=found,
            expected=problem.expected,
            fix=problem.fix,
        )

    def missing(self, section: str, sizes: Mapping[str, int]) -> None:
        """The finding that the plan lacks a section."""
        if section == "tp_plan":
            self.add("PP108", "the plan has no tp_plan", None, file=self.plan.file, fix="add a tp_plan section")
            return
        article = "an" if section[0] in "aeiou" else "a"
        self.add(
            "PP108",
            f"{article} {section} is asked for",
            None,
            file=self.plan.file,
            found=f"only {', '.join(self.plan.sections)}",
            expected=f"{article} {section} that deals experts with {_told(sizes)}",
            fix=f"add {article} {section}: {_WANTED[section]}; {_WITHOUT}",
        )

    def idle(self, section: str, sizes: Mapping[str, int]) -> None:
        """The finding that a section for experts deals none."""
        self.add(
            "PP108",
            f"{section} deals no expert of this model",
            None,
            file=self.plan.file,
            expected=f"experts to deal with {_told(sizes)}",
            fix=f"write `grouped_gemm` on the experts' weights there, {_WITHOUT}",
        )


def _told(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{axis} = {sizes[axis]}" for axis in (TENSOR_AXIS, EXPERT_AXIS, EXPERT_TENSOR_AXIS))


def foreign(plan: Plan, spec: ModelSpec) -> Finding | None:
    """The finding that the plan is for another model type; None where it is not."""
    if plan.model_type is None or spec.model_type is None or plan.model_type == spec.model_type:
        return None
    return Finding(
        code="PP106",
        message=f"the plan is for model_type {plan.model_type}, the model is {spec.model_type}",
        file=plan.file,
        expected=f"model_type: {spec.model_type}",
        fix=f"use a plan for {spec.model_type}, or write its model_type here if the plan does fit",
    )


def one_per_form(findings: Sequence[Finding]) -> list[Finding]:
    """The findings with those that differ in the layer's number alone told once, with how many there are."""
    alike: dict[tuple[object, ...], list[Finding]] = {}
    for finding in findings:
        key = (finding.code, finding.line, finding.rule, wildcarded(finding.name or ""), finding.found)
        alike.setdefault(key, []).append(finding)
    told = []
    for first, *others in alike.values():
        if others:
            more = f"{first.found or ''} (and {len(others)} more like it)".strip()
            first = replace(first, found=more)
        told.append(first)
    return told


def report_misplaced(report: Report) -> None:
    """Reports the rules whose style cannot stand in their section, of sections that are not asked for too."""
    for section, rules in report.plan.sections.items():
        for rule in rules:
            sections = get_style(rule.style).sections
            if section not in sections:
                fix = f"move it to {' or '.join(sections)}, or use a style that acts here"
                report.add("PP105", f"{rule.style} cannot stand in {section}", rule, fix=fix)
            elif "buffers" in get_style(rule.style).options and "buffers" not in rule.options:
                fix = "give `buffers: {NAME: {dim: DIM}}`, those that are split, or use `local_counts`"
                report.add("PP105", f"{rule.style} stands on a module together with buffers", rule, fix=fix)
            elif "draws" in get_style(rule.style).options and "draws" not in rule.options:
                fix = "give `draws: {dim: DIM, size: SIZE}`, what is drawn for all ranks, or use `local_counts`"
                report.add("PP105", f"{rule.style} stands on a module together with what it draws", rule, fix=fix)
            elif get_style(rule.style).only_counts and "counts" not in rule.options:
                fix = "give `counts: {NAME: SIZE}`, the numbers that the module keeps, or remove the rule"
                report.add("PP105", f"{rule.style} stands on a module together with its counts", rule, fix=fix)
            elif "inputs" in get_style(rule.style).options and "inputs" not in rule.options:
                fix = "give `inputs: {NAME: {dim: DIM, size: SIZE}}`, those that are split, or use `local_counts`"
                report.add("PP105", f"{rule.style} stands on a module together with inputs", rule, fix=fix)


def report_uses(report: Report, spec: ModelSpec, assignment: Assignment) -> None:
    """Reports the rules that match nothing, or that others take everything from."""
    names = [*spec.modules, *spec.parameters]
    for use in assignment.uses:
        rule = use.rule
        # a catch-all may find nothing left to catch, but must have had something to look at
        is_spare = "**" in rule.pattern and not use.matches_nothing
        is_absent = rule.optional and not use.is_shadowed  # as a norm without weights is, which is there
        if reaches(use) or is_spare or is_absent:
            continue
        if (buffers := _buffers_of(rule, spec)) and not use.parameters:
            found = f"{len(buffers)} buffer{'s' * (len(buffers) > 1)}, no parameter"
            fix = "remove it: every rank has all buffers whole, and a plan splits parameters only"
            report.add("PP112", "the rule reaches buffers only", rule, name=buffers[0], found=found, fix=fix)
        elif use.matches_nothing:
            report.add("PP101", "the rule matches nothing in the model", rule, fix=_nearest(rule.pattern, names))
        elif use.is_shadowed:
            fix = "remove it, or write it above the rule that takes what it matches"
            report.add("PP104", "earlier rules take all that this one matches", rule, fix=fix)
        else:
            fix = f"name the parameters, or write `{rule.pattern}.**` for all that lies below"
            message = f"the rule matches modules without parameters of their own, where {rule.style} does nothing"
            report.add("PP101", message, rule, fix=fix)


def _buffers_of(rule: Rule, spec: ModelSpec) -> list[str]:
    """The buffers that the rule names, or whose module it names."""
    pattern = Pattern.of(rule.pattern)
    return [name for name in spec.buffers if pattern.matches(name) or pattern.matches(name.rpartition(".")[0])]


def reaches(use: RuleUse) -> bool:
    """Whether the rule does something: it rules a parameter, or stands on a module for its boundary's sake."""
    style = get_style(use.rule.style)
    return bool(use.parameters) or (use.modules > 0 and (style.acts_on_forward or style.module_only))


def _nearest(pattern: str, names: list[str]) -> str | None:
    """What to write instead, where something in the model is called nearly so."""
    candidates = list(dict.fromkeys(wildcarded(name) for name in names if name))
    close = difflib.get_close_matches(pattern, candidates, n=1, cutoff=0.6)
    return (
        f"did you mean `{close[0]}`? if only some configs have it, write `optional: true`"
        if close
        else ("remove it; if only some configs have it, write `optional: true`")
    )


def report_unruled(report: Report, spec: ModelSpec, assignment: Assignment) -> None:
    """Reports the parameters that no rule reaches."""
    idle = [use.rule for use in assignment.uses if use.matches_nothing]
    for name in assignment.unruled:
        report.add(
            "PP102",
            "the parameter has no rule",
            None,
            file=report.plan.file,
            name=name,
            found=str(Layout(spec.parameters[name].shape)),
            expected="a rule for every parameter; what stays whole is written too",
            fix=_fix_for(name, idle),
        )


def _fix_for(name: str, idle: Sequence[Rule]) -> str:
    """What to do about a parameter without a rule: an idle rule may be meant for it, and misspelt."""
    module = wildcarded(name.rpartition(".")[0])
    meant = difflib.get_close_matches(module, [rule.pattern for rule in idle], n=1, cutoff=0.9)
    if not meant:
        return f'add `{wildcarded(name)}: replicate`, or `"**": replicate` as the last rule'
    place = next(rule.place for rule in idle if rule.pattern == meant[0])
    return f"correct `{meant[0]}` at {place}, if it is meant for this"


def report_tied(report: Report, spec: ModelSpec, parameters: Mapping[str, ParameterEntry]) -> None:
    """Reports names of one tensor that stand under rules which split it differently."""
    for name, source in spec.tied.items():
        if name not in parameters or source not in parameters:
            continue
        one, other = parameters[name], parameters[source]
        if one.layout != other.layout:
            report.add(
                "PP103",
                f"{name} and {source} are one tensor under conflicting rules",
                one.rule,
                name=name,
                found=str(one.layout),
                expected=f"{other.layout}, as {other.rule.style} says at {other.rule.place}",
                fix="give both a style that splits the same dim the same way, or write both as `replicate`",
            )
