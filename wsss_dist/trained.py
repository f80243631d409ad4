"""A method with the weights of a finished run, for what comes after training.

A run exports `model.safetensors`: the weights of its newest checkpoint with the names of its classes, so that who reads
them later can tell whether they are the right ones.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from wsss_dist import dist
from wsss_dist.checkpoint import newest_good
from wsss_dist.config import RunConfig, load_config, merged
from wsss_dist.engine import WEIGHTS
from wsss_dist.errors import UserError, raised_alike
from wsss_dist.files import whole_file
from wsss_dist.methods import load_method
from wsss_dist.methods.base import BaseMethod
from wsss_dist.schema import StrictModel, parse


def export_weights(run_dir: Path, class_names: list[str]) -> Path:
    """Write run_dir/model.safetensors from the newest good checkpoint; on rank 0 alone.

    Raises:
        UserError: there is no good checkpoint.
    """
    (source, _), path = newest_good(run_dir), run_dir / WEIGHTS
    with whole_file(path) as partial:
        save_file(load_file(source / WEIGHTS), partial, metadata={"classes": json.dumps(class_names)})
    return path


def check_classes(path: Path, class_names: list[str]) -> None:
    """Hold that exported weights belong to these classes; a file that names none passes.

    Raises:
        UserError: they are of other classes, or no safetensors file.
    """
    try:
        with safe_open(path, "pt") as file:
            known = json.loads((file.metadata() or {}).get("classes", "null"))
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"weights file {path} cannot be read ({error}); run the stage that makes it again") from None
    _hold_classes(path, known, class_names)


def _hold_classes(path: Path, known: list[str] | None, class_names: list[str]) -> None:
    if known is not None and known != class_names:
        differ = [f"{a!r} there, {b!r} here" for a, b in zip(known, class_names, strict=False) if a != b]
        found = differ[0] if differ else f"{len(known)} there, {len(class_names)} here"
        raise UserError(
            f"weights file {path} was trained on other classes ({found}); expected the same names in the same order: "
            "correct data.classes, or train again"
        )


def load_trained(
    run_dir: Path, class_names: list[str], changes: dict[str, Any] | None = None
) -> tuple[RunConfig, BaseMethod]:
    """Config and method of a finished run, in evaluation mode on this rank's device.

    Args:
        run_dir: folder with config.yaml and model.safetensors.
        class_names: what the method has to tell apart.
        changes: keys of the `method:` section that take other values than in training.
    Raises:
        UserError: the run is not finished, or was trained on other classes, or `changes` are none of the method's keys.
    """
    cfg = config_of(run_dir)
    check_classes(run_dir / WEIGHTS, class_names)
    if changes:
        section = merged(cfg.method.model_dump(), changes)
        cfg = cfg.model_copy(update={"method": parse(type(cfg.method), section, "method")})
    path = run_dir / WEIGHTS
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"weights file {path} cannot be read ({error}); run the stage that makes it again") from None
    return cfg, _method(cfg, class_names, state, path, f"run the stage '{run_dir.name}' again").eval()


def load_newest(cfg: RunConfig, run_dir: Path, class_names: list[str]) -> tuple[BaseMethod, dict[str, Any]]:
    """The method of a run with the weights of its newest good checkpoint, on this rank's device; a collective call.

    The run may be in training.

    Args:
        cfg: of the run.
        run_dir: its folder.
        class_names: what the method has to tell apart.
    Returns:
        the method and the checkpoint's manifest: "step", and the "sha256" of each of its "files".
    Raises:
        UserError: there is no good checkpoint, or it is of other classes or of another model.
    """
    while True:
        folder, manifest = dist.on_main(lambda: newest_good(run_dir))
        try:
            state = load_file(folder / WEIGHTS)
        except FileNotFoundError:  # the training has a newer one and took this away
            state = None
        if all(dist.all_gather_object(state is not None)):
            break
    with raised_alike():  # each rank has read the same
        _hold_classes(folder / WEIGHTS, manifest["identity"].get("data classes"), class_names)
        return _method(cfg, class_names, state, folder / WEIGHTS, "take back the changed method settings"), manifest


def _method(cfg: RunConfig, class_names: list[str], state: dict[str, Tensor], path: Path, fix: str) -> BaseMethod:
    method = load_method(cfg.method_name).Method(without_weights(cfg.method), len(class_names), cfg.train.steps)
    try:
        method.load_state_dict(state)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"weights file {path} is of another model than its config says ({reason}); {fix}") from None
    method.after_load()
    return method.to(dist.device())


def config_of(run_dir: Path) -> RunConfig:
    """Config of a finished run. Raises UserError where it is not finished."""
    for name in ("config.yaml", WEIGHTS):
        if not (run_dir / name).is_file():
            raise UserError(
                f"stage: {run_dir / name} is missing; run the stage '{run_dir.name}', which makes it, first"
            )
    return load_config(run_dir / "config.yaml")


def without_weights(method: StrictModel) -> StrictModel:
    """The config of a method whose backbone starts from nothing: a checkpoint overwrites it."""
    backbone = getattr(method, "backbone", None)
    if getattr(backbone, "weights", None) is None:
        return method
    return method.model_copy(update={"backbone": backbone.model_copy(update={"weights": None})})
