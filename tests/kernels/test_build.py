"""The native sources: every CUDA file compiles for sm_90 without a torch header and without a warning."""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from torch.utils.cpp_extension import COMMON_NVCC_FLAGS

CSRC = Path(__file__).resolve().parents[2] / "csrc"
CUDA_FILES = sorted(CSRC.glob("*/*.cu"))


def test_there_are_cuda_files():
    assert CUDA_FILES


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """CUDA file -> the future of its compilation; they run side by side."""
    folder = tmp_path_factory.mktemp("cuda")
    strict = ["-Werror", "all-warnings", "-Xptxas", "-v"]
    # COMMON_NVCC_FLAGS: what the build adds, such as no conversions of half types
    command = ["nvcc", "-std=c++17", "-arch=sm_90", "-O3", *COMMON_NVCC_FLAGS, *strict, f"-I{CSRC}"]

    def run(path):
        call = [*command, "-c", path, "-o", folder / f"{path.stem}.o"]
        return subprocess.run(call, capture_output=True, text=True, check=False)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {path: pool.submit(run, path) for path in CUDA_FILES}


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize("path", CUDA_FILES, ids=lambda p: p.stem)
def test_cuda_compiles_for_sm_90(path, compiled):
    done = compiled[path].result()
    assert done.returncode == 0, done.stderr
    assert " spill " not in done.stderr.replace("0 bytes spill stores, 0 bytes spill loads", ""), done.stderr


KERNEL_FILES = [*sorted(CSRC.rglob("*.cu")), *(p for p in sorted(CSRC.glob("*/*.h")) if not p.stem.endswith("_check"))]


@pytest.mark.parametrize("path", KERNEL_FILES, ids=lambda p: p.name)
def test_kernels_need_no_torch(path):
    """Checks of tensors lie in *check.h, for the bindings."""
    text = path.read_text()
    assert "ATen" not in text and "torch/" not in text and 'check.h"' not in text


def setup_says(**environment):
    """Exit status and messages of setup.py when it does nothing but look around."""
    command = [sys.executable, "setup.py", "--name"]
    env = {**os.environ, **environment}
    done = subprocess.run(command, cwd=CSRC.parent, env=env, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def test_setup_without_a_compiler_still_installs():
    code, text = setup_says(CXX="no-such-compiler")
    assert code == 0 and "installing without kernels._C, the native backend: no C++ compiler" in text


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_setup_refuses_a_wrong_switch():
    code, text = setup_says(WSSS_CUDA="yes")
    assert code != 0 and "WSSS_CUDA must be 0 or 1, got 'yes'" in text
    code, text = setup_says(WSSS_SANITIZE="adress")
    assert code != 0 and "WSSS_SANITIZE must be a list of address, undefined, leak, thread; got 'adress'" in text
