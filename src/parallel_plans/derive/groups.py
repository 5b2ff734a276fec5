"""Groups: what is split together, because one cannot be split without the other, and what that costs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from torch import Tensor

from parallel_plans.derive.extents import PRODUCT, SUM, Extent, found, leaves
from parallel_plans.derive.learning import EMBEDDED, GIVEN, HANDED, Bound, Learned, Normed, Summed
from parallel_plans.derive.origins import origin_of
from parallel_plans.derive.step import Operation
from parallel_plans.model_spec import ModelSpec
from parallel_plans.table import wildcarded


@dataclass(frozen=True, kw_only=True)
class Part:
    """A stretch of a dim that is split on its own: its elements, and how many of them stay together.

    `is_whole` where every rank has all of it, and uses it on its own part of the others.
    """

    size: int
    unit: int
    is_whole: bool = False


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How a parameter is split: the dim, and its parts."""

    dim: int
    parts: tuple[Part, ...]

    @property
    def has_whole(self) -> bool:
        """Whether some part of it is on every rank."""
        return any(part.is_whole for part in self.parts)


@dataclass(frozen=True, kw_only=True)
class Taken:
    """What a rank takes of an input of a module: the dim, how long that is at least, and what of it stays together."""

    dim: int
    size: int
    unit: int


@dataclass(frozen=True, kw_only=True)
class Group:
    """What is split together.

    Args:
        extents: what is dealt over the ranks.
        cuts: parameter -> how it is split.
        sums: the modules whose products are then partial sums.
        norms: the modules whose statistics are then taken over the ranks.
        whole: the parameters that every rank has whole and uses on its part, so that their gradients are summed.
        bytes: of all parameters that it splits.
        uses: linear layer -> how many of its last output features every rank has whole and uses on its part.
        inputs: module -> its inputs that hold something for everything that is dealt, of which a rank takes its part.
        form: what it splits, and how: the same for a group of another model of the kind that does the same there.
    """

    extents: frozenset[Extent]
    cuts: dict[str, Cut]
    sums: frozenset[str]
    norms: frozenset[str]
    whole: frozenset[str]
    bytes: int
    uses: Mapping[str, int] = field(default_factory=dict)
    inputs: Mapping[str, Mapping[str, Taken]] = field(default_factory=dict)
    form: frozenset[tuple[str, int, tuple[bool, ...]]] = frozenset()

    @property
    def collectives(self) -> int:
        """How many a forward needs."""
        return len(self.sums) + len(self.norms)


class Refusal(Exception):
    """Why an extent that some parameter has cannot be split, and the module that shows it."""

    def __init__(self, why: str, module: str = "") -> None:
        super().__init__(why)
        self.why, self.module = why, module

    def __str__(self) -> str:
        return f"{self.why} (in {wildcarded(self.module)})" if self.module else self.why


COMMON = tuple(f"it {why}" for why in (EMBEDDED, GIVEN, HANDED))  # of the width that all layers share


class Groups:
    """The groups of a model, and why what is in none is in none."""

    def __init__(self, learned: Learned, spec: ModelSpec, tp: int) -> None:
        self.learned, self.spec, self.tp = learned, spec, tp
        self._known: dict[Extent, Group | Refusal] = {}
        self._leaves: dict[int, frozenset[Extent]] = {}  # of tensors, by their ids: by now all is learned

    def tried(self, leaf: Extent) -> Group | Refusal:
        """The group of an extent, or why it cannot be split."""
        if leaf not in self._known:
            try:
                group = self.of(leaf)
            except Refusal as refusal:
                self._known[leaf] = refusal
            else:
                self._known.update(dict.fromkeys(group.extents, group))
        return self._known[leaf]

    @cached_property
    def found(self) -> list[Group]:
        """Every group, those first that split the most with the fewest collectives."""
        result: dict[int, Group] = {}
        for dims in self.learned.parameters.values():
            for leaf in (leaf for dim in dims for leaf in leaves(dim) if leaf.size > 1):
                group = self.tried(leaf)
                if isinstance(group, Group):
                    result.setdefault(id(group), group)
        return sorted(result.values(), key=lambda group: -group.bytes / (1 + group.collectives))

    def twin(self, group: Group) -> Group | None:
        """The group here that does what one of another model of the kind does there."""
        alike = sorted(self.found, key=lambda each: -len(each.form & group.form))
        return next((each for each in alike if each.form & group.form and not _differ(each, group)), None)

    def why_whole(self, name: str) -> str | None:
        """Why no dim of a parameter is split; None where the reason is only that it is as wide as what comes in."""
        told = {}
        for at, dim in enumerate(self.learned.parameters[name]):
            refusals = [each for leaf in leaves(dim) if isinstance(each := self.tried(leaf), Refusal)]
            own = [str(each) for each in refusals if each.why not in COMMON]
            if own:
                told[at] = own[0]
        return "; ".join(f"dim {at}: {why}" for at, why in told.items()) or None

    def of(self, leaf: Extent) -> Group:
        """The group of an extent; raises `Refusal` where it cannot be split."""
        extents = self._closed(leaf)
        cuts: dict[str, Cut] = {}
        for name, dims in self.learned.parameters.items():
            made = [Cut(dim=at, parts=tuple(parts)) for at, dim in enumerate(dims) if (parts := parts_of(dim, extents))]
            if len(made) > 1:
                raise Refusal(f"two dims of {name} would be split at once")
            if made:
                cuts[name] = made[0]
        marks = {mark for extent in extents for mark in extent.marks}
        summed = {mark.parameter for mark in marks if isinstance(mark, Summed)}
        if half := sorted(name for name, cut in cuts.items() if cut.has_whole and name in summed):
            raise Refusal(f"only some parts of what {wildcarded(half[0])} sums over would be split")
        sums = frozenset(mark.module for mark in marks if isinstance(mark, Summed))
        norms = frozenset(mark.module for mark in marks if isinstance(mark, Normed))
        uses: dict[str, int] = {}
        whole = frozenset(self._whole(extents, cuts, norms, uses))
        size = sum(self.spec.parameters[name].bytes for name in cuts if name not in self.spec.tied)
        return Group(
            extents=extents,
            cuts=cuts,
            sums=sums,
            norms=norms,
            whole=whole,
            bytes=size,
            uses=uses,
            inputs=dict(self._inputs(extents)),
            form=frozenset(
                (self.learned.pattern(name), cut.dim, tuple(part.is_whole for part in cut.parts))
                for name, cut in cuts.items()
            ),
        )

    def _inputs(self, extents: frozenset[Extent]) -> Iterator[tuple[str, dict[str, Taken]]]:
        """The modules with inputs that hold something for everything that is dealt."""
        for module, inputs in self.learned.handed.items():
            taken = {}
            for name, dims in inputs.items():
                for at, dim in enumerate(dims):
                    if parts := parts_of(dim, extents):
                        if len(set(parts)) > 1:
                            raise Refusal(f"the input {name} is made of several parts", module=module)
                        taken[name] = Taken(dim=at, size=parts[0].size, unit=parts[0].unit)
            if taken:
                yield module, taken

    def _closed(self, leaf: Extent) -> frozenset[Extent]:
        """The extent, with those that stand beside it in fused parameters and can be split, each on its own."""
        extents = {leaf}
        _check_free(extents, self.tp)
        for _ in range(8):
            more: set[Extent] = set()
            for dims in self.learned.parameters.values():
                for dim in dims:
                    more |= {each for each in _beside(dim, extents) if self._can_join(each, extents)}
            if more <= extents:
                return frozenset(extents)
            extents |= more
        raise Refusal("too much would have to be split at once")

    def _can_join(self, extent: Extent, extents: set[Extent]) -> bool:
        """Whether an extent can be split beside these: nothing binds it, and no dim has both as factors."""
        among = {extent, *extents}
        if extent in extents or any(_is_twice(dim, among) for dims in self.learned.parameters.values() for dim in dims):
            return extent in extents
        try:
            _check_free([extent], self.tp)
        except Refusal:
            return False
        return True

    # -- what meets what is split

    def _whole(
        self, extents: frozenset[Extent], cuts: dict[str, Cut], norms: frozenset[str], uses: dict[str, int]
    ) -> Iterator[str]:
        """The whole parameters that meet something split; `uses` is filled with the layers whose output does.

        Raises:
            Refusal: another value does, whose gradient would be a part of the sum on each rank.
        """
        shared = frozenset(name for name, cut in cuts.items() if cut.has_whole)
        for op in self.learned.step.operations:
            tensors = op.tensors
            touched = [self._holds(each, extents) for each in tensors]
            gives = any(self._holds(each, extents) for each in op.results)
            if not (gives or any(touched)) or op.name in _IN_PLACE:
                continue
            summed = not gives  # a bias in it is added afterwards
            is_shared = op.module in norms  # statistics that ranks take together
            for tensor, is_split in zip(tensors, touched, strict=True):
                if is_split or is_shared or not tensor.requires_grad:
                    continue
                name = self.learned.parameter_of(tensor)
                if name is not None and not summed:
                    yield name
                elif name is None and not self._is_handed_over(op, tensors, cuts):
                    origin = origin_of(self.learned, self.spec, tensor, shared)
                    if origin is None:
                        raise Refusal(f"`{op.name}` meets a value that stays whole", module=op.module)
                    yield from origin.parameters
                    if origin.module is not None:
                        uses[origin.module] = max(origin.features, uses.get(origin.module, 0))

    def _holds(self, tensor: Tensor, extents: frozenset[Extent]) -> bool:
        """Whether a tensor has a dim, or part of one, that is among these."""
        if id(tensor) not in self._leaves:
            self._leaves[id(tensor)] = frozenset(leaf for dim in self.learned.of(tensor) for leaf in leaves(dim))
        return not extents.isdisjoint(self._leaves[id(tensor)])

    def _is_handed_over(self, op: Operation, tensors: Sequence[Tensor], cuts: dict[str, Cut]) -> bool:
        """Whether a whole value meets a split weight where a style takes care of its gradient."""
        owner = self.spec.modules.get(op.module)
        if owner is not None and owner.kind in ("linear", "embedding"):
            return True
        own = () if owner is None else owner.parameters
        return any(name in cuts and len(self.learned.parameters[name]) == 3 for name in own)


_IN_PLACE = frozenset({"detach", "alias"})


def _check_free(extents: Iterable[Extent], tp: int) -> None:
    for extent in extents:
        bound = sorted(
            (mark for mark in extent.marks if isinstance(mark, Bound)), key=lambda mark: (mark.module == "", mark.why)
        )
        if bound:
            raise Refusal(f"it {bound[0].why}", module=bound[0].module)
        if any(isinstance(mark, tuple) for mark in extent.marks):
            raise Refusal("it is viewed in two ways that do not fit")
        if extent.size < tp:
            raise Refusal(f"there are only {extent.size} to deal over {tp} ranks")


def _is_twice(extent: Extent, among: set[Extent]) -> bool:
    """Whether two factors of a dim would be dealt at once."""
    extent = found(extent)
    pieces = [found(piece) for piece in extent.pieces]
    has = [any(leaf in among for leaf in leaves(piece)) for piece in pieces]
    return (extent.form == PRODUCT and sum(has) > 1) or any(_is_twice(piece, among) for piece in pieces)


def parts_of(extent: Extent, among: Iterable[Extent]) -> list[Part]:
    """The parts of a dim in which these are dealt; none where it has none of them.

    What stands beside them and has none of them is a part that every rank has whole.
    """
    extent, wanted = found(extent), set(among)
    if extent.form is None:
        return [Part(size=extent.size, unit=1)] if extent in wanted else []
    pieces = [found(piece) for piece in extent.pieces]
    inner = [parts_of(piece, wanted) for piece in pieces]
    if not any(inner):
        return []
    if extent.form == SUM:
        whole = ([Part(size=piece.size, unit=piece.size, is_whole=True)] for piece in pieces)
        return [part for parts, all_of in zip(inner, whole, strict=True) for part in parts or all_of]
    assert extent.form == PRODUCT
    at = next(place for place, parts in enumerate(inner) if parts)
    before = _times(pieces[:at])
    after = _times(pieces[at + 1 :])
    return [replace(part, size=part.size * after, unit=part.unit * after) for part in inner[at]] * before


def _times(pieces: Iterable[Extent]) -> int:
    result = 1
    for piece in pieces:
        result *= piece.size
    return result


def _beside(extent: Extent, among: set[Extent]) -> set[Extent]:
    """For the parts of a sum that have none of these, beside others that have: what of them could be dealt."""
    extent = found(extent)
    pieces = [found(piece) for piece in extent.pieces]
    result = {leaf for piece in pieces for leaf in _beside(piece, among)}
    if extent.form != SUM:
        return result
    has = [any(leaf in among for leaf in leaves(piece)) for piece in pieces]
    if any(has):
        result |= {_first_free(piece) for piece, it_has in zip(pieces, has, strict=True) if not it_has}
    return result


def _first_free(extent: Extent) -> Extent:
    """The outermost thing that an extent is made of and that is not bound; the outermost of all where there is none."""
    all_of = list(leaves(extent))
    free = (leaf for leaf in all_of if not any(isinstance(mark, (Bound, tuple)) for mark in leaf.marks))
    return next(free, all_of[0])


def _differ(one: Group, other: Group) -> bool:
    """Whether two groups split some parameter in different ways: layers of a kind may lack what others have."""
    own, others = ({name: (dim, parts) for name, dim, parts in each.form} for each in (one, other))
    return any(own[name] != others[name] for name in own.keys() & others.keys())


def is_worth_it(group: Group) -> bool:
    """Whether a group splits something that is summed over: what nothing is made of need not be dealt."""
    return bool(group.cuts) and group.collectives > 0


def chosen(groups: Groups) -> list[Group]:
    """The groups that are taken: greedily, none that splits what another splits already."""
    taken: list[Group] = []
    ruled: set[str] = set()
    for group in groups.found:
        if not is_worth_it(group) or ruled & set(group.cuts):
            continue
        taken.append(group)
        ruled |= set(group.cuts)
    return taken
