"""What differs between the ranks of a trial and the one process that knows the truth, and how far a trial gets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from parallel_plans.collectives import Call
from parallel_plans.table import Table
from parallel_plans.verify.diagnose import letter_of, wrong_how
from parallel_plans.verify.observed import Event, Observed

# How far a trial gets: the first of these that is wrong, or all of them right.
REFUSED, FORWARD, GRADIENTS, WRITING, WEIGHTS, RIGHT = range(6)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of a trial.

    Args:
        truths: what one process sees, for each batch.
        seen: what each rank saw, as far as it came.
        table: the plan on these ranks; None where it does not fit them.
        failure: what was raised.
        calls: the collectives of all ranks.
    """

    truths: Sequence[Observed]
    seen: Sequence[Observed] = ()
    table: Table | None = None
    failure: Exception | None = None
    calls: Sequence[Call] = ()

    def groups(self) -> Iterator[tuple[Observed, Sequence[Observed]]]:
        """For each batch its truth, and what its ranks saw."""
        ranks = len(self.seen) // len(self.truths)
        for index, truth in enumerate(self.truths):
            yield truth, self.seen[index * ranks : (index + 1) * ranks]


def parts_of(event: Event, group: Sequence[Observed]) -> list[Tensor] | None:
    """A value on every rank; None where some rank did not come to it."""
    parts = [each.values.get(event) for each in group]
    held = [part for part in parts if part is not None]
    return held if len(held) == len(parts) else None


def letter_at(run: Run, event: Event) -> str | None:
    """How the value of an event lies on the ranks of the first batch; None where it is wrong or was not there."""
    truth, group = next(run.groups())
    parts = parts_of(event, group)
    return None if parts is None or event not in truth.values else letter_of(parts, truth.values[event])


def first_wrong(run: Run) -> tuple[int, Event | None]:
    """How many values are right in a row, and the event whose value is the first that is no letter of the right one.

    The event is None where there is none: all values are right, or the model raised before one was wrong.
    """
    masked = () if run.table is None else _masked(run.table)
    ends = [_first_wrong(truth, group, run.failure is not None, masked) for truth, group in run.groups()]
    return min([end for end in ends if end[1] is not None] or ends, key=lambda end: end[0])


def _masked(table: Table) -> tuple[str, ...]:
    """The modules that compute on what other ranks hold too, a split vocabulary for one, and mask that in the end."""
    return tuple(
        name
        for name, entry in table.acting()
        if entry.style.shards and entry.style.boundary is not None and entry.style.leaves == "P"
    )


def _first_wrong(
    truth: Observed, group: Sequence[Observed], has_failed: bool, masked: Sequence[str]
) -> tuple[int, Event | None]:
    right = 0
    for event, whole in truth.values.items():
        parts = parts_of(event, group)
        if parts is None and has_failed:
            return right, None
        is_own = any(event[0].startswith(f"{name}.") for name in masked)  # what is in there, ranks have of their own
        if parts is not None and not is_own and letter_of(parts, whole) is None:
            return right, event
        right += 1  # a module that the ranks do not call counts as right
    return right, None


def wrong_output(run: Run) -> tuple[str, str] | None:
    """What is wrong with the output of the model, and where from; None where it is right on every rank."""
    for truth, group in run.groups():
        assert truth.logits is not None
        found = [each.logits for each in group if each.logits is not None]
        if (wrong := wrong_how(found, truth.logits)) is not None:
            return wrong
    return None


def wrong_gradients(run: Run) -> dict[str, tuple[str, str]]:
    """Parameter -> what is wrong with its gradient, and where from; the last modules first, as backward goes."""
    truth, wrong = run.truths[0], {}
    order = {event[0]: place for place, event in enumerate(truth.values)}
    for name in sorted(truth.gradients, key=lambda name: _place_of(name, order), reverse=True):
        joined = torch.stack([each.gradients[name] for each in run.truths]).mean(0)
        without = [str(rank) for rank, each in enumerate(run.seen) if name not in each.gradients]
        if without:
            wrong[name] = f"is missing on rank {', '.join(without)}", "nothing that is computed there depends on it"
        elif (how := wrong_how([each.gradients[name] for each in run.seen], joined)) is not None:
            wrong[name] = how
    return wrong


def _place_of(name: str, order: Mapping[str, int]) -> int:
    """When the module of a parameter last gave something; that of the nearest module around it that is called."""
    while name and name not in order:
        name = name.rpartition(".")[0]
    return order.get(name, -1)


def wrong_input_gradient(run: Run) -> tuple[str, str] | None:
    """What is wrong with the gradient of the first value; None where it is right on every rank."""
    for truth, group in run.groups():
        found = [each.input_gradient for each in group if each.input_gradient is not None]
        if truth.input_gradient is None or len(found) < len(group):
            continue
        if (wrong := wrong_how(found, truth.input_gradient)) is not None:
            return wrong
    return None


def writes_otherwise(run: Run) -> bool:
    """Whether some rank writes another continuation than one process."""
    return any(
        truth.written is not None
        and any(each.written is None or not each.written.equal(truth.written) for each in group)
        for truth, group in run.groups()
    )


def wrong_weights(run: Run) -> dict[str, str]:
    """Name -> what is wrong with the weights put together from the ranks, or saved and loaded again."""
    wrong: dict[str, str] = {}
    for each in run.seen:
        wrong |= each.kept
    for name, whole in run.truths[0].state.items():
        if any(name not in each.state or not each.state[name].equal(whole) for each in run.seen):
            wrong[name] = "the weights put together from the ranks are not those split"
    return wrong


def reached(run: Run) -> tuple[int, int]:
    """How far a run gets: at which kind of value it fails, and how many were right by then; larger is farther."""
    if run.table is None:
        return REFUSED, 0
    right, _ = first_wrong(run)
    logits = [each.logits for each in run.seen]
    if any(each is None for each in logits) or wrong_output(run) is not None:
        return FORWARD, right
    if run.failure is None and all(each.gradients for each in run.seen):
        wrong = wrong_gradients(run)
        if wrong or wrong_input_gradient(run) is not None:
            return GRADIENTS, -len(wrong)
    elif run.failure is not None:
        return GRADIENTS, -len(run.truths[0].gradients)
    if writes_otherwise(run):
        return WRITING, 0
    return (WEIGHTS, 0) if wrong_weights(run) else (RIGHT, 0)
