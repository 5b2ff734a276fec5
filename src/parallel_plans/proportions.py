"""How much each rank of `tp` gets, where it is not to be alike: for accelerators of two kinds, for instance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from parallel_plans.errors import Finding, LaunchError
from parallel_plans.plan import Plan


def checked_proportions(given: Sequence[int] | None, tp: int) -> tuple[int, ...] | None:
    """The proportions in the smallest numbers; None where nobody gives any, or all are alike.

    Raises:
        LaunchError: PP702 where they are not one whole number of at least 1 for each rank of `tp`.
    """
    if given is None:
        return None
    numbers = tuple(given)
    are_whole = all(isinstance(each, int) and not isinstance(each, bool) and each >= 1 for each in numbers)
    if len(numbers) != tp or not are_whole:
        message = f"proportions={list(numbers)} are not those of {tp} rank{'s' * (tp > 1)}"
        expected = f"a whole number of at least 1 for each rank of tp = {tp}"
        fix = f"pass proportions={[2, *[1] * (tp - 1)]}, or drop them"
        raise LaunchError(Finding(code="PP702", message=message, expected=expected, fix=fix))
    least = math.gcd(*numbers)
    smallest = tuple(each // least for each in numbers)
    return None if set(smallest) == {1} else smallest


def with_proportions(plan: Plan, given: Sequence[int] | None, tp: int) -> Plan:
    """`plan`, by which whole units are dealt in these proportions; as it is where nobody gives any.

    Raises:
        LaunchError: PP702, as `checked_proportions`.
    """
    return plan if given is None else replace(plan, proportions=checked_proportions(given, tp))
