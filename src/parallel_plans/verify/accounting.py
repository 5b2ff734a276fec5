"""Accounting: rules that are wrong together, and what is only suspicious, told as warnings.

A plan that cannot be resolved does not come this far: what is wrong with one rule is found by `parallel_plans.resolve`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from parallel_plans.accounting import Report
from parallel_plans.errors import Finding
from parallel_plans.expert_rules import is_within, prefixes
from parallel_plans.model_spec import BufferInfo, ModuleInfo
from parallel_plans.plan import Rule
from parallel_plans.sum_rules import SECTION, split_below
from parallel_plans.table import ParameterEntry, Table
from parallel_plans.together import in_order, wrong_sums
from parallel_plans.views import EXPERT_AXIS, TENSOR_AXIS


def check_accounting(table: Table) -> list[Finding]:
    """What names show of a plan whose rules each fit: errors first, then warnings, in the order of the file."""
    warnings = _Warnings(table)
    warnings.check()
    return [*wrong_sums(table), *in_order(warnings.report)]


class _Warnings:
    def __init__(self, table: Table) -> None:
        self.table, self.spec, self.report = table, table.spec, Report(table.plan)
        self.below = split_below(table)
        self._buffers: dict[str, list[BufferInfo]] = {}
        for buffer in self.spec.buffers.values():
            self._buffers.setdefault(buffer.name.rpartition(".")[0], []).append(buffer)
        self._children: dict[str, list[ModuleInfo]] = {}
        for module in self.spec.modules.values():
            self._children.setdefault(module.name.rpartition(".")[0], []).append(module)

    def check(self) -> None:
        if max(self.table.sizes[axis] for axis in (TENSOR_AXIS, EXPERT_AXIS)) == 1:
            return  # nobody to split with
        self._check_layers()
        self._check_idle()
        self._check_around()
        self._check_inputs()
        for name, module in self.spec.modules.items():
            self._check_buffers(name, module)

    def _warn(self, code: str, message: str, rule: Rule | None, **about: str | None) -> None:
        place = {"file": self.table.plan.file} if rule is None else {}
        self.report.add(code, message, rule, severity="warning", **place, **about)

    def _check_layers(self) -> None:
        """Warns of a plan that splits nothing where most of a model's bytes and work are."""
        entries = self.table.parameters
        numbered = [entry for name, entry in entries.items() if any(part.isdigit() for part in name.split("."))]
        layers = numbered or list(entries.values())
        if layers and not any(entry.is_sharded for entry in layers):
            held = sum(entry.info.bytes for entry in layers)
            found = f"{held:,} bytes in layers, none of them split"
            fix = "give the layers' weights styles that split them, or use one rank"
            message = "nothing in the layers is split: every rank does all of their work"
            self._warn("PP117", message, None, found=found, fix=fix)

    def _uses(self) -> Iterator[tuple[str, ParameterEntry]]:
        """The parameters whose rule in `tp_plan` acts on an axis with ranks."""
        for name, entry in self.table.parameters.items():
            if self.table.sizes[entry.uses[0].axis] > 1:
                yield name, entry

    def _check_idle(self) -> None:
        """Warns of rules whose style splits parameters, and that split none of those they reach."""
        splitting = {id(entry.uses[0].rule) for _, entry in self._uses() if entry.uses[0].letter == "S"}
        for name, entry in self._uses():
            use = entry.uses[0]
            if use.style.shards and use.style.whole_as == "I" and id(use.rule) not in splitting:
                self._warn(
                    "PP118",
                    f"{use.rule.style} splits nothing that this rule reaches",
                    use.rule,
                    name=name,
                    found=str(entry.layout),
                    fix="write `replicate`, which is what it does here",
                )

    def _check_around(self) -> None:
        """Warns of styles that sum gradients of what ranks share, where nothing around is split."""
        matrices: dict[str, set[str]] = {}
        for name, entry in self.table.parameters.items():
            if len(entry.info.shape) > 1:
                for prefix in prefixes(owner := name.rpartition(".")[0]):
                    matrices.setdefault(prefix, set()).add(owner)
        for name, rule, axis in self._summing():
            above = name.rpartition(".")[0]
            # beside a parameter stands what lies in its module too; beside a module does not what lies in it
            own = {above} if name in self.spec.parameters else {each for each in matrices if is_within(each, name)}
            around = next((each for each in prefixes(above) if matrices.get(each, set()) - own), None)
            if around is not None and axis not in self.below[around]:
                self._warn(
                    "PP115",
                    f"{rule.style} is for use beside what is split over {axis}, and nothing in {around} is",
                    rule,
                    name=name,
                    expected=f"a parameter in {around} that is split over {axis}",
                    fix=self._instead(name),
                )

    def _instead(self, name: str) -> str:
        has_parameters = name in self.spec.parameters or bool(self.spec.modules[name].parameters)
        return "write `replicate`" if has_parameters else "remove the rule"

    def _summing(self) -> Iterator[tuple[str, Rule, str]]:
        """The names whose style counts on something split around them, each with rule and axis.

        Not what an `sp_plan` says: there the sequence is split, whatever the parameters are.
        """
        for name, entry in self._uses():
            use = entry.uses[0]
            is_summing = use.style.wants_split == "around" and use.letter == use.style.whole_as
            if is_summing and not use.style.acts_on_forward and use.rule.section == SECTION:
                yield name, use.rule, use.axis
        for name, acting in self.table.acting():
            if acting.style.wants_split == "around" and acting.rule.section == SECTION:
                yield name, acting.rule, acting.axis

    def _check_inputs(self) -> None:
        """Warns of layers split by a rule on the parameter, which does nothing about the gradient of their input."""
        spreading: dict[str, set[str]] = {}
        for name, acting in self.table.acting():
            if acting.style.needs == "R":
                spreading.setdefault(name, set()).add(acting.axis)
            if acting.style.delivers == "R":  # what is beside it may be given that
                spreading.setdefault(name.rpartition(".")[0], set()).add(acting.axis)
        for name, entry in self._uses():
            use, owner = entry.uses[0], name.rpartition(".")[0]
            is_layer = self.spec.modules[owner].kind in use.style.serves and len(entry.info.shape) > 1
            if use.letter != "S" or use.style.needs != "R" or not is_layer:
                continue
            if not any(use.axis in spreading.get(each, ()) for each in prefixes(owner)):
                self._warn(
                    "PP119",
                    f"{use.rule.style} on a parameter splits it, and nothing sums the gradient of its module's input",
                    use.rule,
                    name=name,
                    found=str(entry.layout),
                    expected=f"the rule on {owner}, or a rule that sums the gradient on a module around it",
                    fix=f"write it on the module: `{use.rule.pattern.rpartition('.')[0]}: {use.rule.style}`",
                )

    def _check_buffers(self, name: str, module: ModuleInfo) -> None:
        """Warns of buffers with an element for each head, feature or expert of which a rank has a part only."""
        positions = {value for field, value in self.spec.fields_at(name).items() if "position" in field}
        acting = self.table.modules.get(name, ())
        given = [each for entry in acting if isinstance(each := entry.options.get("buffers"), Mapping)]
        split = {buffer for each in given for buffer in each}
        for buffer in self._buffers.get(name, ()):
            if buffer.name.rpartition(".")[2] in split:
                continue
            for size, entry in self._split_sizes(name, module):
                if size in buffer.shape and size > 1 and size not in positions:
                    self._warn(
                        "PP116",
                        f"the buffer has {size} elements for what {entry.rule.style} splits beside it, and stays whole",
                        entry.rule,
                        name=buffer.name,
                        found=str(list(buffer.shape)),
                        expected=f"code that takes this rank's part of it, as {entry.info.name} is {entry.layout}",
                        fix="write the block as `replicate`, or see that the module cuts the buffer itself",
                    )
                    break

    def _split_sizes(self, name: str, module: ModuleInfo) -> Iterator[tuple[int, ParameterEntry]]:
        """How many things of each kind the split weights of a module, and of the layers directly in it, are made of."""
        numbers = {**self.spec.fields_at(name), **module.counts}
        heads = [count for field, count in numbers.items() if field.startswith("num_") and "head" in field]
        children = [each for each in self._children.get(name, ()) if each.kind in ("linear", "convolution")]
        for owner in (module, *children):
            for entry in (self.table.parameters[each] for each in owner.parameters):
                for use, split in ((use, each) for use in entry.uses for each in entry.layout.splits):
                    if use.letter != "S" or use.axis != split.axis or (use.style.role and owner is not module):
                        continue
                    yield split.size, entry
                    if not use.style.role:
                        yield from ((count, entry) for count in heads if count and split.size % count == 0)
