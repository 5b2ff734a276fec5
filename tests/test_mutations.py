"""The laws of the mutants, and a slice of them held against real ranks; `benchmarks/mutations.py` runs them all."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from mutants import mutants_of
from mutants.mutant import Mutant
from mutants.pool import Pool
from mutants.sequences import KINDS
from mutants.sequences import LIBERTIES as SEQUENCE_LIBERTIES
from mutants.text import PlanText
from mutants.trial import Bench, Trial
from mutants.truth import ROWS
from mutants.verdict import is_loadable, spec_of
from tiny import DENSE_TYPES, MOE_TYPES, tiny_config

from parallel_plans.loader import load_plan
from parallel_plans.lookup import bundled_folder
from parallel_plans.styles import get_style, style_names

MISTAKES = {
    "drop",
    "forgotten of a pair",
    "forgotten q/k norm",
    "forgotten router",
    "misspelt name",
    "misspelt style",
    "packed as plain",
    "reduction",
    "stale prefix",
    "swapped style",
    "wrong dim",
    "wrong level",
    "wrong option",
    "wrong section",
}
TYPES = ("llama", "phi3", "longcat_flash")
LIBERTIES = {
    "alias",
    "catch-all",
    "default spelt out",
    "equivalent pair",
    "first layer whole",
    "larger units",
    "named parameters",
    "other order",
    "other split",
    "whole block",
}
SLICE = (("llama", "tp2", 1), ("mixtral", "tp2-ep2", 1))  # type, row, mutants of each kind


def text_of(model_type: str) -> str:
    return (bundled_folder() / f"{model_type}.yaml").read_text()


@cache
def mutants(model_type: str) -> tuple[Mutant, ...]:
    """Every mutant of a bundled plan, of all its sections."""
    text, spec = text_of(model_type), spec_of(tiny_config(model_type, tied=False))
    return tuple(mutant for section in PlanText(text).ends for mutant in mutants_of(text, spec, section))


@pytest.mark.parametrize("model_type", [*DENSE_TYPES, *MOE_TYPES])
def test_the_text_of_a_plan_knows_every_rule_with_its_line(model_type: str) -> None:
    plan = load_plan(bundled_folder() / f"{model_type}.yaml")
    known = [(rule.section, rule.pattern, rule.style, rule.start + 1) for rule in PlanText(text_of(model_type)).rules]
    read = [(section, rule.pattern, rule.style, rule.line) for section in plan.sections for rule in plan.rules(section)]
    assert known == read


@pytest.mark.parametrize("model_type", TYPES)
def test_a_mutant_differs_from_the_plan_in_what_it_says_it_touches(model_type: str) -> None:
    def rules(text: str) -> dict[tuple[str, str], Any]:  # options by their words: True equals 1
        return {(rule.section, rule.pattern): (rule.style, repr(rule.options)) for rule in PlanText(text).rules}

    before = rules(text_of(model_type))
    for mutant in mutants(model_type):
        after = rules(mutant.text)
        changed = {key[1] for key in {*before, *after} if before.get(key) != after.get(key)}
        assert changed - {"**"} <= set(mutant.patterns), mutant.what
        assert changed or mutant.kind == "other order", mutant.what


@pytest.mark.parametrize("model_type", TYPES)
def test_a_mutant_knows_the_lines_of_what_it_touches(model_type: str) -> None:
    for mutant in mutants(model_type):
        lines = mutant.text.splitlines()
        for line in mutant.lines:
            name = lines[line - 1].strip().strip('"')
            assert any(name.startswith(pattern) for pattern in mutant.patterns), mutant.what


def test_every_kind_of_mistake_and_of_liberty_occurs() -> None:
    every = [*mutants("qwen3"), *mutants("mixtral"), *mutants("phi3")]
    assert {mutant.kind for mutant in every if not mutant.sound} == MISTAKES | KINDS
    assert {mutant.kind for mutant in every if mutant.sound} == LIBERTIES | SEQUENCE_LIBERTIES


def test_no_two_mutants_are_alike() -> None:
    for model_type in ("llama", "gpt_oss"):
        texts = [(mutant.section, mutant.text) for mutant in mutants(model_type)]
        assert len(set(texts)) == len(texts)


def test_every_style_of_the_registry_stands_in_for_another() -> None:
    every = [mutant for kind in ("llama", "mixtral") for mutant in mutants(kind)]
    written = {rule.style for mutant in every for rule in PlanText(mutant.text).rules if rule.style in style_names()}
    assert {get_style(name).name for name in written} == {get_style(name).name for name in style_names()}


@pytest.mark.parametrize("model_type", [*TYPES, "qwen3_moe", "jetmoe"])
def test_what_is_meant_to_be_right_loads(model_type: str, tmp_path: Path) -> None:
    spec = spec_of(tiny_config(model_type, tied=False))
    rows = {"tp_plan": "tp2", "ep_plan": "tp2-ep2", "dispatch_plan": "tp1-ep2", "sp_plan": "tp2-sp"}
    path = tmp_path / "plan.yaml"
    for mutant in mutants(model_type):
        if mutant.sound:
            path.write_text(mutant.text)
            assert is_loadable(str(path), spec, ROWS[rows[mutant.section]]), mutant.what


def drawn(every: list[Mutant], of_each: int) -> list[Mutant]:
    """Some mutants of each kind."""
    kinds: dict[str, list[Mutant]] = {}
    for mutant in every:
        kinds.setdefault(mutant.kind, []).append(mutant)
    draw = random.Random(0)
    return [mutant for each in kinds.values() for mutant in draw.sample(each, min(of_each, len(each)))]


@pytest.fixture(scope="module")
def trials() -> list[Trial]:
    """Truth and verdict on the slice."""
    found: list[Trial] = []
    with Pool(2) as pool:
        for model_type, row, of_each in SLICE:
            with Bench(model_type) as bench:
                some = drawn(list(bench.mutants(ROWS[row])), of_each)
                found += bench.trials(some, ROWS[row], pool, {})
    return found


def _told(trials: list[Trial]) -> str:
    return "\n".join(f"{each.mutant.what}: {each.outcome} {each.verdict.said}" for each in trials)


def by_result(trials: list[Trial], result: str) -> list[Trial]:
    return [trial for trial in trials if trial.result == result]


def test_a_plan_that_real_ranks_get_wrong_is_refused(trials: list[Trial]) -> None:
    assert not by_result(trials, "missed"), _told(by_result(trials, "missed"))
    assert len(by_result(trials, "caught")) >= 5


def test_a_plan_that_real_ranks_get_right_passes(trials: list[Trial]) -> None:
    assert not by_result(trials, "false alarm"), _told(by_result(trials, "false alarm"))
    assert len(by_result(trials, "passed")) >= 10


def test_what_does_not_load_is_refused_by_the_verifier_too(trials: list[Trial]) -> None:
    refused = by_result(trials, "refused")
    assert refused
    assert all(trial.verdict.refused for trial in refused)


def test_a_refusal_names_what_was_changed(trials: list[Trial]) -> None:
    refused = [trial for trial in trials if trial.result in ("refused", "caught")]
    assert all(trial.verdict.block for trial in refused), _told([each for each in refused if not each.verdict.block])


def _job(what: str) -> str:
    import os
    import time

    import torch.distributed as dist

    if what == "die" and dist.get_rank() == 1:
        os._exit(1)
    if what == "raise" and dist.get_rank() == 1:
        raise ValueError("on one rank alone")
    if what == "sleep":
        time.sleep(60)
    dist.barrier()
    return what


def test_ranks_that_hang_die_or_raise_are_told_of_and_others_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    job: Callable[[str], str] = _job
    with Pool(2) as pool:
        kinds = [kind for kind, _ in pool.run(job, "raise")]
        assert kinds == ["raised", "raised"]
        assert pool.run(job, "well") == [("returned", "well")] * 2
        assert ("hung", None) in pool.run(job, "die")
        assert pool.run(job, "well") == [("returned", "well")] * 2
        monkeypatch.setattr("mutants.pool.JOB_SECONDS", 2)
        assert pool.run(job, "sleep") == [("hung", None)] * 2
