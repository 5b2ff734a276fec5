"""Plan files: what is read, what is refused, and how that is said. Run from the root of the repository."""

import os
import re
import time
from pathlib import Path

import pytest

from parallel_plans.errors import CODES, PlanError
from parallel_plans.loader import load_plan
from parallel_plans.nodes import MAX_BYTES, MAX_DEPTH
from parallel_plans.options import CHECKERS, EXPECTED
from parallel_plans.plan import SECTIONS, Plan
from parallel_plans.styles import styles

BAD_PLANS = sorted(Path("tests/bad_plans").glob("*.yaml"))
MADE_HERE = {"PP001", "PP002", "PP003"}  # no file, a huge one, and one that is not text
SPEC = Path("plans/SPEC.md").read_text(encoding="utf-8")

# What makes each bad plan load: (what it says, what it should have said). The mistake is the only one of its file.
MENDS = {
    "alias": [("&column colwise", "colwise"), ("*column", "colwise")],
    "boolean_as_key": [("  on:", '  "on":')],
    "boolean_as_style": [("no", "rowwise")],
    "count_on_private_name": [("__class__", "num_heads")],
    "delay_is_off": [("off", "false")],
    "delay_of_what_is_no_sum": [("colwise", "rowwise")],
    "dim_is_text": [("first", "-1")],
    "double_star_twice": [("**.mlp.**", "**.mlp.*")],
    "empty": [("# nothing but a comment", "{version: 1, tp_plan: {lm_head: colwise}}")],
    "flag_is_yes": [("yes", "true")],
    "harmless_tag": [("!!str ", "")],
    "mapping_as_key": [("{lm_head: colwise}", "lm_head")],
    "merge_key": [("<<: {lm_head: colwise}", "lm_head: colwise")],
    "no_section": [("model_type: llama", "tp_plan: {lm_head: colwise}")],
    "no_version": [("tp_plan:", "version: 1\ntp_plan:")],
    "not_yaml": [("{style: colwise", "{style: colwise}")],
    "nothing_as_style": [("lm_head:", "lm_head: colwise")],
    "number_as_model_type": [("3.5", '"3.5"')],
    "number_as_style": [("12", "colwise")],
    "one_part": [("[8]", "[8, 8]")],
    "option_twice": [("    dim: 1\n", "")],
    "partial_wildcard": [("q_*", "q_proj")],
    "python_tag": [('!!python/object/apply:os.system ["touch tests/bad_plans/executed"]', "colwise")],
    "root_is_list": [("- version: 1", "version: 1"), ("- tp_plan", "tp_plan: {}")],
    "rule_is_list": [("[colwise]", "colwise")],
    "rule_twice": [("  lm_head: replicate\n", "")],
    "rule_without_style": [("{dim", "{style: colwise, dim")],
    "section_is_list": [("- lm_head", "lm_head")],
    "section_twice": [("tp_plan:\n  model", "sp_plan:\n  model")],
    "section_without_rules": [("tp_plan:", "tp_plan: {}")],
    "size_cut_short": [("head_dim *", "head_dim * 2")],
    "size_is_call": [("__import__('os').getpid()", "head_dim")],
    "star_without_quotes": [("**", '"**"')],
    "too_deep": [("[[[[[[8]]]]]]", "[8]")],
    "two_documents": [("---\nversion: 1\n", "")],
    "unit_is_zero": [("0", "1")],
    "unknown_key": [("ep_plans", "ep_plan"), ("grouped_gemm", "replicate")],
    "unknown_option": [("units", "unit")],
    "unknown_style": [("collwise", "colwise")],
    "unknown_version": [("2", "1")],
    "version_as_text": [('"1"', "1")],
}


def written(folder: Path, content: str | bytes) -> Path:
    path = folder / "plan.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


def refusal(source: object) -> PlanError:
    with pytest.raises(PlanError) as caught:
        load_plan(source)  # type: ignore[arg-type]
    return caught.value


def codes(source: object) -> list[str]:
    return [finding.code for finding in refusal(source).findings]


@pytest.mark.parametrize("path", BAD_PLANS, ids=lambda path: path.stem)
def test_a_bad_plan_is_refused_in_these_words(path: Path) -> None:
    assert f"{refusal(path)}\n" == path.with_suffix(".txt").read_text(encoding="ascii")


@pytest.mark.parametrize("name", MENDS)
def test_a_bad_plan_is_refused_in_these_words_ok(name: str, tmp_path: Path) -> None:
    text = Path(f"tests/bad_plans/{name}.yaml").read_text(encoding="utf-8")
    for said, meant in MENDS[name]:
        assert said in text
        text = text.replace(said, meant, 1)
    assert isinstance(load_plan(written(tmp_path, text)), Plan)


def test_every_bad_plan_has_a_mended_twin() -> None:
    assert {path.stem for path in BAD_PLANS} - set(MENDS) == {"alias_bomb", "many_mistakes"}


def test_every_code_of_the_plan_file_has_a_bad_plan() -> None:
    texts = "".join(path.with_suffix(".txt").read_text(encoding="ascii") for path in BAD_PLANS)
    shown = {code for code in CODES if f"[{code}]" in texts}
    assert shown | MADE_HERE == {code for code in CODES if code.startswith("PP0")}


def test_findings_come_in_the_order_of_the_file() -> None:
    lines = [finding.line or 0 for finding in refusal("tests/bad_plans/many_mistakes.yaml").findings]
    assert lines == sorted(lines)
    assert len(lines) == 12


def test_nothing_in_a_plan_is_executed() -> None:
    refusal("tests/bad_plans/python_tag.yaml")
    assert not Path("tests/bad_plans/executed").exists()


def test_a_file_that_is_not_there_is_said_so(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path, "null\0character.yaml"):
        assert codes(path) == ["PP001"]


def test_an_unreadable_file_is_said_so(tmp_path: Path) -> None:
    path = written(tmp_path, "version: 1\ntp_plan: {}\n")
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user reads every file")
    assert codes(path) == ["PP001"]


def test_size_is_bounded(tmp_path: Path) -> None:
    plan = b"version: 1\ntp_plan: {}\n#"
    assert load_plan(written(tmp_path, plan.ljust(MAX_BYTES, b"x"))).version == 1
    assert codes(written(tmp_path, plan.ljust(MAX_BYTES + 1, b"x"))) == ["PP002"]


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="no endless file here")
def test_an_endless_file_ends() -> None:
    assert codes("/dev/zero") == ["PP002"]


def test_text_is_strict_utf8(tmp_path: Path) -> None:
    error = refusal(written(tmp_path, b"version: 1\n# caf\xe9\n"))
    assert [(finding.code, finding.line) for finding in error.findings] == [("PP003", 2)]
    assert codes(written(tmp_path, "version: 1\ntp_plan: {}\n".encode("utf-16"))) == ["PP003"]


def test_text_is_strict_utf8_ok(tmp_path: Path) -> None:
    plan = load_plan(written(tmp_path, b"\xef\xbb\xbfversion: 1\r\ntp_plan: {lm_head: colwise} # caf\xc3\xa9\r\n"))
    assert plan.rules("tp_plan")[0].line == 2


@pytest.mark.parametrize("bracket", ["[", "{a: ", "- ", "? "])
def test_depth_is_bounded_before_anything_is_built(bracket: str, tmp_path: Path) -> None:
    path = written(tmp_path, bracket * 100_000)
    start = time.process_time()
    assert codes(path) == ["PP007"]
    assert time.process_time() - start < 5.0  # it takes about 0.1


def test_a_mapping_that_holds_itself_is_refused() -> None:
    endless: dict[str, object] = {"style": "colwise"}
    endless["unit"] = endless
    assert codes({"lm_head": endless}) == ["PP007"]


def test_depth_of_a_mapping_is_bounded_like_that_of_a_file(tmp_path: Path) -> None:
    for lists, code in ((MAX_DEPTH - 3, "PP015"), (MAX_DEPTH - 2, "PP007")):
        nested: object = 8
        for _ in range(lists):
            nested = [nested]
        assert codes({"tp_plan": {"lm_head": {"style": "colwise", "unit": nested}}}) == [code]
        text = f"version: 1\ntp_plan: {{lm_head: {{style: colwise, unit: {nested}}}}}\n"
        assert codes(written(tmp_path, text)) == [code]


@pytest.mark.parametrize(
    "text", ['x: "\\UFFFFFFFF"', "x: \x07", "%YAML 2.0\n---\n{}", "%YAML 1." + "9" * 5000 + "\n---\n{}", "x: @y"]
)
def test_what_yaml_cannot_read_is_one_finding(text: str, tmp_path: Path) -> None:
    assert codes(written(tmp_path, text)) == ["PP004"]


def test_messages_are_one_line_of_ascii_whatever_the_plan_holds(tmp_path: Path) -> None:
    name = "\u202e\\n\\e[31m" + "x" * 900
    error = refusal(written(tmp_path, f'version: 1\ntp_plan: {{"{name}": "{name}"}}\n'))
    assert [finding.code for finding in error.findings] == ["PP016", "PP013"]
    assert str(error).isascii()
    assert max(len(line) for line in str(error).splitlines()) < 1000
    assert all("\n" not in finding.message and "\x1b" not in finding.message for finding in error.findings)


def test_rules_keep_order_place_style_and_options(tmp_path: Path) -> None:
    text = (
        "version: 1\nmodel_type: llama\ntp_plan:\n"
        "  lm_head: colwise_rep\n"
        "  model.layers.*.qkv:\n    style: packed_colwise\n    dim: -2\n    parts: [heads * 2, 8]\n"
        "    unit: [head_dim, 4]\n    optional: true\n"
        "  attn: {style: local_counts, counts: {config.heads: 1, kv_heads: head_dim / 2}}\n"
        "sp_plan: {model.norm: sequence_parallel}\n"
    )
    path = written(tmp_path, text)
    plan = load_plan(path)
    head, fused, counts = plan.rules("tp_plan")
    assert (plan.model_type, plan.version, plan.file) == ("llama", 1, str(path))
    assert (head.pattern, head.style, dict(head.options), head.optional) == ("lm_head", "colwise_rep", {}, False)
    assert dict(fused.options) == {"dim": -2, "parts": ("heads * 2", 8), "unit": ("head_dim", 4)}
    assert fused.optional
    assert counts.options["counts"] == {"config.heads": 1, "kv_heads": "head_dim / 2"}
    assert [rule.line for rule in (head, fused, counts)] == [4, 5, 11]
    assert fused.place == f"{path}:5"
    assert (plan.rules("ep_plan"), set(plan.sections)) == ((), {"tp_plan", "sp_plan"})


def test_paths_below_the_working_directory_are_shown_from_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path, "version: 1\ntp_plan: {}\n")
    assert load_plan(path).source == str(path)
    monkeypatch.chdir(tmp_path)
    assert load_plan(path).source == "plan.yaml"


def test_a_mapping_is_a_plan_or_the_rules_of_its_tp_plan() -> None:
    rules = {"model.layers.*.mlp.up_proj": "colwise", "lm_head": {"style": "colwise", "unit": 8}}
    bare, whole, versioned = (
        load_plan(rules),
        load_plan({"tp_plan": rules}),
        load_plan({"version": 1, "tp_plan": rules}),
    )
    assert bare == whole == versioned
    assert (bare.source, bare.file, bare.rules("tp_plan")[1].place) == ("<mapping>", None, "tp_plan")


@pytest.mark.parametrize(
    ("source", "code"),
    [
        ({}, "PP008"),
        ({"lm_head": True}, "PP012"),
        ({"lm_head": None}, "PP012"),
        ({"lm_head": ""}, "PP012"),
        ({True: "colwise"}, "PP012"),
        ({3: "colwise"}, "PP012"),
        ({"lm_head": object()}, "PP012"),
        ({"lm_head": ("colwise",)}, "PP008"),
        ({"lm_head": {"style": "colwise", "dim": 1.0}}, "PP015"),
        ({"lm_head": {"style": "colwise", "dim": True}}, "PP015"),
        ({"lm_head": {"style": "colwise", "dim": 10**5000}}, "PP015"),
        ({"lm_head": {"style": "colwise", "optional": "true"}}, "PP015"),
        ({"lm_head": {"style": "colwise", "unit": "4 - 4"}}, "PP017"),
        ({"lm_head": {"style": "colwise", "unit": []}}, "PP015"),
        ({"lm_head": {"style": "packed_colwise", "parts": 0}}, "PP015"),
        ({"lm_head": {"style": "packed_colwise", "parts": True}}, "PP015"),
        ({"lm_head": {"style": "packed_colwise", "parts": "2 +"}}, "PP017"),
        ({"lm_head": {"style": "moe_tp_gate_up_colwise", "interleaved": "yes"}}, "PP015"),
        ({"lm_head": {"style": "moe_tp_gate_up_colwise", "interleaved": 1}}, "PP015"),
        ({"experts": {"style": "ep_dispatch", "align_size": 0}}, "PP015"),
        ({"experts": {"style": "moe_experts_allreduce", "counts": {"__class__": 1}}}, "PP015"),
        ({"attn": {"style": "local_counts", "counts": {"a.__b": 1}}}, "PP015"),
        ({"attn": {"style": "split_inputs", "inputs": {"alibi": 1}}}, "PP015"),
        ({"attn": {"style": "split_inputs", "inputs": {"alibi": {"dim": 0}}}}, "PP015"),
        ({"attn": {"style": "split_inputs", "inputs": {"alibi": {"dim": 0, "size": 1, "times": 2}}}}, "PP015"),
        ({"attn": {"style": "split_inputs", "inputs": {"a.b": {"dim": 0, "size": 1}}}}, "PP015"),
        ({"attn": {"style": "local_counts", "counts": {1: 1}}}, "PP012"),
        ({"version": True, "tp_plan": {}}, "PP011"),
        ({"version": 1}, "PP008"),
    ],
)
def test_values_of_a_mapping_are_checked_like_those_of_a_file(source: dict[object, object], code: str) -> None:
    assert codes(source) == [code]


@pytest.mark.parametrize("parts", [1, 2, "ffn_config.moe_num_experts", (8, "head_dim")])
def test_parts_are_a_number_an_expression_or_sizes(parts: object) -> None:
    given = list(parts) if isinstance(parts, tuple) else parts
    plan = load_plan({"tp_plan": {"lm_head": {"style": "packed_colwise", "parts": given}}})
    assert plan.rules("tp_plan")[0].options["parts"] == parts


@pytest.mark.parametrize("number", ["010", "0x10", "1_0", "+1", "1:30", "1e3", "9999999999999"])
def test_integers_are_plain_decimal(number: str, tmp_path: Path) -> None:
    path = written(tmp_path, f"version: 1\ntp_plan: {{lm_head: {{style: colwise, dim: {number}}}}}\n")
    assert codes(path) == ["PP015"]


def test_every_kind_of_option_has_a_checker_and_a_row_in_the_format() -> None:
    kinds = {kind for style, _ in styles() for kind in style.options.values()}
    assert kinds <= set(CHECKERS)
    assert set(CHECKERS) == set(EXPECTED)
    for kind in CHECKERS:
        assert f"\n| {kind} |" in SPEC


def test_every_option_of_every_style_has_a_row_in_the_format() -> None:
    for style, _ in styles():
        for option, kind in style.options.items():
            assert f"\n| `{option}` | {kind} |" in SPEC, (style.name, option)


def test_the_format_says_in_which_sections_a_style_can_stand() -> None:
    rows = {
        row.split("|")[1].strip(): row.split("|")[2] for row in SPEC.splitlines() if re.match(r"\| `\w+_plan`", row)
    }
    standing = {section: {s.name for s, _ in styles() if section in s.sections} for section in SECTIONS}
    told = {section: set(re.findall(r"`(\w+)`", rows[f"`{section}`"])) for section in SECTIONS}
    for section in ("ep_plan", "dispatch_plan"):
        assert told[section] == standing[section]
    assert told["sp_plan"] - {"tp_plan"} == standing["sp_plan"] - standing["tp_plan"]
    assert standing["tp_plan"] <= standing["sp_plan"]
    assert {s.name for s, _ in styles()} - standing["sp_plan"] == {"grouped_gemm", "ep_router", "ep_dispatch"}


@pytest.mark.parametrize("path", sorted(Path("plans").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_plan_of_the_house_is_read(path: Path) -> None:
    assert load_plan(path).rules("tp_plan")


def test_the_example_of_the_format_is_read(tmp_path: Path) -> None:
    example = SPEC.split("```yaml\n")[1].split("```")[0]
    assert len(load_plan(written(tmp_path, example)).rules("tp_plan")) == 5
