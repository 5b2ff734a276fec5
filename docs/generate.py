"""Writes what the docs take from the code: styles, errors, the table of transitions, the file map.

python docs/generate.py            writes them
python docs/generate.py --check    writes nothing; says what differs, and exits 1 where something does
"""

from __future__ import annotations

import argparse
import ast
import difflib
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path

from parallel_plans import transitions as letters
from parallel_plans.errors import CODES
from parallel_plans.loader import UNIVERSAL_OPTIONS
from parallel_plans.styles import Style, styles
from parallel_plans.styles.base import ENTRY_POINTS

ROOT = Path(__file__).resolve().parents[1]
WIDTH = 120
NOTICE = "<!-- Written by `make docs` from the code; edit docs/generate.py or the code, not this page. -->"
MAPPED = ("src/parallel_plans", "docs", "examples")
EXAMPLES = ("tests/bad_plans", "tests/bad_plans_for_model", "tests/plans_for_verifier")

LETTERS = (
    ("I", "invariant: the same value on every rank, and every rank does the same with it", "I"),
    ("R", "replicated: the same value on every rank, used differently by each", "P"),
    ("S(d)", "sharded: every rank holds its part of dim d", "S(d)"),
    ("P", "partial: the value is the sum over the ranks", "R"),
)
KINDS = {
    "PP0": ("The plan file", "`PlanError`. The plan is wrong by itself; no model is needed to see it."),
    "PP1": (
        "The plan against a model",
        "`PlanError`. PP115 to PP119 are warnings, which `verify_plan` reports.",
    ),
    "PP2": (
        "Shapes",
        "`PlanError`. The plan names what is there, and it cannot be cut that way. PP207 and PP208 are warnings, which "
        "`verify_plan` reports.",
    ),
    "PP3": ("How values lie on the ranks", "None: `verify_plan` reports them. PP306 is a warning."),
    "PP4": (
        "What the model computes",
        "`verify_plan` reports them. PP408 and PP409 are a `PlanError` of a model's first forwards too.",
    ),
    "PP6": ("Checkpoints", "`CheckpointError`."),
    "PP7": ("Launching", "`LaunchError`; for a folder that holds an adapter, PP703 is a `CheckpointError`."),
    "PP8": ("Plans for other frameworks", "`PlanError`, of `parallel-plans export`."),
}


@dataclass(frozen=True)
class Change:
    """A value that changes its letter at a boundary: which value, before, after.

    `runs` is what that runs forward and backward, where no transition between two letters says so.
    """

    of: str
    before: str = ""
    after: str = ""
    runs: tuple[str, str] | None = None


SENT = ("all-to-all", "all-to-all")
# A boundary of its own may do what the letters of its row cannot say. This table is total over such boundaries; None
# stands for those whose letters say it all.
OWN_CHANGES: dict[str, tuple[Change, ...] | None] = {
    "VocabularyBoundary": (Change("output", "P", "I"),),
    "RopePartBoundary": (Change("rope part of the output", "I", "R"),),
    "IdentityExpertBoundary": (),
    "BlockBoundary": None,
    "RouterBoundary": (Change("routing weights", "I", "R"),),
    "ExpertsBoundary": (Change("each floating-point argument", "I", "R"), Change("output", "P", "I")),
    "DispatchBoundary": (
        Change("numbers of rows", runs=("all-to-all", "nothing")),
        Change("rows there", runs=SENT),
        Change("rows back", runs=SENT),
        Change("inputs that ranks share", "I", "S(0)"),
        Change("output that ranks share", "S(0)", "I"),
    ),
    "ShardedNormBoundary": (Change("each mean", "P", "R"),),
    "ShardedStatisticsBoundary": (Change("each mean", "P", "R"),),
    "InputsBoundary": (Change("each input that it names", "I", "S(0)"),),
    "WholeInsideBoundary": (Change("each input that it names", "S(1)", "I"), Change("output", "I", "S(1)")),
    "BuffersBoundary": (),
    "DrawsBoundary": (),
    "SplitBoundary": (Change("input", "P", "S(1)"),),
    "WholeBoundary": (Change("input", "S(1)", "R"), Change("output", "P", "S(1)")),
    "JoinBoundary": (Change("output", "S(1)", "R"),),
}


class CannotWrite(Exception):
    """The code or a page lacks what is needed."""


def transitions() -> dict[tuple[str, str], tuple[str, str]]:
    """(letter before, letter after) -> what runs forward and backward, from the table in the docstring."""
    rows = re.findall(r"^    (\S+) -> (\S+) {2,}(\S.*?) {2,}(\S.*)$", letters.__doc__ or "", re.MULTILINE)
    table = {(before[0], after[0]): (forward, backward) for before, after, forward, backward in rows}
    if set(table) != set(letters.TRANSITIONS):
        raise CannotWrite(f"transitions.py documents {sorted(table)}, TRANSITIONS has {sorted(letters.TRANSITIONS)}")
    return table


def exchanged() -> tuple[str, str]:
    """What `exchange` runs forward and backward, from the same docstring."""
    row = re.search(r"^    exchange {2,}(\S.*?) {2,}(\S.*?)(?:,.*)?$", letters.__doc__ or "", re.MULTILINE)
    if row is None or row.groups() != SENT:
        raise CannotWrite(f"transitions.py says that exchange runs {row and row.groups()}, not {SENT}")
    return SENT


def own_styles() -> list[tuple[Style, tuple[str, ...]]]:
    """The styles of this package with their aliases, without what other installed packages add."""
    added = {entry.load().name for entry in entry_points(group=ENTRY_POINTS)}
    return [(style, aliases) for style, aliases in styles() if style.name not in added]


def table_of(header: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |"]
    lines.append("|" + "---|" * (lines[0].count(" | ") + 1))
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def code(text: str) -> str:
    return f"`{text}`"


def splits(style: Style) -> str:
    """What the style splits, in the notation of the letters."""
    once = {"R": "gradients summed", "P": "added by one rank alone"}.get(style.whole_as)
    if not style.shards:
        return f"nothing; {once}" if once else "nothing"
    if style.matrix == style.vector:
        text = f"parameters S({style.matrix})"
    else:
        name = "parameter" if style.parameter_only else "weight"
        text = f"{name} S({style.matrix})"
        text += "" if style.vector is None else f", bias S({style.vector})"
    text += f"; {' and '.join(style.after)} whole, added last" if style.after else ""
    text += f"; bias whole, {once}" if once else ""
    parts = style.defaults.get("parts")
    return text if parts is None else f"{text}; {parts} parts, each on its own"


def stands_on(style: Style) -> str:
    if style.parameter_only:
        return f"parameters of {' or '.join(map(str, style.ndims))} dims" if style.ndims else "parameters"
    if style.serves:
        return " or ".join("modules that are no layers" if kind == "other" else kind for kind in style.serves)
    return "modules" if style.module_only else "anything"


def sections(style: Style) -> str:
    return ", ".join(section.removesuffix("_plan") for section in style.sections)


def move(before: str, after: str) -> str:
    return before if before == after else f"{before} -> {after}"


def options(style: Style) -> str:
    return ", ".join(map(code, style.options)) or "-"


def changes(style: Style) -> list[Change]:
    """Every value that changes its letter where the style stands."""
    found: list[Change] = []
    own: tuple[Change, ...] | None = None
    if style.boundary is not None and not style.parameter_only:
        if style.boundary.__name__ not in OWN_CHANGES:
            raise CannotWrite(f"docs/generate.py does not say what {style.boundary.__name__} runs")
        own = OWN_CHANGES[style.boundary.__name__]
    if own is not None:
        found += own
    elif style.acts_on_forward:
        found += [
            Change(of, before, after)
            for of, before, after in (
                ("input", style.arrives, style.needs),
                ("output", style.leaves, style.delivers),
            )
            if before != after
        ]
    if style.whole_as == "R":
        found.append(Change("each parameter", "I", "R"))
    return found


def costs(style: Style) -> tuple[str, str, str]:
    """What changes its letter, and what that runs forward and backward; `-` for nothing."""
    known = transitions()
    told, forward, backward = [], [], []
    for change in changes(style):
        told.append(change.of if change.runs else f"{change.of}: {move(change.before, change.after)}")
        ahead, back = change.runs or known[change.before[0], change.after[0]]
        forward += [f"{ahead} ({change.of})"] if ahead != "nothing" else []
        backward += [f"{back} ({change.of})"] if back != "nothing" else []
    return tuple(", ".join(cell) or "-" for cell in (told, forward, backward))  # type: ignore[return-value]


def paragraph(text: str) -> list[str]:
    return [*textwrap.wrap(" ".join(text.split()), WIDTH, break_long_words=False, break_on_hyphens=False), ""]


def styles_page() -> str:
    rows = own_styles()
    lines = ["# The styles", "", NOTICE, ""]
    lines += paragraph(
        """A style says what a parameter becomes on the ranks of one mesh axis, and what runs where its module begins
        and ends. `arrives -> needs` is the letter of the module's first tensor as it comes and as the module wants it;
        `leaves -> delivers` is the letter of its output as computed and as handed on. One letter means no change."""
    )
    lines += [*table_of(("letter", "how a value lies on the axis", "its gradient"), LETTERS), ""]
    lines += paragraph(
        """S(-2) are the rows of a linear weight `[out, in]`, S(-1) its columns, or the features of an activation.
        "Parts" are projections fused into one weight. In weights that stack experts, dim 0 counts these, and the
        letters mean the dims behind it. "In" are the sections of a plan where a style can stand.
        [concepts.md](concepts.md) draws all this with numbers, [mixtures.md](mixtures.md) for experts."""
    )
    header = (
        "style",
        "aliases",
        "in",
        "stands on",
        "splits",
        "arrives -> needs",
        "leaves -> delivers",
        "options",
        "summary",
    )
    lines += table_of(
        header,
        (
            (
                code(style.name),
                ", ".join(map(code, aliases)) or "-",
                sections(style),
                stands_on(style),
                splits(style),
                "-" if style.parameter_only else move(style.arrives, style.needs),
                "-" if style.parameter_only else move(style.leaves, style.delivers),
                options(style),
                style.summary,
            )
            for style, aliases in rows
        ),
    )
    universal = " and ".join(map(code, UNIVERSAL_OPTIONS))
    lines += ["", *paragraph(f"Every style takes {universal}. What options hold is said in [SPEC](../plans/SPEC.md).")]
    lines += ["## What a style costs", ""]
    lines += paragraph(
        """Collectives of one forward and one backward of a module, on the style's axis. An all-reduce of an input's or
        a parameter's gradient runs only where that gradient is asked for. Taking one's own
        slice sends nothing. Styles that are not listed run none. Modules that take the same value share what its
        gradient costs, a router shares with its experts, and sums of a mixture may be reduced together:
        [mixtures.md](mixtures.md#what-is-reduced-when)."""
    )
    priced = [(code(style.name), *costs(style)) for style, _ in rows if changes(style)]
    lines += table_of(("style", "what changes its letter", "forward", "backward"), priced)
    return "\n".join(lines) + "\n"


def findings(text: str) -> Iterator[str]:
    """The messages in a pinned text, one by one: each begins at a line that is not indented."""
    yield from (found.rstrip() for found in re.split(r"^(?=\S)", text, flags=re.MULTILINE) if found.strip())


def example(wanted: str, folders: Iterable[str] = EXAMPLES) -> str | None:
    """The first pinned message with the code, by folder and then by file name; None where there is none."""
    for folder in folders:
        for path in sorted((ROOT / folder).glob("*.txt")):
            for message in findings(path.read_text(encoding="ascii")):
                if message.partition("\n")[0].endswith(f"[{wanted}]"):
                    return message
    return None


def errors_page() -> str:
    lines = ["# The errors", "", NOTICE, ""]
    lines += paragraph(
        """Every error that this package raises on purpose carries one or more findings, each with a code from this
        list. `error.findings` holds them; `str(error)` is all of them as text. Mistakes of a plan are told all at once,
        in the order of the file; those that differ in a layer's number alone are told once. A message has the place,
        what is wrong and the code; below it, where known, the rule, what it is `on` (a parameter with its shape, or a
        module), what was expected, and a fix."""
    )
    for prefix in dict.fromkeys(name[:3] for name in CODES):
        if prefix not in KINDS:
            raise CannotWrite(f"docs/generate.py has no title for codes that begin with {prefix}")
        title, raised = KINDS[prefix]
        lines += [f"## {title} ({prefix}xx)", "", *paragraph(raised)]
        for name, meaning in CODES.items():
            if name.startswith(prefix):
                lines += [f"### {name}", "", *paragraph(f"{meaning[0].upper()}{meaning[1:]}.")]
                shown = example(name)
                lines += [] if shown is None else ["```text", shown, "```", ""]
    return "\n".join(lines)


def summary_of(path: Path) -> str:
    """The first sentence of a module's docstring."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    if not docstring:
        raise CannotWrite(f"{path.relative_to(ROOT)} has no docstring")
    first = " ".join(docstring.partition("\n\n")[0].split())
    sentence = re.split(r"(?<=[.;]) (?=[A-Z])", first)[0]
    return sentence.rstrip(":.") + "."


def file_map() -> str:
    """The modules as a list, folder by folder; a package's own line is its `__init__`'s."""
    lines = []
    for folder in MAPPED:
        for path in sorted((ROOT / folder).rglob("*.py"), key=lambda path: (path.parent, path.name)):
            name = path.relative_to(ROOT).as_posix().removesuffix("__init__.py")
            lines += textwrap.wrap(
                f"- `{name}`: {summary_of(path)}",
                WIDTH,
                subsequent_indent="  ",
                break_long_words=False,
                break_on_hyphens=False,
            )
    return "\n".join(lines)


def transitions_table() -> str:
    """Every transition with its backward."""
    with_dim = {"I": "I", "R": "R", "P": "P", "S": "S(d)"}
    rows = [(f"{with_dim[before]} -> {with_dim[after]}", *runs) for (before, after), runs in transitions().items()]
    rows.append(("S(0) -> S(0), rows to other ranks", *exchanged()))
    return "\n".join(table_of(("transition", "forward", "backward"), rows))


def between_marks(name: str, what: str, content: str) -> str:
    """The page `name` with `content` between its marks for `what`."""
    start, end = f"<!-- {what}: written by `make docs` -->", f"<!-- end of {what} -->"
    head, opening, rest = (ROOT / name).read_text(encoding="utf-8").partition(start)
    _, closing, tail = rest.partition(end)
    if not (opening and closing):
        raise CannotWrite(f"{name} lacks {end if opening else start}")
    return f"{head}{start}\n\n{content}\n\n{end}{tail}"


PAGES: dict[str, Callable[[], str]] = {
    "docs/styles.md": styles_page,
    "docs/errors.md": errors_page,
    "docs/concepts.md": lambda: between_marks("docs/concepts.md", "transitions", transitions_table()),
    "CONTRIBUTING.md": lambda: between_marks("CONTRIBUTING.md", "files", file_map()),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where a page is not up to date")
    is_check = parser.parse_args().check
    differs = False
    for name, page in PAGES.items():
        path = ROOT / name
        new = page()
        old = path.read_text(encoding="utf-8") if path.exists() else ""
        if old == new:
            continue
        differs = True
        if is_check:
            lines = difflib.unified_diff(
                old.splitlines(), new.splitlines(), name, f"{name} as it should be", "", "", 1, ""
            )
            print("\n".join(lines))
        else:
            path.write_text(new, encoding="utf-8")
            print(f"{name} written")
    if is_check and differs:
        raise SystemExit("run `make docs`")


if __name__ == "__main__":
    try:
        main()
    except CannotWrite as error:
        raise SystemExit(str(error)) from None
