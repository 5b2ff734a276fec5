"""Random numbers in training: common where values are whole, a rank's own where they are parts, the same in recompute.

Masks are written down where dropout draws them. One process that is given the ranks' masks, put together, must have
their loss and gradients.
"""

from __future__ import annotations

import copy
import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import combinations
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_on_ranks
from tiny import assert_close, tiny_model, tokens
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from parallel_plans import full_gradients, parallelize
from parallel_plans.lookup import bundled_folder
from parallel_plans.partial import whole
from parallel_plans.storage import Storage
from parallel_plans.training.random_streams import _Site

WHOLE = {  # dropout of whole values alone, and routers that draw
    "gpt_neox": {"hidden_dropout": 0.2},
    "starcoder2": {"residual_dropout": 0.2, "embedding_dropout": 0.1},
    "mixtral": {"router_jitter_noise": 0.3},
    "phimoe": {"router_jitter_noise": 0.05, "input_jitter_noise": 0.1},
}
PARTS = {"llama": {"attention_dropout": 0.3}, "gpt_neox": {"hidden_dropout": 0.2, "attention_dropout": 0.3}}


def one(kind: str, changes: dict[str, Any]) -> Any:
    return tiny_model(kind, tied=False, **changes).train()


def split(kind: str, changes: dict[str, Any], storage: Storage = "dtensor", **sizes: int) -> Any:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    return parallelize(one(kind, changes), bundled_folder() / f"{kind}.yaml", mesh, storage=storage, **sizes)


def step(model: Any) -> Tensor:
    """The loss; the gradients are the model's."""
    model.zero_grad()
    batch = tokens()
    loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    return loss.detach()


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@contextmanager
def dropout_through(mask_for: Any) -> Iterator[list[Tensor]]:
    """What every dropout multiplied with: the mask that `mask_for(value, p)` gives."""
    seen: list[Tensor] = []

    def dropout(value: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not training or p == 0:
            return value
        seen.append(mask_for(value, p))
        return whole(value) * seen[-1]  # as dropout does with a sum that waits

    original, nn.functional.dropout = nn.functional.dropout, dropout
    try:
        yield seen
    finally:
        nn.functional.dropout = original


def drawn(value: Tensor, p: float) -> Tensor:
    """What dropout draws, at the cost in random numbers that it has."""
    return torch.empty(value.shape).bernoulli_(1 - p) / (1 - p)


# whole values


def of_whole(kind: str, changes: dict[str, Any], sizes: dict[str, int]) -> Any:
    model = split(kind, changes, **sizes)
    torch.manual_seed(5)
    with dropout_through(drawn) as masks:
        losses = [step(model), step(model)]
    return losses, masks, full_gradients(model), torch.rand(1)


@pytest.mark.parametrize(
    ("kind", "ranks", "sizes"),
    [
        ("gpt_neox", 4, {}),
        ("starcoder2", 2, {}),
        ("mixtral", 2, {"ep_size": 2}),
        ("mixtral", 4, {"ep_size": 2, "etp_size": 2}),
        ("phimoe", 2, {}),
    ],
)
def test_where_values_are_whole_the_numbers_are_those_of_one_process(
    kind: str, ranks: int, sizes: dict[str, int]
) -> None:
    model = one(kind, WHOLE[kind])
    torch.manual_seed(5)
    with dropout_through(drawn) as truth:
        losses = [step(model), step(model)]
    after, wanted = torch.rand(1), gradients(model)
    assert losses[0] != losses[1]
    for found, masks, got, next_number in run_on_ranks(of_whole, ranks, kind, WHOLE[kind], sizes):
        assert all(map(torch.equal, masks, truth))
        assert len(masks) == len(truth)
        assert_close("losses", torch.stack(found), torch.stack(losses), relative=1e-5)
        assert torch.equal(next_number, after)
        for name, gradient in wanted.items():
            assert_close(name, got[name], gradient, relative=1e-3)


# parts

CHECKPOINTS = {"kept": None, "reentrant": True, "not reentrant": False}


def of_parts(kind: str, storage: Storage) -> Any:
    """For each way to keep activations: loss, masks of the forward, masks of the backward, gradients."""
    found = []
    for use_reentrant in CHECKPOINTS.values():
        model = split(kind, PARTS[kind], storage)
        if use_reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        torch.seed()  # other numbers on every rank
        if dist.get_rank() == 0:
            torch.manual_seed(6)
        batch = tokens()
        with dropout_through(drawn) as masks:
            loss = model(input_ids=batch, labels=batch).loss
            forward = list(masks)
            loss.backward()
        found.append((loss.detach(), forward, masks[len(forward) :], full_gradients(model)))
    return found


@pytest.mark.parametrize(("kind", "ranks", "storage"), [("llama", 3, "dtensor"), ("gpt_neox", 4, "local")])
def test_where_values_are_parts_ranks_draw_numbers_of_their_own_and_the_same_again_in_backward(
    kind: str, ranks: int, storage: Storage
) -> None:
    results = run_on_ranks(of_parts, ranks, kind, storage)
    kept, *recomputed = results[0]
    joined = [_joined(list(masks)) for masks in zip(*(found[0][1] for found in results), strict=True)]
    assert any(mask.dim() == 4 for mask in joined)
    model, again = one(kind, PARTS[kind]), iter(joined)
    with dropout_through(lambda value, p: next(again)):
        loss = step(model)
    for rank, (own, *others) in enumerate(results):
        assert_close("loss", own[0], loss, relative=1e-5)
        for name, gradient in gradients(model).items():
            assert_close(name, own[3][name], gradient, relative=1e-3)
        for (found, masks, in_backward, got), first in zip(others, recomputed, strict=True):
            assert found == own[0] == first[0]
            assert all(map(torch.equal, masks, own[1])), rank
            assert sorted(map(_key, in_backward)) == sorted(map(_key, _of_layers(masks)))
            for name, gradient in own[3].items():
                assert_close(name, got[name], gradient, relative=1e-6)
    assert kept[2] == []


def _joined(masks: list[Tensor]) -> Tensor:
    """Masks of heads, which must differ, next to each other; a mask of whole values must be that of all ranks."""
    if masks[0].dim() == 3:
        assert all(torch.equal(mask, masks[0]) for mask in masks)
        return masks[0]
    for first, second in combinations(masks, 2):
        heads = min(first.shape[1], second.shape[1])
        assert not torch.equal(first[:, :heads], second[:, :heads])
    return torch.cat(masks, dim=1)


def _key(mask: Tensor) -> bytes:
    return mask.numpy().tobytes()


def _of_layers(masks: list[Tensor]) -> list[Tensor]:
    """Without that of the embedding, which lies outside of what is computed again (gpt_neox has one)."""
    return masks if masks[0].dim() == 4 else masks[1:]


def all_masks() -> list[Tensor]:
    model = split("llama", PARTS["llama"])
    torch.manual_seed(3)
    with dropout_through(drawn) as masks:
        for _ in range(3):
            step(model)
    return masks


def test_no_two_layers_or_steps_draw_the_same() -> None:
    for masks in run_on_ranks(all_masks, 2):
        assert len(masks) == 6
        assert len(set(map(_key, masks))) == 6


def of_experts() -> list[Tensor]:
    model = split("mixtral", {}, ep_size=2)
    for layer in model.model.layers:
        layer.mlp.experts.act_fn = nn.Sequential(nn.SiLU(), nn.Dropout(0.5))
    torch.manual_seed(3)
    with dropout_through(lambda value, p: drawn(value, p)[:1]) as masks:  # as many rows as there are tokens for a rank
        step(model)
    return [*masks, torch.rand(1)]


def test_experts_draw_numbers_of_their_own_and_leave_those_of_all_ranks_alone() -> None:
    (*one, after), (*other, after_other) = run_on_ranks(of_experts, 2)
    assert len(one) > 1
    assert len(other) > 1
    width = min(one[0].shape[-1], other[0].shape[-1])
    assert not {_key(mask[..., :width]) for mask in one} & {_key(mask[..., :width]) for mask in other}
    assert torch.equal(after, after_other)


# what is put around a module afterwards


class Adapter(nn.Module):
    """Drops part of what its layer is given, too, as adapters of low rank do."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.base_layer, self.dropout = layer, nn.Dropout(0.3)

    def forward(self, value: Tensor) -> Tensor:
        return self.base_layer(value) + 0 * self.dropout(value).sum()


def around(names: tuple[str, ...], call_body: bool) -> list[Tensor]:
    model = split("llama", {})
    for layer in model.model.layers:
        for name in names:
            setattr(layer.self_attn, name, Adapter(getattr(layer.self_attn, name)).train())
    torch.seed()
    with dropout_through(drawn) as masks, torch.no_grad():
        if call_body:
            model.model(input_ids=tokens())
        else:
            model(input_ids=tokens())
    return masks


@pytest.mark.parametrize("call_body", [False, True], ids=["the model", "the model without its head"])
def test_an_adapter_draws_what_fits_the_value_that_its_layer_is_given(call_body: bool) -> None:
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    one, other = run_on_ranks(around, 2, names, call_body)
    assert len(one) == 2 * len(names)
    is_same = [torch.equal(mask, other_mask) for mask, other_mask in zip(one, other, strict=True)]
    assert is_same == [True, True, True, False] * 2


# no random numbers


def hooks(model: nn.Module) -> int:
    each = [h for m in model.modules() for h in (*m._forward_pre_hooks.values(), *m._forward_hooks.values())]
    return sum(isinstance(getattr(hook, "__self__", None), _Site) for hook in each)


def without_numbers() -> list[tuple[bool, int]]:
    found = []
    for changes, train in (({}, True), (PARTS["llama"], False)):
        model = split("llama", changes).train(train)
        torch.seed()
        state = torch.get_rng_state()
        for _ in range(2):
            step(model)
            found.append((torch.equal(state, torch.get_rng_state()), hooks(model)))
    return found


def test_where_no_numbers_are_drawn_every_rank_keeps_its_own_and_modules_keep_no_hooks() -> None:
    for found in run_on_ranks(without_numbers, 2):
        assert found == [(True, 0)] * 4


def late(how: str) -> Any:
    model = split("llama", {})
    step(model)
    if how == "copied":
        step(model)
        model = copy.deepcopy(model)
    if how == "after eval":
        with torch.no_grad():
            model.eval()(input_ids=tokens())
        model.train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.3
        layer.input_layernorm = nn.Sequential(layer.input_layernorm, nn.Dropout(0.3))
    torch.seed()
    told = io.StringIO()
    handler = logging.StreamHandler(told)
    handler.setLevel(logging.WARNING)
    logging.getLogger("parallel_plans").addHandler(handler)
    with dropout_through(drawn) as masks:
        step(model)
        first = list(masks)
        step(model)
    return (first, masks[len(first) :]), "none in those before" in told.getvalue()


@pytest.mark.parametrize("how", ["at once", "copied", "after eval"])
def test_numbers_that_are_drawn_later_are_shared_from_the_next_forward_on_or_at_once(how: str) -> None:
    (one, told), (other, told_other) = run_on_ranks(late, 2, how)
    assert [told, told_other] == [how == "at once", False]  # rank 0 speaks for all
    for number, (masks, others) in enumerate(zip(one, other, strict=True)):
        same = [torch.equal(mask, other_mask) for mask, other_mask in zip(masks, others, strict=True)]
        if number == 1 or how != "at once":
            assert same == [True, False] * 2
        else:
            assert not any(same)


def copied() -> Any:
    model = split("gpt_neox", PARTS["gpt_neox"])
    torch.manual_seed(4)
    step(model)
    twin = copy.deepcopy(model)
    state = torch.get_rng_state()
    losses = [step(model)]
    torch.set_rng_state(state)
    losses.append(step(twin))
    return losses, hooks(model), hooks(twin)


def test_a_copy_of_a_model_draws_what_the_model_draws() -> None:
    for (loss, of_twin), own, of_copy in run_on_ranks(copied, 2):
        assert torch.equal(loss, of_twin)
        assert own == of_copy > 0


def interrupted() -> list[Tensor]:
    model = split("llama", PARTS["llama"])
    step(model)

    def stop(module: Any, args: Any) -> None:
        raise KeyboardInterrupt

    handle = model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(stop)  # a rank's own numbers are in use
    with pytest.raises(KeyboardInterrupt):
        step(model)
    handle.remove()
    torch.seed()
    with dropout_through(drawn) as masks:
        step(model)
    return [*masks, torch.rand(1)]


def test_after_an_interrupt_numbers_are_shared_again() -> None:
    (*one, after), (*other, after_other) = run_on_ranks(interrupted, 2)
    assert not any(map(torch.equal, one, other))
    assert torch.equal(after, after_other)
