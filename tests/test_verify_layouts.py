"""The level layouts: values followed through a step at real widths, and what it says of plans that lose their way."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tiny import DENSE_TYPES, MOE_TYPES, tiny_model
from torch import Tensor, nn

from parallel_plans import verify_plan
from parallel_plans.boundary import Boundary
from parallel_plans.collectives import all_reduce
from parallel_plans.lookup import bundled_folder
from parallel_plans.styles import Style, base
from parallel_plans.verify.flow import Mark, Value
from parallel_plans.verify.letters.lay import Block, Lay, Mismatch, Shard, alike
from parallel_plans.verify.letters.operation import Operation
from parallel_plans.verify.letters.rules import RULES
from parallel_plans.verify.report import Report

TP = frozenset({"tp"})
HALF = Shard(over=TP, blocks=(Block(4, 8),))
PACKED = Shard(over=TP, blocks=(Block(2, 4), Block(2, 4)))


def judged(model_type: str, plan: str | Path = "auto", **sizes: int) -> Report:
    """The report of a tiny model's config up to the level layouts."""
    config = tiny_model(model_type, tied=False).config
    return verify_plan(config, plan, **{"tp": 2, **sizes}, level="layouts", cost=None)


def of_layouts(report: Report) -> list[tuple[str, str, str | None]]:
    return [(each.code, each.severity, each.name) for each in report.findings if each.level == "layouts"]


@pytest.mark.parametrize("model_type", DENSE_TYPES)
def test_a_bundled_plan_for_a_dense_model_is_proven(model_type: str) -> None:
    report = judged(model_type)
    assert (report.levels["layouts"], of_layouts(report)) == ("passed", [])


LOOKS_AT_VALUES = ("dbrx", "jetmoe", "longcat_flash")  # loops over experts that have tokens, without a kernel for them


MESHES = ({"tp": 4, "ep": 2, "etp": 2}, {"ep": 4})  # in turn


@pytest.mark.parametrize(
    ("model_type", "sizes"), [(kind, MESHES[at % 2]) for at, kind in enumerate(MOE_TYPES)], ids=str
)
def test_a_bundled_plan_for_a_mixture_is_proven_where_its_code_does_not_look_at_values(
    model_type: str, sizes: dict[str, int]
) -> None:
    report = judged(model_type, **sizes)
    found = of_layouts(report)
    if model_type in LOOKS_AT_VALUES:
        assert report.levels["layouts"] in ("passed", "unproven")
        assert {(code, severity) for code, severity, _ in found} <= {("PP306", "warning")}
        assert (report.levels["layouts"] == "unproven") is bool(found)
    else:
        assert (report.levels["layouts"], found) == ("passed", [])


# model type, what is replaced, by what, the code, the module or parameter that it names, words of the message
MISTAKES = (
    ("llama", r"  (model.norm)", r"  model.layers.*.mlp: all_reduce\n  \1", "PP301", "model.layers.0.mlp",
     "all_reduce over tp of a value that is whole: it gets 2 times too big"),
    ("llama", r"(model.norm): replicate", r"\1: replicated_with_grad_allreduce", "PP301", "model.norm",
     "in backward, all_reduce over tp of a value that is whole"),
    ("qwen3", r"(q_norm): \w+", r"\1: replicate", "PP304", "model.layers.1.self_attn.q_norm.weight",
     "the gradient (and 1 more like it) is never summed over the ranks"),
    ("phi3", r"(gate_up_proj): packed_colwise", r"\1: colwise", "PP303", "model.layers.0.mlp",
     "cuts through the parts of a dim"),
    ("deepseek_v3", r"(kv_a_proj_with_mqa): mla_kv_a_proj", r"\1: replicate", "PP302", None, "in backward, "),
    ("qwen2_moe", r"moe_tp_gate_up_colwise", "{style: moe_tp_gate_up_colwise, parts: 1}", "PP303",
     "model.layers.1.mlp.experts", "cuts through the parts of a dim"),  # the first is a dense one
)  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda m: f"{m[0]}-{m[3]}")
def test_a_value_that_does_not_fit_is_told_where_it_is_used(mistake: tuple, tmp_path: Path) -> None:
    model_type, pattern, replacement, code, name, words = mistake
    text = (bundled_folder() / f"{model_type}.yaml").read_text(encoding="utf-8")
    changed = re.sub(pattern, replacement, text, count=1)
    assert changed != text
    path = tmp_path / "plan.yaml"
    path.write_text(changed, encoding="utf-8")
    report = judged(model_type, path)
    assert report.levels["layouts"] == "failed", report.findings
    first = next(finding for finding in report.findings if finding.level == "layouts")
    assert first.code == code, str(first)
    assert name in (None, first.name), str(first)
    assert words in first.message


class Alone(Boundary):
    """Says something that the other ranks do not hear."""

    def __call__(self, forward, args, kwargs):  # type: ignore[no-untyped-def]
        output = forward(*args, **kwargs)
        return all_reduce(output, self.site.axis) if self.site.axis.rank == 0 else output


SAID_BY_ONE = Style(name="said_by_one", summary="for this test", boundary=Alone, module_only=True)


@pytest.fixture(autouse=True)
def _known(monkeypatch: pytest.MonkeyPatch) -> None:
    """The style is registered for these tests alone."""
    monkeypatch.setitem(base._styles, SAID_BY_ONE.name, SAID_BY_ONE)


class Pair(nn.Module):
    """Two layers with something between and after them."""

    def __init__(self, after: str = "same") -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8, bias=False)
        self.after = after

    def forward(self, value: Tensor) -> Tensor:
        inner = self.act(self.up(value))
        if self.after == "unknown":
            inner = torch.fft.fft(inner, dim=0).real
        if self.after == "rank":
            inner = inner * (1 + (dist.get_rank() if dist.is_initialized() else 0))
        output = self.down(inner)
        return output.relu() if self.after == "relu" else output


def of_pair(after: str, **rules: str) -> Report:
    plan = {"tp_plan": {"up": "colwise", "down": "rowwise", **rules}}
    return verify_plan(Pair(after), plan, tp=2, inputs={"value": torch.randn(3, 8)}, level="layouts", cost=None)


@pytest.mark.parametrize(
    ("after", "rules", "expected"),
    [
        ("same", {}, []),
        ("unknown", {}, [("PP306", "warning")]),
        ("rank", {}, [("PP307", "error")]),
        ("same", {"act": "said_by_one"}, [("PP303", "error")]),
    ],
)
def test_each_code_has_its_mistake_in_a_model_of_ones_own(
    after: str, rules: dict[str, str], expected: list[tuple[str, str]]
) -> None:
    report = of_pair(after, **rules)
    found = [(code, severity) for code, severity, _ in of_layouts(report)]
    assert found[: len(expected)] == expected, [str(finding) for finding in report.findings]
    assert bool(found) is bool(expected)


def test_what_has_no_rule_is_unproven_and_named_and_never_passed() -> None:
    report = of_pair("unknown")
    assert report.levels["layouts"] == "unproven"
    assert report.ok
    (finding,) = report.findings
    assert "unproven: there is no rule for what `_fft_r2c` makes of a value that is not whole" in finding.message


def test_ranks_that_say_different_things_would_wait_for_each_other() -> None:
    plan = {"tp_plan": {"up": "replicate", "act": "said_by_one", "down": "replicate"}}
    report = verify_plan(Pair(), plan, tp=2, inputs=(torch.randn(3, 8),), level="layouts", cost=None)
    codes = [code for code, _, _ in of_layouts(report)]
    assert codes[0] in ("PP301", "PP305"), [str(finding) for finding in report.findings]


class Chosen(nn.Module):
    """Two layers, then as many rows as have a positive sum, and a number of the rank's own before or after that."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.pair, self.where = Pair(), where

    def forward(self, value: Tensor) -> Tensor:
        rank = dist.get_rank() if dist.is_initialized() else 0
        inner = self.pair(value * (1 + rank) if self.where == "before" else value)
        rows = inner[inner.sum(-1) > 0]
        return inner.sum() + rows[: max(1, rows.shape[0] - 1)].sum()


def test_numbers_that_come_of_values_behind_a_collective_are_nobodys_mistake() -> None:
    plan = {"tp_plan": {"pair.up": "colwise", "pair.down": "rowwise"}}
    torch.manual_seed(0)
    counts = []
    for where, codes in (("behind", []), ("before", ["PP307"])):
        model = Chosen(where)
        inputs = {"value": torch.randn(64, 8)}
        report = verify_plan(model, plan, tp=2, inputs=inputs, level="layouts", cost=None)
        assert [code for code, severity, _ in of_layouts(report) if severity == "error"] == codes, report.findings
        ranks = [slice(0, 8), slice(8, 16)]
        half = [(model.pair.up.weight[own], model.pair.up.bias[own], model.pair.down.weight[:, own]) for own in ranks]
        for up, bias, down in half:  # what a rank of which nobody answers goes on with
            counts.append(int(((inputs["value"] @ up.t() + bias).relu() @ down.t()).sum(-1).gt(0).sum()))
    assert counts[0] != counts[1]  # else the ranks would have had the same numbers


def test_a_small_model_of_jetmoe_whose_tokens_travel_is_not_refused_for_its_routing() -> None:
    config = tiny_model("jetmoe", tied=False).config
    report = verify_plan(config, tp=1, ep=2, ep_plan="dispatch", level="layouts", cost=None)
    assert not [finding for finding in report.findings if finding.severity == "error"], report.findings


@pytest.mark.parametrize("width", [36, 40])
def test_experts_of_a_width_that_grouped_products_do_not_take_are_proven(width: int) -> None:
    config = tiny_model("qwen3_moe", tied=False).config
    config.moe_intermediate_size = width  # 18 and 20 rows a rank, and neither is a multiple of 16 bytes
    report = verify_plan(config, tp=2, level="layouts", cost=None)
    assert (report.levels["layouts"], of_layouts(report)) == ("passed", [])


def test_the_flow_tells_values_and_collectives_in_their_order() -> None:
    report = judged("llama")
    assert report.flow is not None
    steps = report.flow.steps
    values = {step.module: step for step in steps if isinstance(step, Value)}
    assert values["model.layers.0.self_attn.q_proj"].letters == {"tp": "S(2)"}
    assert "@tp" in values["model.layers.0.mlp.gate_proj"].marked
    assert values["model.layers.0.mlp.down_proj"].letters == {"tp": "I"}
    ahead = [step.module for step in steps if isinstance(step, Mark) and not step.backward]
    assert ahead[:3] == ["model.embed_tokens", "model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj"]


def through(name: str, *args: object, output: Tensor, lays: dict[Tensor, Lay], **more: object) -> object:
    """What a rule makes of an operation's arguments, which lie as given."""

    def lay_of(tensor: Tensor) -> Lay:
        return next((lay for key, lay in lays.items() if key is tensor), Lay(shards=(None,) * tensor.dim()))

    return RULES[name](Operation(name=name, args=args, kwargs={}, output=output, lay_of=lay_of, **more))


def test_a_contraction_of_parts_leaves_a_sum_and_one_of_a_part_with_a_whole_is_wrong() -> None:
    one, other = torch.zeros(3, 4), torch.zeros(4, 5)
    lays = {one: Lay(shards=(None, HALF)), other: Lay(shards=(HALF, None))}
    assert through("mm", one, other, output=torch.zeros(3, 5), lays=lays).partial == TP
    with pytest.raises(Mismatch, match="contracted with a whole dim"):
        through("mm", one, other, output=torch.zeros(3, 5), lays={one: lays[one]})
    lays = {one: Lay(shards=(None, HALF)), other: Lay(shards=(PACKED, None))}
    with pytest.raises(Mismatch, match="a part of 4 of 8 over tp meets one of 4 of 8 in 2 blocks over tp"):
        through("mm", one, other, output=torch.zeros(3, 5), lays=lays)


def test_views_keep_heads_and_parts_whole() -> None:
    value = torch.zeros(3, 4)
    heads = Shard(over=TP, blocks=(Block(4, 8, unit=2),))
    made = through("view", value, [3, 2, 2], output=torch.zeros(3, 2, 2), lays={value: Lay(shards=(None, heads))})
    assert made.shards[1:] == (Shard(over=TP, blocks=(Block(2, 4),)), None)
    halves = through("view", value, [3, 2, 2], output=torch.zeros(3, 2, 2), lays={value: Lay(shards=(None, PACKED))})
    assert halves.shards[1:] == (None, Shard(over=TP, blocks=(Block(2, 4),)))
    odd = Shard(over=TP, blocks=(Block(4, 8, unit=3),))
    with pytest.raises(Mismatch, match="cuts through the parts"):
        through("view", value, [3, 2, 2], output=torch.zeros(3, 2, 2), lays={value: Lay(shards=(None, odd))})


def test_one_head_of_a_rank_is_found_by_what_the_whole_model_does() -> None:
    value = torch.zeros(3, 4)
    for wholes, place in (((3, 2, 4), 1), ((3, 1, 8), 2)):
        lays = {value: Lay(shards=(None, HALF))}
        made = through("view", value, [3, 1, 4], output=torch.zeros(3, 1, 4), lays=lays, whole_shape=wholes)
        assert [dim for dim in range(3) if made.shards[dim] is not None] == [place]


def test_a_cut_between_blocks_is_a_cut_of_parts_and_any_other_is_wrong() -> None:
    assert PACKED.cut(0, 2) == Shard(over=TP, blocks=(Block(2, 4),))
    assert PACKED.cut(0, 3) is None
    assert HALF.cut(0, 2) is None
    assert HALF.agreeing(PACKED) is None
    assert HALF.agreeing(alike(4)) == HALF
    for one, other in itertools.permutations((HALF, PACKED, alike(4)), 2):
        assert (one.agreeing(other) is None) is (other.agreeing(one) is None)


def test_statistics_and_nonlinear_functions_want_whole_values() -> None:
    value, output = torch.zeros(3, 4), torch.zeros(3, 1)
    part, summand = {value: Lay(shards=(None, HALF))}, {value: Lay(shards=(None, None), partial=TP)}
    assert through("sum", value, [1], True, output=output, lays=part).partial == TP
    assert through("mean", value, [1], True, output=output, lays=summand).partial == TP
    with pytest.raises(Mismatch, match="mean over a dim of which each rank has a part"):
        through("mean", value, [1], True, output=output, lays=part)
    with pytest.raises(Mismatch, match="it is not linear"):
        through("amax", value, [1], True, output=output, lays=summand)
