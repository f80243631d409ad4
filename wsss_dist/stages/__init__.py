"""The kinds of stages beside training. The folder is the registry: kind `cams` is `wsss_dist/stages/cams.py`.

A module holds `Config` (a StrictModel), `run(stage)`, which makes the files below stage.folder/out/<split> and returns
scores, and `picture(stage.folder, split, id)`, what the report shows of an image.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType


def stage_kinds() -> list[str]:
    """The kinds that can be named in a config, beside `train`."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name not in ("base", "scores"))


def load_kind(name: str) -> ModuleType:
    """The module of a kind, one of `stage_kinds()`."""
    return importlib.import_module(f"{__name__}.{name}")
