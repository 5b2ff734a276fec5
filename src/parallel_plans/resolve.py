"""Plan + names and shapes -> a table of concrete entries. Pure: no device, no process group, no model.

Every entry knows the rule it comes from, with file and line. All that is wrong is reported at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from parallel_plans.accounting import (
    Report,
    foreign,
    one_per_form,
    report_misplaced,
    report_tied,
    report_unruled,
    report_uses,
)
from parallel_plans.counts import is_of_each
from parallel_plans.errors import PlanError
from parallel_plans.expert_rules import ExpertRules, report_differing, report_incomplete
from parallel_plans.geometry import CannotSplit, Geometry, check_groups, check_rope, shared_out
from parallel_plans.layouts import Layout, Split, nested
from parallel_plans.matching import Assignment, Pattern, assign
from parallel_plans.model_spec import ModelSpec, ModuleInfo, ParameterInfo
from parallel_plans.plan import Plan, Rule
from parallel_plans.sequence_rules import report_sequence
from parallel_plans.standing import STAND_IN, can_stand, report_unserved
from parallel_plans.staying import StayingTokens
from parallel_plans.styles import Style, get_style
from parallel_plans.table import ModuleEntry, ParameterEntry, Table, Use
from parallel_plans.views import BLOCK_AXIS, EXPERT_AXIS, EXPERT_TENSOR_AXIS, TENSOR_AXIS, Views, views_of


def resolve(plan: Plan, spec: ModelSpec, sizes: Mapping[str, int], *, dispatch: bool = False) -> Table:
    """The table of `plan` for the model `spec`.

    Args:
        plan: its `tp_plan` is used, where it splits sequences its `sp_plan`, and where experts are dealt over ranks its
            `ep_plan` or its `dispatch_plan`.
        spec: the model.
        sizes: axis -> ranks: `tp`, and where experts are dealt over ranks `ep` and `etp` (see `views_of`).
        dispatch: send tokens to their experts also where the ranks share one batch.

    Raises:
        PlanError: with every finding, in the order of the file.
    """
    if (finding := foreign(plan, spec)) is not None:
        raise PlanError(finding)  # every other finding would only follow from this one
    views = views_of(sizes)
    resolver = _Resolver(plan, spec, views, _expert_section(views, dispatch))
    table = resolver.table()
    if resolver.report.findings:
        raise PlanError(one_per_form(sorted(resolver.report.findings, key=lambda finding: finding.line or 0)))
    return table


def _expert_section(views: Views, dispatch: bool) -> str | None:
    """The section that says how experts are dealt; None where they follow the dense layers."""
    if views.ep == 1 and views.etp == views.tp:
        return None
    return "dispatch_plan" if dispatch or not views.shares_batch else "ep_plan"


class _Resolver:
    """One resolution; `report` fills on the way."""

    def __init__(self, plan: Plan, spec: ModelSpec, views: Views, section: str | None) -> None:
        self.plan, self.spec, self.views, self.section = plan, spec, views, section
        self.report = Report(plan)

    def geometry(self, name: str, axis: str) -> Geometry:
        """Shapes under an axis at `name`, where a layer may have sizes of its own."""
        proportions = self.plan.proportions if axis == TENSOR_AXIS else None
        return Geometry.at(self.spec, name, axis, self.views.sizes[axis], proportions)

    def table(self) -> Table:
        report_misplaced(self.report)
        dense, experts = self._assigned_dense(), self._assigned(self.section)
        self.around = self._around()
        parameters: dict[str, ParameterEntry] = {}
        modules: dict[str, tuple[ModuleEntry, ...]] = {}
        if dense is not None and experts is not None:
            self.experts = ExpertRules(self.spec, dense, experts, lambda name: self.geometry(name, EXPERT_AXIS))
            self.staying = StayingTokens(self.spec, dense, self.around, self.experts, self.views)
            report_unruled(self.report, self.spec, dense)
            for name, info in self.spec.parameters.items():
                rules = (dense.parameters[name], experts.parameters[name])
                if rules[0] is not None and (entry := self._parameter(info, rules)) is not None:
                    parameters[name] = entry
            report_tied(self.report, self.spec, parameters)
            if self.plan.splits_sequence:
                used = parameters if self.views.tp > 1 else {}  # one rank has all of the sequence
                report_sequence(self.report, self.spec, dense, self.around, used)
            for name, module in self.spec.modules.items():
                rules = (dense.modules[name], experts.modules[name])
                if acting := self._module(module, rules, parameters):
                    modules[name] = acting
            if self.section is not None:
                report_incomplete(self.report, self.spec, self.experts)
                if self.views.ep > 1 and not (self.experts.weights or self.report.findings):
                    self.report.idle(self.section, self.views.sizes)
            if self.section == "ep_plan" and min(self.views.ep, self.views.etp) > 1:
                report_differing(self.report, self.experts)
        sizes = self.views.sizes
        return Table(plan=self.plan, spec=self.spec, sizes=sizes, parameters=parameters, modules=modules)

    def _assigned_dense(self) -> Assignment | None:
        """The rules of `tp_plan`, and before them those of `sp_plan` that stand in their place where it is in use."""
        own = self._assigned("tp_plan")
        if own is None or not self.plan.splits_sequence or self._assigned("sp_plan") is None:
            return own
        instead = (rule for rule in self.plan.rules("sp_plan") if not get_style(rule.style).stands_around)
        rules = (*instead, *self.plan.rules("tp_plan"))
        return assign(rules, list(self.spec.parameters), list(self.spec.modules))

    def _around(self) -> Mapping[str, Rule | None]:
        """The rules of `sp_plan`, where it is in use, that act around what a module does under `tp_plan`."""
        rules = self.plan.rules("sp_plan") if self.plan.splits_sequence else ()
        return assign([rule for rule in rules if get_style(rule.style).stands_around], (), [*self.spec.modules]).modules

    def _assigned(self, section: str | None) -> Assignment | None:
        """The rules of a section on the model's names, all None for no section; None where the plan lacks it."""
        rules = () if section is None else self.plan.rules(section)
        if section is not None and not rules:
            self.report.missing(section, self.views.sizes)
            return None
        assignment = assign(rules, list(self.spec.parameters), list(self.spec.modules))
        report_uses(self.report, self.spec, assignment)
        report_unserved(self.report, self.spec, assignment)
        return assignment

    def _tensor_axis(self, name: str, rule: Rule | None) -> str:
        """The axis on which a rule of `tp_plan` acts: an expert's parts lie on an axis of their own."""
        role = None if rule is None else get_style(rule.style).role
        is_expert = self.experts.holds(name) or self.experts.surrounds(name, role)
        return EXPERT_TENSOR_AXIS if is_expert else TENSOR_AXIS

    def _parameter(self, info: ParameterInfo, rules: Sequence[Rule | None]) -> ParameterEntry | None:
        axes = (self._tensor_axis(info.name, rules[0]), EXPERT_AXIS)
        uses, splits = [], []
        for rule, axis in zip(rules, axes, strict=True):
            if rule is None:
                continue
            style = get_style(rule.style)
            if not can_stand(self.report, self.spec, info, rule):
                return None
            try:
                split = self.geometry(info.name, axis).split(info.shape, style, rule.options)
            except CannotSplit as problem:
                what = f"{rule.style} cannot split {problem.what}"
                self.report.unfit(problem, what, rule, info.name, str(Layout(info.shape)))
                return None
            letter = "S" if split is not None else (style.whole_as if self.views.sizes[axis] > 1 else "I")
            if letter == "I" and rule is rules[0] and self.staying.takes_parts(info.name):
                axis, letter = TENSOR_AXIS, "R"  # it sees this rank's tokens alone
            uses.append(Use(axis=axis, style=style, rule=rule, letter=letter))
            splits += [] if split is None else [split]
        return ParameterEntry(info=info, layout=Layout(info.shape, _joined(splits)), uses=tuple(uses))

    def _module(
        self, info: ModuleInfo, rules: Sequence[Rule | None], parameters: Mapping[str, ParameterEntry]
    ) -> tuple[ModuleEntry, ...]:
        around = self.staying.around(info.name)
        axes = (TENSOR_AXIS, self._tensor_axis(info.name, rules[0]), EXPERT_AXIS)
        entries = []
        for rule, axis in zip((around, *rules), axes, strict=True):
            if rule is None or self.views.sizes[axis] == 1:
                continue  # nobody to split with
            if (entry := self._acting(info, rule, axis, parameters)) is not None:
                entries.append(entry)
        return tuple(entries)

    def _acting(
        self, info: ModuleInfo, rule: Rule, axis: str, parameters: Mapping[str, ParameterEntry]
    ) -> ModuleEntry | None:
        style = get_style(rule.style)
        acts = style.acts_on_forward or "counts" in {**style.defaults, **rule.options}
        is_misplaced = rule.section not in style.sections or (style.serves and info.kind not in style.serves)
        if not acts or is_misplaced or not all(name in parameters for name in info.parameters):
            return None  # all but the first were reported, of the rule or of the module's parameters
        is_stand_in = style.shards and info.type == STAND_IN
        if rule.optional and is_stand_in:
            return None
        here = rule
        if rule.optional and not self._keeps(info, rule) and self._is_kept_elsewhere(rule):
            here = _of_each(info, rule)  # a module of another kind under the same name
            if not here.options["counts"]:
                return None
        own = [parameters[name] for name in info.parameters]
        try:
            if style.shards and not self._suits(info, own, style, rule, axis):
                return None
            options = self.geometry(info.name, axis).options(info, style, here)
            options.update(self._buffers(info, here, axis))
            check_rope(options.get("rope"), own)
            options.update(self.experts.options(info.name, style))
            options.update(self.staying.options(info.name, style))
            if "of" in style.options and not (own := self._given_in_parts(info, rule, axis, parameters)):
                return None
            split = self._dealt(info.name, style, axis, own)
            if (style.leaves[0], style.delivers[0]) == ("P", "S") and style.shards:
                split = shared_out(split, own)
            check_groups(options.get("groups"), split)
        except CannotSplit as problem:
            self.report.unfit(problem, problem.what, rule, info.name, None)
            return None
        over = self._over(info.name, style, axis)
        return ModuleEntry(info=info, style=style, rule=rule, axis=axis, over=over, split=split, options=options)

    def _buffers(self, info: ModuleInfo, rule: Rule, axis: str) -> dict[str, object]:
        """The rule's option about buffers, with how each is split."""
        given, style = rule.options.get("buffers"), get_style(rule.style)
        if not isinstance(given, Mapping):
            return {}
        found = {}
        for name, how in given.items():
            buffer = self.spec.buffers.get(f"{info.name}.{name}")
            if buffer is None and rule.optional:
                continue
            if buffer is None:
                raise CannotSplit("PP203", f"the {info.type} keeps no buffer called {name}", fix="correct the name")
            found[name] = self.geometry(info.name, axis).buffer(name, buffer.shape, how, style)
        return {"buffers": found}

    def _keeps(self, info: ModuleInfo, rule: Rule) -> bool:
        """Whether a module keeps all the numbers and buffers that the rule names, but for those that are of `each`."""
        counts, buffers = _numbers(rule), rule.options.get("buffers", {})
        assert isinstance(buffers, Mapping)
        dealt = [name for name in counts if not is_of_each(counts[name])]
        numbers = (name for name in dealt or counts if not name.startswith("config."))
        return all(name in info.counts for name in numbers) and all(
            f"{info.name}.{name}" in self.spec.buffers for name in buffers
        )

    def _is_kept_elsewhere(self, rule: Rule) -> bool:
        pattern = Pattern.of(rule.pattern)
        return any(pattern.matches(name) and self._keeps(info, rule) for name, info in self.spec.modules.items())

    def _given_in_parts(
        self, info: ModuleInfo, rule: Rule, axis: str, parameters: Mapping[str, ParameterEntry]
    ) -> list[ParameterEntry]:
        """The parameters of the layer that the option `of` names, of whose output each rank has a part; else none."""
        below = rule.options.get("of")
        layer = self.spec.modules.get(f"{info.name}.{below}")
        own = [parameters[name] for name in (() if layer is None else layer.parameters) if name in parameters]
        uses = (use for entry in own for use in entry.uses if use.axis == axis)
        if any(use.letter == "S" and use.style.delivers == "S(-1)" for use in uses):
            return own
        found = f"no {below}" if layer is None else ", ".join(str(entry.layout) for entry in own)
        self.report.add(
            "PP105",
            f"{rule.style} stands on a module in which `of` names no layer that is split by its outputs",
            rule,
            name=info.name,
            found=found,
            expected=f"`of: NAME`, a layer right below {info.name} that hands on the features of each rank",
            fix="name such a layer, or drop the rule",
        )
        return []

    def _dealt(self, name: str, style: Style, axis: str, own: Sequence[ParameterEntry]) -> Split | None:
        """How the module's parameter is split on the axis, or for a style that knows experts, how these are dealt."""
        if style.role is not None:
            return self.experts.dealt(name, style) if axis == EXPERT_AXIS else None
        return next((split for entry in own for split in entry.layout.splits if split.axis == axis), None)

    def _over(self, name: str, style: Style, axis: str) -> str | None:
        """The axis over which a module's boundary communicates; None where there is nothing left to do."""
        is_dealt_twice = self.views.ep > 1 and self.views.etp > 1
        if axis == TENSOR_AXIS or not is_dealt_twice or not self.experts.is_joint(name, style):
            return axis
        # one reduction over both, done by the entry of `ep`; a router's two entries may differ in what they do
        return BLOCK_AXIS if axis == EXPERT_AXIS or style.role == "router" else None

    def _suits(self, info: ModuleInfo, own: Sequence[ParameterEntry], style: Style, rule: Rule, axis: str) -> bool:
        """Whether a module's parameters, under rules of their own, are split as the style on it needs them."""
        if not own:
            message = f"{rule.style} stands on modules that have a parameter to split, and {info.name} has none"
            self.report.add("PP105", message, rule, name=info.name, fix="remove the rule, or use another style")
            return False
        for entry in own:
            shape = entry.info.shape
            wanted = self.geometry(entry.info.name, axis).dim(shape, style, rule.options)
            found = next((split.dim for split in entry.layout.splits if split.axis == axis), None)
            if found != wanted:
                self.report.add(
                    "PP105",
                    f"{rule.style} finds a parameter that its own rule splits otherwise",
                    rule,
                    name=entry.info.name,
                    found=str(entry.layout),
                    expected="whole" if wanted is None else f"dim {wanted} split over {axis}",
                    fix=f"correct the rule at {entry.rule.place}, or drop it",
                )
                return False
        return True


def _numbers(rule: Rule) -> Mapping[str, object]:
    counts = rule.options.get("counts", {})
    assert isinstance(counts, Mapping)
    return counts


def _of_each(info: ModuleInfo, rule: Rule) -> Rule:
    """The rule with no more than the numbers of `each` that the module keeps."""
    kept = {name: count for name, count in _numbers(rule).items() if is_of_each(count) and name in info.counts}
    return replace(rule, options={**rule.options, "counts": kept, "buffers": {}})


def _joined(splits: Sequence[Split]) -> tuple[Split, ...]:
    """The splits of one parameter, at most one per dim: two of the same dim become one over both axes."""
    if len(splits) == 2 and splits[0].dim == splits[1].dim:
        inner, outer = splits
        return (nested(outer, inner, BLOCK_AXIS),)
    return tuple(splits)
