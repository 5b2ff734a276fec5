"""Boundaries of the styles whose row says more than letters can."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from parallel_plans.boundary import Arguments, Boundary, Forward, Keywords, Site, change_first, change_output
from parallel_plans.collectives import reduce, replicate


class VocabularyBoundary(Boundary):
    """`embedding_rowwise`: every rank looks up the tokens it holds, the others give zeros, the sum is the embedding.

    ranks      0: rows 0 to 3        1: rows 4 to 7
    tokens     [2, 5]                [2, 5]
    looked up  [row 2, zeros]        [zeros, row 5]
    """

    def __init__(self, site: Site, module: nn.Module) -> None:
        super().__init__(site, module)
        assert site.split is not None
        self.start, self.stop = site.split.ranges[site.axis.rank][0]
        # The padding row's gradient is zero on the rank that holds it; the index is a local one, for all but others.
        padding = getattr(module, "padding_idx", None)
        if padding is not None:
            is_here = self.start <= padding < self.stop
            module.padding_idx = padding - self.start if is_here else None  # type: ignore[assignment]

    def __call__(self, forward: Forward, args: Arguments, kwargs: Keywords) -> Any:
        absent: Tensor | None = None

        def localize(tokens: Tensor) -> Tensor:
            nonlocal absent
            absent = (tokens < self.start) | (tokens >= self.stop)
            return (tokens - self.start).masked_fill(absent, 0)

        args, kwargs = change_first(localize, args, kwargs)
        output = forward(*args, **kwargs)
        assert absent is not None
        return reduce(output.masked_fill(absent.unsqueeze(-1), 0), self.site.axis, in_place=True)


class RopePartBoundary(Boundary):
    """`mla_kv_a_proj`: the last `rope` features of the output go to every rank's heads, so their gradient is summed."""

    def __init__(self, site: Site, module: nn.Module) -> None:
        super().__init__(site, module)
        self.rope = int(site.options["rope"])

    def __call__(self, forward: Forward, args: Arguments, kwargs: Keywords) -> Any:
        output = forward(*args, **kwargs)
        latent, rope = output.split([output.shape[-1] - self.rope, self.rope], dim=-1)
        return torch.cat([latent, replicate(rope, self.site.axis)], dim=-1)


class IdentityExpertBoundary(Boundary):
    """`moe_identity_expert`: a module that passes its input on, in a block whose output is summed over the ranks."""

    def __call__(self, forward: Forward, args: Arguments, kwargs: Keywords) -> Any:
        args, kwargs = change_first(lambda value: value / self.site.axis.size, args, kwargs)
        return forward(*args, **kwargs)


class ExpertsBoundary(Boundary):
    """`moe_experts_allreduce`: hidden states and routing weights I -> R, the experts' sum P -> I; shards nothing."""

    def __call__(self, forward: Forward, args: Arguments, kwargs: Keywords) -> Any:
        axis = self.site.axis

        def used(value: Any) -> Any:
            is_float = isinstance(value, Tensor) and value.is_floating_point()
            return replicate(value, axis) if is_float else value

        output = forward(*map(used, args), **{key: used(value) for key, value in kwargs.items()})
        return change_output(lambda value: reduce(value, axis), output)


class LocalCountsBoundary(Boundary):
    """`local_counts`: numbers a module keeps of its whole width become this rank's; nothing runs in forward."""

    is_done = True

    def __init__(self, site: Site, module: nn.Module) -> None:
        super().__init__(site, module)
        changed: dict[str, int] = {}
        for name, per_rank in site.options["counts"].items():
            if name.startswith("config."):
                changed[name.removeprefix("config.")] = per_rank[site.axis.rank]
            else:
                setattr(module, name, per_rank[site.axis.rank])
        if changed:
            module.config = LocalConfig(module.config, changed)  # type: ignore[assignment]


class LocalConfig:
    """A view of a config in which some numbers are this rank's; all else is read from and written to the config."""

    def __init__(self, config: Any, changed: Mapping[str, int]) -> None:
        object.__setattr__(self, "_config", config)
        object.__setattr__(self, "_changed", dict(changed))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("_config", "_changed"):
            raise AttributeError(name)  # so that copying does not look for its own parts here
        changed = self._changed
        return changed[name] if name in changed else getattr(self._config, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._config, name, value)

    def __repr__(self) -> str:
        return f"LocalConfig({self._changed}, of {type(self._config).__name__})"
