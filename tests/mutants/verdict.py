"""What is said of a plan without ranks: by `verify_plan`, and by transformers' own `verify_tp_plan`."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.distributed import tensor_parallel

from mutants.mutant import Mutant
from mutants.text import PlanText
from mutants.truth import Row
from parallel_plans import verify_plan
from parallel_plans.errors import Finding, ParallelPlansError
from parallel_plans.loader import load_plan
from parallel_plans.lookup import with_sequence
from parallel_plans.matching import Pattern
from parallel_plans.mesh import views_for
from parallel_plans.model_spec import ModelSpec, describe
from parallel_plans.resolve import resolve


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What `verify_plan` says.

    Args:
        refused: whether the plan is called wrong.
        level: the first level with an error among its findings; empty where it passes.
        codes: the findings' codes.
        named: whether a finding names a rule that the mutant touches, or its module.
        first: whether the first finding does.
        block: whether a finding names that, or something beside it in the same block (attention, MLP, experts).
        said: the first finding, on one line.
    """

    refused: bool
    level: str = ""
    codes: tuple[str, ...] = ()
    named: bool = False
    first: bool = False
    block: bool = False
    said: str = ""


def spec_of(config: Any) -> ModelSpec:
    """The model of a config as a plan sees it."""
    with torch.device("meta"):
        return describe(AutoModelForCausalLM.from_config(config))


def verdict_on(mutant: Mutant, config: Any, row: Row, path: str) -> Verdict:
    """What `verify_plan` says of a mutant, which lies at `path`."""
    told = "dispatch" if row.dispatch else "auto"
    try:
        report = verify_plan(config, path, tp=row.tp, ep=row.ep, etp=row.etp, ep_plan=told, sp=row.sp, cost=None)
    except ParallelPlansError as error:
        findings, refused = list(error.findings), True
    else:
        findings, refused = [each for each in report.findings if each.severity == "error"], not report.ok
    if not refused:
        return Verdict(refused=False)
    about = [names(finding, mutant) for finding in findings]
    return Verdict(
        refused=True,
        level=findings[0].level,
        codes=tuple(dict.fromkeys(finding.code for finding in findings)),
        named=any(about),
        first=about[0],
        block=any(about) or any(is_in_block(finding, mutant) for finding in findings),
        said=f"{findings[0].message} [{findings[0].code}] rule={findings[0].rule} name={findings[0].name}",
    )


def names(finding: Finding, mutant: Mutant) -> bool:
    """Whether a finding is about a rule that the mutant touches, or about what such a rule is on."""
    if finding.rule in mutant.patterns or (finding.line is not None and finding.line in mutant.lines):
        return True
    name = finding.name
    return name is not None and any(_is_on(pattern, name) for pattern in mutant.patterns if pattern != "**")


def _is_on(pattern: str, name: str) -> bool:
    """Whether `name` is what a pattern names, a parameter of it, or the module of it where it names a parameter."""
    form = Pattern.of(pattern)
    return form.matches(name) or form.matches(name.rpartition(".")[0]) or _is_owner(pattern, name)


def _is_owner(pattern: str, name: str) -> bool:
    owner, _, last = pattern.rpartition(".")
    return last in ("weight", "bias") and Pattern.of(owner).matches(name)


def is_in_block(finding: Finding, mutant: Mutant) -> bool:
    """Whether a finding is about what lies in the same block as something that the mutant touches."""
    return any(
        Pattern.of(block).matches(prefix) or block == prefix
        for block in map(_block, mutant.patterns)
        for told in (finding.rule, finding.name)
        for prefix in _prefixes(told)
        if block and not block.endswith("*")
    )


def _block(pattern: str) -> str:
    owner, _, last = pattern.rpartition(".")
    return owner.rpartition(".")[0] if last in ("weight", "bias") else owner


def _prefixes(name: str | None) -> Iterator[str]:
    while name:
        yield name
        name = name.rpartition(".")[0]


def is_loadable(path: str, spec: ModelSpec, row: Row) -> bool:
    """Whether ranks would load a plan at all: what raises here is refused before any weight is read."""
    try:
        plan = with_sequence(load_plan(path), "auto" if row.sp else None)
        resolve(plan, spec, views_for(row.tp, row.ep, row.etp).sizes, dispatch=row.dispatch)
    except ParallelPlansError:
        return False
    return True


class Theirs:
    """transformers' `verify_tp_plan`, a matcher of names that logs warnings.

    It warns about every plan, since whatever stays whole is not in one. So what counts is whether it warns otherwise
    than about the plan that is right.
    """

    def __init__(self, spec: ModelSpec, text: str, row: Row) -> None:
        self.keys, self.row = list(spec.parameters), row
        self.right = self._plan(text)
        self.usual = self._warnings(self.right)

    def refuses(self, mutant: Mutant) -> bool | None:
        """Whether it warns of a mutant; None where a plan of theirs, names and styles alone, cannot say the change.

        A sequence is no part of theirs.
        """
        plan = self._plan(mutant.text)
        return None if plan == self.right or self.row.sp else self._warnings(plan) != self.usual

    def _plan(self, text: str) -> dict[str, str]:
        """What a plan of theirs can say of ours: what it does not name stays whole."""
        sections = {"tp_plan", self.row.section}
        rules = [rule for rule in PlanText(text).rules if rule.section in sections and "**" not in rule.pattern]
        return {rule.pattern: rule.style for rule in rules}

    def _warnings(self, plan: dict[str, str]) -> set[str]:
        heard: list[str] = []
        with _listening(heard):
            tensor_parallel.verify_tp_plan(self.keys, plan)
        return {_names_in_order(message) for message in heard}


class _Handler(logging.Handler):
    def __init__(self, heard: list[str]) -> None:
        super().__init__()
        self.heard = heard

    def emit(self, record: logging.LogRecord) -> None:
        self.heard.append(record.getMessage())


@contextmanager
def _listening(heard: list[str]) -> Iterator[None]:
    logger: Any = tensor_parallel.logger
    handler, level, propagates, others = _Handler(heard), logger.level, logger.propagate, logger.handlers
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.handlers, logger.propagate = others, propagates
        logger.setLevel(level)


def _names_in_order(message: str) -> str:
    """A warning with what it lists in alphabetical order: it lists a set."""
    head, _, listed = message.partition(": ")
    return f"{head}: {', '.join(sorted(listed.split(', ')))}"
