"""Mixtures as they are trained: auxiliary losses, corrected scores, sums that join, storages, precision, copies."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
from expert_runs import (
    FAR,
    IMPLEMENTATIONS,
    TP2,
    TP2_DISPATCH,
    TP2_EP2,
    TP4_EP2_ETP2,
    Found,
    Run,
    Starts,
    mixture,
    off,
    split,
    starts,
)
from rows import GRADIENTS, LOGITS, Row
from tiny import HIDDEN, tokens
from torch import Tensor, nn

from parallel_plans import full_gradients
from parallel_plans.collectives import Call, record_collectives

# ---- routers: auxiliary losses and corrected scores

SHARED_ROWS = (TP2, TP2_EP2, TP4_EP2_ETP2)
ROUTERS = {
    "mixtral": {"output_router_logits": True, "router_aux_loss_coef": 0.5},
    "qwen2_moe": {"output_router_logits": True, "router_aux_loss_coef": 0.5},
    "deepseek_v3": {},  # its scores are corrected by a bias that no gradient reaches
}


@cache
def router_runs() -> Starts:
    return starts(
        {f"{kind} {row}": Run(model=mixture(kind, **ROUTERS[kind]), row=row) for kind in ROUTERS for row in SHARED_ROWS}
    )


@pytest.mark.parametrize("row", SHARED_ROWS, ids=str)
@pytest.mark.parametrize("model_type", ROUTERS)
def test_routers_learn_on_every_rank_what_they_learn_in_one_process(model_type: str, row: Row) -> None:
    ranks = router_runs()[f"{model_type} {row}"]
    for one in ranks:
        assert one.loss <= LOGITS
        assert one.gradient <= GRADIENTS, one.gradients
        assert one.routers.keys() == ranks[0].routers.keys()
        assert all(torch.equal(gradient, ranks[0].routers[name]) for name, gradient in one.routers.items())


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe"])
def test_the_auxiliary_loss_counts(model_type: str) -> None:
    batch = tokens()
    with_it, without = (mixture(model_type, **changes) for changes in (ROUTERS[model_type], {}))
    assert with_it(input_ids=batch, labels=batch).loss - without(input_ids=batch, labels=batch).loss > 0.1


def test_the_correction_decides_where_tokens_go() -> None:
    model, batch = copy.deepcopy(mixture("deepseek_v3")), tokens()
    before = model(input_ids=batch).logits
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            assert buffer.abs().max() > 0
            buffer.zero_()
    assert off(model(input_ids=batch).logits, before) > 100 * LOGITS


# ---- collectives of a layer


def marked(model: Any, calls: list[Call], marks: dict[str, int]) -> None:
    """Notes in `marks` how many calls there have been when the last layer, and its block of experts, begin and end."""

    def note(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            marks[name] = len(calls)

        return hook

    def before(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            note(f"{name} begins")()
            value = args[0] if args else kwargs["hidden_states"]
            value.register_hook(note(f"{name} is back"))

        return hook

    def after(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            note(f"{name} ends")()
            value = output if isinstance(output, Tensor) else output[0]
            value.register_hook(note(f"{name} turns back"))

        return hook

    layer = model.model.layers[-1]
    for name, module in (("layer", layer), ("block", layer.mlp)):
        module.register_forward_pre_hook(before(name), with_kwargs=True)
        module.register_forward_hook(after(name))


def layer_calls(model: Any, row: Row) -> dict[str, Counter[int]]:
    """Per part, forward and backward: all-reduces by how many numbers each token has in them."""
    batch, marks = tokens(), {}
    parallel = split(Run(model=model, row=row))
    parallel(input_ids=batch)  # modules find out whether sums are better off waiting in them
    with record_collectives() as calls:
        marked(parallel, calls, marks)
        parallel(input_ids=batch, labels=batch).loss.backward()
    assert all(call.op == "all_reduce" for call in calls[marks["layer begins"] : marks["layer ends"]])

    def widths(start: str, stop: str) -> Counter[int]:
        return Counter(call.bytes // (4 * batch.numel()) for call in calls[marks[start] : marks[stop]])

    return {
        f"{part} {way}": widths(f"{part} {start}", f"{part} {stop}")
        for part in ("layer", "block")
        for way, start, stop in (("forward", "begins", "ends"), ("backward", "turns back", "is back"))
    }


COUNTED = ("mixtral", "gpt_oss", "deepseek_v3", "qwen2_moe")


@cache
def call_runs() -> Starts:
    pairs = [(kind, row) for kind in COUNTED for row in SHARED_ROWS]
    return Starts({f"{kind} {row}": (row.world, partial(layer_calls, mixture(kind), row)) for kind, row in pairs})


@pytest.mark.parametrize("row", SHARED_ROWS, ids=str)
@pytest.mark.parametrize("model_type", COUNTED)
def test_a_layer_is_reduced_once_after_attention_and_once_after_all_its_experts(model_type: str, row: Row) -> None:
    for found in call_runs()[f"{model_type} {row}"]:
        assert found["block forward"] == Counter([HIDDEN])
        assert found["layer forward"] == Counter([HIDDEN, HIDDEN])


CHOICES, SHARED_GATE = 2, {"qwen2_moe": 1}


@pytest.mark.parametrize("row", SHARED_ROWS, ids=str)
@pytest.mark.parametrize("model_type", COUNTED)
def test_the_gradient_of_a_blocks_input_is_reduced_once(model_type: str, row: Row) -> None:
    for found in call_runs()[f"{model_type} {row}"]:
        widths = list(found["block backward"].elements())
        assert sum(width >= HIDDEN for width in widths) == 1
        # besides, that of the routing weights and of a gate on the shared expert, by themselves or along with it
        assert sum(widths) == HIDDEN + CHOICES + SHARED_GATE.get(model_type, 0)


# ---- storages, precision, layers computed again, other implementations

EVERY_ROW = (TP2, TP2_EP2, TP2_DISPATCH)


def checkpointing(model: Any) -> Any:
    """The model, which computes its layers again in backward."""
    model.train()
    model.gradient_checkpointing_enable()
    return model


def reentering(model: Any) -> Any:
    """The same, by a backward within a backward; the layers' own scopes are not open then."""
    model.train()
    model.activation_checkpointing_enable({"use_reentrant": True})
    return model


def switching(model: Any) -> Any:
    """The model, which has run once with each implementation and ends with the first."""
    for how in reversed(IMPLEMENTATIONS):
        model.set_experts_implementation(how)
        model(input_ids=tokens()).logits.mean().backward()
        model.zero_grad()
    return model


def switched(model: Any, *, how: str) -> Any:
    """The model, whose experts run otherwise from now on."""
    model.set_experts_implementation(how)
    return model


@cache
def kept_runs() -> Starts:
    runs: dict[str, Run] = {}
    for row in EVERY_ROW:
        for storage in ("dtensor", "local"):
            runs[f"{storage} {row}"] = Run(model=mixture("qwen2_moe"), row=row, storage=storage)
        runs[f"checkpointed {row}"] = Run(model=mixture("qwen2_moe"), row=row, prepare=checkpointing)
        for how in IMPLEMENTATIONS:
            runs[f"{how} {row}"] = Run(model=mixture("gpt_oss"), row=row, prepare=partial(switched, how=how))
        runs[f"back and forth {row}"] = Run(model=mixture("gpt_oss"), row=row, prepare=switching)
    return starts(runs)


def check(what: str, row: Row) -> list[Found]:
    ranks: list[Found] = kept_runs()[f"{what} {row}"]
    for one in ranks:
        assert one.logits <= LOGITS
        assert one.loss <= LOGITS
        assert one.gradient <= GRADIENTS, one.gradients
    return ranks


@pytest.mark.parametrize("row", EVERY_ROW, ids=str)
@pytest.mark.parametrize("storage", ["dtensor", "local"])
def test_a_mixture_is_right_in_both_storages(storage: str, row: Row) -> None:
    check(storage, row)


@pytest.mark.parametrize("row", EVERY_ROW, ids=str)
@pytest.mark.parametrize("how", [*IMPLEMENTATIONS, "back and forth"])
def test_experts_may_run_otherwise_at_any_time(how: str, row: Row) -> None:
    check(how, row)


@pytest.mark.parametrize("row", EVERY_ROW, ids=str)
def test_layers_that_are_computed_again_have_the_same_gradients(row: Row) -> None:
    again = check("checkpointed", row)
    once = kept_runs()[f"dtensor {row}"]
    for first, second in zip(once, again, strict=True):
        forward, backward = ([call for call in second.calls if call.backward is back] for back in (False, True))
        assert len(forward) == sum(not call.backward for call in first.calls)
        assert len(backward) > sum(call.backward for call in first.calls)  # sums wait and are made whole there again


def in_bfloat16(model: Any, row: Row) -> dict[str, Any]:
    """How far gradients under autocast are off from those in float32, on the ranks and in one process."""
    batch, wholes = tokens(), [copy.deepcopy(model) for _ in range(2)]
    parallel = split(Run(model=model, row=row))
    for each, precise in zip((*wholes, parallel), (True, False, False), strict=True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not precise):
            loss = each(input_ids=batch, labels=batch).loss
        loss.backward()
    true, rounded, ours = (full_gradients(each) for each in (*wholes, parallel))
    length = sum(gradient.square().sum() for gradient in true.values()).sqrt()

    def distance(gradients: dict[str, Tensor]) -> float:
        squares = [(gradients[name] - want).square().sum() for name, want in true.items()]
        return (sum(squares).sqrt() / length).item()  # type: ignore[attr-defined]

    return {"names": ours.keys() == true.keys(), "ours": distance(ours), "one process": distance(rounded)}


REENTERED = ("qwen2_moe", "gemma4_text")  # gemma4's router and experts lie in the layer itself
REENTERED_ROWS = (TP2_EP2, TP2_DISPATCH, TP4_EP2_ETP2)


@cache
def reentered_runs() -> Starts:
    # of what layers share besides their input, such a backward loses the gradient: in one process too
    runs = [(kind, row, reentering(copy.deepcopy(mixture(kind)))) for kind in REENTERED for row in REENTERED_ROWS]
    return starts({f"{kind} {row}": Run(model=model, row=row, prepare=reentering) for kind, row, model in runs})


@pytest.mark.parametrize("row", REENTERED_ROWS, ids=str)
@pytest.mark.parametrize("model_type", REENTERED)
def test_layers_that_are_computed_again_within_backward_have_them_too(model_type: str, row: Row) -> None:
    for one in reentered_runs()[f"{model_type} {row}"]:
        assert one.logits <= LOGITS
        assert one.gradient <= GRADIENTS, one.gradients


@cache
def cast_runs() -> Starts:
    pairs = [(kind, row) for kind in ("mixtral", "qwen2_moe") for row in (TP2_EP2, TP2_DISPATCH)]
    return Starts({f"{kind} {row}": (row.world, partial(in_bfloat16, mixture(kind), row)) for kind, row in pairs})


@pytest.mark.parametrize("row", [TP2_EP2, TP2_DISPATCH], ids=str)
@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe"])
def test_a_mixture_runs_and_learns_under_autocast(model_type: str, row: Row) -> None:
    for one in cast_runs()[f"{model_type} {row}"]:
        assert one["names"]
        assert 0 < one["one process"] < FAR
        assert one["ours"] < 2 * one["one process"]  # what is rounded elsewhere, is rounded no more


# ---- copies


def copied(model: Any, row: Row) -> dict[str, Any]:
    """A copy of a parallel model after both have run, and the original after its copy was changed."""
    batch = tokens()
    original = split(Run(model=model, row=row))
    twin = copy.deepcopy(original)
    first, second = (each(input_ids=batch, labels=batch) for each in (original, twin))
    second.loss.backward()
    gradients = full_gradients(twin)
    untouched = all(p.grad is None for p in original.parameters())
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    for module in twin.modules():
        if hasattr(module, "num_experts"):
            module.num_experts = -1
    after = original(input_ids=batch, labels=batch)
    after.loss.backward()
    own = full_gradients(original)
    return {
        "outputs": torch.equal(first.logits, second.logits),
        "gradients": {name for name in own.keys() | gradients.keys() if not torch.equal(own[name], gradients[name])},
        "untouched": untouched,
        "after": torch.equal(first.logits, after.logits),
        "zero": not twin.get_input_embeddings()(batch).any(),
    }


COPIED = ("mixtral", "qwen2_moe", "gpt_oss", "llama4_text")


@cache
def copy_runs() -> Starts:
    pairs = [(kind, row) for kind in COPIED for row in EVERY_ROW]
    return Starts({f"{kind} {row}": (row.world, partial(copied, mixture(kind), row)) for kind, row in pairs})


@pytest.mark.parametrize("row", EVERY_ROW, ids=str)
@pytest.mark.parametrize("model_type", COPIED)
def test_a_copy_computes_the_same_and_leaves_the_original_alone(model_type: str, row: Row) -> None:
    for one in copy_runs()[f"{model_type} {row}"]:
        assert one == {"outputs": True, "gradients": set(), "untouched": True, "after": True, "zero": True}
