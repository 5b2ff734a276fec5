"""Decoders that stand alone are handed the states of an encoder, so that attention to them is verified too."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BartConfig, BertConfig, LlamaConfig, MllamaConfig, PreTrainedConfig, WhisperConfig

from parallel_plans import load_plan, verify_plan
from parallel_plans.lookup import bundled_folder
from parallel_plans.mesh import views_for
from parallel_plans.verify.batches import example_batch
from parallel_plans.verify.encoder_states import may_take_states, states, taken_states
from parallel_plans.verify.numerics import Trial, run_trial, truths_of
from parallel_plans.verify.observed import Inputs
from parallel_plans.verify.weights import in_float64, random_model

WIDTHS = {"vocab_size": 31, "d_model": 32, "decoder_layers": 1, "decoder_attention_heads": 4, "decoder_ffn_dim": 24}
MLLAMA = {
    "vocab_size": 31, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 24, "cross_attention_layers": [1], "pad_token_id": 0,
}  # fmt: skip
BERT = {"vocab_size": 31, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 24}


@pytest.mark.parametrize(
    ("config", "taken"),
    [
        (BartConfig(**WIDTHS), "encoder_hidden_states"),
        (WhisperConfig(**WIDTHS, pad_token_id=0), "encoder_outputs"),
        (MllamaConfig(text_config=MLLAMA), "cross_attention_states"),
        (BertConfig(**BERT, is_decoder=True, add_cross_attention=True), "encoder_hidden_states"),
        (BertConfig(**BERT, is_decoder=True), None),  # it refuses them
        (BertConfig(**BERT), None),  # it does not look at them
    ],
    ids=["bart", "whisper", "mllama", "bert with cross attention", "bert", "bert that is no decoder"],
)
def test_states_are_handed_where_more_of_a_model_runs_with_them(config: Any, taken: str | None) -> None:
    model, batch = random_model(config), example_batch(config)
    with in_float64():
        assert taken_states(model, batch) == taken
    assert may_take_states(config)


def test_a_model_without_an_argument_for_them_is_not_run_to_see_that() -> None:
    assert not may_take_states(LlamaConfig())


class OfNoWidth(nn.Module):
    """A model that would take states, whose config does not say how wide they are."""

    config = PreTrainedConfig()

    def forward(self, input_ids: Tensor, encoder_hidden_states: Tensor | None = None) -> Tensor:
        raise AssertionError("it is not run")


def test_a_model_whose_config_says_no_width_is_handed_nothing() -> None:
    assert taken_states(OfNoWidth(), {"input_ids": torch.zeros(2, 3, dtype=torch.long)}) is None


@pytest.mark.parametrize("level", ["layouts", "numerics"])
def test_values_that_stay_whole_in_attention_to_an_encoder_are_found(level: str, tmp_path: Path) -> None:
    text = (bundled_folder() / "bart.yaml").read_text()
    name = "model.decoder.layers.*.encoder_attn.v_proj"
    split = next(line for line in text.splitlines() if line.startswith(f"  {name}: "))
    (tmp_path / "plan.yaml").write_text(text.replace(split, f"  {name}: replicate"))
    report = verify_plan(BartConfig(**WIDTHS), tmp_path / "plan.yaml", tp=2, level=level, cost=None)
    assert report.levels[level] == "failed"
    assert "encoder_attn" in str(report.findings[-1].name), report.findings


@pytest.mark.parametrize("name", ["mllama", "bart"])
def test_a_model_writes_with_the_states_as_one_process_does(name: str) -> None:
    config = MllamaConfig(text_config=MLLAMA) if name == "mllama" else BartConfig(**WIDTHS, pad_token_id=0)
    model, batch = random_model(config), example_batch(config)
    with in_float64():
        given = states(str(taken_states(model, batch)), model, batch)
    plan = load_plan(bundled_folder() / f"{'mllama_text_model' if name == 'mllama' else name}.yaml")
    inputs = [Inputs(kwargs={**batch, **given}, prompt=batch["input_ids"])]
    trial = Trial(plan=plan, views=views_for(2, 1, None), model=model, batches=inputs)
    (truth,), (alone,) = truths_of(trial), truths_of(replace(trial, batches=[replace(inputs[0], kwargs=batch)]))
    assert truth.hears
    assert truth.caches
    assert not torch.equal(truth.written, alone.written), "it writes something else with them"
    for seen in run_trial(trial, [truth]).seen:
        assert torch.equal(seen.written, truth.written)


def test_states_are_as_wide_as_the_model_and_as_many_as_the_tokens() -> None:
    config = WhisperConfig(**WIDTHS, pad_token_id=0)
    model, batch = random_model(config), example_batch(config)
    ((given,),) = states("encoder_outputs", model, batch).values()
    assert given.shape == (*batch["input_ids"].shape, 32)
    assert given.dtype == next(model.parameters()).dtype
