"""What the plans are worth that the model classes of transformers carry: writes docs/builtin_plans.md.

python benchmarks/builtin_plans.py [--types TYPE ...] [--json FILE] [--runs FILE] [--jobs N] [--no-run]

Every type that `AutoModelForCausalLM` builds and whose class carries a plan is judged by `verify_plan(..., "builtin")`,
and run by transformers itself on two real ranks; what the two say is held against each other. A type takes some
seconds, all of them half an hour on two cores. What takes minutes is ended and marked ("it took too long"). With
`--types` the page is left as it is, and the lines are printed. With `--json FILE --runs FILE`, whoever was interrupted
starts it again: what transformers ran is not run again.

Exit status 1 where the verifier and the run differ and nobody has said why (`WHY` in benchmarks/carried/why.py).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from carried.gather import TOO_LONG, Row, rows_of
from carried.page import COLUMNS, differing, line_of, page
from carried.why import UNKNOWN, why
from causal.cases import types
from causal.children import asked_at_once

Runs = Mapping[str, Mapping[str, str]]  # key -> phase -> what a run gave
PAGE = Path(__file__).resolve().parents[1] / "docs" / "builtin_plans.md"
SECONDS = 1800.0  # for one type, which ends its verdicts and runs by itself before


def gathered(
    kinds: Sequence[str],
    *,
    jobs: int = 1,
    with_runs: bool = True,
    known: Runs | None = None,
    into: Path | None = None,
) -> tuple[dict[str, list[Row]], dict[str, str]]:
    """Type -> its rows, and type -> why there are none; types whose class carries no plan are in neither.

    `known` are runs of before, by key; `into` is a file for all that was found, written after each type.
    """
    found, without = dict[str, list[Row]](), dict[str, str]()
    started, calls = time.monotonic(), [(kind, with_runs, known or {}) for kind in kinds]
    for count, (index, answer) in enumerate(asked_at_once(rows_of, calls, jobs, SECONDS), start=1):
        kind = kinds[index]
        told = "no plan"
        if answer.problem is not None or isinstance(answer.value, str):
            told = without[kind] = answer.problem or answer.value
        elif answer.value is not None:
            found[kind] = answer.value
            told = " | ".join(line_of(answer.value)[1:])
        print(f"{count}/{len(kinds)} {time.monotonic() - started:.0f} s  {kind}: {told}", file=sys.stderr, flush=True)
        if into is not None:
            _write(into, found, without, known or {})
    return {kind: found[kind] for kind in kinds if kind in found}, without


def _write(into: Path, found: Mapping[str, list[Row]], without: Mapping[str, str], known: Runs) -> None:
    """Writes what was found so far, with the runs of before: whoever is interrupted goes on from there."""
    rows = {kind: [dataclasses.asdict(row) for row in rows] for kind, rows in found.items()}
    told = {"rows": rows, "without": dict(without), "runs": dict(known)}
    part = into.with_name(f"{into.name}.part")
    part.write_text(json.dumps(told, indent=1), encoding="utf-8")
    part.replace(into)


def runs_in(path: Path | None) -> dict[str, Mapping[str, str]]:
    """Key -> run, of what `--json` has written before; without those that were ended for their time."""
    told = json.loads(path.read_text(encoding="utf-8")) if path is not None and path.exists() else {"rows": {}}
    found = told.get("runs", {}) | {row["key"]: row["run"] for rows in told["rows"].values() for row in rows}
    return {key: run for key, run in found.items() if run and not any(TOO_LONG in said for said in run.values())}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", choices=types(), metavar="TYPE", help="these alone; writes no page")
    parser.add_argument("--json", type=Path, help="where to write all that was found")
    parser.add_argument(
        "--runs", type=Path, help="a file of --json, or the same: its runs of these configs are not made again"
    )
    parser.add_argument("--jobs", type=int, default=1, help="types at once; each runs on two ranks")
    parser.add_argument("--no-run", action="store_true", help="the verifier alone; writes no page")
    arguments = parser.parse_args()
    started = time.monotonic()
    found, without = gathered(
        arguments.types or types(),
        jobs=arguments.jobs,
        with_runs=not arguments.no_run,
        known=runs_in(arguments.runs),
        into=arguments.json,
    )
    if arguments.types or arguments.no_run:
        print("\n".join(" | ".join(cells) for cells in (COLUMNS, *map(line_of, found.values()))))
    else:
        PAGE.write_text(page(found, without), encoding="utf-8")
    print(f"{len(found)} types in {time.monotonic() - started:.0f} s", file=sys.stderr)
    return 1 if any(why(row) == UNKNOWN for rows in found.values() for row in differing(rows)) else 0


if __name__ == "__main__":
    sys.exit(main())
