"""A mixture of experts, split across ranks, writes what the dense model writes from which `upcycle.py` made it.

torchrun --nproc-per-node 4 examples/mixture.py MIXTURE --dense CHECKPOINT --tp 2 --ep 4
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import transformers
from demo import answer, mebibytes
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import AutoTokenizer

from parallel_plans import AutoModelForCausalLM, parallel_of

# ranks that hold different batches answer different ones
QUESTIONS = (
    "What is the capital of France, and what is it known for?",
    "What is the capital of France?",
    "Why is the sky blue?",
    "What is two plus two?",
)
EXPERT_WEIGHT = "model.layers.0.mlp.experts.gate_up_proj"


@dataclass(frozen=True)
class Outcome:
    """What one rank did: the batch it is part of, the answer's tokens, bytes read and held, its part of the experts."""

    batch: int
    tokens: torch.Tensor
    bytes_read: int
    bytes_held: int
    expert_shape: list[int]


def outcome(model: Any, tokenizer: Any, new_tokens: int) -> Outcome:
    """This rank's answer to the question of its batch."""
    parallel = parallel_of(model)
    ranks = parallel.place.ranks
    batch = ranks["dp"]
    return Outcome(
        batch=batch,
        tokens=answer(model, tokenizer, QUESTIONS[batch % len(QUESTIONS)], new_tokens)[0],
        bytes_read=parallel.loaded.bytes_read,
        bytes_held=parallel.table.rank_bytes(ranks),
        expert_shape=list(parallel.layout(EXPERT_WEIGHT).local_shape(ranks)),
    )


def show_answers(console: Console, tokenizer: Any, outcomes: list[Outcome], dense: Any, new_tokens: int) -> bool:
    """Prints each batch's answer; returns whether every rank's tokens are those of the dense model."""
    agree = True
    for batch in sorted({each.batch for each in outcomes}):
        question = QUESTIONS[batch % len(QUESTIONS)]
        expected, _ = answer(dense, tokenizer, question, new_tokens)
        same = all(torch.equal(each.tokens, expected) for each in outcomes if each.batch == batch)
        agree = agree and same
        first = next(each.tokens for each in outcomes if each.batch == batch)
        text = " ".join(tokenizer.decode(first, skip_special_tokens=True).split())
        verdict = "equal to" if same else "[red]different from[/]"
        console.print(f"[bold]question[/]  {question}")
        console.print(f"[bold]answer[/]    {escape(text)}")
        console.print(f"[bold]check[/]     {len(first)} tokens, {verdict} the dense model's, token for token")
    return agree


def show_ranks(console: Console, model: Any, outcomes: list[Outcome]) -> None:
    """Prints what each rank read and holds, and its part of the first layer's experts."""
    table = parallel_of(model).table
    console.print(f"[bold]experts[/]   gate and up of a layer: {escape(str(table.parameters[EXPERT_WEIGHT].layout))}")
    title = f"whole mixture: {mebibytes(table.spec.bytes)}"
    rows = Table("rank", "batch", "read", "holds", "gate and up", title=title, title_justify="left", box=None)
    for rank, each in enumerate(outcomes):
        read, held = mebibytes(each.bytes_read), mebibytes(each.bytes_held)
        rows.add_row(str(rank), str(each.batch), read, held, escape(str(each.expert_shape)))
    console.print(rows)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mixture")
    parser.add_argument("--dense", required=True, help="the checkpoint that the mixture was made from")
    parser.add_argument("--plan", default="auto")
    parser.add_argument("--tp", type=int, help="ranks that split the dense layers")
    parser.add_argument("--ep", type=int, help="ranks over which whole experts are dealt")
    parser.add_argument("--etp", type=int, help="ranks that split each expert")
    parser.add_argument("--dispatch", action="store_true", help="send tokens to experts where ranks share a batch too")
    parser.add_argument("--new-tokens", type=int, default=40)
    return parser.parse_args()


def main() -> None:
    arguments = parsed()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(arguments.mixture)
    model = AutoModelForCausalLM.from_pretrained(
        arguments.mixture, tp_plan=arguments.plan, ep_plan="dispatch" if arguments.dispatch else None,
        tp_size=arguments.tp, ep_size=arguments.ep, etp_size=arguments.etp, dtype=torch.float32,
    )  # fmt: skip
    outcomes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, outcome(model, tokenizer, arguments.new_tokens))
    verdict = [True]
    if dist.get_rank() == 0:
        dense = transformers.AutoModelForCausalLM.from_pretrained(arguments.dense, dtype=torch.float32)
        console = Console(highlight=False)
        console.print(f"\n[bold]plan[/]      {parallel_of(model).table.plan.source}")
        verdict = [show_answers(console, tokenizer, outcomes, dense, arguments.new_tokens)]
        show_ranks(console, model, outcomes)
    dist.broadcast_object_list(verdict, src=0)  # every rank exits alike
    dist.destroy_process_group()
    if not verdict[0]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
