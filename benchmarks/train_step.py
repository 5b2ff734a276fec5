"""Time of a training step of a real model, beside transformers' own parallelism and beside one process. Ratios only.

python benchmarks/train_step.py [CASE ...] [--repeats 5] [--quick] [--json FILE]

Models, ranks and turns are those of `decode.py`. A step is a forward and a backward pass of a text and a step of AdamW
(the mixture: SGD, for memory), as torch does it by default; every side trains its own copy, from the same weights, with
the same text.

    step        all of it
    forward     its parts
    backward
    optimizer

What is printed is how many times as fast this project is: the median over the turns of the ratio of one turn to the
other's beside it, where a turn takes as long as its slowest rank. The losses of all steps are compared with those of
one process, so gradients and updates are compared too. Exit status 1 where one differs, or where transformers is not
slower; of parts nothing is asked.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import torch
from real.cases import Case, tokens_of
from real.turns import Clock, Turn
from real.verdict import parser_of, told

LENGTH = 128  # tokens
OPTIMIZERS = {"AdamW": partial(torch.optim.AdamW, lr=1e-5), "SGD": partial(torch.optim.SGD, lr=1e-2)}
SAME_LOSS = 1e-3  # of the loss
LAPS = ("step", "forward", "backward", "optimizer")


def turn(model: Any, case: Case) -> Turn:
    """A step, whose answer is its loss."""
    batch = tokens_of(case, LENGTH)
    optimizer = OPTIMIZERS[case.optimizer](model.parameters())
    model.train()

    def take(clock: Clock) -> list[float]:
        with clock.lap("step"):
            with clock.lap("forward"):
                loss = model(input_ids=batch, labels=batch, use_cache=False).loss
            with clock.lap("backward"):
                loss.backward()
            with clock.lap("optimizer"):
                optimizer.step()
                optimizer.zero_grad()
        return [loss.item()]

    return take


def main() -> None:
    arguments = parser_of(__doc__, repeats=5).parse_args()
    sys.exit(told(arguments, turn, LAPS, goals=("step",), tolerance=SAME_LOSS))


if __name__ == "__main__":
    main()
