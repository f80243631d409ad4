"""Backend selection, and the place the package is imported from."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kernels
from kernels import backend

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _restore():
    before = dict(backend._settings)
    yield
    backend._settings.clear()
    backend._settings.update(before)


@pytest.fixture
def toy(monkeypatch):
    """An op with two implementations that return their names."""
    monkeypatch.setitem(backend._implementations, "toy", {"reference": lambda: "reference", "native": lambda: "native"})
    monkeypatch.setitem(backend.AUTO, "toy", {"cpu": ("native", "reference")})
    monkeypatch.setattr(backend, "native_problem", lambda op: None)


@pytest.fixture
def plain(monkeypatch):
    """An op with a reference alone."""
    monkeypatch.setitem(backend._implementations, "plain", {"reference": lambda: "reference"})


CPU = torch.device("cpu")


def test_package_is_ours():
    # A package of the same name exists on the index and comes along with other libraries.
    assert Path(kernels.__file__).resolve().is_relative_to(ROOT)


def test_every_op_has_a_reference():
    ops = set(kernels.__all__) - {
        "PSLLoss",
        "RegionSelection",
        "available_backends",
        "check_backends",
        "configure",
        "dense_crf_unary",
    }
    erase = {"erase_hard", "erase_maximum", "erase_soft"}  # the functions of one op
    assert erase <= ops
    ops = (ops - erase) | {"erase"}
    assert ops == set(backend._implementations)
    for op in ops:
        assert "reference" in kernels.available_backends(op, "cpu")


def test_precedence_call_then_op_then_default(toy):
    assert backend.choose("toy", CPU, None)() == "native"  # auto: first of its list
    backend.configure("reference")
    assert backend.choose("toy", CPU, None)() == "reference"
    backend.configure("reference", toy="native")
    assert backend.choose("toy", CPU, None)() == "native"
    assert backend.choose("toy", CPU, "reference")() == "reference"


def test_auto_skips_what_cannot_run(toy, monkeypatch):
    monkeypatch.setattr(backend, "native_problem", lambda op: "not built")
    assert backend.choose("toy", CPU, "auto")() == "reference"


def test_named_backend_never_falls_back(toy, monkeypatch):
    monkeypatch.setattr(backend, "native_problem", lambda op: "not built")
    with pytest.raises(ValueError, match="toy: backend 'native' cannot run on cpu: not built; available: reference"):
        backend.choose("toy", CPU, "native")


def test_missing_implementation_is_named(plain):
    with pytest.raises(ValueError, match="plain: backend 'native' cannot run .* available: reference"):
        backend.choose("plain", CPU, "native")
    with pytest.raises(ValueError, match="backend 'triton'"):
        kernels.par(torch.zeros(1, 3, 2, 2), torch.zeros(1, 1, 2, 2), backend="triton")


def test_backends_that_cannot_run_are_found_before_a_call(plain):
    kernels.check_backends(CPU)
    kernels.configure("auto", plain="native")
    try:
        with pytest.raises(ValueError, match="plain: backend 'native' cannot run"):
            kernels.check_backends(CPU)
    finally:
        kernels.configure()


def test_unknown_names():
    with pytest.raises(ValueError, match="unknown op 'parr'; ops: .*par"):
        kernels.configure("auto", parr="native")
    with pytest.raises(ValueError, match="unknown backend 'cuda' for par; known: auto, reference"):
        kernels.configure("auto", par="cuda")
    with pytest.raises(ValueError, match="unknown op 'nothing'"):
        kernels.available_backends("nothing")


def test_configure_replaces_earlier_settings():
    kernels.configure("auto", par="reference")
    kernels.configure("auto")
    assert backend._settings == {"default": "auto"}


def test_package_works_without_the_native_module():
    code = (
        "import sys; sys.modules['kernels._C'] = None\n"
        "import torch, kernels\n"
        "assert kernels.available_backends('par', 'cpu') == ['reference']\n"
        "image, maps = torch.rand(1, 3, 4, 4), torch.rand(1, 1, 4, 4)\n"
        "kernels.par(image, maps)\n"
        "try: kernels.par(image, maps, backend='native')\n"
        "except ValueError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "kernels._C is not usable" in done.stdout and "available: reference" in done.stdout


def test_an_older_native_module_is_named(monkeypatch):
    monkeypatch.setattr(backend, "NATIVE_PROBLEM", None)
    assert "built from older sources, without no_such_op" in backend.native_problem("no_such_op")
