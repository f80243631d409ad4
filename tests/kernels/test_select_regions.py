"""select_regions against the plain algorithm, written as the method's pseudo code with Python sets and loops."""

import math

import pytest
import torch

from kernels import select_regions


def plain(logits, scores, present, grid, radius=None, tau=0.7, overlap=(0.3, 0.5), max_seeds=5, top=300):
    h, w = grid
    pairs, members, seeds = [], [], []
    for b, c in present.nonzero().tolist():
        peak = scores[b].amax(0)
        relative = scores[b] / torch.where(peak > 0, peak, torch.ones_like(peak))
        mine = [
            i
            for i in range(h * w)
            if scores[b, i].max() > 0 and int((relative[i] == relative[i].max()).nonzero()[0, 0]) == c
        ]
        mine = sorted(mine, key=lambda i, r=relative, c=c: (-r[i, c].item(), i))[:top]
        region = {
            k: {
                q
                for q in range(h * w)
                if logits[b, k, q] > math.log(tau / (1 - tau))
                and (radius is None or math.dist(divmod(k, w), divmod(q, w)) <= radius + 1e-9)
            }
            for k in mine
        }
        still_open, chosen, first = dict.fromkeys(mine, True), set(), []
        while len(first) < max_seeds and any(still_open.values()):
            s = next(k for k in mine if still_open[k])
            first.append(s)
            chosen.add(s)
            still_open[s] = False
            for k in mine:
                ratio = torch.tensor(float(len(region[k] & region[s]))) / max(len(region[s]), 1e-6)
                if torch.tensor(overlap[0]) <= ratio <= torch.tensor(overlap[1]):
                    chosen.add(k)
                    still_open[k] = False
                elif ratio > overlap[1]:
                    still_open[k] = False
        pairs.append((b, c))
        members.append([i in chosen for i in range(h * w)])
        seeds.append(first + [-1] * (max_seeds - len(first)))
    return torch.tensor(pairs), torch.tensor(members), torch.tensor(seeds)


def example(b=2, grid=(5, 7), c=3):
    n = grid[0] * grid[1]
    embed = torch.randn(b, n, 4)
    logits = embed @ embed.mT + torch.randn(b, n, n)
    scores = torch.rand(b, n, c) * (torch.rand(b, n, 1) > 0.1)
    return logits, scores, torch.tensor([[1, 1, 0], [0, 1, 1]])[:b]


@pytest.mark.parametrize("radius", [None, 0.0, math.sqrt(2), 2.5, 50.0])
@pytest.mark.parametrize("options", [{}, {"top": 4}, {"max_seeds": 1}, {"tau": 0.3, "overlap": (0.2, 0.8)}])
def test_equals_the_plain_algorithm(radius, options):
    args = example()
    got = select_regions(*args, grid=(5, 7), radius=radius, **options)
    for ours, want in zip(got, plain(*args, (5, 7), radius, **options), strict=True):
        assert torch.equal(ours, want)


def test_more_pairs_than_are_handled_at_once():
    logits, scores, _ = example(b=2, grid=(4, 5), c=10)
    present = torch.ones(2, 10)
    got = select_regions(logits, scores, present, grid=(4, 5))
    for ours, want in zip(got, plain(logits, scores, present, (4, 5)), strict=True):
        assert torch.equal(ours, want)


def test_pcre_check_7_more_seeds_only_add_members():
    args = example()
    one, three, five = (select_regions(*args, grid=(5, 7), max_seeds=t).members for t in (1, 3, 5))
    assert (one <= three).all() and (three <= five).all() and (one < five).any()


def seeded(overlaps):
    """Patch 0 is the best candidate with a region of ten cells; patch 1 + n covers overlaps[n] of them."""
    n = 20
    logits = torch.full((1, n, n), -5.0)
    logits[0, 0, :10] = 5.0
    for k, share in enumerate(overlaps, start=1):
        logits[0, k, :share] = 5.0
    scores = torch.zeros(1, n, 1)
    scores[0, : len(overlaps) + 1, 0] = torch.linspace(1.0, 0.5, len(overlaps) + 1)
    return select_regions(logits, scores, torch.ones(1, 1), grid=(4, 5), max_seeds=1).members[0]


def test_pcre_check_7_identical_candidates_are_never_merged():
    assert seeded([10, 10]).nonzero().flatten().tolist() == [0]


def test_pcre_check_7_bounds_are_inclusive():
    # Shares 0.2, 0.3, 0.4, 0.5, 0.6 of the seed's region: exactly 0.3 and 0.5 join.
    assert seeded([2, 3, 4, 5, 6]).nonzero().flatten().tolist() == [0, 2, 3, 4]


def test_top_keeps_the_most_confident_and_ties_go_to_the_lower_patch():
    logits = torch.full((1, 6, 6), -5.0)  # empty regions: every seed stands alone
    scores = torch.tensor([0.2, 0.9, 0.5, 0.9, 0.1, 0.5]).view(1, 6, 1)
    got = select_regions(logits, scores, torch.ones(1, 1), grid=(2, 3), top=3)
    assert got.seeds.tolist() == [[1, 3, 2, -1, -1]]


def test_absent_classes_compete_and_zero_scores_are_no_candidates():
    scores = torch.zeros(1, 4, 2)
    scores[0, :, 0] = torch.tensor([1.0, 0.4, 0.9, 0.0])
    scores[0, :, 1] = torch.tensor([0.0, 0.02, 0.0, 0.0])  # its peak, so relative score 1: takes patch 1 away
    got = select_regions(torch.full((1, 4, 4), -5.0), scores, torch.tensor([[1, 0]]), grid=(2, 2))
    assert got.members.tolist() == [[True, False, True, False]]


def test_no_candidates_no_pairs_empty_batch():
    logits, scores, present = example()
    none = select_regions(logits, torch.zeros_like(scores), present, grid=(5, 7))
    assert not none.members.any() and (none.seeds == -1).all() and len(none.pairs) == 4
    assert len(select_regions(logits, scores, torch.zeros_like(present), grid=(5, 7)).pairs) == 0
    empty = select_regions(logits[:0], scores[:0], present[:0], grid=(5, 7))
    assert empty.pairs.shape == (0, 2) and empty.members.shape == (0, 35) and empty.seeds.shape == (0, 5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_layout_repeat(dtype):
    logits, scores, present = example()
    logits, scores = logits.to(dtype), scores.to(dtype)
    want = select_regions(logits.float(), scores.float(), present, grid=(5, 7), radius=2)
    for args in ((logits, scores), (logits.mT.contiguous().mT, scores.mT.contiguous().mT)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = select_regions(*args, present.bool(), grid=(5, 7), radius=2)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_no_gradient():
    logits, scores, present = example()
    got = select_regions(logits.requires_grad_(), scores.requires_grad_(), present, grid=(5, 7))
    assert not any(x.requires_grad for x in got)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"grid": (5, 6)}, r"select_regions: grid must have h \* w = 35"),
        ({"radius": -1.0}, "select_regions: radius must lie in"),
        ({"tau": 1.0}, r"select_regions: tau must lie in \(0.0, 1.0\), got 1.0"),
        ({"overlap": (0.5, 0.3)}, r"select_regions: overlap\[1\] must lie in \[0.5, 1.0\], got 0.3"),
        ({"max_seeds": 0}, "select_regions: max_seeds must lie in"),
        ({"top": 0}, "select_regions: top must lie in"),
    ],
)
def test_errors(options, match):
    with pytest.raises(ValueError, match=match):
        select_regions(*example(), **{"grid": (5, 7), **options})
    logits, scores, present = example()
    with pytest.raises(ValueError, match=r"select_regions: present must be \[2, 3\]"):
        select_regions(logits, scores, present[:, 1:], grid=(5, 7))
