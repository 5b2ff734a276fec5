"""The page that shows a report: it stands alone, is well-formed, and has everything on its place."""

from __future__ import annotations

import html
import os
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from transformers import AutoConfig
from typer.testing import CliRunner

from parallel_plans import Finding, verify_plan
from parallel_plans.cli.verify import app
from parallel_plans.lookup import bundled_folder
from parallel_plans.verify.drawing import Placed, drawings_of
from parallel_plans.verify.flow import Flow, Mark, Value
from parallel_plans.verify.page import PageError, layers_told, page_of, try_place, write_page
from parallel_plans.verify.picture import Box, picture_of
from parallel_plans.verify.report import Report, Simulated

VOID = {"meta", "br", "link", "img", "hr", "input"}
LARGEST = 300_000  # bytes of a page


class Balance(HTMLParser):
    """Which tags stand open, and what was wrong with those that were closed."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def read(page: str) -> Balance:
    balance = Balance()
    balance.feed(page)
    balance.close()
    return balance


def llama(**fields: Any) -> Any:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 8, "num_key_value_heads": 4}
    return AutoConfig.for_model("llama", **(sizes | {"num_hidden_layers": 5, "vocab_size": 101} | fields))


def flow_of_llama() -> Flow:
    """A step in which two layers stand for five."""
    steps: list[Value | Mark] = []

    def value(module: str, marked: str = "[1, 7, 64]", letter: str = "I") -> None:
        steps.append(Value(module=module, shape=(1, 7, 64), marked=marked, letters={"tp": letter}))

    def mark(module: str, op: str, *, backward: bool = False) -> None:
        steps.append(Mark(module=module, op=op, axis="tp", bytes=1792, backward=backward))

    mark("model.embed_tokens", "all_reduce")
    value("model.embed_tokens")
    for layer in ("model.layers.0", "model.layers.1"):
        value(f"{layer}.input_layernorm")
        value(f"{layer}.self_attn.q_proj", "[1, 7, 64@tp]", "S(2)")
        mark(f"{layer}.self_attn.o_proj", "all_reduce")
        value(f"{layer}.self_attn.o_proj")
        value(f"{layer}.self_attn")
        value(f"{layer}.mlp.act_fn", "[1, 7, 96@tp]", "?")
        value(layer)
    value("model.norm")
    mark("lm_head", "all_gather")
    value("lm_head", "[1, 7, 101]")
    for layer in ("model.layers.1", "model.layers.0"):
        mark(f"{layer}.self_attn.q_proj", "reduce_scatter", backward=True)
    return Flow(steps=tuple(steps), times={"model.layers.0": 4, "model.layers.1": 1})


def sound() -> Report:
    report = verify_plan(llama(), tp=4, level="geometry", cost=None)
    report.flow = flow_of_llama()
    return report


def boxes_of(report: Report) -> list[Box]:
    picture = picture_of(report)
    assert picture is not None

    def walk(boxes: tuple[Box, ...]) -> list[Box]:
        return [each for box in boxes for each in (box, *walk(box.inner))]

    return walk(tuple(box for part in picture.parts for box in part.boxes))


def badges_of(report: Report) -> dict[str, tuple[int, ...]]:
    return {box.name: box.badges for box in boxes_of(report) if box.badges}


def error(level: str = "accounting", **fields: Any) -> Finding:
    code = {"accounting": "PP102", "geometry": "PP201", "numerics": "PP401"}.get(level, "PP405")
    return Finding(code=code, message="it is wrong", level=level, **fields)


def test_the_page_stands_alone_and_is_well_formed() -> None:
    page = page_of(sound())
    assert set(re.findall(r"\w+://[^\s\"'<>]+", page)) == {"http://www.w3.org/2000/svg"}
    balance = read(page)
    assert (balance.open, balance.wrong) == ([], [])
    assert not {tag for tag, _ in balance.tags} & {"script", "link", "img", "iframe", "object", "embed", "base"}
    assert "@import" not in page
    assert "url(" not in page
    hrefs = {attributes["href"] for tag, attributes in balance.tags if tag == "a"}
    assert all(href and href.startswith("#") for href in hrefs)


def test_every_form_of_parameter_and_every_collective_is_on_the_page() -> None:
    report = sound()
    assert report.table is not None
    balance = read(page_of(report))
    for form, entries in report.table.by_form().items():
        assert form in balance.text
        assert str(entries[0].layout) in balance.text
    for told in ("all_reduce tp 1.8 KiB", "all_gather tp 1.8 KiB", "reduce_scatter tp 1.8 KiB"):
        assert told in balance.text


def test_letters_are_printed_and_not_only_coloured() -> None:
    page = page_of(sound())
    for letter, word in (("S(2) tp", "l-S"), ("I tp", "l-I"), ("? tp", "l-unproven")):
        assert re.search(
            rf'class="chip-ground {word}"[^>]*/>\s*<text class="chip-text"[^>]*>{re.escape(letter)}<', page
        )
    legend = re.findall(r'<li><span class="chip l-\w+">(.)</span>', page)
    assert legend == ["S", "I", "P", "?"]  # P on the way out of o_proj


def test_layers_that_are_alike_are_drawn_once_in_forward_order() -> None:
    picture = picture_of(sound())
    assert picture is not None
    assert [part.title for part in picture.parts] == ["before the layers", "model.layers.*", "after the layers"]
    before, layer, after = picture.parts
    assert [box.name for box in before.boxes] == ["model.embed_tokens"]
    assert [box.name for box in after.boxes] == ["model.norm", "lm_head", "model.rotary_emb"][: len(after.boxes)]
    assert layer.layers == tuple(f"model.layers.{index}" for index in range(5))
    (whole,) = layer.boxes
    assert [box.name for box in whole.inner][:2] == ["input_layernorm", "self_attn"]
    (reduced,) = (box for box in boxes_of(sound()) if box.name == "self_attn.o_proj")
    assert [(each.op, each.count) for each in reduced.forward] == [("all_reduce", 1)]
    assert reduced.leaves == "P"


def test_layers_of_each_kind_are_drawn() -> None:
    fields = {"first_k_dense_replace": 1, "num_hidden_layers": 3, "n_routed_experts": 8, "moe_intermediate_size": 16}
    config = AutoConfig.for_model("deepseek_v3", hidden_size=64, intermediate_size=96, vocab_size=101, **fields)
    picture = picture_of(verify_plan(config, tp=2, level="geometry", cost=None))
    assert picture is not None
    assert [part.layers for part in picture.parts if part.layers] == [
        ("model.layers.0",),
        ("model.layers.1", "model.layers.2"),
    ]


def test_a_finding_is_on_the_box_of_its_module() -> None:
    report = sound()
    report.simulated = Simulated(ranks={"tp": 2}, layers=(0, 4), sizes={})
    report.findings = [
        error(name="model.layers.3.mlp.up_proj.weight"),
        error(name="lm_head"),
        error(rule="model.layers.*.self_attn.k_proj"),
        error(rule="model.layers.*.mlp.no_such_proj"),
        error(rule="no_such_prefix.layers.*.mlp"),
        error("layouts", name="model.layers.1.self_attn.q_proj"),
        error("numerics", name="model.layers.1.mlp.down_proj"),
    ]
    assert badges_of(report) == {
        "mlp.up_proj": (1,),
        "lm_head": (2,),
        "self_attn.k_proj": (3,),
        "mlp": (4,),
        "self_attn.q_proj": (6,),
        "mlp.down_proj": (7,),
    }
    picture = picture_of(report)
    assert picture is not None
    assert picture.elsewhere == (5,)
    assert "Without a place in the picture" in page_of(report)


def test_a_finding_of_a_shrunken_model_is_on_the_kind_of_layer_that_was_kept() -> None:
    fields = {"first_k_dense_replace": 3, "num_hidden_layers": 6, "n_routed_experts": 8, "moe_intermediate_size": 16}
    config = AutoConfig.for_model("deepseek_v3", hidden_size=64, intermediate_size=96, vocab_size=101, **fields)
    report = verify_plan(config, tp=2, level="geometry", cost=None)
    report.simulated = Simulated(ranks={"tp": 2}, layers=(0, 3), sizes={})
    report.findings = [error("numerics", name="model.layers.1.mlp")]
    (found,) = (box for box in boxes_of(report) if box.badges)
    assert found.kind == "DeepseekV3MoE"


def test_everything_is_drawn_inside_and_no_box_lies_over_another() -> None:
    report = sound()
    report.findings = [error(name="model.layers.3.mlp.up_proj.weight"), error(name="model.layers.0.mlp")]
    picture = picture_of(report)
    assert picture is not None
    for drawing in drawings_of(picture.parts):
        for box in drawing.boxes:
            for badge in box.badges:
                assert box.x < badge.x < box.x + box.width
                assert box.y < badge.y < box.y + box.height
            assert all(0 <= word.x <= drawing.width for word in box.words)
            assert box.y >= 0
            assert box.y + box.height <= drawing.height
        for box in drawing.boxes:
            for other in drawing.boxes:
                assert box is other or _apart(box, other) or _within(box, other) or _within(other, box)


def _apart(one: Placed, other: Placed) -> bool:
    return one.y + one.height <= other.y or other.y + other.height <= one.y


def _within(inner: Placed, outer: Placed) -> bool:
    return (
        outer.x < inner.x
        and inner.x + inner.width < outer.x + outer.width
        and outer.y < inner.y
        and inner.y + inner.height < outer.y + outer.height
    )


def test_a_badge_stands_in_the_group_of_its_module_and_leads_to_the_finding() -> None:
    report = sound()
    report.findings = [error(name="model.layers.3.mlp.up_proj.weight", file="plan.yaml", line=3, fix="mend it")]
    page = page_of(report)
    (group,) = re.findall(r'<g data-module="mlp\.up_proj" class="wrong">.*?</g>', page, re.DOTALL)
    assert 'href="#finding-1"' in group
    (article,) = re.findall(r'<article class="finding error" id="finding-1">.*?</article>', page, re.DOTALL)
    for told in ("it is wrong", "PP102", "plan.yaml:3", "mend it", "model.layers.3.mlp.up_proj.weight"):
        assert told in article


def test_names_out_of_a_plan_are_escaped() -> None:
    hostile = "<script>alert('x')</script>\x1b[31m\"&"
    report = sound()
    report.findings = [error(rule=hostile, name=hostile, file=hostile, found=hostile, expected=hostile, fix=hostile)]
    report.target = report.plan = report.no_cost = hostile
    assert report.flow is not None
    told = Value(module="model.norm", shape=(1,), marked=hostile, letters={"tp": "<b>"})
    report.flow = replace(report.flow, steps=(*report.flow.steps, told))
    page = page_of(report)
    balance = read(page)
    assert (balance.open, balance.wrong) == ([], [])
    assert "script" not in {tag for tag, _ in balance.tags}
    assert "\x1b" not in page
    assert hostile.replace("\x1b", "\\x1b") in balance.text
    assert html.escape("<b>") in page


def test_a_plan_that_does_not_fit_is_drawn_without_letters() -> None:
    report = verify_plan(llama(), {"tp_plan": {"model.norm": "replicate"}}, tp=2, cost=None)
    assert not report.ok
    page = page_of(report)
    assert "not sound" in page
    assert "nothing has a letter" in page
    assert '<rect class="chip-ground' not in page
    assert badges_of(report)


def test_a_model_of_ones_own_is_drawn() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    report = verify_plan(model, {"tp_plan": {"0": "colwise", "2": "rowwise"}}, tp=2, level="geometry", cost=None)
    balance = read(page_of(report))
    assert (balance.open, balance.wrong) == ([], [])
    assert "[16@tp, 8]" in balance.text


@pytest.mark.parametrize(
    ("config", "sizes"),
    [("deepseek-v3", {"tp": 8, "ep": 64}), ("qwen3-next-80b-a3b", {"tp": 2}), ("minimax-text-01", {"tp": 8})],
)
def test_pages_of_large_models_stay_small(config: str, sizes: dict[str, int]) -> None:
    path = Path(__file__).resolve().parents[1] / "configs" / "models" / f"{config}.json"
    report = verify_plan(AutoConfig.from_pretrained(path), level="geometry", cost=None, **sizes)
    assert report.ok
    assert len(page_of(report).encode()) < LARGEST


def test_costs_and_sizes_are_on_the_page() -> None:
    report = verify_plan(llama(), tp=2)
    assert report.ok
    text = read(page_of(report)).text
    for told in ("What numerics ran", "cost: collectives of rank 0", "cost: memory of a rank", "inference", "training"):
        assert told in text
    assert report.simulated is not None
    for name, (whole, small) in report.simulated.sizes.items():
        assert re.search(rf"{name}\s*{whole:,}\s*{small:,}", text)


def test_what_a_step_says_is_drawn_in_both_directions() -> None:
    report = verify_plan(llama(), tp=2, level="layouts", cost=None)
    assert report.levels["layouts"] == "passed"
    boxes = {box.name: box for box in boxes_of(report)}
    assert [(each.op, each.count) for each in boxes["self_attn.q_proj"].backward] == [("all_reduce", 1)]
    assert [(each.op, each.count) for each in boxes["mlp.down_proj"].forward] == [("all_reduce", 1)]
    value = boxes["mlp.up_proj"].value
    assert value is not None
    assert (value.letters["tp"][0], value.marked.endswith(", 96@tp]")) == ("S", True)
    balance = read(page_of(report))
    shapes = [attributes.get("d") or tag for tag, attributes in balance.tags if attributes.get("class") == "mark"]
    assert sum(shape == "circle" for shape in shapes) == 4  # embeddings, attention, feed-forward, head
    assert sum(shape != "circle" for shape in shapes) == 3


def test_layers_are_told_as_runs() -> None:
    assert layers_told(("h.4",)) == "1 layer: 4"
    assert layers_told(("h.0", "h.1", "h.3", "h.5", "h.6")) == "5 layers: 0 to 1, 3, 5 to 6"
    assert layers_told(tuple(f"h.{index}" for index in range(0, 12, 2))) == "6 layers: 0, 2, 4, 6, ..."


def test_a_page_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.html"
    write_page(sound(), path)
    first = path.read_text(encoding="utf-8")
    assert first.rstrip().endswith("</html>")
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()
    monkeypatch.setattr("parallel_plans.verify.page.page_of", lambda report: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_page(sound(), path)
    assert path.read_text(encoding="utf-8") == first
    assert os.listdir(tmp_path) == ["out.html"]


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_place_that_cannot_be_written_is_refused_and_left_alone(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "no" / "such.html", Path("/dev/null"), tmp_path / ("x" * 300)):
        with pytest.raises(PageError, match=re.escape(str(path))):
            try_place(path)
    assert os.listdir(tmp_path) == []
    assert Path("/dev/null").is_char_device()


def test_report_writes_the_page_and_keeps_the_exit_status(tmp_path: Path) -> None:
    plan = tmp_path / "wrong.yaml"
    text = (bundled_folder() / "llama.yaml").read_text(encoding="utf-8")
    plan.write_text(text.replace("  model.norm: replicate\n", ""), encoding="utf-8")
    page = tmp_path / "out.html"
    done = CliRunner().invoke(app, ["llama", "--plan", str(plan), "--report", str(page)])
    assert done.exit_code == 1
    assert "PP102" in page.read_text(encoding="utf-8")


def test_report_ends_with_2_and_one_line_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("parallel_plans.cli.verify.read_target", lambda *_: 1 / 0)
    done = CliRunner().invoke(app, ["llama", "--report", str(tmp_path / "no" / "such.html")])
    assert (done.exit_code, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert "such.html: the page cannot be written: No such file or directory" in done.stderr
