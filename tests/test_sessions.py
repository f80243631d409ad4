"""The two sessions of `make test`: one without any GPU, one of the tests that need one (tests/conftest.py)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_a_rank_sees_no_gpu_whatever_its_launcher_says():
    """DeepSpeed's gives its ranks CUDA_VISIBLE_DEVICES=0,1, also those that DS_ACCELERATOR keeps on the CPU."""
    code = "import os; print(repr(os.environ['CUDA_VISIBLE_DEVICES']))"
    for given in ("0,1", ""):
        env = {**os.environ, "CUDA_VISIBLE_DEVICES": given}
        said = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        assert said.stdout.strip() == "''"


@pytest.mark.parametrize(("gpu", "sessions"), [("HAS_GPU=", 1), ("HAS_GPU=1", 2)])
def test_make_test_has_a_second_session_where_there_is_a_gpu(gpu, sessions):
    said = subprocess.run(["make", "-n", "test", gpu], cwd=ROOT, capture_output=True, text=True, check=True)
    runs = [line for line in said.stdout.splitlines() if " -m pytest" in line]
    assert len(runs) == sessions and "WSSS_TEST_GPU" not in runs[0]
    if sessions == 2:
        assert "WSSS_TEST_GPU=1 " in runs[1] and runs[1].endswith("-m pytest -m gpu")
        assert said.stdout.splitlines()[-1] == runs[1], "its summary is the last line"


def test_a_session_of_gpu_tests_without_a_gpu_is_an_error():
    env = {**os.environ, "WSSS_TEST_GPU": "1"}  # CUDA_VISIBLE_DEVICES is empty already
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "tests/kernels/test_gpu.py"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 4 and "torch sees no CUDA device" in done.stderr
