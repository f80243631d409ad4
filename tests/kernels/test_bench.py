"""The benchmark checks before it times, and refuses to time what is wrong."""

import json

import pytest

from kernels import available_backends, bench
from kernels.par import bench as par_bench


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(par_bench, "SHAPES", {"tiny": (1, 2, 9, 8)})
    monkeypatch.setattr(bench, "ROUNDS", 2)


def test_times_every_backend(tmp_path, capsys):
    assert bench.main(["par", "--json", str(tmp_path / "out.json")]) == 0
    result = json.loads((tmp_path / "out.json").read_text())
    assert set(result["machine"]) == {"device", "threads", "torch"}
    (row,) = result["rows"]
    assert set(row["median_ms"]) == set(available_backends("par", "cpu")) and row["red"] == []
    assert "the reference" in capsys.readouterr().out


def test_wrong_backends_are_not_timed(monkeypatch, capsys):
    monkeypatch.setattr(par_bench, "check", lambda name, device, backend: float("nan"))
    monkeypatch.setattr(par_bench, "run", lambda *_: pytest.fail("timed a wrong op"))
    assert bench.main(["par"]) == 1
    assert "WRONG" in capsys.readouterr().out
