"""A sequence split over the ranks, and experts split, dealt and visited: what one process computes, in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from rows import BATCHES, Row, batch_of
from sequence_cases import (
    SINGLE,
    TP2,
    TP4,
    Run,
    Values,
    check_on,
    check_values,
    gradients_of,
    padding,
    split_model,
    step,
    weighed,
    whole_model,
)
from tiny import MOE_TYPES, tokens

from parallel_plans.loader import load_plan
from parallel_plans.lookup import bundled_folder
from parallel_plans.testing import run_on_ranks

MASKED, TRAVELLING = Row(world=2, tp=2, ep=2), Row(world=2, tp=2, ep=2, dispatch=True)
ROWS_OF_ONE_BATCH = (
    TP2,
    TP4,
    MASKED,
    TRAVELLING,
    Row(world=4, tp=4, ep=2, etp=2),
    Row(world=4, tp=4, ep=2, etp=2, dispatch=True),  # ranks that split an expert need the same tokens: they gather
    Row(world=4, tp=4, ep=4, dispatch=True),
)
THOROUGH = ("mixtral", "qwen3_moe", "deepseek_v3")
TYPES = tuple(kind for kind in MOE_TYPES if load_plan(bundled_folder() / f"{kind}.yaml").rules("sp_plan"))
WITHOUT = {"gemma4_text"}  # a layer of it mixes what is split and what is not in code of its own


def test_all_but_some_of_the_mixtures_can_split_their_sequence() -> None:
    assert set(MOE_TYPES) - set(TYPES) == WITHOUT


@pytest.mark.parametrize("row", ROWS_OF_ONE_BATCH, ids=str)
@pytest.mark.parametrize("model_type", THOROUGH)
def test_a_mixture_is_right_wherever_its_experts_lie(model_type: str, row: Row) -> None:
    check_on(whole_model(model_type), row, step(7, padding("right", 7)), relative=SINGLE)


@pytest.mark.parametrize("row", [TP2, TRAVELLING], ids=str)
@pytest.mark.parametrize("model_type", [kind for kind in TYPES if kind not in THOROUGH])
def test_every_mixture_is_right_where_tokens_stay_and_where_they_travel(model_type: str, row: Row) -> None:
    check_on(whole_model(model_type), row, step(7), relative=SINGLE)


@pytest.mark.parametrize("row", [TP4, TRAVELLING], ids=str)
@pytest.mark.parametrize("length", [1, 2, 16])
def test_ranks_may_have_no_token_or_many(length: int, row: Row) -> None:
    check_on(whole_model("qwen3_moe"), row, step(length), relative=SINGLE)


def generation(model: Any) -> Values:
    batch = tokens(length=5)
    made = model.generate(batch, max_new_tokens=4, do_sample=False, attention_mask=padding("left", 5))
    return {"made": made}


@pytest.mark.parametrize("row", [TP2, MASKED, TRAVELLING], ids=str)
@pytest.mark.parametrize("model_type", THOROUGH)
def test_a_mixture_goes_on_as_in_one_process(model_type: str, row: Row) -> None:
    check_on(whole_model(model_type), row, generation)


def balanced(model: Any) -> Values:
    """A step in training whose loss holds that of the routers, with their scores."""
    model.train()
    output = model(tokens(length=7), labels=tokens(length=7), output_router_logits=True)
    (output.loss + sum(weighed(scores) for scores in output.router_logits)).backward()
    scores = {f"scores {at}": each.detach() for at, each in enumerate(output.router_logits)}
    return {"aux": output.aux_loss.detach(), "loss": output.loss.detach(), **scores, **gradients_of(model)}


@pytest.mark.parametrize("row", [TP2, MASKED, TRAVELLING], ids=str)
@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_scores_of_routers_are_those_of_all_tokens_and_so_is_their_loss(model_type: str, row: Row) -> None:
    check_on(whole_model(model_type, router_aux_loss_coef=5.0), row, balanced, relative=SINGLE)


def step_of(index: int) -> Run:
    """A step of the batch of a group of ranks; gradients are those of the mean over all batches."""

    def run(model: Any) -> Values:
        batch = batch_of(index)
        output = model(input_ids=batch, labels=batch)
        output.loss.backward()
        return {"logits": output.logits.detach(), "loss": output.loss.detach(), **gradients_of(model)}

    return run


@pytest.mark.parametrize("model_type", THOROUGH)
def test_batches_of_several_groups_of_ranks_share_experts(model_type: str) -> None:
    """Two batches, each with its sequence over two ranks, and experts over all four."""
    row, model = Row(world=4, tp=2, ep=4), whole_model(model_type)
    truths = [step_of(index)(copy.deepcopy(model)) for index in range(row.batches)]
    assert row.batches == 2 < BATCHES

    def on_rank(rank: int) -> Values:
        return step_of(rank // row.tp)(split_model(model, row))

    for rank, values in enumerate(run_on_ranks(on_rank, row.world)):
        own = truths[rank // row.tp]
        mean = {name: torch.stack([truth[name] for truth in truths]).mean(0) for name in own}
        check_values(values, {**mean, "logits": own["logits"], "loss": own["loss"]}, SINGLE)


def test_where_tokens_travel_those_of_the_sequence_set_out_from_where_they_lie() -> None:
    """Nothing is gathered before a block of experts: its router sees this rank's part, and not all of it on each."""
    model = whole_model("mixtral")

    def on_rank(rank: int) -> list[list[int]]:
        found = []
        for sp_plan in ("auto", None):
            own, lengths = split_model(model, TRAVELLING, sp_plan=sp_plan), []
            for layer in own.model.layers:
                layer.mlp.gate.register_forward_hook(lambda _, args, __: lengths.append(args[0].shape[0]))  # noqa: B023
            with torch.no_grad():
                own(tokens(length=8))
            found.append(lengths)
        return found

    for split, whole in run_on_ranks(on_rank, 2):
        assert split == [2 * 4] * 2
        assert whole == [2 * 8] * 2
