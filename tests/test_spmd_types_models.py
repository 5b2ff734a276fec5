"""Whole models under a plan, typed by `spmd-types`: it accepts what the level layouts proves, and refuses mistakes too.

The model runs as a rank runs it, with the boundaries that the plan gives it. spmd-types is told the letters of
parameters (V for those of which a rank has a part, I for the others), and what each change of letter does; all else
it finds by itself. These are its "local" types, which have V for any part: no dims, blocks or sizes.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from first_rank import RANKS, first_rank
from tiny import tiny_model, tokens
from torch import Tensor

from parallel_plans import joint, lanes, parallelize, sums, transitions, verify_plan
from parallel_plans.collectives import Axis
from parallel_plans.lookup import bundled_folder
from parallel_plans.sums import no_sum_scope

spmd = pytest.importorskip("spmd_types")
pytest.importorskip("spmd_types.checker")

# A change of letter -> what spmd-types may have before it, and has after it. It has V for what a contraction of parts
# leaves, until something says that it is a sum.
CHANGES = {
    "_Replicate": ("I", "R"),
    "_Reduce": ("PV", "I"),
    "_ReduceForUse": ("PV", "R"),
    "_Gather": ("V", "I"),
    "_TakeOwn": ("I", "V"),
    "_GatherForUse": ("V", "R"),
    "_ScatterSum": ("PV", "V"),
}


@pytest.fixture
def _changes_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """spmd-types knows what the changes of letter do that boundaries make."""

    def change(result: Any, before: str, after: str, value: Tensor) -> None:
        found = _letter_of(value)
        if found not in before:
            raise spmd.SpmdTypeError(f"{found} is changed to {after} as if it were {before}")
        spmd.rules.ignore(value)
        spmd.assert_type(result, {_axis(): getattr(spmd, after)})

    def told(before: str, after: str) -> Any:
        return staticmethod(lambda result, *, value: change(result, before, after, value))

    def together(results: Any, *, values: tuple[Tensor, ...]) -> None:
        for result, value in zip(results, values, strict=True):
            change(result, "I", "R", value)

    for name, letters in CHANGES.items():
        monkeypatch.setattr(getattr(transitions, name), "spmd_typecheck", told(*letters), raising=False)

    def reduced(value: Tensor, axis: Axis, *, in_place: bool = False) -> Tensor:
        return transitions._Reduce.apply(value, axis)

    for module in (sums, lanes):
        monkeypatch.setattr(module, "reduce", reduced)  # never behind autograd, where a checker sees nothing
    # the long way, which a checker can follow
    monkeypatch.setattr(transitions, "_replicated", lambda *given: transitions._Replicate.apply(*given))
    monkeypatch.setattr(transitions, "_gathered", lambda *given: transitions._Gather.apply(*given))
    monkeypatch.setattr(joint, "_replicated_together", lambda *given: joint._ReplicateTogether.apply(*given))
    kind = joint._ReplicateTogether
    monkeypatch.setattr(kind, "spmd_typecheck", staticmethod(together), raising=False)


def _axis() -> Any:
    return dist.group.WORLD


def _letter_of(value: Tensor) -> str:
    kind = spmd.get_axis_local_type(value, _axis())
    return next(letter for letter in "RIVP" if getattr(spmd, letter) is kind)


def _typed(model_type: str, plan: Path) -> tuple[str, str]:
    """The letters of loss and logits of a tiny model, as spmd-types has them; raises what it raises."""
    model, batch = tiny_model(model_type, tied=False), tokens()
    sizes = {name: parameter.shape for name, parameter in model.named_parameters()}
    with first_rank() as mesh, no_sum_scope():
        parallelize(model, plan, mesh, storage="local")
        with spmd.set_current_mesh(mesh), spmd.checker.typecheck(local=True):
            for name, parameter in model.named_parameters():
                letter = spmd.I if parameter.shape == sizes[name] else spmd.V
                spmd.assert_type(parameter, {_axis(): letter})
            for value in (*model.buffers(), batch):
                spmd.assert_type(value, {_axis(): spmd.I})
            output = model(input_ids=batch, labels=batch, use_cache=False)
            output.loss.backward()  # it looks at the letter of the loss
            return _letter_of(output.loss), _letter_of(output.logits)


WHOLE_MODELS = ("llama", "qwen3", "qwen3_moe")


@pytest.mark.usefixtures("_changes_are_told")
@pytest.mark.parametrize("model_type", WHOLE_MODELS)
def test_a_plan_that_is_proven_is_accepted_by_spmd_types(model_type: str) -> None:
    plan = bundled_folder() / f"{model_type}.yaml"
    config = tiny_model(model_type, tied=False).config
    assert verify_plan(config, plan, tp=RANKS, level="layouts", cost=None).levels["layouts"] == "passed"
    assert _typed(model_type, plan) == ("I", "I")


# what is wrong, model type, what is replaced, by what, the letters that spmd-types finds at fault
MISTAKES = (
    ("experts whose sums nobody adds up", "qwen3_moe", r"(mlp.experts): \w+", r"\1: local_params", "[I, V, I]"),
    ("an attention whose sums nobody adds up", "llama", r"(model.layers.*.self_attn.o_proj): .*",
     r"\1.weight: rowwise\n  \1.bias: replicate", "[V, V, I]"),
    ("a gradient that is never summed, of a norm", "qwen3", r"(q_norm): \w+", r"\1: replicate", "[I, V]"),
    ("a gradient that is never summed, of what experts are handed", "qwen3_moe", r"(mlp.experts): \w+",
     r"\1: all_reduce", "[I, V, I]"),
    ("a whole value that is summed", "llama", r"  (model.norm)", r"  model.layers.*.mlp: all_reduce\n  \1",
     "I is changed to I as if it were PV"),
    ("a whole gradient that is summed", "llama", r"(model.norm): \w+", r"\1: replicated_with_grad_allreduce", "[R, I]"),
)  # fmt: skip


@pytest.mark.usefixtures("_changes_are_told")
@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake[0])
def test_a_plan_that_is_wrong_is_refused_by_both(mistake: tuple[str, ...], tmp_path: Path) -> None:
    _, model_type, pattern, replacement, words = mistake
    text = (bundled_folder() / f"{model_type}.yaml").read_text(encoding="utf-8")
    changed, count = re.subn(pattern, replacement, text, count=1)
    assert count == 1
    plan = tmp_path / "plan.yaml"
    plan.write_text(changed, encoding="utf-8")
    report = verify_plan(tiny_model(model_type, tied=False).config, plan, tp=RANKS, level="layouts", cost=None)
    assert "failed" in report.levels.values()
    with pytest.raises(spmd.SpmdTypeError, match=re.escape(words)):
        _typed(model_type, plan)
