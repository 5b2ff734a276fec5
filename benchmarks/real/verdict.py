"""What is told of a case: how many times as fast as the others, and whether all answers are those of one process."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import transformers

from .cases import ALONE, CASES, OURS, SIDES, THEIRS, Case, quick, written
from .turns import Make, Seen, run


@dataclass(frozen=True, kw_only=True)
class Row:
    """A case: the seconds of each side's turns by lap, ratios of them, and whether the answers are right."""

    model: str
    split: str
    ranks: int
    storage: str
    seconds: dict[str, dict[str, list[float]]]
    # how many times as fast as the others, by lap
    of_transformers: dict[str, float]
    of_one_process: dict[str, float]
    is_right: dict[str, bool]


def row_of(case: Case, seen: dict[str, list[Seen]], laps: Iterable[str], tolerance: float) -> Row:
    """What the ranks of a case saw, in ratios: a turn takes as long as its slowest rank."""
    slowest = {
        side: {lap: [max(turn) for turn in zip(*(rank.seconds[lap] for rank in ranks), strict=True)] for lap in laps}
        for side, ranks in seen.items()
    }
    truth = seen[ALONE][0].answers
    return Row(
        model=case.model,
        split=case.split,
        ranks=case.ranks,
        storage=case.storage,
        seconds={lap: {side: slowest[side][lap] for side in SIDES} for lap in laps},
        of_transformers={lap: _times(slowest[THEIRS][lap], slowest[OURS][lap]) for lap in laps},
        of_one_process={lap: _times(slowest[ALONE][lap], slowest[OURS][lap]) for lap in laps},
        is_right={side: all(_equal(rank.answers, truth, tolerance) for rank in seen[side]) for side in (OURS, THEIRS)},
    )


def _times(others: list[float], own: list[float]) -> float:
    """The median of the ratios of turns that followed each other: what else the machine does is much alike in both."""
    return median(other / mine for other, mine in zip(others, own, strict=True))


def _equal(found: list[list[float]], truth: list[list[float]], tolerance: float) -> bool:
    pairs = zip(found, truth, strict=True)
    return all(
        len(one) == len(other) and all(abs(a - b) <= tolerance * abs(b) for a, b in zip(one, other, strict=True))
        for one, other in pairs
    )


def markdown(rows: Iterable[Row], laps: Iterable[str]) -> str:
    """A line for each case: how many times as fast as transformers and as one process, lap by lap."""
    laps = list(laps)
    heads = ["model", "split", "ranks", "storage", *(head for lap in laps for head in (lap, "of one")), "answers"]
    lines = [heads, ["---", "---", "--:", "---", *["--:"] * (2 * len(laps)), "---"]]
    for row in rows:
        cells = [f"{ratios[lap]:.2f}" for lap in laps for ratios in (row.of_transformers, row.of_one_process)]
        wrong = [side for side, is_right in row.is_right.items() if not is_right]
        verdict = f"WRONG: {', '.join(wrong)}" if wrong else "equal"
        lines.append([row.model, row.split, str(row.ranks), row.storage, *cells, verdict])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def status_of(rows: Iterable[Row], goals: Iterable[str]) -> int:
    """1 where an answer is not right, or this project not faster than transformers in a lap of `goals`."""
    goals = tuple(goals)
    is_met = (all(row.is_right.values()) and all(row.of_transformers[lap] > 1 for lap in goals) for row in rows)
    return 0 if all(is_met) else 1


def parser_of(doc: str | None, repeats: int) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"all by default: {', '.join(CASES)}")
    parser.add_argument("--repeats", type=int, default=repeats, help="turns of each side")
    parser.add_argument("--quick", action="store_true", help="tiny random models: to see that it runs, no goals")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the results there as well")
    return parser


def told(
    arguments: argparse.Namespace, make: Make, laps: tuple[str, ...], goals: tuple[str, ...], tolerance: float
) -> int:
    """The exit status, after all cases were run and told of: 1 where a goal is missed or an answer is not right."""
    if unknown := set(arguments.cases) - set(CASES):
        raise SystemExit(f"no such case: {', '.join(sorted(unknown))}")
    transformers.utils.logging.disable_progress_bar()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.cases or CASES:
            case = written(quick(CASES[name]) if arguments.quick else CASES[name], Path(folder))
            rows.append(row_of(case, run(make, case, arguments.repeats), laps, tolerance))
            if arguments.json:
                arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")
    print(markdown(rows, laps), end="")
    return status_of(rows, () if arguments.quick else goals)
