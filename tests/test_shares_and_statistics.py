"""What plans may not say of statistics over ranks and of shares of a sum, and the sizes of towers in expressions."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from transformers import CONFIG_MAPPING

sys.path.insert(0, str(Path(__file__).parent / "distributed"))

from toys import Only, Sparse, Weighed

from parallel_plans import PlanError, load_plan
from parallel_plans.model_spec import config_fields, describe
from parallel_plans.resolve import resolve


def refusals(model: nn.Module, plan: dict[str, Any]) -> list[str]:
    """The codes of what is wrong with the plan on 2 ranks."""
    try:
        resolve(load_plan({"version": 1, "tp_plan": plan}), describe(model), {"tp": 2})
    except PlanError as error:
        return [finding.code for finding in error.findings]
    return []


def statistics(of: dict[str, Any], up: str = "colwise") -> dict[str, Any]:
    down = "rowwise" if up == "colwise" else "replicate"
    return {"layer": {"style": "sharded_statistics", **of}, "layer.up": up, "layer.down": down}


def test_statistics_are_of_a_layer_that_gives_parts() -> None:
    assert refusals(Only(Sparse()), statistics({"of": "up"})) == []


@pytest.mark.parametrize(
    ("of", "up"),
    [({}, "colwise"), ({"of": "gate"}, "colwise"), ({"of": "down"}, "colwise"), ({"of": "up"}, "replicate")],
)
def test_statistics_of_nothing_in_parts_are_refused(of: dict[str, Any], up: str) -> None:
    assert "PP105" in refusals(Only(Sparse()), statistics(of, up))


@pytest.mark.parametrize("unit", [1, 2, 3, 4])
def test_outputs_are_shared_out_as_the_inputs_are(unit: int) -> None:
    plan = {
        "values": {"style": "colwise", "unit": unit},
        "weights": {"style": "rowwise_scatter_output", "unit": unit},
        "weights.bias": "colwise",
        "out": {"style": "rowwise", "unit": unit},
    }
    fits = unit == 4  # 12 inputs, 3 outputs: any other share of the inputs would cut an output
    assert refusals(Weighed(), plan) == ([] if fits else ["PP201"])


def test_a_plan_may_size_a_tower_by_the_towers_own_config() -> None:
    fields = config_fields(CONFIG_MAPPING["gemma3"](vision_config={"hidden_size": 48, "num_attention_heads": 6}))
    assert (fields["vision_config.hidden_size"], fields["vision_config.head_dim"]) == (48, 8)
