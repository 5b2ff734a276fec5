"""Plans that are derived: what they split, what they cost, what they say, and that nobody gets one unasked."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_on_ranks
from tiny import tiny_config, tiny_model, tokens
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from typer.testing import CliRunner

from parallel_plans import LaunchError, derive_plan, load_plan, parallelize, verify_plan
from parallel_plans.cli.main import app
from parallel_plans.derive import derive as derivation
from parallel_plans.derive.derive import percent, share_of_layers
from parallel_plans.derive.extents import Extent, join, leaves, made_of, regrouped, stretch
from parallel_plans.derive.naming import Names
from parallel_plans.verify.report import Report

# fused parts with numbers kept in two places, heads fused one by one, norms over all heads, norms per head and experts
TYPES = ("phi3", "gpt_neox", "olmo2", "qwen3_moe")


def _collectives(report: Report) -> list[tuple[str, str, int]]:
    each = [("forward", report.forward), ("backward", report.backward)]
    return [(way, traffic.op, traffic.count) for way, all_of in each for traffic in all_of]


@pytest.mark.parametrize("model_type", TYPES)
def test_a_derived_plan_splits_and_costs_what_the_bundled_one_does(model_type: str) -> None:
    config = tiny_config(model_type, tied=False)
    derived = derive_plan(config)
    assert set(derived.report.levels.values()) == {"passed"}, derived.report.findings
    mine, bundled = (verify_plan(config, plan, tp=2, level="geometry") for plan in (derived.plan, "auto"))
    assert _collectives(mine) == _collectives(bundled) != []
    assert mine.parameters == bundled.parameters
    sections = set(load_plan(bundled.plan).sections) - {"sp_plan"}
    assert set(derived.plan.sections) == sections


def test_what_is_written_loads_and_is_sound_where_key_value_heads_are_few(tmp_path: Path) -> None:
    config = tiny_config("llama", tied=True)
    derived = derive_plan(config, tp=4)
    file = tmp_path / "plan.yaml"
    file.write_text(derived.text, encoding="utf-8")
    assert load_plan(file).fingerprint() == derived.plan.fingerprint()
    unit = "head_dim * num_attention_heads / num_key_value_heads"
    assert f"q_proj: {{style: colwise, unit: {unit}}}  # [heads*head_dim@tp, hidden]" in derived.text
    assert "mlp.down_proj: rowwise  # [hidden, ffn@tp]" in derived.text
    wider = tiny_config("llama", tied=True, num_attention_heads=12, num_key_value_heads=2)
    assert verify_plan(wider, file, tp=2, cost=None).ok


class _Counting(nn.Module):
    """One part that can be split, and one in which a sum runs along the features in between."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)
        self.first, self.last = nn.Linear(16, 40), nn.Linear(40, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down(torch.relu(self.up(x)))
        return x + self.last(self.first(x).cumsum(-1))


def test_what_cannot_be_split_stays_whole_and_says_why() -> None:
    derived = derive_plan(_Counting(), inputs=(torch.randn(3, 16),))
    styles = {rule.pattern: rule.style for rule in derived.plan.rules("tp_plan")}
    assert styles == {"up": "colwise", "down": "rowwise", "first": "replicate", "last": "replicate"}
    assert "# whole: dim 0: it is a dim along which `cumsum` runs\n  first: replicate" in derived.text
    assert derived.report.ok


class _Keeping(nn.Module):
    """Attention that cuts a fused projection by numbers that it keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.width, self.features = 6, 24, 4
        self.fused, self.out = nn.Linear(24, 72), nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        cut = (each.view(*x.shape[:2], self.heads, 4) for each in self.fused(x).split(self.width, dim=-1))
        query, key, value = (each.transpose(1, 2) for each in cut)
        mixed = (query @ key.transpose(2, 3) / self.features**0.5).softmax(-1) @ value
        return self.out(mixed.transpose(1, 2).reshape(*x.shape[:2], self.width))


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = _Keeping()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(x)


def test_numbers_that_a_module_keeps_become_local_and_no_others() -> None:
    derived = derive_plan(_Block(), inputs=(torch.randn(2, 5, 24),))
    rules = {rule.pattern: rule for rule in derived.plan.rules("tp_plan")}
    assert rules["attention"].options == {"counts": {"heads": 1, "width": 4}}
    assert rules["attention.fused"].options == {"parts": 3, "unit": 4}
    assert derived.report.ok


class _Sharing(nn.Module):
    """Attention whose heads all meet one key and one value, fused behind the queries."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 4
        self.fused, self.out = nn.Linear(24, 4 * 6 + 2 * 6), nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        fused = self.fused(x).view(*x.shape[:2], -1, 6)
        query, key, value = fused[..., :-2, :], fused[..., [-2], :], fused[..., [-1], :]
        scores = query.transpose(1, 2) @ key.permute(0, 2, 3, 1)
        mixed = scores.softmax(-1) @ value.transpose(1, 2)
        return self.out(mixed.transpose(1, 2).flatten(2))


def test_what_all_heads_share_stays_whole_in_a_fused_weight_whose_heads_are_split() -> None:
    derived = derive_plan(nn.Sequential(_Sharing()), inputs=(torch.randn(2, 5, 24),))
    rules = {rule.pattern: rule for rule in derived.plan.rules("tp_plan")}
    assert set(derived.report.levels.values()) <= {"passed", "unproven"}
    assert rules["*.fused"].style == "packed_colwise"
    assert rules["*.fused"].options == {"parts": (24, 12), "unit": (6, 12), "shared": (False, True)}
    assert rules["*.out"].options == {"unit": 6}
    assert "[24@tp + 12, 24]" in derived.text


class _Biased(nn.Module):
    """Attention that is handed a bias for every head, as with ALiBi."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.value, self.out = (nn.Linear(24, 24, bias=False) for _ in range(3))

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        query, value = (layer(x).view(*x.shape[:2], -1, 6).transpose(1, 2) for layer in (self.query, self.value))
        mixed = (query @ query.transpose(2, 3) + bias).softmax(-1) @ value
        return self.out(mixed.transpose(1, 2).flatten(2))


class _Slopes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = _Biased()
        self.mlp = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 24))

    def forward(self, x: Tensor) -> Tensor:
        slopes = torch.arange(1, 5, dtype=x.dtype)[:, None, None] * torch.arange(x.shape[1])
        return x + self.mlp(self.attention(x, bias=slopes))


def test_an_input_that_holds_something_for_every_head_is_split_and_steps_that_differ_have_rules_of_their_own() -> None:
    derived = derive_plan(_Slopes(), inputs=(torch.randn(2, 5, 24),))
    rules = {rule.pattern: rule for rule in derived.plan.rules("tp_plan")}
    assert derived.report.ok
    assert rules["attention"].options == {"inputs": {"bias": {"dim": 0, "size": 4}}}
    assert rules["attention.out"].options == {"unit": 6}
    assert (rules["mlp.0"].style, rules["mlp.2"].style) == ("colwise", "rowwise")


def test_nobody_gets_a_derived_plan_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a plan was derived")

    monkeypatch.setattr(derivation, "derive_plan", refuse)
    inputs = (torch.randn(3, 16),)
    with pytest.raises(LaunchError, match="PP704"):
        verify_plan(_Counting(), "auto", tp=2, inputs=inputs)
    with pytest.raises(AssertionError, match="a plan was derived"):
        verify_plan(_Counting(), "derive", tp=2, inputs=inputs)


def test_a_model_that_does_not_run_is_refused() -> None:
    with pytest.raises(LaunchError, match="does not run") as refused:
        derive_plan(_Counting(), inputs=(torch.randn(3, 7),))
    assert "shapes cannot be multiplied" in str(refused.value)


def keeping() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """What the command is asked about."""
    return _Block(), (torch.zeros(2, 5, 24),)


def test_the_command_writes_a_plan_and_says_what_it_is(tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    done = CliRunner().invoke(app, ["derive", f"{__name__}:keeping", "-o", str(file)])
    assert done.exit_code == 0, done.output
    assert file.read_text(encoding="utf-8").startswith("# Derived, not written")
    assert "accounting passed, geometry passed, layouts passed, numerics passed" in done.stderr
    assert not done.stdout
    assert CliRunner().invoke(app, ["derive", "no_such_model"]).exit_code == 2


def _logits_on_a_rank(state: dict[str, Tensor], batch: Tensor) -> tuple[Tensor, list[str]]:
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("parallel_plans").addHandler(handler)
    logging.getLogger("parallel_plans").setLevel(logging.INFO)
    model = tiny_model("qwen3", tied=False)
    model.load_state_dict(state)
    parallelize(model, "derive", init_device_mesh("cpu", (2,), mesh_dim_names=("tp",)), storage="local")
    assert model.model.layers[0].mlp.up_proj.weight.shape[0] == 35
    return model(input_ids=batch).logits.detach(), told


def test_ranks_split_a_model_by_one_derived_plan_and_tell_it() -> None:
    model, batch = tiny_model("qwen3", tied=False), tokens()
    whole = model(input_ids=batch).logits.detach()
    for rank, (logits, told) in enumerate(run_on_ranks(_logits_on_a_rank, 2, model.state_dict(), batch)):
        torch.testing.assert_close(logits, whole, rtol=1e-4, atol=1e-4)
        assert any("q_proj: {style: colwise" in line for line in told) == (rank == 0)


# -- what dims are made of


def test_extents_that_meet_share_what_either_is_seen_to_be_made_of() -> None:
    queries, keys = Extent(96), Extent(24)
    heads = regrouped([Extent(2), queries], [2, 12, 8])[1]
    groups, width = regrouped([keys], [3, 8])
    (repeated,) = regrouped([groups, Extent(4)], [12])
    assert join(repeated, heads)
    assert join(width, regrouped([queries], [12, 8])[1])
    assert repr(queries) == "((3*4)*8)"
    assert next(leaves(queries)) is next(leaves(keys))


def test_a_fused_extent_is_known_by_its_parts_and_by_its_heads() -> None:
    fused = Extent(48)
    query = stretch(fused, 0, 32)
    by_head, _ = regrouped([fused], [6, 8])
    assert repr(by_head) == "(4+2)"
    assert repr(fused) == "((4+2)*8)"
    assert join(query, made_of("product", [Extent(4), Extent(8)]))


def test_ways_to_see_a_dim_that_do_not_fit_are_no_view() -> None:
    one, other = Extent(12), Extent(12)
    regrouped([one], [4, 3])
    stretch(other, 0, 5)
    assert not join(one, other)
    assert all(leaf.marks for each in (one, other) for leaf in leaves(each))


def test_a_size_is_named_by_what_has_it_in_all_models() -> None:
    large = {"head_dim": 64, "num_attention_heads": 32, "num_key_value_heads": 8, "strange": 4}
    small = {"head_dim": 8, "num_attention_heads": 6, "num_key_value_heads": 2, "strange": 4}
    names = Names([large, small])
    assert names.text((256, 24)) == "head_dim * num_attention_heads / num_key_value_heads"
    assert names.short((2048, 48)) == "heads*head_dim"
    assert names.text((5, 5)) == 5
    assert names.text((5, 7)) is None
    assert Names([]).text((256,)) == 256
    own = [{"n_embd": 64, "n_head": 8, "n_layer": 2, "rotary_dim": 2}]
    own.append({"n_embd": 96, "n_head": 12, "n_layer": 2, "rotary_dim": 3})
    known_as = {"n_embd": "hidden_size", "n_head": "num_attention_heads", "n_layer": "num_hidden_layers"}
    assert Names(own, known_as).text((8, 8), is_head=True) == "n_embd / n_head"
    assert Names(own, known_as).text((8, None)) == 8
    assert Names(own, known_as).text((4, 4)) == 4


def test_all_is_only_said_of_all() -> None:
    assert (percent(1.0), percent(0.99996), share_of_layers(None)) == ("100.0%", "99.9%", 0.0)
