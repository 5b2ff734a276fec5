"""The projections of an attention must be cut alike: heads whole on a rank, and queries with the keys they meet."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from parallel_plans.accounting import Report
from parallel_plans.geometry import CannotSplit
from parallel_plans.layouts import Split
from parallel_plans.model_spec import ModelSpec
from parallel_plans.pieces import Piece, is_cut_at, is_in_proportion, units_on

QUERY = ("q_proj", "q_b_proj", "query", "wq", "q_lin")
KEY = ("k_proj", "v_proj", "kv_b_proj", "key", "value", "wk", "wv", "k_lin", "v_lin")
WIDTHS = ("head_dim", "v_head_dim")  # what a module calls the features of a head, and of one of values
OUTPUT = ("o_proj", "out_proj", "wo", "dense", "out_lin")


class Attention:
    """One attention: its query, what goes with it, and the heads that a rank must have whole.

    Args:
        key: the projections of keys and values; `output` may be none.
        has_counts: whether the plan sets numbers of the module, of heads for instance.
    """

    def __init__(
        self,
        report: Report,
        spec: ModelSpec,
        module: str,
        query: Piece,
        key: Sequence[Piece],
        output: Sequence[Piece],
        has_counts: bool,
    ) -> None:
        self.report, self.query, self.key, self.output, self.has_counts = report, query, key, output, has_counts
        fields, counts = spec.fields_at(query.name), spec.modules[module].counts
        self.heads = fields.get("num_attention_heads", 0)
        self.groups = fields.get("num_key_value_heads", 0)
        self.widths = {counts[each] for each in WIDTHS if each in counts}

    def check(self) -> None:
        """Reports heads that a rank has in part, and ranks that have other heads of one than of another."""
        if not self._is_understood():
            return
        for piece in self.key:
            if piece.is_given_on != self.query.is_given_on:
                self._check_whole(piece)
        pieces = [piece for piece in (self.query, *self.key) if piece.is_given_on]
        pieces += [piece for piece in self.output if piece.takes_parts and self._goes_with_query(piece)]
        sound = [piece for piece in pieces if self._has_whole_heads(piece)]
        if len(sound) == len(pieces) and any(piece in self.key for piece in pieces):
            self._check_shares(pieces)

    def _goes_with_query(self, output: Piece) -> bool:
        """Whether a rank's features of an output are those of its query heads; not where these are fused of parts."""
        return self.query.is_given_on and output.parts == self.query.parts

    def _is_understood(self) -> bool:
        """Whether the widths are what the config's numbers of heads make of them."""
        if not self.heads or not self.groups or self.heads % self.groups:
            return False
        outputs = [piece.entry.info.shape[1] % self.heads for piece in self.output]
        if self.query.entry.info.shape[0] % self.heads or any(outputs):
            return False
        widths = [divmod(piece.entry.info.shape[0], self.groups) for piece in self.key]
        return all(rest == 0 and (not self.widths or width in self.widths) for width, rest in widths)

    def _head(self, piece: Piece) -> tuple[int, int]:
        """How many heads the weight is made of, and the features of one."""
        dim = 1 if piece in self.output else 0
        heads = self.groups if piece in self.key else self.heads
        return heads, piece.entry.info.shape[dim] // heads

    def _has_whole_heads(self, piece: Piece) -> bool:
        heads, width = self._head(piece)
        if piece.split is None or is_cut_at(piece.split, width):
            return True

        def holds(ranks: int) -> bool:
            split = piece.at(ranks)
            return split is not None and is_cut_at(split, width)

        self._tell(
            piece,
            "PP205",
            f"{piece.use.rule.style} cuts a head in two",
            expected=f"whole heads of {width} on every rank: {heads} heads, {piece.use.axis} = {piece.ranks}",
            fix=self._in_units(piece, holds, "head"),
        )
        return False

    def _unit(self, piece: Piece) -> int:
        """The features that go with one key/value head."""
        heads, width = self._head(piece)
        return width * heads // self.groups

    def _in_units(self, piece: Piece, holds: Callable[[int], bool], what: object) -> str:
        """What would do: units, where there are as many key/value heads as ranks, and other numbers of ranks."""
        unit = self._unit(piece)
        try:
            piece.at(piece.ranks, unit)
        except CannotSplit:
            return piece.sizes(holds, what)
        return f"give `unit: {unit}`, what goes with one key/value head, or {piece.sizes(holds, what)}"

    def _go_together(self, one: Piece, split: Split | None, other: Piece, others: Split | None) -> bool:
        """Whether every rank holds the same heads of both: queries and keys meet where they are of one key/value head.

        Ranks that share a key/value head have other queries of it, so that their shares of the two differ.
        """
        if (one in self.key) == (other in self.key) or split is None or others is None:
            return is_in_proportion(split, others)
        return units_on(split, self._unit(one)) == units_on(others, self._unit(other))

    def _check_shares(self, pieces: Sequence[Piece]) -> None:
        """Reports the weights of which a rank holds another share than of most."""
        alike: list[list[Piece]] = []
        for piece in (*(each for each in pieces if each in self.key), *pieces):
            own = next((each for each in alike if self._go_together(each[0], each[0].split, piece, piece.split)), None)
            if own is None:
                alike.append([piece])
            elif piece not in own:
                own.append(piece)
        model = max(alike, key=len)[0]  # of as many, those of a key, by which heads are dealt
        for piece in pieces:
            if self._go_together(piece, piece.split, model, model.split):
                continue

            def holds(ranks: int, piece: Piece = piece) -> bool:
                return self._go_together(piece, piece.at(ranks), model, model.at(ranks))

            style = model.use.rule.style
            self._tell(
                piece,
                "PP204",
                f"{piece.use.rule.style} gives a rank other heads here than {style} does in {model.name}",
                expected=f"the heads that go with those of {model.entry.layout} of {model.name}",
                fix=self._in_units(piece, holds, "share"),
            )

    def _check_whole(self, piece: Piece) -> None:
        """Keys whole beside queries in parts, or the reverse: each rank would pair its heads with the wrong ones.

        One key/value head serves all queries, and a plan that sets numbers of the module may have seen to it.
        """
        if self.groups == 1 or self.has_counts or not (piece.is_given_on or self.query.is_given_on):
            return
        whole, parts = (self.query, piece) if piece.is_given_on else (piece, self.query)
        style, unit = parts.use.rule.style, self._unit(whole)
        fix = f"split it too, `{{style: {style}, unit: {unit}}}`, or write the whole block as `replicate`"
        self._tell(
            whole,
            "PP204",
            f"{whole.use.rule.style} gives every rank all heads here, and {style} a part of them in {parts.name}",
            expected=f"on every rank the heads that go with its own of {parts.entry.layout}",
            fix=fix if self.groups >= whole.ranks else "write the whole block as `replicate`",
        )

    def _tell(self, piece: Piece, code: str, message: str, *, expected: str, fix: str) -> None:
        found = str(piece.entry.layout)
        self.report.add(
            code, message, piece.use.rule, level="geometry", name=piece.name, found=found, expected=expected, fix=fix
        )
