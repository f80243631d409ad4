"""The streaming metrics against numpy over the whole set at once, and against numbers worked out by hand."""

import math

import numpy as np
import pytest
import torch

from wsss_dist import dist
from wsss_dist.metrics import SWEEP, ConfusionMatrix, ThresholdSweep


def _random_set(k, n=5, seed=0):
    rng = np.random.default_rng(seed)
    shapes = [(int(rng.integers(3, 12)), int(rng.integers(3, 12))) for _ in range(n)]
    gts = [rng.integers(0, k, s).astype(np.uint8) for s in shapes]
    for gt in gts:
        gt[rng.random(gt.shape) < 0.2] = 255
    return gts, [rng.integers(0, k, s).astype(np.int64) for s in shapes], rng


def _stream(pairs, k):
    matrix = ConfusionMatrix(k)
    for gt, pred in pairs:
        matrix.update(torch.from_numpy(pred), torch.from_numpy(gt))
    return matrix


def test_streaming_equals_numpy_over_the_whole_set():
    k = 6
    gts, preds, _ = _random_set(k)
    gts = [np.where(g == 4, 255, g) for g in gts]  # class 4 is predicted but never in the truth
    preds = [np.where(p == 5, 0, p) for p in preds]  # class 5 is in the truth but never predicted
    matrix = _stream(zip(gts, preds, strict=True), k)
    gt, pred = (np.concatenate([x.ravel() for x in xs]) for xs in (gts, preds))
    gt, pred = gt[gt != 255], pred[gt != 255]
    for c in range(k):
        tp, fp, fn = ((gt == c) & (pred == c)).sum(), ((gt != c) & (pred == c)).sum(), ((gt == c) & (pred != c)).sum()
        assert matrix.iou()[c] == tp / (tp + fp + fn)
        if tp:
            assert matrix.oa()[c] == fp / tp
            assert matrix.precision()[c] == tp / (tp + fp)
            assert matrix.recall()[c] == tp / (tp + fn)
    present = [c for c in range(k) if (gt == c).any()]
    assert present == [0, 1, 2, 3, 5]
    # float64 means of five numbers in a different order: one rounding apart
    assert matrix.miou() == pytest.approx(float(np.mean([matrix.iou()[c] for c in present])), rel=1e-15)
    assert matrix.pixel_accuracy() == (gt == pred).mean()


def test_hand_worked_numbers():
    # rows: truth 0, 1, 2
    m = ConfusionMatrix(3, torch.tensor([[50, 10, 0], [5, 20, 5], [0, 10, 0]]))
    assert m.iou().tolist() == [50 / 65, 20 / 50, 0.0]
    assert m.miou() == pytest.approx((50 / 65 + 20 / 50) / 3, rel=1e-15)
    assert m.oa()[1] == 20 / 20 and math.isinf(m.oa()[2])
    assert m.oa_bg()[1] == 10 / 40 and m.oa_bg()[2] == 0 and math.isnan(m.oa_bg()[0])
    summary = m.summary()
    assert summary["oa"] == 1.0, "the class without a true positive is left out of the mean"
    assert summary["oa_left_out"] == [2] and summary["oa_per_class"][2] is None
    assert summary["oa_bg"] == 0.125
    assert summary["gt_pixels_per_class"] == [60, 30, 10]


def test_class_in_neither_is_nan_and_not_in_the_mean():
    m = ConfusionMatrix(3)
    m.update(torch.tensor([[0, 1]]), torch.tensor([[0, 1]]))
    assert m.iou().tolist()[:2] == [1.0, 1.0] and math.isnan(m.iou()[2])
    assert m.miou() == 1.0
    assert m.summary()["iou_per_class"] == [1.0, 1.0, None]


def test_mean_is_over_the_classes_of_the_truth():
    only_predicted = ConfusionMatrix(3, torch.tensor([[6, 0, 2], [1, 3, 0], [0, 0, 0]]))
    assert only_predicted.iou().tolist() == [6 / 9, 0.75, 0.0]
    assert only_predicted.miou() == pytest.approx((6 / 9 + 0.75) / 2, rel=1e-15)
    only_in_truth = ConfusionMatrix(3, torch.tensor([[6, 1, 0], [0, 3, 0], [2, 0, 0]]))
    assert only_in_truth.miou() == pytest.approx((6 / 9 + 0.75 + 0.0) / 3, rel=1e-15)


def test_empty_matrix_is_nan_not_a_number():
    assert math.isnan(ConfusionMatrix(3).miou())
    assert ConfusionMatrix(3).summary()["miou"] is None


def test_labels_outside_the_classes_are_dropped_predictions_outside_are_a_bug():
    m = ConfusionMatrix(3)
    m.update(torch.tensor([0, 1, 2, 0]), torch.tensor([255, 1, 3, -1]))
    assert m.counts.sum() == 1 and m.counts[1, 1] == 1
    with pytest.raises(AssertionError, match="outside 0..2"):
        m.update(torch.tensor([3]), torch.tensor([0]))
    with pytest.raises(AssertionError, match="outside 0..2"):
        m.update(torch.tensor([-1]), torch.tensor([0]))
    with pytest.raises(AssertionError, match="differ in shape"):
        m.update(torch.tensor([0, 1]), torch.tensor([0]))


def test_all_ignore_and_empty_images_add_nothing():
    m = ConfusionMatrix(3)
    m.update(torch.zeros(2, 2).long(), torch.full((2, 2), 255))
    m.update(torch.zeros(0, 2).long(), torch.zeros(0, 2).long())
    assert m.counts.sum() == 0


def test_sweep_equals_one_matrix_per_threshold():
    k = 5
    gts, _, rng = _random_set(k, seed=1)
    sweep = ThresholdSweep(k, (*SWEEP, 0.42))
    matrices = {t: ConfusionMatrix(k) for t in sweep.thresholds}
    for gt in gts:
        # a coarse grid of values puts many pixels exactly on a threshold
        cam = torch.from_numpy((rng.integers(0, 21, (k - 1, *gt.shape)) / 20).astype(np.float32))
        value, label = cam.max(0)
        sweep.update(value, label + 1, torch.from_numpy(gt))
        for t in sweep.thresholds:
            pred = torch.where(value > torch.tensor(t, dtype=torch.float32), label + 1, 0)
            matrices[t].update(pred, torch.from_numpy(gt))
    assert len(sweep.thresholds) == 20
    for t, matrix in matrices.items():
        assert torch.equal(sweep.at(t).counts, matrix.counts), t
    best, matrix = sweep.best()
    assert matrix.miou() == max(matrices[t].miou() for t in SWEEP) and best in SWEEP
    assert torch.equal(matrix.counts, matrices[best].counts)


def test_sweep_rejects_background_as_a_cam_class():
    with pytest.raises(AssertionError, match="CAM class outside 1..2"):
        ThresholdSweep(3).update(torch.zeros(1), torch.zeros(1).long(), torch.zeros(1).long())


def test_reduced_sums_over_ranks(monkeypatch):
    monkeypatch.setattr(dist, "all_reduce_sum", lambda x: x + 2 * x)
    m = ConfusionMatrix(2, torch.tensor([[1, 2], [3, 4]]))
    assert m.reduced().counts.tolist() == [[3, 6], [9, 12]]
    sweep = ThresholdSweep(2)
    sweep.update(torch.tensor([0.5]), torch.tensor([1]), torch.tensor([1]))
    assert sweep.reduced().at(0.3).counts.tolist() == [[0, 0], [0, 3]]


def test_torchmetrics_agrees():
    torchmetrics = pytest.importorskip("torchmetrics", reason="an optional second opinion")
    k = 6
    gts, preds, _ = _random_set(k, seed=2)
    ours = _stream(zip(gts, preds, strict=True), k)
    theirs = torchmetrics.JaccardIndex(task="multiclass", num_classes=k, ignore_index=255, average="none")
    for gt, pred in zip(gts, preds, strict=True):
        theirs.update(torch.from_numpy(pred)[None], torch.from_numpy(gt).long()[None])
    # torchmetrics divides in float32
    torch.testing.assert_close(ours.iou().float(), theirs.compute(), atol=1e-6, rtol=0)
