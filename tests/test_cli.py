"""The command line: what it prints, and what it ends with."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from tiny import is_left_whole
from transformers import AutoConfig
from typer.testing import CliRunner

from parallel_plans.cli.main import app
from parallel_plans.cli.target import read_target
from parallel_plans.loader import load_plan
from parallel_plans.lookup import bundled_folder, bundled_types
from parallel_plans.resolve import resolve
from parallel_plans.table import Table

PUBLISHED = {  # parameters of the published checkpoints
    "deepseek-v2-lite": 15_706_484_224,
    "granite-3.0-1b-a400m": 1_334_628_352,
    "hunyuan-a13b": 80_393_183_232,
    "mixtral-8x7b": 46_702_792_704,
    "olmoe-1b-7b": 6_919_161_856,
    "phi-3.5-moe": 41_873_153_344,
    "qwen1.5-moe-a2.7b": 14_315_784_192,
    "qwen3-30b-a3b": 30_532_122_624,
}
CONFIGS = sorted((Path(__file__).resolve().parents[1] / "configs" / "models").glob("*.json"))


def test_list_names_every_plan_that_ships() -> None:
    done = CliRunner().invoke(app, ["list"])
    assert done.exit_code == 0
    assert [line.split()[0] for line in done.stdout.splitlines()[1:]] == list(bundled_types())


def rows_of(printed: str) -> list[str]:
    """The lines of a tree without its branches, with one space between cells."""
    return [" ".join(line.lstrip("|`- ").split()) for line in printed.splitlines()]


def test_show_gives_every_parameter_its_shape_style_and_bytes() -> None:
    config = next(path for path in CONFIGS if path.stem == "llama-3.1-8b")
    done = CliRunner().invoke(app, ["show", str(config), "--tp", "8", "--no-cost"])
    assert done.exit_code == 0, done.output
    rows = rows_of(done.stdout)
    assert "down_proj.weight 32 [4096, 14336@tp] S@tp; out P -> I@tp rowwise 939,524,096 line 14" in rows
    tree = [row.split()[0] for row in rows[rows.index("") + 2 :] if row]
    assert tree[:6] == ["llama", "model", "embed_tokens.weight", "layers.*", "self_attn", "q_proj.weight"]
    assert "whole model 32,121,044,992 bytes, 100.0% of them split" in rows
    assert "a rank holds 4,016,062,464 bytes at most, 12.5% of the whole" in rows


def test_show_takes_fields_of_the_config() -> None:
    done = CliRunner().invoke(
        app, ["show", "llama", "--set", "num_hidden_layers=3", "--set", "vocab_size=64", "--no-cost"]
    )
    assert done.exit_code == 0, done.output
    rows = rows_of(done.stdout)
    assert any(row.startswith("layers.* 3 ") for row in rows)
    assert any(row.startswith("embed_tokens.weight 1 [64@tp, 4096]") for row in rows)
    wrong = CliRunner().invoke(app, ["show", "llama", "--set", "vocab_size", "--no-cost"])
    assert wrong.exit_code == 2
    assert "expected key=value" in wrong.stderr


def test_show_says_where_the_sequence_is_split() -> None:
    done = CliRunner().invoke(app, ["show", "qwen3_moe", "--tp", "2", "--sp", "--no-cost"])
    assert done.exit_code == 0, done.output
    whole = "model.layers.*.self_attn, model.layers.*.mlp"
    told = f"tokens split before model.layers.0; whole within {whole}; whole after model.norm\n"
    assert told in done.output
    assert re.search(r"input_layernorm.weight +\d+ +\[2048\] .* sequence_parallel ", done.output)


def test_show_tells_collectives_where_they_are_and_of_a_layer_and_of_the_model() -> None:
    """Half a MiB is 128 tokens of 2048 in bfloat16; every layer reduces twice each way, and embeddings once."""
    done = CliRunner().invoke(app, ["show", "qwen3_moe", "--tokens", "128"])
    assert done.exit_code == 0, done.output
    rows = {row.split()[0]: row for row in rows_of(done.stdout) if row}
    a_layer = "[2 all_reduce@tp 1.0 MiB a layer]"
    assert rows["layers.*"].endswith(f"{a_layer} {a_layer}")
    assert rows["embed_tokens.weight"].endswith("all_reduce@tp 512.0 KiB")
    assert "in I -> R@tp, out P -> I@tp moe_experts_allreduce" in rows["experts"]
    told = done.stdout.splitlines()[-1]
    assert told.startswith(
        "a training step on 1 x 128 tokens in bfloat16: forward 49 all_reduce@tp 24.5 MiB, all_gather"
    )


def test_show_takes_a_plan_for_the_type_that_it_names(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text((bundled_folder() / "llama.yaml").read_text().replace("q_proj: ", "q_proj:  "))
    done = CliRunner().invoke(app, ["show", str(path), "--no-cost"])
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[:2] == ["model  llama, llama", f"plan   {path}"]


def test_show_says_why_there_are_no_collectives_where_a_model_cannot_be_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*given: object) -> None:
        raise RuntimeError("no shapes")

    monkeypatch.setattr("parallel_plans.cli.show.step_of", fails)
    done = CliRunner().invoke(app, ["show", "llama"])
    assert done.exit_code == 0, done.output
    assert done.stdout.endswith("collectives: the model could not be traced: RuntimeError: no shapes\n")
    assert "backward" not in done.stdout


def test_show_says_how_experts_are_dealt_and_by_which_rules() -> None:
    config = next(path for path in CONFIGS if path.stem == "mixtral-8x7b")
    done = CliRunner().invoke(app, ["show", str(config), "--tp", "4", "--ep", "2", "--etp", "2", "--no-cost"])
    assert done.exit_code == 0, done.output
    rows = rows_of(done.stdout)
    assert "ranks 4 hold it once: tp = 4, ep = 2, etp = 2" in rows
    assert (
        "gate_up_proj 32 [8@ep, 28672@etp, 4096] S@etp S@ep moe_tp_gate_up_colwise and grouped_gemm"
        " 30,064,771,072 line 13 and 22" in rows
    )
    assert "a rank holds 46,706,737,152 bytes at most, 25.0% of the whole" in rows


def test_show_takes_the_section_that_fits_the_sizes() -> None:
    config = next(path for path in CONFIGS if path.stem == "mixtral-8x7b")
    lines = {}
    for sizes in (("--tp", "8", "--ep", "8"), ("--tp", "1", "--ep", "8")):
        done = CliRunner().invoke(app, ["show", str(config), *sizes, "--no-cost"])
        assert done.exit_code == 0, done.output
        (row,) = (row for row in rows_of(done.stdout) if "gate_up_proj" in row)
        name, times, *_, held, _, lines[sizes] = row.split(" ")
        assert (name, times, held) == ("gate_up_proj", "32", "15,032,385,536")
        assert re.search(r"\[8@ep, 28672, 4096\] .* grouped_gemm", row)
    rules = (bundled_folder() / "mixtral.yaml").read_text().splitlines()
    sections = [next(line for line in rules[: int(line)][::-1] if not line.startswith(" ")) for line in lines.values()]
    assert sections == ["ep_plan:", "dispatch_plan:"]


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        (("--tp", "4", "--ep", "3"), "lie across each other [PP702]"),
        (("--tp", "3", "--ep", "4"), "lie across each other [PP702]"),
        (("--tp", "4", "--etp", "3"), "etp_size=3 does not divide tp_size=4 [PP702]"),
    ],
)
def test_show_ends_with_2_where_the_sizes_do_not_fit_together(sizes: tuple[str, ...], words: str) -> None:
    done = CliRunner().invoke(app, ["show", "mixtral", *sizes])
    assert (done.exit_code, done.stdout) == (2, "")
    assert words in done.stderr
    assert "; fix: pass " in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_show_ends_with_1_where_the_plan_deals_no_experts() -> None:
    done = CliRunner().invoke(app, ["show", "llama", "--tp", "2", "--ep", "2"])
    assert (done.exit_code, done.stdout) == (1, "")
    assert "an ep_plan is asked for [PP108]" in done.stderr


def test_show_ends_with_1_where_the_plan_does_not_fit_and_says_why() -> None:
    config = next(path for path in CONFIGS if path.stem == "gemma-3-1b")
    done = CliRunner().invoke(app, ["show", str(config), "--tp", "8"])
    assert done.exit_code == 1
    assert "expected  at least one unit per rank: 4 units of 256, tp = 8" in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("target", ["/nowhere", "no_such_type", "empty.json", "vit"])
def test_show_ends_with_2_and_one_line_where_there_is_nothing_to_ask_about(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["show", target, "--plan", "auto"])
    assert done.exit_code == 2
    assert done.stderr.startswith((target, "there is no plan"))
    assert "Traceback" not in done.output


def heads_to_deal(path: Path) -> int:
    """Key/value heads of a published config."""
    fields = json.loads(path.read_text())
    return int(fields.get("num_key_value_heads", fields["num_attention_heads"]))


def bundled_table(path: Path, **sizes: int) -> Table:
    """The table of a published config under the plan that ships for it."""
    model_type = json.loads(path.read_text())["model_type"]
    assert AutoConfig.from_pretrained(path).model_type == model_type
    return resolve(load_plan(bundled_folder() / f"{model_type}.yaml"), read_target(str(path)).spec, sizes)


@pytest.mark.parametrize("path", [path for path in CONFIGS if heads_to_deal(path) > 1], ids=lambda path: path.stem)
def test_a_bundled_plan_splits_published_sizes_on_as_many_ranks_as_there_are_key_value_heads(path: Path) -> None:
    ranks = heads_to_deal(path)
    table = bundled_table(path, tp=ranks)
    whole, kind = table.spec.bytes, table.spec.model_type
    left = [info.bytes for name, info in table.spec.parameters.items() if is_left_whole(str(kind), name)]
    assert table.sharded_bytes / (whole - sum(left)) > 0.999
    held = [table.rank_bytes({"tp": rank}) for rank in range(ranks)]
    assert sum(held) >= whole
    assert max(held) <= 1.01 * whole / ranks + (whole - table.sharded_bytes)


@pytest.mark.parametrize("path", [path for path in CONFIGS if heads_to_deal(path) == 1], ids=lambda path: path.stem)
def test_a_model_with_one_key_value_head_lies_whole_on_its_only_rank(path: Path) -> None:
    table = bundled_table(path, tp=1)
    assert table.sharded_bytes == 0
    assert table.rank_bytes({"tp": 0}) == table.spec.bytes


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_config_makes_a_model_of_the_published_number_of_parameters(name: str) -> None:
    described = read_target(str(next(path for path in CONFIGS if path.stem == name))).spec
    assert (
        sum(p.bytes // p.itemsize for own, p in described.parameters.items() if own not in described.tied)
        == (PUBLISHED[name])
    )
