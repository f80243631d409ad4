"""What the ranks of the tests do: train the tiny method on an engine, without loader and trainer."""

from __future__ import annotations

import hashlib
import resource
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.train import tiny
from wsss_dist import dist
from wsss_dist.benchmark.contest import Contest, Options
from wsss_dist.checkpoint import Checkpoints
from wsss_dist.config import parse_config
from wsss_dist.engine import Engine, build_engine
from wsss_dist.errors import CheckpointError  # noqa: F401  for the tests


def digest(engine: Engine) -> str:
    """SHA-256 of all weights and buffers, on every rank."""
    out = hashlib.sha256()
    state = {**engine.weights(everywhere=True), **{f"buffer {k}": b for k, b in engine.module.named_buffers()}}
    for name in sorted(state):
        out.update(name.encode() + state[name].detach().cpu().numpy().tobytes())
    return out.hexdigest()


def make_engine(values: dict) -> Engine:
    cfg = parse_config(values)
    dist.init(60)
    torch.manual_seed(cfg.run.seed)
    return build_engine(tiny.Method(cfg.method, tiny.C, cfg.train.steps), cfg)


def benchmark(values: dict, **options: object) -> dict:
    """Figures of a benchmark."""
    return Contest(parse_config(values), Options(**options)).run()


def steps_of(engine: Engine, first: int, last: int) -> list[float]:
    """Losses of steps first .. last - 1."""
    cfg = engine.cfg.train
    sizes = {"global_batch": cfg.global_batch, "micro_batch": cfg.micro_batch}
    return [
        engine.train_step(tiny.make_batches(s, **sizes, rank=dist.rank(), world_size=dist.world_size()), s)["loss"]
        for s in range(first, last)
    ]


def check_space(values: dict, root: Path) -> None:
    checkpoints(values, root).check_space(make_engine(values))


def train(values: dict) -> tuple[list[float], str]:
    """Losses of the whole run, and the digest of the final state."""
    engine = make_engine(values)
    return steps_of(engine, 0, engine.cfg.train.steps), digest(engine)


def running_means(values: dict, root: Path) -> dict[str, list[float]]:
    """Running means after a short run: this rank's own, what is evaluated, saved, and left of the own after that."""
    engine = make_engine(values)
    steps_of(engine, 0, 3)
    key = "statistics.running_mean"

    def now(module: torch.nn.Module) -> list[float]:
        return dict(module.named_buffers())[key].tolist()

    out = {"own": now(engine.module)}
    with engine.evaluation() as method:
        out["evaluated"] = now(method)
    folder = checkpoints(values, root / f"{values['train']}").save(engine, 3)
    return {**out, "saved": load_file(folder / "model.safetensors")[key].tolist(), "after": now(engine.module)}


def resumed_means(values: dict, root: Path) -> list[float]:
    """Running means that the checkpoint of `running_means` is gone on with."""
    engine = make_engine(values)
    checkpoints(values, root / f"{values['train']}").resume(engine)
    return dict(engine.module.named_buffers())["statistics.running_mean"].tolist()


def weights(values: dict) -> dict[str, list]:
    """Final weights as lists, so that they travel between processes."""
    engine = make_engine(values)
    steps_of(engine, 0, engine.cfg.train.steps)
    return {k: v.double().tolist() for k, v in engine.weights(everywhere=True).items()}


def checkpoints(values: dict, root: Path, **options: object) -> Checkpoints:
    return Checkpoints(root, **{"keep": 2, "identity": {"method.name": "tiny"}, **options})


def interrupted(values: dict, root: Path, stop: int) -> tuple[list[float], str]:
    """Like `train`, but saved after `stop` steps and gone on with by a second engine, its buffers spoilt."""
    engine = make_engine(values)
    losses = steps_of(engine, 0, stop)
    checkpoints(values, root).save(engine, stop)
    second = make_engine(values)
    with torch.no_grad():
        for buffer in second.module.buffers():
            buffer.add_(7)
    start = checkpoints(values, root).resume(second)
    assert start == stop
    return losses + steps_of(second, start, second.cfg.train.steps), digest(second)


def resumed_as(settings: tuple[dict, dict], root: Path) -> tuple[list[float], list[float], bool, bool]:
    """A run of the first settings, gone on with under the second ones half way.

    Returns:
        its losses, those of the uninterrupted run, whether the saved weights are contiguous, and whether the moments
        have the layout of their weights after it.
    """
    first, second = settings
    steps, folder = first["train"]["steps"], root / str(first["train"])
    engine = make_engine(first)
    losses = steps_of(engine, 0, steps // 2)
    saved = checkpoints(first, folder).save(engine, steps // 2)
    contiguous = all(w.is_contiguous() for w in load_file(saved / "model.safetensors").values())
    engine = make_engine(second)
    checkpoints(second, folder).resume(engine)
    losses += steps_of(engine, steps // 2, steps)
    same = all(s["exp_avg"].stride() == p.stride() for p, s in engine.optimizer.state.items())
    return losses, steps_of(make_engine(first), 0, steps), contiguous, same


def train_until_error(values: dict) -> tuple[str, str, bool]:
    """Class and text of the error that ends a run, and whether the weights are those from before the failing step."""
    engine = make_engine(values)
    bad = engine.cfg.method.bad_step
    steps_of(engine, 0, bad)
    before = digest(engine)
    try:
        steps_of(engine, bad, bad + 1)
    except Exception as error:
        return type(error).__name__, str(error), digest(engine) == before
    raise AssertionError("the step went through")


def skip_one(values: dict) -> tuple[str, str, str, list[float]]:
    """Digests before and after the bad step and after the next, and the losses of the rest of the run."""
    engine = make_engine(values)
    bad = engine.cfg.method.bad_step
    steps_of(engine, 0, bad)
    digests = [digest(engine)]
    for step in (bad, bad + 1):
        steps_of(engine, step, step + 1)
        digests.append(digest(engine))
    return *digests, steps_of(engine, bad + 2, bad + 4)


def each(function: Callable, cases: list, *args: object) -> list:
    """`function` of every case, in one process: starting one costs more than a short run."""
    return [function(case, *args) for case in cases]


def resume_both(values: dict, root: Path, stop: int) -> tuple[tuple, tuple]:
    """The uninterrupted run and the interrupted one."""
    return train(values), interrupted(values, root / str(values["train"]), stop)


def save(values: dict, root: Path, *at: int, limit: int | None = None, **options: object) -> str:
    """Train, saving after the steps `at`; digest at the last. `limit`: largest file in bytes at the last."""
    engine, stored = make_engine(values), checkpoints(values, root, **options)
    done = 0
    for step in at:
        steps_of(engine, done, step)
        if limit is not None and step == at[-1] and dist.rank() == dist.world_size() - 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        stored.save(engine, step)
        done = step
    return digest(engine)


def resume(values: dict, root: Path, **options: object) -> tuple[int, str, list[str]]:
    """Step and digest that a resume ends with, and what it reported."""
    said: list[str] = []
    engine = make_engine(values)
    start = checkpoints(values, root, report=said.append, **options).resume(engine)
    return start, digest(engine), said
