"""An installed copy, from the wheel, away from the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ranks import ENDING

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the installed package, and nothing of the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    kept = ("src", "plans", "setup.cfg", "pyproject.toml", "README.md", "LICENSE")
    source.mkdir()
    for name in kept:  # a copy, so that the checkout gets no build folder
        subprocess.run(["cp", "-r", str(ROOT / name), str(source / name)], check=True)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    wheel = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(source)]
    subprocess.run(wheel, check=True, capture_output=True)
    (file,) = folder.glob("*.whl")
    zipfile.ZipFile(file).extractall(folder / "site")
    return folder / "site"


SCRIPT = """
import sys
from pathlib import Path
import parallel_plans
from parallel_plans import AutoModelForCausalLM, load_plan, parallel_of
from parallel_plans.lookup import bundled_folder, bundled_types

site = Path(sys.argv[2])
assert Path(parallel_plans.__file__).is_relative_to(site), parallel_plans.__file__
assert bundled_folder() == site / "parallel_plans" / "plans"
for model_type in bundled_types():
    assert load_plan(bundled_folder() / f"{model_type}.yaml").model_type == model_type
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], tp_plan="auto")
if parallel_of(model).place.is_first:
    print(len(bundled_types()), parallel_of(model).table.plan.source)
"""


def test_the_plans_are_in_the_wheel_and_an_installed_copy_finds_them(
    installed: Path, checkpoints: Callable[..., Any], tmp_path: Path
) -> None:
    folder, _ = checkpoints("gemma2", True)
    (tmp_path / "script.py").write_text(SCRIPT + ENDING)
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(tmp_path / "script.py")]
    done = subprocess.run(
        [*command, str(folder), str(installed)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=180, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    shipped = len(list((ROOT / "plans").glob("*.yaml")))
    source = installed / "parallel_plans" / "plans" / "gemma2.yaml"
    shown = os.path.relpath(source, tmp_path) if source.is_relative_to(tmp_path) else str(source)
    assert done.stdout.splitlines() == [f"{shipped} {shown}"]


def test_the_wheel_ships_the_format_and_the_type_marker_and_no_tests(installed: Path) -> None:
    files = {str(path.relative_to(installed)) for path in installed.rglob("*") if path.is_file()}
    assert {"parallel_plans/plans/SPEC.md", "parallel_plans/py.typed", "parallel_plans/hub.py"} <= files
    tops = {name.split("/")[0] for name in files}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"parallel_plans"}
