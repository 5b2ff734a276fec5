"""The README's examples that need ranks run as they stand."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import ENDING

README = Path(__file__).resolve().parents[2] / "README.md"
BLOCK = re.compile(r"<!-- torchrun (\d+) -->\n```python\n(.*?)```", re.DOTALL)
BLOCKS = BLOCK.findall(README.read_text(encoding="utf-8"))


def test_the_readme_has_such_an_example_of_about_ten_lines() -> None:
    assert BLOCKS
    for _, code in BLOCKS:
        assert sum(1 for line in code.splitlines() if line and not line.startswith(("import", "from"))) <= 10


@pytest.mark.parametrize(("ranks", "code"), BLOCKS)
def test_an_example_runs_on_its_ranks(ranks: str, code: str, tmp_path: Path) -> None:
    (tmp_path / "example.py").write_text(code + ENDING)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", ranks, str(tmp_path / "example.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["torch.Size([32, 16]) torch.Size([64, 16])"]
