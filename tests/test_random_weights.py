"""Random weights leave nothing zero or alike, and nothing is rounded on the way."""

from __future__ import annotations

import torch
from published import small_of

from parallel_plans.verify.batches import example_batch
from parallel_plans.verify.weights import in_float64, random_model


def test_random_weights_are_all_drawn_and_nothing_is_zero_or_alike() -> None:
    config = small_of("ernie-4.5-21b-a3b", {"tp": 2}).config
    model, again, other = random_model(config, 0), random_model(config, 0), random_model(config, 1)
    for (name, given), same, unlike in zip(
        model.named_parameters(), again.parameters(), other.parameters(), strict=True
    ):
        assert given.dtype == torch.float64
        assert given.unique().numel() == given.numel(), name
        assert given.ne(0).all(), name
        assert given.equal(same)
        assert not given.equal(unlike)
    norms = torch.cat([given for name, given in model.named_parameters() if name.endswith("norm.weight")])
    assert abs(norms.mean() - 1) < 0.1


def test_buffers_that_choose_are_drawn_too() -> None:
    model = random_model(small_of("deepseek-v3", {"tp": 2}).config)
    biases = [buffer for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")]
    assert biases
    assert all(bias.ne(0).all() for bias in biases)


def test_nothing_is_rounded_to_float32_within_float64() -> None:
    config = small_of("gemma-3-1b", {"tp": 2}).config
    batch = example_batch(config)
    assert random_model(config)(**batch).loss.dtype == torch.float32
    with in_float64(), in_float64():
        assert torch.get_default_dtype() == torch.float64
        model = random_model(config)
        exact = model(**batch).loss
        scaled = torch.nn.functional.softmax(torch.ones(2), dim=-1, dtype=torch.float32)
    assert exact.dtype == scaled.dtype == torch.float64
    assert torch.get_default_dtype() == torch.float32
