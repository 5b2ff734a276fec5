"""`examples/finetune_lora.py` under torchrun, on a tiny model with the real model's tokenizer."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import tiny_model

ROOT = Path(__file__).resolve().parents[2]
REAL = ROOT / ".cache" / "SmolLM2-135M-Instruct"


@pytest.fixture
def speaking(tmp_path: Path) -> Path:
    """A tiny model with a vocabulary that there is a tokenizer for."""
    assert REAL.is_dir(), "make test fetches the model; run it once"
    heads = {"num_attention_heads": 6, "num_key_value_heads": 3}
    tiny_model("llama", tied=True, vocab_size=49152, max_position_embeddings=256, **heads).save_pretrained(
        tmp_path / "tiny"
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(REAL / name, tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.mark.parametrize(("ranks", "storage"), [(2, "dtensor")])
def test_it_trains_an_adapter_as_one_process_does(ranks: int, storage: str, speaking: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    script = [str(ROOT / "examples" / "finetune_lora.py"), str(speaking), "--output", str(tmp_path / "adapter")]
    options = ["--steps", "3", "--rows", "1", "--length", "32", "--storage", storage, "--compare"]
    done = subprocess.run([*command, *script, *options], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "check     as in one process" in done.stdout
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
