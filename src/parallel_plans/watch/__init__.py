"""Ranks that look after each other: one that raises, dies or stands still stops the others, and is named."""

from parallel_plans.watch.current import explained, has_met, start_watch, tell_of, watch_ranks
from parallel_plans.watch.limit import pause_watch
from parallel_plans.watch.meeting import meeting

__all__ = ["explained", "has_met", "meeting", "pause_watch", "start_watch", "tell_of", "watch_ranks"]
