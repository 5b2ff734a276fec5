"""Where `from_pretrained` takes the rules for experts from: the plan, a mapping, a file, or the model's class."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from expert_runs import EP4, TP2_DISPATCH, TP2_EP2, TP4_EP2_ETP2, Starts, plan_of
from ranks import outcomes, run_on_ranks
from rows import BATCHES, Row, batch_of, check_row, loaded
from tiny import _SIZES, Truth, randomized, truth_of
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from parallel_plans import from_pretrained, parallel_of

Mixtures = Callable[..., tuple[Path, list[Truth]]]
EXPERTS = "model.layers.*.mlp.experts"
WEIGHTS = {f"{EXPERTS}.gate_up_proj": "grouped_gemm", f"{EXPERTS}.down_proj": "grouped_gemm"}


def checked(folder: str, target: str, row: Row, truths: list[Truth], arguments: dict[str, Any]) -> set[tuple[str, ...]]:
    """What acts on the modules of a model that is right on this row: section, style, options that a rule gives."""
    check_row(folder, target, row, truths, arguments)
    parallel = parallel_of(loaded(folder, row, **arguments))
    assert parallel is not None
    acting = [entry for name, entry in parallel.table.acting() if ".mlp" in name]
    return {(entry.rule.section, entry.rule.style, *map(str, entry.rule.options.items())) for entry in acting}


def check(mixtures: Mixtures, target: Path, row: Row, **arguments: Any) -> set[tuple[str, ...]]:
    folder, truths = mixtures("mixtral", experts_implementation="eager")
    arguments = {"experts_implementation": "eager", **arguments}
    found = run_on_ranks(checked, row.world, str(folder), str(target), row, truths[: row.batches], arguments)
    assert all(each == found[0] for each in found)
    return found[0]  # type: ignore[no-any-return]


def test_rules_for_experts_may_be_a_mapping(mixtures: Mixtures, tmp_path: Path) -> None:
    rules = {**WEIGHTS, EXPERTS: "moe_experts_allreduce"}  # no rule for the router: the experts mask
    assert check(mixtures, tmp_path, TP2_EP2, ep_plan=rules) == {("ep_plan", "moe_experts_allreduce")}


def test_rules_for_experts_may_be_a_mapping_of_sections(mixtures: Mixtures, tmp_path: Path) -> None:
    sections = {"dispatch_plan": {**WEIGHTS, EXPERTS: {"style": "ep_dispatch", "align_size": 4}}}
    found = check(mixtures, tmp_path, EP4, ep_plan=sections)
    assert found == {("dispatch_plan", "ep_dispatch", "('align_size', 4)")}


def test_rules_for_experts_may_be_a_file(mixtures: Mixtures, tmp_path: Path) -> None:
    path = tmp_path / "experts.yaml"
    sections = {"version": 1, "ep_plan": {**WEIGHTS, "model.layers.*.mlp.gate": "ep_router", EXPERTS: "moe_tp_experts"}}
    path.write_text(yaml.safe_dump(sections), encoding="utf-8")
    (target := tmp_path / "saved").mkdir()
    found = check(mixtures, target, TP2_EP2, ep_plan=str(path))
    assert found == {("ep_plan", "ep_router"), ("ep_plan", "moe_tp_experts")}


def test_tokens_travel_on_demand(mixtures: Mixtures, tmp_path: Path) -> None:
    assert check(mixtures, tmp_path, TP2_DISPATCH) == {("dispatch_plan", "ep_dispatch")}


def test_experts_are_dealt_over_all_ranks_where_only_the_plan_is_given(mixtures: Mixtures) -> None:
    folder, _ = mixtures("mixtral", experts_implementation="eager")
    assert run_on_ranks(sizes_of, 2, str(folder)) == [{"tp": 2, "ep": 2, "etp": 1, "ep_etp": 2}] * 2


def sizes_of(folder: str) -> dict[str, int]:
    parallel = parallel_of(from_pretrained(folder, ep_plan="auto"))
    assert parallel is not None
    return dict(parallel.place.sizes)


def refused(folder: str, row: Row, arguments: dict[str, Any]) -> None:
    loaded(folder, row, **arguments)


@pytest.mark.parametrize(
    ("row", "section", "wanted"), [(TP2_EP2, "dispatch_plan", "ep_plan"), (EP4, "ep_plan", "dispatch_plan")], ids=str
)
def test_rules_for_other_ranks_than_these_are_refused_on_every_rank(
    mixtures: Mixtures, row: Row, section: str, wanted: str
) -> None:
    folder, _ = mixtures("mixtral", experts_implementation="eager")
    arguments = {"ep_plan": {section: plan_of("mixtral")[section]}}
    for kind, (error, message, _) in outcomes(refused, row.world, str(folder), row, arguments):
        assert (kind, error) == ("raised", "PlanError")
        assert "PP108" in message
        assert wanted in message


# ---- plans that classes carry

CARRIED: dict[str, dict[str, Any]] = {
    "flex_olmo": {"intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2},
    "minimax_m2": {
        "intermediate_size": 32,
        "head_dim": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "rotary_dim": 4,
    },
}
CARRIED_ROWS = (TP2_EP2, TP4_EP2_ETP2, EP4, TP2_DISPATCH)


@pytest.fixture(scope="module")
def carried(tmp_path_factory: pytest.TempPathFactory) -> Starts:
    """`check_row` for mixtures whose class alone has a plan, by "model type row"."""
    runs: dict[str, tuple[int, Callable[[], Any]]] = {}
    for model_type, own in CARRIED.items():
        config = CONFIG_MAPPING[model_type](**{**_SIZES, **own, "tie_word_embeddings": False})
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation="eager")
        folder = str(tmp_path_factory.mktemp(model_type))
        randomized(model).eval().save_pretrained(folder)
        truths = [truth_of(model, batch_of(index)) for index in range(BATCHES)]
        arguments = {"tp_plan": "builtin", "experts_implementation": "eager"}
        for row in CARRIED_ROWS:
            target = str(tmp_path_factory.mktemp("saved"))

            call = partial(check_row, folder, target, row, truths[: row.batches], arguments)
            runs[f"{model_type} {row}"] = (row.world, call)
    return Starts(runs)


@pytest.mark.parametrize("row", CARRIED_ROWS, ids=str)
@pytest.mark.parametrize("model_type", CARRIED)
def test_the_plan_of_a_models_class_deals_its_experts(carried: Starts, model_type: str, row: Row) -> None:
    for layouts in carried[f"{model_type} {row}"]:
        experts = {layout for name, layout in layouts.items() if ".experts." in name}
        assert all(layout.startswith("[8@ep") for layout in experts), experts
