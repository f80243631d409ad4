"""The report from a made-up run folder: what it says, that it stands alone, and what it leaves out."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml

from wsss_dist.data.palette import voc_palette
from wsss_dist.errors import UserError
from wsss_dist.metrics import ConfusionMatrix
from wsss_dist.report import KINDS, build_comparison, build_report, load_result, results_text
from wsss_dist.report_plots import CURVE_COLOURS, heat_panel, label_panel
from wsss_dist.scoring import LABEL_KINDS

NAMES = ["background", "bird", "vehicle", "tool"]


def scores(seed, kind):
    import torch

    rng = np.random.default_rng(seed)
    counts = torch.from_numpy(rng.integers(0, 200, (4, 4)) + np.diag([3000, 300, 300, 300]))
    summary = ConfusionMatrix(4, counts).summary()
    return {**summary, "threshold": 0.5} if kind.startswith("cam") else summary


def sample(index, full):
    rng = np.random.default_rng(index)
    h, w = [(90, 120), (120, 90), (100, 100)][index % 3]
    image = cv2.resize(rng.integers(0, 256, (6, 6, 3)).astype(np.uint8), (w, h), interpolation=cv2.INTER_CUBIC)
    truth = np.zeros((h, w), np.uint8)
    cv2.circle(truth, (w // 2, h // 2), h // 4, 1 + index % 3, -1)
    cv2.circle(truth, (w // 2, h // 2), h // 4, 255, 2)
    cam = cv2.GaussianBlur((truth > 0).astype(np.uint8) * 255, (31, 31), 8)[None]
    kept = {"index": index, "id": f"img/{index}<b>", "tags": np.array([1 + index % 3]), "image": image, "cam": cam}
    kept["truth"] = truth
    if full:
        pseudo = np.where(cam[0] > 180, truth, np.where(cam[0] > 60, 255, 0)).astype(np.uint8)
        pred = np.roll(np.where(truth == 255, 0, truth), 6, 1)
        kept |= {"extra_crme": cam, "extra_pseudo": pseudo, "seg": pred, "seg_crf": pred}
    return kept


def make_run(folder: Path, name="pcre-s0", seed=0, full=True, images=7, note="The scenes are composed.") -> Path:
    kinds = ["cam", "cam_best", "seg_single", "seg", "seg_crf", "seg_tags", "pseudo"] if full else ["cam", "cam_best"]
    for split in ("val", "train"):
        (folder / "samples" / split).mkdir(parents=True)
        for i in range(images if split == "val" else 0):
            np.savez_compressed(folder / "samples" / split / f"{i:06d}.npz", **sample(i, full))
    record = {"images": 40, "step": 300, "seconds": 3.0, "settings": {}}
    splits = {s: {**record, "kinds": {k: scores(seed + n, k) for n, k in enumerate(kinds)}} for s in ("val", "train")}
    for split, share in (("val", 0.1234), ("train", 0.5)):
        if full:
            splits[split]["kinds"]["pseudo"]["ignored"] = share
    result = {"name": name, "method": "pcre", "seed": seed, "class_names": NAMES, "data_note": note}
    result |= {"weights_note": "Weights with a <caveat>." if note else None, "splits": splits}
    (folder / "result.json").write_text(json.dumps(result))
    return folder


def add_logs(folder: Path, name="pcre-s0", seed=0, lr=1e-4) -> None:
    lines = [{"step": s, "loss": 3 / (1 + s / 40), "loss_ptc": 0.5, "lr": lr, "note": "text"} for s in range(0, 300, 5)]
    evaluations = [
        {"step": s, "split": split, "eval": {k: {"miou": s / 400} for k in ("cam", "seg")}}
        for s in (100, 200, 300)
        for split in ("val", "train")
    ]
    text = "\n".join(json.dumps(line) for line in lines + evaluations)
    (folder / "metrics.jsonl").write_text(text + '\n{"step": 300, "lo')
    (folder / "config.yaml").write_text(yaml.safe_dump({"run": {"name": name, "seed": seed}, "optim": {"lr": lr}}))
    (folder / "environment.json").write_text('{"torch": "2.14"}')


class Page(HTMLParser):
    """Tags and links of a page; an unclosed or crossing tag fails."""

    def __init__(self, text):
        super().__init__()
        self.open, self.seen, self.links = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "href")]
        if tag not in ("meta", "img", "rect"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_report_stands_alone_and_says_what_it_is(tmp_path):
    run = make_run(tmp_path / "run")
    add_logs(run)
    text = build_report(run).read_text()
    page = Page(text)
    assert page.links and all(re.match("data:image/(png|jpeg);base64,", link) for link in page.links)
    assert "script" not in page.seen and "link" not in page.seen and "http" not in re.sub('base64,[^"]*', "", text)
    body = text[text.index("<body>") :]
    assert re.search(r"<p[^>]*>([^<]*)", body).group(1) == "The scenes are composed.", "the first sentence"
    assert "Weights with a &lt;caveat&gt;." in body
    for part in ("segmentation head + CRF", "Per class: val", "Per class: train", "<details>", "lr: 0.0001", "2.14"):
        assert part in body
    for name in ("segmentation, single scale", "segmentation, tags given", "pseudo labels"):
        assert f'<td class="name">{name}</td>' in body and f"{name}: IoU %" in body
    assert "their undecided pixels count as background. Undecided are 12.3 % of val, 50.0 % of train." in body
    assert "evaluated at scale 1.0 alone; the last point is the final evaluation" in body
    pictures = sorted(p.name for p in (run / "report").iterdir())
    assert pictures == ["loss.png", "miou.png", "samples_val_1.png", "samples_val_2.png"]
    assert page.seen.count("img") == 4


def test_figures_of_the_table_are_those_of_the_result(tmp_path):
    run = make_run(tmp_path / "run")
    body = build_report(run).read_text()
    kinds = load_result(run)["splits"]["val"]["kinds"]
    for s in kinds.values():
        cells = f"{100 * s['miou']:.1f}</td><td>{100 * s['pixel_accuracy']:.1f}</td><td>{s['oa']:.2f}</td>"
        assert f'<td class="main">{cells}' in body
    per_class = body[body.index("Per class: val") :]
    for name, iou in zip(NAMES, kinds["seg"]["iou_per_class"], strict=True):
        assert f"{100 * iou:.1f}" in per_class[per_class.index(name) :].split("</tr>")[0]


def test_what_a_run_does_not_have_is_left_out(tmp_path):
    run = make_run(tmp_path / "run", full=False, note=None)
    body = build_report(run).read_text()
    for absent in (
        "segmentation head",
        "Single scale",
        "Tags given",
        "seudo labels",
        "Left out are",
        "Curves",
        "<details>",
        "How it was made",
    ):
        assert absent not in body
    wide = make_run(tmp_path / "wide", note=None)
    build_report(wide)
    widths = [cv2.imread(str(r / "report" / "samples_val_1.png")).shape[1] for r in (run, wide)]
    assert widths[0] * 7 < widths[1] * 3 + 40, "3 columns (image, CAM, truth) against 7"


def test_rebuilding_removes_pictures_that_are_no_longer_true(tmp_path):
    run = make_run(tmp_path / "run", images=7)
    build_report(run)
    (run / "samples/val/000006.npz").unlink()
    build_report(run)
    assert [p.name for p in (run / "report").iterdir()] == ["samples_val_1.png"]


def test_undefined_values_and_oa_left_out(tmp_path):
    run = make_run(tmp_path / "run", full=False)
    result = load_result(run)
    for s in result["splits"]["val"]["kinds"].values():
        s["oa"], s["oa_left_out"], s["oa_per_class"][1], s["iou_per_class"][1] = None, [1], None, None
    (run / "result.json").write_text(json.dumps(result))
    body = re.sub('base64,[^"]*', "", build_report(run).read_text())
    assert "<td>*</td>" in body and "are left out of the mean OA" in body
    assert "None" not in body and "nan" not in body
    assert "CAM, best threshold" in results_text(result)


def test_run_without_result(tmp_path):
    with pytest.raises(UserError, match="result.json is missing.*launch/evaluate.py --run"):
        build_report(tmp_path)


def test_comparison_groups_seeds(tmp_path):
    for seed in (0, 1, 2):
        add_logs(make_run(tmp_path / f"a{seed}", f"pcre-s{seed}", seed), f"pcre-s{seed}", seed)
    add_logs(make_run(tmp_path / "b", "toco-s0", 9, full=False), "toco-s0", 9, lr=1e-5)
    runs = sorted(tmp_path.iterdir())
    text = build_comparison(runs, tmp_path / "all.md").read_text()
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    assert [r[:2] for r in rows] == [["recipe", "runs"], ["---", "---"], ["pcre", "3"], ["toco-s0", "1"]]
    values = [100 * load_result(r)["splits"]["val"]["kinds"]["seg"]["miou"] for r in runs[:3]]
    column = rows[0].index("val: segmentation head")
    assert rows[2][column] == f"{np.mean(values):.1f} ({', '.join(f'{v:.1f}' for v in values)})"
    assert rows[3][column] == "", "a run without a segmentation head has an empty cell"
    assert "The scenes are composed." in text
    Page(build_comparison(runs, tmp_path / "all.html").read_text())
    with pytest.raises(UserError, match="ends in .html or .md"):
        build_comparison(runs, tmp_path / "all.pdf")


def test_every_kind_has_a_colour_of_its_own_and_a_place_in_a_line():
    assert set(KINDS) == {"cam", "cam_best", *LABEL_KINDS} and len(set(CURVE_COLOURS)) >= len(KINDS)
    assert all(len(name) <= 26 for name in KINDS.values()), "the column of the table on a terminal"


def test_palette_is_that_of_voc():
    assert voc_palette()[:5].tolist() == [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0], [0, 0, 128]]
    assert voc_palette()[15].tolist() == [192, 128, 128]  # person
    assert voc_palette()[255].tolist() == [224, 224, 192]


def test_panels_show_what_they_say():
    image = np.full((2, 2, 3), 100, np.uint8)
    labels = np.array([[0, 1], [4, 255]], np.uint8).repeat(5, 0).repeat(5, 1)
    panel = label_panel(np.full((10, 10, 3), 100, np.uint8), labels).astype(int)
    assert panel[2, 7].argmax() == 0 and panel[7, 2].argmax() == 2 and panel[7, 7].min() > 200
    assert panel[2, 2].max() < 100
    assert (panel[5, 2] == 255).all(), "an outline between the labels"
    heat = heat_panel(image, np.array([[[0, 255], [0, 0]], [[0, 0], [255, 0]]], np.uint8)).astype(int)
    assert heat[0, 1].argmax() == 0 and np.array_equal(heat[0, 1], heat[1, 0]) and heat[0, 0, 0] < heat[0, 1, 0]
    assert heat_panel(image, np.zeros((0, 2, 2), np.uint8)).shape == (2, 2, 3)
