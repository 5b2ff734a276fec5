"""The names of rules: one for all layers of a kind, and one for each step of a sequence whose steps differ."""

from __future__ import annotations

from torch import nn

from parallel_plans.table import wildcarded


class Patterns:
    """Name -> the name of the rule for it: `*` for the number of a layer, and of other modules that are all alike.

    The steps of an `nn.Sequential` that are not, the two linear layers of an MLP for instance, keep their numbers.
    """

    def __init__(self, model: nn.Module) -> None:
        self._kept = {
            wildcarded(name)
            for name, module in model.named_modules()
            if isinstance(module, nn.Sequential) and len({_form(each) for each in module}) > 1
        }

    def __call__(self, name: str) -> str:
        segments: list[str] = []
        for segment in name.split("."):
            is_layer = segment.isdigit() and ".".join(segments) not in self._kept
            segments.append("*" if is_layer else segment)
        return ".".join(segments)


def _form(module: nn.Module) -> object:
    """What modules that are alike have in common."""
    return type(module), tuple((name, tuple(each.shape)) for name, each in module.named_parameters())
