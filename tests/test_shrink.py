"""Configs at their published size become small ones of the same architecture, whose models run and are split alike."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import cache
from typing import Any

import pytest
from published import EXPERT_SIZES, NAMES, original, sizes_for, small_of, timed
from transformers import PreTrainedConfig

from parallel_plans import Plan, PlanError, load_plan
from parallel_plans.lookup import bundled_folder
from parallel_plans.model_spec import ModelSpec, describe
from parallel_plans.resolve import resolve
from parallel_plans.verify.batches import example_batch
from parallel_plans.verify.shrink import Shrunken
from parallel_plans.verify.shrinking.kinds import kinds_of, on_meta, said_of_layers
from parallel_plans.verify.shrinking.numbers import Widths, in_proportion, small_counts
from parallel_plans.verify.shrinking.roles import role_of
from parallel_plans.verify.shrinking.tree import fields_of
from parallel_plans.verify.weights import in_float64, random_model

MOST_PARAMETERS, MOST_SECONDS, ROUNDING = 300_000, 2.0, 1e-10

# Parameters without a gradient, and why.
UNTRAINED = {"e_score_correction_bias": "it only takes part in the choice of experts"}
# Parameters whose gradient is zero, by model type, where one expert alone is chosen and its weight is then set to 1.
ONE_CHOICE = {"dbrx": "router.layer.weight", "hunyuan_v1_moe": "mlp.gate.wg.weight"}
WIDTH_ROLES = ("model width", "width", "expert width", "rank")


def cases() -> list[Any]:
    """Every bundled plan's type and every config that is kept here, each on all the ranks that make sense for it."""
    return [
        pytest.param(name, sizes, id="-".join([name, *(f"{axis}{ranks}" for axis, ranks in sizes.items())]))
        for name in NAMES
        for sizes in sizes_for(name)
    ]


@cache
def bundled(kind: str) -> Plan:
    """The bundled plan for a model type."""
    return load_plan(bundled_folder() / f"{kind}.yaml")


@cache
def ran(kind: type[PreTrainedConfig], text: str) -> tuple[float, dict[str, bool | None], ModelSpec]:
    """The loss of a random model, whether every parameter got a gradient that is no mere rounding, and its spec."""
    config = kind(**json.loads(text))
    with in_float64():
        model = random_model(config)
        loss = model(**example_batch(config)).loss
        loss.backward()
    gradients = {
        name: None if given.grad is None else bool(given.grad.abs().max() > ROUNDING)
        for name, given in model.named_parameters()
    }
    return loss.item(), gradients, describe(model)


def outcome(small: Shrunken) -> tuple[float, dict[str, bool | None], ModelSpec]:
    """The same for a shrunken config, worked out once for equal ones."""
    return ran(type(small.config), small.config.to_json_string(use_diff=False))


def codes(spec: ModelSpec, sizes: Mapping[str, int]) -> set[str]:
    """What is wrong with the bundled plan for a model on these ranks."""
    try:
        resolve(bundled(str(spec.model_type)), spec, sizes)
    except PlanError as error:
        return {finding.code for finding in error.findings}
    return set()


@pytest.mark.parametrize(("name", "sizes"), cases())
def test_a_small_model_runs_and_learns_in_all_its_parts_and_its_plan_resolves(name: str, sizes: dict[str, int]) -> None:
    small, seconds = timed(name, **sizes)
    assert seconds < MOST_SECONDS
    loss, gradients, spec = outcome(small)
    assert math.isfinite(loss)
    assert sum(info.bytes // info.itemsize for info in spec.parameters.values()) < MOST_PARAMETERS
    kind = small.config.model_type
    for parameter, is_some in gradients.items():
        if is_some is None:
            assert parameter.endswith(tuple(UNTRAINED)), f"{parameter} takes no part"
        elif not is_some:
            assert chosen(small.config) == 1, f"{parameter} has a gradient of zeros"
            assert parameter.endswith(ONE_CHOICE.get(kind, "none")), f"{parameter} has a gradient of zeros"
    if found := codes(spec, sizes):
        assert found == codes(describe(on_meta(original(name))), sizes), "a plan fits both or none"


def chosen(config: Any) -> int | None:
    """How many experts a token goes to."""
    items = ((place, value) for place, value in fields_of(config).items() if role_of(place) == "choices")
    return next((value for _, value in items), None)


@pytest.mark.parametrize(("name", "sizes"), [case for case in cases() if case.values[1] == {"tp": 2}])
def test_every_kind_of_layer_is_kept_and_widths_differ(name: str, sizes: dict[str, int]) -> None:
    small = small_of(name, sizes)
    kinds, fields = kinds_of(on_meta(original(name))), fields_of(original(name))
    told = list(zip(kinds.made_of, kinds.shapes, said_of_layers(fields, kinds.count), strict=True))
    assert {told[layer] for layer in small.layers} == set(told)
    assert max(2, len(set(told))) == len(small.layers)
    now = kinds_of(on_meta(small.config))
    assert now.made_of == tuple(kinds.made_of[layer] for layer in small.layers)
    assert len(set(now.shapes)) == len({kinds.shapes[layer] for layer in small.layers})
    widths = {(place[-1], value) for place, value in fields_of(small.config).items() if role_of(place) in WIDTH_ROLES}
    model = {value for field, value in widths if role_of((field,)) == "model width" and value}
    others = [value for field, value in widths if role_of((field,)) != "model width" and value and value > 4]
    assert len(model) == 1
    assert len(set(others) | model) == len(others) + 1, f"{sorted(widths)}"


@pytest.mark.parametrize(("name", "layers"), [("deepseek-v3", (0, 3)), ("minimax-text-01", (0, 7)), ("llama", (0, 1))])
def test_layers_say_which_of_the_original_they_are(name: str, layers: tuple[int, ...]) -> None:
    assert small_of(name, {"tp": 2}).layers == layers


def test_heads_keep_their_groups_and_give_every_rank_its_units() -> None:
    assert small_counts([8, 32], 2) == {0: 0, 1: 1, 8: 4, 32: 8}
    assert small_counts([8, 32], 3) == {0: 0, 1: 1, 8: 6, 32: 12}
    assert small_counts([2, 32], 4) == {0: 0, 1: 1, 2: 2, 32: 4}  # fewer groups than ranks stay fewer
    assert small_counts([1, 4], 4) == {0: 0, 1: 1, 4: 4}
    for ranks in range(1, 9):
        counts = small_counts([16, 48, 96], ranks)
        assert all(small % ranks == 0 and small >= 2 for count, small in counts.items() if count > 1)
        assert counts[48] == counts[96] // 2 == 2 * counts[16]


def test_what_divided_a_width_still_does_and_equal_ones_stay_equal() -> None:
    anchors = {4096: 64}
    for width in (8192, 2048, 1024, 6144, 512, 640, 4096, 100):
        anchors[width] = in_proportion(width, anchors, 4096)
    for width, small in anchors.items():
        assert all(anchors[other] % small == 0 for other in anchors if other % width == 0), f"{width} became {small}"
    assert anchors[8192] == 128
    assert anchors[2048] == 32


def test_widths_are_handed_out_once_and_never_next_to_their_double() -> None:
    widths = Widths()
    taken = [widths.take(32), *(widths.multiple(12, 16) for _ in range(4)), *(widths.uneven(22) for _ in range(6))]
    assert len(set(taken)) == len(taken)
    assert not {2 * width for width in taken} & set(taken)
    assert all(width % 12 == 0 for width in taken[1:5])
    assert all(width % 2 == 0 and width % 3 and width % 4 for width in taken[5:])


def test_experts_go_around_the_ranks_and_their_rows_fit_grouped_kernels() -> None:
    for sizes in EXPERT_SIZES:
        config = small_of("deepseek-v3", sizes).config
        ranks = sizes.get("ep", 1)
        assert config.n_routed_experts % ranks == 0
        assert config.n_routed_experts >= max(4, 2 * ranks)
        assert config.num_experts_per_tok <= 2 < config.n_routed_experts
        assert config.n_routed_experts // config.n_group * config.topk_group >= config.num_experts_per_tok
        etp = sizes.get("etp", sizes["tp"] if ranks == 1 else 1)
        assert config.moe_intermediate_size % (4 * etp) == 0
        idle = small_of("longcat_flash", sizes).config.zero_expert_num
        assert idle % ranks == 0
        assert idle >= ranks
