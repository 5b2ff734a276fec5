"""`examples/train.py` on tiny checkpoints: its ranks learn what one process learns, and it says so."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from tiny import VOCAB
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[2]


def save_tokenizer(folder: Path) -> None:
    """One that knows the letters of the text."""
    letters = sorted(set((ROOT / "examples" / "sonnets.txt").read_text(encoding="utf-8")))
    assert len(letters) < VOCAB
    plain = Tokenizer(models.WordLevel({letter: number for number, letter in enumerate(letters)}, letters[0]))
    plain.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=plain).save_pretrained(folder)


TORCHRUN = ["torch.distributed.run", "--nproc-per-node", "4"]
TP2 = str(ROOT / "configs" / "accelerate" / "tp2.yaml")
ACCELERATE = ["accelerate.commands.launch", "--config_file", TP2, "--main_process_port", "0"]


@pytest.mark.parametrize(
    ("kind", "launcher", "options"),
    [
        ("llama", ACCELERATE, ["--storage", "local", "--checkpointing"]),
        ("mixtral", TORCHRUN, ["--tp", "2", "--ep", "4"]),
    ],
)
def test_the_example_prints_the_losses_of_one_process(
    kind: str, launcher: list[str], options: list[str], checkpoints: Callable[..., Any], tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoints(kind, False)[0], folder)
    save_tokenizer(folder)
    command = [sys.executable, "-m", *launcher]
    command += [str(ROOT / "examples" / "train.py"), str(folder), *options, "--compare", "--steps", "4"]
    command += ["--rows", "4", "--tokens", "32", "--learning-rate", "1e-3", "--save", str(tmp_path / "trained")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found = re.findall(r"^ +\d +(\d+\.\d+) +(\d+\.\d+)$", done.stdout, re.MULTILINE)
    assert len(found) == 4, done.stdout
    for loss, truth in found:
        assert float(loss) == pytest.approx(float(truth), rel=1e-5)
    assert float(found[-1][0]) < float(found[0][0])
    (apart,) = re.findall(r"norm of the difference +(\S+) of the update's", done.stdout)
    assert 0 < float(apart) < 1e-2
    assert (tmp_path / "trained" / "config.json").is_file()
    before, after = (load_file(each / "model.safetensors") for each in (folder, tmp_path / "trained"))
    assert before.keys() == after.keys()
    assert not any(after[name].equal(tensor) for name, tensor in before.items())
