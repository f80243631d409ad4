"""A run that goes on with other numbers of ranks is the run that kept its number: same samples, same losses."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest
import torch

from tests.data.synthetic import write_synthetic_dataset
from tests.train import tiny, work
from tests.train.ranks import run_ranks
from wsss_dist.config import parse_config
from wsss_dist.errors import UserError
from wsss_dist.reshard import layout_of_shapes
from wsss_dist.trainer import Trainer

RANKS = (2, 1, 4, 2)
# by default ZeRO-3 leaves parameters this small on every rank
SPLIT = {"deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}}}


def _recorded(values: dict) -> tuple[list, list[str]]:
    """Samples that this rank saw, with a digest of their pixels, and what the run said."""
    seen, said = [], []
    original = tiny.Method.training_step

    def note(self: tiny.Method, batch, step: int):
        pixels = [hashlib.sha256(image.numpy().tobytes()).hexdigest()[:8] for image in batch.images]
        seen.append((step, list(zip(batch.ids, pixels, strict=True))))
        return original(self, batch, step)

    tiny.Method.training_step = note
    try:
        trainer = Trainer(parse_config(values))
        trainer.checkpoints.report = said.append
        assert trainer.train() == 0
    finally:
        tiny.Method.training_step = original
    return seen, said


def _samples(ranks: list[list]) -> dict[int, list]:
    """Step -> samples in the order of the global batch: micro batch m of rank r is chunk m * ranks + r."""
    steps: dict[int, list] = {}
    for position in range(len(ranks[0])):
        for seen in ranks:
            step, samples = seen[position]
            steps.setdefault(step, []).extend(samples)
    return steps


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(samples, losses, messages) of a run on two ranks, and for each ZeRO stage of one that changed their number."""
    folder = tmp_path_factory.mktemp("ranks")
    root = write_synthetic_dataset(folder / "data", 20, 3, 16, 3, seed=1)
    cases = []
    for stage in range(4):
        values = tiny.values(folder, **SPLIT, train__zero_stage=stage, train__log_every=1, optim__lr=1e-2)
        values["data"] = {"format": "coco", "root": str(root), "crop": 16, "num_workers": 0}
        values["run"]["name"] = str(stage)
        cases.append(values)
    whole = run_ranks(2, folder, _recorded, {**cases[0], "run": {**cases[0]["run"], "name": "whole"}})
    samples, messages = [{} for _ in cases], [[] for _ in cases]
    for ranks, stop in zip(RANKS, (3, 8, 13, 20), strict=True):  # two steps make an epoch
        now = [{**v, "train": {**v["train"], "stop_after": stop}} for v in cases]
        out = run_ranks(ranks, folder, work.each, _recorded, now)
        for stage in range(4):
            samples[stage] |= _samples([of_rank[stage][0] for of_rank in out])
            messages[stage] += out[0][stage][1]
    cut = [(samples[s], _losses(folder / str(s)), messages[s]) for s in range(4)]
    return (_samples([of_rank[0] for of_rank in whole]), _losses(folder / "whole"), []), cut


def _losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("stage", range(4))
def test_two_one_four_and_two_ranks_are_a_run_on_two(stage, runs):
    (samples, losses, _), (cut_samples, cut_losses, said) = runs[0], runs[1][stage]
    assert list(samples) == list(cut_samples) == list(range(20)) and len(samples[0]) == 8
    assert samples == cut_samples, "other samples, or other pixels"
    assert len(losses) == len(cut_losses) == 20
    largest = max(abs(a - b) / abs(a) for a, b in zip(losses, cut_losses, strict=True))
    print(f"\nZeRO {stage}: largest relative difference of 20 losses: {largest:.1e}")
    # sums of gradients in another order: units in the last place of float32 (6e-8)
    assert largest < 1e-6
    # from step 3 on the second branch has a loss
    assert losses[-1] < 0.9 * losses[3], "the run must learn, or the comparison shows nothing"
    dealt = [text for text in said if "its state is dealt to" in text]
    assert [text.split(" was written by ")[1] for text in dealt] == [
        f"{a} ranks, its state is dealt to {b}" for a, b in zip(RANKS, RANKS[1:], strict=False)
    ]


MOMENTUM = {"optim": {"name": "sgd", "lr": 1e-2, "momentum": 0.9, "warmup_steps": 2}}
EXACT = {
    **{f"zero{z}": {**SPLIT, "train__zero_stage": z} for z in (1, 3)},
    "bf16-3": {**SPLIT, "train__zero_stage": 3, "train__precision": "bf16"},
    "persistent": {"train__zero_stage": 3},
    "sgd-2": {**MOMENTUM, "train__zero_stage": 2},
    "sgd-3": {**MOMENTUM, **SPLIT, "train__zero_stage": 3},
    "no momentum": {"optim": {**MOMENTUM["optim"], "momentum": 0.0}, "train__zero_stage": 2},
    "small groups": {
        "deepspeed": {"zero_optimization": {**SPLIT["deepspeed"]["zero_optimization"], "sub_group_size": 100}},
        "train__zero_stage": 3,
    },
    "round robin": {"deepspeed": {"zero_optimization": {"round_robin_gradients": True}}, "train__zero_stage": 2},
}


def _pass_on(values: dict, name: str, root: Path, number: int) -> str:
    """Load what the last ones saved, save it as it is; digest of the weights."""
    engine = work.make_engine(values)
    if number == 0:
        work.steps_of(engine, 0, 4)
    else:
        assert work.checkpoints(values, root / name / str(number - 1), report=lambda _: None).resume(engine) == 4
    work.checkpoints(values, root / name / str(number)).save(engine, 4)
    return work.digest(engine)


def _case(case: tuple) -> str:
    return _pass_on(*case)


def _tensors(value: object, path: str = "") -> dict[str, torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return {path: value}
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    return {k: v for key, part in inner for k, v in _tensors(part, f"{path}.{key}").items()}


def _without_padding(tensor: torch.Tensor, key: str, folder: Path, file: str) -> torch.Tensor:
    """Under ZeRO 3 the padding of the last rank is memory that nobody has written."""
    shapes = [*folder.glob("*zero_pp_rank_0_mp_rank_00_model_states.pt")]
    if not shapes or tensor.dim() == 0:
        return tensor
    group = int(re.findall(r"\.(\d+)", key)[-1])
    layout = layout_of_shapes(torch.load(shapes[0], weights_only=False)["param_shapes"], 2)
    pieces = [p for of_name in layout.values() for p in of_name if (p.rank, p.group) == ("rank_1" in file, group)]
    return torch.cat([tensor[p.start : p.start + p.count] for p in pieces])


def test_a_state_dealt_round_comes_back_to_the_bit(tmp_path):
    digests = []
    for number, ranks in enumerate((2, 1, 3, 2)):
        sizes = {"train__global_batch": 12 if ranks == 3 else 8}
        cases = [(tiny.values(**c, **sizes), name, tmp_path, number) for name, c in EXACT.items()]
        out = run_ranks(ranks, tmp_path, work.each, _case, cases)
        assert all(of_rank == out[0] for of_rank in out)
        digests.append(out[0])
    assert all(d == digests[0] for d in digests), "weights differ"
    for name in EXACT:
        first, last = (tmp_path / name / n / "ckpt-4/ds" for n in ("0", "3"))
        files = sorted(p.name for p in first.glob("*_optim_states.pt"))
        assert len(files) == 2 and files == sorted(p.name for p in last.glob("*_optim_states.pt"))
        moments = 0
        for file in files:
            old, new = (_tensors(torch.load(d / file, weights_only=False)) for d in (first, last))
            assert old.keys() == new.keys(), name
            for key, tensor in old.items():
                kept = _without_padding(tensor, key, first, file)
                assert torch.equal(kept, _without_padding(new[key], key, first, file)), f"{name}: {key} of {file}"
                moments += tensor.numel() > 1 and bool(tensor.any()) and ".state." in key
        assert (moments > 0) == (name != "no momentum"), name


def test_the_checkpoint_is_left_as_it_was(tmp_path):
    values = tiny.values(train__zero_stage=2)
    run_ranks(2, tmp_path, work.save, values, tmp_path / "a", 3)
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in (tmp_path / "a").rglob("*") if p.is_file()}
    ((start, _, said),) = run_ranks(1, tmp_path, work.resume, values, tmp_path / "a")
    assert start == 3 and len(said) == 1 and "ckpt-3 was written by 2 ranks, its state is dealt to 1" in said[0]
    after = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in (tmp_path / "a").rglob("*") if p.is_file()}
    assert before == after


def test_a_whole_state_is_loaded_by_any_number_of_ranks(tmp_path):
    for name, values in (("plain", tiny.values(train__engine="plain")), ("zero0", tiny.values())):
        run_ranks(2, tmp_path, work.save, values, tmp_path / name, 3)
        assert run_ranks(1, tmp_path, work.resume, values, tmp_path / name)[0][0] == 3


def test_layout_of_zero_3_covers_every_element_once():
    shapes = [{"a": (3, 5), "b": ()}, {"c": (2,)}]
    for ranks in (1, 2, 4, 7):
        layout = layout_of_shapes(shapes, ranks)
        for name, numel in (("a", 15), ("b", 1), ("c", 2)):
            held = [i for p in layout[name] for i in range(p.first, p.first + p.count)]
            assert held == list(range(numel))
        assert {p.start for p in layout["b"]} == {-(-15 // ranks)}


def test_a_state_that_is_split_in_another_way_is_refused():
    from wsss_dist.reshard import check_lengths

    layout = layout_of_shapes([{"a": (4,)}], 2)
    check_lengths(layout, 1, [torch.zeros(2)], 2)
    with pytest.raises(UserError, match=r"cannot be dealt to another number of ranks .*; start 2 ranks"):
        check_lengths(layout, 1, [torch.zeros(4)], 2)
