"""Nothing assumes a device: it comes from the mesh, and the backend from the device."""

from __future__ import annotations

import ast
from pathlib import Path

import parallel_plans

SOURCE = Path(parallel_plans.__file__).parent
KINDS = {"cpu", "cuda", "xpu", "mps", "npu", "hpu", "nccl", "gloo"}
# the CPU is where safetensors files are mapped and ranks simulated, and what is left where there is no accelerator
ALLOWED = {
    "mesh.py": {"cpu", "gloo"},
    "collectives.py": {"gloo", "nccl"},  # which backends sum several values in one collective
    "checkpoint/files.py": {"cpu"},
    "checkpoint/file_source.py": {"cpu"},
    "checkpoint/load.py": {"cpu"},
    "checkpoint/conversion.py": {"cpu"},
    "checkpoint/stand_in.py": {"cpu"},
    "random_state.py": {"cpu"},
    "loading.py": {"cpu"},
    "integrations/accelerate.py": {"cpu"},  # accelerate's own word; states are saved from host memory
    "integrations/batches.py": {"cpu"},
    "integrations/optimizers.py": {"cpu"},
    "integrations/weights.py": {"cpu"},
    "training/contents.py": {"cpu"},
    "training/optimizer_tensors.py": {"cpu"},
    "training/state.py": {"cpu"},
    "training/stored.py": {"cpu"},
    "verify/numerics.py": {"cpu"},
    "verify/own.py": {"cpu"},
    "verify/real_size.py": {"cpu"},
}


def test_no_module_names_a_device_or_backend_of_its_own() -> None:
    for path in sorted(SOURCE.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        named = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and node.value in KINDS}
        name = str(path.relative_to(SOURCE))
        assert named <= ALLOWED.get(name, set()), f"{name} names {named}"
