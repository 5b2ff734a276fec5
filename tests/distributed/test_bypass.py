"""A weight that is used past the module that owns it is refused where that skips what the plan's rule does there."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from ranks import run_on_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional
from transformers import AutoModelForCausalLM, BigBirdConfig, BloomConfig, Mamba2Config
from transformers.models.mamba2 import modeling_mamba2

from parallel_plans import PlanError, parallelize, verify_plan
from parallel_plans.lookup import bundled_folder

UP, NORM, DOWN = "body.layers.*.up", "body.layers.*.norm", "body.layers.*.down"
PLAN = {UP: "colwise", NORM: "replicated_with_grad_allreduce", DOWN: "rowwise"}


class Layer(nn.Module):
    """An MLP, and a norm for each element of its width, that reads its weights in one way or another."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.up, self.norm, self.down, self.way = nn.Linear(8, 16), nn.LayerNorm(1), nn.Linear(16, 8), way

    @property
    def last(self) -> Tensor:
        return self.down.weight

    def forward(self, x: Tensor) -> Tensor:
        way, down, norm = self.way, self.down, getattr(self, "no" + "rm")  # no source tells that it is read
        if way == "dropped":
            return x + self.last.size(0)
        inner = functional.linear(x, self.up.weight, self.up.bias) if way == "up" else self.up(x)
        inner = inner * (norm.weight if way == "norm" else norm(inner[..., None])[..., 0])
        if way == "looked at":
            inner = inner.to(down.weight.dtype).view(*x.shape[:2], self.last.shape[1])
        if way == "declined":
            _ = functional.linear(inner, self.last)  # what a kernel gave that is not taken
        is_fused = {"fused": True, "one token": x.shape[1] == 1, "in training": self.training}.get(way, False)
        return functional.linear(inner, down.weight, down.bias) if is_fused else down(inner)


class Body(nn.Module):
    """Two layers, whose weights it may touch before they run."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(way) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if layer.way == "scaled":
                layer.down.weight.data.mul_(1.0)
        for layer in self.layers:
            x = layer(x)
        return x


class Model(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.body = Body(way)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


# way -> the rule that is said to be skipped in training, in evaluation, and of one token more
WAYS: dict[str, tuple[str | None, str | None, str | None]] = {
    "called": (None, None, None),
    "looked at": (None, None, None),
    "declined": (None, None, None),
    "dropped": (None, None, None),
    "scaled": (None, None, None),
    "fused": (DOWN, DOWN, DOWN),
    "one token": (None, None, DOWN),
    "in training": (DOWN, None, None),
    "up": (UP, None, None),  # it does nothing but sum a gradient
    "norm": (NORM, None, None),  # so does this
}


def skipped(run: Callable[[Tensor], Any], x: Tensor) -> str | None:
    """The rule that a forward says is skipped."""
    try:
        run(x)
    except PlanError as error:
        (finding,) = error.findings
        assert finding.code == "PP408"
        return finding.rule
    return None


def of_ways() -> dict[str, tuple[Any, ...]]:
    mesh, found = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",)), {}
    more = {"a copy": copy.deepcopy, "its body": lambda model: model.body}
    for name in [*WAYS, *more]:
        model: Any = parallelize(Model(name if name in WAYS else "fused"), PLAN, mesh, storage="local")
        before = [vars(module).get("forward") for module in model.modules()]
        run, x, said = more.get(name, lambda same: same)(model), torch.randn(2, 3, 8), []
        for training, given in ((True, x), (False, x), (False, x[:, :1])):
            model.train(training)
            run.train(training)
            with torch.set_grad_enabled(training):
                said.append(skipped(run, given))
                assert skipped(run, given) == said[-1]  # nobody gets by who tries again
        found[name] = tuple(said)
        assert [vars(module).get("forward") for module in model.modules()] == before
        assert {type(module._parameters) for module in model.modules()} == {dict}
    return found


def test_a_weight_that_is_used_where_its_module_is_never_called_is_refused() -> None:
    want = {**WAYS, "a copy": WAYS["fused"], "its body": WAYS["fused"]}
    assert run_on_ranks(of_ways, 2) == [want, want]


def fused(projected: Tensor, *_: Any, outproj_weight: Tensor, **__: Any) -> Tensor:
    """What stands for the kernel of `mamba_ssm`: its arguments, its shape, another function."""
    return functional.linear(projected[..., : outproj_weight.shape[1]], outproj_weight)


MAMBA2: Mapping[str, Any] = {
    "hidden_size": 16, "num_heads": 4, "head_dim": 8, "state_size": 4, "n_groups": 2, "num_hidden_layers": 2,
    "vocab_size": 32, "expand": 2, "chunk_size": 4, "pad_token_id": 0,
}  # fmt: skip
BLOOM: Mapping[str, Any] = {
    "hidden_size": 16, "n_layer": 2, "n_head": 4, "vocab_size": 32, "pretraining_tp": 2, "slow_but_exact": True,
}  # fmt: skip

BIG_BIRD: Mapping[str, Any] = {
    "hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 32,
    "block_size": 2, "num_random_blocks": 1, "max_position_embeddings": 64, "is_decoder": True,
}  # fmt: skip


def of_models() -> tuple[list[tuple[str | None, str]], list[str]]:
    mesh, tokens = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",)), torch.arange(2, 14).view(2, 6)
    modeling_mamba2.mamba2_split_conv1d_scan_combined = fused
    mamba2, bloom = (AutoModelForCausalLM.from_config(each) for each in (Mamba2Config(**MAMBA2), BloomConfig(**BLOOM)))
    for model, name in ((mamba2, "mamba2"), (bloom, "bloom")):
        parallelize(model, bundled_folder() / f"{name}.yaml", mesh)
    with pytest.raises(PlanError) as caught:
        mamba2.train()(input_ids=tokens, use_cache=False)
    mamba2.eval()(input_ids=tokens, use_cache=False)
    with pytest.raises(RuntimeError, match="size of tensor") as failed:
        bloom(input_ids=tokens)
    return [(each.rule, str(each)) for each in caught.value.findings], failed.value.__notes__


def test_kernels_and_slices_that_take_the_weights_of_a_model_are_told_by_the_lines_of_its_plan() -> None:
    ((found, notes), _) = run_on_ranks(of_models, 2)
    mixer = "backbone.layers.*.mixer."
    assert [rule for rule, _ in found] == [mixer + "norm", mixer + "out_proj"]
    assert "rowwise is skipped: transformer.h.0.self_attention uses the weight of dense by itself" in notes[0]
    text = found[1][1]
    lines = (bundled_folder() / "mamba2.yaml").read_text().splitlines()
    line = next(number for number, each in enumerate(lines, 1) if ".out_proj:" in each)
    assert f"mamba2.yaml:{line}: rowwise is skipped: backbone.layers.0.mixer uses the weight of out_proj" in text
    assert "(modeling_mamba2.py:" in text
    assert "call `self.out_proj(x)`" in text


def test_the_verifier_sees_it_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(modeling_mamba2, "mamba2_split_conv1d_scan_combined", fused)
    report = verify_plan(Mamba2Config(**MAMBA2), tp=2, level="layouts")
    assert {(each.code, each.level) for each in report.findings if each.severity == "error"} == {("PP408", "layouts")}
    model, inputs = Model("fused"), (torch.randn(2, 3, 8),)
    report = verify_plan(model, {"tp_plan": PLAN}, tp=2, inputs=inputs)
    assert {(each.code, each.rule) for each in report.findings if each.level == "numerics"} == {("PP408", DOWN)}


def of_random_blocks() -> list[str]:
    mesh, tokens, said = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",)), torch.arange(32).view(1, 32), []
    seeds = numpy.random.seed
    for attention in ("block_sparse", "original_full"):
        model = AutoModelForCausalLM.from_config(BigBirdConfig(**BIG_BIRD, attention_type=attention))
        parallelize(model, bundled_folder() / "big_bird.yaml", mesh)
        for training in (False, True):
            try:
                model.train(training)(input_ids=tokens)
            except PlanError as error:
                said.append(f"{attention}, {training}: {error}")
    assert numpy.random.seed is seeds
    return said


def test_heads_that_draw_from_a_seed_of_their_own_are_refused_in_training() -> None:
    for said in run_on_ranks(of_random_blocks, 2):
        (told,) = said
        assert told.startswith("block_sparse, True: ")
        assert "bert.encoder.layer.0.attention.self sets a seed (numpy.random.seed)" in told
        assert "[PP409]" in told
