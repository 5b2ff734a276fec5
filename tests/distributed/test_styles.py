"""Every style that acts, on real ranks in float64: parameters, values, gradients and collectives, against one process.

A case is one module under a plan (style_cases.py). Each rank computes the truth itself, with the same module unsharded.
All cases of a number of ranks run in one start of the ranks; they report numbers, and each law is a test over those.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from mixture_cases import CASES as MIXTURES  # held to the same laws in test_mixture_styles.py
from ranks import RankFailed, run_on_ranks
from style_cases import CASES, Case
from tiny import randomized
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate
from toys import HIDDEN, VOCAB

from parallel_plans import full_gradients, full_state_dict, parallelize
from parallel_plans.collectives import Call, record_collectives
from parallel_plans.storage import STORAGES
from parallel_plans.styles import get_style, styles

RANKS = (2, 3)
EXACT = 1e-10  # of the largest value, in float64
ROWS, LENGTH = 2, 7  # of the input; 7 rows of a sequence do not divide by 2 or 3

Errors = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one rank found in one case: shapes as they are, everything else as how far it is off."""

    shapes: dict[str, tuple[int, ...]]
    kinds: dict[str, str]  # `local`, or of a DTensor: `whole`, `split`
    full_tensor: dict[str, bool]  # with dtensor storage
    state: dict[str, bool]
    calls: list[list[Call]]  # of each pass
    outputs: list[float]
    input_gradients: list[float]
    gradients: list[Errors]  # after each pass, summed over the passes so far
    same_without_gradients: bool


def off(got: Tensor, want: Tensor) -> float:
    """By how much of the largest true value the worst one is off; infinite where the shapes differ."""
    if got.shape != want.shape:
        return float("inf")
    return float((got - want).abs().max() / want.abs().max())


def input_of(case: Case, seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    if case.tokens:
        return torch.randint(0, VOCAB, (ROWS, 4 * LENGTH), generator=draw)  # long enough for every word to be there
    return torch.randn(ROWS, LENGTH, HIDDEN, generator=draw, dtype=torch.float64)


def loss_of(output: Tensor, at: int = 0, length: int | None = None) -> Tensor:
    """A loss that is another for every element; `at` and `length` say where in the sequence the output lies."""
    length = output.shape[1] if length is None else length
    weights = torch.linspace(-1, 1, length * output.shape[2], dtype=torch.float64).view(length, -1)
    return (weights[at : at + output.shape[1]] * output**3 + output.sin()).sum()


def with_gradient(value: Tensor) -> Tensor:
    return value.clone().requires_grad_() if value.is_floating_point() else value


@dataclass
class Runner:
    """One case on this rank: the module split and the module whole, side by side through the same passes."""

    case: Case
    split: nn.Module
    whole: nn.Module
    rank: int
    ranks: int

    def own(self, value: Tensor) -> tuple[Tensor, int]:
        """This rank's part of an input or output, and where it begins; all of it but under sequence parallelism."""
        if not self.case.sequence:
            return value, 0
        chunks = value.chunk(self.ranks, dim=1)
        return chunks[self.rank], sum(chunk.shape[1] for chunk in chunks[: self.rank])

    def one_pass(self, seed: int) -> tuple[list[Call], float, float, Errors]:
        given = input_of(self.case, seed)
        whole_input = with_gradient(given)
        own_input, at = self.own(given)
        own_input = with_gradient(own_input)
        truth = self.whole(whole_input)
        loss_of(truth).backward()
        with record_collectives() as calls:
            output = self.split(own_input)
            loss_of(output, at, truth.shape[1]).backward()
        worst_input = 0.0
        if whole_input.grad is not None:
            assert own_input.grad is not None
            worst_input = off(own_input.grad, self.own(whole_input.grad)[0])
        return calls, off(output.detach(), self.own(truth.detach())[0]), worst_input, self.gradient_errors()

    def gradient_errors(self) -> Errors:
        got = full_gradients(self.split)
        want = {name: p.grad for name, p in self.whole.named_parameters() if p.grad is not None}
        assert got.keys() == want.keys()
        return {name: off(got[name], want[name]) for name in want}

    def is_same_without_gradients(self) -> bool:
        given = self.own(input_of(self.case, 9))[0]
        with torch.no_grad():
            plain = self.split(given)
        return torch.equal(plain, self.split(given).detach())


def kind_of(parameter: Tensor) -> str:
    if not isinstance(parameter, DTensor):
        return "local"
    return "whole" if parameter.placements == (Replicate(),) else "split"


def local_shape(parameter: Tensor) -> tuple[int, ...]:
    return tuple(parameter.to_local().shape if isinstance(parameter, DTensor) else parameter.shape)


def outcome(case: Case, storage: Any, ranks: int) -> Outcome:
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("tp",))
    whole = randomized(case.make().double())
    sequence = "auto" if "sp_plan" in case.plan else None
    split = parallelize(deepcopy(whole), case.plan, mesh, sp_plan=sequence, storage=storage)
    parameters = dict(split.named_parameters())
    state = full_state_dict(split)
    runner = Runner(case, split, whole, dist.get_rank(), ranks)
    truth = dict(whole.named_parameters())
    dtensors = truth if storage == "dtensor" else {}
    passes = [runner.one_pass(seed) for seed in (1, 2)]
    return Outcome(
        shapes={name: local_shape(parameter) for name, parameter in parameters.items()},
        kinds={name: kind_of(parameter) for name, parameter in parameters.items()},
        full_tensor={name: torch.equal(parameters[name].full_tensor(), truth[name]) for name in dtensors},
        state={name: torch.equal(state[name], value) for name, value in whole.state_dict().items()},
        calls=[calls for calls, *_ in passes],
        outputs=[output for _, output, *_ in passes],
        input_gradients=[gradient for *_, gradient, _ in passes],
        gradients=[gradients for *_, gradients in passes],
        same_without_gradients=runner.is_same_without_gradients(),
    )


def every_outcome(ranks: int) -> dict[tuple[str, str], Outcome | Exception]:
    found: dict[tuple[str, str], Outcome | Exception] = {}
    for name, case in CASES.items():
        for storage in STORAGES:
            try:
                found[name, storage] = outcome(case, storage, ranks)
            except Exception as error:  # told by the tests of this case; the others go on
                found[name, storage] = AssertionError(f"{type(error).__name__}: {error}")
    return found


@cache
def results(ranks: int) -> list[dict[tuple[str, str], Any]] | RankFailed:
    """What the ranks found, or how they failed; started once in either case."""
    try:
        return run_on_ranks(every_outcome, ranks, ranks)
    except RankFailed as error:
        return error


def outcomes_of(name: str, ranks: int, storage: str) -> list[Outcome]:
    """What every rank found, in the order of the ranks."""
    of_ranks = results(ranks)
    if isinstance(of_ranks, RankFailed):
        raise of_ranks
    found = [result[name, storage] for result in of_ranks]
    for one in found:
        if isinstance(one, Exception):
            raise one
    return found


def each_case(test: Callable[..., None]) -> Callable[..., None]:
    for mark in (
        pytest.mark.parametrize("name", CASES),
        pytest.mark.parametrize("ranks", RANKS),
        pytest.mark.parametrize("storage", STORAGES),
    ):
        test = mark(test)
    return test


def test_every_style_that_acts_has_a_case() -> None:
    rules = [rule for case in CASES.values() for rule in case.rules]
    rules += [rule for case in MIXTURES.values() for section in case.plan.values() for rule in section.values()]
    used = {get_style(rule if isinstance(rule, str) else rule["style"]).name for rule in rules}
    assert used == {style.name for style, _ in styles()}


@each_case
def test_what_a_rule_shards_comes_back_sharded_and_what_it_does_not_comes_back_whole(
    name: str, ranks: int, storage: str
) -> None:
    case = CASES[name]
    whole = dict(case.make().named_parameters())
    assert case.cuts.keys() <= whole.keys()
    for rank, found in enumerate(outcomes_of(name, ranks, storage)):
        expected = {}
        for parameter, tensor in whole.items():
            shape = list(tensor.shape)
            if parameter in case.cuts:
                cut = case.cuts[parameter]
                assert sum(cut.sizes(ranks)) == shape[cut.dim]
                shape[cut.dim] = cut.sizes(ranks)[rank]
            expected[parameter] = tuple(shape)
        assert found.shapes == expected


@each_case
def test_placements_say_which_parameters_are_split(name: str, ranks: int, storage: str) -> None:
    cuts = CASES[name].cuts
    for found in outcomes_of(name, ranks, storage):
        if storage == "local":
            assert set(found.kinds.values()) == {"local"}
            continue
        assert found.kinds == {n: "split" if n in cuts else "whole" for n in found.kinds}
        assert all(found.full_tensor.values()), found.full_tensor


@each_case
def test_the_whole_state_comes_back_bit_by_bit(name: str, ranks: int, storage: str) -> None:
    assert all(all(found.state.values()) for found in outcomes_of(name, ranks, storage))


@each_case
def test_outputs_are_those_of_one_process(name: str, ranks: int, storage: str) -> None:
    assert max(max(found.outputs) for found in outcomes_of(name, ranks, storage)) <= EXACT


@each_case
def test_input_gradients_are_those_of_one_process(name: str, ranks: int, storage: str) -> None:
    assert max(max(found.input_gradients) for found in outcomes_of(name, ranks, storage)) <= EXACT


@each_case
def test_parameter_gradients_are_those_of_one_process_and_accumulate(name: str, ranks: int, storage: str) -> None:
    whole = dict(CASES[name].make().named_parameters())
    for found in outcomes_of(name, ranks, storage):
        for after_pass in found.gradients:
            assert after_pass.keys() == whole.keys()
            assert max(after_pass.values()) <= EXACT, after_pass


@each_case
def test_collectives_of_a_pass_are_these(name: str, ranks: int, storage: str) -> None:
    case = CASES[name]
    for found in outcomes_of(name, ranks, storage):
        for calls in found.calls:
            assert [call.op for call in calls if not call.backward] == list(case.forward)
            assert [call.op for call in calls if call.backward] == list(case.backward)
            assert {call.axis for call in calls} <= {"tp"}


@each_case
def test_values_without_gradients_are_the_same_values(name: str, ranks: int, storage: str) -> None:
    assert all(found.same_without_gradients for found in outcomes_of(name, ranks, storage))
