"""Whether another process of this machine is alive, as Linux tells: a rank that was killed cannot say so itself."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_ENDED, _STOPPED = ("Z", "X", "x"), ("T", "t")


@dataclass(frozen=True, kw_only=True)
class Process:
    """A process as any other of its machine can find it.

    Args:
        machine: the machine and the space of process numbers in it; empty where that cannot be told.
        number: its process number.
        start: when it started, in ticks of the machine: numbers are used again.
    """

    machine: str
    number: int
    start: str


@cache
def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _state(number: int) -> tuple[str, str] | None:
    """The letter of a process's state and when it started; None where there is no such process."""
    try:
        text = Path(f"/proc/{number}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # what comes before is its name, in which anything may stand
    return fields[0], fields[19]


def this_process() -> Process:
    """This process."""
    state = _state(os.getpid())
    return Process(machine=_machine() if state else "", number=os.getpid(), start=state[1] if state else "")


def state_of(process: Process) -> str:
    """`running`, `stopped` (by a signal or a debugger), `ended`, or `unknown`: another machine's."""
    if not process.machine or process.machine != _machine():
        return "unknown"
    state = _state(process.number)
    if state is None or state[1] != process.start or state[0] in _ENDED:
        return "ended"
    return "stopped" if state[0] in _STOPPED else "running"
