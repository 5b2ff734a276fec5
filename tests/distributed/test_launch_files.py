"""configs/accelerate: each file fits together, and what accelerate launches with it trains as one process does."""

from __future__ import annotations

import contextlib
import io
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from ranks import run_on_ranks
from tiny import VOCAB
from tokenizers import Tokenizer, models, pre_tokenizers
from tools import checkpoint
from transformers import AutoModelForCausalLM as Ordinary
from transformers import PreTrainedTokenizerFast

from parallel_plans.integrations.sizes import left_to_plans
from parallel_plans.launcher import launched_batches, launched_tp_size

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))
SCRIPT = str(ROOT / "examples" / "train_accelerate.py")
LINE = re.compile(r"^step (\d+): loss ([\d.]+), gradient norm ([\d.]+)$", re.MULTILINE)


def test_the_launch_files_are_those_that_are_spoken_of() -> None:
    assert [file.stem for file in FILES] == ["ep2", "multi_node", "tp2", "tp2_dp2"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_launch_file_starts_as_many_ranks_as_its_sizes_ask_for(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config_from_file(str(file))
    given = launch_command_parser().parse_args(["--config_file", str(file), "--main_process_port", "0", "script.py"])
    args, _, _ = _validate_launch_command(given)
    assert args.multi_gpu  # what is launched otherwise is one process
    environment = prepare_multi_gpu_env(args)
    for name, value in environment.items():
        if name.startswith(("ACCELERATE_", "PARALLELISM_")):
            monkeypatch.setenv(name, value)
    tp = launched_tp_size()
    assert tp == config.parallelism_config["parallelism_config_tp_size"]
    assert tp * launched_batches() == config.num_processes == args.num_processes
    sizes = left_to_plans(None)
    assert (sizes.tp_size, sizes.data_parallel_size) == (tp, launched_batches())
    assert not sizes  # accelerate itself is not to act on them
    assert int(args.nproc_per_node) * config.num_machines == config.num_processes
    assert int(args.nproc_per_node) % tp == 0  # what layers send stays within a machine


def learner(folder: Path, model_type: str) -> str:
    """The folder of a tiny model with a tokenizer of letters, beside a text."""
    checkpoint(folder, model_type)
    letters = {letter: number for number, letter in enumerate([chr(32 + number) for number in range(VOCAB - 6)])}
    tokenizer = Tokenizer(models.WordLevel({**letters, "?": len(letters)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(folder)
    (folder / "text.txt").write_text((ROOT / "LICENSE").read_text(encoding="utf-8")[:600], encoding="utf-8")
    return str(folder)


def shown(output: str) -> list[tuple[int, float, float]]:
    return [(int(step), float(loss), float(norm)) for step, loss, norm in LINE.findall(output)]


def run_here(arguments: list[str]) -> str:
    """What the script prints in one process."""
    sys.argv = [SCRIPT, *arguments]
    with contextlib.redirect_stdout(io.StringIO()) as output:
        runpy.run_path(SCRIPT, run_name="__main__")
    return output.getvalue()


def launched(file: str, arguments: list[str]) -> str:
    """What the script prints that accelerate launches."""
    config = str(ROOT / "configs" / "accelerate" / file)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, "--main_process_port", "0"]
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    environment: dict[str, Any] = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(
        [*command, SCRIPT, *arguments], capture_output=True, text=True, timeout=300, env=environment, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("file", "model_type", "more"),
    [("tp2.yaml", "llama", []), ("ep2.yaml", "mixtral", ["--ep-size", "2", "--storage", "local"])],
)
def test_what_accelerate_launches_trains_as_one_process_does(
    file: str, model_type: str, more: list[str], tmp_path: Path
) -> None:
    folder = learner(tmp_path / "start", model_type)
    text, out, state = (str(tmp_path / name) for name in ("start/text.txt", "out", "state"))
    asked = [folder, text, "--steps", "3", "--length", "20", "--batch-size", "2", "--accumulate", "2"]
    (alone,) = run_on_ranks(run_here, 1, asked)
    found, truth = (
        shown(launched(file, [*asked, *more, "--output", out, "--state", state, "--save-every", "2"])),
        shown(alone),
    )
    assert len(found) == 3
    for row, other in zip(found, truth, strict=True):
        assert row == pytest.approx(other, rel=1e-3)
    _, info = Ordinary.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    (on,) = run_on_ranks(run_here, 1, [*asked, "--state", state])  # one process goes on from the ranks' second step
    assert shown(on) == [pytest.approx(truth[2], rel=1e-3)]
