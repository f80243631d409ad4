"""Shared by all tests: fixed seeds, and which of the two sessions of `make test` this is.

Without WSSS_TEST_GPU no test sees a GPU: ranks are as many as a test asks for and talk over gloo, on any machine.
`WSSS_TEST_GPU=1 python -m pytest -m gpu` is the session of the tests that need one, in a single process.
"""

import os
from pathlib import Path

import pytest

GPU_SESSION = os.environ.get("WSSS_TEST_GPU") == "1"
if GPU_SESSION:
    os.environ["DS_ACCELERATOR"] = "cuda"
else:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # DeepSpeed's launcher sets that variable for its ranks; each clears it again as its Python starts
    hidden, path = str(Path(__file__).parent / "hidden_gpu"), os.environ.get("PYTHONPATH", "")
    if hidden not in path.split(os.pathsep):
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (hidden, path)))

import torch  # noqa: E402  only now: it looks at the environment


def pytest_collection_modifyitems(items):
    if GPU_SESSION:
        if not torch.cuda.is_available():
            raise pytest.UsageError("WSSS_TEST_GPU is 1, torch sees no CUDA device; unset it, or `make test HAS_GPU=`")
        return
    skip = pytest.mark.skip(reason="needs a CUDA device and WSSS_TEST_GPU=1")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
