"""A sequence split over real ranks: checkpoints, training, layers computed again, dropout."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_on_ranks
from rows import Row, check_saved
from sequence_cases import EXACT, TP2, Values, check_values, gradients_of, split_model, step, weighed, whole_model
from tiny import Truth, assert_close, tokens
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_ as torch_clip

from parallel_plans import AutoModelForCausalLM, clip_grad_norm_, full_state_dict

LOGITS, GRADIENTS = 1e-4, 1e-3  # of the largest value, float32
STEPS = 3


def loaded(folder: str, target: str, truth: Truth, storage: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        folder, tp_plan="auto", sp_plan="auto", storage=storage, attn_implementation="eager"
    )
    batch = tokens()
    output = model(input_ids=batch, labels=batch)
    output.loss.backward()
    assert_close("logits", output.logits, truth.logits, relative=LOGITS)
    assert_close("loss", output.loss, truth.loss, relative=LOGITS)
    check_values(gradients_of(model), truth.gradients, GRADIENTS)
    made = model.generate(batch, max_new_tokens=6, do_sample=False, attention_mask=batch.ne(-1))
    assert made.tolist() == truth.continuation.tolist()
    model.save_pretrained(target)
    check_saved(folder, target)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize(("model_type", "tied", "storage"), [("llama", True, "dtensor"), ("gpt_neox", False, "local")])
def test_a_checkpoint_is_loaded_run_and_saved_with_its_sequence_split(
    model_type: str, tied: bool, storage: str, ranks: int, checkpoints: Callable[..., Any], tmp_path: Path
) -> None:
    folder, truth = checkpoints(model_type, tied)
    run_on_ranks(loaded, ranks, str(folder), str(tmp_path / "saved"), truth, storage)


def trained(model: Any, clip: Callable[..., Any]) -> list[float]:
    """The norms of the gradients of some steps of AdamW, each clipped."""
    optimizer, norms = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for seed in range(STEPS):
        optimizer.zero_grad()
        model(input_ids=tokens(seed=seed), labels=tokens(seed=seed)).loss.backward()
        norm = clip(model if clip is clip_grad_norm_ else model.parameters(), 0.5)
        norms.append(float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm))
        optimizer.step()
    return norms


def training(models: dict[str, Any]) -> list[tuple[str, list[float], Values]]:
    """What became of every model, clipped by torch where it keeps DTensors, by ours in both forms."""
    found = []
    for name, model in models.items():
        for storage, clip in (("dtensor", torch_clip), ("dtensor", clip_grad_norm_), ("local", clip_grad_norm_)):
            own = split_model(model, TP2, storage)
            norms = trained(own, clip)
            found.append((name, norms, full_state_dict(own)))
    return found


def test_steps_of_training_are_those_of_one_process() -> None:
    models = {name: whole_model(name, tied=name == "llama") for name in ("llama", "starcoder2")}
    truths = {name: copy.deepcopy(model) for name, model in models.items()}
    norms = {name: trained(truth, torch_clip) for name, truth in truths.items()}
    for results in run_on_ranks(training, 2, models):
        for name, found, state in results:
            assert found == pytest.approx(norms[name], rel=1e-6)  # ours is in float32
            check_values(state, truths[name].state_dict(), 1e-6)


def again(cases: list[tuple[Any, Row]]) -> list[list[Values]]:
    """For every case gradients with nothing computed again, and with layers computed again in either way."""
    found = []
    for model, row in cases:
        own, results = split_model(model, row), []
        for reentrant in (None, True, False):
            for layer in own.modules():
                if hasattr(layer, "gradient_checkpointing"):
                    layer.gradient_checkpointing = False
            if reentrant is not None:
                own.gradient_checkpointing_enable({"use_reentrant": reentrant})
            own.train()
            torch.manual_seed(dist.get_rank())
            for _ in range(2):
                own.zero_grad()
                values = step(7, use_cache=False)(own)
            results.append(values)
        found.append(results)
    return found


def test_layers_computed_again_split_the_sequence_as_before_and_draw_the_same() -> None:
    """Two lengths at a time, too: what is computed again lies as it lay when it was computed first."""
    travelling = Row(world=2, tp=2, ep=2, dispatch=True)
    cases = [
        (whole_model("llama"), TP2),
        (whole_model("cohere"), TP2),
        (whole_model("gpt_neox", hidden_dropout=0.3, attention_dropout=0.2), TP2),
        (whole_model("mixtral", attention_dropout=0.2), travelling),
    ]
    for results in run_on_ranks(again, 2, cases):
        for kept, *others in results:
            for values in others:
                check_values(values, kept, 1e-6)


def at_once(model: Any) -> Values:
    """Gradients of two batches whose layers are computed again after both forwards."""
    own = split_model(model, TP2)
    own.gradient_checkpointing_enable({"use_reentrant": False})
    return _two_at_once(own.train())


def _two_at_once(model: Any) -> Values:
    long = model(tokens(length=9), use_cache=False).logits
    short = model(tokens(rows=1, length=4), use_cache=False).logits
    weighed(short).backward()
    weighed(long).backward()
    return gradients_of(model)


def test_forwards_of_two_lengths_are_computed_again_each_in_its_own() -> None:
    model = whole_model("llama")
    truth = _two_at_once(copy.deepcopy(model))
    for values in run_on_ranks(at_once, 2, model):
        check_values(values, truth, EXACT)


class Seen:
    """Which elements a dropout has let through."""

    def __init__(self, module: nn.Module) -> None:
        self.masks: list[Tensor] = []
        module.register_forward_hook(self.after)

    def after(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.masks.append(output.detach() != 0)


def dropped(model: Any) -> tuple[Tensor, list[Tensor]]:
    """The masks of the dropout before the layers, and those of both dropouts in every layer."""
    own = split_model(model, TP2).train()
    torch.manual_seed(5 + dist.get_rank())  # ranks that were not told to draw alike
    before = Seen(own.gpt_neox.emb_dropout)
    within = [Seen(each) for la in own.gpt_neox.layers for each in (la.post_attention_dropout, la.post_mlp_dropout)]
    own(tokens(rows=4, length=32))
    return before.masks[0], [seen.masks[0] for seen in within]


def test_dropout_draws_for_every_token_once() -> None:
    """Before the layers values are whole and all ranks drop the same; in them each draws for its own tokens."""
    model = whole_model("gpt_neox", hidden_dropout=0.5)
    (before, first), (also_before, second) = run_on_ranks(dropped, 2, model)
    assert before.shape == (4, 32, 48)
    assert torch.equal(before, also_before)
    parts = [*first, *second]
    for part in parts:
        assert part.shape == (4, 16, 48)
        assert 0.45 < part.double().mean() < 0.55
    for at, part in enumerate(parts):
        for other in parts[at + 1 :]:
            assert 0.4 < (part == other).double().mean() < 0.6, "drawn independently"
