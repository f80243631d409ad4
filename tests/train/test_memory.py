"""The prediction of memory: that it counts what a real step holds, and moves as memory does."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch

from tests.methods.pcre_runs import values as pcre_values
from tests.mistakes import status_of
from tests.train import tiny
from tests.train.memory_runs import engine_bytes, live_of, resident_of
from tests.train.ranks import run_ranks
from wsss_dist import config
from wsss_dist.benchmark import memory
from wsss_dist.benchmark.live import Live
from wsss_dist.config import parse_config
from wsss_dist.errors import UserError

KIB = 1024
RESNET = {"name": "resnet18", "weights": None}
RESNEST = {"name": "resnest14d", "weights": None}


def pcre(**train) -> dict:
    """A small PCRE on the plain engine."""
    out = pcre_values(engine="plain", global_batch=2, **train)
    out["data"] |= {"classes": ["cat", "dog", "cow"], "crop": 96}
    out["method"]["crme"]["query_grid"] = 6
    return out


def pnoc(micro: int = 2, crop: int = 96, backbone: dict = RESNET, variant: str = "p_noc", **train) -> dict:
    """P-NOC, in variant "plain" its classifier."""
    out = pcre_values(**{"engine": "plain", "global_batch": 8, "micro_batch": micro, **train})
    out["method"] = {"name": "pnoc", "variant": variant, "backbone": backbone}
    if variant != "plain":
        out["method"]["second"] = {"backbone": {**backbone, "norm": "fix"}, "weights": "not_there_yet.safetensors"}
    out["data"] |= {"classes": ["cat", "dog", "cow"], "crop": crop, "long_side": [crop, crop], "augment": "long_side"}
    return out


def parts_of(values: dict, **options) -> dict:
    cfg = parse_config(values)
    return memory.Prediction(cfg, memory.Options(**options)).parts(cfg.train.micro_batch)


# ---- what is alive ---------------------------------------------------------------------------------------------------


def test_a_storage_counts_once_while_something_holds_it():
    with Live() as live:
        a = torch.empty(KIB, dtype=torch.uint8)
        view = a[5:]
        assert live.now == KIB
        del a
        assert live.now == KIB
        b = view + 1  # 1019 bytes take two blocks of 512
        assert live.now == live.peak == 2 * KIB
        del view, b
        torch.empty(KIB, device="meta")
        assert (live.now, live.peak) == (0, 2 * KIB)


def test_gradients_are_told_apart_and_their_share_counts():
    weight = torch.ones(KIB, requires_grad=True)
    lives = {}
    for share, kept in ((1.0, 0), (0.0, 0), (1.0, 16 * KIB)):
        weight.grad = None
        live = lives[share, kept] = Live(None, [weight], share, kept)
        assert live.known([weight]) == 4 * KIB
        with live:
            weight.sum().backward()
            assert live.grads == 4 * KIB and live.now < KIB
            torch.empty(2 * KIB, dtype=torch.uint8)
    assert lives[1.0, 0].peak == 6 * KIB and lives[1.0, 0].peak_grads == 4 * KIB
    assert lives[1.0, 16 * KIB].peak >= 18 * KIB > 16 * KIB == lives[1.0, 16 * KIB].peak_grads
    assert lives[0.0, 0].peak_grads == 0 and lives[0.0, 0].peak < 6 * KIB


def test_an_operators_own_memory_counts_at_its_moment():
    live = Live(lambda func, args: 8 * KIB if func is torch.ops.aten.neg.default else 0)
    with live:
        x = torch.ones(KIB, dtype=torch.uint8)
        x.float().neg()
    assert live.peak == (1 + 4 + 4 + 8) * KIB and live.peak_op == "aten.neg.default"


# ---- prediction against real steps -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [
        pcre(),
        pcre(precision="bf16"),
        pnoc(),
        pnoc(precision="bf16"),
        pnoc(variant="plain", backbone={**RESNEST, "recompute": True}),
    ],
    ids=["pcre", "pcre bf16", "p-noc", "p-noc bf16", "classifier, recomputed"],
)
def test_a_step_on_fake_tensors_holds_what_a_real_one_holds(values):
    cfg = parse_config(values)
    live, _ = memory.Prediction(cfg, memory.Options(), cuda=False).activations(cfg.train.micro_batch)
    real = live_of(values)
    # a few bytes of numbers that are read
    assert live.peak == pytest.approx(real.peak, rel=1e-3) and live.peak_grads == real.peak_grads
    assert live.peak_op == real.peak_op


def test_what_is_alive_is_what_the_process_grows_by(tmp_path):
    values = pnoc(micro=4, crop=192)
    (resident,) = run_ranks(1, tmp_path, resident_of, values)
    if resident is None:
        pytest.skip("this machine does not tell the peak of a process")
    cfg = parse_config(values)
    live, _ = memory.Prediction(cfg, memory.Options(), cuda=False).activations(cfg.train.micro_batch)
    # what convolutions take for themselves is not seen
    assert live.peak == pytest.approx(resident, rel=0.1)


# ---- how it moves ----------------------------------------------------------------------------------------------------


def test_memory_moves_as_it_should():
    def parts(**changes) -> dict:
        return parts_of(pnoc(**{"micro": 4, "crop": 192, **changes}))

    base, double = parts(), parts(micro=8)
    assert double["inputs"] == pytest.approx(2 * base["inputs"], rel=0.01)
    # the gradient of a weight that is being added up does not grow with the batch
    assert double["activations"] == pytest.approx(2 * base["activations"], rel=0.05)
    assert parts(crop=384)["activations"] == pytest.approx(4 * base["activations"], rel=0.05)
    assert parts(backbone={**RESNET, "recompute": True})["activations"] < 0.8 * base["activations"]
    half = parts(precision="bf16", engine="deepspeed")
    assert half["activations"] < 0.7 * base["activations"]
    assert half["weights"] == pytest.approx(base["weights"] / 2, rel=0.01)


def test_number_types_are_those_of_a_gpu_the_second_time_too():
    values = {"variant": "plain", "precision": "bf16", "crop": 192}
    kept = parts_of(pnoc(backbone=RESNEST, **values))["activations"]
    again = parts_of(pnoc(backbone={**RESNEST, "recompute": True}, **values))["activations"]
    assert again < 0.8 * kept
    cfg = parse_config(pcre(precision="bf16"))
    gpu, cpu = (memory.Prediction(cfg, memory.Options(), cuda=c).activations(2)[0].peak for c in (True, False))
    assert gpu > 1.02 * cpu  # LayerNorm and the like in fp32


def test_zero_divides_the_state_among_the_ranks():
    def parts(stage: int, ranks: int) -> dict:
        return parts_of(pnoc(micro=1, engine="deepspeed", zero_stage=stage), ranks=ranks)

    assert parts(0, 4)["optimiser"] == parts(0, 1)["optimiser"]
    one, four = parts(1, 1), parts(1, 4)
    assert four["optimiser"] == pytest.approx(one["optimiser"] / 4, rel=1e-3) and four["weights"] == one["weights"]
    # a quarter, and the one weight whole that it may end in
    assert one["gradients"] / 4 < parts(2, 4)["gradients"] < one["gradients"] / 2


def test_the_largest_micro_batch_is_the_last_that_fits():
    prediction = memory.Prediction(parse_config(pnoc()), memory.Options())
    totals = {n: sum(prediction.parts(n).values()) for n in (2, 4, 8)}
    for largest, limit in ((8, totals[8]), (4, totals[8] - 1), (2, totals[4] - 1)):
        prediction.limit = limit
        assert [prediction.largest(n, totals[n] <= limit) for n in (2, 8)] == [largest, largest]
    prediction.limit = memory.GIB / 2
    assert prediction.largest(2, False) is None


# ---- the engine ------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_method(monkeypatch):
    monkeypatch.setattr(config, "load_method", lambda name: tiny)


def engine_values(micro: int = 2, **train) -> dict:
    out = tiny.values(train__steps=3)
    out["train"] |= {"global_batch": 4, "micro_batch": micro, **train}
    out["method"] |= {"width": 512}
    if train.get("zero_stage"):
        out["deepspeed"] = {"zero_optimization": {"reduce_bucket_size": 400000}}
    return out


def close(found: dict, expected: dict) -> None:
    # blocks of 512 bytes, batches and counters are a few kilobytes
    slack = 40 * KIB
    assert found["at rest"] == pytest.approx(expected["at rest"], rel=0.03, abs=slack)
    assert found["update"] <= 1.03 * expected["update"] + slack
    # some ranks still have the bucket by then
    assert found["gradients"] <= 1.03 * (expected["gradients"] + expected["buckets"]) + slack


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("engine", "stage"), [("plain", 0), ("deepspeed", 0), ("deepspeed", 1), ("deepspeed", 2)])
def test_an_engine_keeps_what_is_predicted(engine, stage, precision, tiny_method):
    found, expected = engine_bytes(engine_values(engine=engine, zero_stage=stage, precision=precision))
    close(found, expected)
    assert found["gradients"] == pytest.approx(expected["gradients"], rel=0.03, abs=40 * KIB)


@pytest.mark.parametrize("stage", [1, 2])
def test_an_engine_on_two_ranks_keeps_what_is_predicted(stage, tmp_path):
    values = engine_values(zero_stage=stage)
    for found, expected in run_ranks(2, tmp_path, partial(engine_bytes, ranks=2), values):
        close(found, expected)


# ---- the command -----------------------------------------------------------------------------------------------------


def test_the_command_says_what_it_needs_and_whether_that_fits(tmp_path, monkeypatch, capsys):
    (tmp_path / "run.yaml").write_text(json.dumps(pnoc()))
    arguments = ["--config", tmp_path / "run.yaml", "--memory", "--ranks", 2, "--json", tmp_path / "out.json"]
    assert status_of("benchmark", arguments, monkeypatch) == 0
    said, result = capsys.readouterr().out, json.loads((tmp_path / "out.json").read_text())
    assert "predicted, not measured" in said and "fits into 80 GiB" in said and "activations" in said
    assert result["fits"] and result["total"] == sum(result["parts"].values())
    assert result["shape"]["ranks"] == 2 and result["shape"]["micro_batches"] == 2
    assert status_of("benchmark", [*arguments, "--gib", "1.55"], monkeypatch) == 0
    assert "does not fit into 1.55 GiB" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--memory", "--gib", "0"], "--gib is 0.0; expected more than 0"),
        (["--memory", "--gib", "nan"], "--gib is nan; expected more than 0"),
        (["--memory", "--ranks", "0"], "--ranks is 0; expected 1 or more"),
        (["--memory", "--ranks", "3"], "is no multiple of .* times 3 ranks"),
        (["--memory", "--peer"], "--memory measures nothing, so --peer has no place there"),
        (["--gib", "80"], "--gib belongs to --memory; add that, or remove it"),
        (["--ranks", "2"], "--ranks belongs to --memory"),
        (["--memory", "--set", "data.format=folder"], "whose number of classes is in the data; name them"),
        (["--memory", "--set", "kernels.par=reference"], "'kernels.par' is reference, .* set it to auto"),
        (["--memory", "--set", "method.backbone.name=resnet50"], "is not a plain ViT"),
    ],
)
def test_mistakes_are_one_sentence(arguments, message, monkeypatch, capsys):
    assert status_of("benchmark", ["--config", "coco_vit.yaml", *arguments], monkeypatch) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("error: ") and "\n" not in said
    with pytest.raises(UserError, match=message):
        raise UserError(said)
