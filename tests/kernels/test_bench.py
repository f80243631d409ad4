"""The benchmark refuses to time what is wrong."""

from types import SimpleNamespace

import pytest
import torch

from kernels import bench


def test_every_op_with_a_benchmark_runs(capsys):
    assert bench.benchmarked_ops()
    module = SimpleNamespace(
        FUNCTION=bench.kernels.par,
        TOLERANCE=1e-5,
        CASES={"small": lambda: {"image": torch.rand(1, 3, 9, 9), "maps": torch.rand(1, 2, 9, 9)}},
    )
    assert bench.bench_op("par", module, torch.device("cpu"), 1)
    assert "reference" in capsys.readouterr().out


def test_a_wrong_backend_is_not_timed(monkeypatch, capsys):
    monkeypatch.setattr(bench.kernels, "available_backends", lambda op, device: ["reference", "native"])
    calls = []

    def function(x, backend):
        calls.append(backend)
        return x * float("nan") if backend == "native" else x

    module = SimpleNamespace(FUNCTION=function, TOLERANCE=1.0, CASES={"small": lambda: {"x": torch.ones(2)}})
    assert not bench.bench_op("par", module, torch.device("cpu"), 3)
    out = capsys.readouterr().out
    assert "WRONG" in out and calls.count("native") == 1 and calls.count("reference") == 5


def test_unknown_op_is_named(capsys):
    with pytest.raises(SystemExit):
        bench.main(["parr"])
    assert "no benchmark for parr" in capsys.readouterr().err
