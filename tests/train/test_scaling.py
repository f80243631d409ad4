"""The scaling model: formulas against counted collectives, the simulation against cases that have a closed form."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from tests.methods import pcre_runs
from tests.train import tiny, work
from tests.train.ranks import run_ranks
from wsss_dist import dist
from wsss_dist.benchmark import synthetic
from wsss_dist.benchmark.contest import random_weights
from wsss_dist.benchmark.fake import Fake
from wsss_dist.config import RunConfig, parse_config, read_config
from wsss_dist.data.loader import PREFETCH
from wsss_dist.errors import UserError
from wsss_dist.methods import load_method
from wsss_dist.models.pretrained import no_parts
from wsss_dist.pipeline import Pipeline
from wsss_dist.scaling import counted, loaders, rates, schedule
from wsss_dist.scaling.__main__ import main
from wsss_dist.scaling.machine import MACHINES, load_machine
from wsss_dist.scaling.model import Work, call_seconds, step_parts, table
from wsss_dist.scaling.traffic import ALL_GATHER, ALL_REDUCE, REDUCE_SCATTER, Call, sent, step_traffic, totals

ROOT = Path(__file__).resolve().parents[2]
SPLIT = {"deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 1}}}
# name -> train section, elements below which ZeRO-3 keeps a parameter on every rank
ENGINES = {"plain": ({"engine": "plain"}, 0)}
ENGINES |= {f"zero{z}": ({"zero_stage": z}, 100_000) for z in range(4)}
ENGINES |= {f"zero{z}-bf16": ({"zero_stage": z, "precision": "bf16"}, 100_000) for z in range(4)}
ENGINES["zero3-split"] = ({"zero_stage": 3}, 1)
# after tiny's branch has come in, so that every parameter has a gradient
STEP = 5


def values_of(name: str, ranks: int) -> dict:
    section, least = ENGINES[name]
    values = tiny.values(**(SPLIT if least == 1 else {}))
    values["train"] |= {"global_batch": 2 * ranks, "nonfinite": "skip", **section}
    return values


def counted_step(values: dict, ranks: int) -> list[Call]:
    """Collectives of one of the steps, of ranks that exist or, where there is one process, do not."""
    if dist.world_size() == 1:
        dist.init_fake(0, ranks)
    engine = work.make_engine(values)
    for step in range(STEP, STEP + 3):
        batch = {"global_batch": 2 * ranks, "micro_batch": 2, "rank": dist.rank(), "world_size": ranks}
        with counted.Counted() as found:
            engine.train_step(tiny.make_batches(step, **batch), step)
    return found.calls


def expected(name: str, ranks: int) -> list[Call]:
    section, least = ENGINES[name]
    method = tiny.Method(tiny.Config(), tiny.C, 20)
    groups = [[p.numel() for p in group["params"]] for group in method.param_groups()]
    frozen = [p.numel() for p in method.parameters() if not p.requires_grad]
    kinds = {"engine": "deepspeed", **section}
    return step_traffic(groups, ranks, **kinds, scalars=2, clip=True, frozen=frozen, persistent=least)


def bytes_of(calls: list[Call]) -> dict[str, int]:
    return {kind: size for kind, (_, size) in totals(calls).items()}


@pytest.mark.parametrize("name", ENGINES)
def test_formulas_give_the_bytes_that_one_of_1000_ranks_hands_over(name, tmp_path):
    [calls] = run_ranks(1, tmp_path, counted_step, values_of(name, 1000), 1000)
    assert bytes_of(calls) == bytes_of(expected(name, 1000))
    if name in ("plain", "zero0", "zero1", "zero2", "zero2-bf16"):
        assert sorted(map(str, calls)) == sorted(map(str, expected(name, 1000))), "also how many calls"


@pytest.mark.parametrize("name", ["plain", "zero1", "zero3-split"])
def test_ranks_that_exist_hand_over_the_same(name, tmp_path):
    first, second = run_ranks(2, tmp_path, counted_step, values_of(name, 2), 2)
    assert bytes_of(first) == bytes_of(second) == bytes_of(expected(name, 2))


def test_formulas_by_hand():
    groups, n = [[1000, 24], [7]], 4
    assert step_traffic(groups, 1) == []
    assert bytes_of(step_traffic(groups, n, engine="plain")) == {ALL_REDUCE: 4 * 1031 + 16}
    one = bytes_of(step_traffic(groups, n, zero_stage=1))
    assert one == {ALL_REDUCE: 4 * 1031 + 16 + 2 * 4, ALL_GATHER: 4 * (1024 + 8)}
    three = bytes_of(step_traffic(groups, n, zero_stage=3, persistent=0))
    assert three == {ALL_GATHER: 4 * 1032, REDUCE_SCATTER: 4 * 1032, ALL_REDUCE: 16 + 2 * 8}
    half = bytes_of(step_traffic(groups, n, zero_stage=0, precision="bf16"))
    assert half == {ALL_REDUCE: 2 * 1031 + 16}
    assert sent(Call(ALL_REDUCE, 400), 4) == 600 and sent(Call(ALL_GATHER, 400), 4) == 300


def pcre_step(ranks: int) -> dict[str, int]:
    """Bytes of a step of a small PCRE late in its run, of rank 0 of many that do not exist."""
    values = pcre_runs.values(engine="plain", global_batch=4)
    values["data"]["classes"] = ["cat", "dog", "cow"]
    return bytes_of(counted.count_step(counted.engine_of_one(parse_config(values), ranks)))


def test_the_tokens_of_the_prototypes_do_not_grow_with_the_batch(tmp_path):
    [few], [many] = (run_ranks(1, tmp_path, pcre_step, ranks) for ranks in (10, 100))
    assert few[ALL_REDUCE] == many[ALL_REDUCE]
    assert (few[ALL_GATHER], many[ALL_GATHER]) == (10 * 2 * 3 * 4, 100 * 2 * 3 * 4), "the tags of 2 images a rank"


# ---- the model ------------------------------------------------------------------------------------------------------

WORK = Work(flops=1e12, groups=((10_000_000,), (2_000_000,)), global_batch=64, micro_batch=2, zero_stage=1)
A100 = MACHINES["A100"]


def parts(ranks: int, work: Work = WORK, **machine: object) -> dict[str, float]:
    return step_parts(work, dataclasses.replace(A100, **machine), ranks)


def test_more_of_everything_takes_its_time():
    step = parts(8)["step"]
    assert parts(8, mfu=0.2)["compute"] == pytest.approx(2 * parts(8)["compute"])
    assert parts(4)["compute"] == pytest.approx(2 * parts(8)["compute"])
    assert parts(8, intra=1e9)["step"] > step > parts(8, intra=1e13)["step"]
    assert parts(16, inter=1e9)["step"] > parts(16)["step"]
    assert parts(8, inter=1e3)["step"] == step, "one node does not use the network"
    assert parts(8, hop_intra=1e-3)["step"] > step
    assert parts(8, images_per_worker=0.1)["loader"] > 0 == parts(8)["loader"]
    more = [dataclasses.replace(WORK, zero_stage=z) for z in (0, 1, 3)]
    zero0, zero1, zero3 = (parts(8, w)["collectives"] for w in more)
    assert zero1 > zero3 > zero0, "3 T e, then 2 T e with the waits of rings, then 2 T e with those of a tree"
    half = dataclasses.replace(WORK, precision="bf16")
    assert parts(8, half)["collectives"] < parts(8)["collectives"]
    assert parts(8, half)["compute"] == pytest.approx(parts(8)["compute"] * 19.5 / 312)


def test_collectives_take_longer_on_more_nodes():
    big = [call_seconds(Call(ALL_REDUCE, 10**9), n, A100) for n in (1, 2, 8, 16, 64, 512)]
    assert big[0] == 0 and all(a < b for a, b in zip(big, big[1:], strict=False))
    # 2 (n - 1) / n x 1 GB at 0.8 x 200 GB/s, and the hops of a tree
    assert big[-1] == pytest.approx(2 * 511 / 512 / 160 + 2 * (3 * 3e-6 + 6 * 8e-6))
    small = [call_seconds(Call(kind, 4), 512, A100) for kind in (ALL_REDUCE, ALL_GATHER)]
    assert small[1] == pytest.approx(511 * 8e-6, rel=1e-3) and small[0] < small[1] / 30


def test_weak_scaling_keeps_and_strong_scaling_loses_and_a_batch_ends():
    numbers = (1, 8, 32, 64, 128)
    strong, weak = table(WORK, A100, numbers, weak=False), table(WORK, A100, numbers, weak=True)
    assert [row["global batch"] for row in weak] == [2 * n for n in numbers]
    assert [row["micro batch"] for row in strong] == [2, 2, 2, 1, 2]
    assert "step" not in strong[-1], "64 images cannot be split over 128 ranks"
    for rows in (strong[:-1], weak):
        shares = [row["efficiency"] for row in rows]
        assert shares[0] <= 1.02 and all(a > b for a, b in zip(shares, shares[1:], strict=False))
    assert strong[3]["efficiency"] < weak[3]["efficiency"]
    with pytest.raises(ValueError, match="cannot be split over 3"):
        step_parts(WORK, A100, 3)


def test_a_fit_finds_the_line_it_was_given():
    seconds = {size: 2e-5 + size / 3e9 for size in rates.SIZES}
    bandwidth, hop = rates.fitted(seconds, 2)
    assert bandwidth == pytest.approx(3e9) and hop == pytest.approx(1e-5)


def test_a_measured_machine_takes_the_measured_time(tmp_path):
    """Ranks of one node, then of two, each with its own network: a ring of 600 MB/s, hops of 20 us."""
    ranks, rate, hop = 4, 600e6, 2e-5
    seconds = {size: 2 * 2 * hop + 2 * (ranks - 1) / ranks * size / rate for size in rates.SIZES}
    bandwidth, hop = rates.fitted(seconds, ranks)
    for nodes, gpus in ((1, 8), (2, 2)):
        found = {"ranks": ranks, "nodes": nodes, "sha": 1e9, "disk": 1e9, "bandwidth": bandwidth, "hop": hop}
        file = tmp_path / f"{nodes}.json"
        file.write_text(json.dumps({"gpus": gpus, "hop_intra": hop, **rates.machine_keys(found)}))
        machine = load_machine("A100", file)
        for size in (2**14, 343_000_000):
            want = 2 * 2 * hop + 2 * (ranks - 1) / ranks * size / rate
            assert call_seconds(Call(ALL_REDUCE, size), ranks, machine) == pytest.approx(want)
        assert (machine.inter if nodes == 1 else machine.intra) in (200e9, 300e9), "not measured"


# ---- the simulation -------------------------------------------------------------------------------------------------


def run(sample: float, compute: float, **settings) -> loaders.Steps:
    settings = {"ranks": 3, "micro_batch": 2, "steps": 80, **settings}
    return loaders.simulate(loaders.around(sample, 0), loaders.around(compute, 0), **settings)


@pytest.mark.parametrize(
    ("workers", "micro_batches", "sample", "compute", "step"),
    [
        (0, 1, 0.1, 1.0, 1.2),  # made between the steps
        (1, 1, 0.1, 1.0, 1.0),  # hidden
        (1, 1, 0.6, 1.0, 1.2),  # the one worker is slower than the step
        (2, 1, 0.6, 1.0, 1.0),
        (4, 4, 1.0, 1.0, 2.0),  # 4 micro batches of 2 s each on 4 workers
        (3, 2, 0.75, 0.5, 1.0),
    ],
)
def test_equal_times_have_a_closed_form(workers, micro_batches, sample, compute, step):
    # the prefetched batches are used up first; whole rounds of the workers
    done = run(sample, compute, workers=workers, micro_batches=micro_batches, warmup=60, steps=60)
    assert done.seconds.mean() == pytest.approx(step)
    assert done.stall == pytest.approx(1 - compute / step, abs=1e-9)


def test_prefetched_batches_are_used_up_first():
    workers, sample, compute = 2, 5.0, 1.0
    steps = run(sample, compute, workers=workers, warmup=0, steps=200)
    assert steps.seconds[0] == pytest.approx(2 * sample + compute), "nothing is made yet"
    assert steps.seconds.mean() == pytest.approx(2 * sample / workers, rel=0.05)
    late = loaders.simulate(
        loaders.around(0.3, 0), lambda shape, rng: np.full(shape, 1.0), ranks=1, workers=1, micro_batch=1, warmup=0
    )
    assert late.seconds[0] == pytest.approx(1.3) and np.allclose(late.seconds[1:], 1.0)
    assert PREFETCH == 4


def test_a_worker_is_no_more_than_the_prefetched_batches_ahead():
    numbers = iter(range(10**6))
    long_one = lambda shape, rng: np.full(shape, 10.0 if next(numbers) == 20 else 0.0)  # noqa: E731
    done = loaders.simulate(long_one, loaders.around(1.0, 0), ranks=1, workers=1, micro_batch=1, warmup=0, steps=30)
    # batch 20 is begun when batch 16 is taken, four steps before it is asked for
    assert done.waited[20] == pytest.approx(10 - PREFETCH)
    assert done.waited.sum() == pytest.approx(10 - PREFETCH)


def test_the_slowest_of_many_ranks_sets_the_pace():
    compute = loaders.around(1.0, 0.05)
    means = [
        loaders.simulate(loaders.around(0.01, 0), compute, ranks=r, workers=1, micro_batch=1, steps=400).seconds.mean()
        for r in (1, 10, 100, 1000)
    ]
    assert all(a < b for a, b in zip(means, means[1:], strict=False))
    assert means[0] == pytest.approx(1, abs=0.01)
    # expected maximum of 1000 normal numbers: 3.24 standard deviations; log-normal a little more
    assert means[-1] == pytest.approx(1 + 0.05 * 3.24, abs=0.02)


def test_enough_workers_are_enough_and_one_fewer_is_not():
    sample, compute = loaders.of_quantiles([0.005, 0.01, 0.05]), loaders.around(0.04, 0.02)
    settings = {"ranks": 50, "micro_batch": 2, "steps": 100}
    need = loaders.workers_needed(sample, compute, **settings)
    assert need > 1
    assert loaders.simulate(sample, compute, workers=need, **settings).stall < 0.01
    assert loaders.simulate(sample, compute, workers=need - 1, **settings).stall >= 0.01
    assert loaders.workers_needed(sample, compute, most=1, **settings) is None


def test_draws_have_the_distribution_they_are_given():
    rng = np.random.default_rng(0)
    drawn = loaders.of_quantiles([1.0, 2.0, 4.0])((100_000,), rng)
    assert np.quantile(drawn, (0, 0.5, 1)) == pytest.approx([1, 2, 4], abs=0.02)
    around = loaders.around(3.0, 0.2)((100_000,), rng)
    assert around.mean() == pytest.approx(3, rel=0.01) and around.std() == pytest.approx(0.6, rel=0.02)


# ---- the commands ---------------------------------------------------------------------------------------------------


def test_operations_of_a_training_are_counted():
    values = {
        "run": {"name": "x"},
        "method": {"name": "classifier", "backbone": {"name": "vit_tiny_patch16_224", "weights": None, "depth": 2}},
        "data": {"format": "voc", "root": "unused", "crop": 32},
        "optim": {"lr": 1e-3, "warmup_steps": 0},
        "train": {"steps": 10, "global_batch": 4, "micro_batch": 2},
    }
    entry = schedule.count_training(parse_config(values), points=1)
    embed, block, head = 3 * 16 * 16 * 192, 12 * 192 * 192, 192 * 20
    assert entry["flops"] > 3 * 2 * 4 * (embed + block)
    assert sum(entry["groups"]) > embed + 2 * block + head and not entry["convolutions"]


KNOWN = schedule.read_measured()


def config_of(training: str) -> RunConfig:
    """The config of a training of docs/scaling.json, or of the first that is the same."""
    name, *overrides = next((k for k, same in KNOWN["same"].items() if same == training), training).split(" ")
    file, _, stage = name.partition("/")
    values = read_config(f"{file}.yaml", overrides)
    return Pipeline(values).entries[stage].config if stage else parse_config(values)


@pytest.mark.parametrize("training", KNOWN["trainings"])
def test_the_file_of_what_was_counted_has_the_sizes_of_the_methods(training):
    cfg, noted = config_of(training), KNOWN["trainings"][training]
    classes = synthetic.num_classes(cfg.data)
    with Fake(schedule.TAGS, cuda=False).entered(), no_parts():
        method = load_method(cfg.method_name).Method(random_weights(cfg.method), classes, cfg.train.steps)
        found = schedule.sizes(method)
    assert found == {key: noted[key] for key in found}
    memory = getattr(method, "memory", None)  # of PCRE: the tags of each image, and one sum of class tokens
    tags, tokens = (0, 0) if memory is None else (4 * classes, 4 * memory.prototypes.numel())
    assert (noted["gathered"], noted["reduced"]) == (tags, tokens)


def test_the_text_has_the_sizes_of_the_file():
    text, trained = (ROOT / "docs/scaling.md").read_text(), sum(KNOWN["trainings"]["coco_vit"]["groups"])
    assert f"{trained:,} trained elements" in text and f"{4 * trained / 1e6:.1f} MB" in text
    assert f"{KNOWN['trainings']['coco_vit']['flops'] / 1e12:.2f}e12 operations an image" in text


def test_table_and_hours_are_printed(capsys, monkeypatch):
    def said(*words: str) -> str:
        monkeypatch.setattr("sys.argv", ["scaling", *words])
        assert main() == 0
        return capsys.readouterr().out

    out = said("table", "--config", "coco_vit.yaml", "--machine", "H100")
    assert out.count("scaling\n") == 16 and "the batch cannot be split over so many" in out
    out = said("hours", "--config", "voc_aepsl.yaml", "--until", "steps_1", "--ranks", "2")
    assert "erasing_1" in out and "erasing_2" not in out
    hours = [float(said("hours", "--config", "coco_vit.yaml", "--ranks", n).split()[-2]) for n in "14"]
    assert 3 < hours[0] / hours[1] < 4
    out = said("order", "--images", "1e5")
    assert "array" in out and "keyed" in out


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (["hours", "--config", "coco_vit.yaml", "--ranks", "3"], "cannot be split over 3 ranks"),
        (["hours", "--config", "voc_pnoc.yaml", "--until", "nothing"], "--until nothing"),
        (["hours", "--config", "coco_vit.yaml", "--machine", "A1000"], "expected one of A100"),
        (["table", "--config", "voc_pnoc.yaml"], "--stage None"),
        (["table", "--config", "quickstart.yaml"], "does not know the training"),
    ],
)
def test_mistakes(words, fault, monkeypatch):
    monkeypatch.setattr("sys.argv", ["scaling", *words])
    with pytest.raises(UserError, match=fault):
        main()


def test_the_hint_is_a_command_that_exists(monkeypatch):
    monkeypatch.setattr("sys.argv", ["scaling", "table", "--configuration", "x"])
    with pytest.raises(UserError, match="; `python -m wsss_dist.scaling table --help` lists"):
        main()


def test_convolutional_networks_are_assumed_to_reach_less(capsys, monkeypatch):
    assert A100.flops_per_s("tf32", True) == 0.2 * 156e12 and A100.flops_per_s("bf16", False) == 0.4 * 312e12
    assert load_machine("A100", mfu=0.3).flops_per_s("tf32", True) == pytest.approx(0.3 * 156e12)
    hours = []
    for given in ([], ["--mfu", "0.2"], ["--mfu", "0.4"]):
        words = ["hours", "--config", "voc_aepsl.yaml", "--until", "steps_1", "--ranks", "2", *given]
        monkeypatch.setattr("sys.argv", ["scaling", *words])
        assert main() == 0
        hours.append(capsys.readouterr().out.splitlines())
    assert "MFU 0.4, of convolutional networks 0.2:" in hours[0][0]
    assert hours[0][1:] == hours[1][1:] != hours[2][1:]


def test_a_machine_of_your_own(tmp_path):
    file = tmp_path / "mine.json"
    file.write_text('{"peak": 1e11, "gpus": 2}')
    mine = load_machine("here", file, mfu=0.5)
    assert mine.flops_per_s("bf16", False) == 5e10 and mine.gpus == 2
    file.write_text('{"name": "mybox", "intra": 1e9}')
    with pytest.raises(UserError, match="mine.json calls the machine 'mybox', .*; add its 'peak'"):
        load_machine("A100", file)
    with pytest.raises(UserError, match="or --machine-file FILE"):
        load_machine("mybox")
    file.write_text('{"name": "A100 of ours", "intra": 1e9}')
    assert load_machine("A100", file).flops_per_s("bf16", False) == 0.4 * 312e12
    file.write_text('{"speed": 1}')
    with pytest.raises(UserError, match="'speed' is no key"):
        load_machine("here", file)
