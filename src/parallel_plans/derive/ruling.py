"""From groups to the rules of a plan: the style of every module and parameter, with its options."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from parallel_plans.derive.groups import Cut, Group, Part, Taken
from parallel_plans.derive.learning import EMBEDDED, GIVEN, HANDED, Bound, Learned, Summed
from parallel_plans.derive.naming import Names, Values
from parallel_plans.derive.patterns import Patterns
from parallel_plans.model_spec import ModelSpec, ModuleInfo
from parallel_plans.table import wildcarded

FEW_ROWS = 32  # of a table, or features of a head: fewer are not worth a collective


@dataclass(frozen=True, kw_only=True)
class Line:
    """A rule to be written, the shape that its comment shows, and what is to be said above it."""

    pattern: str
    style: str
    options: Mapping[str, object] = field(default_factory=dict)
    shape: str = ""
    note: str = ""

    @property
    def value(self) -> object:
        """What stands behind its name in a plan."""
        return {"style": self.style, **self.options} if self.options else self.style


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A model of the kind that is asked about, what a step of it says, and the groups in it that are taken."""

    learned: Learned
    spec: ModelSpec
    groups: Sequence[Group] = ()

    def cut(self, name: str) -> Cut | None:
        """How a parameter is split; None where it stays whole."""
        return next((group.cuts[name] for group in self.groups if name in group.cuts), None)


class Unwritable(Exception):
    """A size that no expression in the config's fields has."""


class Ruling:
    """The rules of one model.

    Args:
        first: the model that is asked about.
        others: small ones of its kind, by which sizes are named.
        counts: module pattern -> attribute -> how much of it makes a unit, by sample.
        splits_around: whether the table of tokens and the head are split too.
        why_whole: parameter -> why it is not split, where more is to be said than that nothing asks for it.
    """

    def __init__(
        self,
        first: Sample,
        others: Sequence[Sample],
        names: Names,
        counts: Mapping[str, Mapping[str, Values]],
        why_whole: Callable[[str], str | None] = lambda name: None,
        splits_around: bool = True,
    ) -> None:
        self.first, self.others, self.names, self.counts = first, others, names, counts
        self.pattern = first.learned.pattern
        self.spec, self.why_whole, self.splits_around = first.spec, why_whole, splits_around
        self.whole = frozenset().union(*(group.whole for group in first.groups))
        self.uses = {name: size for group in first.groups for name, size in group.uses.items()}
        self.norms = frozenset().union(*(group.norms for group in first.groups))

    def lines(self) -> list[Line]:
        """The rules of `tp_plan`, in the order of the model's modules."""
        made: dict[str, Line] = {}
        for module in self.spec.modules.values():
            own = list(module.parameters)
            for line in self._of_module(module, own) if own else ():
                made.setdefault(line.pattern, line)
            pattern = self.pattern(module.name)
            if pattern not in made and (kept := self._kept(pattern)) is not None:
                made[pattern] = kept
        return list(made.values())

    def _kept(self, pattern: str) -> Line | None:
        """The rule of a module that knows its whole width: of the numbers that it keeps, and of its inputs."""
        counts: dict[str, object] = {"counts": self._counts(pattern)} if pattern in self.counts else {}
        inputs = {name: self._taken(pattern, name, own) for name, own in _inputs(self.first, pattern).items()}
        if inputs:
            return Line(pattern=pattern, style="split_inputs", options={"inputs": inputs, **counts})
        return Line(pattern=pattern, style="local_counts", options=counts) if counts else None

    def _taken(self, pattern: str, name: str, own: Taken) -> dict[str, object]:
        """How an input is dealt, as a plan writes it."""
        all_of = [own, *(_inputs(other, pattern).get(name) for other in self.others)]
        what = f"the input {name} of {pattern}"
        size = self._expression(tuple(None if each is None else each.size for each in all_of), what)
        if own.unit == 1:
            return {"dim": own.dim, "size": size}
        unit = self._expression(tuple(None if each is None else each.unit for each in all_of), what)
        return {"dim": own.dim, "size": size, "unit": unit}

    def _expression(self, values: Values, what: str) -> str | int:
        """A size of heads, or of something else that is dealt, as a plan writes it.

        Raises:
            Unwritable: no expression has it in all models.
        """
        text = self.names.text(values, is_head=True)
        if text is None:
            raise Unwritable(f"no expression in the config's fields is {values} for {what}")
        return text

    def _of_module(self, module: ModuleInfo, own: Sequence[str]) -> Iterator[Line]:
        cuts = {name: cut for name in own if (cut := self.first.cut(name)) is not None}
        pattern = self.pattern(module.name)
        if any(len(self.spec.parameters[name].shape) == 3 for name in cuts) and module.kind == "other":
            yield from self._of_experts(pattern, own, cuts)
        elif cuts and module.name in self.norms:
            unit = self._unit(own[0], cuts[own[0]])
            options = {} if unit is None else {"unit": unit}
            yield Line(pattern=pattern, style="sharded_norm", options=options, shape=self._shape(own[0]))
        elif module.name in self.uses:
            yield self._used(module, pattern)
        elif cuts and self._is_run(module) and (weight := f"{module.name}.weight") in cuts:
            yield self._linear(pattern, weight, cuts[weight])
        elif cuts:
            for name in own:
                yield self._bare(name, cuts.get(name))
        else:
            yield from self._of_whole(module, pattern, own)

    def _used(self, module: ModuleInfo, pattern: str) -> Line:
        """The rule of a linear layer of whose output each rank uses the same on its own part."""
        weight = f"{module.name}.weight"
        cut = self.first.cut(weight)
        if cut is not None:  # it sums over what is split
            unit = self._options(weight, cut)
            return Line(pattern=pattern, style="rowwise_for_use", options=unit, shape=self._shape(weight))
        values: list[int | None] = [self.uses[module.name]]
        for other in self.others:
            uses = {name: size for group in other.groups for name, size in group.uses.items()}
            twin = next((name for name in uses if self.pattern(name) == pattern), None)
            values.append(None if twin is None else uses[twin])
        text = self._expression(tuple(values), module.name)
        return Line(pattern=pattern, style="mla_kv_a_proj", options={"rope": text}, shape=self._shape(weight))

    def _is_run(self, module: ModuleInfo) -> bool:
        """Whether a module is a linear layer that runs as one: some code takes its weight and multiplies by itself."""
        return module.kind == "linear" and module.name in self.first.learned.step.called

    def _of_whole(self, module: ModuleInfo, pattern: str, own: Sequence[str]) -> Iterator[Line]:
        if any(self._is_tied_to_head(name) for name in own):
            for name in own:
                style = "colwise" if self._is_tied_to_head(name) else "replicate"
                yield Line(pattern=self.pattern(name), style=style)
            return
        summed = [name in self.whole for name in own]
        style = "replicated_with_grad_allreduce"
        if all(summed):
            note = "every rank uses all of it on its own part, so its gradient is the sum over the ranks"
            yield Line(pattern=pattern, style=style, shape=self._shape(own[0]), note=note)
        elif any(summed):
            for name, is_summed in zip(own, summed, strict=True):
                yield Line(
                    pattern=self.pattern(name), style=style if is_summed else "replicate", shape=self._shape(name)
                )
        elif self._is_large_table(module, own):
            yield Line(pattern=pattern, style="embedding_rowwise", shape=self._shape(own[0], 0))
        elif self._is_head(module):
            yield Line(pattern=pattern, style="colwise_gather_output", shape=self._shape(f"{module.name}.weight", 0))
        else:
            yield self._replicate(pattern, own)

    def _replicate(self, pattern: str, own: Sequence[str]) -> Line:
        """The rule of a module whose parameters stay whole, with the shape of the largest, and why it is not split."""
        largest = max(own, key=lambda name: self.spec.parameters[name].bytes)
        if len(self.spec.parameters[largest].shape) < 2:
            return Line(pattern=pattern, style="replicate")
        why = self.why_whole(largest)
        note = "" if why is None else f"whole: {why}"
        return Line(pattern=pattern, style="replicate", shape=self._shape(largest), note=note)

    # -- modules around the layers

    def _is_large_table(self, module: ModuleInfo, own: Sequence[str]) -> bool:
        """Whether an embedding looks up what comes into the model, in a table of many rows."""
        if module.kind != "embedding" or "*" in wildcarded(module.name):
            return False
        is_asked = self.splits_around and module.name in self.first.learned.step.looking_up
        return is_asked and self.spec.parameters[own[0]].shape[0] >= FEW_ROWS

    def _is_head(self, module: ModuleInfo) -> bool:
        """Whether a linear layer gives what the model gives, as wide as a vocabulary."""
        if module.kind != "linear" or "*" in wildcarded(module.name) or not self.splits_around:
            return False
        weight = f"{module.name}.weight"
        if self.spec.parameters[weight].shape[0] < FEW_ROWS:
            return False
        if weight in self.spec.tied or weight in self.spec.tied.values():
            return True
        gives = self.first.learned.parameters[weight][self.spec.is_transposed(weight)]
        why = {mark.why for mark in _marks(gives) if isinstance(mark, Bound)}
        return GIVEN in why and not why & {EMBEDDED, HANDED}

    def _is_tied_to_head(self, name: str) -> bool:
        """Whether a bias stands outside of the head that adds it too (BERT): it is split with that."""
        other = self.spec.tied.get(name) or next((each for each, of in self.spec.tied.items() if of == name), None)
        if other is None or len(self.spec.parameters[name].shape) != 1:
            return False
        own, owner = (self.spec.modules[each.rpartition(".")[0]] for each in (name, other))
        return self._is_head(owner) and not self._is_head(own)

    # -- styles that split

    def _linear(self, pattern: str, weight: str, cut: Cut) -> Line:
        style = ("colwise", "rowwise")[cut.dim ^ self.spec.is_transposed(weight)]
        options = self._options(weight, cut)
        style = f"packed_{style}" if len(cut.parts) > 1 else style
        return Line(pattern=pattern, style=style, options=options, shape=self._shape(weight))

    def _bare(self, name: str, cut: Cut | None) -> Line:
        """A rule on a parameter of a module that is no layer, or a convolution."""
        if cut is None:
            style = "replicated_with_grad_allreduce" if name in self.whole else "replicate"
            return Line(pattern=self.pattern(name), style=style)
        count = len(self.spec.parameters[name].shape)
        options: dict[str, object] = {} if cut.dim == max(0, count - 2) else {"dim": cut.dim}
        style = "packed_colwise" if len(cut.parts) > 1 else "colwise"
        options |= self._options(name, cut)
        return Line(pattern=self.pattern(name), style=style, options=options, shape=self._shape(name))

    def _options(self, name: str, cut: Cut) -> dict[str, object]:
        options: dict[str, object] = {}
        sizes = [part.size for part in cut.parts]
        if len(sizes) > 1 and len(set(cut.parts)) > 1:
            options["parts"] = [self._named(name, at, "size") for at in range(len(sizes))]
        elif len(sizes) > 2:
            options["parts"] = len(sizes)
        unit = self._unit(name, cut)
        options |= {} if unit is None else {"unit": unit}
        return options | ({"shared": [part.is_whole for part in cut.parts]} if cut.has_whole else {})

    def _unit(self, name: str, cut: Cut) -> object | None:
        if all(part.unit == 1 for part in cut.parts):
            return None
        if len(set(cut.parts)) == 1:
            return self._named(name, 0, "unit")
        return [self._named(name, at, "unit") for at in range(len(cut.parts))]

    def _named(self, name: str, at: int, what: str) -> str | int:
        """A size of a part as a plan writes it."""
        return self._expression(self._values(name, at, what), name)

    def _values(self, name: str, at: int, what: str) -> Values:
        found = [getattr(self._part(self.first, name, at), what)]
        for other in self.others:
            twin = _twin(name, other.spec.parameters, self.pattern)
            cut = None if twin is None else other.cut(twin)
            found.append(None if cut is None or at >= len(cut.parts) else getattr(cut.parts[at], what))
        return tuple(found)

    @staticmethod
    def _part(sample: Sample, name: str, at: int) -> Part:
        cut = sample.cut(name)
        assert cut is not None
        return cut.parts[at]

    # -- experts

    def _of_experts(self, pattern: str, own: Sequence[str], cuts: Mapping[str, Cut]) -> Iterator[Line]:
        summed = {
            mark.parameter
            for group in self.first.groups
            for extent in group.extents
            for mark in extent.marks
            if isinstance(mark, Summed)
        }
        for name in own:
            if name not in cuts:
                yield Line(pattern=self.pattern(name), style="moe_tp_down_rowwise", shape=self._shape(name))
                continue
            cut, count = cuts[name], len(self.spec.parameters[name].shape)
            style = "moe_tp_down_rowwise" if name in summed else "moe_tp_gate_up_colwise"
            usual = count - 1 if name in summed or count == 2 else count - 2
            options: dict[str, object] = {} if cut.dim == usual else {"dim": cut.dim - count}
            if name not in summed:
                options |= self._fused(cut)
            yield Line(pattern=self.pattern(name), style=style, options=options, shape=self._shape(name))
        counted = {"counts": self._counts(pattern)} if pattern in self.counts else {}
        yield Line(pattern=pattern, style="moe_experts_allreduce", options=counted)

    @staticmethod
    def _fused(cut: Cut) -> dict[str, object]:
        if len(cut.parts) != 1:
            return {} if len(cut.parts) == 2 else {"parts": len(cut.parts)}
        return {"interleaved": True} if cut.parts[0].unit == 2 else {"parts": 1}

    # -- comments and counts

    def _counts(self, pattern: str) -> dict[str, object]:
        own = self.counts[pattern].items()
        return {attribute: self._expression(values, f"{pattern}.{attribute}") for attribute, values in own}

    def shape_over(self, name: str, at: int, axis: str) -> str:
        """The shape of a parameter of which a dim is split over an axis, and nothing else."""
        count = len(self.spec.parameters[name].shape)
        words = [self.names.short(self._dim(name, dim)) + f"@{axis}" * (dim == at) for dim in range(count)]
        return f"[{', '.join(words)}]"

    def _shape(self, name: str, split: int | None = None) -> str:
        """The shape of a parameter as comments write it; `split` is a dim that its style splits by itself."""
        cut = self.first.cut(name)
        cut = cut if split is None else Cut(dim=split, parts=())
        shown = []
        for at in range(len(self.spec.parameters[name].shape)):
            is_cut = cut is not None and cut.dim == at
            if cut is not None and is_cut and len(cut.parts) > 1:
                shown.append(self._sum(name, cut))
            else:
                is_head = cut is not None and is_cut and any(part.unit > 1 for part in cut.parts)
                shown.append(self.names.short(self._dim(name, at), is_head) + "@tp" * is_cut)
        return f"[{', '.join(shown)}]"

    def _sum(self, name: str, cut: Cut) -> str:
        sizes = [self.names.short(self._values(name, at, "size"), is_head=True) for at in range(len(cut.parts))]
        parts = [(size, "" if part.is_whole else "@tp") for size, part in zip(sizes, cut.parts, strict=True)]
        counted = {part: parts.count(part) for part in parts}
        return " + ".join(
            f"{size if times == 1 else f'{times}*{size}'}{mark}" for (size, mark), times in counted.items()
        )

    def _dim(self, name: str, at: int) -> Values:
        found: list[int | None] = [self.spec.parameters[name].shape[at]]
        for other in self.others:
            twin = _twin(name, other.spec.parameters, self.pattern)
            found.append(None if twin is None else other.spec.parameters[twin].shape[at])
        return tuple(found)


def _twin(name: str, among: Iterable[str], pattern_of: Patterns) -> str | None:
    """The parameter of another model of the kind that has the same place in a layer."""
    pattern = pattern_of(name)
    return next((other for other in among if pattern_of(other) == pattern), None)


def _inputs(sample: Sample, pattern: str) -> Mapping[str, Taken]:
    """The inputs of a kind of modules of which a rank takes its part."""
    found: dict[str, Taken] = {}
    for group in sample.groups:
        for module, taken in group.inputs.items():
            if sample.learned.pattern(module) == pattern:
                found |= taken
    return found


def _marks(extent: object) -> set[object]:
    from parallel_plans.derive.extents import Extent, leaves

    assert isinstance(extent, Extent)
    return {mark for leaf in leaves(extent) for mark in leaf.marks}
