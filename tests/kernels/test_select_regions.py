"""select_regions against the plain algorithm, written as the method's pseudo code with Python sets and loops.

Every backend has to give the very same integers.
"""

import math

import pytest
import torch

from kernels import available_backends, backend, select_regions

CPU_BACKENDS = available_backends("select_regions", "cpu")
native = pytest.mark.skipif("native" not in CPU_BACKENDS, reason="kernels._C is not built")
each_backend = pytest.mark.usefixtures("each_backend_in_turn")


@pytest.fixture(params=CPU_BACKENDS)
def each_backend_in_turn(request, monkeypatch):
    monkeypatch.setitem(backend._settings, "select_regions", request.param)


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


@each_backend
@pytest.mark.parametrize("radius", [None, 0.0, math.sqrt(2), 2.5, 50.0])
@pytest.mark.parametrize("options", [{}, {"top": 4}, {"max_seeds": 1}, {"tau": 0.3, "overlap": (0.2, 0.8)}])
def test_equals_the_plain_algorithm(radius, options):
    args = example()
    got = select_regions(*args, grid=(5, 7), radius=radius, **options)
    for ours, want in zip(got, plain(*args, (5, 7), radius, **options), strict=True):
        assert torch.equal(ours, want)


@each_backend
def test_more_pairs_than_are_handled_at_once():
    logits, scores, _ = example(b=2, grid=(4, 5), c=10)
    present = torch.ones(2, 10)
    got = select_regions(logits, scores, present, grid=(4, 5))
    for ours, want in zip(got, plain(logits, scores, present, (4, 5)), strict=True):
        assert torch.equal(ours, want)


@each_backend
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


@each_backend
def test_pcre_check_7_identical_candidates_are_never_merged():
    assert seeded([10, 10]).nonzero().flatten().tolist() == [0]


@each_backend
def test_pcre_check_7_bounds_are_inclusive():
    # Shares 0.2, 0.3, 0.4, 0.5, 0.6 of the seed's region: exactly 0.3 and 0.5 join.
    assert seeded([2, 3, 4, 5, 6]).nonzero().flatten().tolist() == [0, 2, 3, 4]


@each_backend
def test_top_keeps_the_most_confident_and_ties_go_to_the_lower_patch():
    logits = torch.full((1, 6, 6), -5.0)  # empty regions: every seed stands alone
    scores = torch.tensor([0.2, 0.9, 0.5, 0.9, 0.1, 0.5]).view(1, 6, 1)
    got = select_regions(logits, scores, torch.ones(1, 1), grid=(2, 3), top=3)
    assert got.seeds.tolist() == [[1, 3, 2, -1, -1]]


@each_backend
def test_absent_classes_compete_and_zero_scores_are_no_candidates():
    scores = torch.zeros(1, 4, 2)
    scores[0, :, 0] = torch.tensor([1.0, 0.4, 0.9, 0.0])
    scores[0, :, 1] = torch.tensor([0.0, 0.02, 0.0, 0.0])  # its peak, so relative score 1: takes patch 1 away
    got = select_regions(torch.full((1, 4, 4), -5.0), scores, torch.tensor([[1, 0]]), grid=(2, 2))
    assert got.members.tolist() == [[True, False, True, False]]


@each_backend
def test_no_candidates_no_pairs_empty_batch():
    logits, scores, present = example()
    none = select_regions(logits, torch.zeros_like(scores), present, grid=(5, 7))
    assert not none.members.any() and (none.seeds == -1).all() and len(none.pairs) == 4
    assert len(select_regions(logits, scores, torch.zeros_like(present), grid=(5, 7)).pairs) == 0
    empty = select_regions(logits[:0], scores[:0], present[:0], grid=(5, 7))
    assert empty.pairs.shape == (0, 2) and empty.members.shape == (0, 35) and empty.seeds.shape == (0, 5)


@each_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_layout_repeat(dtype):
    logits, scores, present = example()
    logits, scores = logits.to(dtype), scores.to(dtype)
    want = select_regions(logits.float(), scores.float(), present, grid=(5, 7), radius=2)
    for args in ((logits, scores), (logits.mT.contiguous().mT, scores.mT.contiguous().mT)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = select_regions(*args, present.bool(), grid=(5, 7), radius=2)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@each_backend
def test_no_gradient():
    logits, scores, present = example()
    got = select_regions(logits.requires_grad_(), scores.requires_grad_(), present, grid=(5, 7))
    assert not any(x.requires_grad for x in got)


def random_case(seed):
    """Any size, dtype, layout and option; coarse values, so that ties and bounds are hit."""
    make = torch.Generator().manual_seed(seed)
    pick = lambda options: options[int(torch.randint(len(options), (1,), generator=make))]  # noqa: E731
    h, w = pick([(1, 1), (1, 13), (9, 1), (3, 5), (7, 6), (11, 12), (4, 17)])
    b, c, n = pick([1, 2, 3]), pick([1, 2, 5, 16, 17, 20, 33, 80]), h * w
    smooth = torch.randn(b, n, 3, generator=make)
    logits = smooth @ smooth.mT + torch.randn(b, n, n, generator=make)
    logits = (pick([1, 4]) * logits).round() / pick([1, 4])
    scores = (torch.rand(b, n, c, generator=make) * pick([4, 9, 1000])).floor() / pick([1, 7, 1000])
    scores = scores * (torch.rand(b, 1, c, generator=make) > 0.2)  # classes without any score
    present = (torch.rand(b, c, generator=make) < pick([0.0, 0.3, 1.0])).float()
    dtype = pick([torch.float32, torch.bfloat16, torch.float16, torch.float64])
    options = {
        "grid": (h, w),
        "radius": pick([None, 0, 1, math.sqrt(2), 2.5, 5, 50]),
        "tau": pick([0.5, 0.7, 1 / (1 + math.exp(-1)), 0.99]),
        "overlap": pick([(0.3, 0.5), (0.0, 1.0), (0.5, 0.5), (0.0, 0.0), (1 / 3, 2 / 3), (1.0, 1.0)]),
        "max_seeds": pick([1, 2, 5, 9]),
        "top": pick([1, 3, 40, 300, 10**6]),
    }
    logits, scores = logits.to(dtype), scores.to(pick([dtype, torch.float32]))
    if pick([False, True]):
        logits, scores, present = logits.mT.contiguous().mT, scores.mT.contiguous().mT, present.bool()
    return (logits, scores, present), options


@native
@pytest.mark.parametrize("start", range(0, 400, 50))
def test_native_equals_reference(start):
    found = 0
    for seed in range(start, start + 50):
        args, options = random_case(seed)
        got, want = (select_regions(*args, **options, backend=b) for b in ("native", "reference"))
        for ours, theirs in zip(got, want, strict=True):
            assert torch.equal(ours, theirs), (seed, options)
        found += int((got.members.sum(1) > 1).sum())
    assert found > 20  # expansion is really tried


@native
@pytest.mark.parametrize(("grid", "radius"), [((28, 28), 5.0), ((28, 28), None), ((40, 40), 5.0), ((20, 80), None)])
def test_native_equals_reference_at_real_sizes(grid, radius):
    n = grid[0] * grid[1]
    embed = torch.nn.functional.interpolate(torch.randn(6, 1, 5, 5), grid, mode="bilinear").flatten(1)
    logits = (embed.mT @ embed + 0.3 * torch.randn(n, n))[None]
    scores = torch.rand(1, n, 3) * torch.tensor([1.0, 0.9, 0.2])
    got, want = (
        select_regions(logits, scores, torch.ones(1, 3), grid=grid, radius=radius, backend=b)
        for b in ("native", "reference")
    )
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert got.members.sum() > 30  # more candidates than `top`


@native
def test_threads_batch_position_and_memory_change_nothing():
    embed = torch.randn(3, 90, 4)
    logits, scores = embed @ embed.mT, torch.rand(3, 90, 4)
    present = torch.ones(3, 4)
    want = select_regions(logits, scores, present, grid=(9, 10), backend="native")
    threads, before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    try:
        torch.set_num_threads(2)
        torch.use_deterministic_algorithms(True)  # fills every fresh tensor
        got = select_regions(logits, scores, present, grid=(9, 10), backend="native")
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(before)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    alone = select_regions(logits[1:2], scores[1:2], present[1:2], grid=(9, 10), backend="native")
    assert torch.equal(alone.members, want.members[4:8]) and torch.equal(alone.seeds, want.seeds[4:8])


def direct(b=2, n=6, c=3):
    """Arguments of the native op."""
    pairs = torch.tensor([[0, 1], [1, 2]])
    return [torch.randn(b, n, n), torch.rand(b, n, c), pairs, 2, 3, 2, 0.8, 0.3, 0.5, 5, 300]


@native
def test_opcheck_and_compile_fullgraph():
    args = direct()
    torch.library.opcheck(torch.ops.wsss.select_regions.default, args)
    run = torch.compile(lambda *a: torch.ops.wsss.select_regions(*a), fullgraph=True, backend="aot_eager")
    for ours, want in zip(run(*args), torch.ops.wsss.select_regions(*args), strict=True):
        assert torch.equal(ours, want)


@native
@pytest.mark.parametrize(
    ("place", "value", "error", "match"),
    [
        (0, torch.zeros(2, 6, 5), ValueError, r"mask_logits must be \[B, N, N\]"),
        (0, torch.zeros(2, 6, 6).int(), TypeError, "mask_logits must be floating point"),
        (1, torch.zeros(2, 5, 3), ValueError, "scores do not fit"),
        (1, torch.zeros(2, 6, 3).double(), TypeError, "scores must be float32"),
        (2, torch.zeros(2, 3).long(), ValueError, r"pairs must be \[P, 2\]"),
        (2, torch.zeros(2, 2), TypeError, "pairs must be int64"),
        (2, torch.tensor([[0, 3]]), ValueError, r"pair \(0, 3\) is outside of \[2, 3\]"),
        (2, torch.tensor([[-1, 0]]), ValueError, r"pair \(-1, 0\) is outside of"),
        (9, 0, ValueError, "max_seeds and top must be >= 1"),
    ],
)
def test_direct_call_is_checked(place, value, error, match):
    args = direct()
    args[place] = value
    with pytest.raises(error, match="select_regions: " + match):
        torch.ops.wsss.select_regions(*args)


@pytest.mark.gpu
def test_cuda_equals_reference():
    for seed in range(200):
        args, options = random_case(seed)
        args = [x.cuda() for x in args]
        got, want = (select_regions(*args, **options, backend=b) for b in ("native", "reference"))
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)), (seed, options)


@each_backend
def test_pairs_of_the_caller_are_those_of_the_tags():
    args = example()
    pairs = args[2].nonzero()
    for ours, want in zip(
        select_regions(*args, grid=(5, 7), pairs=pairs), select_regions(*args, grid=(5, 7)), strict=True
    ):
        assert torch.equal(ours, want)
    assert select_regions(*args, grid=(5, 7), pairs=pairs[1:]).members.shape == (len(pairs) - 1, 35)
    for wrong, error, match in (
        (pairs.T, ValueError, r"select_regions: pairs must be \[P, 2\]"),
        (pairs.int(), TypeError, "select_regions: pairs must be int64"),
    ):
        with pytest.raises(error, match=match):
            select_regions(*args, grid=(5, 7), pairs=wrong)


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
