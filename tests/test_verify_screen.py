"""What `verify_tp_plan` prints for a person: one screen, all that is promised on it, nothing but text in a pipe."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import AutoConfig
from typer.testing import CliRunner

from parallel_plans import Finding, verify_plan
from parallel_plans.cli.screen import MOST, Screen, console_for
from parallel_plans.cli.verify import app
from parallel_plans.lookup import bundled_folder
from parallel_plans.verify.flow import Flow, Mark, Value
from parallel_plans.verify.report import LEVELS, Report


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


class Ascii(io.StringIO):
    """A pipe that takes nothing but ASCII."""

    encoding = "ascii"


def llama() -> Any:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 8, "num_key_value_heads": 4}
    return AutoConfig.for_model("llama", **sizes, num_hidden_layers=5, vocab_size=101)


@pytest.fixture(scope="module")
def sound() -> Report:
    report = verify_plan(llama(), tp=2)
    letters = {"tp": "S(2)"}
    told = Value(module="model.layers.0.mlp.up_proj", shape=(1, 7, 48), marked="[1, 7, 96@tp]", letters=letters)
    mark = Mark(module="lm_head", op="all_gather", axis="tp", bytes=2048, backward=False)
    report.flow = Flow(steps=(told, mark), times={"model.layers.0": 5})
    return report


def text_of(report: Report, *, verbose: bool = False, stream: io.StringIO | None = None) -> str:
    stream = stream or io.StringIO()
    Screen(report, console_for(stream), verbose).show()
    return stream.getvalue()


def wrong(**fields: Any) -> Finding:
    code = {"numerics": "PP401", "geometry": "PP201"}.get(fields.get("level", ""), "PP102")
    return Finding(code=code, **{"message": "it is wrong", **fields})


def bare(*findings: Finding) -> Report:
    report = Report(target="x", plan="y", mesh={"tp": 2})
    for level in LEVELS:
        found = [each for each in findings if each.level == level]
        if found:
            report.settle(level, found)
    return report


def test_a_sound_plan_is_told_on_one_screen(sound: Report) -> None:
    lines = text_of(sound).splitlines()
    assert len(lines) <= 24
    assert lines[:3] == ["model  llama", f"plan   {sound.plan}", "ranks  tp = 2, ep = 1"]
    assert lines[-1] == "sound"
    (accounting,) = (line for line in lines if line.startswith("  accounting  passed   "))
    assert f"whole model {sound.parameters.total_bytes:,} bytes" in accounting
    assert f"a rank holds {max(sound.parameters.per_rank_bytes):,} at most" in accounting
    told = "\n".join(lines)
    for words in ("geometry    passed   12 forms of parameters, 9 of them split", "simulated: tp = 2", "forward: ",
                  "memory of a rank: inference"):  # fmt: skip
        assert words in told, told


def test_verbose_shows_every_table(sound: Report) -> None:
    told = text_of(sound, verbose=True)
    assert sound.table is not None
    assert sound.simulated is not None
    for form, entries in sound.table.by_form().items():
        assert any(form in line and str(entries[0].layout) in line for line in told.splitlines())
    rows = [" ".join(line.split()) for line in told.splitlines()]
    assert "model.layers.0.mlp.up_proj [1, 7, 96@tp] S(2)@tp" in rows
    assert "lm_head all_gather over tp, forward 2.0 KiB" in rows
    for name, (whole, small) in sound.simulated.sizes.items():
        assert f"{name} {whole:,} {small:,}" in rows
    assert any(row.startswith("training ") for row in rows)


def test_a_pipe_gets_no_escape_codes_and_no_folded_lines(sound: Report) -> None:
    report = bare(wrong(fix="x" * 400, rule="model.\x1b[31m"))
    for told in (text_of(sound, verbose=True), text_of(report)):
        assert "\x1b" not in told
        assert not any(line != line.rstrip() for line in told.splitlines())
    assert "  fix       " + "x" * 400 in text_of(report)
    assert "rule      model.\\x1b[31m" in text_of(report)


def test_a_terminal_gets_colours_unless_it_asks_for_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[31m" in text_of(bare(wrong()), stream=Terminal())
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[31m" not in text_of(bare(wrong()), stream=Terminal())


@pytest.mark.parametrize("width", [40, 80])
def test_lines_fit_a_terminal(sound: Report, width: int) -> None:
    stream = Terminal()
    report = bare(wrong(fix="one word after the other " * 20, name="model.layers.0.self_attn.q_proj.weight"))
    for each in (report, sound):
        Screen(each, Console(file=stream, width=width, markup=False, highlight=False, no_color=True)).show()
    assert all(len(_plain(line)) <= width for line in stream.getvalue().splitlines())


def _plain(line: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", line)


def test_what_an_encoding_lacks_is_spelled_out() -> None:
    stream = Ascii()
    report = bare(wrong(rule="model.gr\u00f6\u00dfe", file="pl\u00e4ne.yaml", line=3))
    Screen(report, Console(file=stream, width=80, markup=False, highlight=False)).show()
    assert stream.getvalue().isascii()
    assert "pl\\xe4ne.yaml:3:" in stream.getvalue()


def test_findings_stand_in_groups_errors_first_and_numbered() -> None:
    report = bare(
        wrong(level="accounting", severity="warning", message="a warning"),
        wrong(level="geometry", message="first", file="p.yaml", line=4, rule="a.b", name="a.b.weight", found="[3, 5]",
              expected="a number", fix="mend it"),
        wrong(level="geometry", message="second"),
        wrong(level="numerics", message="third"),
    )  # fmt: skip
    lines = text_of(report).splitlines()
    told = [line for line in lines if line[:1] not in ("", " ")]
    assert told[3:] == ["geometry: 2 errors", "numerics: 1 error", "accounting: 1 warning", "not sound"]
    start = lines.index("  1. error: p.yaml:4: first [PP201]")
    assert lines[start + 1 : start + 5] == [
        "       rule      a.b",
        "       on        a.b.weight [3, 5]",
        "       expected  a number",
        "       fix       mend it",
    ]
    assert [line.strip()[:2] for line in lines if line.strip()[:1].isdigit()] == ["1.", "2.", "3.", "4."]
    assert any(line.split() == ["layouts", "not", "run", "only", "where", "geometry", "passed"] for line in lines)


def test_many_findings_are_cut_short_unless_one_asks_for_all() -> None:
    report = bare(*(wrong(message=f"number {index}") for index in range(MOST + 3)))
    assert "and 3 findings more; --verbose shows all" in text_of(report)
    assert f"number {MOST}" not in text_of(report)
    assert f"number {MOST + 2}" in text_of(report, verbose=True)
    assert f"accounting: {MOST + 3} errors" in text_of(report)


def test_the_command_prints_findings_with_their_place(tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    text = (bundled_folder() / "llama.yaml").read_text(encoding="utf-8")
    path.write_text(text.replace("q_proj", "query"), encoding="utf-8")
    for arguments in ((), ("-v",), ("--verbose",)):
        done = CliRunner().invoke(app, ["llama", "--plan", str(path), *arguments])
        assert done.exit_code == 1
        assert "  accounting  failed   2 errors" in done.stdout
        assert f"error: {path}:7: the rule matches nothing in the model [PP101]" in done.stdout
        assert done.stdout.endswith("\nnot sound\n")
