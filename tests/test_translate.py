"""Plans of the classes of transformers as plan files, and plans for transformers and torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers.distributed import DistributedConfig
from typer.testing import CliRunner, Result

from parallel_plans import LaunchError, load_plan
from parallel_plans.cli.main import app
from parallel_plans.cli.target import read_target
from parallel_plans.importing import imported
from parallel_plans.lookup import carried_plan
from parallel_plans.model_spec import ModelSpec
from parallel_plans.plan import Plan
from parallel_plans.resolve import resolve

EXPERTS = {"tp": 2, "ep": 2}


def run(*words: str) -> Result:
    return CliRunner().invoke(app, list(words))


def layouts(plan: Plan, spec: ModelSpec, sizes: dict[str, int]) -> dict[str, tuple[str, str]]:
    """How every parameter lies, and by what style."""
    entries = resolve(plan, spec, sizes).parameters
    return {name: (str(entry.layout), entry.style.name) for name, entry in entries.items()}


@pytest.mark.parametrize(("kind", "sizes"), [("llama", {"tp": 2}), ("phi3", {"tp": 2}), ("mixtral", EXPERTS)])
def test_an_imported_plan_names_every_parameter_and_lays_it_out_as_the_class_does(
    kind: str, sizes: dict[str, int], tmp_path: Path
) -> None:
    file = tmp_path / "plan.yaml"
    assert run("import", kind, "-o", str(file)).exit_code == 0
    target, plan = read_target(kind), load_plan(file)
    assert not any("**" in rule.pattern for section in plan.sections for rule in plan.rules(section))
    assert layouts(plan, target.spec, sizes) == layouts(carried_plan(target.spec, target.carried), target.spec, sizes)
    for line in file.read_text().splitlines():
        if "replicate" in line:
            assert "@" not in line
    assert "  model.layers.*.self_attn.o_proj: rowwise  # [4096, 4096@tp]\n" in file.read_text() or kind == "phi3"


def test_an_imported_plan_is_right_where_the_head_is_tied_and_the_class_forgot_the_embedding(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt_neox", "tie_word_embeddings": True}))
    done = run("import", str(tmp_path))
    assert done.exit_code == 0
    assert yaml.safe_load(done.stdout)["tp_plan"]["gpt_neox.embed_in"] == "embedding_rowwise"


def test_what_a_class_says_and_does_not_do_stands_in_a_comment() -> None:
    done = run("import", "gemma2")
    target = read_target("gemma2")
    dropped = carried_plan(target.spec, target.carried).dropped
    assert [line for line in done.stdout.splitlines() if line.startswith("# Left out")] == [
        f"# Left out, since it does nothing in this model: {rule.pattern}: {rule.style}" for rule in dropped
    ]


def test_a_class_without_a_plan_has_nothing_to_import() -> None:
    done = run("import", "gpt2")
    assert (done.exit_code, done.stdout) == (2, "")
    target = read_target("gpt2")
    with pytest.raises(LaunchError) as caught:
        imported(target.spec, target.carried)
    assert caught.value.findings[0].code == "PP704"


@pytest.mark.parametrize("kind", ["llama", "qwen3", "mixtral", "deepseek_v3"])
def test_transformers_takes_an_exported_plan_and_it_says_what_the_class_says_of_what_is_split(kind: str) -> None:
    done = run("export", kind, "--to", "transformers")
    assert done.exit_code == 0, done.output
    exported, target = json.loads(done.stdout), read_target(kind)
    plan = exported["tp_plan"]
    given, _, _ = target.model._resolve_parallel_plans(DistributedConfig(tp_size=2, **exported))
    assert {name for name, _ in target.model.named_parameters()} <= {*given, *(f"{name}.weight" for name in given)}
    differing = {name: (plan.get(name), style) for name, style in target.carried.tp.items() if plan.get(name) != style}
    names = dict(target.model.named_modules())
    assert all(name.replace("*", "0") not in names for name in differing), differing


def test_experts_are_exported_as_transformers_deals_them() -> None:
    done = run("export", "mixtral", "--to", "transformers", "--ep", "2")
    exported = json.loads(done.stdout)
    assert exported["ep_plan"] == dict(read_target("mixtral").carried.ep)


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (("qwen3", "--to", "torch"), "PP801", "torch has no style that does what replicated_with_grad_allreduce does"),
        (("gpt_oss", "--to", "transformers"), "PP801", "transformers has nothing like the option interleaved: True"),
        (("gpt_oss", "--to", "transformers"), "PP801", "transformers adds what is whole on every rank everywhere"),
        (("jetmoe", "--to", "transformers"), "PP801", "transformers has no style"),
        (("llama", "--to", "torch", "--tp", "3"), "PP802", "[4096@tp, 4096], 1408 + 1408 + 1280 on 3 ranks"),
        (("llama", "--to", "transformers", "--tp", "3"), "PP802", "transformers would cut dim 0 elsewhere"),
        (("gemma2", "--to", "torch"), "PP802", "torch would make two parameters of this one and model.embed_tokens"),
    ],
)
def test_what_a_framework_cannot_express_is_told_and_nothing_is_written(
    words: tuple[str, ...], code: str, told: str, tmp_path: Path
) -> None:
    file = tmp_path / "plan"
    done = run("export", *words, "-o", str(file))
    assert done.exit_code == 1
    assert f"[{code}]" in done.stderr
    assert told in done.stderr
    assert not file.exists()


def test_layers_of_one_form_under_different_rules_cannot_be_exported(tmp_path: Path) -> None:
    text = Path("plans/llama.yaml").read_text(encoding="utf-8")
    first = "  model.layers.0.mlp.gate_proj: replicate\n  model.layers.0.mlp.up_proj: replicate\n"
    first += "  model.layers.0.mlp.down_proj: replicate\n"
    file = tmp_path / "plan.yaml"
    file.write_text(text.replace("tp_plan:\n", f"tp_plan:\n{first}"))
    done = run("export", str(file), "--to", "torch")
    assert done.exit_code == 1
    assert "torch cannot tell layers of one form apart [PP802]" in done.stderr


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("llama", "--to", "jax"), "--to is jax; it can be transformers or torch"),
        (("no_such_plan", "--to", "torch"), "PP001"),
    ],
)
def test_a_question_that_cannot_be_asked_ends_with_two(words: tuple[str, ...], told: str) -> None:
    done = run("export", *words)
    assert (done.exit_code, done.stdout) == (2, "")
    assert told in done.stderr


def made(text: str) -> Any:
    """The plan that exported Python text makes."""
    space: dict[str, Any] = {}
    exec(text, space)
    return space["plan"]


def test_exported_python_makes_styles_of_torch() -> None:
    plan = made(run("export", "llama", "--to", "torch").stdout)
    assert {type(style).__name__ for style in plan.values()} == {"ColwiseParallel", "RowwiseParallel"}
    assert "model.norm" not in plan
