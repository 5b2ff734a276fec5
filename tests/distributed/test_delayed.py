"""Sums wait in the layers in which they meet, and nowhere else: reductions, values, gradients, dropout."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from delayed_cases import CASES, HIDDEN, PLAN, ROWS, Model, Own, in_a_row_with_factors, side_by_side
from ranks import run_on_ranks
from tiny import assert_close, randomized, tokens
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from parallel_plans import full_gradients, parallelize
from parallel_plans.collectives import record_collectives
from parallel_plans.lookup import bundled_folder

EXACT = 1e-10  # of the largest value, in float64
RANKS = (2, 4)
LAYERS = 2


def made(name: str) -> Any:
    torch.manual_seed(0)
    case = CASES[name]
    return randomized(Model(case.join, case.dropout).double())


def batch() -> Tensor:
    return torch.linspace(-2, 1, 2 * ROWS * HIDDEN, dtype=torch.float64).view(2, ROWS, HIDDEN).sin()


def step(model: Any) -> Tensor:
    """The output in training mode, after its backward; every process draws the same random numbers."""
    torch.manual_seed(11)
    output = model.train()(batch())
    (output * torch.arange(1, HIDDEN + 1)).square().mean().backward()
    return output.detach()


def on_mesh(model: Any, ranks: int, plan: Any = PLAN) -> Any:
    return parallelize(model, plan, init_device_mesh("cpu", (ranks,), mesh_dim_names=("tp",)))


def found(ranks: int) -> dict[str, Any]:
    """For every case the reductions of a layer in both modes, in two runs each, and what it computed."""
    results: dict[str, Any] = {}
    for name in CASES:
        model, counts, outputs = on_mesh(made(name), ranks), [], []
        for _ in range(2):
            model.zero_grad()
            with record_collectives() as calls:
                outputs.append(step(model))
            counts.append(sum(call.op == "all_reduce" and not call.backward for call in calls) / LAYERS)
            with torch.no_grad(), record_collectives() as calls:
                outputs.append(model.eval()(batch()))
            counts.append(len(calls) / LAYERS)
        results[name] = counts, outputs, full_gradients(model)
    return results


@cache
def on_ranks(ranks: int) -> list[dict[str, Any]]:
    return run_on_ranks(found, ranks, ranks)


each_size = pytest.mark.parametrize("ranks", RANKS)
each_case = pytest.mark.parametrize("name", CASES)


@each_size
@each_case
def test_a_layer_reduces_where_sums_have_met_from_its_first_run_on(name: str, ranks: int) -> None:
    case = CASES[name]
    training = case.count if case.training is None else case.training
    for results in on_ranks(ranks):
        assert results[name][0] == [training, case.count] * 2


@each_size
@each_case
def test_values_and_gradients_are_those_of_one_process(name: str, ranks: int) -> None:
    model = made(name)
    trained = step(model)
    truth = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    with torch.no_grad():
        alone = model.eval()(batch())
    for results in on_ranks(ranks):
        _, outputs, gradients = results[name]
        for output, want in zip(outputs, [trained, alone] * 2, strict=True):
            assert_close(name, output, want, relative=EXACT)
        assert gradients.keys() == truth.keys()
        for key, gradient in gradients.items():
            assert_close(f"{name}: {key}", gradient, truth[key], relative=EXACT)


@each_size
def test_a_trial_in_vain_changes_no_bit(ranks: int) -> None:
    for results in on_ranks(ranks):
        for name in ("in a row", "in a row, with dropout", "in a row, with trained factors"):
            first, _, second, _ = results[name][1]
            assert torch.equal(first, second), name


def left_behind(ranks: int) -> list[int]:
    """How many hooks more modules have after their first runs than before."""
    counts = []
    for name in ("in a row", "side by side"):
        model = on_mesh(made(name), ranks)
        before = sum(len(module._forward_pre_hooks) for module in model.modules())
        step(model)
        counts.append(sum(len(module._forward_pre_hooks) for module in model.modules()) - before)
    return counts


def test_nothing_is_left_of_a_trial() -> None:
    assert run_on_ranks(left_behind, 2, 2) == [[0, 0]] * 2


def computed_again(ranks: int) -> list[dict[str, Tensor]]:
    results = []
    for join in (in_a_row_with_factors, side_by_side):
        model = on_mesh(randomized(Model(join).double()), ranks)
        for use_reentrant in (False, True):
            model.zero_grad()
            x = batch().requires_grad_()
            for layer in model.train().layers:
                x = checkpoint(layer, x, use_reentrant=use_reentrant)
            x.square().mean().backward()
            results.append(full_gradients(model))
    return results


def test_layers_that_are_computed_again_in_backward_do_as_they_did() -> None:
    truths = []
    for join in (in_a_row_with_factors, side_by_side):
        model = randomized(Model(join).double())
        model(batch()).square().mean().backward()
        truths += [{key: p.grad for key, p in model.named_parameters() if p.grad is not None}] * 2
    for results in run_on_ranks(computed_again, 2, 2):
        for gradients, truth in zip(results, truths, strict=True):
            for key, gradient in gradients.items():
                assert_close(key, gradient, truth[key], relative=EXACT)


def with_own_code(ranks: int) -> tuple[Tensor, int]:
    model = randomized(Model(CASES["one of them through a norm"].join).double())
    for layer in model.layers:
        norm = Own(HIDDEN, dtype=torch.float64)
        norm.load_state_dict(layer.norm.state_dict())  # type: ignore[union-attr, operator]
        layer.norm = norm
    alone = step(copy.deepcopy(model)) if ranks == 1 else None
    if alone is not None:
        return alone, 0
    with record_collectives() as calls:
        output = step(on_mesh(model, ranks))
    return output, sum(not call.backward for call in calls)


def test_a_module_with_parameters_is_given_plain_values() -> None:
    truth, _ = with_own_code(1)
    for output, count in run_on_ranks(with_own_code, 2, 2):
        assert_close("output", output, truth, relative=EXACT)
        assert count == 2 * LAYERS


def switched_off(ranks: int, names: tuple[str, ...]) -> tuple[int, Tensor]:
    rule = {"style": "rowwise", "delay": False}
    plan = {**{f"layers.*.{name}.down": rule for name in names}, **PLAN}
    if len(names) == 2:
        del plan["layers.*.*.down"]
    model = on_mesh(made("side by side"), ranks, plan)
    with torch.no_grad(), record_collectives() as calls:
        output = model.eval()(batch())
    return len(calls) // LAYERS, output


@pytest.mark.parametrize("names", [("one",), ("two",), ("one", "two")])
def test_a_rule_can_say_that_its_sum_is_reduced_at_once(names: tuple[str, ...]) -> None:
    with torch.no_grad():
        truth = made("side by side").eval()(batch())
    for count, output in run_on_ranks(switched_off, 2, 2, names):
        assert count == 2
        assert_close("output", output, truth, relative=EXACT)


# Models of transformers: `phi` and `falcon` with plans of the test's own.

PLANS: dict[str, Any] = {
    "phi": {
        "model.embed_tokens": "embedding_rowwise",
        "model.layers.*.self_attn.q_proj": "colwise",
        "model.layers.*.self_attn.k_proj": "colwise",
        "model.layers.*.self_attn.v_proj": "colwise",
        "model.layers.*.self_attn.dense": "rowwise",
        "model.layers.*.mlp.fc1": "colwise",
        "model.layers.*.mlp.fc2": "rowwise",
        "lm_head": "colwise_gather_output",
        "**": "replicate",
    },
    "falcon": {
        "transformer.word_embeddings": "embedding_rowwise",
        "transformer.h.*.mlp.dense_h_to_4h": "colwise",
        "transformer.h.*.mlp.dense_4h_to_h": "rowwise",
        "transformer.h.*.self_attention.query_key_value": {"style": "colwise", "unit": 24},
        "transformer.h.*.self_attention.dense": {"style": "rowwise", "unit": 8},
        "transformer.h.*.self_attention": {"style": "local_counts", "counts": {"num_heads": 1, "num_kv_heads": 1}},
        "lm_head": "colwise_gather_output",
        "**": "replicate",
    },
}
SIZES: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 70,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
OWN: dict[str, Any] = {
    "falcon": {"new_decoder_architecture": False, "parallel_attn": True, "multi_query": False, "bias": True},
    "gpt_neox": {"use_parallel_residual": True},
}
PER_LAYER = {"cohere": 1, "gpt_neox": 1, "phi": 1, "falcon": 1, "llama": 2, "starcoder2": 2}


def causal_lm(model_type: str) -> Any:
    config = CONFIG_MAPPING[model_type](**{**SIZES, **OWN.get(model_type, {})})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    return randomized(model.double()).eval()


def loss_of(model: Any) -> Tensor:
    loss: Tensor = model(input_ids=tokens(), labels=tokens(), use_cache=False).loss
    loss.backward()
    return loss.detach()


def of_transformers(ranks: int) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for model_type in PER_LAYER:
        plan = PLANS.get(model_type, bundled_folder() / f"{model_type}.yaml")
        model, counts = on_mesh(causal_lm(model_type), ranks, plan), []
        for batch in (tokens(), tokens(), tokens()[:1, :1]):
            with torch.no_grad(), record_collectives() as calls:
                model(input_ids=batch, use_cache=False)
            counts.append((sum(call.op == "all_reduce" for call in calls) - 1) / LAYERS)  # one for the embedding
        results[model_type] = counts, loss_of(model), full_gradients(model)
    return results


@cache
def of_transformers_on(ranks: int) -> list[dict[str, Any]]:
    return run_on_ranks(of_transformers, ranks, ranks)


@each_size
@pytest.mark.parametrize("model_type", PER_LAYER)
def test_attention_and_mlp_side_by_side_are_reduced_once(model_type: str, ranks: int) -> None:
    model = causal_lm(model_type)
    loss = loss_of(model)
    truth = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    for results in of_transformers_on(ranks):
        counts, got, gradients = results[model_type]
        assert counts == [PER_LAYER[model_type]] * 3
        assert_close("loss", got, loss, relative=EXACT)
        assert gradients.keys() == truth.keys()
        for key, gradient in gradients.items():
            assert_close(key, gradient, truth[key], relative=EXACT)


def copies(ranks: int) -> tuple[int, int]:
    """The reductions of a layer in a copy of a model that has run, and in the model."""
    model = on_mesh(made("side by side"), ranks)
    with torch.no_grad():
        model(batch())
        twin: nn.Module = copy.deepcopy(model)
        counts = []
        for each in (twin, model):
            with record_collectives() as calls:
                each(batch())
            counts.append(len(calls) // LAYERS)
    return counts[0], counts[1]


def test_in_a_copied_model_sums_wait_too() -> None:
    assert run_on_ranks(copies, 2, 2) == [(1, 1)] * 2
