"""From what the ranks say of themselves to what is wrong with them, if anything is: pure, no clock, no process.

A rank that stands still while it works is not wrong, nor is one that works long while nobody waits. What is looked for
is a rank that others wait for. Who waits for whom is told by numbers that process groups keep anyway: how many
collectives a rank has begun on each. Of three ranks on one group,

    rank 0    7 begun, in all_reduce, still for 60 s     waits
    rank 1    7 begun, in all_reduce, still for 60 s     waits
    rank 2    6 begun, in forward, still for 61 s        keeps them waiting

Only the first rank sees all. One that sees the first and itself does not know for whom else these two may wait: it
blames a rank that is late only if nothing is heard of it any more.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from parallel_plans.watch.beat import Beat, Verdict

WAITING = 1.0  # seconds in a collective that make a rank one that waits, where another is gone
SILENT = 5.0  # seconds without a beat after which a rank of another machine is taken for gone, if a connection was lost
MEETING = 2.0  # seconds that a rank has to tell of its error by meeting the others
MOVING = 10.0  # a rank that moves may be waited for this many times as long
_SHOWN = 8  # ranks that are told one by one


@dataclass(frozen=True, kw_only=True)
class Seen:
    """A rank as another sees it: its last beat, the seconds since, and what the machine says of its process."""

    beat: Beat
    age: float
    state: str

    @property
    def still(self) -> float:
        """Seconds for which its thread is not known to have moved."""
        return self.beat.still + self.age

    @property
    def is_gone(self) -> bool:
        """Whether its process has ended, or left in order a while ago: it may be about to tell of an error."""
        return self.state == "ended" or (self.beat.has_left and self.age >= WAITING)

    @property
    def is_silent(self) -> bool:
        """Whether nothing was heard of it for as long as it may be waited for."""
        return self.age >= self.beat.limit > 0

    def leads(self, other: Seen) -> bool:
        """Whether it has begun a collective that `other`, of the same group, has not."""
        return any(number > other.beat.groups.get(group, number) for group, number in self.beat.groups.items())

    def is_in_collective(self, seconds: float) -> bool:
        """Whether it has been in one collective for so long."""
        return self.beat.standing.op is not None and self.still >= seconds


Ranks = Sequence[Seen]


def judged(ranks: Mapping[int, Seen], world: int) -> Verdict | None:
    """What is wrong with those of `world` ranks that are seen; None where nothing is, or nothing can be told yet."""
    ordered = [ranks[rank] for rank in sorted(ranks)]
    return _failed(ordered) or _ended(ordered) or _hang(ordered, sees_all=len(ordered) == world)


def _failed(ranks: Ranks) -> Verdict | None:
    for seen in ranks:
        if seen.beat.failing and seen.beat.failing_for + seen.age >= MEETING:
            return Verdict.from_text(seen.beat.failing)
    return None


def _ended(ranks: Ranks) -> Verdict | None:
    is_cut = any(seen.beat.is_cut for seen in ranks)
    gone = [seen for seen in ranks if seen.is_gone or (is_cut and seen.state == "unknown" and seen.age >= SILENT)]
    for lost in sorted(gone, key=lambda seen: (seen.beat.has_left, -seen.age)):
        left = [seen for seen in ranks if seen not in gone]
        waiting = [seen for seen in left if seen.is_in_collective(WAITING) and seen.leads(lost)]
        if waiting or any(seen.beat.is_cut for seen in left):
            if lost.beat.failing:  # it ended before it could meet the others, and left word of why
                return Verdict.from_text(lost.beat.failing)
            telling = [seen for seen in left if seen.beat.is_cut or seen.is_in_collective(WAITING)]
            return Verdict(
                code="PP709",
                ranks=(lost.beat.rank,),
                message=f"rank {lost.beat.rank} has ended, and others wait for it",
                found="\n".join([f"rank {lost.beat.rank}: {_how_ended(lost)}", _others(telling, ())]),
                expected="every rank there until all are done",
                fix="look for what ended it: a signal, the memory of the machine, or a script that returns too early",
            )
    return None


def _how_ended(lost: Seen) -> str:
    how = "left in order" if lost.beat.has_left else "its process is gone"
    return f"{how}; it was last seen {lost.beat.standing}"


def _hang(ranks: Ranks, *, sees_all: bool) -> Verdict | None:
    for waiting in ranks:
        limit = waiting.beat.limit
        if limit <= 0 or waiting.still < limit or not _is_judged(waiting):
            continue
        late = _behind(waiting, ranks)
        if any(not _is_judged(seen) for seen in late):
            continue
        idle = [seen for seen in late if not any(seen.leads(other) for other in ranks)]
        slow = [seen for seen in idle if seen.still >= limit or waiting.still >= MOVING * limit]
        if not sees_all:
            slow = [seen for seen in slow if seen.is_silent]
        if slow:
            return _late(slow, ranks, limit)
        if sees_all and late and not idle and all(seen.still >= limit for seen in late):
            return _crossed("the ranks wait for each other", ranks, waiting)
        stopped = [seen for seen in ranks if seen.state == "stopped" and seen.still >= limit and _is_judged(seen)]
        if stopped and not late and waiting.is_in_collective(limit):  # before it could tell of its collectives
            return _late(stopped, ranks, limit)
        same = [seen for seen in ranks if _is_beside(waiting, seen)]
        if not late and any(seen.beat.standing.op != waiting.beat.standing.op for seen in same):
            return _crossed("the ranks are in different collectives", ranks, waiting)
    return None


def _behind(waiting: Seen, ranks: Ranks) -> Ranks:
    """The ranks that a rank waits for, those that they wait for, and so on."""
    found: list[Seen] = []
    ahead = [waiting]
    while ahead:
        leading = ahead.pop()
        new = [seen for seen in ranks if leading.leads(seen) and seen not in found]
        found += new
        ahead += new
    return [seen for seen in ranks if seen in found]


def _is_judged(seen: Seen) -> bool:
    return not seen.is_gone and not seen.beat.is_paused


def _is_beside(waiting: Seen, seen: Seen) -> bool:
    """Whether both are in a collective of the same groups, for as long as may be, and neither leads."""
    both = waiting.is_in_collective(waiting.beat.limit) and seen.is_in_collective(waiting.beat.limit)
    return both and not seen.leads(waiting) and bool(waiting.beat.groups.keys() & seen.beat.groups.keys())


_HANG_FIX = (
    "where one rank has long work of its own to do, let it do it inside `with pause_watch():`, or give it more time: "
    "watch_ranks(seconds=...), PARALLEL_PLANS_TIMEOUT"
)


def _late(slow: Ranks, ranks: Ranks, limit: float) -> Verdict:
    numbers = tuple(seen.beat.rank for seen in slow)
    keeps = "keeps" if len(numbers) == 1 else "keep"
    return Verdict(
        code="PP708",
        ranks=numbers,
        message=f"rank {_listed(numbers)} {keeps} the others waiting",
        found="\n".join([*map(_how_late, slow), _others(ranks, numbers)]),
        expected=f"every rank comes to the collectives of the others, at most {limit:g} s after them",
        fix=_HANG_FIX,
    )


def _how_late(seen: Seen) -> str:
    beat = seen.beat
    if seen.state == "stopped":
        state = "its process is stopped, by a signal or a debugger; it was"
    elif seen.is_silent:
        state = "not even its watching thread runs, so something holds Python's lock; it was"
    else:
        state = f"it has stood still for {seen.still:.0f} s," if seen.still >= beat.limit else "it goes on, but is"
    stack = f"\n{beat.stack}" if beat.stack else ""
    return f"rank {beat.rank}: {state} {beat.standing}{stack}"


def _crossed(message: str, ranks: Ranks, waiting: Seen) -> Verdict:
    numbers = tuple(seen.beat.rank for seen in ranks if seen.is_in_collective(waiting.beat.limit))
    return Verdict(
        code="PP708",
        ranks=(),
        message=message,
        found=_others([seen for seen in ranks if seen.beat.rank in numbers] or ranks, ()),
        expected="all ranks of a group begin the same collectives in the same order",
    )


def _others(ranks: Ranks, but: Iterable[int]) -> str:
    """Where the ranks stand, those that stand at the same place together."""
    places: dict[str, list[int]] = {}
    for seen in ranks:
        if seen.beat.rank not in but:
            places.setdefault(f"{_does(seen)} {seen.beat.standing}", []).append(seen.beat.rank)
    told = [f"rank {_listed(numbers)}: {place}" for place, numbers in places.items()]
    return "\n".join(told[:_SHOWN] + ([f"and {len(told) - _SHOWN} more"] if len(told) > _SHOWN else []))


def _does(seen: Seen) -> str:
    if seen.beat.is_cut:
        return "lost its connection"
    return "waits" if seen.is_in_collective(WAITING) else "is"


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
