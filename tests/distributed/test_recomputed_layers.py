"""Layers that transformers computes again in backward: the same numbers, and the reductions of their forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ranks import run_on_ranks
from tiny import assert_close, tokens
from torch import Tensor, nn

from parallel_plans import AutoModelForCausalLM, full_gradients
from parallel_plans.collectives import record_collectives


class Scaled(nn.Module):
    """Times a tensor: a sum that waits goes on waiting, and autograd keeps what it is multiplied by."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("by", torch.linspace(0.5, 1.5, width), persistent=False)

    def forward(self, value: Tensor) -> Tensor:
        return value * self.by


def scale_attention(model: Any) -> None:
    for layer in model.gpt_neox.layers:
        layer.post_attention_dropout = Scaled(model.config.hidden_size)


def step(folder: str, reentrant: bool | None, scaled: bool) -> tuple[dict[str, Tensor], int, int]:
    """Gradients, and the reductions of a step, forward and in backward."""
    model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto")
    if scaled:
        scale_attention(model)
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    for _ in range(2):  # whether sums wait is found in the first step
        model.zero_grad()
        with record_collectives() as calls:
            model(input_ids=tokens(), labels=tokens()).loss.backward()
    backward = [call.backward for call in calls if call.op == "all_reduce"]
    return full_gradients(model), backward.count(False), backward.count(True)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(("model_type", "scaled"), [("llama", False), ("cohere", False), ("gpt_neox", True)])
def test_a_layer_computed_again_reduces_what_its_forward_does_once_more(
    model_type: str, scaled: bool, reentrant: bool, checkpoints: Callable[..., Any]
) -> None:
    folder, _ = checkpoints(model_type, False)
    kept, forward, backward = run_on_ranks(step, 2, str(folder), None, scaled)[0]
    again, forward_again, backward_again = run_on_ranks(step, 2, str(folder), reentrant, scaled)[0]
    assert forward_again == forward
    assert 0 <= backward_again - backward <= forward
    for name, gradient in again.items():
        assert_close(name, gradient, kept[name], relative=1e-5)
