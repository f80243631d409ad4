"""The native sources: every CUDA file compiles for sm_90 without a torch header and without a warning."""

import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"
CUDA_FILES = sorted(CSRC.glob("*/*.cu"))


def test_there_are_cuda_files():
    assert CUDA_FILES


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize("path", CUDA_FILES, ids=lambda p: p.stem)
def test_cuda_compiles_for_sm_90(path, tmp_path):
    command = ["nvcc", "-std=c++17", "-arch=sm_90", "-O3", "-Werror", "all-warnings", "-Xptxas", "-v", f"-I{CSRC}"]
    done = subprocess.run([*command, "-c", path, "-o", tmp_path / "out.o"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert " spill " not in done.stderr.replace("0 bytes spill stores, 0 bytes spill loads", ""), done.stderr


@pytest.mark.parametrize("path", sorted(CSRC.rglob("*.cu")) + sorted(CSRC.glob("*/*.h")), ids=lambda p: p.name)
def test_kernels_need_no_torch(path):
    text = path.read_text()
    assert "ATen" not in text and "torch/" not in text
