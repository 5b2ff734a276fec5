"""Experts dealt whole over ranks: the sections of a plan for that, from how a mixture calls its experts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from parallel_plans.derive.ruling import Line, Ruling, Sample
from parallel_plans.model_spec import ModuleInfo

# what brings tokens to experts: on ranks that share a batch, and on ranks with batches of their own
BRINGING = {"ep_plan": "moe_experts_allreduce", "dispatch_plan": "ep_dispatch"}


def experts_of(sample: Sample) -> list[ModuleInfo]:
    """The modules whose parameters all stack the same number of experts, one of each form."""
    forms: dict[str, ModuleInfo] = {}
    for module in sample.spec.modules.values():
        shapes = [sample.spec.parameters[name].shape for name in module.parameters]
        is_stack = any(len(shape) == 3 for shape in shapes) and len({shape[0] for shape in shapes}) == 1
        if is_stack and module.kind == "other" and _takes_routes(sample, module.name):
            forms.setdefault(sample.learned.pattern(module.name), module)
    return list(forms.values())


def _takes_routes(sample: Sample, name: str) -> bool:
    """Whether a module is handed whole numbers: which experts each token goes to."""
    calls = sample.learned.step.called.get(name, ())
    return any(not tensor.is_floating_point() for handed, _ in calls for tensor in handed)


def sections(ruling: Ruling, section: str) -> list[list[Line]]:
    """The ways to write a section that deals experts, what is likely first; none where the model has no experts."""
    found = experts_of(ruling.first)
    if not found:
        return []
    rules = [line for module in found for line in _dealt(ruling, module, section)]
    if section == "dispatch_plan":
        return [rules]
    return [
        [*(Line(pattern=name, style="ep_router") for name in routers), *rules] for routers in _routers(ruling, found)
    ]


def _dealt(ruling: Ruling, module: ModuleInfo, section: str) -> Iterator[Line]:
    for name in module.parameters:
        yield Line(pattern=ruling.pattern(name), style="grouped_gemm", shape=ruling.shape_over(name, 0, "ep"))
    yield Line(pattern=ruling.pattern(module.name), style=BRINGING[section])


def _routers(ruling: Ruling, found: Sequence[ModuleInfo]) -> Iterator[list[str]]:
    """What may be the routers: those that give the routes that experts are handed, else those with a row per expert."""
    giving, rows = [], []
    for module in found:
        around = module.name.rpartition(".")[0]
        beside = [
            each for each in ruling.spec.modules if each.startswith(f"{around}.") and not _within(each, module.name)
        ]
        handed = {id(each) for call, _ in ruling.first.learned.step.called.get(module.name, ()) for each in call}
        giving += [ruling.pattern(each) for each in beside if _gives(ruling.first, each, handed)][:1]
        rows += [ruling.pattern(each) for each in beside if _has_row_for_each(ruling, each, module)][:1]
    told = [routers for routers in (giving, rows) if len(routers) == len(found)]
    yield from told[:1] if len(told) == 2 and told[0] == told[1] else told
    yield []  # experts that are handed masked routes need no router's rule


def _within(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def _gives(sample: Sample, module: str, handed: set[int]) -> bool:
    given = [each for _, result in sample.learned.step.called.get(module, ()) for each in result]
    return any(id(each) in handed and not each.is_floating_point() for each in given)


def _has_row_for_each(ruling: Ruling, name: str, experts: ModuleInfo) -> bool:
    count = ruling.spec.parameters[experts.parameters[0]].shape[0]
    shapes = [ruling.spec.parameters[each].shape for each in ruling.spec.modules[name].parameters]
    return any(len(shape) == 2 and shape[0] == count for shape in shapes)
