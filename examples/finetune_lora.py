"""Trains a LoRA adapter of peft on a model that is split across ranks, and saves it as one ordinary adapter.

torchrun --nproc-per-node 2 examples/finetune_lora.py CHECKPOINT --output ADAPTER --compare

`--compare` trains the same in one process, and holds losses, adapter and continuation against it.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoTokenizer

from parallel_plans import AutoModelForCausalLM, clip_grad_norm_

TEXT = Path(__file__).with_name("speeches.txt")
PROMPT = "Four score and seven years ago our fathers"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# How far from one process: of the loss, and of the norm of an adapter's weight. Not of single elements: AdamW makes a
# whole step of a gradient that is nothing but rounding.
LOSS, WEIGHT = 1e-3, 1e-2


def batches_of(tokenizer: Any, text: str, length: int, rows: int) -> list[torch.Tensor]:
    """The text's tokens, cut into rows of `length`, some rows a batch."""
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids[0]
    whole = ids[: len(ids) // length * length].view(-1, length)
    return list(whole.split(rows))


def train(model: Any, batches: list[torch.Tensor], steps: int, rate: float) -> tuple[Any, list[float]]:
    """The model with an adapter that was trained for so many steps, and the loss of each; nothing here is of ranks."""
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=rate)
    losses = []
    model.train()
    for step in range(steps):
        batch = batches[step % len(batches)].to(model.device)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        clip_grad_norm_(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return model.eval(), losses


def continuation(model: Any, tokenizer: Any, new_tokens: int = 16) -> list[int]:
    """The tokens with which the model goes on after the prompt."""
    prompt = tokenizer(PROMPT, return_tensors="pt").to(model.device)
    return model.generate(**prompt, max_new_tokens=new_tokens, do_sample=False)[0].tolist()


def differences(
    arguments: argparse.Namespace, tokenizer: Any, batches: list[torch.Tensor], losses: list[float], made: list[int]
) -> list[str]:
    """What is not as one process has it: losses, the adapter's weights, what it writes once loaded there."""
    alone = transformers.AutoModelForCausalLM.from_pretrained(arguments.checkpoint)
    alone, expected = train(alone, batches, arguments.steps, arguments.rate)
    found = [
        f"loss {got:.6f} in step {step}, {want:.6f} in one process"
        for step, (got, want) in enumerate(zip(losses, expected, strict=True))
        if abs(got - want) > LOSS * want
    ]
    alone.save_pretrained(f"{arguments.output}/alone")
    one, ranks = (
        load_file(f"{folder}/adapter_model.safetensors") for folder in (f"{arguments.output}/alone", arguments.output)
    )
    found += [f"{name} is in one of the two adapters" for name in one.keys() ^ ranks.keys()]
    found += [name for name in one if (one[name] - ranks[name]).norm() > WEIGHT * one[name].norm()]
    base = transformers.AutoModelForCausalLM.from_pretrained(arguments.checkpoint)
    if continuation(PeftModel.from_pretrained(base, arguments.output), tokenizer) != made:
        found.append("the adapter, loaded in one process, writes something else")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--output", required=True, help="the folder for the adapter")
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--length", type=int, default=64, help="tokens in a row")
    parser.add_argument("--rows", type=int, default=4, help="rows in a batch")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--storage", choices=["dtensor", "local"], default="dtensor")
    parser.add_argument("--compare", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    tokenizer = AutoTokenizer.from_pretrained(arguments.checkpoint)
    batches = batches_of(tokenizer, arguments.text.read_text(encoding="utf-8"), arguments.length, arguments.rows)
    model = AutoModelForCausalLM.from_pretrained(arguments.checkpoint, tp_plan="auto", storage=arguments.storage)
    start = time.perf_counter()
    model, losses = train(model, batches, arguments.steps, arguments.rate)
    seconds = (time.perf_counter() - start) / arguments.steps
    made = continuation(model, tokenizer)
    model.save_pretrained(arguments.output)

    wrong: list[str] = []
    if dist.get_rank() == 0:
        print(f"loss      {' '.join(f'{loss:.3f}' for loss in losses)}")
        print(f"step      {seconds:.2f} s on {dist.get_world_size()} ranks")
        print(f"writes    {tokenizer.decode(made)!r}")
        print(f"adapter   {arguments.output}")
        if arguments.compare:
            wrong = differences(arguments, tokenizer, batches, losses, made)
            print("check     " + ("as in one process" if not wrong else "\n          ".join(wrong)))
    dist.barrier()
    dist.destroy_process_group()
    if wrong:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
