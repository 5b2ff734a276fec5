"""Styles of one's own: registered by hand, or by an installed package through an entry point."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from parallel_plans import PlanError, Style, load_plan, register_style
from parallel_plans.model_spec import describe
from parallel_plans.resolve import resolve
from parallel_plans.styles import base, get_style, style_names, styles
from parallel_plans.table import Table

THIRDS = Style(
    name="by_thirds",
    summary="a layer split in whole thirds",
    matrix=0,
    vector=0,
    needs="R",
    leaves="S(-1)",
    options={"unit": "units", "parts": "parts"},
    defaults={"parts": 3},
)


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> dict[str, Style]:
    """The registry, put back afterwards."""
    get_style("colwise")
    own = dict(base._styles)
    monkeypatch.setattr(base, "_styles", own)
    return own


def table(plan: dict[str, object]) -> Table:
    return resolve(load_plan(plan), describe(nn.Sequential(nn.Linear(4, 12), nn.ReLU())), {"tp": 2})


@pytest.mark.usefixtures("registry")
def test_a_plan_may_use_a_row_of_ones_own() -> None:
    assert register_style(THIRDS, "thirds") is THIRDS
    for name in ("by_thirds", "thirds"):
        entries = table({"0": name}).parameters
        assert entries["0.weight"].layout.region({"tp": 1}) == (((2, 4), (6, 8), (10, 12)), ((0, 4),))
        assert entries["0.bias"].layout.local_shape({"tp": 0}) == (6,)
        (acting,) = table({"0": name}).modules["0"]
        assert acting.style is THIRDS
    assert {"by_thirds", "thirds"} <= set(style_names())
    assert (THIRDS, ("thirds",)) in list(styles())


@pytest.mark.usefixtures("registry")
def test_options_of_ones_own_row_are_checked_like_all_others() -> None:
    register_style(THIRDS)
    assert table({"0": {"style": "by_thirds", "unit": 2}}).parameters
    for option, code in ({"dim": 1}, "PP014"), ({"unit": "no thing"}, "PP017"), ({"unit": 3}, "PP201"):
        with pytest.raises(PlanError) as caught:
            table({"0": {"style": "by_thirds", **option}})  # type: ignore[dict-item]
        assert {finding.code for finding in caught.value.findings} == {code}


class Stack(nn.Module):
    """Four experts in one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(4, 6, 2))


DEALS_EXPERTS = Style(
    name="deal_in_pairs",
    summary="experts dealt over the ranks two by two",
    matrix=0,
    vector=0,
    options={"unit": "units"},
    parameter_only=True,
    sections=("ep_plan",),
    role="weight",
)


@pytest.mark.usefixtures("registry")
def test_a_row_of_ones_own_may_deal_experts() -> None:
    register_style(DEALS_EXPERTS)
    plan = {
        "tp_plan": {"**": "replicate"},
        "ep_plan": {"0.weight": "deal_in_pairs", "0": "moe_experts_allreduce"},
    }
    dealt = resolve(load_plan(plan), describe(nn.Sequential(Stack())), {"tp": 2, "ep": 2})
    assert str(dealt.parameters["0.weight"].layout) == "[4@ep, 6, 2]"
    (acting,) = dealt.modules["0"]
    assert acting.split is not None
    assert acting.split.local_sizes == (2, 2)


@pytest.mark.usefixtures("registry")
def test_a_row_of_ones_own_stands_in_its_sections_only() -> None:
    register_style(DEALS_EXPERTS)
    register_style(THIRDS)
    for section, style in (("tp_plan", "deal_in_pairs"), ("ep_plan", "by_thirds")):
        plan = {"tp_plan": {"**": "replicate"}, section: {"0.weight": style, "**": "replicate"}}
        with pytest.raises(PlanError) as caught:
            resolve(load_plan(plan), describe(nn.Sequential(Stack())), {"tp": 2})
        assert [finding.code for finding in caught.value.findings] == ["PP105"]
        assert f"{style} cannot stand in {section}" in str(caught.value)


def test_a_style_that_nobody_registered_is_unknown() -> None:
    with pytest.raises(PlanError) as caught:
        table({"0": "by_thirds"})
    assert [finding.code for finding in caught.value.findings] == ["PP013"]


@pytest.mark.usefixtures("registry")
def test_a_name_is_taken_only_once() -> None:
    register_style(THIRDS)
    register_style(THIRDS)  # the very same row again is no conflict
    for name in ("by_thirds", "colwise", "colwise_rep"):
        with pytest.raises(ValueError, match=f"a style named '{name}' is already registered"):
            register_style(Style(name=name, summary="another"))
    assert get_style("colwise").matrix == -2


def test_a_style_with_a_taken_alias_is_not_registered_at_all(registry: dict[str, Style]) -> None:
    before = dict(registry)
    with pytest.raises(ValueError, match="a style named 'rowwise' is already registered"):
        register_style(Style(name="fresh", summary="with an alias that is taken"), "rowwise")
    assert registry == before


@pytest.mark.parametrize("letter", ["V", "", "i", "S", "S()", "S(x)", "S(1", "S(1) ", "PI", "S(--1)"])
@pytest.mark.parametrize("place", ["arrives", "needs", "leaves", "delivers", "whole_as"])
def test_what_is_no_letter_is_refused(place: str, letter: str) -> None:
    with pytest.raises(ValueError, match="is no letter; use I, R, P or S"):
        Style(name="own", summary="", **{place: letter})


@pytest.mark.parametrize("letter", ["I", "R", "P", "S(0)", "S(-1)", "S(12)"])
def test_what_is_no_letter_is_refused_ok(letter: str) -> None:
    assert Style(name="own", summary="", arrives=letter, needs=letter).acts_on_forward is False


THEIRS = """
from parallel_plans import Style

halves = Style(name="their_halves", summary="rows in halves", matrix=0, vector=0, options={"unit": "units"})
not_a_style = "their_halves"
"""
USE = """
from torch import nn
from parallel_plans import load_plan
from parallel_plans.model_spec import describe
from parallel_plans.resolve import resolve

plan = load_plan({"0": {"style": "their_halves", "unit": 3}})
table = resolve(plan, describe(nn.Sequential(nn.Linear(4, 12))), {"tp": 2})
print(table.parameters["0.weight"].layout, table.parameters["0.weight"].layout.local_shape({"tp": 1}))
"""


def installed(folder: Path, target: str) -> subprocess.CompletedProcess[str]:
    """A process that finds a package in `folder` whose entry point is `target`, and uses its style in a plan."""
    (folder / "their_styles.py").write_text(THEIRS, encoding="utf-8")
    info = folder / "their_styles-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-styles\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text(f"[{base.ENTRY_POINTS}]\ntheirs = {target}\n", encoding="utf-8")
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, "-c", USE],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_an_installed_package_adds_its_row_by_an_entry_point(tmp_path: Path) -> None:
    done = installed(tmp_path, "their_styles:halves")
    assert done.stdout == "[12@tp, 4] (6, 4)\n", done.stderr


def test_an_entry_point_that_is_no_style_is_said_so(tmp_path: Path) -> None:
    done = installed(tmp_path, "their_styles:not_a_style")
    assert done.returncode == 1
    assert "TypeError: entry point theirs of group parallel_plans.styles is a str, not a Style" in done.stderr
