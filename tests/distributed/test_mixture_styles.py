"""Every style of mixtures, on real ranks in float64: parameters, values, gradients, collectives, against one process.

As test_styles.py, for modules whose experts may be dealt and whose ranks may have batches of their own. A case is one
toy under a plan (mixture_cases.py), a row one way to deal the ranks out (rows.py). Each rank computes the truth itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from mixture_cases import CASES, MixtureCase
from mixture_toys import EXPERTS, HIDDEN
from ranks import RankFailed, run_on_ranks
from rows import ROWS, Row
from test_styles import EXACT, Errors, loss_of, off
from tiny import randomized
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from parallel_plans import average_gradients, full_gradients, full_state_dict, parallelize
from parallel_plans.collectives import Call, record_collectives
from parallel_plans.dealing import deal
from parallel_plans.state import local_part
from parallel_plans.storage import STORAGES

RUNS = [(name, row) for name, case in CASES.items() for row in case.calls]
PASSES = 2


@dataclass(frozen=True, kw_only=True)
class Found:
    """What one rank found in one case on one row: shapes as they are, everything else as how far it is off."""

    shapes: dict[str, tuple[int, ...]]
    state: dict[str, bool]
    calls: list[list[Call]]  # of each pass
    outputs: list[float]
    input_gradients: list[float]
    gradients: list[Errors]
    same_without_gradients: bool


def batch_of(seed: int, index: int) -> Tensor:
    """The batch of one tp group: [2, 7, hidden], 14 tokens, which do not divide by 4."""
    draw = torch.Generator().manual_seed(100 * seed + index)
    return torch.randn(2, 7, HIDDEN, generator=draw, dtype=torch.float64)


def one_pass(split: nn.Module, whole: nn.Module, row: Row, seed: int) -> tuple[list[Call], float, float, Errors]:
    """The collectives of a pass, and how far output, input's gradient and averaged gradients are off."""
    batches = [batch_of(seed, index).requires_grad_() for index in range(row.batches)]
    outputs = [whole(batch) for batch in batches]
    torch.stack([loss_of(output) for output in outputs]).mean().backward()
    mine = dist.get_rank() // row.tp
    given = batch_of(seed, mine).requires_grad_()
    with record_collectives() as calls:
        output = split(given)
        loss_of(output).backward()
    average_gradients(split)
    got = full_gradients(split)
    want = {name: parameter.grad for name, parameter in whole.named_parameters() if parameter.grad is not None}
    assert got.keys() == want.keys()
    assert given.grad is not None
    assert batches[mine].grad is not None
    errors = {name: off(got[name], want[name]) for name in want}
    in_one_process = outputs[mine].detach(), batches[mine].grad * row.batches  # the loss there is a mean over batches
    for model in (split, whole):
        model.zero_grad()
    return calls, off(output.detach(), in_one_process[0]), off(given.grad, in_one_process[1]), errors


def is_same_without_gradients(split: nn.Module) -> bool:
    given = batch_of(9, 0)
    with torch.no_grad():
        plain = split(given)
    return torch.equal(plain, split(given).detach())


def found_in(case: MixtureCase, row: Row, storage: Any) -> Found:
    mesh = init_device_mesh("cpu", (row.world // row.tp, row.tp), mesh_dim_names=("dp", "tp"))
    whole = randomized(case.make().double())
    split = parallelize(
        deepcopy(whole),
        case.plan,
        mesh,
        ep_plan="dispatch" if row.dispatch else "auto",
        ep_size=row.ep,
        etp_size=row.etp,
        storage=storage,
    )
    state = full_state_dict(split)
    passes = [one_pass(split, whole, row, seed) for seed in range(PASSES)]
    return Found(
        shapes={name: tuple(local_part(parameter).shape) for name, parameter in split.named_parameters()},
        state={name: torch.equal(state[name], value) for name, value in whole.state_dict().items()},
        calls=[calls for calls, *_ in passes],
        outputs=[output for _, output, *_ in passes],
        input_gradients=[gradient for *_, gradient, _ in passes],
        gradients=[gradients for *_, gradients in passes],
        same_without_gradients=is_same_without_gradients(split),
    )


def everything_found(world: int) -> dict[tuple[str, Row, str], Found | Exception]:
    found: dict[tuple[str, Row, str], Found | Exception] = {}
    for name, row in RUNS:
        for storage in STORAGES:
            if row.world != world:
                continue
            try:
                found[name, row, storage] = found_in(CASES[name], row, storage)
            except Exception as error:  # told by the tests of this case; the others go on
                found[name, row, storage] = AssertionError(f"{type(error).__name__}: {error}")
    return found


@cache
def results(world: int) -> list[dict[tuple[str, Row, str], Any]] | RankFailed:
    """What the ranks found, or how they failed; started once in either case."""
    try:
        return run_on_ranks(everything_found, world, world)
    except RankFailed as error:
        return error


def found_by_ranks(name: str, row: Row, storage: str) -> list[Found]:
    """What every rank found, in the order of the ranks."""
    of_ranks = results(row.world)
    if isinstance(of_ranks, RankFailed):
        raise of_ranks
    found = [result[name, row, storage] for result in of_ranks]
    for one in found:
        if isinstance(one, Exception):
            raise one
    return found


def each_run(test: Callable[..., None]) -> Callable[..., None]:
    by_run = pytest.mark.parametrize(("name", "row"), RUNS, ids=str)
    return by_run(pytest.mark.parametrize("storage", STORAGES)(test))


@each_run
def test_a_rank_holds_its_part_of_its_experts_and_all_of_the_rest(name: str, row: Row, storage: str) -> None:
    case = CASES[name]
    etp = row.tp if row.etp is None else row.etp
    for rank, found in enumerate(found_by_ranks(name, row, storage)):
        for parameter, whole in case.make().named_parameters():
            shape = list(whole.shape)
            if parameter in case.dealt:
                assert shape[0] == EXPERTS
                shape[0] = deal(EXPERTS, row.ep)[rank % (row.ep * etp) // etp]
            for dims, ranks in ((case.split, etp), (case.dense, row.tp)):
                if parameter in dims:
                    assert shape[dims[parameter]] % ranks == 0
                    shape[dims[parameter]] //= ranks
            assert found.shapes[parameter] == tuple(shape), (rank, parameter)


@each_run
def test_the_whole_state_comes_back_bit_by_bit(name: str, row: Row, storage: str) -> None:
    assert all(all(found.state.values()) for found in found_by_ranks(name, row, storage))


@each_run
def test_outputs_are_those_of_one_process(name: str, row: Row, storage: str) -> None:
    assert max(max(found.outputs) for found in found_by_ranks(name, row, storage)) <= EXACT


@each_run
def test_input_gradients_are_those_of_one_process(name: str, row: Row, storage: str) -> None:
    assert max(max(found.input_gradients) for found in found_by_ranks(name, row, storage)) <= EXACT


@each_run
def test_averaged_gradients_are_those_of_the_mean_over_all_batches(name: str, row: Row, storage: str) -> None:
    parameters = {parameter for parameter, _ in CASES[name].make().named_parameters()}
    for found in found_by_ranks(name, row, storage):
        for of_pass in found.gradients:
            assert of_pass.keys() == parameters
            assert max(of_pass.values()) <= EXACT, of_pass


@each_run
def test_collectives_of_a_pass_are_these(name: str, row: Row, storage: str) -> None:
    forward, backward = CASES[name].calls[row]
    for found in found_by_ranks(name, row, storage):
        for calls in found.calls:
            assert Counter(call.op for call in calls if not call.backward) == Counter(forward)
            assert Counter(call.op for call in calls if call.backward) == Counter(backward)


@each_run
def test_every_rank_takes_part_in_the_same_order(name: str, row: Row, storage: str) -> None:
    orders = [
        [(call.op, call.axis) for calls in found.calls for call in calls]
        for found in found_by_ranks(name, row, storage)
    ]
    assert all(order == orders[0] for order in orders)


@each_run
def test_values_without_gradients_are_the_same_values(name: str, row: Row, storage: str) -> None:
    assert all(found.same_without_gradients for found in found_by_ranks(name, row, storage))


def test_every_row_of_the_design_has_a_case() -> None:
    def sizes(row: Row) -> tuple[int, ...]:
        return row.world, row.tp, row.ep, row.tp if row.etp is None else row.etp

    for name in ("ids and weights", "scores", "sorted pairs"):
        assert {sizes(row) for row in ROWS} <= {sizes(row) for row in CASES[name].calls}
