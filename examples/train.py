"""A checkpoint, split across ranks by a plan, is trained on a text; --compare trains it in one process too.

torchrun --nproc-per-node 2 examples/train.py CHECKPOINT
torchrun --nproc-per-node 4 examples/train.py MIXTURE --tp 2 --ep 4 --compare
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import Tensor
from transformers import AutoTokenizer

from parallel_plans import (
    AutoModelForCausalLM,
    MasterWeights,
    average_gradients,
    clip_grad_norm_,
    full_state_dict,
    parallel_of,
)

TEXT = Path(__file__).with_name("sonnets.txt")  # six of Shakespeare's, of 1609


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--plan", default="auto")
    parser.add_argument("--tp", type=int, help="ranks that split the dense layers")
    parser.add_argument("--ep", type=int, help="ranks over which whole experts are dealt")
    parser.add_argument("--etp", type=int, help="ranks that split each expert")
    parser.add_argument("--sp", action="store_true", help="split the sequence over the ranks between blocks")
    parser.add_argument("--storage", choices=["dtensor", "local"], default="dtensor")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--master-weights", action="store_true", help="step float32 copies of bfloat16 weights")
    parser.add_argument("--checkpointing", action="store_true", help="compute layers again in backward")
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rows", type=int, default=4, help="rows of a micro-batch, all batches together")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of a row")
    parser.add_argument("--micro-batches", type=int, default=2, help="micro-batches of a step")
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--max-norm", type=float, default=1.0, help="the gradient is clipped to this norm")
    parser.add_argument("--save", help="a folder for the trained checkpoint")
    parser.add_argument("--compare", action="store_true", help="train in one process too, and show how far it lies")
    return parser.parse_args()


def micro_batches(arguments: argparse.Namespace) -> Iterator[Tensor]:
    """Token ids [rows, tokens], one micro-batch after the other, from the text over and over again."""
    tokenizer = AutoTokenizer.from_pretrained(arguments.checkpoint)
    ids = tokenizer(arguments.text.read_text(encoding="utf-8"), return_tensors="pt")["input_ids"][0]
    size = arguments.rows * arguments.tokens
    start = 0
    while True:
        places = torch.arange(start, start + size) % len(ids)
        yield ids[places].view(arguments.rows, arguments.tokens)
        start = (start + size) % len(ids)


def train(model: Any, arguments: argparse.Namespace, batch: int, batches: int) -> list[float]:
    """Trains `model` in place on the rows that are for this of so many batches; every step's loss over all of them."""
    model.train()
    if arguments.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=arguments.learning_rate)
    if arguments.master_weights:
        optimizer = MasterWeights(optimizer)
    losses, texts = [], micro_batches(arguments)
    for _ in range(arguments.steps):
        total = torch.zeros((), device=model.device)
        for _ in range(arguments.micro_batches):
            rows = next(texts).chunk(batches)[batch].to(model.device)
            loss = model(input_ids=rows, labels=rows).loss / arguments.micro_batches
            loss.backward()
            total += loss.detach()
        average_gradients(model)  # over the batches
        clip_grad_norm_(model, arguments.max_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(mean_over_batches(model, total))
    return losses


def mean_over_batches(model: Any, loss: Tensor) -> float:
    """The mean of the ranks' losses, which is that of the batches: as many ranks have each."""
    if parallel_of(model) is not None:
        dist.all_reduce(loss)
        loss /= dist.get_world_size()
    return loss.item()


def compare(arguments: argparse.Namespace, losses: list[float], weights: dict[str, Tensor]) -> None:
    """Trains in one process too; prints both losses of every step, and how far the weights lie apart for their way."""
    loaded = functools.partial(transformers.AutoModelForCausalLM.from_pretrained, arguments.checkpoint)
    model = loaded(dtype=getattr(torch, arguments.dtype))
    truths = train(model, arguments, batch=0, batches=1)
    before, after = loaded(dtype=getattr(torch, arguments.dtype)).state_dict(), model.state_dict()
    print(f"\n{'step':>4}  {'loss':>12}  {'one process':>12}")
    for step, (loss, truth) in enumerate(zip(losses, truths, strict=True)):
        print(f"{step:>4}  {loss:>12.8f}  {truth:>12.8f}")
    apart = moved = apart_squared = moved_squared = 0.0
    for name, weight in after.items():
        difference, update = (weight - weights[name].cpu()).double(), (weight - before[name]).double()
        apart, moved = max(apart, difference.abs().max().item()), max(moved, update.abs().max().item())
        apart_squared += difference.pow(2).sum().item()
        moved_squared += update.pow(2).sum().item()
    print(f"largest difference of the losses  {max(abs(a - b) for a, b in zip(losses, truths, strict=True)):.1e}")
    print(f"largest difference of a weight    {apart:.1e}, where weights moved by up to {moved:.1e}")
    print(
        f"norm of the difference            {(apart_squared / max(moved_squared, 1e-300)) ** 0.5:.1e} of the update's"
    )


def main() -> None:
    arguments = parsed()
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(
        arguments.checkpoint, tp_plan=arguments.plan, tp_size=arguments.tp, ep_size=arguments.ep,
        etp_size=arguments.etp, sp_plan="auto" if arguments.sp else None, storage=arguments.storage,
        dtype=getattr(torch, arguments.dtype),
    )  # fmt: skip
    parallel = parallel_of(model)
    batch, batches, is_first = 0, 1, True
    if parallel is not None:
        batch, batches = parallel.place.ranks["dp"], parallel.place.axes["dp"].size
        is_first = parallel.place.is_first
    losses = train(model, arguments, batch, batches)
    if is_first:
        print(f"{arguments.rows * arguments.micro_batches} rows a step, {batches} batch{'es' * (batches > 1)}")
        print("\n".join(f"step {step}  loss {loss:.6f}" for step, loss in enumerate(losses)))
    if arguments.save:
        model.save_pretrained(arguments.save)
    weights = full_state_dict(model) if arguments.compare else {}
    del model
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()  # what follows is for one rank; the others end, and leave it their memory
    if is_first and weights:
        compare(arguments, losses, weights)


if __name__ == "__main__":
    main()
