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
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from causal.cases import types
from causal.children import Answer
from causal.compare import RIGHT
from causal.every_type import answers_of, read, write
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
    left = [kind for kind in kinds if kind not in found]

    def judge(kind: str) -> Judged:
        return judged(kind, with_ranks)

    for kind, answer in answers_of(judge, left, jobs=jobs, seconds=seconds, told=_told):
        found[kind] = _judged(kind, answer)
        if into is not None:
            write(into, found)
    return [found[kind] for kind in kinds]


def _judged(kind: str, answer: Answer) -> Judged:
    problem = Judged(kind=kind, outcome=NONE, told=f"{FAILED}{answer.problem}")
    return problem if answer.problem is not None else answer.value


def _told(kind: str, answer: Answer) -> str:
    return " | ".join(line_of(_judged(kind, answer))[1:])


def judged_in(path: Path | None) -> dict[str, Judged]:
    """Type -> what was found, of what `--json` has written before."""
    return {kind: judged_from(each) for kind, each in read(path).items()}


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
