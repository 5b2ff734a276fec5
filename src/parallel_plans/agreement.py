"""Ranks that fail together: before every stretch of collectives, all say whether they are well and what they hold.

A rank that raised takes part once more and says so; then every rank raises. Nobody waits for one that has left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from parallel_plans.collectives import Axis
from parallel_plans.errors import Finding, LaunchError, ParallelPlansError
from parallel_plans.mesh import this_rank
from parallel_plans.messages import print_once
from parallel_plans.watch import explained, has_met, tell_of
from parallel_plans.watch.meeting import differs


@dataclass(frozen=True, kw_only=True)
class _Word:
    """What one rank says at a step: the error it raised, or the facts that must be the same on all ranks."""

    rank: int
    step: str
    error: str | None = None
    facts: tuple[tuple[str, str], ...] = ()


class Agreement:
    """The steps that the ranks of some axes take together, each with a name for people (`reading the weights`)."""

    def __init__(self, axes: Sequence[Axis]) -> None:
        self.axes = tuple(axes)
        self.is_over = False

    def _exchange(self, word: _Word) -> list[_Word]:
        """The words of all ranks, in their order."""
        return sorted(self._of_all(word), key=lambda each: each.rank)

    def _of_all(self, own: Any) -> list[Any]:
        """What every rank has: along the first axis, then along the next what those along the first have."""
        values = [own]
        for axis in self.axes:
            told: list[Any] = [None] * axis.size
            dist.all_gather_object(told, values, group=axis.group)
            values = [each for several in told for each in several]
        return values

    def confirm(self, step: str, **facts: str) -> None:
        """Returns when every rank has come here well and with the same facts.

        Raises:
            LaunchError: PP705 where another rank failed, PP706 where a fact differs.
        """
        words = self._exchange(_Word(rank=this_rank(), step=step, facts=tuple(facts.items())))
        for word in words:
            if word.error is not None:
                self.is_over = True
                message = f"rank {word.rank} failed while {word.step}"
                raise LaunchError(Finding(code="PP705", message=message, found=word.error))
        for fact, _ in words[0].facts:
            values = [dict(word.facts).get(fact, "") for word in words]
            if len(set(values)) > 1:
                self.is_over = True
                raise print_once(differs(fact, {word.rank: value for word, value in zip(words, values, strict=True)}))

    def shared(self, step: str, is_first: bool, make: Callable[[], str]) -> str:
        """What the first rank makes, on every rank.

        Raises:
            LaunchError: PP705 where making it failed there.
        """
        own = make() if is_first else ""
        self.confirm(step)
        return next(text for text in self._of_all(own) if text)

    @contextmanager
    def amid_others(self, step: str, is_in_order: bool) -> Iterator[None]:
        """Inside the block ranks make collectives of their own; one that raises cannot meet the others there.

        A rank that `is_in_order` has made all of them when it raises, and can.
        """
        try:
            yield
        except Exception as error:
            if not is_in_order and explained(error) is error and tell_of(error, step):
                self.is_over = True
            raise

    def abandon(self, step: str, error: BaseException) -> None:
        """Tells the other ranks of an error that this rank is about to raise; does nothing once all know.

        Raises:
            LaunchError: PP707 to PP709, where the error is only that another rank is not there any more.
        """
        if self.is_over:
            return
        self.is_over = True
        if (told := explained(error)) is not error:
            raise told from error
        tell_of(error, step, may_meet=True)  # where the others are somewhere else, they are told of it there
        text = str(error) if isinstance(error, ParallelPlansError) else f"{type(error).__name__}: {error}"
        try:
            words = self._exchange(_Word(rank=this_rank(), step=step, error=text))
        except RuntimeError as lost:
            if explained(lost) is lost:
                error.add_note(f"on rank {this_rank()}, while {step}; the other ranks could not be told")
            return
        has_met()
        if isinstance(error, ParallelPlansError) and words[0].error == text:
            print_once(error)
        else:
            error.add_note(f"on rank {this_rank()}, while {step}")
