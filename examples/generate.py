"""A checkpoint, split across ranks by a plan, answers several prompts at once; alone it is the ordinary model.

torchrun --nproc-per-node 2 examples/generate.py CHECKPOINT "What is the capital of France?" "Why is the sky blue?"
python examples/generate.py CHECKPOINT --prompts prompts.txt --sample --temperature 0.7 --seed 3
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoTokenizer, set_seed

from parallel_plans import AutoModelForCausalLM, parallel_of, watch_ranks


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("prompt", nargs="*", help="what to answer")
    parser.add_argument("--prompts", type=Path, help="a file with a prompt on each line, besides")
    parser.add_argument("--plan", default="auto")
    parser.add_argument("--tp", type=int, help="ranks that split the dense layers; all by default")
    parser.add_argument("--ep", type=int, help="ranks over which whole experts are dealt")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--raw", action="store_true", help="continue the prompts as they are, without a chat template")
    parser.add_argument("--sample", action="store_true", help="draw tokens, in place of the likeliest ones")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args(arguments)
    if chosen.prompts is not None:
        chosen.prompt += [line for line in chosen.prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not chosen.prompt:
        parser.error("no prompt")
    return chosen


def texts(tokenizer: Any, prompts: Sequence[str], raw: bool) -> list[str]:
    """The prompts as the model is to continue them: in its chat template, where it has one."""
    if raw or tokenizer.chat_template is None:
        return list(prompts)
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    return [tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) for chat in chats]


def answers(model: Any, tokenizer: Any, prompts: Sequence[str], chosen: argparse.Namespace) -> list[str]:
    """What the model writes after each prompt, all in one batch, padded on the left."""
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    special = chosen.raw or tokenizer.chat_template is None  # a template has written them already
    batch = tokenizer(
        texts(tokenizer, prompts, chosen.raw), return_tensors="pt", padding=True, add_special_tokens=special
    )
    drawing = {"do_sample": False}
    if chosen.sample:
        drawing = {"do_sample": True, "temperature": chosen.temperature, "top_p": chosen.top_p, "top_k": 0}
    made = model.generate(
        input_ids=batch["input_ids"].to(model.device),
        attention_mask=batch["attention_mask"].to(model.device),
        max_new_tokens=chosen.new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        **drawing,
    )
    return tokenizer.batch_decode(made[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def own_share(prompts: Sequence[str], model: Any) -> list[int]:
    """The numbers of the prompts that this rank answers: ranks that split a layer share them, others have their own."""
    parallel = parallel_of(model)
    if parallel is None:
        return list(range(len(prompts)))
    groups = parallel.place.axes["dp"]
    # where there are fewer prompts than groups, some answer one that another answers too
    return list(range(len(prompts)))[groups.rank :: groups.size] or [0]


def main(arguments: Sequence[str] | None = None) -> None:
    chosen = parsed(arguments)
    set_seed(chosen.seed)  # the ranks that share a batch draw the same in any case
    tokenizer = AutoTokenizer.from_pretrained(chosen.checkpoint)
    ep_plan = None if chosen.ep is None else "auto"
    with watch_ranks():
        model = AutoModelForCausalLM.from_pretrained(
            chosen.checkpoint, tp_plan=chosen.plan, ep_plan=ep_plan, tp_size=chosen.tp, ep_size=chosen.ep,
            dtype=chosen.dtype,
        ).eval()  # fmt: skip
        share = own_share(chosen.prompt, model)
        with torch.inference_mode():
            written = dict(
                zip(share, answers(model, tokenizer, [chosen.prompt[i] for i in share], chosen), strict=True)
            )
        if parallel_of(model) is not None:
            everyone: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(everyone, written)
            written = {number: text for each in reversed(everyone) for number, text in each.items()}
    if not dist.is_initialized() or dist.get_rank() == 0:
        for number, prompt in enumerate(chosen.prompt):
            print(f"> {prompt}\n{written[number].strip()}\n")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
