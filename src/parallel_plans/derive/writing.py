"""A derived plan as text, commented YAML as people write it; and read again."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import yaml

from parallel_plans.loader import load_plan
from parallel_plans.plan import Plan

if TYPE_CHECKING:
    from parallel_plans.derive.ruling import Line

WIDTH = 118


def written(model_type: str | None, sections: Mapping[str, Sequence[Line]], remarks: Iterable[str]) -> str:
    """The text of a plan with these sections; `remarks` stand above it."""
    lines = [each for remark in remarks for each in _comment(remark, "")]
    lines.append("version: 1")
    if model_type is not None:
        lines.append(f"model_type: {model_type}")
    for section, rules in sections.items():
        lines.append(f"{section}:")
        for rule in rules:
            lines += _rule(rule)
    return "\n".join(lines) + "\n"


def _comment(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")


def _rule(rule: Line) -> list[str]:
    above = _comment(rule.note, "  ") if rule.note else []
    shape = f"  # {rule.shape}" if rule.shape else ""
    name = f'"{rule.pattern}"' if rule.pattern.startswith("*") else rule.pattern
    if not rule.options:
        return [*above, f"  {name}: {rule.style}{shape}"]
    options = ", ".join(f"{key}: {_flow(value)}" for key, value in rule.options.items())
    flow = f"  {name}: {{style: {rule.style}, {options}}}"
    if len(flow) <= WIDTH and not any(isinstance(value, (list, Mapping)) for value in rule.options.values()):
        return [*above, flow + shape]
    block = [f"    {key}: {_flow(value)}" for key, value in rule.options.items()]
    return [*above, f"  {name}:{shape}", f"    style: {rule.style}", *block]


def _flow(value: object) -> str:
    """A value in YAML's flow style."""
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {_flow(each)}' for key, each in value.items())}}}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_flow, value))}]"
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else str(value)


def loaded(text: str) -> Plan:
    """A plan that was derived, read as any other is."""
    return replace(load_plan(yaml.safe_load(text)), source="derived")
