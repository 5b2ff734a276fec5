"""What is derived for every type of causal language model: writes docs/derived.md.

python benchmarks/derived.py [--types TYPE ...] [--json FILE] [--known FILE] [--jobs N] [--seconds S]
                             [--no-ranks]

For every type that `AutoModelForCausalLM` builds, a plan is derived from a small config, verified, run on two gloo
ranks against one process, and held against the bundled plan: how much of the layers is split, how many collectives. All
of them take an hour on two cores. What takes too long is ended, and said to. With `--types` the page is left as it
is, and the lines are printed. With `--json FILE --known FILE`, whoever was interrupted starts it again: what the file
holds is not judged again.

Exit status 1 where a plan that was derived is wrong.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from causal.cases import types
from causal.children import asked_at_once
from causal.compare import RIGHT
from derivation.judge import NONE, WRONG, Judged, judged, judged_from
from derivation.page import COLUMNS, line_of, page

PAGE = Path(__file__).resolve().parents[1] / "docs" / "derived.md"
FAILED = "nothing is judged: "  # how a type says so whose model does not run, or that took too long


def all_judged(
    kinds: Sequence[str],
    *,
    jobs: int = 1,
    seconds: float = 300.0,
    with_ranks: bool = True,
    known: Mapping[str, Judged] | None = None,
    into: Path | None = None,
) -> list[Judged]:
    """Every type judged, in their order; `known` were judged before, `into` is a file that is written after each."""
    found = {kind: each for kind, each in (known or {}).items() if kind in kinds}
    left, started = [kind for kind in kinds if kind not in found], time.monotonic()
    calls = [(kind, with_ranks) for kind in left]
    for count, (index, answer) in enumerate(asked_at_once(judged, calls, jobs, seconds), start=1):
        kind = left[index]
        problem = Judged(kind=kind, outcome=NONE, told=f"{FAILED}{answer.problem}")
        found[kind] = answer.value if answer.problem is None else problem
        told = " | ".join(line_of(found[kind])[1:])
        print(f"{count}/{len(left)} {time.monotonic() - started:.0f} s  {kind}: {told}", file=sys.stderr, flush=True)
        if into is not None:
            part = into.with_name(f"{into.name}.part")
            all_of_them = {kind: dataclasses.asdict(found[kind]) for kind in sorted(found)}
            part.write_text(json.dumps(all_of_them, indent=1), encoding="utf-8")
            part.replace(into)
    return [found[kind] for kind in kinds]


def judged_in(path: Path | None) -> dict[str, Judged]:
    """Type -> what was found, of what `--json` has written before."""
    told = json.loads(path.read_text(encoding="utf-8")) if path is not None and path.exists() else {}
    return {kind: judged_from(each) for kind, each in told.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", choices=types(), metavar="TYPE", help="these alone; writes no page")
    parser.add_argument("--json", type=Path, help="where to write all that was found")
    parser.add_argument("--known", type=Path, help="a file of --json, or the same: its types are not judged again")
    parser.add_argument("--jobs", type=int, default=2, help="types at once; each runs on two ranks")
    parser.add_argument("--seconds", type=float, default=300.0, help="for one type")
    parser.add_argument("--no-ranks", action="store_true", help="the verifier alone; writes no page")
    arguments = parser.parse_args()
    found = all_judged(
        arguments.types or types(),
        jobs=arguments.jobs,
        seconds=arguments.seconds,
        with_ranks=not arguments.no_ranks,
        known=judged_in(arguments.known),
        into=arguments.json,
    )
    if arguments.types or arguments.no_ranks:
        print("\n".join(" | ".join(cells) for cells in (COLUMNS, *map(line_of, found))))
    else:
        without = [each for each in found if each.told.startswith(FAILED)]
        told = [(each.kind, each.told.removeprefix(FAILED)) for each in without]
        PAGE.write_text(page([each for each in found if each not in without], told), encoding="utf-8")
    is_wrong = [each for each in found if each.outcome == WRONG or each.ranks not in ("", RIGHT)]
    return 1 if is_wrong else 0


if __name__ == "__main__":
    sys.exit(main())
