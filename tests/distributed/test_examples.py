"""The examples for generating and for a module of one's own run, on ranks as in one process."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ranks import run_on_ranks
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

EXAMPLES = str(Path(__file__).resolve().parents[2] / "examples")
TEMPLATE = "{% for message in messages %}say {{ message['content'] }} {% endfor %}now"
PROMPTS = ["one two three", "four", "five one"]


@pytest.fixture
def examples() -> Iterator[None]:
    """The examples can be imported."""
    sys.path.insert(0, EXAMPLES)
    yield
    sys.path.remove(EXAMPLES)


def with_tokenizer(folder: Path) -> Path:
    """The checkpoint, with a word for each token of its vocabulary."""
    words = ["pad", "bos", "eos", "say", "now", "one", "two", "three", "four", "five"]
    words += [f"word{number}" for number in range(len(words), 101)]
    model = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="pad"))
    model.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, pad_token="pad", eos_token="eos")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def generated(*arguments: str) -> str:
    import generate

    with contextlib.redirect_stdout(io.StringIO()) as told:
        generate.main([*arguments, "--new-tokens", "5", "--dtype", "float32"])
    return told.getvalue()


@pytest.mark.parametrize(
    "options", [(), ("--raw",), ("--sample", "--temperature", "0.8", "--top-p", "0.9", "--seed", "3")]
)
def test_ranks_generate_what_one_process_does(
    options: tuple[str, ...], checkpoints: Callable[..., Any], examples: None
) -> None:
    folder = str(with_tokenizer(checkpoints("llama", False)[0]))
    alone = generated(folder, *PROMPTS, *options)
    assert [line[2:] for line in alone.splitlines() if line.startswith("> ")] == PROMPTS
    assert run_on_ranks(generated, 2, folder, *PROMPTS, *options) == [alone, ""]


def test_ranks_with_batches_of_their_own_share_the_prompts(mixtures: Callable[..., Any], examples: None) -> None:
    folder = str(with_tokenizer(mixtures("qwen3_moe")[0]))
    alone = generated(folder, *PROMPTS)
    assert run_on_ranks(generated, 4, folder, *PROMPTS, "--tp", "2", "--ep", "4") == [alone, "", "", ""]


def own_model() -> str:
    import own_model

    with contextlib.redirect_stdout(io.StringIO()) as told:
        own_model.main(["--steps", "3"])
    return told.getvalue()


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_module_of_ones_own_trains_as_in_one_process(ranks: int, examples: None) -> None:
    first, *others = run_on_ranks(own_model, ranks)
    assert first.endswith(": the same\n")
    assert others == [""] * (ranks - 1)


def test_the_plan_of_the_module_is_sound(examples: None) -> None:
    told = own_model()
    assert told.splitlines() == ["tp 2: sound", "tp 3: sound", "tp 4: sound"]
