"""A real checkpoint, split across ranks by a plan, answers a question; the same answer as one process gives.

torchrun --nproc-per-node 3 examples/demo.py CHECKPOINT
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
import torch.distributed as dist
import transformers
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from parallel_plans import AutoModelForCausalLM, parallel_of


def answer(model: Any, tokenizer: Any, question: str, new_tokens: int) -> tuple[torch.Tensor, float]:
    """The tokens of the model's greedy answer, and how many it made per second."""
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).to(model.device)
    model.generate(**prompt, max_new_tokens=2, do_sample=False)  # the first call pays for what later ones share
    start = time.perf_counter()
    tokens = model.generate(**prompt, max_new_tokens=new_tokens, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    return tokens.cpu(), len(tokens) / (time.perf_counter() - start)


def mebibytes(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


def show_ranks(console: Console, model: Any, reports: list[Any]) -> None:
    """Prints what each rank read and holds, against the whole."""
    table = parallel_of(model).table
    whole = table.spec.bytes
    rows = Table(
        "rank", "read", "holds", "of the whole", title=f"whole model: {mebibytes(whole)}", title_justify="left"
    )
    for rank, report in enumerate(reports):
        held = table.rank_bytes({"tp": rank})
        rows.add_row(str(rank), mebibytes(report.bytes_read), mebibytes(held), f"{held / whole:.1%}")
    console.print(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--question", default="What is the capital of France, and what is it known for?")
    parser.add_argument("--new-tokens", type=int, default=40)
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    tokenizer = AutoTokenizer.from_pretrained(arguments.checkpoint)
    model = AutoModelForCausalLM.from_pretrained(arguments.checkpoint, tp_plan="auto")
    tokens, speed = answer(model, tokenizer, arguments.question, arguments.new_tokens)

    reports: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(reports, parallel_of(model).loaded)
    agrees = True
    if dist.get_rank() == 0:
        alone = transformers.AutoModelForCausalLM.from_pretrained(arguments.checkpoint)
        expected, speed_alone = answer(alone, tokenizer, arguments.question, arguments.new_tokens)
        agrees = torch.equal(tokens, expected)
        console = Console(highlight=False)
        console.print(f"\n[bold]plan[/]      {parallel_of(model).table.plan.source}")
        console.print(f"[bold]question[/]  {arguments.question}")
        console.print(f"[bold]answer[/]    {tokenizer.decode(tokens, skip_special_tokens=True).strip()}")
        verdict = "equal to" if agrees else "[red]different from[/]"
        console.print(f"[bold]check[/]     {len(tokens)} tokens, {verdict} the one-process answer, token for token")
        console.print(
            f"[bold]speed[/]     {speed:.1f} tokens/s on {len(reports)} ranks, {speed_alone:.1f} in one process"
        )
        show_ranks(console, model, reports)
    dist.barrier()
    dist.destroy_process_group()
    if not agrees:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
