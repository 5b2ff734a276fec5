"""The cost level: collectives and memory at real size against arithmetic by hand, real ranks, and the whole depth."""

from __future__ import annotations

import dataclasses
import itertools
import json
from functools import cache
from typing import Any

import pytest
import torch
from published import MODELS, original
from tiny import tiny_model, tokens
from torch.distributed.device_mesh import init_device_mesh
from transformers import CONFIG_MAPPING
from typer.testing import CliRunner

from parallel_plans import load_plan, parallelize, verify_plan
from parallel_plans.cli.verify import app
from parallel_plans.collectives import Axis, record_collectives
from parallel_plans.experts.exchange import _even_counts
from parallel_plans.lookup import bundled_folder
from parallel_plans.mesh import views_for
from parallel_plans.verify.cost import Collective, Cost, CostQuestion
from parallel_plans.verify.link import Link
from parallel_plans.verify.memory import memory_of
from parallel_plans.verify.meshes import meshes_for
from parallel_plans.verify.real_size import FewLayers, few_layers
from parallel_plans.verify.threads import run_on_threads
from parallel_plans.verify.traced import Question, Trace, trace
from parallel_plans.verify.units import UnitError, bytes_of, rate_of, seconds_of
from parallel_plans.verify.watch import Said
from parallel_plans.views import Views

BF16 = 2
GIB = 2**30


@cache
def cost(name: str, tp: int, ep: int = 1, etp: int | None = None, **asked: Any) -> Cost:
    """The cost of a published model under its bundled plan."""
    question = CostQuestion(**asked)
    report = verify_plan(original(name), tp=tp, ep=ep, etp=etp, level="geometry", cost=question)
    assert report.cost is not None, report.no_cost
    return report.cost


def by_kind(collectives: tuple[Collective, ...]) -> dict[tuple[str, str], tuple[int, int]]:
    """(op, axis) -> how many, bytes."""
    return {(each.op, each.axis): (each.count, each.bytes) for each in collectives}


def test_a_dense_models_collectives_are_those_of_arithmetic() -> None:
    batch, sequence, tp = 3, 1000, 8
    hidden, layers, vocabulary = 4096, 32, 128256
    passes = cost("llama-3.1-8b", tp, batch=batch, sequence=sequence).passes
    once = batch * sequence * hidden * BF16  # what every reduction of hidden states hands over
    logits = batch * sequence * vocabulary // tp * BF16
    # the embedding, and in every layer attention and feed-forward
    assert by_kind(passes["forward"].collectives) == {
        ("all_reduce", "tp"): (2 * layers + 1, (2 * layers + 1) * once),
        ("all_gather", "tp"): (1, logits),
    }
    # in every layer the inputs of q, k, v and of gate, up; and the head's input
    assert by_kind(passes["backward"].collectives) == {("all_reduce", "tp"): (2 * layers + 1, (2 * layers + 1) * once)}
    for name, length in (("prefill", sequence), ("decode", 1)):
        assert by_kind(passes[name].collectives) == {
            ("all_reduce", "tp"): (2 * layers + 1, (2 * layers + 1) * batch * length * hidden * BF16),
            ("all_gather", "tp"): (1, batch * vocabulary // tp * BF16),  # of the last token alone
        }
        assert passes[name].tokens == batch * length
    assert [(part.name, part.times) for part in passes["forward"].parts] == [
        ("", 1),
        ("model.layers.0", layers - 1),
        ("model.layers.1", 1),
    ]


def test_a_mixture_on_ranks_that_share_a_batch_reduces_its_routing_weights_gradient_too() -> None:
    sequence, hidden, layers, slots, tp = 512, 4096, 32, 2, 4
    for ep, etp in ((1, None), (2, 2), (4, 1)):
        passes = cost("mixtral-8x7b", tp, ep, etp, sequence=sequence).passes
        once = sequence * hidden * BF16
        assert by_kind(passes["forward"].collectives)["all_reduce", "tp"] == (2 * layers + 1, (2 * layers + 1) * once)
        count, size = by_kind(passes["backward"].collectives)["all_reduce", "tp"]
        assert count == 3 * layers + 1
        assert size - (2 * layers + 1) * once == layers * sequence * slots * 4  # a float32 for every route


def test_dispatched_tokens_travel_there_and_back() -> None:
    sequence, hidden, layers, experts, slots, ep = 512, 4096, 32, 8, 2, 4
    passes = cost("mixtral-8x7b", 1, ep, sequence=sequence).passes
    rows = sequence * slots * hidden * BF16  # routing is even: a rank gets as many as it sends
    counts = experts * 8
    assert by_kind(passes["forward"].collectives) == {("all_to_all", "ep"): (3 * layers, layers * (2 * rows + counts))}
    assert by_kind(passes["backward"].collectives) == {("all_to_all", "ep"): (2 * layers, layers * 2 * rows)}


@pytest.mark.parametrize("rows", [0, 1, 7, 8, 13, 4096])
def test_an_even_routing_is_the_same_told_by_sender_and_receiver(rows: int) -> None:
    for owned in ((2, 2, 2, 2), (3, 3, 1, 1), (1, 1, 1, 0)):
        sent, received = [], []
        for rank in range(4):
            axis = Axis(name="ep", group=None, size=4, rank=rank)
            counts = _even_counts(rows, owned, axis)
            own, others = counts[: sum(owned)], counts[sum(owned) :]
            stops = [0, *itertools.accumulate(owned)]
            sent.append([sum(own[start:stop]) for start, stop in itertools.pairwise(stops)])
            received.append([sum(others[r * owned[rank] : (r + 1) * owned[rank]]) for r in range(4)])
            assert max(own) - min(own) <= 1
        assert sent == [list(column) for column in zip(*received, strict=True)]
        assert [sum(each) for each in sent] == [rows] * 4
        per_expert = [sum(each) / max(1, count) for each, count in zip(received, owned, strict=True)]
        assert max(per_expert) - min(each for each, count in zip(per_expert, owned, strict=True) if count) <= 1


def traced(model_type: str, sizes: tuple[int, ...], rank: int, **more: Any) -> Trace:
    """A rank's trace of a tiny model, all of its layers, on the batch of `tokens`."""
    config = tiny_model(model_type, tied=False).config
    few = dataclasses.replace(few_layers(config), config=config, times=(1,) * config.num_hidden_layers)
    batch, sequence = tokens(seed=0).shape
    question = Question(
        plan=load_plan(bundled_folder() / f"{model_type}.yaml"),
        views=views_for(*sizes),
        few=few,
        rank=rank,
        batch=batch,
        sequence=sequence,
        dtype=torch.float32,
    )
    return trace(question, **more)


def on_simulated_ranks(model_type: str, views: Views) -> dict[tuple[str, str, bool], tuple[int, int]]:
    """(op, axis, backward) -> how many collectives all ranks make in a step of a tiny model, and their bytes."""

    def step(rank: int) -> None:
        model = tiny_model(model_type, tied=False)
        mesh = init_device_mesh("cpu", (views.world // views.tp, views.tp), mesh_dim_names=("dp", "tp"))
        sizes = {} if views.ep == 1 else {"ep_size": views.ep, "etp_size": views.etp}
        parallelize(model, bundled_folder() / f"{model_type}.yaml", mesh, ep_plan="auto", storage="local", **sizes)
        ids = tokens(seed=rank // views.tp)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

    with record_collectives() as calls:
        run_on_threads(step, views.world, 60.0)
    return added((call.op, call.axis, call.backward, call.bytes) for call in calls)


def added(calls: Any) -> dict[tuple[str, str, bool], tuple[int, int]]:
    found: dict[tuple[str, str, bool], tuple[int, int]] = {}
    for op, axis, backward, size in calls:
        count, total = found.get((op, axis, backward), (0, 0))
        found[op, axis, backward] = count + 1, total + size
    return found


@pytest.mark.parametrize(
    ("model_type", "sizes"),
    [("llama", (2,)), ("gemma2", (2,)), ("olmo2", (4,)), ("phi3", (3,)), ("mixtral", (4, 2, 2)), ("mixtral", (1, 4)),
     ("qwen2_moe", (2, 2)), ("deepseek_v3", (2, 4)), ("deepseek_v3", (2,))],
    ids=str,
)  # fmt: skip
def test_a_trace_counts_what_ranks_say(model_type: str, sizes: tuple[int, ...]) -> None:
    views = views_for(*sizes)
    seen = [traced(model_type, sizes, rank, purposes=("training",)) for rank in range(views.world)]
    said = [each for one in seen for name in ("forward", "backward") for each in one.said[name]]
    real = on_simulated_ranks(model_type, views)
    assert added((each.op, each.axis, each.backward, each.bytes) for each in said) == real


def test_one_layer_of_each_kind_times_how_many_there_are_is_the_whole_depth() -> None:
    own = {"first_k_dense_replace": 2, "num_hidden_layers": 6, "hidden_size": 64, "n_routed_experts": 8}
    more = {"n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "intermediate_size": 96, "vocab_size": 128}
    rest = {"num_attention_heads": 4, "num_key_value_heads": 4, "moe_intermediate_size": 32, "q_lora_rank": 32}
    config = CONFIG_MAPPING["deepseek_v3"](**own, **more, **rest)
    few = few_layers(config)
    assert few.times == (2, 4)
    whole = FewLayers(config=config, stacks=few.stacks, times=(1,) * 6)
    plan = load_plan(bundled_folder() / "deepseek_v3.yaml")
    for sizes in ((2,), (2, 4)):
        question = Question(
            plan=plan, views=views_for(*sizes), few=few, rank=0, batch=2, sequence=32, dtype=torch.float32
        )
        scaled, full = trace(question), trace(dataclasses.replace(question, few=whole))
        for name in ("forward", "backward", "prefill", "decode"):
            assert weighted(scaled.said[name], few) == weighted(full.said[name], whole)
        for name in ("forward", "backward"):
            assert weighted(scaled.apart[name], few) == weighted(full.apart[name], whole)
        for purpose in ("inference", "training"):
            one, other = memory_of(purpose, scaled, few), memory_of(purpose, full, whole)
            assert dataclasses.replace(one, working=0) == dataclasses.replace(other, working=0)
            assert other.working <= one.working <= 1.1 * other.working


def weighted(said: tuple[Said, ...], few: FewLayers) -> dict[tuple[str, str], tuple[int, int]]:
    found: dict[tuple[str, str], tuple[int, int]] = {}
    for each in said:
        layer = few.layer_of(each.module)
        times = 1 if layer is None else few.times[layer]
        count, size = found.get((each.op, each.axis), (0, 0))
        found[each.op, each.axis] = count + times, size + times * each.bytes
    return found


def test_memory_is_that_of_arithmetic() -> None:
    batch, sequence, tp = 2, 2048, 8
    hidden, ffn, layers, heads, kv_heads, width, vocabulary = 4096, 14336, 32, 32, 8, 128, 128256
    found = {each.purpose: each for each in cost("llama-3.1-8b", tp, batch=batch, sequence=sequence).memory}
    layer = hidden * (2 * heads + 2 * kv_heads) * width + 3 * hidden * ffn
    numbers = (layers * layer + 2 * vocabulary * hidden) // tp + (2 * layers + 1) * hidden
    cached = layers * 2 * batch * sequence * kv_heads // tp * width * BF16
    assert found["inference"].parameters == numbers * BF16
    assert found["inference"].cache == cached
    training = found["training"]
    assert (training.parameters, training.gradients, training.optimizer) == (2 * numbers, 2 * numbers, 12 * numbers)
    kept = trace_of_llama(batch, sequence, tp).kept
    # a norm keeps its input in float32, the root of its mean square, what it gives before its weight and behind it
    norms = 2 * (hidden * (4 + BF16 + BF16) + 4)
    # queries, keys, values, output, and a float32 for every row of scores
    attention = (2 * heads + 2 * kv_heads) // tp * width * BF16 + heads // tp * 4
    feed_forward = 4 * ffn // tp * BF16  # gate, up, what the activation gives, their product
    of_layer = sum(size for name, size in kept.items() if name.startswith("model.layers.1."))
    assert of_layer == batch * sequence * (norms + attention + feed_forward)


@pytest.mark.parametrize(
    ("name", "sizes"), [("gemma-2-9b", (4,)), ("granite-3.0-1b-a400m", (2, 2)), ("deepseek-v2-lite", (2, 4))], ids=str
)
def test_the_parameters_of_a_trace_are_those_of_the_table(name: str, sizes: tuple[int, ...]) -> None:
    tp, ep = (*sizes, 1)[:2]
    report = verify_plan(original(name), tp=tp, ep=ep, level="geometry", cost=CostQuestion(sequence=64))
    assert report.cost is not None, report.no_cost
    assert max(report.parameters.per_rank_bytes) == 2 * report.cost.memory[0].parameters  # float32 and bfloat16


def trace_of_llama(batch: int, sequence: int, tp: int) -> Trace:
    few = few_layers(original("llama-3.1-8b"))
    plan = load_plan(bundled_folder() / "llama.yaml")
    views = views_for(tp)
    asked = Question(plan=plan, views=views, few=few, rank=0, batch=batch, sequence=sequence, dtype=torch.bfloat16)
    return trace(asked, purposes=("training",), with_apart=False)


def test_more_bandwidth_and_less_latency_never_take_longer() -> None:
    sizes, ranks = (1, 1000, 10**6, 10**9), (2, 3, 8, 64, 512)
    slow = Link(latency=10e-6, bandwidth=100e9, internode_latency=20e-6, internode_bandwidth=10e9)
    for quicker in (
        dataclasses.replace(slow, bandwidth=200e9, internode_bandwidth=20e9),
        dataclasses.replace(slow, latency=5e-6, internode_latency=10e-6),
    ):
        for op, size, count, away in itertools.product(
            ("all_reduce", "all_gather", "reduce_scatter", "all_to_all"), sizes, ranks, (False, True)
        ):
            before = slow.seconds(op, size, ranks=count, leaves_node=away)
            assert 0 < quicker.seconds(op, size, ranks=count, leaves_node=away) < before
            assert slow.seconds(op, size, ranks=1, leaves_node=away) == 0
            assert slow.seconds(op, 2 * size, ranks=count, leaves_node=away) > before


def test_an_all_reduce_of_8_ranks_takes_what_a_ring_and_a_tree_take() -> None:
    link = Link(latency=1e-6, bandwidth=1e9)
    assert link.seconds("all_reduce", 8000, ranks=8, leaves_node=False) == pytest.approx(14e-6 + 6e-6)
    assert link.seconds("all_gather", 1000, ranks=8, leaves_node=False) == pytest.approx(7e-6 + 3e-6)
    assert link.seconds("reduce_scatter", 8000, ranks=8, leaves_node=False) == pytest.approx(7e-6 + 3e-6)
    assert link.seconds("all_to_all", 8000, ranks=8, leaves_node=False) == pytest.approx(7e-6 + 1e-6)


def test_an_axis_leaves_a_node_where_its_ranks_are_on_several() -> None:
    link = Link(node_size=8)
    views = views_for(8, 64)
    assert not link.leaves_node(views, "tp")
    assert link.leaves_node(views, "ep")
    assert link.leaves_node(views_for(16), "tp")
    assert link.leaves_node(views_for(3), "tp")  # ranks 6 to 8 are on two nodes
    inside = cost("llama-3.1-8b", 8, sequence=512)
    outside = cost("llama-3.1-8b", 8, sequence=512, link=Link(node_size=4))
    assert inside.passes["forward"].seconds < outside.passes["forward"].seconds


def test_the_seconds_of_a_pass_are_those_of_its_collectives() -> None:
    found = cost("llama-3.1-8b", 8, sequence=512)
    each = found.link.seconds("all_reduce", 512 * 4096 * BF16, ranks=8, leaves_node=False)
    (reduced,) = found.passes["backward"].collectives
    assert reduced.seconds == pytest.approx(65 * each)
    assert found.passes["backward"].seconds == reduced.seconds


@pytest.mark.parametrize(
    ("name", "memory", "purpose", "smallest", "too_small"),
    [
        ("llama-3.1-70b", "80GiB", "inference", {"tp": 2, "ep": 1}, (1,)),
        ("llama-3.1-70b", "40GiB", "inference", {"tp": 4, "ep": 1}, (2,)),
        ("llama-3.1-8b", "80GiB", "training", {"tp": 2, "ep": 1}, (1,)),
    ],
)
def test_the_smallest_mesh_fits_and_the_next_smaller_does_not(
    name: str, memory: str, purpose: str, smallest: dict[str, int], too_small: tuple[int, ...]
) -> None:
    limit = bytes_of(memory)
    need = cost(name, 8, memory=limit, purpose=purpose).memory[0]
    assert need.fits
    assert need.smallest == smallest
    assert need.smallest_bytes is not None
    assert need.smallest_bytes <= limit
    itself = cost(name, smallest["tp"], purpose=purpose).memory[0]
    assert (itself.purpose, itself.total) == (purpose, need.smallest_bytes)
    for tp in too_small:
        assert cost(name, tp, purpose=purpose).memory[0].total > limit


def test_no_mesh_is_named_where_none_fits() -> None:
    need = cost("llama-3.1-8b", 8, memory=GIB // 8, purpose="inference").memory[0]
    assert need.fits is False
    assert (need.smallest, need.smallest_bytes) == (None, None)
    assert need.tried > 1


def test_meshes_are_tried_in_rising_number_of_ranks() -> None:
    meshes = list(meshes_for({"num_attention_heads": 8, "num_key_value_heads": 2, "n_routed_experts": 4}))
    worlds = [views.world for views in meshes]
    assert worlds == sorted(worlds)
    assert {views.tp for views in meshes} == {1, 2, 4, 8}
    assert {views.ep for views in meshes} == {1, 2, 4}
    assert Views(world=16, tp=4, ep=4, etp=4) in meshes
    assert all(views.fits for views in meshes)
    assert len(meshes) == len(set(meshes))


def test_merged_reductions_are_told_with_what_they_would_be_apart() -> None:
    found = cost("llama-3.1-8b", 8, sequence=512)
    once = 512 * 4096 * BF16
    assert {(each.direction, each.is_done) for each in found.savings} == {("backward", True)}
    for each in found.savings:
        assert (each.before.count, each.before.bytes) == (5 * each.times, 5 * each.times * once)
        assert (each.after.count, each.after.bytes) == (2 * each.times, 2 * each.times * once)
        assert {module.rpartition(".")[2] for module in each.modules} == {
            "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"
        }  # fmt: skip
        assert each.after.seconds < each.before.seconds
    assert sum(each.times for each in found.savings) == 32


def test_sums_that_wait_are_told_with_what_they_would_be_apart() -> None:
    """Attention and feed-forward of a Pythia layer are added to the same value; those of a Llama follow each other."""
    found = cost("pythia-6.9b", 4, sequence=512).savings
    forward = [each for each in found if each.direction == "forward"]
    assert sum(each.times for each in forward) == 32
    for each in forward:
        assert each.is_done
        assert (each.before.count, each.after.count) == (2 * each.times, each.times)
        assert each.before.bytes == 2 * each.after.bytes == 2 * each.times * 512 * 4096 * BF16
        assert each.after.seconds < each.before.seconds


def test_reductions_that_do_not_follow_from_each_other_could_be_one() -> None:
    """Attention and feed-forward of a Pythia layer have a norm each, so their inputs' gradients are two."""
    possible = [each for each in cost("pythia-6.9b", 4, sequence=512).savings if not each.is_done]
    assert {each.direction for each in possible} == {"backward"}
    assert sum(each.times for each in possible) == 32
    for each in possible:
        assert (each.before.count, each.after.count) == (2 * each.times, each.times)
        assert each.before.bytes == each.after.bytes
        assert each.after.seconds < each.before.seconds
    assert all(each.is_done for each in cost("llama-3.1-8b", 8, sequence=512).savings)


@pytest.mark.parametrize(
    ("sizes", "axes"), [((1, 4), "ep"), ((4, 4), "tp"), ((2, 4), "ep tp"), ((4, 2, 2), "tp")], ids=str
)
def test_axes_go_by_the_names_that_plans_use(sizes: tuple[int, ...], axes: str) -> None:
    found = cost("mixtral-8x7b", *sizes, sequence=256)
    assert {each.axis for one in found.passes.values() for each in one.collectives} == set(axes.split())


@pytest.mark.parametrize(
    ("read", "text", "value"),
    [(bytes_of, "80GiB", 80 * GIB), (bytes_of, "80 GB", 80 * 10**9), (bytes_of, "512B", 512),
     (seconds_of, "10us", 1e-5), (rate_of, "400GB/s", 4e11), (rate_of, "400Gbit/s", 5e10),
     (rate_of, "1e2MB/s", 1e8), (seconds_of, "1.5ms", 1.5e-3)],
)  # fmt: skip
def test_a_quantity_is_its_number_times_its_unit(read: Any, text: str, value: float) -> None:
    assert read(text) == pytest.approx(value)


@pytest.mark.parametrize(
    ("read", "text"),
    [(bytes_of, "80"), (bytes_of, "80Gi"), (bytes_of, "0GiB"), (bytes_of, "-1GiB"), (bytes_of, ""),
     (rate_of, "400GB"), (seconds_of, "10m"), (seconds_of, "us")],
)  # fmt: skip
def test_a_quantity_without_its_unit_is_an_error(read: Any, text: str) -> None:
    with pytest.raises(UnitError, match="expected"):
        read(text)


def ran(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, result.stdout, result.stderr


def test_json_has_the_cost_beside_the_fixed_keys() -> None:
    path = str(MODELS / "llama-3.1-8b.json")
    options = ("--tp", "4", "--sequence", "128", "--memory", "20GiB", "--latency", "5us", "--level", "geometry")
    status, text, _ = ran(path, *options, "--json")
    assert status == 0
    report = json.loads(text)
    keys = ["ok", "target", "plan", "mesh", "levels", "findings", "parameters", "communication", "cost"]
    assert list(report) == keys
    forward, backward = report["communication"]["forward"], report["communication"]["backward"]
    once = 128 * 4096 * BF16
    assert {"op": "all_reduce", "axis": "tp", "count": 65, "bytes": 65 * once} in forward
    assert backward == [{"op": "all_reduce", "axis": "tp", "count": 65, "bytes": 65 * once}]
    found = report["cost"]
    assert (found["batch"], found["sequence"], found["dtype"]) == (1, 128, "bfloat16")
    assert found["link"]["latency"] == pytest.approx(5e-6)
    assert [each["name"] for each in found["passes"]] == ["forward", "backward", "prefill", "decode"]
    assert found["memory"][0]["fits"] is True
    assert found["memory"][0]["smallest"] == {"tp": 1, "ep": 1}
    status, text, _ = ran(path, "--tp", "4", "--level", "accounting", "--json")
    assert (status, json.loads(text)["cost"]) == (0, {"missing": None})
    status, text, _ = ran(path, "--tp", "4", "--level", "geometry", "--no-cost", "--json")
    assert (status, json.loads(text)["cost"]) == (0, {"missing": None})


@pytest.mark.parametrize(
    "options", [("--memory", "80"), ("--bandwidth", "fast"), ("--latency", "10"), ("--for", "fun"), ("--batch", "0")]
)
def test_a_cost_that_cannot_be_asked_for_gives_2(options: tuple[str, str]) -> None:
    status, text, complaint = ran("llama", *options)
    assert (status, text) == (2, "")
    assert options[0] in complaint
    assert "Traceback" not in complaint


def test_a_model_that_cannot_be_traced_has_no_cost_and_says_why() -> None:
    own = torch.nn.Sequential(torch.nn.Linear(4, 4))
    report = verify_plan(own, {"tp_plan": {"**": "replicate"}}, tp=2)
    assert report.ok
    assert report.cost is None
    assert report.to_dict()["cost"] == {"missing": report.no_cost}
    assert report.no_cost is not None
    assert "is not run at another size than it has" in report.no_cost
