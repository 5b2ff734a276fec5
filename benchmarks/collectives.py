"""Collectives and bytes of a layer of every type that has a plan, beside transformers' own parallelism.

python benchmarks/collectives.py [--types TYPE ...] [--json FILE] [--known FILE] [--jobs N] [--write]

Counts, never seconds. Every type with a bundled plan is made small; two ranks (gloo, on the CPU) load the same random
checkpoint with this project and with transformers, `tp = 2`, and with experts dealt over the ranks where there is a
plan for that, and run the same tokens without gradients, forward and backward. What both start is counted by one
instrument outside of either. A model with every layer twice less the model is its layers; divided by how many there
are, a layer, the mean over its kinds.

Where transformers' loss or gradients are not those of one process, nothing is compared. All types take a quarter of an
hour on two cores. `--write` writes docs/collectives.md. With `--json FILE --known FILE`, whoever was interrupted starts
it again: what the file holds is not counted again.

What mixtures do on other meshes is counted by `moe_collectives.py`. Exit status 1 where this project says more than
transformers, or could not be counted, and the page does not say why (`WHY` in benchmarks/per_layer/why.py).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from causal.children import Answer
from causal.every_type import answers_of, read, write
from per_layer.compare import unexplained
from per_layer.judge import judged
from per_layer.page import line_of, page
from per_layer.sides import Judged, judged_from

from parallel_plans.lookup import bundled_folder

PAGE = Path(__file__).resolve().parents[1] / "docs" / "collectives.md"
SECONDS = 300.0  # for one type; a rank that hangs is ended long before


def types() -> list[str]:
    """The types that have a bundled plan."""
    return sorted(path.stem for path in bundled_folder().glob("*.yaml"))


def all_judged(
    kinds: Sequence[str], *, jobs: int = 1, known: dict[str, Judged] | None = None, into: Path | None = None
) -> list[Judged]:
    """Every type counted, in their order; `known` were before, `into` is a file for all, written after each."""
    found = {kind: each for kind, each in (known or {}).items() if kind in kinds}
    left = [kind for kind in kinds if kind not in found]
    for kind, answer in answers_of(judged, left, jobs=jobs, seconds=SECONDS, told=_told):
        found[kind] = _judged(kind, answer)
        if into is not None:
            write(into, found)
    return [found[kind] for kind in kinds]


def _judged(kind: str, answer: Answer) -> Judged:
    return answer.value if answer.problem is None else Judged(kind=kind, problem=answer.problem)


def _told(kind: str, answer: Answer) -> str:
    return " | ".join(line_of(_judged(kind, answer))[1:])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", choices=types(), metavar="TYPE", help="these alone; writes no page")
    parser.add_argument("--json", type=Path, help="where to write all that was counted")
    parser.add_argument("--known", type=Path, help="a file of --json, or the same: its types are not counted again")
    parser.add_argument("--jobs", type=int, default=1, help="types at once; each runs on two ranks")
    parser.add_argument("--write", action="store_true", help="write docs/collectives.md")
    arguments = parser.parse_args()
    if arguments.write and arguments.types:
        parser.error("the page is about all types: --write without --types")
    torch.set_num_threads(1)  # ranks are forked from this process
    known = {kind: judged_from(each) for kind, each in read(arguments.known).items()}
    found = all_judged(arguments.types or types(), jobs=arguments.jobs, known=known, into=arguments.json)
    written = page(found)
    if arguments.write:
        PAGE.write_text(written, encoding="utf-8")
    else:
        print(written, end="")
    return 1 if any(unexplained(each) for each in found) else 0


if __name__ == "__main__":
    sys.exit(main())
