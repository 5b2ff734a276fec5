"""`derive_plan`: a plan for a model that has none, found from a step of it, and verified."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from parallel_plans.derive.groups import Group, Groups, chosen
from parallel_plans.derive.naming import Names
from parallel_plans.derive.numbers import Counts, candidates, choices
from parallel_plans.derive.ruling import Line, Ruling, Sample, Unwritable
from parallel_plans.derive.subjects import samples
from parallel_plans.derive.writing import written
from parallel_plans.errors import Finding
from parallel_plans.loader import load_plan
from parallel_plans.model_spec import ModelSpec, config_fields, describe
from parallel_plans.plan import Plan
from parallel_plans.table import wildcarded
from parallel_plans.verify.own import OwnModel, config_of
from parallel_plans.verify.report import Report
from parallel_plans.verify.verify import verify_plan


@dataclass(frozen=True, kw_only=True)
class Derived:
    """A plan that was derived.

    Args:
        text: the plan as commented YAML.
        plan: the same, read.
        report: what `verify_plan` says of it.
        refused: what stays whole although it looked as if it could be split, and why.
        seconds: how long it took.
    """

    text: str
    plan: Plan
    report: Report
    refused: tuple[str, ...]
    seconds: float


def derive_plan(model_or_config: Any, tp: int = 2, *, inputs: Any = None, name: str | None = None) -> Derived:
    """A plan for a model, found from what a step of it does with its parameters, and what the verifier says of it.

    Args:
        model_or_config: a transformers config, or any `nn.Module`.
        tp: the ranks that it is for; it holds for others that its units can be dealt over.
        inputs: what to call a model of one's own with, as for `verify_plan`.
        name: what to call the model in the report.

    Raises:
        ValueError: the model cannot be run, so nothing can be learned of it.
    """
    return _Derivation(model_or_config, tp, inputs, name).result()


class _Derivation:
    """One search for a plan."""

    def __init__(self, target: Any, tp: int, inputs: Any, name: str | None) -> None:
        self.began = time.monotonic()
        self.target, self.tp, self.inputs, self.name = target, tp, inputs, name
        self.spec, subject = _spec_and_subject(target, inputs)
        try:
            found = samples(subject, tp)
        except Exception as error:  # the code of a model raises any kind
            raise ValueError(
                f"the model cannot be run, so no plan can be derived: {type(error).__name__}: {error}"
            ) from error
        self.grouped = [Groups(sample.learned, sample.spec, tp if at == 0 else 2) for at, sample in enumerate(found)]
        self.samples = [
            replace(sample, groups=chosen(groups)) for sample, groups in zip(found, self.grouped, strict=True)
        ]
        fields = [] if isinstance(subject, OwnModel) else [self.spec.fields]
        fields += [config_fields(sample.learned.step.model.config) for sample in found[1:]]
        self.names = Names(fields)
        self.counts: Counts = {}
        self.refused: list[tuple[Group, str]] = []

    # -- the search

    def result(self) -> Derived:
        """The plan that was found."""
        groups = list(self.samples[0].groups)
        if not self._is_sound(groups, self.counts):
            groups = self._each_alone(groups)
        plan_text = self._text(groups, self.counts)
        report = self._verified(plan_text)
        while not report.ok and groups:
            dropped = groups.pop()
            self.refused.append((dropped, _told(report)))
            report = self._verified(self._text(groups, self.counts))
        remaining = self._text(groups, self.counts, final=True)
        return Derived(
            text=remaining,
            plan=_loaded(remaining),
            report=report,
            refused=tuple(_named(group, why) for group, why in self.refused),
            seconds=time.monotonic() - self.began,
        )

    def _each_alone(self, groups: Sequence[Group]) -> list[Group]:
        """The groups that are sound, each tried alone, with numbers made local where it needs that."""
        sound = []
        for group in groups:
            counts = self._counts_for(group)
            if counts is None:
                continue
            sound.append(group)
            for pattern, attributes in counts.items():
                self.counts.setdefault(pattern, {}).update(attributes)
        return sound

    def _counts_for(self, group: Group) -> Counts | None:
        """The numbers that must be made local for the group to be sound; None where it is not, whatever is tried."""
        try:
            report = self._checked([group], {})
            first = report
            if report.ok:
                return {}
            own = candidates(self._with([group]), self.samples[1:], [group])
            for pattern, attributes in own.items():
                for some in choices(attributes):
                    report = self._checked([group], {pattern: some})
                    if report.ok:
                        return {pattern: some}
            if len(own) > 1 and self._checked([group], own).ok:
                return own
        except Unwritable as error:
            self.refused.append((group, str(error)))
            return None
        self.refused.append((group, _told(first)))
        return None

    def _with(self, groups: Sequence[Group]) -> Sample:
        return replace(self.samples[0], groups=groups)

    def _is_sound(self, groups: Sequence[Group], counts: Counts) -> bool:
        try:
            return self._checked(groups, counts).ok
        except Unwritable:
            return False

    def _checked(self, groups: Sequence[Group], counts: Counts) -> Report:
        """What following a step says, and where it proves nothing, numbers."""
        text = self._text(groups, counts)
        report = self._verified(text, "layouts")
        is_proven = report.levels["layouts"] == "passed"
        return self._verified(text) if report.ok and not is_proven else report

    def _verified(self, text: str, level: str = "numerics") -> Report:
        return verify_plan(
            self.target, _loaded(text), tp=self.tp, inputs=self.inputs, name=self.name, cost=None, level=level
        )

    # -- the plan

    def _text(self, groups: Sequence[Group], counts: Counts, final: bool = False) -> str:
        ruling = Ruling(self._with(groups), self.samples[1:], self.names, counts)
        lines = ruling.lines()
        sections: dict[str, Sequence[Line]] = {"tp_plan": lines}
        return written(self.spec.model_type, sections, self._remarks(groups) if final else ())

    def _remarks(self, groups: Sequence[Group]) -> list[str]:
        told = ["Derived by `parallel-plans derive`: from one traced step, how each dim meets others; verified."]
        return told


def _spec_and_subject(target: Any, inputs: Any) -> tuple[ModelSpec, Any]:
    """The model's spec, and what it is traced from: a config, or a model as it is."""
    if not isinstance(target, nn.Module):
        with torch.device("meta"):
            return describe(AutoModelForCausalLM.from_config(target)), target
    if inputs is None and isinstance(target, PreTrainedModel) and target.can_generate():
        return describe(target), config_of(target)
    return describe(target), OwnModel(model=target, inputs=inputs)


def _loaded(text: str) -> Plan:
    import yaml

    plan: Mapping[str, Any] = yaml.safe_load(text)
    return load_plan(plan)


def _told(report: Report) -> str:
    """The first thing that is wrong, in one line."""
    wrong: list[Finding] = [finding for finding in report.findings if finding.severity == "error"]
    if not wrong:
        return "nothing is known of it"
    return f"{wrong[0].message} ({wrong[0].code}, {wildcarded(wrong[0].name or '')})"


def _named(group: Group, why: str) -> str:
    return f"{', '.join(dict.fromkeys(map(wildcarded, group.cuts)))}: {why}"
