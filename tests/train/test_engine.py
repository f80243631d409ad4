"""The engines against each other, on one rank and on two, and what they do with values that are not finite."""

from __future__ import annotations

import pytest

from tests.train import tiny, work
from tests.train.ranks import run_ranks
from wsss_dist import dist

# by default ZeRO-3 leaves parameters this small on every rank
SPLIT = {"deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}}}
ENGINES = {"plain": {"train__engine": "plain"}, **{f"zero{z}": {"train__zero_stage": z} for z in range(4)}}
BF16 = {f"bf16-{z}": {"train__precision": "bf16", "train__zero_stage": z} for z in range(4)}
ENGINES["zero3"] |= SPLIT
BF16["bf16-3"] |= SPLIT


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Engine -> (result of one rank, results of two ranks): losses and digest of the final state."""
    tmp_path = tmp_path_factory.mktemp("runs")
    one = run_ranks(1, tmp_path, work.each, work.train, [tiny.values(**v) for v in {**ENGINES, **BF16}.values()])[0]
    two = run_ranks(2, tmp_path, work.each, work.train, [tiny.values(**v) for v in ENGINES.values()])
    one = dict(zip({**ENGINES, **BF16}, one, strict=True))
    return {name: (one[name], *(dict(zip(ENGINES, t, strict=True)).get(name) for t in two)) for name in one}


def _largest(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) / abs(x) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", ENGINES)
def test_two_ranks_and_every_engine_give_the_losses_of_one_plain_rank(name, runs):
    one, first, second = runs[name]
    assert first == second, "the ranks ended with different losses, weights or buffers"
    ranks, engines = _largest(one[0], first[0]), _largest(runs["plain"][0][0], one[0])
    print(f"\n{name}: largest relative difference of 20 losses, 2 ranks to 1: {ranks:.1e}, to plain: {engines:.1e}")
    # sums of gradients in another order: a few units in the last place of float32 (6e-8), over 20 steps
    assert max(ranks, engines) < 1e-5
    assert one[0][-1] < 0.9 * max(one[0]), "the run must learn, or the comparison shows nothing"


@pytest.mark.parametrize("name", BF16)
def test_bf16_stays_near_fp32(name, runs):
    # bf16 has 8 bits of mantissa, so each rounding is up to 4e-3 off; the loss is a mean over many
    assert runs[name][0][0] == pytest.approx(runs["plain"][0][0], rel=3e-2)
    assert runs[name][0][0] != runs["plain"][0][0]


# bf16 of stages 2 and 3 goes through the same DeepSpeed code as fp32
@pytest.mark.parametrize("name", [*ENGINES, "bf16-0", "bf16-1"])
def test_nonfinite_stops_before_the_update_or_skips_it_on_every_rank(name, tmp_path):
    options = {**ENGINES, **BF16}[name]
    kinds = ("nan", "inf", "grad")
    stop = [tiny.values(**options, method={"name": "tiny", "bad_step": 4, "bad": bad}) for bad in kinds]
    skip = [{**v, "train": {**v["train"], "nonfinite": "skip"}} for v in stop]
    for ends in run_ranks(2, tmp_path, work.each, work.train_until_error, stop):
        for bad, (kind, message, same) in zip(kinds, ends, strict=True):
            assert kind == "TrainingError"
            assert f"the {'gradient' if bad == 'grad' else 'loss'} of step 4 is not finite" in message
            assert "s3" in message and "train.nonfinite" in message
            assert same, f"{bad}: weights changed in the refused step"
    ranks = run_ranks(2, tmp_path, work.each, work.skip_one, skip)
    assert ranks[0] == ranks[1]
    for bad, (before, after, ahead, losses) in zip(kinds, ranks[0], strict=True):
        assert before == after, f"{bad}: a skipped step changed weights or buffers"
        assert ahead != after, f"{bad}: the step after it was not applied"
        assert all(abs(loss) < 10 for loss in losses)


def test_ranks_evaluate_and_save_the_mean_of_their_running_statistics_and_go_on_with_their_own(tmp_path):
    method = {"name": "tiny", "batch_norm": True}
    names = ("plain", "zero0", "zero3")
    cases = [tiny.values(**ENGINES[n], method=method) for n in names]
    ranks = run_ranks(2, tmp_path, work.each, work.running_means, cases, tmp_path)
    two = run_ranks(2, tmp_path, work.each, work.resumed_means, cases, tmp_path)
    one = run_ranks(1, tmp_path, work.each, work.resumed_means, cases[:2], tmp_path)[0]
    for i, name in enumerate(names):
        first, second = ranks[0][i], ranks[1][i]
        assert first["own"] != second["own"], f"{name}: the ranks see other samples, or this shows nothing"
        mean = [(a + b) / 2 for a, b in zip(first["own"], second["own"], strict=True)]
        assert first["evaluated"] == second["evaluated"] == first["saved"], name
        assert first["saved"] == pytest.approx(mean, rel=1e-6), f"{name}: but for the rounding of float32"
        assert [first["after"], second["after"]] == [first["own"], second["own"]], name
        assert [two[0][i], two[1][i]] == [first["own"], second["own"]], name
    for i, resumed in enumerate(one):
        assert resumed == ranks[0][i]["saved"], f"{names[i]}: another number of ranks goes on with the mean"


def test_skipping_gives_up_after_max_skips(tmp_path):
    method = {"name": "tiny", "bad_step": 4}
    values = tiny.values(train__engine="plain", train__nonfinite="skip", train__max_skips=1, method=method)
    ((kind, message),) = run_ranks(1, tmp_path, work.train, values, fails=True)
    assert kind == "TrainingError" and "1 steps in a row, up to step 4" in message


def test_zero3_refuses_a_module_whose_output_it_cannot_see_into(tmp_path):
    values = tiny.values(train__zero_stage=3, method={"name": "tiny", "wrapped": True})
    ((kind, message),) = run_ranks(1, tmp_path, work.train, values, fails=True)
    assert kind == "TypeError" and "Wrapper returned Wrapped" in message


def _two_runs(values: dict) -> list:
    """Losses of two runs in one process, which leaves the process group between them."""
    losses = []
    for _ in range(2):
        losses.append(work.steps_of(work.make_engine(values), 0, 3))
        dist.shutdown()
    return losses


@pytest.mark.parametrize("stage", [0, 2])
def test_a_process_that_left_its_group_may_train_again(stage, tmp_path):
    """As a notebook does; DeepSpeed keeps groups that are gone unless it is told."""
    values = tiny.values(train__steps=8, train__global_batch=4, train__zero_stage=stage)
    ((first, second),) = run_ranks(1, tmp_path, _two_runs, values)
    assert first == second and len(first) == 3
