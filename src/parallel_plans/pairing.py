"""Weights that work together must be cut alike: the heads of an attention, the halves of an MLP, an expert's weights.

Which work together is told by names that transformers gives everywhere, and by widths. Where that leaves a doubt,
nothing is said: `verify_plan` looks at what the model computes. Of weights that differ the odd one is named.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from parallel_plans.accounting import Report
from parallel_plans.attention_heads import KEY, OUTPUT, QUERY, Attention
from parallel_plans.counts import is_of_each
from parallel_plans.pieces import Piece, odd_one, pairs_up
from parallel_plans.table import Table


class Pairing:
    """The findings about weights that work together and are cut differently.

    Args:
        table: the plan, every rule of which fits by itself.
    """

    def __init__(self, report: Report, table: Table) -> None:
        self.report, self.table, self.spec = report, table, table.spec
        self.tried: dict[tuple[object, ...], str] = {}

    def check(self) -> None:
        """Reports all of them."""
        for module, pieces in self._linears().items():
            query = [piece for last, piece in pieces.items() if last in QUERY]
            key = [piece for last, piece in pieces.items() if last in KEY]
            if query and key:
                output = [piece for last, piece in pieces.items() if last in OUTPUT]
                Attention(self.report, self.spec, module, query[-1], key, output, self._counts(module)).check()
            else:
                self._check_widths(list(pieces.values()))
        for wide, narrow in self._stacks():
            self._check_experts(wide, narrow)

    def _piece(self, name: str) -> Piece:
        entry = self.table.parameters[name]
        ranks = self.table.sizes[entry.uses[0].axis]
        proportions = self.table.plan.proportions
        return Piece(name=name, entry=entry, spec=self.spec, ranks=ranks, tried=self.tried, proportions=proportions)

    def _linears(self) -> dict[str, dict[str, Piece]]:
        """Module -> the last segment of each linear layer directly in it -> its weight, where the axis has ranks."""
        found: dict[str, dict[str, Piece]] = {}
        for name, module in self.spec.modules.items():
            weight = f"{name}.weight"
            if module.kind == "linear" and not module.is_transposed:
                parent, _, last = name.rpartition(".")
                piece = self._piece(weight)
                if piece.ranks > 1:
                    found.setdefault(parent, {})[last] = piece
        return found

    def _counts(self, module: str) -> bool:
        """Whether the plan sets numbers of the module, other than those that follow from how keys and values lie."""
        given = (entry.rule.options.get("counts") for entry in self.table.modules.get(module, ()))
        return any(
            not is_of_each(count) for counts in given if isinstance(counts, Mapping) for count in counts.values()
        )

    def _check_widths(self, pieces: Sequence[Piece]) -> None:
        """Within one module, features that are handed on in parts and taken in parts are the same ones.

        They are told by their number, or by twice that where a rule says that two parts are fused.
        """
        told: dict[str, tuple[Piece, Piece]] = {}
        for taker in pieces:
            for giver in pieces:
                one, other = giver.split, taker.split
                if not giver.is_given_on or not taker.takes_parts or one is None or other is None:
                    continue
                is_fused = one.size == 2 * other.size and giver.parts == 2
                if (one.size == other.size or is_fused) and not pairs_up(one, other):
                    odd = odd_one(giver, taker, pieces)
                    told.setdefault(odd.name, (taker if odd is giver else giver, odd))
        for model, odd in told.values():
            self._differ(model, odd)

    def _differ(self, model: Piece, odd: Piece) -> None:
        def holds(ranks: int) -> bool:
            splits = model.at(ranks), odd.at(ranks)
            return splits[0] is not None and splits[1] is not None and pairs_up(splits[0], splits[1])

        self._tell(
            odd,
            f"{odd.use.rule.style} gives a rank other features here than {model.use.rule.style} does in {model.name}",
            expected=f"the same features on a rank as in {model.entry.layout} of {model.name}",
            fix=f"give both the same `unit`, or {model.sizes(holds, 'width')}",
        )

    def _tell(self, piece: Piece, message: str, *, expected: str, fix: str, code: str = "PP204") -> None:
        found = str(piece.entry.layout)
        self.report.add(
            code, message, piece.use.rule, level="geometry", name=piece.name, found=found, expected=expected, fix=fix
        )

    def _stacks(self) -> Iterator[tuple[Piece, Piece]]:
        """The two weights of each module of experts, the wider first: gate and up projection fused, and the down."""
        for module in self.spec.modules.values():
            names = [name for name in module.parameters if len(self.spec.parameters[name].shape) == 3]
            if module.kind != "other" or len(names) != 2:
                continue
            one, other = sorted(map(self._piece, names), key=lambda piece: -piece.entry.info.bytes)
            if one.ranks > 1 and one.entry.info.shape[0] == other.entry.info.shape[0]:
                yield one, other

    def _check_experts(self, wide: Piece, narrow: Piece) -> None:
        """Fused gate and up, `[experts, 2*ffn, hidden]` or transposed, and down are both split along ffn, and alike."""
        if (inner := _inner(wide, narrow)) is None or (wide.split is None and narrow.split is None):
            return
        for piece, other, size in ((wide, narrow, 2 * inner), (narrow, wide, inner)):
            if piece.split is None:
                self._tell(
                    piece,
                    f"{piece.use.rule.style} leaves this weight of the experts whole, and {other.name} is split",
                    expected=f"the dim of {size} split over {piece.use.axis}",
                    fix="write a style that splits it, or `replicate` for all weights of the experts",
                )
                return
            if piece.split.size != size:
                dim = next(dim for dim in (1, 2) if piece.entry.info.shape[dim] == size) - 3
                self._tell(
                    piece,
                    f"{piece.use.rule.style} splits dim {piece.split.dim} of {piece.split.size}, which is that of the "
                    "tokens' own features, and these are whole",
                    expected=f"the dim of {size} split over {piece.use.axis}",
                    fix=f"write `dim: {dim}`",
                    code="PP206",
                )
                return
        assert wide.split is not None
        assert narrow.split is not None
        if not pairs_up(wide.split, narrow.split):
            odd = odd_one(wide, narrow, ())
            self._differ(wide if odd is narrow else narrow, odd)


def _inner(wide: Piece, narrow: Piece) -> int | None:
    """An expert's own features: the dim that is twice as wide where gate and up are fused; None where none is sure."""
    one, other = wide.entry.info.shape[1:], narrow.entry.info.shape[1:]
    readings = {
        other[j] for i in (0, 1) for j in (0, 1) if one[i] == 2 * other[j] and one[1 - i] == other[1 - j]
    }  # fmt: skip
    return readings.pop() if len(readings) == 1 else None
