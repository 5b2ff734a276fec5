"""How a module of experts is called: which argument is what, and the same call with others in their place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from parallel_plans.boundary import Arguments, Keywords
from parallel_plans.experts.routing import is_ids, is_weights

_Place = int | str  # position, or keyword
Forms = dict[tuple[Any, ...], dict[str, _Place]]


class ExpertsCall:
    """The arguments of one call.

    What experts take:
      hidden states [T, H] or [B, S, H], ids [T, K], weights [T, K]: nearly all;
      rows [E*T, H], all tokens for the first expert, then all for the second (llama4): neither ids nor sizes;
      rows [S, H] in expert order and the experts' sizes as a list (jetmoe).
    """

    def __init__(self, args: Arguments, kwargs: Keywords, forms: Forms | None = None) -> None:
        self.args, self.kwargs = args, kwargs
        self.forms: Forms = {} if forms is None else forms  # by the form of a call, what is where: found out once
        form = len(args), *kwargs
        places = self.forms.get(form)
        if places is None:
            places = self.forms[form] = _places_of(args, kwargs)
        self._places = places

    def _at(self, what: str) -> Any:
        place = self._places.get(what)
        if place is None:
            return None
        return self.args[place] if isinstance(place, int) else self.kwargs[place]

    @property
    def hidden(self) -> Tensor:
        """The hidden states or rows."""
        found = self._at("hidden")
        if found is None:
            raise TypeError("experts were called without hidden states")
        return found

    @property
    def ids(self) -> Tensor | None:
        """The experts' ids, where the call has them."""
        return self._at("ids")

    @property
    def weights(self) -> Tensor | None:
        """The routing weights, where the call has them."""
        return self._at("weights")

    @property
    def sizes(self) -> list[int] | None:
        """The rows of each expert, where the call has them."""
        return self._at("sizes")

    def mapped(self, function: Callable[[Tensor], Tensor]) -> ExpertsCall:
        """The call with every float tensor changed."""

        def changed(value: Any) -> Any:
            return function(value) if is_weights(value) else value

        return ExpertsCall(
            tuple(map(changed, self.args)), {key: changed(v) for key, v in self.kwargs.items()}, self.forms
        )

    def replaced(
        self, hidden: Tensor, ids: Tensor | None = None, weights: Tensor | None = None, sizes: list[int] | None = None
    ) -> ExpertsCall:
        """The call with these in the place of its own."""
        args, kwargs = list(self.args), self.kwargs.copy()
        for what, value in (("hidden", hidden), ("ids", ids), ("weights", weights), ("sizes", sizes)):
            place = None if value is None else self._places.get(what)
            if isinstance(place, int):
                args[place] = value
            elif place is not None:
                kwargs[place] = value
        return ExpertsCall(tuple(args), kwargs, self.forms)


def placed_in_order(args: Arguments, kwargs: Keywords, forms: Forms) -> tuple[int, int] | None:
    """The positions of hidden states and routing weights in a call that has ids, too, as nearly all are; or None."""
    form = len(args), *kwargs
    places = forms.get(form)
    if places is None:
        places = forms[form] = _places_of(args, kwargs)
    hidden, weights = places.get("hidden"), places.get("weights")
    return (hidden, weights) if "ids" in places and isinstance(hidden, int) and isinstance(weights, int) else None


def _places_of(args: Arguments, kwargs: Keywords) -> dict[str, _Place]:
    """Where a call has what."""
    found: dict[str, _Place] = {}
    items: list[tuple[_Place, Any]] = [*enumerate(args), *kwargs.items()]
    for place, value in items:
        if isinstance(value, list):
            found.setdefault("sizes", place)
        elif is_weights(value):
            found.setdefault("weights" if "hidden" in found else "hidden", place)
        elif is_ids(value):
            found.setdefault("ids", place)
    return found
