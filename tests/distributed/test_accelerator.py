"""The same checks on accelerators, where a machine has at least two."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import Truth, assert_close, tokens

from parallel_plans import AutoModelForCausalLM, full_gradients

RANKS = 2
has_accelerators = torch.accelerator.is_available() and torch.accelerator.device_count() >= RANKS


def on_accelerators(rank: int, folder: str, truth: Truth, address: str) -> None:
    import os

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS), MASTER_ADDR="127.0.0.1")
    os.environ["MASTER_PORT"] = address
    model: Any = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto", attn_implementation="eager")
    batch = tokens().to(model.device)
    output = model(input_ids=batch, labels=batch)
    output.loss.backward()
    assert_close("logits", output.logits.cpu(), truth.logits, relative=1e-4)
    for name, gradient in full_gradients(model).items():
        assert_close(name, gradient.cpu(), truth.gradients[name], relative=1e-3)
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not has_accelerators, reason=f"needs {RANKS} accelerators")
@pytest.mark.parametrize("model_type", ["llama", "phi3", "olmo2"])
def test_a_bundled_plan_computes_on_accelerators_what_one_process_computes(
    model_type: str, checkpoints: Callable[..., tuple[Path, Truth]]
) -> None:
    from ranks import free_port

    folder, truth = checkpoints(model_type, True)
    arguments = (str(folder), truth, str(free_port()))
    torch.multiprocessing.spawn(on_accelerators, args=arguments, nprocs=RANKS)  # type: ignore[attr-defined]
