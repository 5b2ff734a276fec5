"""The sizes that a launch file of accelerate gives, where a plan sees to them; and schedules that go by batches."""

from __future__ import annotations

import os
from typing import Any

from accelerate.parallelism_config import ParallelismConfig
from accelerate.scheduler import AcceleratedScheduler

from parallel_plans.launcher import launched_batches, launched_tp_size


class PlannedSizes(ParallelismConfig):  # type: ignore[misc]
    """The sizes of a launch file, where a plan sees to them: accelerate itself finds nothing to do."""

    def __bool__(self) -> bool:
        return False


def left_to_plans(config: ParallelismConfig | None) -> ParallelismConfig | None:
    """`config`, or what the launch file says where it is None; without effect on accelerate where it asks for `tp`."""
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        return config
    tp, batches = launched_tp_size(), launched_batches()
    if config is not None:
        tp, batches = config.tp_size, config.data_parallel_size
    # accelerate knows no copies beside `tp`, and looks at the product alone where it looks at all
    return config if tp is None or tp == 1 else PlannedSizes(dp_replicate_size=1, dp_shard_size=batches, tp_size=tp)


class Schedule(AcceleratedScheduler):  # type: ignore[misc]
    """accelerate's scheduler, which goes a step for every batch of a step; accelerate takes every rank to have one."""

    def __init__(self, scheduler: Any, optimizers: Any, step_with_optimizer: bool, batches: int) -> None:
        super().__init__(scheduler, optimizers, step_with_optimizer, split_batches=True)  # each of its own is one step
        self.batches = batches

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Runs after a step of the optimizer, and after each batch whose gradients are only added up."""
        is_stepping = self.step_with_optimizer and self.gradient_state.sync_gradients
        for _ in range(self.batches if is_stepping else 1):
            total = getattr(self.scheduler, "total_steps", None)
            if total is None or not is_stepping or self.scheduler._step_count <= total:
                super().step(*args, **kwargs)
