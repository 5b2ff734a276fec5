"""How long `verify_tp_plan` takes, each time in a process of its own, imports included, and the memory that it needs.

Every row has its limit; the exit status is 1 where one is not kept.

python benchmarks/verify_speed.py [--only TEXT] [--json]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from parallel_plans.lookup import bundled_folder

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "models"
GIB = 2**30

# What a type's default config lacks before it can be split in two, as `--set` takes it.
LACKING: dict[str, tuple[str, ...]] = {
    "dbrx": ('attn_config={"rope_theta": 10000.0, "clip_qkv": 8, "kv_n_heads": 8}',),
    "deepseek_v2": ("num_experts_per_tok=6",),
    "dots1": ("n_routed_experts=128", "n_shared_experts=2", "num_experts_per_tok=6"),
    "hunyuan_v1_moe": ("head_dim=128",),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A question, and how many seconds and bytes its answer may take; any number where None."""

    name: str
    arguments: tuple[str, ...]
    seconds: float
    memory: int | None = None


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A case as it went: `status` is the exit status, 0 where the plan is sound."""

    name: str
    seconds: float
    limit: float
    memory: int
    memory_limit: int | None
    status: int

    @property
    def is_met(self) -> bool:
        """Whether an answer came, within the limits."""
        fits = self.memory_limit is None or self.memory <= self.memory_limit
        return self.status in (0, 1) and self.seconds <= self.limit and fits


def cases() -> list[Case]:
    """All that there is a limit for."""
    two = ("--tp", "2", "--json")
    deepseek = (str(CONFIGS / "deepseek-v3.json"), "--tp", "8", "--ep", "64", "--level", "geometry", "--json")
    found = [
        Case(name="llama, all levels", arguments=("llama", *two), seconds=15),
        Case(name="qwen3_moe, all levels", arguments=("qwen3_moe", *two), seconds=15),
        Case(name="DeepSeek-V3, tp=8 ep=64, with cost", arguments=deepseek, seconds=15, memory=2 * GIB),
    ]
    for path in sorted(bundled_folder().glob("*.yaml")):
        settings = tuple(word for each in LACKING.get(path.stem, ()) for word in ("--set", each))
        arguments = (path.stem, *two, "--level", "geometry", "--no-cost", *settings)
        found.append(Case(name=f"{path.stem}, levels 1 and 2", arguments=arguments, seconds=8))
    return found


def measured(case: Case) -> Measured:
    """The case, run in a process of its own; its most resident memory, as the system counts it."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    start = time.perf_counter()
    command = [sys.executable, "-m", "parallel_plans.cli.verify", *case.arguments]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    unit = 1 if sys.platform == "darwin" else 1024
    return Measured(
        name=case.name,
        seconds=seconds,
        limit=case.seconds,
        memory=usage.ru_maxrss * unit,
        memory_limit=case.memory,
        status=os.waitstatus_to_exitcode(status),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="the cases whose names have this in them")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    results = [measured(case) for case in cases() if arguments.only in case.name]
    if arguments.json:
        print(json.dumps([{**asdict(each), "met": each.is_met} for each in results], indent=2))
    else:
        rows = Table("case", "seconds", "limit", "memory", "limit", "met")
        for each in results:
            most = "" if each.memory_limit is None else f"{each.memory_limit / GIB:.1f} GiB"
            met = "yes" if each.is_met else f"no (status {each.status})"
            rows.add_row(
                each.name, f"{each.seconds:.1f}", f"{each.limit:.0f}", f"{each.memory / GIB:.2f} GiB", most, met
            )
        Console().print(rows)
    sys.exit(0 if all(each.is_met for each in results) else 1)


if __name__ == "__main__":
    main()
