"""Plan + names and shapes -> a table of concrete entries. Pure: no device, no process group, no model.

Every entry knows the rule it comes from, with file and line. All that is wrong is reported at once.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import replace

from parallel_plans.errors import Finding, PlanError
from parallel_plans.geometry import CannotSplit, Geometry
from parallel_plans.layouts import Layout
from parallel_plans.matching import Assignment, Pattern, RuleUse, assign
from parallel_plans.model_spec import ModelSpec, ModuleInfo, ParameterInfo
from parallel_plans.plan import Plan, Rule
from parallel_plans.styles import Style, get_style
from parallel_plans.table import ModuleEntry, ParameterEntry, Table, wildcarded


def resolve(plan: Plan, spec: ModelSpec, sizes: Mapping[str, int]) -> Table:
    """The table of `plan` for the model `spec` on a mesh of `sizes` (axis -> ranks).

    Raises:
        PlanError: with every finding, in the order of the file.
    """
    if (foreign := _foreign(plan, spec)) is not None:
        raise PlanError(foreign)  # every other finding would only follow from this one
    resolver = _Resolver(plan, spec, sizes)
    table = resolver.table()
    if resolver.findings:
        raise PlanError(_one_per_form(sorted(resolver.findings, key=lambda finding: finding.line or 0)))
    return table


def _foreign(plan: Plan, spec: ModelSpec) -> Finding | None:
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


def _one_per_form(findings: Sequence[Finding]) -> list[Finding]:
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


class _Resolver:
    """One resolution; `findings` fills on the way."""

    axis = "tp"

    def __init__(self, plan: Plan, spec: ModelSpec, sizes: Mapping[str, int]) -> None:
        self.plan, self.spec, self.sizes = plan, spec, sizes
        self.geometry = Geometry(spec.fields, self.axis, sizes[self.axis])
        self.findings: list[Finding] = []

    def report(self, code: str, message: str, rule: Rule | None, **about: str | None) -> None:
        place = {} if rule is None else {"file": rule.file, "line": rule.line, "rule": rule.pattern}
        self.findings.append(Finding(code=code, message=message, **{**place, **about}))  # type: ignore[arg-type]

    def table(self) -> Table:
        rules = self.plan.rules("tp_plan")
        if not rules:
            self.report("PP108", "the plan has no tp_plan", None, file=self.plan.file, fix="add a tp_plan section")
            return self._empty()
        assignment = assign(rules, list(self.spec.parameters), list(self.spec.modules))
        self._check_uses(assignment)
        self._check_unruled(assignment)
        parameters = {
            name: entry
            for name, rule in assignment.parameters.items()
            if rule is not None and (entry := self._parameter(self.spec.parameters[name], rule)) is not None
        }
        self._check_tied(parameters)
        modules = {
            name: acting
            for name, rule in assignment.modules.items()
            if rule is not None and (acting := self._module(self.spec.modules[name], rule, parameters)) is not None
        }
        return Table(plan=self.plan, spec=self.spec, sizes=dict(self.sizes), parameters=parameters, modules=modules)

    def _empty(self) -> Table:
        return Table(plan=self.plan, spec=self.spec, sizes=dict(self.sizes), parameters={}, modules={})

    def _check_uses(self, assignment: Assignment) -> None:
        names = [*self.spec.modules, *self.spec.parameters]
        for use in assignment.uses:
            rule = use.rule
            # a catch-all may find nothing left to catch, but must have had something to look at
            is_spare = "**" in rule.pattern and not use.matches_nothing
            if self._reaches(use) or is_spare or (rule.optional and use.matches_nothing):
                continue
            if use.matches_nothing:
                self.report("PP101", "the rule matches nothing in the model", rule, fix=_nearest(rule.pattern, names))
            elif use.is_shadowed:
                fix = "remove it, or write it above the rule that takes what it matches"
                self.report("PP104", "earlier rules take all that this one matches", rule, fix=fix)
            else:
                fix = f"name the parameters, or write `{rule.pattern}.**` for all that lies below"
                message = f"the rule matches modules without parameters of their own, where {rule.style} does nothing"
                self.report("PP101", message, rule, fix=fix)

    def _reaches(self, use: RuleUse) -> bool:
        """Whether the rule does something: it rules a parameter, or stands on a module for its boundary's sake."""
        style = get_style(use.rule.style)
        return bool(use.parameters) or (use.modules > 0 and (style.acts_on_forward or style.module_only))

    def _fix_for(self, name: str, idle: Sequence[Rule]) -> str:
        """What to do about a parameter without a rule: an idle rule may be meant for it, and misspelt."""
        module = wildcarded(name.rpartition(".")[0])
        meant = difflib.get_close_matches(module, [rule.pattern for rule in idle], n=1, cutoff=0.9)
        if not meant:
            return f'add `{wildcarded(name)}: replicate`, or `"**": replicate` as the last rule'
        place = next(rule.place for rule in idle if rule.pattern == meant[0])
        return f"correct `{meant[0]}` at {place}, if it is meant for this"

    def _check_unruled(self, assignment: Assignment) -> None:
        idle = [use.rule for use in assignment.uses if use.matches_nothing]
        for name in assignment.unruled:
            shape = str(Layout(self.spec.parameters[name].shape))
            self.report(
                "PP102",
                "the parameter has no rule",
                None,
                file=self.plan.file,
                name=name,
                found=shape,
                expected="a rule for every parameter; what stays whole is written too",
                fix=self._fix_for(name, idle),
            )

    def _parameter(self, info: ParameterInfo, rule: Rule) -> ParameterEntry | None:
        style = get_style(rule.style)
        owner = self.spec.modules[info.name.rpartition(".")[0]]
        if not self._can_stand(info, owner, rule, style):
            return None
        try:
            split = self.geometry.split(info.shape, style, rule.options)
        except CannotSplit as problem:
            self.report(
                problem.code,
                f"{rule.style} cannot split {problem.what}",
                rule,
                level="geometry",
                name=info.name,
                found=str(Layout(info.shape)),
                expected=problem.expected,
                fix=problem.fix,
            )
            return None
        layout = Layout(info.shape, () if split is None else (split,))
        used_as = "I" if split is not None else style.whole_as
        return ParameterEntry(info=info, layout=layout, style=style, rule=rule, axis=self.axis, used_as=used_as)

    def _can_stand(self, info: ParameterInfo, owner: ModuleInfo, rule: Rule, style: Style) -> bool:
        """Whether the style can stand on this parameter or its module; reported where it cannot."""
        on_module = not _names(rule, info.name)
        problem = fix = None
        if on_module and style.serves and owner.kind not in style.serves:
            kinds = " or ".join(style.serves)
            problem = f"{rule.style} stands on modules of kind {kinds}, and {owner.name} is a {owner.type}"
            fix = "use `replicate`, or the style that fits such a module"
        elif not on_module and style.module_only:
            problem = f"{rule.style} stands on a module, and {info.name} is a parameter"
            fix = f"write it on `{rule.pattern.rpartition('.')[0]}`"
        elif style.ndim is not None and len(info.shape) != style.ndim:
            problem = f"{rule.style} stands on a parameter of {style.ndim} dims"
            fix = "use `replicate`, or the style that fits such a parameter"
        if problem is not None:
            self.report("PP105", problem, rule, name=info.name, found=str(Layout(info.shape)), fix=fix)
        return problem is None

    def _check_tied(self, parameters: Mapping[str, ParameterEntry]) -> None:
        for name, source in self.spec.tied.items():
            if name not in parameters or source not in parameters:
                continue
            one, other = parameters[name], parameters[source]
            if one.layout != other.layout:
                self.report(
                    "PP103",
                    f"{name} and {source} are one tensor under conflicting rules",
                    one.rule,
                    name=name,
                    found=str(one.layout),
                    expected=f"{other.layout}, as {other.rule.style} says at {other.rule.place}",
                    fix="give both a style that splits the same dim the same way, or write both as `replicate`",
                )

    def _module(self, info: ModuleInfo, rule: Rule, parameters: Mapping[str, ParameterEntry]) -> ModuleEntry | None:
        style = get_style(rule.style)
        if not style.acts_on_forward or (style.serves and info.kind not in style.serves):
            return None  # the second was reported on the module's parameters
        if not all(name in parameters for name in info.parameters):
            return None  # that was reported too
        own = [parameters[name] for name in info.parameters]
        try:
            if style.shards and not self._suits(own, style, rule):
                return None
            options = self.geometry.options(info, style, rule)
        except CannotSplit as problem:
            self.report(
                problem.code,
                problem.what,
                rule,
                level="geometry",
                name=info.name,
                expected=problem.expected,
                fix=problem.fix,
            )
            return None
        split = next((entry.layout.splits[0] for entry in own if entry.is_sharded), None)
        return ModuleEntry(info=info, style=style, rule=rule, axis=self.axis, split=split, options=options)

    def _suits(self, own: Sequence[ParameterEntry], style: Style, rule: Rule) -> bool:
        """Whether a module's parameters, under rules of their own, are split as the style on it needs them."""
        for entry in own:
            shape = entry.info.shape
            wanted = self.geometry.dim(shape, style, rule.options)
            found = entry.layout.splits[0].dim if entry.is_sharded else None
            if found != wanted:
                self.report(
                    "PP105",
                    f"{rule.style} finds a parameter that its own rule splits otherwise",
                    rule,
                    name=entry.info.name,
                    found=str(entry.layout),
                    expected="whole" if wanted is None else f"dim {wanted} split over {self.axis}",
                    fix=f"correct the rule at {entry.rule.place}, or drop it",
                )
                return False
        return True


def _names(rule: Rule, parameter: str) -> bool:
    """Whether the rule names the parameter itself, rather than its module or whatever lies below one."""
    last = rule.pattern.rpartition(".")[2]
    return last == parameter.rpartition(".")[2] and Pattern.of(rule.pattern).matches(parameter)


def _nearest(pattern: str, names: list[str]) -> str | None:
    """What to write instead, where something in the model is called nearly so."""
    candidates = list(dict.fromkeys(wildcarded(name) for name in names if name))
    close = difflib.get_close_matches(pattern, candidates, n=1, cutoff=0.6)
    return (
        f"did you mean `{close[0]}`? if only some configs have it, write `optional: true`"
        if close
        else ("remove it; if only some configs have it, write `optional: true`")
    )
