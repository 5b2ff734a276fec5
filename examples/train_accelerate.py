"""A checkpoint, split across ranks by a plan, goes on learning from a text file, with accelerate.

accelerate launch --config_file configs/accelerate/tp2.yaml examples/train_accelerate.py CHECKPOINT TEXT --output FOLDER

The launch file says how many ranks hold the model together and how many batches there are at a time. On one process
(`python examples/train_accelerate.py ...`) the same script trains the ordinary model. With `--state FOLDER` it keeps
weights, optimizer and random numbers there after every `--save-every` steps, and goes on from it where it is already.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DataLoaderConfiguration, set_seed
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from parallel_plans import AutoModelForCausalLM
from parallel_plans.integrations.accelerate import Accelerator


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("text")
    parser.add_argument("--output", help="a folder for the checkpoint that comes out")
    parser.add_argument("--state", help="a folder to keep the state of the run in, and to go on from")
    parser.add_argument("--save-every", type=int, default=100)
    parser.add_argument("--ep-size", type=int, help="ranks over which a mixture's experts are dealt")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=4, help="rows of a batch; every tp group has its own")
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--storage", default="dtensor")
    return parser.parse_args()


def rows_of(tokenizer: Any, path: str, length: int) -> list[dict[str, torch.Tensor]]:
    """The text in rows of `length` tokens; what is left over is dropped."""
    tokens = tokenizer(Path(path).read_text(encoding="utf-8"), return_tensors="pt").input_ids[0]
    rows = tokens[: len(tokens) // length * length].view(-1, length)
    return [{"input_ids": row, "labels": row} for row in rows]


def main() -> None:
    asked = arguments()
    set_seed(0)
    # an order of rows that depends on seed and epoch alone: the same on any number of ranks, and after a restart
    loading = DataLoaderConfiguration(use_seedable_sampler=True)
    accelerator = Accelerator(gradient_accumulation_steps=asked.accumulate, dataloader_config=loading)
    tokenizer = AutoTokenizer.from_pretrained(asked.checkpoint)
    model = AutoModelForCausalLM.from_pretrained(
        asked.checkpoint,
        tp_plan="auto",
        ep_plan=None if asked.ep_size is None else "auto",
        ep_size=asked.ep_size,
        storage=asked.storage,
        dtype=torch.float32,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=asked.learning_rate)
    rows = rows_of(tokenizer, asked.text, asked.length)
    loader = DataLoader(rows, batch_size=asked.batch_size, shuffle=True, drop_last=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 10))
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    progress = Progress()
    accelerator.register_for_checkpointing(progress)
    if asked.state and Path(asked.state).is_dir():
        accelerator.load_state(asked.state)
    train(asked, accelerator, model, optimizer, loader, schedule, progress)
    if asked.output:
        accelerator.unwrap_model(model).save_pretrained(asked.output)
        if accelerator.is_main_process:
            tokenizer.save_pretrained(asked.output)
    accelerator.end_training()


class Progress:
    """How far the run has come, kept with its state: optimizer steps, epochs, and batches of this epoch."""

    def __init__(self) -> None:
        self.steps = self.epoch = self.batches = 0

    def state_dict(self) -> dict[str, int]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, int]) -> None:
        vars(self).update(state)


def train(
    asked: argparse.Namespace,
    accelerator: Accelerator,
    model: Any,
    optimizer: Any,
    loader: Any,
    schedule: Any,
    progress: Progress,
) -> None:
    """Trains until `asked.steps` steps are made, those of an earlier run included."""
    model.train()
    while progress.steps < asked.steps:
        loader.set_epoch(progress.epoch)
        for batch in accelerator.skip_first_batches(loader, progress.batches):
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            progress.batches += 1
            if not accelerator.sync_gradients:
                continue
            progress.steps += 1
            mean = accelerator.gather_for_metrics(loss.detach()).mean().item()
            accelerator.print(f"step {progress.steps}: loss {mean:.4f}, gradient norm {norm.item():.4f}")
            if asked.state and progress.steps % asked.save_every == 0:
                accelerator.save_state(asked.state)
            if progress.steps == asked.steps:
                return
        progress.epoch, progress.batches = progress.epoch + 1, 0


if __name__ == "__main__":
    main()
