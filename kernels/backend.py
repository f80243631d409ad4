"""Backend selection of every op.

Backends: `reference` (plain torch), `native` (kernels._C: C++ on the CPU, CUDA on the GPU), `triton` (GPU), `auto`.
Order of precedence: argument of the call > setting of the op > default setting.
A backend asked for by name that cannot run is an error; only `auto` walks down its list.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch

HAS_TRITON = importlib.util.find_spec("triton") is not None
BACKENDS = ("reference", "native", "triton")

# What `auto` tries, first to last. An op or a device not listed here has its reference alone.
AUTO: dict[str, dict[str, tuple[str, ...]]] = {
    "c2am_pool": {"cpu": ("native", "reference"), "cuda": ("native", "reference")},
    "class_patch_contrast": {"cpu": ("native", "reference"), "cuda": ("triton", "reference")},
    "dense_crf": {"cpu": ("native", "reference"), "cuda": ("native", "reference")},
    "dense_energy": {"cpu": ("native", "reference"), "cuda": ("native", "reference")},
    "dilate_regions": {"cpu": ("native", "reference"), "cuda": ("native", "reference")},
    "erase": {"cpu": ("native", "reference"), "cuda": ("native", "reference")},
    "max_upsampled_masks": {"cpu": ("native", "reference"), "cuda": ("native", "reference")},
    "par": {"cpu": ("native", "reference"), "cuda": ("native", "reference")},
    "patch_token_contrast": {"cpu": ("native", "reference"), "cuda": ("triton", "reference")},
    "path_affinity_counts": {"cpu": ("native", "reference"), "cuda": ("native", "reference")},
    "path_affinity_loss": {"cpu": ("native", "reference"), "cuda": ("native", "reference")},
    "psl_loss": {"cpu": ("native", "reference"), "cuda": ("native", "reference")},
    "radius_mask": {"cpu": ("native", "reference"), "cuda": ("native", "reference")},
    "random_walk": {"cpu": ("native", "reference"), "cuda": ("native", "reference")},
    "select_regions": {"cpu": ("native", "reference"), "cuda": ("native", "reference")},
}
# torch.ops.wsss.<name> on the CPU and on CUDA, where it is not the name of the op
NATIVE_NAMES = {"dense_energy": ("dense_energy", "lattice_filter"), "erase": ("erase_soft", "erase_soft")}

_implementations: dict[str, dict[str, Callable]] = {}
_settings: dict[str, str] = {"default": "auto"}

try:
    from kernels import _C

    NATIVE_PROBLEM = None
    NATIVE_HAS_CUDA = bool(_C.has_cuda)
except ImportError as error:
    NATIVE_PROBLEM = f"kernels._C is not usable ({error}); build it with `pip install -e . --no-build-isolation`"
    NATIVE_HAS_CUDA = False


def native_problem(op: str) -> str | None:
    """Why kernels._C has no usable `op`, or None."""
    if NATIVE_PROBLEM is None and not all(hasattr(torch.ops.wsss, name) for name in NATIVE_NAMES.get(op, (op,))):
        return f"kernels._C was built from older sources, without {op}; build it again"
    return NATIVE_PROBLEM


def register(op: str, **implementations: Callable) -> None:
    """Enter the implementations of `op` under the names of their backends; called once by each op.py."""
    assert set(implementations) <= set(BACKENDS) and "reference" in implementations
    _implementations[op] = implementations


def configure(default: str = "auto", **per_op: str) -> None:
    """Set the backends for the process, e.g. `configure("auto", par="native")`; replaces earlier settings.

    Raises ValueError for an unknown op or backend. Whether a backend can run is found out by the call of the op,
    since it depends on the device of the tensors.
    """
    for key, name in {"default": default, **per_op}.items():
        if key != "default" and key not in _implementations:
            raise ValueError(f"kernels.configure: unknown op {key!r}; ops: {', '.join(sorted(_implementations))}")
        if name not in (*BACKENDS, "auto"):
            raise ValueError(
                f"kernels.configure: unknown backend {name!r} for {key}; known: auto, {', '.join(BACKENDS)}"
            )
    _settings.clear()
    _settings.update(default=default, **per_op)


def check_backends(device: torch.device) -> None:
    """Hold that every op can run on `device` with the present settings, since some are first called late in a run.

    Raises ValueError if one cannot.
    """
    for op in _implementations:
        choose(op, device, None)


def _has_cuda_kernel(op: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"wsss::{NATIVE_NAMES.get(op, (op,))[-1]}", "CUDA")


def _problem(op: str, name: str, device: str) -> str | None:
    """Why backend `name` of `op` cannot run on `device`, or None."""
    if name not in _implementations[op]:
        return f"it has no {name} implementation"
    if name == "native" and native_problem(op) is not None:
        return native_problem(op)
    if name == "native" and device == "cuda" and not NATIVE_HAS_CUDA:
        return "kernels._C was built without CUDA"
    if name == "native" and device not in ("cpu", "cuda"):
        return "native code exists for cpu and cuda alone"
    if name == "native" and device == "cuda" and not _has_cuda_kernel(op):
        return "its native code is for the cpu alone"
    if name == "triton" and (device != "cuda" or not HAS_TRITON):
        return "triton needs a CUDA device and the triton package"
    return None


def available_backends(op: str, device: str | torch.device = "cpu") -> list[str]:
    """Names of the backends of `op` that can run on `device`. Raises ValueError for an unknown op."""
    if op not in _implementations:
        raise ValueError(f"kernels.available_backends: unknown op {op!r}; ops: {', '.join(sorted(_implementations))}")
    return [name for name in BACKENDS if _problem(op, name, torch.device(device).type) is None]


def choose(op: str, device: torch.device, requested: str | None, pass_over: tuple[str, ...] = ()) -> Callable:
    """The implementation of `op` to run on `device`; `auto` leaves out those of `pass_over`.

    Raises ValueError if the one asked for cannot run.
    """
    name = requested or _settings.get(op) or _settings["default"]
    if name == "auto":
        order = AUTO.get(op, {}).get(device.type, ("reference",))
        name = next(n for n in order if n not in pass_over and _problem(op, n, device.type) is None)
    problem = _problem(op, name, device.type)
    if problem is not None:
        usable = ", ".join(n for n in BACKENDS if _problem(op, n, device.type) is None)
        raise ValueError(f"{op}: backend {name!r} cannot run on {device.type}: {problem}; available: {usable}")
    return _implementations[op][name]
