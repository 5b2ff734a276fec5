"""An exported plan makes another framework's ranks compute what one process computes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ranks import run_on_ranks
from tiny import Truth, assert_close, tokens
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
from typer.testing import CliRunner

from parallel_plans.cli.main import app

Saved = tuple[Path, Truth]


def exported(*words: str) -> str:
    done = CliRunner().invoke(app, ["export", *words])
    assert done.exit_code == 0, done.output
    return done.stdout


def whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def check(model: Any, truth: Truth) -> None:
    """The loss, the logits and every gradient are those of one process."""
    batch = tokens()
    output = model(input_ids=batch, labels=batch)
    output.loss.backward()
    assert_close("logits", whole(output.logits), truth.logits, relative=1e-4)
    for name, parameter in model.named_parameters():
        assert_close(name, whole(parameter.grad), truth.gradients[name], relative=1e-3)


def in_transformers(folder: str, plans: dict[str, Any], sizes: dict[str, int], truth: Truth) -> None:
    config = DistributedConfig(**sizes, **plans)
    plain = {"attn_implementation": "eager", "experts_implementation": "batched_mm"}
    check(AutoModelForCausalLM.from_pretrained(folder, distributed_config=config, **plain), truth)


def in_torch(folder: str, text: str, truth: Truth) -> None:
    space: dict[str, Any] = {}
    exec(text, space)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    check(parallelize_module(model, init_device_mesh("cpu", (2,)), space["plan"]), truth)


@pytest.mark.parametrize(("kind", "ep"), [("qwen3", 1), ("mixtral", 1), ("mixtral", 2)])
def test_transformers_computes_the_same_under_an_exported_plan(
    checkpoints: Callable[..., Saved], kind: str, ep: int
) -> None:
    folder, truth = checkpoints(kind, False)
    plans = json.loads(exported(kind, "--to", "transformers", "--model", str(folder), "--ep", str(ep)))
    run_on_ranks(in_transformers, 2, str(folder), plans, {"tp_size": 2, "ep_size": ep}, truth)


def test_torch_computes_the_same_under_an_exported_plan(checkpoints: Callable[..., Saved]) -> None:
    folder, truth = checkpoints("llama", False)
    run_on_ranks(in_torch, 2, str(folder), exported("llama", "--to", "torch", "--model", str(folder)), truth)
