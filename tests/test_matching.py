"""Rules against names: what a pattern fits, which rule wins, and what became of every rule."""

import random

import pytest

from parallel_plans.matching import Pattern, assign, pattern_problem
from parallel_plans.plan import Rule


def rules(*patterns: str) -> list[Rule]:
    return [Rule(section="tp_plan", pattern=pattern, style="replicate", line=i) for i, pattern in enumerate(patterns)]


def winner(patterns: list[str], parameter: str) -> str | None:
    rule = assign(rules(*patterns), [parameter], []).parameters[parameter]
    return None if rule is None else rule.pattern


@pytest.mark.parametrize(
    ("pattern", "name", "fits"),
    [
        ("model.norm", "model.norm", True),
        ("model.norm", "model.norm.weight", False),
        ("model.norm", "amodel.norm", False),
        ("model.norm", "model_norm", False),
        ("layers.*.mlp", "layers.12.mlp", True),
        ("layers.*.mlp", "layers.mlp", False),
        ("layers.*.mlp", "layers.1.2.mlp", False),
        ("*", "lm_head", True),
        ("*", "", False),
        ("*", "model.norm", False),
        ("**", "", True),
        ("**", "lm_head", True),
        ("**", "model.layers.0.mlp", True),
        ("model.**.weight", "model.weight", True),
        ("model.**.weight", "model.a.b.weight", True),
        ("model.**.weight", "model.a.b.bias", False),
        ("a.**.a", "a", False),
        ("**.mlp.*", "x.y.mlp.z", True),
        ("**.mlp.*", "mlp.z", True),
        ("**.mlp.*", "x.mlp", False),
        ("layers.0.mlp", "layers.0.mlp", True),
        ("layers.0.mlp", "layers.00.mlp", False),
    ],
)
def test_star_is_one_segment_and_double_star_any_number(pattern: str, name: str, fits: bool) -> None:
    assert Pattern.of(pattern).matches(name) is fits


@pytest.mark.parametrize("text", ["", ".", "a..b", ".a", "a.", "q_*", "a.***", "**.**", "a-b", "a b", "a\n", "\u00e9"])
def test_what_is_no_dotted_name_has_a_problem(text: str) -> None:
    assert pattern_problem(text) is not None


@pytest.mark.parametrize("text", ["a", "*", "**", "model.layers.*.mlp", "a.**.b.*", "0", "_x9"])
def test_what_is_no_dotted_name_has_a_problem_ok(text: str) -> None:
    assert pattern_problem(text) is None


def test_a_rule_without_double_star_beats_one_with_it_wherever_it_stands() -> None:
    assert winner(["**", "model.norm"], "model.norm.weight") == "model.norm"
    assert winner(["**.weight", "model.*"], "model.norm.weight") == "model.*"


def test_a_rule_on_the_parameter_beats_a_rule_on_its_module_wherever_it_stands() -> None:
    patterns = ["mlp.experts", "mlp.experts.down_proj"]
    assert winner(patterns, "mlp.experts.down_proj") == "mlp.experts.down_proj"
    assert winner(patterns[::-1], "mlp.experts.down_proj") == "mlp.experts.down_proj"


def test_of_rules_with_double_star_the_earlier_wins_whatever_it_names() -> None:
    assert winner(["**.mlp", "**.weight"], "mlp.weight") == "**.mlp"
    assert winner(["**.weight", "**.mlp"], "mlp.weight") == "**.weight"


def test_of_equals_the_earlier_rule_wins() -> None:
    assert winner(["*.q_proj", "attn.*"], "attn.q_proj.weight") == "*.q_proj"
    assert winner(["attn.*", "*.q_proj"], "attn.q_proj.weight") == "attn.*"
    assert winner(["**", "attn.**"], "attn.q_proj.weight") == "**"


def test_a_rule_on_a_module_reaches_its_own_parameters_only() -> None:
    assert winner(["model.mlp"], "model.mlp.weight") == "model.mlp"
    assert winner(["model.mlp"], "model.mlp.up_proj.weight") is None


def test_a_parameter_of_the_root_is_owned_by_the_root() -> None:
    assert winner(["scale"], "scale") == "scale"
    assert winner(["**"], "scale") == "**"
    assert winner(["*.scale"], "scale") is None


def test_modules_stand_under_the_rule_that_matches_their_own_name() -> None:
    modules = ["", "model", "model.mlp", "model.mlp.up_proj"]
    assigned = assign(rules("**", "model.mlp", "model.*"), [], modules).modules
    patterns = {name: rule and rule.pattern for name, rule in assigned.items()}
    assert patterns == {"": "**", "model": "**", "model.mlp": "model.mlp", "model.mlp.up_proj": "**"}


def test_without_a_rule_there_is_none() -> None:
    assigned = assign(rules("a"), ["a.weight", "b.weight"], ["a", "b"])
    assert assigned.parameters["b.weight"] is None
    assert assigned.modules["b"] is None
    assert assigned.unruled == ("b.weight",)


def test_names_keep_their_order() -> None:
    names = ["z.1.w", "a.w", "z.0.w", "b.w"]
    assigned = assign(rules("**"), names, names[::-1])
    assert list(assigned.parameters) == names
    assert list(assigned.modules) == names[::-1]


def test_uses_count_what_a_rule_won_and_what_it_matched() -> None:
    parameters = ["layers.0.up.weight", "layers.1.up.weight", "layers.0.up.bias"]
    modules = ["layers.0.up", "layers.1.up"]
    assigned = assign(rules("layers.*.up", "layers.*.up.bias", "layers.0.up", "head"), parameters, modules)
    counts = [(use.parameters, use.modules, use.matched) for use in assigned.uses]
    assert counts == [(2, 2, 5), (1, 0, 1), (0, 0, 3), (0, 0, 0)]
    assert [use.is_shadowed for use in assigned.uses] == [False, False, True, False]
    assert [use.matches_nothing for use in assigned.uses] == [False, False, False, True]


def test_a_rule_that_spells_a_layer_out_takes_that_layer_alone() -> None:
    names = [f"layers.{i}.mlp.weight" for i in range(12)]
    assigned = assign(rules("layers.1.mlp", "layers.*.mlp"), names, [])
    taken = [name for name, rule in assigned.parameters.items() if rule and rule.pattern == "layers.1.mlp"]
    assert taken == ["layers.1.mlp.weight"]


def test_grouping_names_changes_no_winner() -> None:
    dice = random.Random(0)
    words = ["a", "b", "0", "1", "2"]
    for _ in range(200):
        patterns = []
        for _ in range(5):
            segments = dice.choices([*words, "*"], k=dice.randint(1, 3))
            if dice.random() < 0.3:
                segments.insert(dice.randint(0, len(segments)), "**")
            patterns.append(".".join(segments))
        names = sorted({".".join(dice.choices(words, k=dice.randint(1, 4))) for _ in range(20)})
        together = assign(rules(*patterns), names, []).parameters
        for name in names:
            rule = together[name]
            assert (rule and rule.pattern) == plainly_won(patterns, name)


def plainly_won(patterns: list[str], name: str) -> str | None:
    """The winner by the sentence of the format, name by name."""
    owner = name.rpartition(".")[0]
    closed = [pattern for pattern in patterns if "**" not in pattern]
    for reached in (name, owner):
        for pattern in closed:
            if Pattern.of(pattern).matches(reached):
                return pattern
    opened = [Pattern.of(pattern) for pattern in patterns if "**" in pattern]
    texts = [pattern for pattern in patterns if "**" in pattern]
    return next((t for t, p in zip(texts, opened, strict=True) if p.matches(name) or p.matches(owner)), None)


def test_of_100_000_names_every_one_finds_its_rule() -> None:
    names = [
        f"model.layers.{i}.mlp.experts.{j}.{k}_proj" for i in range(50) for j in range(500) for k in ("up", "down")
    ]
    patterns = ["model.layers.*.mlp.experts.*.up_proj", "**"] + [f"model.layers.*.part{i}" for i in range(28)]
    assigned = assign(rules(*patterns), [f"{name}.weight" for name in names], names)
    assert [use.parameters for use in assigned.uses[:2]] == [25_000, 25_000]
