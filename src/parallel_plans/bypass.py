"""Weights that are read past the modules that own them: what their rules do at the module's boundary is skipped.

A fused kernel that is handed `self.out_proj.weight`, or `F.linear(x, self.out_proj.weight)`, never calls `out_proj`,
and the sum that `rowwise` makes there is not made: the numbers are wrong and nothing tells. So the first forward of
each kind (in training, in evaluation, of one token, with these arguments) is watched, and those after it are not:

    self.out_proj(x)                            called: fine
    self.out_proj.weight.dtype                  looked at: fine
    fused(..., self.out_proj.weight)            used, and `out_proj` is called after all, as the kernel declined: fine
    fused(..., self.out_proj.weight)            used, and the module that did so ends without calling it: PP408

Nothing is known of kernels: the read of the parameter is what is noticed. What is not called and not read, as an expert
without tokens or a layer that is dropped, is nobody's concern. Code that torch.compile traces is not watched.
"""

from __future__ import annotations

import dis
import functools
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor, nn

from parallel_plans.boundary import Boundary, Forward
from parallel_plans.errors import Finding, PlanError
from parallel_plans.local_parameters import LocalParameters
from parallel_plans.reseeding import telling_of_seeds
from parallel_plans.scopes import joined
from parallel_plans.table import Table

# what code asks of a tensor without computing with it
LOOKS = frozenset(
    (
        *("device", "dtype", "shape", "ndim", "layout", "itemsize", "requires_grad", "is_cuda", "is_meta"),
        *("dim", "size", "stride", "numel", "element_size", "get_device", "is_floating_point", "is_contiguous"),
    )
)
HERE = __name__.partition(".")[0]


@dataclass(kw_only=True)
class Running:
    """A module that runs: what its own code has called, and what that has read of modules that were not running.

    What is called afterwards, by whomever, was read for something else: rwkv scales its weights before it runs.
    """

    module: nn.Module
    is_fed_data: bool = False  # values that no gradient goes back to, so none that would have to be summed
    called: set[int] = field(default_factory=set)
    read: dict[int, dict[str, str]] = field(default_factory=dict)  # module -> its parameters, and where each was read


@dataclass(frozen=True, kw_only=True)
class Guarded:
    """A module whose boundary or parameters need its forward."""

    name: str
    module: nn.Module
    own: LocalParameters
    boundaries: tuple[Boundary, ...]

    def needs_forward(self, name: str, value: Tensor, *, is_fed_data: bool = False) -> bool:
        """Whether a use of this parameter, which it holds as `value` now, lacks what the module's forward does."""
        own, records = self.own, torch.is_grad_enabled()
        if any((records and not is_fed_data) or not _acts_in_backward_alone(each) for each in self.boundaries):
            return True
        if type(value) is not nn.Parameter:
            return False  # a module around this one has laid it out
        if name in own.once or name in own.after or name in own.gathered:
            return True
        return records and value.requires_grad and (name in own.summed or name in own.shared)


def _is_data(given: tuple[Any, ...]) -> bool:
    values = [each for each in given if isinstance(each, Tensor) and each.is_floating_point()]
    return bool(values) and not any(each.requires_grad for each in values)


def _acts_in_backward_alone(boundary: Boundary) -> bool:
    return boundary.replicates and boundary.deliver is None


class Reads(dict[str, Any]):
    """A module's parameters, of which every read as an attribute is told."""

    def __init__(self, parameters: Mapping[str, Any], tell: Callable[[str, Any, FrameType], None]) -> None:
        super().__init__(parameters)
        self.tell = tell

    def __getitem__(self, name: str) -> Any:
        value = super().__getitem__(name)
        reader = sys._getframe(1)
        if value is not None and reader.f_code is nn.Module.__getattr__.__code__ and reader.f_back is not None:
            self.tell(name, value, reader.f_back)
        return value


class Gate:
    """Watches a module's forwards, the first of each kind.

    Args:
        name: the module's, in the model.
        table: what the rules of the model say.
    """

    def __init__(self, name: str, table: Table) -> None:
        self.name, self.table = name, table
        self.seen: set[object] = set()

    def on_copy(self) -> Gate:
        """The same for a copy of the module."""
        twin = Gate(self.name, self.table)
        twin.seen |= self.seen
        return twin

    def around(self, forward: Forward, module: nn.Module) -> Forward:
        """`forward`, of which the first of each kind is watched."""
        seen, is_model = self.seen, not self.name

        def run(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_dynamo_compiling():
                return forward(*args, **kwargs)
            kind: tuple[object, ...] = module.training, torch.is_grad_enabled()
            if is_model:  # what is in it is seldom called by itself, and this takes time
                value = args[0] if args else kwargs.get("input_ids")
                # one token more is another path through much code than a prompt
                kind += isinstance(value, Tensor) and value.dim() > 1 and value.shape[1] == 1, *kwargs
            if kind in seen:
                return forward(*args, **kwargs)
            watch = _NOW.watch
            if watch is None or id(module) not in watch.inside:  # else a module around it is watched, and all in it
                output = Watch(self.name, module, self.table).run(forward, args, kwargs)
            else:
                output = forward(*args, **kwargs)
            seen.add(kind)
            return output

        return run


class _Now(threading.local):
    """What is watched in this thread."""

    watch: Watch | None = None


_NOW = _Now()


class Watch:
    """One forward of a module, watched."""

    def __init__(self, prefix: str, module: nn.Module, table: Table) -> None:
        self.module, self.table = module, table
        self.guarded = {id(each.module): each for each in _guarded(prefix, module)}
        self.names = {id(each): joined(prefix, name) for name, each in module.named_modules()}
        self.inside = frozenset(self.names)
        self.stack: list[Running] = []
        self.open: Counter[int] = Counter()

    def run(self, forward: Forward, args: Any, kwargs: Any) -> Any:
        """What `forward` gives.

        Raises:
            PlanError: PP408 where a weight is used past a module that had to be called, PP409 where a module of which
                a rank has some heads draws random numbers from a seed of its own.
        """
        if not self.guarded:
            return forward(*args, **kwargs)
        forwards: list[tuple[dict[str, Any], Any]] = []
        parameters: list[tuple[dict[str, Any], dict[str, Any]]] = []
        outer, _NOW.watch = _NOW.watch, self
        try:
            for module in self.module.modules():
                if module is self.module or (type(module).forward is _NO_FORWARD and "forward" not in vars(module)):
                    continue
                forwards.append((vars(module), vars(module).get("forward")))
                vars(module)["forward"] = functools.wraps(module.forward)(self._running(module, module.forward))
            for each in self.guarded.values():
                parameters.append((vars(each.module), each.module._parameters))
                tell = functools.partial(self._told, each)
                vars(each.module)["_parameters"] = Reads(each.module._parameters, tell)
            with telling_of_seeds(self._seeded):
                return self._running(self.module, forward)(*args, **kwargs)
        finally:
            _NOW.watch = outer
            for own, before in parameters:
                now = own["_parameters"]
                before.clear()
                before.update(now.items())
                own["_parameters"] = before
            for own, kept in forwards:
                if kept is None:
                    own.pop("forward", None)
                else:
                    own["forward"] = kept

    def _seeded(self, called: str) -> None:
        """Code is about to set a seed."""
        name = self.names[id(self.stack[-1].module)] if self.stack else ""
        entry = next((each for each in self.table.modules.get(name, ()) if each.options.get("counts")), None)
        if entry is None:
            return  # what is drawn is of as many things on every rank
        if "draws" in entry.options and called == "torch.manual_seed":
            return  # and its rule deals what is drawn
        raise PlanError(
            Finding(
                code="PP409",
                message=f"{name} sets a seed ({called}) and draws random numbers for the heads or features that it "
                "has: every rank would draw those of the first",
                level="numerics",
                file=entry.rule.file,
                line=entry.rule.line,
                rule=entry.rule.pattern,
                name=name,
                expected="random numbers that one process draws for the same heads, or no seed of the code's own",
                fix="use `split_draws` where torch draws them; else have the config choose a way to compute that "
                "draws nothing, or keep these heads whole: `replicate` on what this rule's module holds",
            )
        )

    def _running(self, module: nn.Module, forward: Forward) -> Forward:
        def run(*args: Any, **kwargs: Any) -> Any:
            is_own = True  # a call that the code of `above` makes, and not what that has called
            for above in reversed(self.stack):
                above.read.pop(id(module), None)
                if is_own:
                    above.called.add(id(module))
                is_own = is_own and _only_hands_on(above.module)
            self.stack.append(Running(module=module, is_fed_data=_is_data((*args, *kwargs.values()))))
            self.open[id(module)] += 1
            try:
                output = forward(*args, **kwargs)
                if findings := self._findings(self.stack[-1]):
                    raise PlanError(findings)
            except PlanError:
                raise
            except Exception as error:  # of shapes, often: what is skipped may be why, or have nothing to do with it
                for finding in self._findings(self.stack[-1]):
                    error.add_note(f"before it, {finding}")
                raise
            finally:
                self.stack.pop()
                self.open[id(module)] -= 1
            return output

        return run

    def _told(self, guarded: Guarded, name: str, value: Any, reader: FrameType) -> None:
        """A parameter was read as an attribute."""
        if not self.stack or self.open[id(guarded.module)] or reader.f_globals["__name__"].partition(".")[0] == HERE:
            return
        if not isinstance(value, Tensor):
            return
        needs = guarded.needs_forward(name, value, is_fed_data=self.stack[-1].is_fed_data)
        if needs and not _is_looked_at(reader):
            code = reader.f_code
            where = f"{code.co_filename.rpartition('/')[2]}:{reader.f_lineno}, {code.co_name}"
            self.stack[-1].read.setdefault(id(guarded.module), {}).setdefault(name, where)

    def _findings(self, running: Running) -> list[Finding]:
        past = {owner: read for owner, read in running.read.items() if owner not in running.called}
        return [self._finding(running.module, self.guarded[owner], read) for owner, read in past.items()]

    def _finding(self, reader: nn.Module, guarded: Guarded, read: Mapping[str, str]) -> Finding:
        own, where = next(iter(read.items()))
        entries, parameter = self.table.modules.get(guarded.name, ()), joined(guarded.name, own)
        acting = next((each for each in entries if each.style.acts_on_forward), None)
        rule = self.table.parameters[parameter].rule if acting is None else acting.rule
        name, last = self.names[id(reader)] or "the model", guarded.name.rpartition(".")[2]
        when = "in training" if reader.training else "in evaluation"
        return Finding(
            code="PP408",
            message=f"{rule.style} is skipped: {name} uses the {' and '.join(read)} of {last} by itself, "
            f"and never calls {last} ({where}, {when})",
            level="numerics",
            file=rule.file,
            line=rule.line,
            rule=rule.pattern,
            name=parameter,
            found=f"{list(getattr(guarded.module, own).shape)} on this rank",
            expected=f"a call of {last}, at which {rule.style} does its part",
            fix=f"switch off, or do without, the fused kernel that takes the {own}, so that `{last}` is called; "
            f"in code of your own, call `self.{last}(x)`",
        )


_NO_FORWARD = nn.Module.forward


def _guarded(prefix: str, module: nn.Module) -> Iterator[Guarded]:
    for name, each in module.named_modules():
        parallel: Any = vars(each).get("forward")
        own, boundaries = getattr(parallel, "own", None), getattr(parallel, "boundaries", ())
        if isinstance(own, LocalParameters) and own.kept and (boundaries or own.is_special):
            yield Guarded(name=joined(prefix, name), module=each, own=own, boundaries=boundaries)


def _only_hands_on(module: nn.Module) -> bool:
    """Whether a call of what is in it is a call of the module: a sequence of layers, an adapter around one."""
    return isinstance(module, nn.Sequential) or hasattr(module, "base_layer")


def _is_looked_at(reader: FrameType) -> bool:
    """Whether what the frame has just read is only asked for its shape and the like, or whether it is there."""
    frame: FrameType | None = reader
    while frame is not None:
        following = _after(frame.f_code, frame.f_lasti)
        if not following or not following[0].opname.startswith("RETURN"):
            return bool(following) and _is_look(following)
        frame = frame.f_back  # a property, or a function that gives the weight to its caller
    return False


def _is_look(following: tuple[dis.Instruction, ...]) -> bool:
    first = following[0]
    if first.opname in ("LOAD_ATTR", "LOAD_METHOD"):
        return first.argval in LOOKS
    if first.opname == "LOAD_CONST" and first.argval is None:
        return len(following) > 1 and following[1].opname == "IS_OP"
    return first.opname.startswith("POP_JUMP") and "NONE" in first.opname


@functools.cache
def _after(code: CodeType, last: int) -> tuple[dis.Instruction, ...]:
    """The two instructions after the one at this offset."""
    following = [each for each in dis.get_instructions(code) if each.offset > last and each.opname not in _NOTHING]
    return tuple(following[:2])


_NOTHING = ("NOP", "EXTENDED_ARG", "PRECALL", "CACHE", "NOT_TAKEN")
