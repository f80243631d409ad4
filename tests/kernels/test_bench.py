"""The benchmark checks before it times, refuses to time what is wrong, and holds every op against others."""

import importlib
import json

import pytest
import torch

from kernels import available_backends, bench, measure
from kernels.par import bench as par_bench

CPU = torch.device("cpu")
TINY = {
    "c2am_contrast": (6, 8),
    "c2am_pool": (2, 5, 3, 4, True),
    "dense_energy": (1, 3, 16, 16),
    "dilate_regions": (1, 2, 9, 8, 3.0, 0.1),
    "erase": (2, 12, 10, 3, 4, "soft backward"),
    "max_upsampled_masks": (2, 4, 5, 2, 6, 2.0, True),
    "par": (1, 2, 9, 8),
    "path_affinity_loss": (2, 9, 12, 3),
    "psl_loss": (2, 6, 9, 8),
    "radius_mask": (2, 4, 5, 2.0, True),
    "random_walk": (1, 3, 9, 8),
    "select_regions": (2, 6, 7, 12, 2, 3.0),
}
FIGURES = {"wall_min_ms", "wall_median_ms", "cpu_min_ms", "cpu_median_ms", "median_ms", "peak_mib", "runs"}


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    for op, shape in TINY.items():
        monkeypatch.setattr(importlib.import_module(f"kernels.{op}.bench"), "SHAPES", {"tiny": shape})
    monkeypatch.setattr(bench, "ROUNDS", 2)
    monkeypatch.setattr(bench, "ceilings", lambda device: {"bytes_per_s": 1e10, "flops_per_s": 1e11})


@pytest.mark.parametrize("op", sorted(TINY))
def test_every_op(op, tmp_path, capsys):
    arguments = [op, "--skip", "compile", "--json", str(tmp_path / "out.json"), "--plot", str(tmp_path / "out.png")]
    assert bench.main(arguments) == 0
    result = json.loads((tmp_path / "out.json").read_text())
    assert set(result["machine"]) == {"device", "threads", "torch", "clock"}
    (row,) = result["rows"]
    names = set(row["median_ms"])
    assert names >= {*available_backends(op, "cpu")} and len(names) > len(available_backends(op, "cpu"))
    assert row["red"] == [] and all(set(row[figure]) == names for figure in FIGURES)
    assert set(row["errors"]) == names and row["floor_ms"] > 0
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    assert "the floor's speed" in capsys.readouterr().out


@pytest.mark.parametrize("op", sorted({*TINY} - {"c2am_contrast", "dense_energy"}))
def test_compiled_peers_are_right(op, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function: function)  # as they are: compiling takes half a minute each
    cases = importlib.import_module(f"kernels.{op}.bench")
    peers = {n: f for n, f in cases.peers("tiny", CPU).items() if n.startswith("compile")}
    assert peers
    for name, function in peers.items():
        assert cases.peer_error("tiny", CPU, name, function()) <= cases.PEER_TOLERANCE


def test_wrong_backends_are_not_timed(monkeypatch, capsys):
    monkeypatch.setattr(par_bench, "check", lambda name, device, backend: float("nan"))
    monkeypatch.setattr(par_bench, "run", lambda *_: pytest.fail("timed a wrong op"))
    assert bench.main(["par", "--skip", "compile"]) == 1
    assert "WRONG" in capsys.readouterr().out


def test_wrong_peers_are_not_timed(monkeypatch, capsys):
    calls = []
    peer = lambda: calls.append(1) or torch.zeros(2, 2)  # noqa: E731
    monkeypatch.setattr(par_bench, "peers", lambda name, device: {"eager": peer})
    monkeypatch.setattr(par_bench, "peer_error", lambda name, device, peer, result: float(result.numel()))
    assert bench.main(["par"]) == 1
    assert "par tiny eager: WRONG by 4.0e+00, not timed" in capsys.readouterr().out and len(calls) == 1


def test_turns_and_scale(monkeypatch):
    """A B B A, a new order each round; a slow function once; a part of the work is scaled up."""
    took = []
    monkeypatch.setattr(bench, "seconds", lambda f, device: took.append(f) or {"wall": f(), "cpu": f()})
    times = bench.take_turns({"a": lambda: 1e-3, "b": lambda: 2e-3, "slow": lambda: 1e3}, CPU)
    assert {name: len(t) for name, t in times.items()} == {"a": 4, "b": 4, "slow": 1}
    for start in (3, 7):
        assert took[start] is took[start + 3] and took[start + 1] is took[start + 2]

    def half():
        return torch.zeros(1)

    half.scale = 1000
    monkeypatch.setattr(par_bench, "peers", lambda name, device: {"half": half})
    monkeypatch.setattr(par_bench, "peer_error", lambda *_: None)
    monkeypatch.setattr(bench, "seconds", lambda f, device: {"wall": 1e-3, "cpu": 2e-3})
    row = bench.bench_case("par", "tiny", CPU, {"bytes_per_s": 1.0, "flops_per_s": 1e30}, [])
    assert row["wall_median_ms"]["half"] == pytest.approx(1000) and row["wall_median_ms"]["reference"] == 1
    assert row["floor_ms"] == pytest.approx(1e3 * 4 * 72 * 7)  # seven planes of 9 x 8 floats at a byte per second
    assert row["errors"]["half"] is None


def test_peak_memory_sees_the_result_and_scratch():
    def run():
        scratch = torch.ones(4 << 20)
        return scratch[: 1 << 20] + 1

    peak = measure.peak_bytes(run, CPU)
    if peak is None:
        pytest.skip("the system does not tell the peak of the resident memory")
    assert 19 << 20 < peak < 24 << 20  # 16 MiB and 4 MiB
