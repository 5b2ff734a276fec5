"""The ways to deal ranks out between dense layers and experts, and what a mixture must be right in on each of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors.torch import load_file
from tiny import Truth, assert_close, tokens
from torch import Tensor

from parallel_plans import AutoModelForCausalLM, average_gradients, full_gradients, parallel_of

LOGITS, GRADIENTS = 1e-4, 1e-3  # of the largest value
BATCHES, BATCH_ROWS = 4, 2


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way: sizes of the axes, and whether tokens travel though the ranks share a batch."""

    world: int
    tp: int
    ep: int = 1
    etp: int | None = None
    dispatch: bool = False

    @property
    def batches(self) -> int:
        """How many different batches there are."""
        return self.world // self.tp

    def __str__(self) -> str:
        sizes = [f"{name}{size}" for name, size in (("tp", self.tp), ("ep", self.ep), ("etp", self.etp)) if size]
        return "-".join([f"{self.world}ranks", *sizes, *(["dispatch"] if self.dispatch else [])])


# the rows of the design, 2 and 4 ranks
ROWS = (
    Row(world=2, tp=2),
    Row(world=2, tp=2, ep=2, etp=1),
    Row(world=4, tp=4, ep=2, etp=2),
    Row(world=4, tp=1, ep=4, etp=1),
    Row(world=4, tp=2, ep=4, etp=1),
)
# and others that the same rules allow
MORE_ROWS = (
    Row(world=4, tp=4),
    Row(world=3, tp=3, ep=3),
    Row(world=2, tp=1, ep=2),
    Row(world=4, tp=4, ep=2),
    Row(world=4, tp=2, ep=2, etp=2),
    Row(world=4, tp=2, ep=2, etp=1),
    Row(world=2, tp=2, ep=2, etp=1, dispatch=True),
    Row(world=4, tp=4, ep=2, etp=2, dispatch=True),
    Row(world=4, tp=4, ep=2, etp=1, dispatch=True),
)


def batch_of(index: int) -> Tensor:
    """The batch of a tp group: `BATCH_ROWS` rows of token ids."""
    return tokens(rows=BATCH_ROWS * BATCHES)[BATCH_ROWS * index :][:BATCH_ROWS]


def loaded(folder: str, row: Row, **arguments: Any) -> Any:
    """The checkpoint on the ranks of a row."""
    arguments = {"tp_plan": "auto", "attn_implementation": "eager", **arguments}
    if row.dispatch:
        arguments["ep_plan"] = "dispatch"
    return AutoModelForCausalLM.from_pretrained(folder, tp_size=row.tp, ep_size=row.ep, etp_size=row.etp, **arguments)


def check_row(folder: str, target: str, row: Row, truths: list[Truth], arguments: dict[str, Any]) -> dict[str, str]:
    """What every rank does: forward, backward, generation, a save; gives back how every parameter lies."""
    model = loaded(folder, row, **arguments)
    index = dist.get_rank() // row.tp
    batch, truth = batch_of(index), truths[index]
    parallel = parallel_of(model)
    assert parallel is not None
    assert parallel.loaded is not None
    own = parallel.table.rank_bytes(parallel.place.ranks)
    assert own <= parallel.loaded.bytes_read <= 1.02 * own
    output = model(input_ids=batch, labels=batch)
    output.loss.backward()
    assert_close("logits", output.logits, truth.logits, relative=LOGITS)
    assert_close("loss", output.loss, truth.loss, relative=LOGITS)
    average_gradients(model)
    check_gradients(full_gradients(model), truths)
    model.zero_grad()
    made = model.generate(batch, max_new_tokens=6, do_sample=False, attention_mask=batch.ne(-1))
    assert made.tolist() == truth.continuation.tolist()
    model.save_pretrained(target)
    check_saved(folder, target)
    return {name: str(entry.layout) for name, entry in parallel.table.parameters.items()}


def check_gradients(gradients: dict[str, Tensor], truths: list[Truth]) -> None:
    """Every gradient is that of the mean of the losses of all batches."""
    assert gradients.keys() == truths[0].gradients.keys()
    for name, gradient in gradients.items():
        joined = sum(truth.gradients[name] for truth in truths) / len(truths)
        assert_close(name, gradient, joined, relative=GRADIENTS)


def check_saved(folder: str, target: str) -> None:
    """Both checkpoints hold the same keys with the same bytes."""
    dist.barrier()
    before, after = (load_file(Path(each) / "model.safetensors") for each in (folder, target))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].equal(tensor), name
