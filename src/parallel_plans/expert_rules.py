"""Which names are experts, how these are dealt over ranks, and what a plan that deals them must not forget."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from parallel_plans.accounting import Report
from parallel_plans.geometry import CannotSplit, Geometry
from parallel_plans.layouts import Layout, Split
from parallel_plans.matching import Assignment
from parallel_plans.model_spec import ModelSpec
from parallel_plans.plan import Rule
from parallel_plans.styles import Style, get_style
from parallel_plans.table import wildcarded

GeometryAt = Callable[[str], Geometry]


class ExpertRules:
    """What a plan says of experts: its rules in `tp_plan` (`dense`) and in the section that deals experts out.

    Args:
        spec: the model.
        dense: the rules of `tp_plan` on the model's names.
        experts: those of `ep_plan` or `dispatch_plan`; all None where experts are not dealt.
        geometry: name -> the shapes under the axis `ep` at that name.
    """

    def __init__(self, spec: ModelSpec, dense: Assignment, experts: Assignment, geometry: GeometryAt) -> None:
        self.spec, self.dense, self.geometry = spec, dense, geometry
        self.weights = _with_role(experts.parameters, "weight")
        self.routers = _with_role(experts.modules, "router")
        self.blocks = _with_role(experts.modules, "experts")
        self.around = _with_role(experts.modules, "block")
        self._identities = _with_role(dense.modules, "identity")
        self._dense_around = _with_role(dense.modules, "block")
        self._owners = {name.rpartition(".")[0] for name in self.weights} | set(self.blocks)
        # looked up by what stands above: a model has hundreds of layers, and each asks for its own
        self._weights_below, self._blocks_below = by_prefix(self.weights), by_prefix(self.blocks)
        self._routers_below, self._identities_below = by_prefix(self.routers), by_prefix(self._identities)

    def holds(self, name: str) -> bool:
        """Whether a module or parameter is an expert's: a rule deals it, or it lies within what a rule deals."""
        owner = name.rpartition(".")[0]
        is_blocks_own = name in self.spec.parameters and owner in self._dense_around and bool(self._below(owner))
        return is_blocks_own or any(prefix in self._owners for prefix in prefixes(name))

    def dense_blocks(self) -> dict[str, Rule]:
        """The rules of `tp_plan` on modules that bring tokens to dealt experts."""
        blocks = {**_with_role(self.dense.modules, "experts"), **self._dense_around}
        return {name: rule for name, rule in blocks.items() if self._below(name)}

    def surrounds(self, name: str, role: str | None) -> bool:
        """Whether a router or a block stands around experts that a rule deals."""
        if role not in ("router", "block"):
            return False
        return bool(self._below(name.rpartition(".")[0] if role == "router" else name))

    def block_of(self, router: str) -> str | None:
        """The experts that a router sends tokens to: those that lie beside it."""
        beside = router.rpartition(".")[0]
        return next(iter(self._blocks_below.get(beside, ())), None)

    def _below(self, prefix: str) -> list[str]:
        return self._weights_below.get(prefix, [])

    def dealt(self, name: str, style: Style) -> Split | None:
        """Which experts each rank of `ep` holds, for a router or experts; counted in experts, not in rows."""
        prefix = name.rpartition(".")[0] if style.role == "router" else name
        splits = [split for each in self._below(prefix) if (split := self._expert_split(each)) is not None]
        return min(splits, key=lambda split: split.size, default=None)

    def _expert_split(self, name: str) -> Split | None:
        rule, shape = self.weights[name], self.spec.parameters[name].shape
        geometry = self.geometry(name)
        split = geometry.split(shape, get_style(rule.style), rule.options)
        given: Any = rule.options.get("unit", 1)
        unit = geometry.size(given[0] if isinstance(given, tuple) else given)
        if split is None or unit == 1:
            return split
        ranges = tuple(tuple((start // unit, stop // unit) for start, stop in rank) for rank in split.ranges)
        return replace(split, size=split.size // unit, ranges=ranges)

    def left_whole(self) -> Iterator[tuple[str, Rule, str | None]]:
        """Parameters of experts that no rule deals though it should, each with a rule that deals the others.

        These are all that lie within the module of such experts; in a block around them, those that stack experts.
        Where one lies away from those that are dealt, the rule of the block stands too high: it comes with that rule,
        and with the module in which experts are dealt.
        """
        below = by_prefix(self.spec.parameters)
        for block, rule in {**self._dense_around, **self.around, **self.blocks}.items():
            dealt = self._below(block)
            if block not in self.blocks and not dealt:
                continue
            for name in below.get(block, ()):
                if name in self.weights:
                    continue
                if block in self.blocks or self._stacks(name):
                    home = self._home(name, dealt)
                    yield name, self.weights[dealt[0]] if dealt and home is None else rule, home

    def _home(self, name: str, dealt: Sequence[str]) -> str | None:
        """The module of the weights that are dealt, where a parameter lies away from them; None where it does not."""
        owners = [each.rpartition(".")[0] for each in dealt]
        # weights that stack experts may have a module each, which then stand side by side
        near = [owner.rpartition(".")[0] for owner in owners] if self._stacks(name) else owners
        return owners[0] if owners and not any(is_within(name, each) for each in near) else None

    def _stacks(self, name: str) -> bool:
        """Whether a parameter stacks experts, as its rule in `tp_plan` says, outside of the modules that run them."""
        rule = self.dense.parameters[name]
        is_run = any(prefix in self.blocks for prefix in prefixes(name))
        return rule is not None and get_style(rule.style).stacked and not is_run

    def out_of_reach(self) -> Iterator[tuple[str, Rule]]:
        """The weights that are dealt and to which nothing brings tokens, each with its rule."""
        for name, rule in self.weights.items():
            if not any(prefix in self.blocks or self._sums(prefix) for prefix in prefixes(name)):
                yield name, rule

    def _sums(self, block: str) -> bool:
        """Whether a rule around experts adds up what those of all ranks give."""
        rule = self.around.get(block)
        return rule is not None and get_style(rule.style).leaves == "P"

    def bringing(self, weight: str) -> tuple[str, str]:
        """The module and the style that would bring tokens to a weight that is dealt."""
        owner, section = weight.rpartition(".")[0], self.weights[weight].section
        ruled = ((prefix, self.dense.modules.get(prefix)) for prefix in prefixes(owner))
        known = ((prefix, rule) for prefix, rule in ruled if rule is not None)
        if section == "dispatch_plan":
            runs = (prefix for prefix, rule in known if get_style(rule.style).role == "experts")
            return next(runs, owner), "ep_dispatch"
        runs_or_reduces = ((p, rule.style) for p, rule in known if get_style(rule.style).role in ("experts", "block"))
        return next(runs_or_reduces, (owner, "moe_experts_allreduce"))

    def dealt_otherwise(self) -> Iterator[tuple[str, str]]:
        """The weights of which a rank holds other experts than of most beside, each with one of these."""
        for names in self._beside():
            splits = {name: split for name in names if (split := self._split_or_none(name)) is not None}
            ways: dict[object, list[str]] = {}
            for name, split in splits.items():
                ways.setdefault(tuple(ranges[:1] for ranges in split.ranges), []).append(name)
            usual = max(ways.values(), key=lambda each: self._likelihood(each, splits[each[0]].size), default=[])
            yield from ((name, usual[0]) for name in splits if name not in usual)

    def _beside(self) -> Iterable[list[str]]:
        """The weights that are dealt, those of the same experts together."""
        around = {**self._dense_around, **self.around}
        together: dict[str, list[str]] = {}
        for name in self.weights:
            own = [prefix for prefix in prefixes(name) if prefix in around or prefix in self.blocks]
            together.setdefault(own[-1] if own else name, []).append(name)
        return together.values()

    def _likelihood(self, weights: Sequence[str], count: int) -> tuple[int, bool, int]:
        """How likely weights that are dealt alike are dealt right: by how many they are, by the config, by the count.

        The config may say that there are so many experts; of several such numbers, that of all experts is the largest.
        """
        numbers = self.spec.fields_at(weights[0]).items()
        return len(weights), any("expert" in field and value == count for field, value in numbers), count

    def _split_or_none(self, name: str) -> Split | None:
        try:
            return self._expert_split(name)
        except CannotSplit:
            return None  # that is reported where the weight is split

    def options(self, name: str, style: Style) -> dict[str, object]:
        """What the boundary of a router or of experts must know besides."""
        if style.role == "experts":
            beside = name.rpartition(".")[0]
            return {
                "is_routed": beside in self._routers_below,
                "has_identities": name in self._identities_below,
                "is_in_block": any(each in self.around or each in self._dense_around for each in prefixes(name)),
            }
        if style.role == "router":
            block = self.block_of(name)
            return {"has_identities": bool(block) and block in self._identities_below}
        return {}

    def is_joint(self, name: str, style: Style) -> bool:
        """Whether both sections say the same of these experts, so that one reduction serves both axes."""
        if style.role == "router":
            around = next((each for each in prefixes(name) if each in self.around), None)
            block = self.block_of(name)
            return (block is not None and self._is_ruled_twice(block)) or (
                around is not None and self._is_ruled_twice(around)
            )
        return self._is_ruled_twice(name)

    def _is_ruled_twice(self, block: str) -> bool:
        dealing, dense = self.blocks.get(block) or self.around.get(block), self.dense.modules[block]
        return None not in (dealing, dense) and get_style(dense.style) is get_style(dealing.style)  # type: ignore[union-attr]


def _with_role(rules: Mapping[str, Rule | None], role: str) -> dict[str, Rule]:
    return {name: rule for name, rule in rules.items() if rule is not None and get_style(rule.style).role == role}


def prefixes(name: str) -> Iterator[str]:
    """The name and every name above it."""
    while name:
        yield name
        name = name.rpartition(".")[0]


def by_prefix(names: Iterable[str]) -> dict[str, list[str]]:
    """Each name above some of the names, these and the root's among them: those of the names that are within it.

    >>> by_prefix(["a.b", "a.c"])
    {'a.b': ['a.b'], 'a': ['a.b', 'a.c'], '': ['a.b', 'a.c'], 'a.c': ['a.c']}
    """
    found: dict[str, list[str]] = {}
    for name in names:
        for prefix in (*prefixes(name), ""):
            found.setdefault(prefix, []).append(name)
    return found


def is_within(name: str, prefix: str) -> bool:
    return not prefix or name == prefix or name.startswith(f"{prefix}.")


def report_incomplete(report: Report, spec: ModelSpec, experts: ExpertRules) -> None:
    """Reports experts that are dealt in part: weights that stay whole, weights that nothing brings tokens to."""
    for name, rule, home in experts.left_whole():
        style = get_style(rule.style)
        report.add(
            "PP110",
            f"{rule.style} deals experts over ranks, and this parameter of them stays whole"
            if style.role == "weight"
            else f"{rule.style} is for experts dealt over ranks, and this parameter of them stays whole",
            rule,
            name=name,
            found=str(Layout(spec.parameters[name].shape)),
            expected="every parameter of the experts split by expert",
            fix=f"add `{wildcarded(name)}: grouped_gemm` to {rule.section}"
            if home is None
            else f"write the rule on the module of the experts, `{wildcarded(home)}`, or on what holds them alone",
        )
    for weight, rule in experts.out_of_reach():
        module, style_name = experts.bringing(weight)
        report.add(
            "PP110",
            f"{rule.style} deals experts over ranks, and nothing brings tokens to them",
            rule,
            name=module,
            found=f"with {weight.removeprefix(f'{module}.')} {Layout(spec.parameters[weight].shape)}",
            expected=f"a rule for the experts' module in {rule.section}",
            fix=f"add `{wildcarded(module)}: {style_name}` to {rule.section}",
        )
    for name, other in experts.dealt_otherwise():
        rule = experts.weights[name]
        report.add(
            "PP201",
            f"{rule.style} deals other experts here than in {other}",
            rule,
            name=name,
            found=str(Layout(spec.parameters[name].shape)),
            expected="every rank the same experts in all of their weights",
            fix="give `unit`, the rows of one expert, as for the others",
        )


def report_differing(report: Report, experts: ExpertRules) -> None:
    """Reports modules around dealt experts that `tp_plan` and `ep_plan` rule differently.

    Where each expert is split too, both rules act at once, and only the same style reduces over both axes together.
    """
    dealing = {**experts.blocks, **experts.around}
    for name, rule in experts.dense_blocks().items():
        other = dealing.get(name)
        if other is not None and get_style(other.style) is get_style(rule.style):
            continue
        said = "says nothing of it" if other is None else f"says {other.style} at {other.place}"
        report.add(
            "PP111",
            f"{rule.style} brings tokens to experts that are dealt and split at once, and ep_plan {said}",
            rule,
            name=name,
            expected="the same style on the same module in tp_plan and ep_plan, where ep and etp are both above 1",
            fix=f"write the same style for `{rule.pattern}` in both sections, or use etp = 1",
        )
