"""Tokens that travel: from ranks with as many as they like, or with none, in the same bits every time."""

from __future__ import annotations

import copy
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from expert_runs import (
    EP4,
    IMPLEMENTATIONS,
    OWN_LOOPS,
    TP4_EP2_ETP2_DISPATCH,
    Run,
    Starts,
    changed,
    mixture,
    off,
    plan_of,
    split,
    squared,
    starts,
)
from ranks import run_on_ranks
from rows import GRADIENTS, LOGITS, Row
from tiny import HIDDEN, tokens
from torch import Tensor
from waits import noted_waits

from parallel_plans import AutoModelForCausalLM, average_gradients, full_gradients
from parallel_plans.state import local_part

TP2_EP4 = Row(world=4, tp=2, ep=4, etp=1)

# ---- batches of different sizes

SHAPES = ((1, 3), (2, 11), (1, 1), (2, 5))


def batches_of(shapes: tuple[tuple[int, int], ...]) -> tuple[Tensor, ...]:
    return tuple(tokens(rows=rows, length=length, seed=at) for at, (rows, length) in enumerate(shapes))


SIZED = ("mixtral", "qwen2_moe", "gpt_oss", "deepseek_v3", *OWN_LOOPS)


@cache
def sized_runs() -> Starts:
    runs: dict[str, Run] = {}
    for kind in SIZED:
        runs[f"{kind} {EP4}"] = Run(model=mixture(kind), row=EP4, batches=batches_of(SHAPES), loss=squared)
        runs[f"{kind} {TP2_EP4}"] = Run(model=mixture(kind), row=TP2_EP4, batches=batches_of(SHAPES[1:3]), loss=squared)
    return starts(runs)


@pytest.mark.parametrize("row", [EP4, TP2_EP4], ids=str)
@pytest.mark.parametrize("model_type", SIZED)
def test_ranks_may_have_batches_of_different_sizes(model_type: str, row: Row) -> None:
    for one in sized_runs()[f"{model_type} {row}"]:
        assert one.logits <= LOGITS
        assert one.gradient <= GRADIENTS, one.gradients


# ---- a rank without tokens: no model runs on an empty batch, but blocks of experts do

BLOCKS = {
    "mixtral": "model.layers.0.mlp",
    "qwen2_moe": "model.layers.1.mlp",
    "gpt_oss": "model.layers.0.mlp",
    "deepseek_v3": "model.layers.1.mlp",
    "llama4_text": "model.layers.1.feed_forward",
    "longcat_flash": "model.layers.0.mlp",
    "jetmoe": "model.layers.0.mlp",
    "dbrx": "transformer.blocks.0.ffn",
}
SIZES = ((0, 5), (2, 3), (0, 0), (1, 4))


def hidden_of(at: int) -> Tensor:
    draw = torch.Generator().manual_seed(at)
    return torch.randn(*SIZES[at], HIDDEN, generator=draw).requires_grad_()


def through_block(model: Any, name: str, hidden: Tensor) -> Tensor:
    """The output of a block; its gradient is left in `hidden` and in the model."""
    output = model.get_submodule(name)(hidden)
    output = output if isinstance(output, Tensor) else output[0]
    output.square().sum().backward()
    return output.detach().view(hidden.shape)


def block_without_tokens(model: Any, name: str, implementation: str) -> dict[str, float]:
    """How far this rank's output and its input's gradient, and all gradients of the block, are off."""
    whole, rank = copy.deepcopy(model), dist.get_rank()
    hiddens = [hidden_of(at) for at in range(len(SIZES))]
    outputs = [through_block(whole, name, hidden) if hidden.numel() else hidden.detach() for hidden in hiddens]
    parallel, hidden = split(Run(model=model, row=EP4, implementation=implementation)), hidden_of(rank)
    found = {"output": off(through_block(parallel, name, hidden), outputs[rank])}
    assert hidden.grad is not None
    if hidden.numel():
        found["input"] = off(hidden.grad, hiddens[rank].grad)  # type: ignore[arg-type]
    for own, parameter in parallel.get_submodule(name).named_parameters():
        assert (parameter.grad is None) == (whole.get_parameter(f"{name}.{own}").grad is None), own
    average_gradients(parallel)
    gradients = full_gradients(parallel)
    for own, parameter in whole.get_submodule(name).named_parameters():
        if parameter.grad is not None:
            found[own] = off(gradients[f"{name}.{own}"] * len(SIZES), parameter.grad)
    return found


WITHOUT = [(kind, "eager") for kind in BLOCKS] + [("mixtral", "batched_mm"), ("mixtral", "grouped_mm")]


@cache
def empty_runs() -> Starts:
    return Starts(
        {f"{kind} {how}": (4, partial(block_without_tokens, mixture(kind), BLOCKS[kind], how)) for kind, how in WITHOUT}
    )


@pytest.mark.parametrize(("model_type", "how"), WITHOUT)
def test_a_rank_may_have_no_token_at_all(model_type: str, how: str) -> None:
    for one in empty_runs()[f"{model_type} {how}"]:
        assert one.pop("output") <= LOGITS
        assert max(one.values()) <= GRADIENTS, one


# ---- the same bits, one wait

DISPATCHED_ROWS = (EP4, TP2_EP4, TP4_EP2_ETP2_DISPATCH)
REPEATED = [("mixtral", how, row) for how in IMPLEMENTATIONS for row in DISPATCHED_ROWS]
REPEATED += [(kind, "eager", EP4) for kind in OWN_LOOPS]


def differing(model: Any, row: Row, implementation: str) -> list[str]:
    """What is not the same in every bit when it is computed again."""
    parallel = split(Run(model=model, row=row, implementation=implementation))
    batch, found = batches_of(SHAPES)[dist.get_rank() // row.tp], []
    for _ in range(2):
        parallel.zero_grad()
        output = parallel(input_ids=batch, labels=batch) if batch.numel() > 1 else parallel(input_ids=batch)
        output.logits.square().mean().backward()
        gradients = {name: local_part(p.grad).clone() for name, p in parallel.named_parameters() if p.grad is not None}
        found.append({"logits": output.logits.detach(), **gradients})
    first, second = found
    return [name for name in first.keys() | second.keys() if not torch.equal(first[name], second[name])]


@cache
def repeated_runs() -> Starts:
    return Starts(
        {f"{k} {how} {row}": (row.world, partial(differing, mixture(k), row, how)) for k, how, row in REPEATED}
    )


@pytest.mark.parametrize(("model_type", "how", "row"), REPEATED, ids=str)
def test_what_is_computed_again_is_the_same_in_every_bit(model_type: str, how: str, row: Row) -> None:
    assert repeated_runs()[f"{model_type} {how} {row}"] == [[]] * row.world


def waits_of(model: Any, row: Row, implementation: str, align_size: int) -> list[list[str]]:
    """What makes the host wait in every block of experts, forward and backward."""
    rule = {"style": "ep_dispatch", "align_size": align_size}
    plan = changed(plan_of(model.config.model_type), "dispatch_plan", "model.layers.*.mlp.experts", rule)
    parallel, found = split(Run(model=model, row=row, plan=plan, implementation=implementation)), []
    for layer in parallel.model.layers:
        hidden = torch.randn(2, 4, HIDDEN, requires_grad=True)
        with noted_waits() as waits:
            output = layer.mlp(hidden)
            output.backward(torch.ones_like(output))
        found.append(waits)
    return found


WAITING = [(how, row, align) for how in ("batched_mm", "grouped_mm") for row in DISPATCHED_ROWS for align in (1, 8)]


@cache
def waiting_runs() -> Starts:
    model = mixture("mixtral")
    return Starts({f"{h} {r} {a}": (r.world, partial(waits_of, model, r, h, a)) for h, r, a in WAITING})


@pytest.mark.parametrize(("how", "row", "align_size"), WAITING, ids=str)
def test_the_host_waits_for_the_device_once_in_every_layer(how: str, row: Row, align_size: int) -> None:
    for waits in waiting_runs()[f"{how} {row} {align_size}"]:
        assert waits == [["tolist"]] * len(waits)


# ---- generation

PROMPTS = tuple(tokens(rows=rows, length=length, seed=20 + at) for at, (rows, length) in enumerate(SHAPES))
NEW = 5


def generated(folder: str, row: Row, wanted: list[Tensor], stops: list[list[int]]) -> tuple[list[Any], list[Any]]:
    """This rank's continuation of its prompts, which stop at tokens of their own, and that of one process."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, tp_plan="auto", tp_size=row.tp, ep_size=row.ep, etp_size=row.etp, attn_implementation="eager"
    )
    index = dist.get_rank() // row.tp
    prompt = PROMPTS[index]
    made = model.generate(
        prompt, max_new_tokens=NEW, do_sample=False, attention_mask=torch.ones_like(prompt), eos_token_id=stops[index]
    )
    return made.tolist(), wanted[index].tolist()


@pytest.mark.parametrize("row", [EP4, TP2_EP4], ids=str)
@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe", "llama4_text"])
def test_ranks_generate_from_prompts_of_their_own_until_they_stop(
    mixtures: Any, tmp_path: Path, model_type: str, row: Row
) -> None:
    folder, _ = mixtures(model_type)
    model, stops, wanted = mixture(model_type), [], []
    for at, prompt in enumerate(PROMPTS):
        arguments = {"max_new_tokens": NEW, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
        free = model.generate(prompt, eos_token_id=[-1], **arguments)
        # the first and the last stop at what would be their second token, as soon as all their rows have had it
        stops.append(sorted(set(free[:, prompt.shape[1] + 1].tolist())) if at in (0, 3) else [-1])
        wanted.append(model.generate(prompt, eos_token_id=stops[-1], **arguments))
    lengths = {made.shape[1] - prompt.shape[1] for made, prompt in zip(wanted, PROMPTS, strict=True)}
    assert min(lengths) < NEW
    assert max(lengths) == NEW
    for made, want in run_on_ranks(generated, row.world, str(folder), row, wanted, stops):
        assert made == want
