"""Models that need more than a batch of text, or another mode than eval: what their class or the table says of it."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING

from parallel_plans import verify_plan
from parallel_plans.causal import causal_class, causal_config, causal_model
from parallel_plans.cli.lacking import lacking
from parallel_plans.verify.batches import example_batch, in_eval_mode, mask_for
from parallel_plans.verify.own import config_of as config_of_model
from parallel_plans.verify.random_numbers import own_random_numbers
from parallel_plans.verify.report import PASSED
from parallel_plans.verify.shrink import shrunken
from parallel_plans.verify.weights import in_float64, random_model


def config_of(kind: str) -> Any:
    return CONFIG_MAPPING[kind](**lacking(kind))


@pytest.mark.parametrize("kind", ["musicgen", "musicgen_melody"])
def test_a_model_is_made_from_the_part_of_a_config_that_its_class_wants(kind: str) -> None:
    whole = config_of(kind)
    part = causal_config(whole)
    assert part is whole.decoder
    assert causal_config(part) is part
    assert causal_class(part) is causal_class(whole)
    with torch.device("meta"):
        model = causal_model(part)
        assert type(model) is type(causal_model(whole)) is causal_class(whole)
    assert type(config_of_model(model)) is type(part)


def test_what_writes_sounds_takes_a_row_of_codes_for_each_codebook_and_writes_them_all() -> None:
    config = shrunken(causal_config(config_of("musicgen")), {"tp": 2}).config
    batch, model = example_batch(config), random_model(config)
    tokens, labels = batch["input_ids"], batch["labels"]
    assert (tokens.shape, labels.shape) == ((8, 11), (2, 11, 4))
    assert labels[1, :, 2].equal(tokens[6])
    with in_float64(), torch.no_grad():
        written = model.generate(
            tokens, attention_mask=mask_for(tokens, config), max_new_tokens=4, do_sample=False, num_return_sequences=1
        )
    assert written.shape[:2] == (2, 4)


@pytest.mark.parametrize("kind", ["musicgen", "reformer"])
def test_a_plan_for_it_is_proven_down_to_the_numbers(kind: str) -> None:
    report = verify_plan(causal_config(config_of(kind)), tp=2)
    assert report.ok, report.findings
    assert set(report.levels.values()) == {PASSED}
    assert report.cost is not None, report.no_cost


def test_numbers_that_are_drawn_for_the_heads_of_another_rank_are_found_out() -> None:
    attention, unit = "reformer.encoder.layers.*.attention", "attention_head_size"
    plan: Any = {
        f"{attention}.self_attention": {"style": "local_counts", "counts": {"num_attention_heads": 1}},
        f"{attention}.self_attention.query_key": {"style": "colwise", "unit": unit},
        f"{attention}.self_attention.value": {"style": "colwise", "unit": unit},
        f"{attention}.output.dense": {"style": "rowwise", "unit": unit},
        "**": "replicate",
    }
    config = CONFIG_MAPPING["reformer"](**lacking("reformer"), attn_layers=["lsh", "lsh"])
    report = verify_plan(config, plan, tp=2, cost=None)
    assert [finding.code for finding in report.findings if finding.severity == "error"] == ["PP409"]


def test_a_model_is_written_with_in_eval_mode_and_left_as_it_was() -> None:
    model = torch.nn.Linear(2, 2).train()
    with in_eval_mode(model):
        assert not model.training
    assert model.training


def test_threads_draw_the_same_numbers_however_they_take_turns() -> None:
    drawn: dict[int, list[torch.Tensor]] = {}
    turn = threading.Barrier(2)

    def rank(number: int) -> None:
        with own_random_numbers():
            found = drawn[number] = [torch.randn(3)]
            torch.manual_seed(4)
            turn.wait(10)
            found.append(torch.rand(2))
            turn.wait(10)
            torch.seed()
            turn.wait(10)
            found.append(torch.empty(2).normal_())

    before = torch.get_rng_state()
    threads = [threading.Thread(target=rank, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert all(one.equal(other) for one, other in zip(drawn[0], drawn[1], strict=True))
    assert len(drawn[0]) == 3
    assert drawn[0][1].equal(torch.rand(2, generator=torch.Generator().manual_seed(4)))
    assert torch.get_rng_state().equal(before)
