"""Images and tags in, batches out.

The names below are looked up when they are first used, so that `wsss_dist.data.prepare`, which needs no torch, starts
at once.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "Batch": "batch",
    "EvalSample": "batch",
    "MapConfig": "config",
    "DataConfig": "config",
    "Dataset": "dataset",
    "build_dataset": "readers",
    "build_eval_loader": "loader",
    "build_inference_loader": "loader",
    "build_train_loader": "loader",
    "chosen_rows": "loader",
    "check_eval_samples": "loader",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
