"""Evaluation with a method whose prediction is known in closed form: labels, kinds, files, clean-up."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import kernels
from wsss_dist import evaluate, scoring
from wsss_dist.data import DataConfig, Dataset
from wsss_dist.errors import UserError
from wsss_dist.evaluate import CRFConfig, EvalConfig, evaluate_splits
from wsss_dist.methods.base import BaseMethod, Prediction
from wsss_dist.metrics import SWEEP, ConfusionMatrix
from wsss_dist.report import ReportConfig
from wsss_dist.schema import StrictModel, parse

CLASSES = ["red", "green", "blue"]


class Named(StrictModel):
    name: str
    seed: int = 0


class Training(StrictModel):
    steps: int = 300


class Config(StrictModel):
    """The part of RunConfig that the evaluation reads."""

    run: Named = Named(name="r")
    train: Training = Training()
    method_name: str = "colours"
    data: DataConfig
    eval: EvalConfig
    report: ReportConfig = ReportConfig()


class ColourSet(Dataset):
    """Images of different sizes; a channel's bright pixels are its class, the truth is a noisy copy of that."""

    def __init__(self, n=7, masks=True):
        super().__init__("colours", CLASSES, None, [f"c/{i}.jpg" for i in range(n)], np.zeros((n, 3), np.uint8))
        self.masks = masks
        for i in range(n):
            self.tags[i] = [c + 1 in self.mask(i) and (i + c) % 4 > 0 for c in range(3)]  # a few are missing

    def _rng(self, i):
        return np.random.default_rng(i)

    def image(self, i):
        rng = self._rng(i)
        size = (int(rng.integers(17, 40)), int(rng.integers(17, 40)), 3)
        return blocks_image(rng, size)

    def mask(self, i):
        image = self.image(i)
        mask = np.where(image.max(2) > 140, image.argmax(2) + 1, 0).astype(np.uint8)
        noise = np.random.default_rng(100 + i).random(mask.shape)
        mask[noise < 0.1] = 0
        mask[noise > 0.9] = 255
        return mask

    @property
    def has_masks(self):
        return self.masks


def blocks_image(rng, size):
    blocks = rng.integers(0, 256, (5, 5, 3))
    rows, cols = (np.arange(s) * 5 // s for s in size[:2])
    return blocks[rows][:, cols].astype(np.uint8)


class Colours(BaseMethod):
    """CAM of class c = channel c; logits = the channels and a constant background. No weights matter."""

    def __init__(self, seg=True, extras=False, gain=1.0):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.frozen = torch.nn.Dropout()
        self.frozen.eval()
        self.seg, self.extras, self.gain, self.seen, self.modes = seg, extras, gain, [], []
        self.asked = []

    def predict(self, batch, views):
        assert not torch.is_grad_enabled()
        self.asked.append((views.cam_scales, views.seg_scales, views.extras))
        self.seen.append((tuple(batch.images.shape), batch.ids, views.step))
        self.modes.append(self.training)
        torch.rand(3)  # an evaluation that draws random numbers must not disturb the training's
        cam = torch.sigmoid(batch.images) * batch.labels[:, :, None, None]
        logits = self.gain * torch.cat([torch.full_like(batch.images[:, :1], 0.2), batch.images], 1)
        if not self.seg:
            return Prediction(cam=cam)
        maps = {"crme": cam, "pseudo": pseudo_labels(batch.images)} if self.extras else {}
        return Prediction(cam=cam, logits=logits, single=logits.flip(1), extras=maps)


def pseudo_labels(images):
    """Any rule with all kinds of labels: the brightest channel, undecided where it is near the mean of the data set."""
    value, which = images.max(1)
    return torch.where(value > 1.0, which + 1, torch.where(value > 0, 255, 0))


def config(**kwargs):
    settings = {"size": 24, "crf": None, "batch": 3, **kwargs}
    data = DataConfig(format="folder", root="nowhere", num_workers=0, val_limit=settings.pop("val_limit", None))
    report = ReportConfig(num_images=settings.pop("num_images", 12))
    return Config(data=data, eval=EvalConfig(**settings), report=report)


@pytest.fixture
def colours(monkeypatch):
    dataset = ColourSet()
    monkeypatch.setattr(evaluate, "build_dataset", lambda cfg, split: dataset)
    return dataset


def expected(dataset, indices, size=24, every=False):
    """The slow twin: image by image, threshold by threshold, plain numpy labels; every: also the other kinds."""
    cams = {t: ConfusionMatrix(4) for t in (*SWEEP, 0.5)}
    seg = ConfusionMatrix(4)
    more = {k: ConfusionMatrix(4) for k in ("seg_single", "seg_tags", "pseudo")}
    left_out, total = 0, 0
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    for i in indices:
        image = torch.from_numpy(dataset.image(i)).permute(2, 0, 1)[None].float()
        gt = torch.from_numpy(dataset.mask(i))
        x = (F.interpolate(image, (size, size), mode="bilinear") / 255 - mean[:, None, None]) / std[:, None, None]
        cam = torch.sigmoid(x) * torch.from_numpy(dataset.labels(i))[:, None, None]
        cam = F.interpolate(cam, gt.shape, mode="bilinear")[0]
        for t, matrix in cams.items():
            matrix.update(torch.where(cam.amax(0) > t, cam.argmax(0) + 1, 0), gt)
        logits = torch.cat([torch.full_like(x[:, :1], 0.2), x], 1)
        full = F.interpolate(logits, gt.shape, mode="bilinear")[0]
        seg.update(full.argmax(0), gt)
        more["seg_single"].update(full.flip(0).argmax(0), gt)
        allowed = [0, *(np.flatnonzero(dataset.labels(i)) + 1)]
        more["seg_tags"].update(torch.tensor(allowed)[full[allowed].argmax(0)], gt)
        rows, columns = (((np.arange(s) + 0.5) * size // s).astype(int) for s in gt.shape)  # nearest, pixel centres
        pseudo = pseudo_labels(x)[0][rows][:, columns].numpy()
        decided, truth = pseudo != 255, gt.numpy()
        more["pseudo"].update(torch.from_numpy(np.where(decided, pseudo, 0)), gt)
        left_out, total = left_out + (~decided & (truth != 255)).sum(), total + (truth != 255).sum()
    summaries = {k: m.summary() for k, m in more.items()}
    summaries["pseudo"]["ignored"] = left_out / total
    return (cams, seg, summaries) if every else (cams, seg)


def test_kinds_equal_the_slow_twin(colours, tmp_path):
    result = evaluate_splits(Colours(extras=True), config(), ["val"], tmp_path, 5)["val"]
    cams, seg, more = expected(colours, range(7), every=True)
    assert list(result) == ["cam", "cam_best", "seg_single", "seg", "seg_tags", "pseudo"]
    assert result["cam"] == {**cams[0.5].summary(), "threshold": 0.5}
    best = max(SWEEP, key=lambda t: cams[t].miou())
    assert result["cam_best"]["threshold"] == best and result["cam_best"]["miou"] == cams[best].miou()
    assert "oracle" in result["cam_best"]
    assert result["seg"] == seg.summary()
    assert 0.3 < result["seg"]["miou"] < 1, "the test data has to be neither trivial nor hopeless"
    assert {k: result[k] for k in more} == more
    assert 0.1 < result["pseudo"]["ignored"] < 0.9
    assert result["seg_tags"] != result["seg"] != result["seg_single"]


def test_a_method_without_cam_has_no_cam_kinds(colours, tmp_path):
    class Bare(Colours):
        def predict(self, batch, views):
            prediction = super().predict(batch, views)
            prediction.cam = None
            return prediction

    whole = evaluate_splits(Colours(), config(), ["val"], tmp_path / "whole", 5)["val"]
    bare = evaluate_splits(Bare(), config(), ["val"], tmp_path / "bare", 5)["val"]
    assert bare == {kind: values for kind, values in whole.items() if kind not in ("cam", "cam_best")}
    sample = np.load(next((tmp_path / "bare/samples/val").iterdir()))
    assert "cam" not in sample and "seg" in sample


def test_beta_off_the_grid(colours, tmp_path):
    result = evaluate_splits(Colours(seg=False), config(beta=0.537), ["val"], tmp_path, 5)["val"]
    assert set(result) == {"cam", "cam_best"}, "no segmentation head, no seg kinds"
    assert result["cam"]["threshold"] == 0.537
    assert result["cam_best"]["threshold"] in SWEEP


def test_batching_and_sizes(colours, tmp_path):
    method = Colours()
    evaluate_splits(method, config(), ["val"], tmp_path, 5)
    assert [s[0] for s in method.seen] == [(3, 3, 24, 24), (3, 3, 24, 24), (1, 3, 24, 24)]
    assert [i for s in method.seen for i in s[1]] == [f"c/{i}" for i in range(7)]
    assert {s[2] for s in method.seen} == {5}
    method = Colours()
    method.patch_size = 8
    evaluate_splits(method, config(size=None), ["val"], tmp_path, None)
    sizes = [colours.image(i).shape[:2] for i in range(7)]
    assert [s[0] for s in method.seen] == [(1, 3, round(h / 8) * 8, round(w / 8) * 8) for h, w in sizes]
    assert {s[2] for s in method.seen} == {None}
    assert json.loads((tmp_path / "result.json").read_text())["splits"]["val"]["step"] == 300
    method = Colours()
    method.patch_size = 16  # 17..23 px round to 16, 24..39 px to 32: some share a size
    evaluate_splits(method, config(size=None), ["val"], tmp_path, None)
    shapes = [(3, 16 if h < 24 else 32, 16 if w < 24 else 32) for h, w in sizes]
    of_blocks = [Counter(shapes[i : i + 3]) for i in (0, 3, 6)]  # in the order in which a shape comes first
    batches = [(count, *shape) for block in of_blocks for shape, count in block.items()]
    assert [s[0] for s in method.seen] == batches
    assert {b[0] for b in batches} == {1, 2}, "the test data has to hold both cases"


def test_batch_size_does_not_change_the_result(colours, tmp_path):
    results = [evaluate_splits(Colours(), config(batch=b), ["val"], tmp_path, 1) for b in (1, 4)]
    assert results[0] == results[1]


def test_training_flags_and_random_state_are_restored(colours, tmp_path):
    method = Colours().train()
    method.frozen.eval()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    evaluate_splits(method, config(), ["val"], tmp_path, 1)
    assert method.modes == [False] * 3
    assert method.training and not method.frozen.training
    assert torch.equal(torch.get_rng_state(), before)


def test_training_flags_are_restored_after_an_error(colours, tmp_path):
    method = Colours().train()
    method.predict = lambda *a, **k: 1 / 0
    with pytest.raises(ZeroDivisionError):
        evaluate_splits(method, config(), ["val"], tmp_path, 1)
    assert method.training


def test_the_whole_image_is_inside_its_box(monkeypatch, tmp_path):
    """A box (y0, y1, x0, x1) that is empty would make every pseudo label "ignored"."""
    monkeypatch.setattr(evaluate, "build_dataset", lambda cfg, split: ColourSet(3))
    seen = []

    class Spy(Colours):
        def predict(self, batch, views):
            height, width = batch.images.shape[-2:]
            seen.append((batch.boxes.tolist(), [[0, height, 0, width]] * len(batch)))
            return super().predict(batch, views)

    evaluate_splits(Spy(), config(size=None), ["val"], tmp_path, None)
    assert seen and all(got == wanted for got, wanted in seen)


def test_quick_evaluation_takes_the_limit_and_writes_nothing(colours, tmp_path):
    cfg = config(limit=3, crf=CRFConfig(), cam_scales=[0.5, 1.0], seg_scales=[1.25, 1.0])
    method = Colours()
    result = evaluate_splits(method, cfg, ["val"], tmp_path, 1, final=False)["val"]
    assert list(result) == ["cam", "cam_best", "seg_single", "seg", "seg_tags"], "no CRF, no pseudo labels"
    assert method.asked == [([0.5, 1.0], [1.0], False)], "the head at scale 1.0 alone, nothing for the report"
    _, seg, more = expected(colours, [0, 2, 4], every=True)
    assert result["seg"] == seg.summary()
    assert all(result[k] == more[k] for k in ("seg_single", "seg_tags"))
    assert list(tmp_path.iterdir()) == []
    method = Colours()
    cfg = config(limit=3, cam_scales=[0.5, 1.0], seg_scales=[1.25, 1.0])
    full = evaluate_splits(method, cfg, ["val"], tmp_path, 1)["val"]
    assert set(map(str, method.asked)) == {str(([0.5, 1.0], [1.25, 1.0], True))}
    assert full["seg"] == expected(colours, range(7))[1].summary(), "the limit is for the evaluations during training"


def test_val_limit_counts_in_the_final_evaluation_too(colours, tmp_path):
    result = evaluate_splits(Colours(), config(val_limit=2), ["val"], tmp_path, 1)["val"]
    assert result["seg"] == expected(colours, [0, 3])[1].summary()
    assert json.loads((tmp_path / "result.json").read_text())["splits"]["val"]["images"] == 2


def test_samples_and_result_file(colours, tmp_path):
    method = Colours(extras=True)
    method.weights_note = "random weights"
    (tmp_path / "samples" / "val").mkdir(parents=True)
    (tmp_path / "samples" / "val" / "000006.npz").write_bytes(b"of an earlier evaluation")
    evaluate_splits(method, config(num_images=3), ["val"], tmp_path, 9)
    files = sorted((tmp_path / "samples" / "val").iterdir())
    assert [f.name for f in files] == ["000000.npz", "000002.npz", "000004.npz"]
    for f, i in zip(files, (0, 2, 4), strict=True):
        sample = np.load(f)
        shape = colours.mask(i).shape
        assert str(sample["id"]) == f"c/{i}" and int(sample["index"]) == i
        assert np.array_equal(sample["image"], colours.image(i)) and np.array_equal(sample["truth"], colours.mask(i))
        assert sample["tags"].tolist() == (np.flatnonzero(colours.labels(i)) + 1).tolist()
        for name in ("cam", "extra_crme"):
            assert sample[name].shape == (len(sample["tags"]), *shape) and sample[name].dtype == np.uint8
        assert sample["seg"].shape == sample["extra_pseudo"].shape == shape
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["class_names"] == ["background", *CLASSES]
    assert result["weights_note"] == "random weights" and result["data_note"] is None
    assert result["method"] == "colours" and result["splits"]["val"]["step"] == 9
    evaluate_splits(method, config(), ["other"], tmp_path, 9)
    assert set(json.loads((tmp_path / "result.json").read_text())["splits"]) == {"val", "other"}


def test_nothing_is_made_for_the_report_of_images_that_it_does_not_show(colours, tmp_path, monkeypatch):
    shown = []
    original = scoring._shown_extra
    monkeypatch.setattr(scoring, "_shown_extra", lambda *args: shown.append(1) or original(*args))
    method = Colours(extras=True)
    evaluate_splits(method, config(num_images=2), ["val"], tmp_path, 1)
    assert len(shown) == 2 * 2, "two maps of two images"
    evaluate_splits(method, config(num_images=2), ["val"], tmp_path, 1, final=False)
    assert len(shown) == 2 * 2


def test_weights_note_of_the_caller_goes_before_that_of_the_method(colours, tmp_path):
    method = Colours()
    method.weights_note = "of the method"
    for given, written in (("given", "given"), (None, "of the method")):
        evaluate_splits(method, config(), ["val"], tmp_path, 1, weights_note=given)
        assert json.loads((tmp_path / "result.json").read_text())["weights_note"] == written


def test_data_note_comes_from_the_manifest(colours, tmp_path):
    (tmp_path / "manifest.json").write_text(json.dumps({"about": "composed scenes"}))
    cfg = config()
    cfg = cfg.model_copy(update={"data": cfg.data.model_copy(update={"root": tmp_path})})
    evaluate_splits(Colours(), cfg, ["val"], tmp_path, 1)
    assert json.loads((tmp_path / "result.json").read_text())["data_note"] == "composed scenes"


def test_image_without_tags_is_all_background_in_the_cam(monkeypatch, tmp_path):
    dataset = ColourSet(1)
    dataset.tags[:] = 0
    monkeypatch.setattr(evaluate, "build_dataset", lambda cfg, split: dataset)
    result = evaluate_splits(Colours(extras=True), config(), ["val"], tmp_path, 1)["val"]
    assert all(v in (0.0, None) for v in result["cam"]["recall_per_class"][1:])
    assert result["cam"]["recall_per_class"][0] == 1.0
    assert np.load(next((tmp_path / "samples/val").iterdir()))["cam"].shape[0] == 0


def test_crf_gets_the_unary_of_the_specification(colours, tmp_path, monkeypatch):
    calls = []

    def fake(unary, image, **kwargs):
        calls.append((unary, image, kwargs))
        return torch.softmax(-unary, 1).flip(1)  # any other answer than the argmax of the logits

    monkeypatch.setattr(kernels, "dense_crf", fake, raising=False)
    crf = CRFConfig(iterations=4, prune=1e-3)
    result = evaluate_splits(Colours(gain=20.0), config(crf=crf, val_limit=1), ["val"], tmp_path, 1)["val"]
    (unary, image, kwargs), (of_tags, same, _) = calls
    assert kwargs == {"spatial": (2.0, 1.0), "bilateral": (140.0, 1.0, 7.0), "iterations": 4, "prune": 1e-3}
    assert torch.equal(image, same)
    assert image.dtype == torch.uint8 and np.array_equal(image[0].permute(1, 2, 0).numpy(), colours.image(0))
    assert unary.shape == (1, 4, *colours.mask(0).shape)
    assert unary.min() >= 0 and unary.max().item() == pytest.approx(-np.log(1e-5), abs=1e-5)  # float32 rounding of ln
    assert result["seg_crf"] != result["seg"]
    allowed = [0, *(np.flatnonzero(colours.labels(0)) + 1)]
    assert of_tags.shape[1] == len(allowed) < 4  # the softmax runs over the remaining classes
    answer, tags = torch.softmax(-of_tags, 1).flip(1).argmax(1)[0], ConfusionMatrix(4)
    tags.update(torch.tensor(allowed)[answer], torch.from_numpy(colours.mask(0)))
    assert result["seg_tags_crf"] == tags.summary() != result["seg_tags"]


def test_split_without_masks(monkeypatch, tmp_path):
    monkeypatch.setattr(evaluate, "build_dataset", lambda cfg, split: ColourSet(masks=False))
    with pytest.raises(UserError, match="split 'test' of nowhere has no masks"):
        evaluate_splits(Colours(), config(), ["test"], tmp_path, 1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"cam_scales": [0.5]}, "1.0 among them"),
        ({"seg_scales": [1.0, -1.0]}, "numbers above 0"),
        ({"beta": 1.5}, "eval.beta"),
        ({"size": 0}, "eval.size"),
        ({"fuse": "max"}, "eval.fuse"),
        ({"crf": {"spatial": [0, 1]}}, "sigmas must be above 0"),
        ({"crf": {"bilaterel": [1, 1, 1]}}, "did you mean 'bilateral'"),
        ({"batch": 0}, "eval.batch"),
    ],
)
def test_config_errors(values, message):
    with pytest.raises(UserError, match=message):
        parse(EvalConfig, values, "eval")
