"""How many wrong plans `verify_plan` refuses, and how many right ones it passes, beside transformers' own verifier.

python benchmarks/mutations.py [--types llama,mixtral] [--rows tp2,tp2-ep2] [--kinds drop] [--limit 8] [--log FILE]

Every bundled plan is broken in every way in which people break plans, and changed in ways that keep it right
(`tests/mutants/`). What is true of each mutant is found out by real ranks (gloo, on the CPU) that load it from a
checkpoint, run, train, write and save, against one process, in float64. Nothing of the verifier takes part in that.

    mutants   all of them, by what was done
    refused   ranks would not load it at all: caught before anything is run
    wrong     it loads, and something that real ranks make of it is wrong; `missed` are those that pass
    named     of those refused or caught: how many have a finding that names the rule that was changed, or its module;
              `first` where the first finding does; `block` where one names something in the same block
    right     real ranks make of it what one process makes; `alarms` are those that are called wrong
    theirs    transformers' own verifier: of those refused or wrong, how many it warns of; of those right, how many.
              A warning counts where it differs from the one about the right plan, of which it warns too.

Exit status 1 where a wrong plan passes or a right one is refused.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
import transformers
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from mutants.mutant import Mutant
from mutants.pool import Pool
from mutants.results import Log, figures, page_of, summary, table_of, told_of
from mutants.trial import Bench, Record, key_of
from mutants.truth import ROWS, Outcome
from tiny import DENSE_TYPES, MOE_TYPES

PAGE = Path(__file__).resolve().parents[1] / "docs" / "mutations.md"
ABOUT = """\
A verifier is worth what it finds. Every bundled plan is broken in every way in which people break plans, and changed in
ways that keep it right. What is true of each mutant is found out by real ranks (gloo, on the CPU) that load a tiny
model from a checkpoint, run, train, write and save, in float64, against one process. Then `verify_plan` is asked.

- refused: ranks would not load it at all; wrong: it loads, and something real ranks make of it is wrong; missed: of
  those, the ones that pass
- named: of those refused or caught, the share with a finding about the rule that was changed, or its module; first:
  where the first finding is; block: where one is about something in the same block
- right: real ranks make of it what one process makes; alarms: of those, the ones that are called wrong
- theirs: transformers' own `verify_tp_plan`, a matcher of names, on the mutants that can be said in a plan of theirs:
  of those refused or wrong how many it warns of, and of those right. It warns of every plan, so only a warning counts
  that differs from the one about the right plan."""
DEFAULT_ROWS = ("tp2", "tp2-ep2", "tp1-ep2", "tp2-sp")
WIDTH = 150  # characters, where the output is no terminal


def chosen(mutants: Iterable[Mutant], arguments: argparse.Namespace) -> list[Mutant]:
    """The mutants of the kinds asked for, of each at most so many, drawn by the seed."""
    kinds: dict[str, list[Mutant]] = {}
    for mutant in mutants:
        if not arguments.kinds or mutant.kind in arguments.kinds:
            kinds.setdefault(mutant.kind, []).append(mutant)
    draw = random.Random(arguments.seed)
    limit = arguments.limit
    picked = (draw.sample(each, limit) if limit and len(each) > limit else each for each in kinds.values())
    return [mutant for each in picked for mutant in each]


def run(arguments: argparse.Namespace, log: Log, tell: Callable[[str], None]) -> Iterator[Record]:
    """A record for every mutant of every type on every row that its plan has a section for."""
    for name in arguments.rows:
        with Pool(ROWS[name].world) as pool:
            for model_type in arguments.types:
                start = time.monotonic()
                with Bench(model_type, tied=arguments.tied) as bench:
                    records = list(of_type(bench, name, pool, arguments, log, tell))
                yield from records
                tell(f"{model_type} {name}: {len(records)} mutants in {time.monotonic() - start:.0f} s")


def of_type(
    bench: Bench, row: str, pool: Pool, arguments: argparse.Namespace, log: Log, tell: Callable[[str], None]
) -> Iterator[Record]:
    """The records of one type on one row, out of the log where it has them."""
    name = f"{bench.model.model_type}{' tied' if arguments.tied else ''}"
    logged = log.of(name, row)
    truths = {key: Outcome(**each["truth"]) for key, each in logged.items() if each["truth"]}
    every = (mutant for mutant in bench.mutants(ROWS[row]) if not arguments.logged or key_of(mutant.text) in logged)
    mutants = chosen(every, arguments)
    if not arguments.again:
        yield from (logged[key] for mutant in mutants if (key := key_of(mutant.text)) in logged)
        mutants = [mutant for mutant in mutants if key_of(mutant.text) not in logged]
    for trial in bench.trials(mutants, ROWS[row], pool, truths):
        record = {"type": name, "row": row, **trial.record()}
        log.add(record)
        if record["result"] in ("missed", "false alarm"):
            tell(told_of(record))
        yield record


def _listed(known: Sequence[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        names = text.split(",")
        if unknown := set(names) - set(known):
            raise argparse.ArgumentTypeError(f"no such: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
        return names

    return parse


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = (*DENSE_TYPES, *MOE_TYPES)
    parser.add_argument(
        "--types", type=_listed(every), default=list(every), help="of the bundled plans; all by default"
    )
    parser.add_argument("--rows", type=_listed(tuple(ROWS)), default=list(DEFAULT_ROWS), help=", ".join(ROWS))
    parser.add_argument("--kinds", type=lambda text: text.split(","), help="of mutants, as the table calls them")
    parser.add_argument("--limit", type=int, help="mutants of each kind, for each type and row")
    parser.add_argument("--seed", type=int, default=0, help="by which those are drawn")
    parser.add_argument("--tied", action="store_true", help="models with their head tied to the embedding")
    parser.add_argument("--log", metavar="FILE", help="where trials are kept; those in it are not made again")
    parser.add_argument("--again", action="store_true", help="new verdicts on what the log has, and its truths")
    parser.add_argument("--logged", action="store_true", help="nothing but what the log has")
    parser.add_argument("--write", action="store_true", help="write docs/mutations.md")
    parser.add_argument("--json", metavar="FILE", help="write the results there as well")
    return parser.parse_args()


def _without_log(given: Sequence[str]) -> list[str]:
    """The arguments that say what was asked, without those that say where it is kept and what is made again."""
    places = {at + shift for at, each in enumerate(given) if each in ("--log", "--json") for shift in (0, 1)}
    told = [each for at, each in enumerate(given) if at not in places]
    return [each for each in told if each not in ("--write", "--again", "--logged")]


def main() -> None:
    arguments = parsed()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    records = list(run(arguments, Log(arguments.log), lambda line: print(line, file=sys.stderr, flush=True)))
    console = Console(highlight=False)
    console.width = max(console.width, WIDTH)
    for by in ("kind", "type", "row"):
        console.print(table_of(records, by))
    console.print(figures(records), soft_wrap=True)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({"all": summary(records), "trials": records}, indent=1) + "\n")
    if arguments.write:
        shown = _without_log(sys.argv[1:])
        PAGE.write_text(page_of(records, ABOUT, " ".join(["python benchmarks/mutations.py", *shown])))
    raise SystemExit(any(each["result"] in ("missed", "false alarm") for each in records))


if __name__ == "__main__":
    main()
