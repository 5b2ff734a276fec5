"""The real SmolLM2-135M-Instruct, which `make test` fetches: 9 heads and 3 key/value heads, tied embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_on_ranks
from tiny import assert_close
from transformers import AutoModelForCausalLM as Ordinary
from transformers import AutoTokenizer

from parallel_plans import AutoModelForCausalLM, parallel_of

FOLDER = Path(__file__).resolve().parents[2] / ".cache" / "SmolLM2-135M-Instruct"
NEW_TOKENS = 16


def answer_of(model: Any, folder: str) -> tuple[torch.Tensor, torch.Tensor, str]:
    """Logits of the prompt, tokens of the answer, and its text."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True, return_tensors="pt", return_dict=True,
    )  # fmt: skip
    with torch.no_grad():
        logits = model(**prompt).logits
    tokens = model.generate(**prompt, max_new_tokens=NEW_TOKENS, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    return logits, tokens, tokenizer.decode(tokens, skip_special_tokens=True)


def answer_on_a_rank(folder: str) -> tuple[Any, list[int], float]:
    model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto")
    parallel = parallel_of(model)
    assert parallel is not None
    assert parallel.loaded is not None
    own = parallel.table.rank_bytes(parallel.place.ranks)
    heads = [layer.self_attn.k_proj.weight._local_tensor.shape[0] // 64 for layer in model.model.layers]
    return answer_of(model, folder), heads, parallel.loaded.bytes_read / own


@pytest.mark.parametrize(("ranks", "heads"), [(2, [2, 1]), (3, [1, 1, 1])])
def test_the_answer_is_that_of_one_process_token_for_token(ranks: int, heads: list[int]) -> None:
    assert FOLDER.is_dir(), "make test fetches the model; run it once"
    logits, tokens, text = answer_of(Ordinary.from_pretrained(FOLDER), str(FOLDER))
    assert "Paris" in text
    for rank, (answer, own_heads, ratio) in enumerate(run_on_ranks(answer_on_a_rank, ranks, str(FOLDER))):
        assert_close("logits", answer[0], logits, relative=1e-4)
        assert torch.equal(answer[1], tokens)
        assert answer[2] == text
        assert own_heads == [heads[rank]] * 30
        assert 1.0 <= ratio <= 1.02
