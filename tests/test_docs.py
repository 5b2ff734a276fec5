"""The generated pages are up to date, and what the pages show runs as it stands.

Comments on the lines before a block say what is done with it:

    <!-- run -->            python: runs in one process, after the blocks before it on the page
    <!-- torchrun 2 -->     python: runs as a file of its own on so many ranks
    <!-- pytest NAME -->    python: lies beside what runs, under this name, and its tests pass
    <!-- file NAME -->      any: lies beside what runs, under this name
    <!-- plan -->           yaml: a plan that loads
    <!-- piece NAME -->     yaml: rules as they stand in a plan that ships
    <!-- command -->        one command of `parallel-plans`: runs in the root of the repository
    <!-- output -->         text: what the last block that ran has printed
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from ranks import ENDING

from parallel_plans.loader import load_plan

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
WRITTEN = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
MARKED = re.compile(r"((?:^<!-- [^\n]* -->\n)+)^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
MARK = re.compile(r"^<!-- (run|torchrun|pytest|file|plan|piece|command|output)(?: (\S+))? -->$", re.MULTILINE)
MESSAGES = re.compile(r"^```text\n.*?^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")
END_OF_BLOCK = "=== end of block ==="


@dataclass(frozen=True)
class Block:
    """A marked block of a page."""

    mark: str
    argument: str
    language: str
    text: str


def blocks(page: Path) -> list[Block]:
    """The marked blocks of a page; one that has two marks comes twice."""
    return [
        Block(mark, argument, language, text)
        for comments, language, text in MARKED.findall(page.read_text(encoding="utf-8"))
        for mark, argument in MARK.findall(comments)
    ]


def ran(command: list[str], folder: Path) -> str:
    """What a command prints that runs in `folder`, on the CPU; fails where it does."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *command]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def outputs(of_page: list[Block], folder: Path) -> Iterator[str | None]:
    """For every block what it printed; None for one that does not run."""
    for block in of_page:
        if block.mark in ("file", "pytest"):
            (folder / block.argument).write_text(block.text, encoding="utf-8")
    texts = [f"{block.text}\nprint({END_OF_BLOCK!r})\n" for block in of_page if block.mark == "run"]
    (folder / "page.py").write_text("".join(texts), encoding="utf-8")
    printed = iter(ran(["page.py"], folder).split(f"{END_OF_BLOCK}\n") if texts else [])
    for number, block in enumerate(of_page):
        if block.mark == "run":
            yield next(printed)
        elif block.mark == "torchrun":
            name = f"block_{number}.py"
            (folder / name).write_text(block.text + ENDING, encoding="utf-8")
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", block.argument]
            yield ran([*launcher, name], folder)
        elif block.mark == "pytest":
            ran(["-m", "pytest", "-p", "no:cacheprovider", block.argument], folder)
            yield None
        elif block.mark == "command":
            program, *words = shlex.split(block.text)
            assert program == "parallel-plans"
            printed_lines = ran(["-m", "parallel_plans.cli.main", *words], ROOT).splitlines()
            yield "".join(f"{line.rstrip()}\n" for line in printed_lines)  # cells of a table are filled with spaces
        else:
            yield None


def test_generated_pages_are_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, "docs/generate.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.stem)
def test_what_a_page_shows_runs_and_prints_what_it_says(page: Path, tmp_path: Path) -> None:
    found = [block for block in blocks(page) if page.name != "README.md" or block.mark != "torchrun"]  # test_readme's
    (tmp_path / "plans").symlink_to(ROOT / "plans")
    last = None
    for block, printed in zip(found, outputs(found, tmp_path), strict=True):
        last = last if printed is None else printed
        if block.mark == "output":
            assert last == block.text


@pytest.mark.parametrize("page", [*PAGES, ROOT / "plans/SPEC.md"], ids=lambda page: page.stem)
def test_the_plans_on_a_page_load(page: Path, tmp_path: Path) -> None:
    for number, block in enumerate(blocks(page)):
        if block.mark == "plan":
            assert block.language == "yaml"
            path = tmp_path / f"{number}.yaml"
            path.write_text(block.text, encoding="utf-8")
            assert load_plan(path).rules("tp_plan")


def test_pieces_of_plans_stand_in_these_plans() -> None:
    pieces = [block for page in PAGES for block in blocks(page) if block.mark == "piece"]
    assert pieces
    for block in pieces:
        shown = yaml.safe_load(block.text)
        rules = yaml.safe_load((ROOT / f"plans/{block.argument}.yaml").read_text(encoding="utf-8"))["tp_plan"]
        assert {name: rules.get(name) for name in shown} == shown


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.stem)
def test_pages_are_short_lines_of_ascii_with_links_that_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert text.isascii()
    written = MESSAGES.sub("", text)
    assert [line for line in written.splitlines() if len(line) > 120 and not line.startswith("|")] == []
    assert [link for link in LINK.findall(text) if not (page.parent / link).exists()] == []
