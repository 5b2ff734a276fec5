"""What an `sp_plan` must not forget: names alone tell most of what can be wrong with it.

model.layers.0             split_sequence                     exactly once
model.layers.*.norm        sequence_parallel                  whole parameters on a part: gradients are summed
model.layers.*.self_attn   whole_sequence                     around all that is split, once
model.norm                 sequence_parallel_gather_output    where every rank gets the whole again
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from parallel_plans.accounting import Report
from parallel_plans.expert_rules import prefixes
from parallel_plans.matching import Assignment
from parallel_plans.model_spec import ModelSpec
from parallel_plans.plan import Rule
from parallel_plans.styles import get_style
from parallel_plans.sum_rules import layer_of
from parallel_plans.table import ParameterEntry, wildcarded
from parallel_plans.views import TENSOR_AXIS

SECTION = "sp_plan"


def report_sequence(
    report: Report,
    spec: ModelSpec,
    dense: Assignment,
    around: Mapping[str, Rule | None],
    parameters: Mapping[str, ParameterEntry],
) -> None:
    """Reports what is wrong with how an `sp_plan` splits the sequence.

    Args:
        report: where to.
        spec: the model.
        dense: the rules of `tp_plan` on the model's names, and those of `sp_plan` that stand in their place.
        around: those of `sp_plan` that act around these, on the model's modules.
        parameters: how they are split.
    """
    by_part: dict[str, dict[str, Rule]] = {"split": {}, "whole": {}, "join": {}}
    own = [(name, rule) for name, rule in dense.modules.items() if rule is not None and rule.section == SECTION]
    own += [(name, rule) for name, rule in around.items() if rule is not None]
    for name, rule in own:
        if (part := get_style(rule.style).sequence) is not None:
            by_part[part][name] = rule
    begins = by_part["split"]
    _report_ends(report, by_part, spec, dense)
    _report_within(report, by_part)
    if len(begins) == 1:
        body = _Body(next(iter(begins)))
        own += [(name, rule) for name, rule in dense.parameters.items() if rule is not None and rule.section == SECTION]
        is_late = _report_early(report, body, begins[body.begin], own)
        if not is_late:  # the same would be told of every parameter
            _report_parameters(report, body, by_part["whole"], parameters)


class _Body:
    """What runs on a part of the sequence: the stack whose layer `begin` is, or `begin` itself where it is in none.

    What stands beside the stack runs before or after it, which names do not tell.
    """

    def __init__(self, begin: str) -> None:
        above, _, last = begin.rpartition(".")
        self.begin, self.first = begin, int(last) if last.isdigit() else None
        self.stack = begin if self.first is None else above

    def layer(self, name: str) -> int | None:
        """The layer in which a name lies; None where it lies in no layer of the stack."""
        if self.first is None or not name.startswith(f"{self.stack}."):
            return None
        number = name.removeprefix(f"{self.stack}.").partition(".")[0]
        return int(number) if number.isdigit() else None

    def is_early(self, name: str) -> bool:
        """Whether a name lies in a layer before the first that is given a part."""
        layer = self.layer(name)
        return layer is not None and self.first is not None and layer < self.first

    def holds(self, name: str) -> bool:
        """Whether a name lies where the sequence is split."""
        return self.stack in prefixes(name) and not self.is_early(name)


def _report_ends(report: Report, by_part: Mapping[str, Mapping[str, Rule]], spec: ModelSpec, dense: Assignment) -> None:
    """Reports a sequence that is split nowhere or twice, and one that nothing puts together again."""
    begins, joins = by_part["split"], by_part["join"]
    if not begins:
        layers = [first for name in by_part["whole"] if (first := _first_layer(name)) is not None]
        report.add(
            "PP120",
            "sp_plan splits the sequence nowhere",
            next(iter(report.plan.rules(SECTION))),
            name=layers[0] if layers else None,
            expected="`split_sequence` on one module: the first layer",
            fix=f"add `{layers[0] if layers else 'model.layers.0'}: split_sequence`",
        )
    for name, rule in list(begins.items())[1:]:
        first = next(iter(begins))
        report.add(
            "PP120",
            f"the sequence is split before {first}, and what is split would be split again",
            rule,
            name=name,
            expected="`split_sequence` on one module: the first layer",
            fix=f"write `{first}: split_sequence`, and nothing on the others",
        )
    if begins and not joins:
        begin, rule = next(iter(begins.items()))
        last, own = next(_around(_Body(begin), spec, dense), (begin, rule))
        report.add(
            "PP121",
            "the sequence is split, and nothing gathers it",
            own,
            name=last,
            expected="a module behind the layers that gives every rank the whole sequence",
            fix=f"write `sequence_parallel_gather_output` on {'the last norm' if last == begin else last}",
        )


def _around(body: _Body, spec: ModelSpec, dense: Assignment) -> Iterator[tuple[str, Rule]]:
    """What could gather behind the layers: modules there that `sp_plan` names, then norms beside the stack."""
    outside = {
        name: rule
        for name, rule in dense.modules.items()
        if rule is not None and not body.holds(name) and not body.is_early(name)
    }
    yield from ((name, rule) for name, rule in outside.items() if rule.section == SECTION)
    beside = body.stack.rpartition(".")[0]
    for name, rule in outside.items():
        is_norm = spec.modules[name].kind == "other" and bool(spec.modules[name].parameters)
        if is_norm and name.rpartition(".")[0] == beside:
            yield name, rule


def _report_within(report: Report, by_part: Mapping[str, Mapping[str, Rule]]) -> None:
    """Reports what stands for a part of the sequence in a module that has all of it."""
    wholes = by_part["whole"]
    codes = {"split": ("PP122", "splits"), "join": ("PP122", "gathers"), "whole": ("PP123", "gathers")}
    for part, (code, does) in codes.items():
        for name, rule in by_part[part].items():
            around = next((above for above in prefixes(name.rpartition(".")[0]) if above in wholes), None)
            if around is not None:
                report.add(
                    code,
                    f"{rule.style} {does} a sequence of which {around} has all",
                    rule,
                    name=name,
                    expected=f"no such rule within {around}, which stands under `{wholes[around].style}`",
                    fix="remove the rule",
                )


def _first_layer(name: str) -> str | None:
    """The first layer of the stack in which a name lies; None where it lies in none."""
    layer = layer_of(name)
    return f"{layer.rpartition('.')[0]}.0".lstrip(".") if layer else None


def _report_early(report: Report, body: _Body, begin: Rule, own: Sequence[tuple[str, Rule]]) -> bool:
    """Whether rules of `sp_plan` stand in layers before the one at which the sequence is split; then reported."""
    first = next(((name, rule) for name, rule in own if body.is_early(name)), None)
    if first is None:
        return False
    name, rule = first
    report.add(
        "PP126",
        f"the sequence is split before {body.begin}, and `{rule.pattern}: {rule.style}` stands on {name} too",
        begin,
        name=body.begin,
        expected="`split_sequence` before everything that is given a part",
        fix=f"write `{body.stack}.0: split_sequence`",
    )
    return True


def _report_parameters(
    report: Report, body: _Body, wholes: Mapping[str, Rule], parameters: Mapping[str, ParameterEntry]
) -> None:
    """Reports what is used on a part of the sequence and would need all of it, or a sum of gradients."""
    given = {
        name: entry
        for name, entry in parameters.items()
        if body.holds(name) and not any(above in wholes for above in prefixes(name))
    }
    split = {name: entry for name, entry in given.items() if entry.is_sharded}
    blocks = {block: entry for name, entry in reversed(split.items()) if (block := _block(body, name))}
    for block, entry in reversed(blocks.items()):
        within = next((rule for name, rule in wholes.items() if block in prefixes(name)), None)
        report.add(
            "PP125",
            f"{block} is given a part of the sequence, and {entry.rule.style} splits "
            f"{entry.info.name.removeprefix(f'{block}.')} in it",
            within or entry.rule,
            name=block,
            expected="`whole_sequence` around what ranks split, so that they compute with the same tokens",
            fix=f"write `{wildcarded(block)}: whole_sequence` in sp_plan",
        )
    for name, entry in given.items():
        if (TENSOR_AXIS, "I") in {(use.axis, use.letter) for use in entry.uses} and _block(body, name) not in blocks:
            owner = wildcarded(name.rpartition(".")[0])
            report.add(
                "PP124",
                f"{entry.rule.style} leaves a parameter whole that is given a part of the sequence, and nothing sums "
                "its gradient",
                entry.rule,
                name=name,
                found=str(entry.layout),
                fix=f"write `{owner}: sequence_parallel` in sp_plan; if it mixes tokens, `whole_sequence` around it",
            )


def _block(body: _Body, name: str) -> str:
    """The module right below its layer, or below the body, in which a parameter lies; its own where it is in none."""
    owner = name.rpartition(".")[0]
    depth = body.stack.count(".") + (2 if body.layer(name) is None else 3)
    return ".".join(owner.split(".")[:depth])
