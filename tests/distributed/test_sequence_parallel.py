"""A sequence split over the ranks: what one process computes, for every dense family, length, mask and way to run."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from rows import Row
from sequence_cases import (
    EXACT,
    SINGLE,
    TP2,
    TP4,
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
from tiny import DENSE_TYPES, HIDDEN, tokens
from transformers import DynamicCache

from parallel_plans.testing import RankFailed, run_on_ranks

IN_SINGLE = ("gemma2", "gemma3_text", "olmo2", "cohere")  # their norms


def precision(model_type: str) -> float:
    return SINGLE if model_type in IN_SINGLE else EXACT


@pytest.mark.parametrize("model_type", DENSE_TYPES)
def test_every_dense_family_computes_what_one_process_computes(model_type: str) -> None:
    tied = DENSE_TYPES.index(model_type) % 2 == 0
    model = whole_model(model_type, tied=tied)
    run = step(7, padding("right", 7))
    check_on(model, TP2, run, relative=precision(model_type), storage="dtensor" if tied else "local")


@pytest.mark.parametrize(
    ("length", "side"), [(1, ""), *((length, side) for length in (7, 16) for side in ("", "left", "right"))]
)
@pytest.mark.parametrize("row", [TP2, TP4], ids=str)
@pytest.mark.parametrize("model_type", ["llama", "gpt_neox"])
def test_any_length_and_any_padding_will_do(model_type: str, row: Row, length: int, side: str) -> None:
    storage = "dtensor" if length == 7 else "local"
    check_on(whole_model(model_type), row, step(length, padding(side, length)), storage=storage)


def generation(model: Any) -> Values:
    """Greedy continuations of batches shorter and longer than the ranks are many, one of them padded on the left."""
    found = {}
    for length in (1, 3, 9):
        batch, mask = tokens(length=length), padding("left", length)
        made = model.generate(batch, max_new_tokens=5, do_sample=False, attention_mask=mask)
        found[f"after {length}"] = made
    return found


@pytest.mark.parametrize("model_type", ["llama", "mistral", "phi3", "cohere", "gpt_neox", "gemma3_text"])
def test_generation_goes_on_as_in_one_process(model_type: str) -> None:
    check_on(whole_model(model_type), TP4 if model_type == "llama" else TP2, generation)


def pieces(model: Any) -> Values:
    """Logits of a batch that comes in three pieces, into a cache."""
    batch, cache, found = tokens(length=10), DynamicCache(config=model.config), {}
    with torch.no_grad():
        for start, stop in ((0, 5), (5, 9), (9, 10)):
            output = model(batch[:, start:stop], past_key_values=cache, use_cache=True)
            cache, found[f"{start} to {stop}"] = output.past_key_values, output.logits
    return found


@pytest.mark.parametrize("model_type", ["llama", "mistral", "gpt_neox"])
def test_a_cache_goes_on_with_pieces_of_any_length(model_type: str) -> None:
    check_on(whole_model(model_type), TP4, pieces)


def embedded(model: Any) -> Values:
    """A step of hidden states that are given, whose gradient is whole, too."""
    hidden = torch.linspace(-1, 1, 2 * 7 * HIDDEN, dtype=torch.float64).view(2, 7, HIDDEN).sin().requires_grad_()
    output = model(inputs_embeds=hidden)
    weighed(output.logits).backward()
    assert hidden.grad is not None
    with torch.no_grad():
        frozen = model(inputs_embeds=hidden.detach()).logits
    return {"logits": output.logits.detach(), "frozen": frozen, "hidden": hidden.grad, **gradients_of(model)}


def captured(model: Any) -> Values:
    """The hidden states of every layer, and gradients that come by them."""
    output = model(tokens(length=7), output_hidden_states=True)
    sum((weighed(hidden) for hidden in output.hidden_states), torch.zeros(())).backward()
    return {**{f"{at}": hidden.detach() for at, hidden in enumerate(output.hidden_states)}, **gradients_of(model)}


def two_at_a_time(model: Any) -> Values:
    """Two forwards of batches that differ in length and rows, and only then their backwards."""
    long, short = model(tokens(length=9)).logits, model(tokens(rows=1, length=4)).logits
    weighed(short).backward()
    weighed(long).backward()
    return {"long": long.detach(), "short": short.detach(), **gradients_of(model)}


def last_token(model: Any) -> Values:
    with torch.inference_mode():
        return {"last": model(tokens(length=7), logits_to_keep=1).logits.clone()}


WAYS = {"embedded": embedded, "captured": captured, "two at a time": two_at_a_time, "last token": last_token}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("model_type", ["llama", "gpt_neox", "cohere"])
def test_a_model_may_be_run_in_other_ways(model_type: str, way: str) -> None:
    changes = {"tied": True} if way == "embedded" else {}  # one that is not would have no gradient for its embedding
    check_on(whole_model(model_type, **changes), TP2, WAYS[way], relative=precision(model_type))


def test_a_layer_that_is_given_another_length_is_an_error() -> None:
    def alone(rank: int) -> None:
        model = split_model(whole_model("llama"), TP2)
        model(tokens(length=8))
        hidden = torch.zeros(2, 8, HIDDEN, dtype=torch.float64)
        model.model.layers[1].self_attn(hidden, position_embeddings=None)

    with pytest.raises(RankFailed, match=r"was given \[2, 8, 48\]; expected this rank's 4 of 8 tokens along dim 1"):
        run_on_ranks(alone, 2)


@pytest.mark.parametrize("model_type", ["llama", "cohere"])
def test_a_copy_of_a_split_model_splits_its_sequence_too(model_type: str) -> None:
    model = whole_model(model_type)
    truth = step(7)(copy.deepcopy(model))

    def on_rank(rank: int) -> tuple[Values, Values]:
        first = split_model(model, TP2)
        second = copy.deepcopy(first)
        return step(7)(first), step(7)(second)

    for results in run_on_ranks(on_rank, 2):
        for values in results:
            check_values(values, truth, precision(model_type))


def test_a_sliding_window_looks_over_the_ends_of_parts() -> None:
    """A window of 3 tokens, of 16 over 4 ranks: each rank's first tokens look at the one before it."""
    model = whole_model("mistral", sliding_window=3)
    check_on(model, TP4, step(16))
