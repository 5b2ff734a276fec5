"""Where a style can stand: on which kinds of modules, on which parameters."""

from __future__ import annotations

from collections.abc import Iterator

from parallel_plans.accounting import Report
from parallel_plans.layouts import Layout
from parallel_plans.matching import Assignment, Pattern
from parallel_plans.model_spec import ModelSpec, ModuleInfo, ParameterInfo
from parallel_plans.plan import Rule
from parallel_plans.styles import Style, get_style

_OTHER = "use `replicate`, or the style that fits such a {}"
STAND_IN = "Identity"  # what torch has for a part that a config leaves out
Problem = tuple[str, str]  # what is wrong, and what to do


def can_stand(report: Report, spec: ModelSpec, info: ParameterInfo, rule: Rule) -> bool:
    """Whether the rule's style can stand on this parameter or its module; reported where it cannot."""
    style = get_style(rule.style)
    if rule.section not in style.sections:
        return False  # that is reported of the rule
    owner = spec.modules[info.name.rpartition(".")[0]]
    on_module = not _names(rule, info.name)
    problems = (_of_module if on_module else _of_parameter)(info, rule, style, owner)
    for problem, fix in [*problems, *_of_shape(spec, info, rule, style, owner)][:1]:
        report.add("PP105", problem, rule, name=info.name, found=str(Layout(info.shape)), fix=fix)
        return False
    return True


def _names(rule: Rule, parameter: str) -> bool:
    """Whether the rule names the parameter itself, rather than its module or whatever lies below one."""
    last = rule.pattern.rpartition(".")[2]
    return last == parameter.rpartition(".")[2] and Pattern.of(rule.pattern).matches(parameter)


def _kinds(style: Style) -> str:
    if style.serves == ("other",):
        return "modules that are no layers"
    return f"modules of kind {' or '.join(style.serves)}"


def _of_module(info: ParameterInfo, rule: Rule, style: Style, owner: ModuleInfo) -> Iterator[Problem]:
    if style.serves and owner.kind not in style.serves:
        problem = f"{rule.style} stands on {_kinds(style)}, and {owner.name} is a {owner.type}"
        yield problem, _OTHER.format("module")
    elif style.role == "identity":
        yield f"{rule.style} stands on an expert without weights, and {owner.name} has some", _OTHER.format("module")


def _of_parameter(info: ParameterInfo, rule: Rule, style: Style, owner: ModuleInfo) -> Iterator[Problem]:
    """On a bare parameter a style splits and nothing else: it is of no use where its work is at the boundary."""
    if style.module_only or (style.boundary is not None and not style.parameter_only):
        problem = f"{rule.style} stands on a module, and {info.name} is a parameter"
        yield problem, f"write it on `{rule.pattern.rpartition('.')[0]}`"
    elif style.serves and owner.kind not in style.serves and {owner.kind, *style.serves} == {"linear", "embedding"}:
        problem = f"{rule.style} stands on {_kinds(style)}, and {owner.name} is a {owner.type}"
        yield problem, _OTHER.format("module")


def _of_shape(spec: ModelSpec, info: ParameterInfo, rule: Rule, style: Style, owner: ModuleInfo) -> Iterator[Problem]:
    if style.stacked and owner.kind != "other":
        problem = f"{rule.style} stands on weights that stack experts, and {owner.name} is a {owner.type}"
        yield problem, _OTHER.format("module")
    elif style.ndims and len(info.shape) not in style.ndims:
        problem = f"{rule.style} stands on a parameter of {' or '.join(map(str, style.ndims))} dims"
        yield problem, _OTHER.format("parameter")
    elif style.stacked and len(info.shape) == 2 and not _is_beside_stack(spec, info, owner):
        problem = f"{rule.style} stands on weights that stack experts, and on their biases"
        yield problem, _OTHER.format("parameter")


def _is_beside_stack(spec: ModelSpec, info: ParameterInfo, owner: ModuleInfo) -> bool:
    """Whether the module has a weight of as many experts as this, which then is their bias."""
    shapes = (spec.parameters[name].shape for name in owner.parameters)
    return any(len(shape) == 3 and shape[0] == info.shape[0] for shape in shapes)


def report_unserved(report: Report, spec: ModelSpec, assignment: Assignment) -> None:
    """Reports rules that reach only modules without parameters, on which their style cannot stand."""
    reached: dict[int, list[ModuleInfo]] = {}
    for name, rule in assignment.modules.items():
        if rule is not None:
            reached.setdefault(id(rule), []).append(spec.modules[name])
    for use in assignment.uses:
        rule, modules = use.rule, reached.get(id(use.rule), [])
        serves = get_style(rule.style).serves
        if use.parameters or not modules or not serves or any(module.kind in serves for module in modules):
            continue
        if rule.optional and all(module.type == STAND_IN for module in modules):
            continue
        problem = f"{rule.style} stands on {_kinds(get_style(rule.style))}, and {modules[0].name} is a "
        fix = f"name the modules below it, or write `{rule.pattern}.**` for all of them"
        report.add("PP105", problem + modules[0].type, rule, name=modules[0].name, fix=fix)
