"""The smallest mesh whose ranks have the memory: meshes tried in rising number of ranks, each resolved and traced."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from parallel_plans.errors import LaunchError, PlanError
from parallel_plans.mesh import views_for
from parallel_plans.model_spec import describe
from parallel_plans.resolve import resolve
from parallel_plans.table import Table
from parallel_plans.verify.cost import Memory
from parallel_plans.verify.memory import held_by, memory_of, whole
from parallel_plans.verify.shrinking.kinds import on_meta
from parallel_plans.verify.shrinking.roles import role_of
from parallel_plans.verify.traced import Question, trace
from parallel_plans.views import Views

MOST_RANKS = 4096


@dataclass(frozen=True, kw_only=True)
class Smallest:
    """A mesh that fits, and what each of its ranks needs, None where none does; how many were looked at."""

    views: Views | None = None
    memory: Memory | None = None
    tried: int


def smallest_mesh(question: Question, purpose: str, limit: int) -> Smallest:
    """The mesh with the fewest ranks, of `MOST_RANKS` at most, on which a purpose needs `limit` bytes at most.

    `question` is about the same on other ranks.
    """
    spec = describe(on_meta(question.few.config))
    tried, kept_by_dense = 0, dict[int, int]()  # tp -> bytes that are kept around the experts, however these are dealt
    for views in meshes_for(spec.fields):
        try:
            table = resolve(question.plan, spec, views.sizes, dispatch=question.dispatch)
        except PlanError:
            continue  # the plan does not go with these sizes
        tried += 1
        if held_by(purpose, table, views, question).total + kept_by_dense.get(views.tp, 0) > limit:
            continue  # no need to run it
        asked = replace(question, views=views, rank=0)  # the first rank never holds less than another
        seen = trace(asked, purposes=(purpose,), with_apart=False)
        need = memory_of(purpose, seen, question.few)
        kept_by_dense[views.tp] = whole(_around_experts(seen.kept, table), question.few)
        if need.total <= limit:
            return Smallest(views=views, memory=need, tried=tried)
    return Smallest(tried=tried)


def _around_experts(by_name: Mapping[str, int], table: Table) -> dict[str, int]:
    """What is told of the modules that are not in a block with experts."""
    experts = (name for name, entry in table.acting() if entry.style.role == "experts")
    blocks = tuple(f"{name.rpartition('.')[0]}." for name in experts)
    return {name: size for name, size in by_name.items() if not f"{name}.".startswith(blocks)}


def meshes_for(fields: Mapping[str, int]) -> Iterator[Views]:
    """Meshes for a model whose config has these whole numbers, those with fewer ranks first, and with a smaller tp.

    As many ranks as divide the heads, or the experts, so that all have the same to do; experts are whole on a rank, or
    split by as many as share a batch.
    """
    heads, experts = (divisors(_largest(fields, role)) for role in ("heads", "experts"))
    found: dict[tuple[int, int, int, int], Views] = {}
    for tp, ep in itertools.product(heads, experts):
        for etp in {1, tp} if ep > 1 else {tp}:
            try:
                views = views_for(tp, ep, etp)
            except LaunchError:
                continue  # the experts' ranks would lie across tp groups
            if views.world <= MOST_RANKS:
                found[views.world, tp, ep, etp] = views
    for key in sorted(found):
        yield found[key]


def _largest(fields: Mapping[str, int], role: str) -> int:
    return max((size for name, size in fields.items() if role_of((name.rpartition(".")[2],)) == role), default=1)


def divisors(number: int) -> list[int]:
    """What divides a number, from 1 up.

    >>> divisors(12)
    [1, 2, 3, 4, 6, 12]
    """
    return [each for each in range(1, number + 1) if number % each == 0]
