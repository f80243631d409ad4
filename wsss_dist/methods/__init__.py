"""The methods. The folder is the registry: `load_method("pcre")` imports `wsss_dist/methods/pcre.py`.

A method module holds `Config` (a StrictModel with the paper's hyper-parameters) and `Method` (see base.py).
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from types import ModuleType

from wsss_dist.errors import UserError


def method_names() -> list[str]:
    """The methods that can be named in a config."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name != "base")


def load_method(name: str) -> ModuleType:
    """The module of a method, by name.

    Raises:
        UserError: there is no such method.
    """
    if name not in method_names():
        near = difflib.get_close_matches(name, method_names(), n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise UserError(f"config: 'method.name' is {name!r}; known methods: {', '.join(method_names())}{hint}")
    return importlib.import_module(f"{__name__}.{name}")
