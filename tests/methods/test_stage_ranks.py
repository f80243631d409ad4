"""Quantities of the whole batch (erase maximum, contrast between images, counts of pairs and hints) over two ranks."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from tests.methods.stage_runs import BACKBONE, SIZE, train, values
from tests.methods.tiny import NUM_CLASSES
from tests.train.ranks import run_ranks
from tests.train.work import each
from wsss_dist.methods import load_method

METHODS = ["pnoc", "pnoc with the leak", "c2am", "affinity"]
ENGINES = {"plain": {"engine": "plain"}, "zero2": {"zero_stage": 2}}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(method, engine) -> what each rank returned: engine "one" is a single plain rank with the whole batch."""
    tmp_path = tmp_path_factory.mktemp("ranks")
    torch.manual_seed(7)
    plain, path = load_method("pnoc"), tmp_path / "model.safetensors"
    save_file(plain.Method(plain.Config(variant="plain", backbone=BACKBONE), NUM_CLASSES, 20).state_dict(), path)
    second = {"backbone": BACKBONE, "weights": str(path)}
    # threshold 1: no pixel lies on it, where a last bit decides whether it is erased; it is an affair of one image
    noc = {"name": "pnoc", "backbone": BACKBONE, "second": second, "threshold": 1.0}
    sections = [
        noc,
        {**noc, "noc_leak": True},
        {"name": "c2am", "backbone": BACKBONE},
        {"name": "affinity", "backbone": {**BACKBONE, "frozen_stages": 5}, "radius": 5},
    ]
    named = dict(zip(METHODS, sections, strict=True))
    whole = {(m, "one"): values(s, engine="plain") for m, s in named.items()}
    split = {(m, e): values(s, micro_batch=SIZE // 2, **ENGINES[e]) for m, s in named.items() for e in ENGINES}
    out = {}
    for jobs, ranks in ((whole, 1), (split, 2)):
        results = run_ranks(ranks, tmp_path, each, train, list(jobs.values()))
        out |= dict(zip(jobs, zip(*results, strict=True), strict=True))
    return out


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", METHODS)
def test_two_ranks_with_half_the_images_each_follow_one_with_all(name, engine, runs):
    ((one, change),), (first, second) = runs[name, "one"], runs[name, engine]
    assert first == second, "the ranks ended with different losses or weights"
    off = max(abs(a - b) / abs(b) for a, b in zip(first[0], one, strict=True))
    print(f"{name}, {engine}: largest relative difference of the loss over {len(one)} steps {off:.1e}")
    assert off < 1e-5  # float32 sums in another order
    change = torch.tensor(change)
    error = ((torch.tensor(first[1]) - change).norm() / change.norm()).item()
    print(f"{name}, {engine}: relative difference of what was added to the weights {error:.1e}")
    assert error < 1e-3
