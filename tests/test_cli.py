"""The command line: what it prints, and what it ends with."""

from __future__ import annotations

import json
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


def test_show_gives_every_parameter_its_shape_style_and_bytes() -> None:
    config = next(path for path in CONFIGS if path.stem == "llama-3.1-8b")
    done = CliRunner().invoke(app, ["show", str(config), "--tp", "8"])
    assert done.exit_code == 0, done.output
    rows = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert "model.layers.*.mlp.down_proj.weight 32 [4096, 14336@tp] rowwise 939,524,096 line 13" in rows
    assert "whole model 32,121,044,992 bytes, 100.0% of them split" in rows
    assert "a rank holds 4,016,062,464 bytes at most, 12.5% of the whole" in rows


def test_show_ends_with_1_where_the_plan_does_not_fit_and_says_why() -> None:
    config = next(path for path in CONFIGS if path.stem == "gemma-3-1b")
    done = CliRunner().invoke(app, ["show", str(config), "--tp", "2"])
    assert done.exit_code == 1
    assert "expected  at least one unit per rank: 1 unit of 256, tp = 2" in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("target", ["/nowhere", "no_such_type", "empty.json", "whisper"])
def test_show_ends_with_2_and_one_line_where_there_is_nothing_to_ask_about(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["show", target, "--plan", "auto"])
    assert done.exit_code == 2
    assert done.stderr.startswith((target, "there is no plan"))
    assert "Traceback" not in done.output


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_bundled_plan_splits_published_sizes_on_as_many_ranks_as_there_are_key_value_heads(path: Path) -> None:
    fields = json.loads(path.read_text())
    ranks = fields.get("num_key_value_heads", fields["num_attention_heads"])
    assert AutoConfig.from_pretrained(path).model_type == fields["model_type"]
    target = read_target(str(path))
    table = resolve(load_plan(bundled_folder() / f"{fields['model_type']}.yaml"), target.spec, {"tp": ranks})
    left = [info.bytes for name, info in target.spec.parameters.items() if is_left_whole(fields["model_type"], name)]
    assert table.sharded_bytes / (target.spec.bytes - sum(left)) > 0.999
    held = [table.rank_bytes({"tp": rank}) for rank in range(ranks)]
    assert sum(held) >= target.spec.bytes
    assert max(held) <= 1.01 * target.spec.bytes / ranks + (target.spec.bytes - table.sharded_bytes)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_config_makes_a_model_of_the_published_number_of_parameters(name: str) -> None:
    described = read_target(str(next(path for path in CONFIGS if path.stem == name))).spec
    assert (
        sum(p.bytes // p.itemsize for own, p in described.parameters.items() if own not in described.tied)
        == (PUBLISHED[name])
    )
