"""Mistakes with nothing to do: ranks whose experts get no token still take part, and have zeros for gradients.

As in `test_expert_regressions`, every test also takes its guard away and sees its own check fail.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from expert_runs import (
    EP4,
    IMPLEMENTATIONS,
    OWN_LOOPS,
    TP4_EP4,
    Found,
    Run,
    Starts,
    mixture,
    off,
    patched,
    split,
    squared,
    starts,
)
from rows import GRADIENTS, LOGITS, Row
from tiny import tiny_model, tokens
from torch import Tensor

from parallel_plans import collectives, transitions
from parallel_plans.collectives import record_collectives
from parallel_plans.experts import allreduce, dispatch

# ---- a rank whose experts get no token


ONE_TOKEN, FEW = tokens(rows=1, length=1), tokens(rows=2, length=3)
CROWDED_ROWS = (TP4_EP4, EP4, replace(TP4_EP4, dispatch=True))


@cache
def crowded(chosen: int) -> Any:
    """A gpt_oss whose tokens all go to its first experts, so many of 8; on 4 ranks these lie on the first."""
    model = tiny_model("gpt_oss", tied=False, num_experts_per_tok=chosen)
    model.set_experts_implementation("eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("router.bias"):
                parameter[:chosen] += 50
    return model


@cache
def empty_runs() -> Starts:
    runs: dict[str, Run] = {}
    for row in CROWDED_ROWS:
        for how in IMPLEMENTATIONS:
            for chosen in (1, 2):
                batches = (FEW,) if row.tp == 4 else tuple(tokens(rows=2, length=3, seed=seed) for seed in range(4))
                run = Run(model=crowded(chosen), row=row, batches=batches, implementation=how, loss=squared)
                runs[f"crowded {chosen} {how} {row}"] = run
        for kind in ("mixtral", "qwen2_moe", "deepseek_v3", *OWN_LOOPS):
            batches = (ONE_TOKEN,) * row.batches
            runs[f"{kind} {row}"] = Run(model=mixture(kind), row=row, batches=batches, loss=squared)
    runs["away"] = replace(runs[f"crowded 2 eager {EP4}"], without=staying_away)
    return starts(runs)


def check_with_nothing_to_do(ranks: list[Found]) -> None:
    for one in ranks:
        assert one.logits <= LOGITS
        assert one.gradient <= GRADIENTS, one.gradients
        assert one.missing == ()  # zeros where there was nothing to do


@pytest.mark.parametrize("row", CROWDED_ROWS, ids=str)
@pytest.mark.parametrize("how", IMPLEMENTATIONS)
@pytest.mark.parametrize("chosen", [1, 2], ids=["to one expert", "to one rank"])
def test_tokens_may_all_go_to_one_place(chosen: int, how: str, row: Row) -> None:
    check_with_nothing_to_do(empty_runs()[f"crowded {chosen} {how} {row}"])


@pytest.mark.parametrize("row", CROWDED_ROWS, ids=str)
@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe", "deepseek_v3", *OWN_LOOPS])
def test_a_batch_may_be_one_token(model_type: str, row: Row) -> None:
    check_with_nothing_to_do(empty_runs()[f"{model_type} {row}"])


def staying_away() -> AbstractContextManager[None]:
    """What had nothing to do takes no part in backward."""

    def alone(output: Tensor, *others: Tensor) -> Tensor:
        return output

    return patched((allreduce, "taking_part", alone), (dispatch, "taking_part", alone))


def unheard(run: Run, without: Callable[[], AbstractContextManager[None]]) -> tuple[int, list[str]]:
    """How many reductions this rank starts backward, which nobody answers, and its experts without a gradient."""
    with without():
        model = split(run)
        _, loss = run.loss(model, run.batches[0])
        unanswered = [(each, "add_up", lambda value, axis: None) for each in (collectives, transitions)]
        with record_collectives() as calls, patched(*unanswered):
            loss.backward()
    return len(calls), [name for name, p in model.named_parameters() if ".experts." in name and p.grad is None]


@cache
def unheard_runs() -> Starts:
    run = Run(model=crowded(2), row=TP4_EP4, batches=(FEW,), implementation="eager", loss=squared)
    return Starts({"sound": (4, lambda: unheard(run, patched)), "away": (4, lambda: unheard(run, staying_away))})


def test_every_rank_reduces_as_often_as_the_others_also_with_nothing_to_do() -> None:
    ranks = unheard_runs()["sound"]
    assert len({count for count, _ in ranks}) == 1
    assert all(missing == [] for _, missing in ranks)


def test_a_rank_that_stays_away_would_leave_the_others_waiting() -> None:
    (first, missing), *others = unheard_runs()["away"]
    assert missing == []
    assert all(count < first and missing for count, missing in others)


def test_weights_of_a_rank_that_gets_no_token_would_have_no_gradient() -> None:
    first, *others = empty_runs()["away"]
    assert first.missing == ()
    assert all(one.missing for one in others)
    assert all(".experts." in name for one in others for name in one.missing)


def decoded(model: Any, row: Row, implementation: str) -> tuple[float, list[int]]:
    """How far a decode step of one token is off, and the shape of its logits."""
    prompt, following = FEW[:1], FEW[1:, :1]
    wholes = [copy.deepcopy(model), split(Run(model=model, row=row, implementation=implementation))]
    with torch.no_grad():
        caches = [each(input_ids=prompt, use_cache=True).past_key_values for each in wholes]
        want, got = (
            each(input_ids=following, past_key_values=cache).logits for each, cache in zip(wholes, caches, strict=True)
        )
    return off(got, want), list(got.shape)


@cache
def decoding_runs() -> Starts:
    runs = {
        f"{how} {row}": (row.world, partial(decoded, mixture("mixtral"), row, how))
        for row in CROWDED_ROWS
        for how in IMPLEMENTATIONS
    }
    return Starts(runs)


@pytest.mark.parametrize("row", CROWDED_ROWS, ids=str)
@pytest.mark.parametrize("how", IMPLEMENTATIONS)
def test_a_decode_step_has_one_token_and_experts_on_four_ranks(how: str, row: Row) -> None:
    for worst, shape in decoding_runs()[f"{how} {row}"]:
        assert worst <= LOGITS
        assert shape[:2] == [1, 1]
