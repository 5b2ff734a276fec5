"""Plans with their `sp_plan` in use: each level proves the right ones, refuses the wrong, and tells what it saw."""

from __future__ import annotations

import itertools
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from mutants.pool import Pool
from mutants.sequences import KINDS, LIBERTIES
from mutants.trial import Bench, Trial
from mutants.truth import ROWS
from published import original
from tiny import tiny_config
from torch import Tensor, nn
from typer.testing import CliRunner

from parallel_plans import verify_plan
from parallel_plans.cli.verify import app
from parallel_plans.forks import no_fork_scope
from parallel_plans.loader import load_plan
from parallel_plans.lookup import bundled_folder, with_sequence
from parallel_plans.mesh import views_for
from parallel_plans.sums import no_sum_scope
from parallel_plans.verify import followed
from parallel_plans.verify.cost import CostQuestion
from parallel_plans.verify.flow import Mark, Value
from parallel_plans.verify.following import follow, seen_of_whole
from parallel_plans.verify.layouts import check_layouts
from parallel_plans.verify.numerics import check_numerics
from parallel_plans.verify.page import page_of
from parallel_plans.verify.real_size import Subject, causal_lm, few_layers, tokens_of
from parallel_plans.verify.report import LEVELS, Report

MIXTURES = ("qwen3_moe", "mixtral", "deepseek_v3")
DISPATCH: dict[str, Any] = {"ep": 2, "ep_plan": "dispatch"}
BF16 = 2


def judged(model_type: str, plan: Any = "auto", **asked: Any) -> Report:
    """The report of a tiny model's config with its sequences split."""
    config = tiny_config(model_type, tied=False)
    return verify_plan(config, plan, **{"tp": 2, "sp": True, "cost": None, **asked})


def subject_of(model_type: str, tp: int, tokens: tuple[int, int]) -> Subject:
    """What the level layouts follows, on a batch and a sequence of one's own."""
    path = bundled_folder() / f"{model_type}.yaml"
    plan = with_sequence(load_plan(path), "auto")
    config = few_layers(tiny_config(model_type, tied=False)).config
    return Subject(plan=plan, views=views_for(tp, 1, None), make=lambda: causal_lm(config), inputs=tokens_of(*tokens))


@pytest.mark.parametrize(
    ("model_type", "sizes"),
    [
        *itertools.product(MIXTURES, [{"ep": 2}, DISPATCH]),
        *itertools.product(["qwen3_moe"], [{}, {"tp": 4}, {"tp": 4, "ep": 2}, {"ep": 4}]),
    ],
    ids=str,
)
def test_the_sequences_of_a_mixture_are_proven_wherever_its_experts_are(model_type: str, sizes: dict[str, Any]) -> None:
    report = judged(model_type, level="layouts", **sizes)
    assert (report.levels["layouts"], report.findings) == ("passed", [])


@pytest.mark.parametrize(
    ("model_type", "sizes"),
    [("llama", {}), ("llama", {"tp": 4}), ("qwen3_moe", {"ep": 2}), ("deepseek_v3", DISPATCH)],
    ids=str,
)
def test_a_bundled_plan_computes_what_one_process_does(model_type: str, sizes: dict[str, Any]) -> None:
    report = judged(model_type, **sizes)
    assert (set(report.levels.values()), report.findings) == ({"passed"}, [])


@pytest.mark.parametrize(("tp", "sequence"), [(2, 33), (4, 5)], ids=str)
def test_sequences_that_the_ranks_do_not_divide_are_followed_too(tp: int, sequence: int) -> None:
    found = check_layouts(subject_of("llama", tp, (2, sequence)), {})
    assert (found.findings, found.is_proven) == ([], True)
    letters = {step.module: step.letters["tp"] for step in found.flow.steps if isinstance(step, Value)}
    assert letters["model.layers.0.input_layernorm"] == letters["model.layers.1"] == "S(1)"
    assert letters["model.layers.0.self_attn.q_proj"] == "S(2)"
    assert letters["model.norm"] == letters["lm_head"] == "I"


@pytest.mark.parametrize(
    ("model_type", "forks", "sums"),
    [
        ("llama", nullcontext, no_sum_scope),
        ("llama", no_fork_scope, nullcontext),
        ("llama", no_fork_scope, no_sum_scope),
        ("qwen3_moe", nullcontext, no_sum_scope),
        ("qwen3_moe", no_fork_scope, nullcontext),
    ],
    ids=["sums at once", "forks apart", "both", "sums at once in a mixture", "forks apart in a mixture"],
)
def test_a_step_is_right_however_its_reductions_are_put_together(model_type: str, forks: Any, sums: Any) -> None:
    subject = subject_of(model_type, 2, (2, 16))
    views = seen_of_whole(subject).views
    with forks(), sums():
        seen = follow(subject, 1, views)
    assert seen.crash is None
    assert (seen.tracker.problems, seen.tracker.unproven, seen.gradients, seen.output) == ([], {}, [], None)


def test_the_step_that_is_shown_scatters_its_sums_and_gathers_once_for_a_block() -> None:
    found = check_layouts(subject_of("llama", 2, (2, 16)), {})
    marks = [step for step in found.flow.steps if isinstance(step, Mark) and not step.backward]
    assert {step.op for step in marks} == {"all_gather", "reduce_scatter"}
    gathers = [step.module for step in marks if step.op == "all_gather" and ".0." in step.module]
    assert gathers == ["model.layers.0.self_attn", "model.layers.0.mlp"]


WRONG_LETTERS = {  # what is done to the sp_plan, with nobody looking at names -> the codes of layouts
    "gather": ("model.layers.*.mlp: whole_sequence", "model.layers.*.mlp.act_fn: whole_sequence", {"PP303"}),
    "sum": ("*.input_layernorm: sequence_parallel", "*.input_layernorm: replicate", {"PP304"}),
    "join": ("model.norm: sequence_parallel_gather_output", "model.norm: sequence_parallel", {"PP405", "PP303"}),
}  # fmt: skip


@pytest.mark.parametrize("mistake", WRONG_LETTERS)
def test_letters_find_what_names_would_have_told(mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said, instead, codes = WRONG_LETTERS[mistake]
    text = (bundled_folder() / "llama.yaml").read_text()
    assert said in text
    path = tmp_path / "plan.yaml"
    path.write_text(text.replace(said, instead))
    assert judged("llama", path, level="layouts").levels["accounting"] == "failed"
    monkeypatch.setattr("parallel_plans.resolve.report_sequence", lambda *_: None)
    report = judged("llama", path, level="layouts")
    assert report.levels["layouts"] == "failed"
    assert {finding.code for finding in report.findings if finding.severity == "error"} & codes, report.findings


def test_numerics_finds_a_gradient_that_is_not_summed_and_says_the_rule_and_a_fix_that_mends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("parallel_plans.resolve.report_sequence", lambda *_: None)
    text = (bundled_folder() / "llama.yaml").read_text()
    path = tmp_path / "plan.yaml"
    rule = "model.layers.*.input_layernorm: "
    path.write_text(text.replace(f"{rule}sequence_parallel", f"{rule}replicate"))
    finding = judged("llama", path).findings[0]
    assert (finding.code, finding.level, finding.rule) == ("PP402", "numerics", "model.layers.*.input_layernorm")
    assert "tried, nothing is wrong then" in (finding.fix or "")


def test_a_trial_has_a_sequence_that_the_ranks_divide_and_one_that_they_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[tuple[int, int]] = []

    def noted(trial: Any) -> Any:
        lengths.append((trial.views.tp, trial.batches[0].kwargs["input_ids"].shape[1]))
        return check_numerics(trial)

    monkeypatch.setattr("parallel_plans.verify.trial.check_numerics", noted)
    assert judged("llama").ok
    assert {tokens % ranks for ranks, tokens in lengths} == {0, 1}
    assert all(tokens >= ranks for ranks, tokens in lengths)


class Block(nn.Module):
    """A layer of a model of one's own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width))

    def forward(self, value: Tensor) -> Tensor:
        return value + self.mlp(self.norm(value))


class Stack(nn.Module):
    """A model of one's own, whose first norm is given what wants no gradient."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(width) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 5)

    def forward(self, value: Tensor) -> Tensor:
        for layer in self.layers:
            value = layer(value)
        return self.head(self.norm(value))


STACK = {
    "version": 1,
    "tp_plan": {"layers.*.mlp.0": "colwise", "layers.*.mlp.2": "rowwise", "**": "replicate"},
    "sp_plan": {
        "layers.0": "split_sequence",
        "layers.*.norm": "sequence_parallel",
        "layers.*.mlp": "whole_sequence",
        "norm": "sequence_parallel_gather_output",
    },
}


@pytest.mark.parametrize("tokens", [6, 7])
def test_the_sequences_of_a_model_of_ones_own_are_split_too(tokens: int) -> None:
    inputs = {"value": torch.randn(2, tokens, 8)}
    report = verify_plan(Stack(), STACK, tp=2, sp=True, inputs=inputs)
    assert (set(report.levels.values()), report.findings) == ({"passed"}, [])


@pytest.mark.parametrize("sizes", [{"tp": 1}, {"tp": 1, "ep": 2}], ids=str)
def test_one_rank_to_a_batch_has_nothing_to_split_and_nothing_to_be_refused(sizes: dict[str, int]) -> None:
    report = judged("qwen3_moe", level="geometry", **sizes)
    assert (report.ok, report.findings) == (True, [])


def test_a_long_row_of_ranks_gets_a_sequence_long_enough() -> None:
    plan = with_sequence(load_plan(bundled_folder() / "llama.yaml"), "auto")
    assert followed._tokens(plan, views_for(64, 1, None)) == (2, 64)
    assert followed._tokens(plan, views_for(3, 1, None)) == (2, 33)


def test_the_collectives_of_a_step_are_those_of_arithmetic() -> None:
    batch, sequence, tp, layers, hidden, vocabulary = 3, 1000, 8, 32, 4096, 128256
    question = CostQuestion(batch=batch, sequence=sequence)
    report = verify_plan(original("llama-3.1-8b"), tp=tp, sp=True, level="geometry", cost=question)
    whole = batch * sequence * hidden * BF16
    logits = batch * sequence * vocabulary // tp * BF16
    # the embedding, and in every layer attention and feed-forward; the last norm gathers what the last layer scattered
    scattered, gathered = (2 * layers + 1) * whole, (2 * layers + 1) * whole // tp
    seen = {each.op: (each.count, each.bytes) for each in report.forward}
    assert seen == {"reduce_scatter": (2 * layers + 1, scattered), "all_gather": (2 * layers + 2, gathered + logits)}
    back = {each.op: each.bytes for each in report.backward}
    assert (back["reduce_scatter"], back["all_gather"]) == (scattered, gathered)
    assert back["all_reduce"] == (2 * layers + 1) * hidden * BF16  # the gradients of the norms
    assert report.to_dict()["communication"]["forward"] == [  # type: ignore[index]
        {"op": each.op, "axis": "tp", "count": each.count, "bytes": each.bytes} for each in report.forward
    ]


def test_ranks_keep_less_for_backward_and_a_token_is_decoded_as_without() -> None:
    def costs(sp: bool) -> Any:
        question = CostQuestion(batch=1, sequence=512, purpose="training")
        return verify_plan(original("llama-3.1-8b"), tp=8, sp=sp, level="geometry", cost=question).cost

    split, whole = costs(True), costs(False)
    assert split.memory[0].activations < whole.memory[0].activations
    assert split.memory[0].parameters == whole.memory[0].parameters
    assert split.passes["decode"].collectives == whole.passes["decode"].collectives


def test_a_sum_that_is_scattered_is_no_sum_that_is_saved() -> None:
    question = CostQuestion(batch=1, sequence=512)
    report = verify_plan(original("llama-3.1-8b"), tp=8, sp=True, level="geometry", cost=question)
    assert report.cost is not None
    assert {each.direction for each in report.cost.savings} == {"backward"}
    scatters = [each for each in report.cost.savings if each.before.op == "reduce_scatter"]
    assert sum(each.times for each in scatters) == 32
    for each in scatters:  # q, k, v and gate, up
        assert (each.before.count, each.after.count) == (5 * each.times, 2 * each.times)


def test_a_plan_without_an_sp_plan_is_refused_in_the_words_of_from_pretrained(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text('version: 1\ntp_plan:\n  "**": replicate\n')
    result = CliRunner().invoke(app, ["llama", "--plan", str(path), "--sp", "--json"])
    report = json.loads(result.stdout)
    assert result.exit_code == 1
    assert [(each["code"], each["message"]) for each in report["findings"]] == [("PP108", "an sp_plan is asked for")]
    assert report["levels"] == {level: "failed" if level == "accounting" else "not run" for level in LEVELS}


def test_the_screen_and_the_page_say_that_sequences_are_split_and_the_mesh_is_as_ever() -> None:
    arguments = ["llama", "--sp", "--level", "geometry", "--no-cost"]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0
    assert "ranks  tp = 2, ep = 1; sequences split over tp, by sp_plan" in shown.stdout
    assert "sequences split" not in CliRunner().invoke(app, ["llama", *arguments[2:]]).stdout
    assert json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)["mesh"] == {"tp": 2, "ep": 1}
    assert "sequences split over tp, by sp_plan" in page_of(judged("llama", level="layouts"))


def first_of_each(bench: Bench) -> list[Any]:
    """A mutant of each kind that is about sequences."""
    found: dict[str, Any] = {}
    for mutant in bench.mutants(ROWS["tp2-sp"]):
        if mutant.kind in KINDS | LIBERTIES:
            found.setdefault(mutant.kind, mutant)
    return list(found.values())


@pytest.fixture(scope="module")
def trials() -> list[tuple[Trial, str]]:
    """Trials of those, each with what real ranks make of it though names tell that it is wrong."""
    row, found = ROWS["tp2-sp"], []
    with Pool(2) as pool:
        for model_type in ("llama", "qwen3_moe"):
            with Bench(model_type) as bench:
                for trial in bench.trials(first_of_each(bench), row, pool, {}):
                    text = trial.mutant.text
                    truth = trial.outcome or bench.model.outcome(pool, row, text, unchecked=True)
                    found.append((trial, truth.wrong))
    return found


def test_what_is_refused_is_wrong_on_real_ranks_and_what_passes_is_right(trials: list[tuple[Trial, str]]) -> None:
    for trial, wrong in trials:
        assert bool(wrong) is trial.verdict.refused is not trial.mutant.sound, (trial.mutant.what, wrong)


def test_a_mistake_about_sequences_is_told_by_names_and_named(trials: list[tuple[Trial, str]]) -> None:
    mistakes = [trial for trial, _ in trials if not trial.mutant.sound]
    assert {trial.mutant.kind for trial in mistakes} == KINDS
    for trial in mistakes:
        assert (trial.result, trial.verdict.level, trial.verdict.named) == ("refused", "accounting", True), trial
