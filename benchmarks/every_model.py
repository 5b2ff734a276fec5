"""Every type of causal language model, split by this project over real ranks: writes docs/every_model.md.

python benchmarks/every_model.py [--types TYPE ...] [--rows ROW ...] [--json FILE] [--known FILE] [--runs FILE]
                                 [--jobs N]

Every type that `AutoModelForCausalLM` builds is made small, its weights are drawn at random, and what it gives on 2, 3
and 4 gloo ranks (and with its experts dealt over 2) is held against one process, in float64: logits, loss, every
gradient, a greedy continuation, and the checkpoint that is saved. All of them take a quarter of an hour on two cores.
With `--types` or `--rows` the page is left as it is, and the lines are printed. One type (gemma3n) wants timm, which
nothing else here does: where that is not installed, the page says so.

With `--json FILE --known FILE`, whoever was interrupted starts it again: what the file holds is not judged again.

Beside it stands what transformers' own parallelism makes of the plan that the type's class carries; `--runs` is a file
that `builtin_plans.py --json` has written, and nothing of it is run again. What it lacks is left empty.

Exit status 1 where something is wrong that the page does not explain (`KNOWN` in benchmarks/every/known.py).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from builtin_plans import runs_in
from causal.cases import types
from causal.children import Answer
from causal.every_type import answers_of, read, write
from every.judge import judged
from every.known import unexplained
from every.page import COLUMNS, line_of, page
from every.rows import ROWS, Judged, Row, judged_from

PAGE = Path(__file__).resolve().parents[1] / "docs" / "every_model.md"
SECONDS = 300.0  # for one type; a rank that hangs is ended long before


def all_judged(
    kinds: Sequence[str],
    rows: Sequence[Row],
    *,
    jobs: int = 1,
    known: Mapping[str, Judged] | None = None,
    into: Path | None = None,
) -> list[Judged]:
    """Every type judged, in their order.

    `known` are types that were judged before; `into` is a file for all that was found, written after each type.
    """
    found = {kind: judged for kind, judged in (known or {}).items() if kind in kinds}
    left = [kind for kind in kinds if kind not in found]

    def judge(kind: str) -> Judged:
        return judged(kind, rows)

    for kind, answer in answers_of(judge, left, jobs=jobs, seconds=SECONDS, told=_told):
        found[kind] = _judged(kind, answer)
        if into is not None:
            write(into, found)
    return [found[kind] for kind in kinds]


def _judged(kind: str, answer: Answer) -> Judged:
    return Judged(kind=kind, problem=answer.problem) if answer.problem is not None else answer.value


def _told(kind: str, answer: Answer) -> str:
    return " | ".join(line_of(_judged(kind, answer), {})[1:])


def judged_in(path: Path | None) -> dict[str, Judged]:
    """Type -> what was found, of what `--json` has written before."""
    return {kind: judged_from(each) for kind, each in read(path).items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", choices=types(), metavar="TYPE", help="these alone; writes no page")
    names = {str(row): row for row in ROWS}
    parser.add_argument("--rows", nargs="+", choices=names, metavar="ROW", help=f"of {', '.join(names)}; no page")
    parser.add_argument("--json", type=Path, help="where to write all that was found")
    parser.add_argument("--known", type=Path, help="a file of --json, or the same: its types are not judged again")
    parser.add_argument("--runs", type=Path, help="what builtin_plans.py --json has written")
    parser.add_argument("--jobs", type=int, default=2, help="types at once; each runs on up to four ranks")
    arguments = parser.parse_args()
    started = time.monotonic()
    rows = [names[name] for name in arguments.rows] if arguments.rows else ROWS
    known = judged_in(arguments.known)
    found = all_judged(arguments.types or types(), rows, jobs=arguments.jobs, known=known, into=arguments.json)
    runs = runs_in(arguments.runs)
    if arguments.types or arguments.rows:
        print("\n".join(" | ".join(cells) for cells in (COLUMNS, *(line_of(each, runs) for each in found))))
    else:
        PAGE.write_text(page(found, runs), encoding="utf-8")
    print(f"{len(found)} types in {time.monotonic() - started:.0f} s", file=sys.stderr)
    return 1 if any(unexplained(each) for each in found) else 0


if __name__ == "__main__":
    sys.exit(main())
