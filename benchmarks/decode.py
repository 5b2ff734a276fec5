"""Tokens per second of real models, beside transformers' own parallelism and one process. Ratios, never seconds.

python benchmarks/decode.py [CASE ...] [--repeats 9] [--quick] [--json FILE]

The models are SmolLM2-135M-Instruct, which `make test` fetches (or examples/get_smollm2.py), and a mixture of half a
billion random parameters, 32 experts in each of 16 layers. The ranks of a case are spawned (gloo, one thread each) and
have the model three times: as this project splits it, as transformers does, and whole, on the first rank alone. The
sides take turns.

    prefill   of a text: its tokens at once, and the token that follows
    decode    greedy, one token after the other, on the cache that the prefill left

What is printed is how many times as many tokens per second this project writes: the median over the turns of the ratio
of one turn to the other's beside it, where a turn takes as long as its slowest rank. All tokens are compared with those
of one process. Exit status 1 where one is another, or where transformers is not slower.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from real.cases import Case, tokens_of
from real.turns import Clock, Turn
from real.verdict import parser_of, told

PROMPT, NEW = 128, 16  # tokens
LAPS = ("prefill", "decode")


def turn(model: Any, case: Case) -> Turn:
    """Reads the prompt and writes `NEW` tokens, which are its answer."""
    prompt = tokens_of(case, PROMPT)

    @torch.no_grad()
    def take(clock: Clock) -> list[float]:
        with clock.lap("prefill"):
            output = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
            written = [output.logits[:, -1:].argmax(-1)]
        with clock.lap("decode"):
            for _ in range(NEW):
                output = model(input_ids=written[-1], past_key_values=output.past_key_values, use_cache=True)
                written.append(output.logits[:, -1:].argmax(-1))
        return torch.cat(written, dim=1)[0].tolist()

    return take


def main() -> None:
    arguments = parser_of(__doc__, repeats=9).parse_args()
    sys.exit(told(arguments, turn, LAPS, goals=LAPS, tolerance=0.0))


if __name__ == "__main__":
    main()
