"""Where a sequence is split and tokens travel to their experts, they set out from where they lie: nothing is gathered.

A block of experts under `whole_sequence` would gather the sequence, route all of it on every rank, and send a slice of
it. With whole experts on at least all ranks of a batch, each rank sends its own tokens instead:

    block       S(1)     no gather; its router and other whole weights are used as R, on this rank's tokens
    experts     S(1)     tokens travel, and come back to where they were
    shared      S(1) -> I ... P -> S(1)     what splits its own weights takes the whole sequence by itself
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from parallel_plans.expert_rules import ExpertRules, by_prefix, prefixes
from parallel_plans.matching import Assignment
from parallel_plans.model_spec import ModelSpec
from parallel_plans.plan import Rule
from parallel_plans.styles import Style, get_style
from parallel_plans.views import Views


class StayingTokens:
    """The blocks of experts that take this rank's part of the sequence.

    Args:
        spec: the model.
        dense: the rules of `tp_plan` and `sp_plan` on the model's names.
        around: those of `sp_plan` that act around these, on the model's modules.
        experts: those that deal experts.
        views: how the ranks are dealt out.

    `blocks` are the blocks, each with its rule; `whole_within` the modules inside of them that want the whole sequence,
    each with the rule of its block.
    """

    def __init__(
        self,
        spec: ModelSpec,
        dense: Assignment,
        around: Mapping[str, Rule | None],
        experts: ExpertRules,
        views: Views,
    ) -> None:
        self.spec, self.dense, self.rules, self.experts = spec, dense, around, experts
        self.blocks: dict[str, Rule] = {}
        self.whole_within: dict[str, Rule] = {}
        # ranks that split each expert need the same tokens, and so do those that hold the same experts for one batch
        if views.tp == 1 or views.etp > 1 or views.block % views.tp:
            return
        travelling = [name for name, rule in experts.blocks.items() if rule.section == "dispatch_plan"]
        below, parameters = by_prefix(travelling), by_prefix(spec.parameters)
        for name, rule in around.items():
            if rule is None or get_style(rule.style).sequence != "whole" or name not in below:
                continue
            inside = self._splitting_children(name, parameters[name])
            if inside is not None:
                self.blocks[name] = rule
                self.whole_within.update(dict.fromkeys(inside, rule))

    def _splitting_children(self, block: str, parameters: list[str]) -> set[str] | None:
        """The modules right below a block that split weights of their own; None where one is ruled itself."""
        found = set()
        for name in parameters:
            rule = self.dense.parameters[name]
            if rule is None or self.experts.holds(name) or not get_style(rule.style).shards:
                continue
            child = ".".join(name.split(".")[: block.count(".") + 2])
            if child == name or self.dense.modules.get(child) is not None or self.rules.get(child) is not None:
                return None
            found.add(child)
        return found

    def around(self, module: str) -> Rule | None:
        """The rule of `sp_plan` that acts around a module."""
        return None if module in self.blocks else self.whole_within.get(module, self.rules.get(module))

    def _blocks_around(self, name: str) -> Iterator[str]:
        return (each for each in prefixes(name) if each in self.blocks)

    def takes_parts(self, parameter: str) -> bool:
        """Whether a whole parameter is used on this rank's tokens alone."""
        is_expert = self.experts.holds(parameter.rpartition(".")[0])  # what a block owns besides is no expert's
        is_whole = is_expert or any(each in self.whole_within for each in prefixes(parameter))
        return not is_whole and any(True for _ in self._blocks_around(parameter))

    def options(self, name: str, style: Style) -> dict[str, object]:
        """What the boundary of experts must know besides: whether tokens may set out from where they lie."""
        return {"sets_out_split": any(True for _ in self._blocks_around(name))} if style.role == "experts" else {}
