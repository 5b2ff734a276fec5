"""What the watch makes of what ranks say of themselves: who is at fault, and when nobody is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from parallel_plans.errors import Finding, LaunchError
from parallel_plans.watch.beat import Beat, Verdict
from parallel_plans.watch.judge import Seen, judged
from parallel_plans.watch.limit import limited_to, seconds_to_wait
from parallel_plans.watch.process import Process, state_of, this_process
from parallel_plans.watch.stack import Standing
from parallel_plans.watch.told import is_lost_connection, is_told_of, verdict_of_error

LIMIT = 60.0


def seen(rank: int, begun: int, still: float = 0.0, op: str | None = None, **more: Any) -> Seen:
    """A rank that has begun so many collectives on the group `g`."""
    state, age = more.pop("state", "running"), more.pop("age", 0.0)
    beat = Beat(
        rank=rank,
        process=this_process(),
        still=still,
        standing=Standing(op=op, line="train.py:41"),
        groups=more.pop("groups", {"g": begun}),
        limit=LIMIT,
        **more,
    )
    return Seen(beat=beat, age=age, state=state)


def verdict_on(*ranks: Seen, world: int | None = None) -> Verdict | None:
    return judged({each.beat.rank: each for each in ranks}, world or len(ranks))


WAITING = seen(0, 7, 61, "all_reduce")


def test_the_rank_that_has_not_begun_what_others_wait_in_is_at_fault() -> None:
    verdict = verdict_on(WAITING, seen(1, 7, 61, "all_reduce"), seen(2, 6, 62))
    assert verdict is not None
    assert (verdict.code, verdict.ranks) == ("PP708", (2,))
    assert "rank 0, 1: waits in all_reduce (train.py:41)" in verdict.found


def test_a_rank_that_waits_itself_is_not_at_fault_but_the_one_it_waits_for() -> None:
    first = seen(0, 0, 61, "all_reduce", groups={"dp": 3})
    middle = seen(2, 0, 61, "all_reduce", groups={"dp": 2, "tp": 5})
    last = seen(3, 0, 62, groups={"tp": 4})
    verdict = verdict_on(first, middle, last)
    assert verdict is not None
    assert verdict.ranks == (3,)


def test_ranks_that_wait_for_each_other_are_told_together() -> None:
    one = seen(0, 0, 61, "all_reduce", groups={"a": 2, "b": 1})
    other = seen(1, 0, 61, "broadcast", groups={"a": 1, "b": 2})
    verdict = verdict_on(one, other)
    assert verdict is not None
    assert (verdict.message, verdict.ranks) == ("the ranks wait for each other", ())


def test_ranks_in_different_collectives_of_a_group_are_told_together() -> None:
    verdict = verdict_on(WAITING, seen(1, 7, 61, "broadcast"))
    assert verdict is not None
    assert verdict.message == "the ranks are in different collectives"
    assert "rank 1: waits in broadcast" in verdict.found


def test_who_sees_some_of_the_ranks_blames_only_one_that_is_not_heard_of() -> None:
    behind = seen(2, 6, 61, "broadcast")  # of which the last rank, unseen, takes no notice
    assert verdict_on(WAITING, behind, world=3) is None
    assert verdict_on(WAITING, seen(2, 6, 61), world=3) is None
    verdict = verdict_on(seen(0, 6, 1, "broadcast", age=61), seen(2, 7, 61, "broadcast"), world=3)
    assert verdict is not None
    assert verdict.ranks == (0,)
    whole = verdict_on(WAITING, seen(1, 5, 61), behind)
    assert whole is not None
    assert whole.ranks == (1,)


@pytest.mark.parametrize(
    "ranks",
    [
        pytest.param([seen(0, 7, 59, "all_reduce"), seen(1, 6, 100)], id="nobody has waited for long"),
        pytest.param([WAITING, seen(1, 6, 2)], id="the late one moves"),
        pytest.param([WAITING, seen(1, 6, 100, is_paused=True)], id="the late one asked not to be judged"),
        pytest.param([seen(0, 7, 1000), seen(1, 7, 1000)], id="all work for long, and nobody waits"),
        pytest.param([WAITING, seen(1, 7, 61, "all_reduce")], id="all are in one collective, which takes long"),
        pytest.param([seen(0, 7, 1000), seen(1, 7, state="ended")], id="one has ended, and nobody waits"),
        pytest.param([replace(WAITING, beat=replace(WAITING.beat, limit=0.0)), seen(1, 6, 99)], id="nobody watches"),
        pytest.param([seen(0, 7), seen(1, 6, has_left=True, age=0.2)], id="one left just now"),
    ],
)
def test_no_alarm_where(ranks: list[Seen]) -> None:
    assert verdict_on(*ranks) is None


def test_a_stopped_process_is_at_fault_though_it_never_told_of_the_group() -> None:
    waiting = [seen(1, 7, 61, "all_reduce"), seen(2, 7, 61, "all_reduce")]
    stopped = seen(0, 0, 1, state="stopped", age=61, groups={})
    told = verdict_on(stopped, *waiting)
    assert told is not None
    assert told.ranks == (0,)
    assert verdict_on(seen(0, 0, 1, state="stopped", age=30, groups={}), *waiting) is None
    assert verdict_on(stopped, seen(1, 7, 61), seen(2, 7, 61)) is None  # nobody waits


def test_a_rank_that_moves_may_be_waited_for_ten_times_as_long() -> None:
    verdict = verdict_on(seen(0, 7, 601, "all_reduce"), seen(1, 6, 2))
    assert verdict is not None
    assert "rank 1: it goes on, but is (train.py:41)" in verdict.found


def test_silence_of_a_watching_thread_counts_as_standing_still() -> None:
    verdict = verdict_on(WAITING, seen(1, 6, 0, age=61))
    assert verdict is not None
    assert "something holds Python's lock" in verdict.found


@pytest.mark.parametrize(
    "others", [[seen(0, 7, 2, "all_reduce")], [seen(0, 7, is_cut=True)], [seen(0, 7), seen(2, 7, is_cut=True)]]
)
def test_a_rank_that_ended_is_at_fault_once_others_wait_for_it(others: list[Seen]) -> None:
    verdict = verdict_on(*others, seen(1, 6, state="ended"))
    assert verdict is not None
    assert (verdict.code, verdict.ranks) == ("PP709", (1,))


def test_of_ranks_that_ended_the_one_that_died_is_at_fault() -> None:
    died = seen(2, 6, state="ended", age=0.5)
    verdict = verdict_on(seen(0, 7, is_cut=True), seen(1, 6, has_left=True, age=3, state="ended"), died)
    assert verdict is not None
    assert verdict.ranks == (2,)


def test_a_silent_rank_of_another_machine_is_gone_only_if_a_connection_was_lost() -> None:
    silent = seen(1, 6, state="unknown", age=6)
    assert verdict_on(seen(0, 7, 3, "all_reduce"), silent) is None
    verdict = verdict_on(seen(0, 7, is_cut=True), silent)
    assert verdict is not None
    assert verdict.ranks == (1,)


def test_an_error_that_nobody_came_to_hear_of_is_told_to_all() -> None:
    told = Verdict(code="PP707", ranks=(1,), message="rank 1 failed", found="ValueError: no")
    assert verdict_on(WAITING, seen(1, 6, failing=told.to_text(), failing_for=1.0)) is None
    assert verdict_on(WAITING, seen(1, 6, failing=told.to_text(), failing_for=2.5)) == told


def test_a_beat_is_read_as_it_was_written() -> None:
    beat = seen(3, 6, 1.5, "all_reduce", is_paused=True).beat
    assert Beat.from_text(beat.to_text()) == beat


def test_a_process_is_known_by_its_start_too() -> None:
    own = this_process()
    assert state_of(own) == "running"
    assert state_of(replace(own, start="1")) == "ended"  # its number is in use again
    assert state_of(Process(machine="elsewhere", number=own.number, start=own.start)) == "unknown"


def test_errors_of_connections_are_echoes_and_others_are_not() -> None:
    assert is_lost_connection(RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer"))
    assert not is_lost_connection(RuntimeError("shape mismatch"))
    assert not is_lost_connection(OSError("Connection reset by peer"))  # a user's own, to a database maybe
    assert is_told_of(LaunchError(Finding(code="PP706", message="the ranks do not agree")))
    assert not is_told_of(LaunchError(Finding(code="PP701", message="too few")))


def test_an_error_is_told_with_the_line_of_the_users_own_code() -> None:
    try:
        int("x")
    except ValueError as error:
        verdict = verdict_of_error(error, 2, "reading the weights")
    assert verdict.message.startswith("rank 2 failed while reading the weights (test_watch_judge.py:")
    assert verdict.found == "ValueError: invalid literal for int() with base 10: 'x'"


@pytest.mark.parametrize("text", ["soon", "-1", "inf", "nan"])
def test_a_limit_that_is_no_number_of_seconds_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARALLEL_PLANS_TIMEOUT", text)
    with pytest.raises(ValueError, match="a number of seconds"):
        seconds_to_wait()


def test_the_innermost_limit_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    assert seconds_to_wait() == 300
    monkeypatch.setenv("PARALLEL_PLANS_TIMEOUT", "20")
    assert seconds_to_wait() == 20
    with limited_to(5), limited_to(None):
        assert seconds_to_wait() == 5
    assert seconds_to_wait() == 20
