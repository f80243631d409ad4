"""The report of a run: one HTML file that carries its pictures and needs no script, and the pictures as PNG.

It is made from the files in the run folder alone, so it can be made again at any time:
result.json and samples/ (from the evaluation), metrics.jsonl, speed.jsonl, config.yaml and environment.json (trainer).
"""

from __future__ import annotations

import base64
import json
import os
import statistics
from html import escape
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import yaml
from pydantic import Field

from wsss_dist.errors import UserError
from wsss_dist.files import write_whole
from wsss_dist.schema import StrictModel

KINDS = {
    "cam": "CAM",
    "cam_best": "CAM, best threshold",
    "seg_single": "segmentation, single scale",
    "seg": "segmentation head",
    "seg_crf": "segmentation head + CRF",
    "seg_tags": "segmentation, tags given",
    "seg_tags_crf": "seg. + CRF, tags given",
    "pseudo": "pseudo labels",
}
# what a reader has to know of a kind
GUIDE = {
    "seg_single": "Single scale is the image itself at scale 1.0, without its mirror image.",
    "seg_tags": "Tags given: classes that are not tags of the image are ruled out.",
    "pseudo": "Pseudo labels are made with the tags given, and their undecided pixels count as background.",
}
ROWS_PER_SHEET = 6  # so that a sheet fits on a printed page

STYLE = """
body { font: 15px/1.5 Georgia, "Times New Roman", serif; color: #222; background: #fff; max-width: 1540px;
       margin: 2em auto; padding: 0 1.5em; }
h1, h2, h3 { font-weight: normal; line-height: 1.2; } h1 { font-size: 1.8em; } h2 { margin-top: 2em; }
p { max-width: 48em; } p.lead { font-size: 1.1em; }
table { border-collapse: collapse; margin: 1em 0; font-size: 0.93em; font-variant-numeric: tabular-nums; }
th { font-weight: normal; color: #555; text-align: right; vertical-align: bottom; border-bottom: 1px solid #999; }
td { text-align: right; border-bottom: 1px solid #e4e4e4; }
th, td { padding: 0.2em 0.8em; } th:first-child, td:first-child, td.name, th.name { text-align: left; }
td:first-child { white-space: nowrap; }
td.main { font-weight: bold; }
img { max-width: 100%; height: auto; display: block; margin: 0.8em 0; }
pre { font-size: 12px; line-height: 1.35; overflow-x: auto; background: #f7f7f7; padding: 1em; }
footer { margin-top: 3em; color: #666; font-size: 0.9em; }
@media print { body { margin: 0; max-width: none; font-size: 10pt; } img, tr { break-inside: avoid; }
               pre { white-space: pre-wrap; } }
"""


class ReportConfig(StrictModel):
    """What the report shows."""

    num_images: int = Field(12, ge=0)  # pictures of each split, evenly spread over it


def build_report(run_dir: Path) -> Path:
    """Write run_dir/report.html and run_dir/report/*.png; returns the path of the HTML file.

    What a run does not have (no segmentation head, no CRME, no environment.json) is left out.

    Raises:
        UserError: run_dir holds no result.json, so no evaluation was finished there.
    """
    run_dir = Path(run_dir)
    result = load_result(run_dir)
    pictures = run_dir / "report"
    pictures.mkdir(exist_ok=True)
    for old in pictures.glob("*.png"):
        old.unlink()
    sections = [
        _header(result),
        "<h2>Results</h2>",
        _results_table(result),
        _reading_guide(result),
        _curves(run_dir, pictures),
        *(_pictures(run_dir, result, split, pictures) for split in result["splits"]),
        *(_class_table(result, split) for split in result["splits"]),
        _folded(run_dir),
    ]
    text = page(f"{result['name']}: report", "\n".join(s for s in sections if s))
    path = run_dir / "report.html"
    write_whole(path, text)
    return path


def load_result(run_dir: Path) -> dict[str, Any]:
    """result.json of a run. Raises UserError where there is none, or a damaged one."""
    path = Path(run_dir) / "result.json"
    if not path.is_file():
        raise UserError(
            f"report: {path} is missing, so no evaluation was finished there; "
            f"run `python launch/evaluate.py --run {run_dir}` first"
        )
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(
            f"report: {path} is no JSON ({error}); delete it and run `python launch/evaluate.py --run {run_dir}`"
        ) from None


def results_text(result: dict[str, Any]) -> str:
    """The table of results for a terminal: a line per split and kind."""
    lines = [f"{'split':<12} {'prediction':<26} {'mIoU %':>7} {'pixel acc. %':>13} {'OA':>6}"]
    for split, record in result["splits"].items():
        for kind, scores in record["kinds"].items():
            name = KINDS.get(kind, kind)
            values = f"{percent(scores['miou']):>7} {percent(scores['pixel_accuracy']):>13} {_ratio(scores['oa']):>6}"
            lines.append(f"{split:<12} {name:<26} {values}")
    notes = [n for n in (result["data_note"], result["weights_note"]) if n]
    return "\n".join([*notes, *lines])


# ---------------------------------------------------------------------------------------------------- one run


def page(title: str, body: str) -> str:
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{STYLE}</style>\n</head>\n'
        f"<body>\n{body}\n<footer>Written by wsss_dist. IoU and accuracy in percent.</footer>\n</body>\n</html>\n"
    )


def _header(result: dict[str, Any]) -> str:
    notes = [f'<p class="lead">{escape(result["data_note"])}</p>'] if result["data_note"] else []
    if result["weights_note"]:
        notes.append(f"<p>{escape(result['weights_note'])}</p>")
    splits = "; ".join(f"{escape(s)}: {r['images']} images" for s, r in result["splits"].items())
    steps = {r["step"] for r in result["splits"].values()} - {None}
    after = f" after step {max(steps)}" if steps else ""
    return (
        f"<h1>{escape(result['name'])}</h1>\n" + "\n".join(notes) + f"\n<p>Method <b>{escape(result['method'])}</b>, "
        f"seed {result['seed']}, trained with image tags as the labels, evaluated{after} ({splits}).</p>"
    )


def _results_table(result: dict[str, Any]) -> str:
    head = ["split", "prediction", "mIoU %", "pixel accuracy %", "OA", "OA, background %", "threshold"]
    rows = []
    for split, record in result["splits"].items():
        for kind, s in record["kinds"].items():
            left_out = "*" if s["oa_left_out"] else ""
            cells = [percent(s["pixel_accuracy"]), _ratio(s["oa"]) + left_out, percent(s["oa_bg"])]
            threshold = "" if s.get("threshold") is None else f"{s['threshold']:g}"
            rows.append(
                f'<tr><td>{escape(split)}</td><td class="name">{escape(KINDS.get(kind, kind))}</td>'
                f'<td class="main">{percent(s["miou"])}</td>' + _cells([*cells, threshold]) + "</tr>"
            )
    return table(head, rows, named=2)


def _reading_guide(result: dict[str, Any]) -> str:
    text = (
        "mIoU is the mean over the classes that the truth holds, background included. The CAM is masked with the tags "
        "of the image; its best threshold is chosen on the split it is measured on, so that row is an upper bound. "
        "OA, the over-activation rate, is the mean over the foreground classes of falsely over rightly labelled "
        "pixels (FP / TP, lower is better); OA, background, is the share of a class's pixels that are background."
    )
    found = {k for r in result["splits"].values() for k in r["kinds"]}
    text += "".join(f" {sentence}" for kind, sentence in GUIDE.items() if kind in found)
    shares = [(s, r["kinds"].get("pseudo", {}).get("ignored")) for s, r in result["splits"].items()]
    shares = [f"{percent(share)} % of {s}" for s, share in shares if share is not None]
    if shares:
        text += f" Undecided are {', '.join(shares)}."
    kinds = [s for r in result["splits"].values() for s in r["kinds"].values()]
    if any(s["oa_left_out"] for s in kinds):
        text += " * Classes without one rightly labelled pixel are left out of the mean OA."
    return f"<p>{escape(text)}</p>"


def _class_table(result: dict[str, Any], split: str) -> str:
    kinds = result["splits"][split]["kinds"]
    head = ["class", "pixels %"] + [f"{KINDS.get(k, k)}: {m}" for m in ("IoU %", "OA") for k in kinds]
    total = sum(next(iter(kinds.values()))["gt_pixels_per_class"]) or 1
    rows = []
    for c, name in enumerate(result["class_names"]):
        pixels = next(iter(kinds.values()))["gt_pixels_per_class"][c]
        cells = [percent(pixels / total)]
        cells += [percent(s["iou_per_class"][c]) for s in kinds.values()]
        cells += ["" if c == 0 else _ratio(s["oa_per_class"][c]) for s in kinds.values()]
        rows.append(f"<tr><td>{_swatch(c)}{escape(name)}</td>{_cells(cells)}</tr>")
    return f"<h2>Per class: {escape(split)}</h2>\n" + table(head, rows)


def _curves(run_dir: Path, pictures: Path) -> str:
    from wsss_dist import report_plots  # matplotlib: a second at import that a training process need not pay

    lines = _jsonl(run_dir / "metrics.jsonl")
    evaluations = [line for line in lines if "eval" in line]
    training = [line for line in lines if "eval" not in line]
    training += [{k: line[k] for k in ("step", "images_per_s")} for line in _jsonl(run_dir / "speed.jsonl")]
    parts = []
    if report_plots.loss_curves(training, pictures / "loss.png"):
        parts.append(embedded(pictures / "loss.png", "what the training logged against the step"))
    if report_plots.miou_curves(evaluations, KINDS, pictures / "miou.png"):
        parts.append(embedded(pictures / "miou.png", "mIoU against the step, as evaluated during the training"))
        if any("seg" in line["eval"] for line in evaluations):
            parts.append(
                "<p>During the training the segmentation head is evaluated at scale 1.0 alone; the last point is the "
                "final evaluation.</p>"
            )
    return "\n".join(["<h2>Curves</h2>", *parts]) if parts else ""


def _pictures(run_dir: Path, result: dict[str, Any], split: str, pictures: Path) -> str:
    from wsss_dist import report_plots

    files = sorted((run_dir / "samples" / split).glob("*.npz"))
    if not files:
        return ""
    parts = [f"<h2>Pictures: {escape(split)}</h2>"]
    for number, start in enumerate(range(0, len(files), ROWS_PER_SHEET), start=1):
        samples = [dict(np.load(f)) for f in files[start : start + ROWS_PER_SHEET]]
        path = pictures / f"samples_{split.replace('/', '_')}_{number}.png"
        report_plots.sample_sheet(samples, result["class_names"], path)
        parts.append(embedded(path, f"images of {split} beside CAM, masks, labels and truth", photographs=True))
    return "\n".join(parts)


def _folded(run_dir: Path) -> str:
    parts = ["<h2>How it was made</h2>"]
    for name, title in (("config.yaml", "Configuration, all defaults filled in"), ("environment.json", "Environment")):
        path = run_dir / name
        if path.is_file():
            text = escape(path.read_text(encoding="utf-8"))
            parts.append(f"<details><summary>{title}</summary><pre>{text}</pre></details>")
    return "\n".join(parts) if len(parts) > 1 else ""


# ---------------------------------------------------------------------------------------------------- several runs


def build_comparison(run_dirs: list[Path], out: Path) -> Path:
    """One table over several runs: mean mIoU and every single value, runs that differ in their seed alone in one row.

    Args:
        run_dirs: finished run folders.
        out: file to write, .html or .md.
    Raises:
        UserError: a folder without result.json, or another ending.
    """
    out = Path(out)
    if out.suffix not in (".html", ".md"):
        raise UserError(f"report: --out is '{out}'; expected a file that ends in .html or .md")
    groups: dict[str, list[dict[str, Any]]] = {}
    for run_dir in run_dirs:
        groups.setdefault(_recipe(Path(run_dir)), []).append(load_result(run_dir))
    found = {(s, k) for g in groups.values() for r in g for s, v in r["splits"].items() for k in v["kinds"]}
    order = list(KINDS)
    kinds = sorted(found, key=lambda x: (x[0], order.index(x[1]) if x[1] in order else len(order), x[1]))
    head = ["recipe", "runs"] + [f"{s}: {KINDS.get(k, k)}" for s, k in kinds]
    rows = [[_group_name(g), str(len(g)), *(_mean_and_all(g, s, k) for s, k in kinds)] for g in groups.values()]
    notes = sorted({n for g in groups.values() for r in g for n in (r["data_note"], r["weights_note"]) if n})
    caption = "mIoU in percent: mean over the runs (each run)."
    if out.suffix == ".md":
        lines = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
        text = "\n\n".join([*notes, caption, "\n".join(lines)]) + "\n"
    else:
        body = [f"<p>{escape(n)}</p>" for n in notes] + [f"<h1>Comparison</h1><p>{caption}</p>"]
        cells = [f"<tr><td>{escape(row[0])}</td>{_cells(row[1:])}</tr>" for row in rows]
        text = page("Comparison of runs", "\n".join([*body, table(head, cells)]))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
    return out


def _recipe(run_dir: Path) -> str:
    """What makes two runs repetitions of each other: the config without its `run` section."""
    path = run_dir / "config.yaml"
    config = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {"folder": str(run_dir)}
    return json.dumps({k: v for k, v in config.items() if k != "run"}, sort_keys=True, default=str)


def _group_name(runs: list[dict[str, Any]]) -> str:
    names = [r["name"] for r in runs]
    common = os.path.commonprefix(names) if len(names) > 1 else names[0]
    return common.removesuffix("seed").removesuffix("s").rstrip("-_. ") if len(names) > 1 and common else names[0]


def _mean_and_all(runs: list[dict[str, Any]], split: str, kind: str) -> str:
    scores = [r["splits"].get(split, {}).get("kinds", {}).get(kind, {}).get("miou") for r in runs]
    known = [s for s in scores if s is not None]
    if not known:
        return ""
    single = ", ".join(percent(s) or "-" for s in scores)
    return f"{percent(statistics.fmean(known))} ({single})" if len(runs) > 1 else single


# ---------------------------------------------------------------------------------------------------- pieces


def table(head: list[str], rows: list[str], named: int = 1) -> str:
    cells = "".join(f"<th{' class=name' if i < named else ''}>{escape(h)}</th>" for i, h in enumerate(head))
    return f"<table>\n<thead><tr>{cells}</tr></thead>\n<tbody>\n" + "\n".join(rows) + "\n</tbody>\n</table>"


def _cells(values: list[str]) -> str:
    return "".join(f"<td>{escape(v)}</td>" for v in values)


def _swatch(class_id: int) -> str:
    from wsss_dist.data.palette import voc_palette

    colour = "#" + voc_palette()[class_id].tobytes().hex()
    return f'<svg width="12" height="12"><rect width="12" height="12" fill="{colour}"/></svg> '


def embedded(path: Path, alt: str, photographs: bool = False) -> str:
    """The picture inside the page; photographs as JPEG, a sixth of the size, so that the page can be mailed."""
    data, kind = path.read_bytes(), "png"
    if photographs:
        picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        data, kind = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 88])[1].tobytes(), "jpeg"
    return f'<img src="data:image/{kind};base64,{base64.b64encode(data).decode()}" alt="{escape(alt)}">'


def _jsonl(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSONL file; a last line that a killed run left half written is not one."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines() if line.strip()]


def percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
