"""What the benchmark is measured against: training steps as research code has them, in plain PyTorch.

`wsss_dist/peers/<method>.py` is the peer of a method: `Peer(method)` has a `training_step` on the weights of that
method with the same losses, `check(config)` says what it cannot do. Written from the papers' equations; nothing here is
used for training.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

from wsss_dist.errors import UserError


def load_peer(name: str) -> ModuleType:
    """The peer of a method, by the name of the method.

    Raises:
        UserError: it has none.
    """
    known = sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name != "operators")
    if name not in known:
        raise UserError(f"command line: --peer: method '{name}' has none, only {', '.join(known)}; leave --peer out")
    return importlib.import_module(f"{__name__}.{name}")
