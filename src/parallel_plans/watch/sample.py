"""How this rank is, looked at from another of its threads."""

from __future__ import annotations

import sys
import threading
import time

from parallel_plans.watch.beat import Beat
from parallel_plans.watch.connections import numbers_of_groups
from parallel_plans.watch.limit import is_paused
from parallel_plans.watch.process import this_process
from parallel_plans.watch.stack import (
    BACKWARD,
    Frames,
    Standing,
    collective_in,
    frames_of_stack,
    is_in_debugger,
    shown,
    signature,
    standing,
)


class Sampler:
    """Looks at one thread again and again.

    Args:
        rank: this rank.
        thread: the thread's identity.
    """

    def __init__(self, rank: int, thread: int) -> None:
        self.rank, self.thread = rank, thread
        self._process, self._count = this_process(), 0
        self._signature, self._since = 0, time.monotonic()

    def beat(self, limit: float) -> Beat:
        """How the rank is now; where it stands is looked at closely once it has stood there for half of `limit`."""
        frames, groups = self._frames(), numbers_of_groups()
        now, seen = time.monotonic(), signature(frames) ^ hash(tuple(groups.items()))
        if seen != self._signature:
            self._signature, self._since = seen, now
        still = now - self._since
        is_long = 0 < limit <= 2 * still
        self._count += 1
        return Beat(
            rank=self.rank,
            count=self._count,
            process=self._process,
            still=still,
            standing=self._standing(frames, closely=is_long),
            stack=shown(frames) if is_long else "",
            groups=groups,
            is_paused=is_paused() or is_in_debugger(frames),
            limit=limit,
        )

    def stack(self) -> str:
        """The thread's stack, as Python shows it."""
        return shown(self._frames())

    def _frames(self) -> Frames:
        return frames_of_stack(sys._current_frames().get(self.thread))

    def _standing(self, frames: Frames, *, closely: bool) -> Standing:
        found = standing(frames, closely=closely)
        if found.op is None and found.phase == BACKWARD:
            # on an accelerator gradients are computed by threads of autograd's, and collectives with them
            return Standing(op=self._op_elsewhere(), phase=found.phase, module=found.module, line=found.line)
        return found

    def _op_elsewhere(self) -> str | None:
        """The collective that another thread is in."""
        own = {self.thread, threading.get_ident()}
        others = (frame for thread, frame in sys._current_frames().items() if thread not in own)
        return next(filter(None, (collective_in(frames_of_stack(frame)) for frame in others)), None)
