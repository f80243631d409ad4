"""The figures of a contest as text and as a picture."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wsss_dist.benchmark.phases import ORDER


def lines(result: dict[str, Any]) -> Iterator[str]:
    """The figures as text."""
    shape, machine, peak = result["shape"], result["machine"], result["peak"]
    batch = shape["micro_batch"] * shape["micro_batches"] * shape["ranks"]
    engine = shape["engine"] + (f" ZeRO {shape['zero_stage']}" if shape["zero_stage"] else "")
    yield (
        f"{result['config']}: {result['method']}, {shape['crop']} px, {shape['classes']} classes; a step is {batch} "
        f"images, {shape['micro_batches']} x {shape['micro_batch']} on {_count(shape['ranks'], 'rank')}; "
        f"{shape['precision']}, {engine}; step {result['step']} of {result['steps_of_run']}, {result['data']} data"
    )
    yield (
        f"{machine['device']}, {_count(machine['threads'], 'thread')}, torch {machine['torch']}, {result['clock']} "
        f"time; peak {_rate(peak['flops_per_s'])} in {peak['kind']} ({peak['source']})"
    )
    # memory and operations are those of a pass before the engine is built, which compiles and lays out
    passes = "forward and backward" + ("" if shape["as_written"] else ", not compiled and in the plain layout,")
    for name, row in result["rows"].items():
        yield (
            f"{name}: {row['images_per_s']:.3g} images/s; step median {_time(row['step_median_s'])}, min "
            f"{_time(row['step_min_s'])} of {row['runs']}; MFU {100 * row['mfu']:.1f} %; "
            f"{row['flops_per_step'] / 1e12:.3g} TFLOP a step and rank"
            + ("" if row["memory_mib"] is None else f"; {passes} peak at {row['memory_mib']:.0f} MiB")
        )
        yield from _table(row)
    if "peak_mib" in result:
        what = "torch's allocator" if result["device"] == "cuda" else "the process, above its start"
        yield f"peak memory of {what}: {result['peak_mib']:.0f} MiB"
    if "ratio" in result:
        ratio, off = result["ratio"], result["peer_off_by"]
        memory = "" if ratio["memory"] is None else f", memory of forward and backward {ratio['memory']:.2f}x"
        yield (
            f"peer / ours: time {ratio['median']:.2f}x (of the fastest steps {ratio['min']:.2f}x){memory}; the peer's "
            f"loss is off by {off['loss']:.1e}, its gradient of the backbone by {off['gradient']:.1e}"
        )


def memory_lines(result: dict[str, Any]) -> Iterator[str]:
    """A prediction of memory as text."""
    shape, parts = result["shape"], result["parts"]
    engine = shape["engine"] + (f" ZeRO {shape['zero_stage']}" if shape["zero_stage"] else "")
    yield (
        f"{result['config']}: {result['method']}, {shape['crop']} px, {shape['classes']} classes, {shape['tags']} tags "
        f"an image; {shape['micro_batches']} x {shape['micro_batch']} images on each of "
        f"{_count(shape['ranks'], 'rank')}; {shape['precision']}, {engine}; step {result['step']} of "
        f"{result['steps_of_run']}; predicted, not measured"
    )
    for name, size in parts.items():
        if size:
            yield f"    {name:<16}{size / 2**30:>9.2f} GiB  {PARTS[name]}"
    verdict = "fits" if result["fits"] else "does not fit"
    yield f"    {'sum':<16}{result['total'] / 2**30:>9.2f} GiB  {verdict} into {result['gib']:g} GiB"
    if result["largest"] is None:
        yield f"no micro batch fits into {result['gib']:g} GiB"
    elif result["largest"] != shape["micro_batch"]:
        yield f"largest micro batch that fits: {result['largest']} (--set train.micro_batch={result['largest']})"


PARTS = {
    "weights": "and buffers",
    "gradients": "of the weights, at the peak",
    "optimiser": "moments, and fp32 copies of the weights",
    "inputs": "images, tags and maps of a micro batch",
    "activations": "of forward and backward, the passes without gradient and the operators' own included",
    "buckets": "for the collectives of the engine",
    "update": "copies of gradients; the peak is in the update, when the activations are gone",
    "fragmentation": "assumed: what the allocator cannot use",
    "context": "assumed: CUDA, cuBLAS, cuDNN and NCCL",
}


def _table(row: dict[str, Any]) -> Iterator[str]:
    total = sum(row["phases_s"].values())
    for phase in ORDER:
        if phase not in row["phases_s"]:
            continue
        seconds, work = row["phases_s"][phase], row["flops"].get(phase, 0)
        rate = f"{_rate(work / seconds):>16}" if work else ""
        yield f"    {phase:<18}{_time(seconds):>10}{100 * seconds / total:>7.1f} %{rate}"
    yield (
        f"    {'sum':<18}{_time(total):>10}  {100 * row['phases_over_step']:.1f} % of that step; steps with phases "
        f"took {100 * (row['watched_over_plain'] - 1):+.1f} %"
    )


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def _rate(flops: float) -> str:
    return f"{flops / 1e12:.3g} TFLOP/s" if flops >= 1e12 else f"{flops / 1e9:.3g} GFLOP/s"


def plot(result: dict[str, Any], path: Path) -> None:
    """A bar for each contestant, cut into its phases, into a PNG file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = result["rows"]
    figure, axes = pyplot.subplots(figsize=(11, 2.6 + 0.7 * len(rows)))
    colours = dict(zip(ORDER, pyplot.get_cmap("tab20").colors, strict=False))
    names = list(rows)
    for phase in ORDER:
        if not any(phase in row["phases_s"] for row in rows.values()):
            continue
        left = [sum(rows[n]["phases_s"].get(p, 0) for p in ORDER[: ORDER.index(phase)]) for n in names]
        width = [rows[n]["phases_s"].get(phase, 0) for n in names]
        axes.barh(names, width, left=left, color=colours[phase], label=phase, height=0.6)
    for n in names:
        text = f" {rows[n]['images_per_s']:.3g} images/s, MFU {100 * rows[n]['mfu']:.1f} %"
        axes.text(sum(rows[n]["phases_s"].values()), n, text, va="center", fontsize="small")
    axes.set_xlim(0, 1.35 * max(sum(row["phases_s"].values()) for row in rows.values()))
    axes.invert_yaxis()
    shape = result["shape"]
    axes.set(
        xlabel="seconds of a step",
        title=f"{result['config']}, {shape['crop']} px, {shape['classes']} classes, {shape['micro_batches']} x "
        f"{shape['micro_batch']} images a rank, {shape['precision']}, {result['machine']['device']}",
    )
    axes.title.set_fontsize("small")
    below = (0.5, -0.2 if len(rows) > 1 else -0.3)
    axes.legend(ncols=5, fontsize="x-small", loc="upper center", bbox_to_anchor=below)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)
