"""Sizes written as a plan would: by the fields of the config that give them, in all models of a kind."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

# Config words that sizes are made of in most architectures, and what comments call them; others cost more.
SHORT = {
    "head_dim": "head_dim",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "intermediate_size": "ffn",
    "moe_intermediate_size": "ffn",
    "hidden_size": "hidden",
    "vocab_size": "vocab",
    "num_experts": "experts",
    "num_local_experts": "experts",
    "n_routed_experts": "experts",
}
_STRANGE = 4.0
_CONSTANT = 4.5  # that something is twice a field may be so in these models alone
_SAME = 5.9  # a number that is the same in all models: what is strange and gives it does so by chance
_SEVERAL = (2, 3, 4)
_RARE = 30.0  # fields that are no sizes: ids of tokens, counts of layers
_NO_SIZES = ("_token_id", "num_hidden_layers", "max_position_embeddings", "_window", "_layers", "per_tok")


Values = tuple[int | None, ...]  # a size in every model; None where one has no such thing


class Names:
    """How sizes are written: the fields of a model's config, and those of others of its kind in the same order.

    Without fields a size is its number. `known_as` are the words of other architectures for fields of this one.
    """

    def __init__(self, fields: Sequence[Mapping[str, int]], known_as: Mapping[str, str] | None = None) -> None:
        self.known_as = known_as or {}
        common = [name for name in (fields[0] if fields else ()) if all(name in each for each in fields)]
        self.numbers = {name: tuple(each[name] for each in fields) for name in common}
        self.numbers = {name: values for name, values in self.numbers.items() if min(values) > 0}
        self._known: dict[tuple[Values, bool], str | int | None] = {}

    def text(self, values: Values, is_head: bool = False) -> str | int | None:
        """The simplest expression that has these values; the number where it is the same everywhere; else None.

        A size that a single one of several models has is its number: too much would fit by chance.

        Args:
            values: the size in every model, None where one has no such thing; the first has it.
            is_head: whether it is one of heads, of which the hidden size may be a multiple only by chance.
        """
        assert values[0] is not None
        if not self.numbers or set(values) <= {1, None} or (len(values) > 1 and set(values[1:]) == {None}):
            return values[0]
        key = values, is_head
        if key not in self._known:
            fitting: list[tuple[float, str | int]] = [
                (cost, text) for cost, text, have in self._all(is_head) if _fit(values, have)
            ]
            if len({*values} - {None}) == 1:
                fitting.append((_SAME, values[0]))
            self._known[key] = min(fitting, key=lambda each: (each[0], str(each[1])))[1] if fitting else None
        return self._known[key]

    def _all(self, is_head: bool) -> Iterator[tuple[float, str, tuple[int, ...]]]:
        costs = {name: self._cost(name, is_head) for name in self.numbers}
        usual = {name: self.numbers[name] for name, cost in costs.items() if cost < _RARE}
        for name, values in usual.items():
            yield costs[name], name, values
            for times in _SEVERAL:
                yield costs[name] + _CONSTANT, f"{times} * {name}", tuple(times * value for value in values)
        for one, ones in usual.items():
            for other, others in usual.items():
                cost = costs[one] + costs[other] + 1
                if _is_count(one) >= _is_count(other):
                    yield cost, f"{one} * {other}", tuple(a * b for a, b in zip(ones, others, strict=True))
                if one == other:
                    continue
                if (parts := _divided(ones, others)) is None:
                    continue
                yield cost, f"{one} / {other}", parts
                for more, mores in usual.items():
                    if more not in (one, other):
                        values = tuple(a * b for a, b in zip(mores, parts, strict=True))
                        yield cost + costs[more] + 1, f"{more} * {one} / {other}", values
                for times in _SEVERAL:
                    yield cost + _CONSTANT, f"{times} * {one} / {other}", tuple(times * value for value in parts)

    def _cost(self, name: str, is_head: bool) -> float:
        usual = self.known_as.get(name, name)
        if usual.endswith(_NO_SIZES):
            return _RARE
        if usual == "hidden_size" and is_head:
            return 3.5
        return 1.0 if usual in SHORT else _STRANGE

    def short(self, values: Values, is_head: bool = False) -> str:
        """The same for a comment."""
        text = str(self.text(values, is_head) or values[0]).replace(" * ", "*").replace(" / ", "/")
        words = SHORT | {own: SHORT[usual] for own, usual in self.known_as.items() if usual in SHORT}
        for word in sorted(words, key=len, reverse=True):
            text = _replaced(text, word, words[word])
        return text


def _fit(values: Values, have: tuple[int, ...]) -> bool:
    return all(value is None or value == each for value, each in zip(values, have, strict=True))


def _is_count(name: str) -> bool:
    """Whether a field counts things; in a product that comes first."""
    return name.startswith(("num_", "n_"))


def _divided(ones: tuple[int, ...], others: tuple[int, ...]) -> tuple[int, ...] | None:
    if any(a % b for a, b in zip(ones, others, strict=True)):
        return None
    return tuple(a // b for a, b in zip(ones, others, strict=True))


def _replaced(text: str, word: str, short: str) -> str:
    return re.sub(rf"(?<![A-Za-z0-9_.]){word}(?![A-Za-z0-9_])", short, text)
