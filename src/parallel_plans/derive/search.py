"""The search: groups are taken, written as a plan, and kept where the verifier finds nothing."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from parallel_plans.derive.experts import sections as ways_to_deal
from parallel_plans.derive.groups import Group, Groups, chosen, is_worth_it
from parallel_plans.derive.naming import Names
from parallel_plans.derive.numbers import MOST_TRIES, Counts, candidates, choices
from parallel_plans.derive.ruling import Line, Ruling, Sample, Unwritable
from parallel_plans.derive.writing import loaded, written
from parallel_plans.errors import PlanError
from parallel_plans.model_spec import ModelSpec, config_fields
from parallel_plans.table import wildcarded
from parallel_plans.verify.report import FAILED, PASSED, Report
from parallel_plans.verify.verify import verify_plan

# what is found where code uses a number of the whole width: a crash, a part that meets another, ranks that differ
OF_NUMBERS = ("PP405", "PP303", "PP307", "PP305")
SECONDS = 25.0  # of this process, after which no more numbers are tried
MOST_GROUPS = 24  # that are tried, those first that split the most with the fewest collectives
EXPERT_RANKS: dict[str, Any] = {"tp": 2, "ep": 2}
ASKED = {"ep_plan": "auto", "dispatch_plan": "dispatch"}  # what makes the verifier use a section


class Search:
    """One search for a plan.

    Args:
        target: what the verifier is asked about, a config or a model.
        spec: the model at its own size.
        samples: what steps say of it, and of small models of its kind.
        tp: ranks.
        inputs: what to call a model of one's own with.

    Attributes:
        refused: parameter -> why the group that it is in was not taken.
    """

    def __init__(self, target: Any, spec: ModelSpec, samples: Sequence[Sample], tp: int, inputs: Any) -> None:
        self.target, self.spec, self.tp, self.inputs = target, spec, tp, inputs
        self.groups = [Groups(each.learned, each.spec, 2 if at else tp) for at, each in enumerate(samples)]
        self.first, self._small = replace(samples[0], groups=chosen(self.groups[0])), samples[1:]
        self.pattern = self.first.learned.pattern
        configs = [getattr(each.learned.step.model, "config", None) for each in samples]
        is_known = configs[0] is not None
        fields = [config_fields(config) for config in configs] if is_known else []
        self.names = Names(fields, _known_as(configs[0]) if is_known else {})
        self.counts: Counts = {}
        self.splits_around = True  # the table of tokens and the head
        self.taken: list[Group] = list(self.first.groups)
        self.experts: dict[str, Sequence[Line]] = {}
        self.refused: dict[str, str] = {}
        self._until = time.process_time() + SECONDS

    def run(self) -> Report:
        """What the verifier says of the plan that was found, which `text` then gives."""
        if not self._is_sound(self.taken, {}):
            self.splits_around = self._is_sound([], {})
            self.taken = self._sound_alone()
        report = self.verified(self.text())
        while not report.ok and self.taken:
            self._refuse(self.taken.pop(), told(report))
            report = self.verified(self.text())
        if not report.ok and self.splits_around:
            self.splits_around = False
            report = self.verified(self.text())
        if report.ok:
            self._deal_experts()
        return report

    # -- groups

    def _sound_alone(self) -> list[Group]:
        """The groups that are sound, each tried alone, with numbers made local where it needs that.

        Where one is not, another that splits some of the same may be.
        """
        sound: list[Group] = []
        ruled: set[str] = set()
        for group in self.groups[0].found[:MOST_GROUPS]:
            if not is_worth_it(group) or ruled & set(group.cuts):
                continue
            counts = self._counts_for(group)
            if counts is None:
                continue
            sound.append(group)
            ruled |= set(group.cuts)
            for pattern, attributes in counts.items():
                self.counts.setdefault(pattern, {}).update(attributes)
        return sound

    def _counts_for(self, group: Group) -> Counts | None:
        """The numbers to be made local for the group to be sound; None where it is not, whatever is tried."""
        try:
            report = self._checked([group], {})
        except Unwritable as error:
            self._refuse(group, str(error))
            return None
        if report.ok:
            return {}
        if not any(finding.code in OF_NUMBERS for finding in report.findings):
            self._refuse(group, told(report))
            return None
        own = candidates(self.first, self._others([group]), [group])
        tries = [own] if len(own) > 1 else []
        tries += [{pattern: some} for pattern, attributes in own.items() for some in choices(attributes)]
        for counts in tries[:MOST_TRIES]:
            if time.process_time() < self._until and self._is_sound([group], counts):
                return counts
        self._refuse(group, told(report))
        return None

    def _refuse(self, group: Group, why: str) -> None:
        for name in group.cuts:
            self.refused.setdefault(self.pattern(name), f"tried, and refused: {why}")

    def _is_sound(self, groups: Sequence[Group], counts: Counts) -> bool:
        try:
            return self._checked(groups, counts).ok
        except Unwritable:
            return False

    def _checked(self, groups: Sequence[Group], counts: Counts) -> Report:
        """What following a step says, and where that proves nothing, what numbers say."""
        text = self._written(groups, counts, {})
        try:
            report = self.verified(text, level="layouts")
        except PlanError as error:  # what no rule can say
            raise Unwritable(" ".join(error.findings[0].message.split())) from error
        is_open = report.ok and report.levels["layouts"] != PASSED
        return self.verified(text) if is_open else report

    # -- experts

    def _deal_experts(self) -> None:
        """Adds the sections that deal experts over ranks, where one is sound."""
        ruling = self._ruling(self.taken, self.counts)
        for section in ASKED:
            for lines in ways_to_deal(ruling, section):
                self.experts[section] = lines
                report = self.verified(self.text(), ep_plan=ASKED[section], **EXPERT_RANKS)
                if report.ok and FAILED not in report.levels.values():
                    break
                del self.experts[section]

    # -- the plan

    def verified(self, text: str, level: str = "numerics", **ranks: Any) -> Report:
        """What the verifier says of a plan."""
        given = {"tp": self.tp, **ranks}
        return verify_plan(self.target, loaded(text), inputs=self.inputs, cost=None, level=level, **given)

    def text(self, remarks: Sequence[str] = ()) -> str:
        """The plan that was found."""
        return self._written(self.taken, self.counts, self.experts, remarks)

    def _written(
        self,
        groups: Sequence[Group],
        counts: Counts,
        experts: Mapping[str, Sequence[Line]],
        remarks: Sequence[str] = (),
    ) -> str:
        lines = self._ruling(groups, counts).lines()
        return written(self.spec.model_type, {"tp_plan": lines, **experts}, remarks)

    def _ruling(self, groups: Sequence[Group], counts: Counts) -> Ruling:
        first = replace(self.first, groups=groups)
        return Ruling(first, self._others(groups), self.names, counts, self._why_whole, self.splits_around)

    @property
    def whole(self) -> dict[str, str]:
        """Form of a parameter that no group splits -> why, where there is more to say than that nothing asks for it."""
        split = {name for group in self.taken for name in group.cuts}
        left = [name for name in self.first.spec.parameters if name not in split]
        return {self.pattern(name): why for name in left if (why := self._why_whole(name)) is not None}

    def _others(self, groups: Sequence[Group]) -> list[Sample]:
        """The small models of the kind, with those groups of theirs that do what these do."""
        return [
            replace(sample, groups=[twin for group in groups if (twin := own.twin(group)) is not None])
            for sample, own in zip(self._small, self.groups[1:], strict=True)
        ]

    def _why_whole(self, name: str) -> str | None:
        return self.refused.get(self.pattern(name)) or self.groups[0].why_whole(name)


def _known_as(config: Any) -> dict[str, str]:
    """The fields of a config that this architecture has a name of its own for -> the usual name."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return {own: usual for usual, own in getattr(text, "attribute_map", {}).items()}


def told(report: Report) -> str:
    """The first thing that is wrong, in one line."""
    wrong = [finding for finding in report.findings if finding.severity == "error"]
    if not wrong:
        return "nothing is known of it"
    place = f" at {wildcarded(wrong[0].name)}" if wrong[0].name else ""
    return " ".join(f"{wrong[0].message} [{wrong[0].code}{place}]".split())
