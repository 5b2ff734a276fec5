"""Models of one's own are tried as they are: with inputs, from a module or a factory, on meta too."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from parallel_plans import verify_plan
from parallel_plans.cli.verify import app
from parallel_plans.verify import own
from parallel_plans.verify.report import Report

PAIR = {"up": "colwise", "down": "rowwise"}


class Pair(nn.Module):
    """Two layers whose width is split."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        nn.init.zeros_(self.down.bias)
        self.register_buffer("scale", torch.full((width,), 0.5), persistent=False)

    def forward(self, value: Tensor, times: float = 1.0) -> dict[str, Any]:
        return {"given": self.down(self.up(value).relu()) * self.scale * times, "count": value.shape[0]}


def with_inputs(width: int = 8) -> tuple[nn.Module, tuple[Tensor, ...]]:
    return Pair(width), (torch.randn(3, width),)


def with_keywords() -> tuple[nn.Module, dict[str, Any]]:
    return Pair(), {"value": torch.randn(3, 8), "times": 2.0}


def without_inputs() -> nn.Module:
    return Pair()


def tried(plan: dict[str, Any], model: nn.Module | None = None, inputs: Any = None) -> Report:
    given = (torch.randn(3, 8),) if inputs is None else inputs
    return verify_plan(model or Pair(), {"tp_plan": plan}, tp=2, inputs=given)


def test_a_right_plan_passes() -> None:
    report = tried(PAIR)
    assert report.ok, report.findings
    assert report.levels["numerics"] == "passed"
    assert tried(PAIR, inputs={"value": torch.randn(3, 8), "times": 3.0}).levels["numerics"] == "passed"


@pytest.mark.parametrize(
    ("plan", "code", "rule"),
    [
        ({"up": "colwise", "down": "replicate"}, "PP405", "down"),
        ({"up": "replicate", "down": "rowwise"}, "PP405", "up"),
        ({"up": "colwise", "down": "rowwise_split_input"}, "PP405", "down"),
        ({"up": "colwise_gather_output", "down": "rowwise"}, "PP405", "up"),
        ({"up": "replicate", "down": "replicated_with_grad_allreduce"}, "PP402", "down"),
    ],
)
def test_a_wrong_plan_is_refused_by_name(plan: dict[str, str], code: str, rule: str) -> None:
    report = tried(plan)
    assert report.levels["numerics"] == "failed"
    first = next(finding for finding in report.findings if finding.level == "numerics")
    assert (first.code, first.rule) == (code, rule), first


def test_a_bias_of_zeros_hides_nothing() -> None:
    model = Pair()
    wrong = {"up": "colwise", "down.weight": "rowwise", "down.bias": "replicate", "down": "all_reduce"}
    (finding,) = (each for each in tried(wrong, model).findings if each.level == "numerics")
    assert finding.code == "PP401"
    assert "is off by the same row everywhere" in finding.message
    assert not model.down.bias.any(), "the model given is left as it is"


def test_a_model_on_meta_is_drawn() -> None:
    with torch.device("meta"):
        model = Pair()
    assert tried(PAIR, model).levels["numerics"] == "passed"
    assert model.up.weight.is_meta


def test_what_cannot_be_run_is_a_warning_that_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def reason(report: Report) -> str:
        assert report.ok
        assert report.levels["numerics"] == "not run"
        (finding,) = report.findings
        assert (finding.code, finding.severity) == ("PP407", "warning")
        return finding.message

    assert "nobody says what to call the model with" in reason(verify_plan(Pair(), {"tp_plan": PAIR}, tp=2))
    assert "does not run by itself" in reason(tried(PAIR, inputs=(torch.randn(3, 7),)))
    with torch.device("meta"):
        counting = Pair()
        counting.register_buffer("count", torch.zeros(2, dtype=torch.long))
    assert "count is on `meta`" in reason(tried(PAIR, counting))
    monkeypatch.setattr(own, "MOST_PARAMETERS", 500)
    assert "has 552 parameters and is run as it is" in reason(tried(PAIR))


def test_dummy_inputs_are_taken_where_there_are_no_others() -> None:
    model = Pair()
    model.dummy_inputs = {"value": torch.randn(2, 8)}  # type: ignore[assignment]
    assert verify_plan(model, {"tp_plan": PAIR}, tp=2).levels["numerics"] == "passed"


@pytest.mark.parametrize("factory", ["with_inputs", "with_keywords", "without_inputs"])
def test_a_factory_gives_a_model_or_a_pair(factory: str, tmp_path: Any) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text("version: 1\ntp_plan:\n  up: colwise\n  down: rowwise\n", encoding="utf-8")
    result = CliRunner().invoke(app, [f"{__name__}:{factory}", "--plan", str(plan), "--json"])
    assert result.exit_code == 0, result.stdout
    expected = "not run" if factory == "without_inputs" else "passed"
    assert json.loads(result.stdout)["levels"]["numerics"] == expected
