"""The smallest mesh whose ranks have the memory: meshes tried in rising number of ranks, each resolved and traced."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from parallel_plans.errors import LaunchError, PlanError
from parallel_plans.mesh import views_for
from parallel_plans.model_spec import describe
from parallel_plans.resolve import resolve
from parallel_plans.verify.cost import Memory
from parallel_plans.verify.memory import held_by, memory_of
from parallel_plans.verify.shrinking.kinds import on_meta
from parallel_plans.verify.shrinking.roles import role_of
from parallel_plans.verify.traced import Question, trace
from parallel_plans.views import Views

MOST_RANKS = 4096


@dataclass(frozen=True, kw_only=True)
class Smallest:
    """A mesh that fits: its ranks, what each needs, and how many meshes were looked at to find it."""

    views: Views
    memory: Memory
    tried: int


def smallest_mesh(question: Question, purpose: str, limit: int) -> Smallest | None:
    """The mesh with the fewest ranks on which `question`, asked on other ranks, needs `limit` bytes at most.

    None where no mesh of up to `MOST_RANKS` ranks has it.
    """
    spec = describe(on_meta(question.few.config))
    for tried, views in enumerate(meshes_for(spec.fields), 1):
        try:
            table = resolve(question.plan, spec, views.sizes, dispatch=question.dispatch)
        except PlanError:
            continue  # the plan does not go with these sizes
        if held_by(purpose, table, views, question).total > limit:
            continue  # what its parameters alone need does not fit
        asked = replace(question, views=views, rank=0)  # the first rank never holds less than another
        need = memory_of(purpose, trace(asked, with_apart=False), question.few)
        if need.total <= limit:
            return Smallest(views=views, memory=need, tried=tried)
    return None


def meshes_for(fields: Mapping[str, int]) -> Iterator[Views]:
    """Meshes for a model whose config has these whole numbers, those with fewer ranks first, and with a smaller tp.

    As many ranks as divide the heads, or the experts, so that all have the same to do.
    """
    heads, experts = (divisors(_largest(fields, role)) for role in ("heads", "experts"))
    found: dict[tuple[int, int, int], Views] = {}
    for tp, ep in itertools.product(heads, experts):
        try:
            views = views_for(tp, ep)
        except LaunchError:
            continue  # the experts' ranks would lie across tp groups
        if views.world <= MOST_RANKS:
            found[views.world, tp, ep] = views
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
