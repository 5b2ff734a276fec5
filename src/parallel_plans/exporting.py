"""A plan as other frameworks take it: the dict of transformers' `DistributedConfig`, that of `parallelize_module`.

They know fewer styles, and split every dim as `torch.chunk` does. What they cannot express is told; then nothing is
written.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES

from parallel_plans.errors import Finding, PlanError
from parallel_plans.layouts import Split
from parallel_plans.matching import Pattern
from parallel_plans.plan import Rule
from parallel_plans.styles import Style, get_style, style_names
from parallel_plans.table import ParameterEntry, Table, wildcarded
from parallel_plans.views import EXPERT_AXIS

# options that say when something is done, or what other frameworks find out by themselves; `unit` is held to the splits
_WITHOUT_EFFECT = ("delay", "unit")
# style -> what does the same in torch.distributed.tensor.parallel; nothing for what torch leaves as it is
_OF_TORCH: Mapping[str, str] = {
    "colwise": "ColwiseParallel()",
    "rowwise": "RowwiseParallel()",
    "colwise_gather_output": "ColwiseParallel(output_layouts=Replicate())",
    "rowwise_split_input": "RowwiseParallel(input_layouts=Replicate())",
    "embedding_rowwise": "RowwiseParallel(input_layouts=Replicate())",
    "embedding_colwise": "ColwiseParallel(output_layouts=Replicate())",
    "replicate": "",
    "local_params": "",
}
# style -> what transformers does it with: on weights of all experts at once it is the style of a matrix
_OF_EXPERTS = {"moe_tp_gate_up_colwise": "packed_colwise", "moe_tp_down_rowwise": "rowwise"}
_WHOLE = "replicate"  # for transformers, what does nothing
_HEAD_OF_TORCH = """\
# parallelize_module(model, mesh["tp"], plan)
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

plan = {
"""


@dataclass(frozen=True, kw_only=True)
class Framework:
    """What a framework can do.

    Args:
        name: for people.
        style_of: the framework's own word for a style, empty where there is nothing to do; None where it has none.
        splits: whether it splits a dim like this.
        takes_parameters: whether its plans name parameters too, and not modules alone.
        keeps_ties: whether two names of one parameter that is split stay one.
    """

    name: str
    style_of: Callable[[Style], str | None]
    splits: Callable[[Split, Style], bool]
    takes_parameters: bool
    keeps_ties: bool


def _chunks(split: Split, style: Style) -> bool:
    return split.is_chunk


def _chunks_or_halves(split: Split, style: Style) -> bool:
    """A packed style of transformers splits each of two equal parts; it has a style for one part, and for two."""
    return split.strided_parts == 2 if style.defaults.get("parts") == 2 else split.is_chunk


def _of_transformers(style: Style) -> str | None:
    if style.name in _OF_EXPERTS:
        return _OF_EXPERTS[style.name]
    names = (name for name in style_names() if get_style(name) is style and name in ALL_PARALLEL_STYLES)
    return next(names, None)


TRANSFORMERS = Framework(
    name="transformers",
    style_of=_of_transformers,
    splits=_chunks_or_halves,
    takes_parameters=True,
    keeps_ties=True,
)
TORCH = Framework(
    name="torch",
    style_of=lambda style: _OF_TORCH.get(style.name),
    splits=_chunks,
    takes_parameters=False,
    keeps_ties=False,
)


@dataclass(frozen=True, kw_only=True)
class Said:
    """What a plan says of all names of one form: a style on an axis, by a rule."""

    style: Style
    rule: Rule
    axis: str


def for_transformers(table: Table, carried: Mapping[str, str]) -> str:
    """JSON for `DistributedConfig(tp_size=..., **read)`: `tp_plan`, and `ep_plan` where experts are dealt over ranks.

    `carried` is the plan of the model's class, whose rules stay in force unless they are written over.

    Raises:
        PlanError: PP801, PP802 for all that transformers cannot express.
    """
    said = expressible(table, TRANSFORMERS)
    plans: dict[str, dict[str, str]] = {"tp_plan": {}, "ep_plan": {}}
    for (name, axis), each in said.items():
        plans["ep_plan" if axis == EXPERT_AXIS else "tp_plan"][name] = str(_of_transformers(each.style))
    forms = {wildcarded(name) for name in (*table.spec.modules, *table.spec.parameters)}
    for name in carried:
        if name in forms:
            plans["tp_plan"].setdefault(name, _WHOLE)
    return json.dumps({section: plan for section, plan in plans.items() if plan}, indent=2) + "\n"


def for_torch(table: Table) -> str:
    """Python text that makes `plan` for `torch.distributed.tensor.parallel.parallelize_module`.

    Raises:
        PlanError: PP801, PP802 for all that torch cannot express.
    """
    said = expressible(table, TORCH)
    lines = [
        f"    {json.dumps(name)}: {text},\n" for (name, _), each in said.items() if (text := _OF_TORCH[each.style.name])
    ]
    return _HEAD_OF_TORCH + "".join(lines) + "}\n"


def expressible(table: Table, framework: Framework) -> dict[tuple[str, str], Said]:
    """(name with `*`, axis) -> what the plan says of it, for all that it says.

    Raises:
        PlanError: with every thing that the framework cannot express, once per form of name.
    """
    said, findings = dict[tuple[str, str], Said](), dict[tuple[str, str], Finding]()
    for name, each, finding in _each_said(table, framework):
        key = wildcarded(name), each.axis
        if finding is None and said.setdefault(key, each).rule is not each.rule:
            finding = _finding("PP802", each, name, f"{framework.name} cannot tell layers of one form apart")
        if finding is not None:
            findings.setdefault(key, finding)
    if findings:
        raise PlanError(list(findings.values()))
    return said


def _each_said(table: Table, framework: Framework) -> Iterator[tuple[str, Said, Finding | None]]:
    """Every parameter and every module at which something runs, what is said of it, and what is wrong with that."""
    for name, entry in table.parameters.items():
        module = name.rpartition(".")[0]
        for use in entry.uses:
            each = Said(style=use.style, rule=use.rule, axis=use.axis)
            of_module = Pattern.of(use.rule.pattern).matches(module)
            finding = _unexpressed(each, name, framework) or _unsplit(entry, each, framework)
            if finding is None and use.letter == "P":
                finding = _finding("PP801", each, name, f"{framework.name} adds what is whole on every rank everywhere")
            if finding is None and framework.style_of(each.style) and not (of_module or framework.takes_parameters):
                finding = _finding("PP801", each, name, f"{framework.name} takes rules on modules alone")
            if finding is None and name in table.spec.tied and entry.is_sharded and not framework.keeps_ties:
                told = f"{framework.name} would make two parameters of this one and {table.spec.tied[name]}"
                finding = _finding("PP802", each, name, told, fix="export the plan for a model that ties nothing")
            yield module if of_module else name, each, finding
    for name, acting in table.acting():
        each = Said(style=acting.style, rule=acting.rule, axis=acting.axis)
        yield name, each, _unexpressed(each, name, framework)


def _unexpressed(each: Said, name: str, framework: Framework) -> Finding | None:
    """That the framework has no style, or no option, like this."""
    if framework.style_of(each.style) is None:
        told = f"{framework.name} has no style that does what {each.style.name} does: {each.style.summary}"
        return _finding("PP801", each, name, told)
    for option, value in each.rule.options.items():
        if option not in _WITHOUT_EFFECT and each.style.defaults.get(option) != value:
            return _finding("PP801", each, name, f"{framework.name} has nothing like the option {option}: {value}")
    return None


def _unsplit(entry: ParameterEntry, each: Said, framework: Framework) -> Finding | None:
    """That the framework would cut elsewhere."""
    for split in entry.layout.splits:
        is_whole = "unit" not in each.rule.options or len(set(split.local_sizes)) == 1
        if split.axis == each.axis and not (is_whole and framework.splits(split, each.style)):
            told = f"{framework.name} would cut dim {split.dim} elsewhere"
            found = f"{entry.layout}, {' + '.join(map(str, split.local_sizes))} on {split.ranks} ranks"
            fix = "ask for a number of ranks that divides the units"
            return _finding("PP802", each, entry.info.name, told, found=found, fix=fix)
    return None


def _finding(code: str, each: Said, name: str, told: str, **more: str) -> Finding:
    rule = each.rule
    return Finding(code=code, message=told, file=rule.file, line=rule.line, rule=rule.pattern, name=name, **more)
