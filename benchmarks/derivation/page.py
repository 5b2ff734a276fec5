"""docs/derived.md out of what was found: how many types have a plan derived, how much it splits, and why not all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import transformers
from causal.compare import RIGHT
from causal.tables import cut, table, wildcarded_words, wrapped

from derivation.judge import NONE, SOUND, WRONG, Judged, is_as_good

NOTICE = "<!-- Written by `python benchmarks/derived.py`; edit benchmarks/derivation/page.py, not this page. -->"
MOST = 0.9
INTRODUCTION = (
    "For every type of model that `AutoModelForCausalLM` of transformers builds, a plan is derived from a small config "
    "of the type, as [deriving.md](deriving.md) tells, without a look at the one that is bundled with this package. "
    "`derived` is what the verifier says of it; `on ranks` what two gloo ranks make of it, held against one process as "
    "[every_model.md](every_model.md) is. `split` is the share of the bytes of the layers' parameters that is split "
    "over two ranks at the type's own size, for which the plan was not derived; `collectives` are those of a training "
    "step of the small model, forward and backward. Beside both stands what the bundled plan has. The last column has "
    "the largest parameter that the bundled plan splits and the derived one does not, and the reason.",
)
COLUMNS = ("type", "derived", "on ranks", "split", "bundled", "collectives", "bundled", "what stays whole, and why")


def page(found: Sequence[Judged], without: Sequence[tuple[str, str]]) -> str:
    """The whole page; `without` are types that do not run in one process, and why."""
    versions = {"transformers": transformers.__version__, "torch": torch.__version__.partition("+")[0]}
    head = ", ".join(f"{name} {version}" for name, version in versions.items())
    parts = ["# Derived plans", NOTICE, f"{head}.", *map(wrapped, INTRODUCTION)]
    parts += ["## In numbers", table(("types", ""), _numbers(found))]
    parts += ["## Every type", table(COLUMNS, map(line_of, found))]
    parts += ["## Not judged", table(("type", "what happens in one process"), without)]
    return "\n\n".join(parts) + "\n"


def line_of(each: Judged) -> tuple[str, ...]:
    """The cells of a type."""
    derived = each.outcome if not each.told else f"{each.outcome}: {cut(wildcarded_words(each.told))}"
    return (
        each.kind,
        derived,
        cut(wildcarded_words(each.ranks)),
        _percent(each.share),
        _percent(each.bundled_share),
        _both(each.collectives),
        _both(each.bundled_collectives),
        cut(each.whole),
    )


def _percent(share: float | None) -> str:
    return "does not fit" if share is None else f"{share:.0%}"


def _both(counts: tuple[int, int] | None) -> str:
    return "" if counts is None else " + ".join(map(str, counts))


def _numbers(found: Sequence[Judged]) -> Iterator[tuple[str, str]]:
    """The totals."""

    def count(test: Callable[[Judged], bool]) -> str:
        return str(sum(map(test, found)))

    yield "that run in one process", str(len(found))
    yield "with a derived plan that is sound", count(lambda each: each.outcome == SOUND)
    yield "with one that is wrong", count(lambda each: each.outcome == WRONG)
    yield "with none", count(lambda each: each.outcome == NONE)
    if any(each.ranks for each in found):
        yield "right on two ranks", count(lambda each: each.ranks == RIGHT)
    yield "whose plan fits the type's own size", count(lambda each: each.share is not None)
    yield f"with {MOST:.0%} of the layers' bytes split", count(lambda each: (each.share or 0) >= MOST)
    yield "that split what the bundled plan does, with no more collectives", count(is_as_good)
    yield "with nothing in the layers split", count(lambda each: not each.share)
