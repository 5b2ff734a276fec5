"""What transformers' own parallelism makes of a plan: on two real ranks, against one process, without this project.

The only thing that is taken from here is a config. Weights are random, norms, biases, routers and buffers too.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from causal.children import asked, free_port, in_one_line
from causal.compare import RIGHT, compared, compared_gradient, told_of_gradients, written
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

RANKS = 2
SECONDS = 60.0  # for all that a rank does
PATIENCE = 15.0  # seconds that a rank waits for the other after a phase
TOLERANCE = {torch.float64: 1e-5, torch.float32: 2e-3}  # of a tensor's largest value
OTHERWISE = "otherwise"
PHASES = ("alone", "load", "outputs", "loss", "gradients", "tokens", "checkpoint")


@dataclass(frozen=True, kw_only=True)
class Way:
    """A way to run a model. `skips` are phases that say nothing in it."""

    label: str
    experts: str = "eager"
    places: bool = False  # puts weights in place itself, where transformers has read them from a checkpoint
    skips: tuple[str, ...] = ()


LOADED = Way(label="as it is loaded")
# what may be at fault beside the plan: the code of experts, and the reader of checkpoints
OTHER_WAYS = (
    Way(label="with experts_implementation=batched_mm", experts="batched_mm"),
    Way(label="with its weights put in place by hand", places=True, skips=("checkpoint",)),
)


def run(config: Any, sizes: Mapping[str, int], folder: str) -> dict[str, str]:
    """For every phase `right`, or what is wrong in one line; a phase that was not reached is left out.

    Where something is wrong, other ways to run the model are tried; `otherwise` is the one in which all is right.

    Args:
        config: of a model that runs in milliseconds.
        sizes: `tp_size`, and with experts dealt over the ranks `ep_size`, as `DistributedConfig` takes them.
        folder: an empty one, for checkpoints.
    """
    found = _in_way(LOADED, config, sizes, folder)
    if set(found.values()) != {RIGHT} and found.get(PHASES[0]) == RIGHT:
        for number, way in enumerate(OTHER_WAYS):
            again = _in_way(way, config, sizes, f"{folder}/{number}")
            if set(again.values()) == {RIGHT}:
                return {**found, OTHERWISE: way.label}
    return found


def _in_way(way: Way, config: Any, sizes: Mapping[str, int], folder: str) -> dict[str, str]:
    port = free_port()
    calls = [(rank, port, way, config, sizes, folder) for rank in range(RANKS)]
    first, *others = asked(_rank, calls, RANKS, SECONDS)
    found: dict[str, str] = dict(first.value or {})
    for answer in others:
        for phase, told in (answer.value or {}).items():
            if found.get(phase, RIGHT) == RIGHT:
                found[phase] = told
    problem = next((answer.problem for answer in (first, *others) if answer.problem is not None), None)
    if problem is not None:
        last = next((phase for phase in PHASES if phase not in found), PHASES[-1])
        found[last] = f"hangs: {problem}"
    return found


def _rank(rank: int, port: int, way: Way, config: Any, sizes: Mapping[str, int], folder: str) -> dict[str, str]:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "LOCAL_WORLD_SIZE": RANKS, "MASTER_PORT": port}
    os.environ.update({"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in place.items()}})
    dist.init_process_group("gloo", timeout=timedelta(seconds=PATIENCE))
    one = _Run(way, config, sizes, Path(folder))
    found: dict[str, str] = {}
    for phase in PHASES:
        if phase in way.skips or (phase == "gradients" and one.split_loss is None):
            continue
        try:
            found[phase] = getattr(one, phase)()
        except Exception as error:
            found[phase] = f"raises {in_one_line(error)}"
        is_over = phase in ("alone", "load") and found[phase] != RIGHT
        if not _all_come_to(phase) or is_over:
            break
    _leave()
    return found


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()


def _all_come_to(end: str) -> bool:
    """Whether the other ranks end this phase too."""
    store = _store()
    store.set(f"{end}/{dist.get_rank()}", "here")
    try:
        store.wait([f"{end}/{rank}" for rank in range(RANKS)], timedelta(seconds=PATIENCE))
    except RuntimeError:
        return False
    return True


def _leave() -> None:
    """Rank 0 leaves last: with it goes the store that the others wait at."""
    if dist.get_rank():
        _store().set(f"left/{dist.get_rank()}", "gone")
    else:
        with suppress(RuntimeError):
            _store().wait([f"left/{rank}" for rank in range(1, RANKS)], timedelta(seconds=PATIENCE))


class _Run:
    """One model on this rank: whole, and split by transformers. Each method is a phase."""

    def __init__(self, way: Way, config: Any, sizes: Mapping[str, int], folder: Path) -> None:
        self.way, self.config, self.sizes, self.folder = way, config, sizes, folder
        self.plain = {"attn_implementation": "eager", "experts_implementation": way.experts}
        self.split_loss: Tensor | None = None  # None where the forward has raised
        generator = torch.Generator().manual_seed(7)
        tokens = torch.randint(3, config.get_text_config().vocab_size, (2, 11), generator=generator)
        self.batch = {"input_ids": tokens, "labels": tokens.clone(), "use_cache": False}

    def alone(self) -> str:
        given = AutoModelForCausalLM.from_config(self.config, **self.plain)
        self.kind = type(given)
        if dist.get_rank() == 0:
            _random(given).save_pretrained(self.folder / "given")
        dist.barrier()
        try:
            self.dtype = torch.float64
            self.whole = self._loaded("given")
            self._step(self.whole)
        except RuntimeError:  # it is written for float32
            self.dtype = torch.float32
            self.whole = self._loaded("given")
            self._step(self.whole)
        return RIGHT

    def load(self) -> str:
        plan: Any = "auto"
        if not self.whole.tp_plan:  # transformers wants one even where experts alone are dealt
            embedding = self.whole.get_input_embeddings()
            plan = {name: "replicate" for name, module in self.whole.named_modules() if module is embedding}
        self.model = self._loaded("given", distributed_config=DistributedConfig(tp_plan=plan, **self.sizes))
        if self.way.places:
            whole = dict(self.whole.named_parameters())
            with torch.no_grad():
                for name, parameter in self.model.named_parameters():
                    _own(parameter).copy_(_part(whole[name], parameter))
        return RIGHT

    def _loaded(self, name: str, **more: Any) -> Any:
        return self.kind.from_pretrained(self.folder / name, dtype=self.dtype, **self.plain, **more).eval()

    def _step(self, model: Any) -> Any:
        output = model(**self.batch)
        output.loss.backward()
        return output

    def outputs(self) -> str:
        with torch.no_grad():
            return self._compared("the logits", self.model(**self.batch).logits, self.whole(**self.batch).logits)

    def loss(self) -> str:
        self.whole.zero_grad()
        wanted, found = self._step(self.whole), self.model(**self.batch)
        self.split_loss = found.loss
        told = self._compared("the logits in training", found.logits, wanted.logits)
        return told if told != RIGHT else self._compared("the loss", found.loss, wanted.loss)

    def gradients(self) -> str:
        assert self.split_loss is not None
        self.split_loss.backward()
        split = dict(self.model.named_parameters())
        told = {name: self._gradient(split[name].grad, p.grad) for name, p in self.whole.named_parameters()}
        return told_of_gradients(told)

    def _gradient(self, found: Tensor | None, wanted: Tensor | None) -> str:
        both = [None if each is None else _whole(each) for each in (found, wanted)]
        return compared_gradient(*both, TOLERANCE[self.dtype])

    def tokens(self) -> str:
        tokens = self.batch["input_ids"]
        try:
            wanted = written(self.whole, tokens)
        except Exception:  # it cannot write alone either
            return RIGHT
        found = None if wanted is None else written(self.model, tokens)
        return RIGHT if wanted is None or (found is not None and found.equal(wanted)) else "other tokens"

    def checkpoint(self) -> str:
        self.model.save_pretrained(self.folder / "saved")
        dist.barrier()
        if dist.get_rank():
            return RIGHT
        state, wanted = self._loaded("saved").state_dict(), self.whole.state_dict()
        wrong = [name for name, value in wanted.items() if name not in state or not state[name].equal(value)]
        return f"{len(wrong)} of {len(wanted)} weights differ, among them {wrong[0]}" if wrong else RIGHT

    def _compared(self, what: str, found: Tensor, wanted: Tensor) -> str:
        return compared(what, _whole(found), _whole(wanted), TOLERANCE[self.dtype])


def _random(model: Any) -> Any:
    """The model with every weight and every buffer that is saved drawn at random."""
    generator = torch.Generator().manual_seed(11)
    saved = model.state_dict().keys()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_scale = parameter.dim() < 2 and name.endswith("weight")
            size = 0.3 if parameter.dim() < 2 else max(0.1, parameter.shape[-1] ** -0.5)
            parameter.copy_(noise * size + is_scale)
        for name, buffer in model.named_buffers():
            if name in saved and buffer.is_floating_point():
                buffer.add_(0.1 * torch.randn(buffer.shape, generator=generator))
    return model


def _own(parameter: Tensor) -> Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _part(whole: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a parameter, split as `like` is."""
    if isinstance(like, DTensor):
        (placement,) = like.placements
        rank, size = like.device_mesh.get_local_rank(), like.device_mesh.size()
        if isinstance(placement, _StridedShard):
            packed = whole.chunk(placement.split_factor, placement.dim)
            return torch.cat([part.chunk(size, placement.dim)[rank] for part in packed], placement.dim)
        if isinstance(placement, Shard):
            return whole.chunk(size, placement.dim)[rank]
    return whole


def _whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()
