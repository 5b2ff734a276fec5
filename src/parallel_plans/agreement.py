"""Ranks that fail together: before every stretch of collectives, all say whether they are well and what they hold.

A rank that raised takes part once more and says so; then every rank raises. Nobody waits for one that has left.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from parallel_plans.collectives import Axis
from parallel_plans.errors import Finding, LaunchError, ParallelPlansError
from parallel_plans.messages import print_once


@dataclass(frozen=True, kw_only=True)
class _Word:
    """What one rank says at a step: the error it raised, or the facts that must be the same on all ranks."""

    step: str
    error: str | None = None
    facts: tuple[tuple[str, str], ...] = ()


class Agreement:
    """The steps that the ranks of one axis take together, each with a name for people (`reading the weights`)."""

    def __init__(self, axis: Axis) -> None:
        self.axis = axis
        self.is_over = False

    def _exchange(self, word: _Word) -> list[_Word]:
        words: list[Any] = [None] * self.axis.size
        dist.all_gather_object(words, word, group=self.axis.group)
        return words

    def confirm(self, step: str, **facts: str) -> None:
        """Returns when every rank has come here well and with the same facts.

        Raises:
            LaunchError: PP705 where another rank failed, PP706 where a fact differs.
        """
        words = self._exchange(_Word(step=step, facts=tuple(facts.items())))
        for rank, word in enumerate(words):
            if word.error is not None:
                self.is_over = True
                raise LaunchError(
                    Finding(code="PP705", message=f"rank {rank} failed while {word.step}:\n{_indented(word.error)}")
                )
        for index, (fact, _) in enumerate(words[0].facts):
            values = [dict(word.facts).get(fact, "") for word in words]
            if len(set(values)) > 1:
                self.is_over = True
                raise print_once(_differs(fact, index, values))

    def abandon(self, step: str, error: BaseException) -> None:
        """Tells the other ranks of an error that this rank is about to raise; does nothing once all know."""
        if self.is_over:
            return
        self.is_over = True
        text = str(error) if isinstance(error, ParallelPlansError) else f"{type(error).__name__}: {error}"
        words = self._exchange(_Word(step=step, error=text))
        if isinstance(error, ParallelPlansError) and words[0].error == text:
            print_once(error)
        elif hasattr(error, "add_note"):  # Python 3.11
            error.add_note(f"on rank {self.axis.rank}, while {step}")


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())


def _differs(fact: str, index: int, values: list[str]) -> LaunchError:
    groups: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        groups.setdefault(value, []).append(rank)
    told = "; ".join(f"{value} on rank {', '.join(map(str, ranks))}" for value, ranks in groups.items())
    return LaunchError(
        Finding(
            code="PP706",
            message=f"the ranks do not agree on {fact.replace('_', ' ')}",
            found=told,
            name=fact,
            expected="the same on every rank",
            fix="give every rank the same files and arguments",
        )
    )
