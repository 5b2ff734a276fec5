"""Which rules may be to blame for a wrong value: those near it, the likeliest first."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from parallel_plans.matching import Assignment, assign
from parallel_plans.plan import Rule
from parallel_plans.sum_rules import layer_of
from parallel_plans.table import Table, wildcarded
from parallel_plans.verify.compare import (
    FORWARD,
    GRADIENTS,
    Run,
    first_wrong,
    letter_at,
    parts_of,
    reached,
    wrong_gradients,
    wrong_weights,
)
from parallel_plans.verify.diagnose import letter_of
from parallel_plans.verify.signs import signs_of

MOST = 14  # suspects that are looked at
NEXT = 4  # modules that come next after a wrong gradient, and may have made it wrong


@dataclass(frozen=True, kw_only=True)
class Suspect:
    """A module or a parameter, the section in which its rule stands, and the rule; None where it has none there."""

    name: str
    section: str
    rule: Rule | None


class Rules:
    """The rules of a plan on a model, by section."""

    def __init__(self, table: Table) -> None:
        self.table = table
        spec = table.spec
        sections = {"tp_plan": None, **{use.rule.section: None for e in table.parameters.values() for use in e.uses}}
        sections |= {entry.rule.section: None for _, entry in table.acting()}
        self.by_section: Mapping[str, Assignment] = {
            section: assign(table.plan.rules(section), list(spec.parameters), list(spec.modules))
            for section in sections
        }

    def of(self, module: str) -> Iterator[Suspect]:
        """The rules on a module and on its own parameters, each once, in every section; the module without, too."""
        info = self.table.spec.modules.get(module)
        if info is None or not module:
            return
        for section, assignment in self.by_section.items():
            on_module = assignment.modules.get(module)
            own = {name: rule for name in info.parameters if (rule := assignment.parameters.get(name)) is not None}
            for name, rule in own.items():
                if rule is not on_module:
                    yield Suspect(name=name, section=section, rule=rule)
            yield Suspect(name=module, section=section, rule=on_module)

    def at(self, name: str) -> Rule | None:
        """The rule on a module or parameter, on a parameter of its own, or else on what lies around it."""
        return rule_at(self.table, name)


def rule_at(table: Table, name: str) -> Rule | None:
    """The rule on a module or parameter, on a parameter of its own, or else on what lies around it."""
    while True:
        if name in table.modules:
            return table.modules[name][0].rule
        if name in table.parameters:
            return table.parameters[name].rule
        info = table.spec.modules.get(name)
        own = [table.parameters[each] for each in (() if info is None else info.parameters)]
        if own:
            return own[0].rule
        if not name:
            return None
        name = name.rpartition(".")[0]


def suspects(run: Run) -> list[Suspect]:
    """The rules that may be to blame, the likeliest first, each once."""
    assert run.table is not None
    rules = Rules(run.table)
    found: dict[tuple[str, str], Suspect] = {}
    likely = {wildcarded(sign.owner): sign.owner for sign in reversed(signs_of(run.table))}
    for module in (*reversed(likely.values()), *_with_uncalled(run, run.table, _modules(run))):
        for suspect in rules.of(module):
            about = suspect.name if suspect.rule is None or "**" in suspect.rule.pattern else suspect.rule.pattern
            found.setdefault((about, suspect.section), suspect)
    partial = _with_partial_sums(run)
    first = [suspect for name in partial for suspect in found.values() if suspect.name == name]
    ruled = [suspect for suspect in found.values() if suspect.rule is not None and suspect not in first]
    unruled = [suspect for suspect in found.values() if suspect.rule is None and suspect not in first]
    return [*first, *ruled[:MOST], *unruled[:MOST]]


def _with_uncalled(run: Run, table: Table, modules: Iterable[str]) -> Iterator[str]:
    """The modules, each followed by those in it that are never called: their parameters are used from outside."""
    called = {name for name, _ in run.truths[0].values}
    for module in modules:
        yield module
        yield from (name for name in table.spec.modules if _block(name) == module and name not in called)


def _with_partial_sums(run: Run) -> list[str]:
    """The modules that gave parts of a sum just before a value was wrong: somebody forgot to add them up."""
    right, event = first_wrong(run)
    events = list(run.truths[0].values)
    given = [each for each in events[:right] if each[1] == "delivers"] if event is not None else []
    last: list[str] = []
    for each in reversed(given):
        if letter_at(run, each) != "P":
            break
        last.insert(0, each[0])
    return last


def _modules(run: Run) -> Iterable[str]:
    stage = reached(run)[0]
    if stage == FORWARD:
        return _before_wrong(run)
    if stage == GRADIENTS and run.failure is None:
        return _around_gradients(run)
    wrong = wrong_weights(run) if run.failure is None else {}
    return [*(name.rpartition(".")[0] for name in wrong), *reversed(_in_order(run))]


def _in_order(run: Run) -> list[str]:
    """The modules in the order in which they gave something."""
    return [name for name, what in run.truths[0].values if what == "delivers" and name]


def _block(name: str) -> str:
    """What stands around a module or parameter."""
    return name.rpartition(".")[0]


def _before_wrong(run: Run) -> list[str]:
    """The module at whose value the ranks went wrong; what ran before it, the latest first; what stands beside it."""
    right, event = first_wrong(run)
    events = list(run.truths[0].values)
    early = _first_unlike_row(run, right)
    if early is not None:
        right, event = early, events[early]
    running = next((each.running[-1] for each in run.seen if each.running), None) if event is None else None
    start = running if running is not None else (event or events[min(right, len(events) - 1)])[0]
    before = [name for name, what in reversed(events[: right + 1]) if what == "delivers"]
    around = _block(start)
    beside = [name for name in _in_order(run) if name.startswith((f"{around}.", f"{start}."))]
    outer = f"{_block(around)}." if layer_of(around) != around else f"{around}."
    joined = [name for name in _in_order(run) if name.startswith(outer)]  # sums that wait are joined by later ones
    first = [start] if event is None or event[1] == "delivers" else []
    near = [name for name in before if name.startswith((f"{around}.", f"{start}."))]
    return list(dict.fromkeys([*first, *near, start, *beside, around, *joined, *before[:MOST]]))


def _first_unlike_row(run: Run, right: int) -> int | None:
    """Which of the values that are right so far is the first to come to a layer in another letter than its row says."""
    assert run.table is not None
    truth, group = next(run.groups())
    for place, (event, whole) in enumerate(truth.values.items()):
        if place == right:
            break
        name, what = event
        entries = run.table.modules.get(name, ())
        if what == "arrives" and len(entries) == 1 and entries[0].style.serves and whole.dim() > 1:
            letter, parts = entries[0].style.arrives, parts_of(event, group)
            wanted = letter if letter != "S(-1)" else f"S({whole.dim() - 1})"
            if parts is not None and letter_of(parts, whole) not in (wanted, "?"):
                return place
    return None


def _around_gradients(run: Run) -> list[str]:
    """The module of the last wrong gradient; what took its value next; what stands beside it; all other wrong ones."""
    order = _in_order(run)
    wrong = [_called(name, order) for name in wrong_gradients(run)]
    if not wrong:
        return order  # the gradient of the first value alone
    last = wrong[0]
    place = order.index(last) if last in order else 0
    beside = [name for name in order if name.startswith(f"{_block(last)}.")]
    after = [name for name in order[place + 1 : place + 2 * MOST]]
    return list(dict.fromkeys([last, *after[:NEXT], *beside, *after, *wrong]))


def _called(name: str, order: list[str]) -> str:
    """The module that keeps a parameter, or the nearest around it that is called."""
    module = _block(name)
    while module and module not in order:
        module = _block(module)
    return module
