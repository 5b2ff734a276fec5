"""Which box of the picture a finding belongs to, whichever layers the model had in which it was found."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from parallel_plans.errors import Finding
from parallel_plans.matching import Pattern, pattern_problem
from parallel_plans.model_spec import ModelSpec
from parallel_plans.verify.alike import Kind, layer_of, moved
from parallel_plans.verify.report import Report
from parallel_plans.verify.summary import in_order


def places_of(report: Report, spec: ModelSpec, kinds: Sequence[Kind]) -> tuple[dict[str, list[int]], tuple[int, ...]]:
    """Module of a drawn layer -> the numbers of the findings about it; and of those that are about none."""
    badges: dict[str, list[int]] = {}
    elsewhere = []
    for number, finding in enumerate(in_order(report.findings), 1):
        drawn = _drawn(report, kinds, finding.level)
        modules = _modules_of(finding, spec, drawn)
        for module in modules:
            badges.setdefault(module, []).append(number)
        if not modules:
            elsewhere.append(number)
    return badges, tuple(elsewhere)


def _drawn(report: Report, kinds: Sequence[Kind], level: str) -> dict[str, str]:
    """The layers that a level names -> those that are drawn for them; a level may have had a model with fewer."""
    drawn = {layer: kind.layers[0] for kind in kinds for layer in kind.layers}
    if level == "layouts":
        drawn |= {layer: kind.layers[0] for kind in kinds for layer in kind.followed}
    if level == "numerics" and report.simulated is not None:
        kept = enumerate(report.simulated.layers)
        stacks = {layer.rpartition(".")[0] for layer in drawn}
        shrunken = {f"{stack}.{index}": drawn.get(f"{stack}.{layer}", "") for index, layer in kept for stack in stacks}
        drawn |= {layer: kind for layer, kind in shrunken.items() if kind}
    return drawn


def _modules_of(finding: Finding, spec: ModelSpec, drawn: Mapping[str, str]) -> list[str]:
    """The modules, as drawn, that a finding is about: by its name, else by its rule, else what stands around those."""
    for name in (finding.name, finding.rule):
        asked = name
        while name and (name == asked or not _holds_layers(name, drawn)):
            found = moved(name, layer_of(name), drawn.get(layer_of(name), layer_of(name)))
            modules = _named(found, spec)
            if modules:
                return list(
                    dict.fromkeys(moved(each, layer_of(each), drawn.get(layer_of(each), "")) for each in modules)
                )
            name = name.rpartition(".")[0]
    return []


def _holds_layers(name: str, layers: Iterable[str]) -> bool:
    return any(layer.startswith(f"{name}.") for layer in layers)


def _named(name: str, spec: ModelSpec) -> list[str]:
    """The modules that a name or a pattern means, by themselves or by their parameters."""
    if name in spec.modules:
        return [name]
    if name in spec.parameters:
        return [name.rpartition(".")[0]]
    if pattern_problem(name) is not None or Pattern.of(name).is_open:
        return []
    pattern = Pattern.of(name)
    modules = [each for each in spec.modules if pattern.matches(each)]
    return modules + [each.rpartition(".")[0] for each in spec.parameters if pattern.matches(each)]
