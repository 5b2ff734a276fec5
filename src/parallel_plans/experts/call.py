"""How a module of experts is called: which argument is what, and the same call with others in their place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from parallel_plans.boundary import Arguments, Keywords
from parallel_plans.experts.routing import is_ids, is_weights

_Place = int | str  # position, or keyword


@dataclass(frozen=True)
class ExpertsCall:
    """The arguments of one call.

    What experts take:
      hidden states [T, H] or [B, S, H], ids [T, K], weights [T, K]: nearly all;
      rows [E*T, H], all tokens for the first expert, then all for the second (llama4): neither ids nor sizes;
      rows [S, H] in expert order and the experts' sizes as a list (jetmoe).
    """

    args: Arguments
    kwargs: Keywords

    def _first(self, fits: Callable[[Any], bool], skip: _Place | None = None) -> _Place | None:
        items: list[tuple[_Place, Any]] = [*enumerate(self.args), *self.kwargs.items()]
        return next((place for place, value in items if place != skip and fits(value)), None)

    def _at(self, place: _Place | None) -> Any:
        if place is None:
            return None
        return self.args[place] if isinstance(place, int) else self.kwargs[place]

    @property
    def hidden(self) -> Tensor:
        """The hidden states or rows."""
        found = self._at(self._first(is_weights))
        if found is None:
            raise TypeError("experts were called without hidden states")
        return found

    @property
    def ids(self) -> Tensor | None:
        """The experts' ids, where the call has them."""
        return self._at(self._first(is_ids))

    @property
    def weights(self) -> Tensor | None:
        """The routing weights, where the call has them."""
        return self._at(self._first(is_weights, skip=self._first(is_weights)))

    @property
    def sizes(self) -> list[int] | None:
        """The rows of each expert, where the call has them."""
        return self._at(self._first(lambda value: isinstance(value, list)))

    def mapped(self, function: Callable[[Tensor], Tensor]) -> ExpertsCall:
        """The call with every float tensor changed."""

        def changed(value: Any) -> Any:
            return function(value) if is_weights(value) else value

        return ExpertsCall(tuple(map(changed, self.args)), {key: changed(v) for key, v in self.kwargs.items()})

    def replaced(
        self, hidden: Tensor, ids: Tensor | None = None, weights: Tensor | None = None, sizes: list[int] | None = None
    ) -> ExpertsCall:
        """The call with these in the place of its own."""
        at_hidden = self._first(is_weights)
        new = {
            at_hidden: hidden,
            self._first(is_ids): ids,
            self._first(is_weights, skip=at_hidden): weights,
            self._first(lambda value: isinstance(value, list)): sizes,
        }
        new = {place: value for place, value in new.items() if place is not None and value is not None}
        args = tuple(new.get(place, value) for place, value in enumerate(self.args))
        return ExpertsCall(args, {key: new.get(key, value) for key, value in self.kwargs.items()})
