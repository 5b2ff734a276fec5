"""`verify_tp_plan` and `verify_plan`: exit status, JSON, levels, targets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from parallel_plans import Finding, verify_plan
from parallel_plans.cli.lacking import LACKING
from parallel_plans.cli.verify import app
from parallel_plans.lookup import bundled_folder
from parallel_plans.verify.report import LEVELS, Report
from parallel_plans.verify.trial import trial_views
from parallel_plans.views import Views, views_of

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "models"


class Pair(nn.Module):
    """A model of one's own."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(value).relu())


def ran(*arguments: str) -> tuple[int, dict]:
    result = CliRunner().invoke(app, [*arguments, "--json"])
    return result.exit_code, json.loads(result.stdout) if result.exit_code < 2 else {}


def test_a_sound_plan_gives_0_and_one_json_object() -> None:
    status, report = ran(str(CONFIGS / "llama-3.1-8b.json"), "--tp", "8")
    assert status == 0
    assert report["ok"] is True
    assert report["mesh"] == {"tp": 8, "ep": 1}
    assert report["plan"].endswith("plans/llama.yaml")
    assert report["levels"] == {
        "accounting": "passed", "geometry": "passed", "layouts": "passed", "numerics": "passed"
    }  # fmt: skip
    assert report["findings"] == []
    held = report["parameters"]
    assert held["total_bytes"] == 32_121_044_992
    assert len(held["per_rank_bytes"]) == 8
    assert sum(held["per_rank_bytes"]) == pytest.approx(held["total_bytes"], rel=0.001)
    assert {each["op"] for each in report["communication"]["forward"]} == {"all_reduce", "all_gather"}


def test_a_wrong_plan_gives_1_and_findings_with_file_and_line(tmp_path: Path) -> None:
    text = (bundled_folder() / "llama.yaml").read_text(encoding="utf-8")
    path = tmp_path / "wrong.yaml"
    rule = "model.layers.*.mlp: all_reduce"
    path.write_text(text.replace("  model.norm:", f"  {rule}\n  model.norm:", 1), encoding="utf-8")
    status, report = ran("llama", "--plan", str(path), "--set", "num_key_value_heads=8")
    assert status == 1
    assert report["ok"] is False
    assert report["levels"]["numerics"] == "failed"
    finding, seen = report["findings"]
    assert (seen["code"], seen["level"], seen["name"]) == ("PP301", "layouts", "model.layers.0.mlp")
    found = (finding["code"], finding["rule"], finding["name"])
    assert found == ("PP401", "model.layers.*.mlp", "model.layers.0.mlp")
    assert (finding["level"], finding["severity"]) == ("numerics", "error")
    assert path.read_text(encoding="utf-8").splitlines()[finding["line"] - 1] == f"  {rule}"


def test_a_plan_that_does_not_fit_stops_at_its_level(tmp_path: Path) -> None:
    status, report = ran("llama", "--tp", "64", "--set", "num_key_value_heads=2", "--set", "num_attention_heads=32")
    assert status == 1
    assert report["levels"] == {
        "accounting": "passed", "geometry": "failed", "layouts": "not run", "numerics": "not run"
    }  # fmt: skip
    assert {finding["code"] for finding in report["findings"]} == {"PP202", "PP203"}
    path = tmp_path / "plan.yaml"
    path.write_text("version: 1\ntp_plan:\n  model.norm: replicate\n", encoding="utf-8")
    status, report = ran("llama", "--plan", str(path))
    assert (status, report["levels"]["accounting"]) == (1, "failed")


@pytest.mark.parametrize(
    "arguments",
    [("no_such_model",), ("llama", "--set", "nonsense"), ("llama", "--set", "no_such_field=1"),
     ("llama", "--tp", "4", "--ep", "3"), ("no_module:factory",), ("llama", "--level", "wishes")],
)  # fmt: skip
def test_a_question_that_cannot_be_asked_gives_2(arguments: tuple[str, ...]) -> None:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 2
    assert result.stdout == ""


def test_people_are_told_levels_bytes_and_collectives() -> None:
    result = CliRunner().invoke(app, [str(CONFIGS / "mixtral-8x7b.json"), "--tp", "4", "--ep", "2", "--etp", "2"])
    assert result.exit_code == 0
    for words in (
        "accounting  passed",
        "numerics    passed",
        "whole model 186,811,170,816 bytes",
        "all_reduce",
        "sound",
    ):
        assert words in result.stdout, result.stdout


def test_a_model_of_ones_own_without_inputs_is_looked_at_up_to_its_shapes() -> None:
    report = verify_plan(Pair(), {"tp_plan": {"up": "colwise", "down": "rowwise"}}, tp=2)
    assert report.ok
    assert report.levels == {"accounting": "passed", "geometry": "passed", "layouts": "not run", "numerics": "not run"}
    assert [finding.code for finding in report.findings] == ["PP407"]
    assert not verify_plan(Pair(), {"tp_plan": {"up": "colwise"}}, tp=2).ok


def test_level_is_the_last_that_runs() -> None:
    config = str(CONFIGS / "llama-3.1-8b.json")
    assert ran(config, "--level", "geometry")[1]["levels"]["numerics"] == "not run"
    with pytest.raises(ValueError, match="level is 'wishes'"):
        verify_plan(Pair(), {"tp_plan": {"**": "replicate"}}, tp=2, level="wishes")


def test_a_warning_is_unsound_only_where_one_is_strict() -> None:
    warning = Finding(code="PP407", severity="warning", message="could not be run", level="numerics")
    for strict in (False, True):
        report = Report(target="x", plan="y", mesh={"tp": 2}, strict=strict)
        report.settle("numerics", [warning])
        assert report.ok is not strict
        assert report.levels["numerics"] == "passed"
    assert list(Report(target="x", plan="y", mesh={}).levels) == list(LEVELS)


def test_the_ranks_of_a_trial_do_what_the_ranks_asked_for_do() -> None:
    for sizes in (
        {"tp": 8},
        {"tp": 8, "ep": 8},
        {"tp": 8, "ep": 4, "etp": 2},
        {"tp": 1, "ep": 16},
        {"tp": 8, "ep": 64},
    ):
        asked, trial = views_of(sizes), trial_views(views_of(sizes))
        assert trial.world <= 4
        assert (asked.tp > 1, asked.ep > 1, asked.etp > 1) == (trial.tp > 1, trial.ep > 1, trial.etp > 1)
        assert asked.shares_batch == trial.shares_batch
    assert trial_views(Views(world=8, tp=4, ep=4, etp=2)).sizes["etp"] == 2


def test_a_model_that_keeps_a_part_of_its_config_is_judged_to_the_end() -> None:
    status, report = ran("emu3", "--plan", "builtin", "--no-cost", "--set", "tie_word_embeddings=false")
    assert status == 0
    assert report["levels"] == dict.fromkeys(LEVELS, "passed")
    assert [finding["code"] for finding in report["findings"]] == ["PP117"]


@pytest.mark.parametrize("model_type", sorted(LACKING))
def test_a_type_whose_default_config_makes_no_model_that_runs_can_be_asked_about(model_type: str) -> None:
    status, report = ran(model_type, "--level", "geometry", "--no-cost")
    assert status in (0, 1)
    assert report["levels"]["accounting"] == "passed"
