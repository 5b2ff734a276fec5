"""Where the modules of an adapted model stood before peft put its layers around them.

now                                             before
layers.0.self_attn.q_proj                       layers.0.self_attn.q_proj    peft's layer, which acts in its place
layers.0.self_attn.q_proj.base_layer            layers.0.self_attn.q_proj    holds the parameters
layers.0.self_attn.q_proj.lora_A.default        -                            rules are derived for it
lm_head.original_module                         lm_head
lm_head.modules_to_save.default                 lm_head                      a copy that is trained
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from parallel_plans.scopes import joined

BASE, ORIGINAL, COPIES = "base_layer", "original_module", "modules_to_save"


@dataclass(frozen=True, kw_only=True)
class Standing:
    """A module of an adapted model: its name now and before, and whether it acts at the boundary that it had."""

    name: str
    before: str
    module: nn.Module
    acts: bool

    @property
    def is_adapted(self) -> bool:
        """Whether it is a layer of peft around one that was there before."""
        return isinstance(self.module, BaseTunerLayer)


def standing(module: Any, name: str = "", before: str = "", *, acts: bool = True) -> Iterator[Standing]:
    """Every module that was there before peft came, and its layers in their place; not what only adapters have."""
    is_saved, below = isinstance(module, AuxiliaryTrainingWrapper), module._modules
    yield Standing(name=name, before=before, module=module, acts=acts and not is_saved)
    if isinstance(module, BaseTunerLayer):
        yield from standing(below[BASE], joined(name, BASE), before, acts=False)
    elif is_saved:
        yield from standing(below[ORIGINAL], joined(name, ORIGINAL), before)
        for adapter, copy in below[COPIES].items():
            yield from standing(copy, joined(name, f"{COPIES}.{adapter}"), before)
    else:
        for own, child in below.items():
            if child is not None:
                yield from standing(child, joined(name, own), joined(before, own))


def without_adapters(model: nn.Module) -> None:
    """Takes peft's layers out of `model` again, in place, as if they had never come."""
    for each in reversed(list(standing(model))):
        wraps = BASE if each.is_adapted else ORIGINAL if isinstance(each.module, AuxiliaryTrainingWrapper) else None
        if wraps is not None:
            above, _, own = each.name.rpartition(".")
            setattr(model.get_submodule(above), own, each.module.get_submodule(wraps))
