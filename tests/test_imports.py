"""Which way imports run: read from the source, so that a lazy import inside a function counts too."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHARED = {"wsss_dist.errors", "wsss_dist.files", "wsss_dist.schema"}
# part -> what it may import of ours; a name stands for its submodules too
ALLOWED = {
    "kernels": {"kernels"},
    "wsss_dist/errors.py": set(),
    "wsss_dist/files.py": set(),
    "wsss_dist/schema.py": {"wsss_dist.errors"},
    "wsss_dist/command.py": {"wsss_dist.launchers"},
    "wsss_dist/launchers.py": set(),
    "wsss_dist/keys.py": set(),
    "wsss_dist/signals.py": set(),
    "wsss_dist/dist.py": {"wsss_dist.launchers", "wsss_dist.signals"},
    "wsss_dist/optim.py": set(),
    "wsss_dist/log.py": set(),
    "wsss_dist/ds_config.py": set(),
    "wsss_dist/buffers.py": {"wsss_dist.dist"},
    "wsss_dist/agreement.py": {"wsss_dist.dist", "wsss_dist.keys"},
    "wsss_dist/precision.py": {"wsss_dist.dist", "wsss_dist.speed"},
    "wsss_dist/speed.py": {"wsss_dist.models"},
    "wsss_dist/reshard.py": {"wsss_dist.dist"},
    "wsss_dist/engine.py": {
        "wsss_dist.buffers",
        "wsss_dist.dist",
        "wsss_dist.ds_config",
        "wsss_dist.optim",
        "wsss_dist.precision",
        "wsss_dist.reshard",
        "wsss_dist.data",
    },
    "wsss_dist/checkpoint.py": {"wsss_dist.buffers", "wsss_dist.dist", "wsss_dist.engine"},
    "wsss_dist/data": {"wsss_dist.data"},
    "wsss_dist/models": {"kernels", "wsss_dist.models"},
    "wsss_dist/cam.py": {"kernels"},
    "wsss_dist/crf.py": {"kernels"},
    "wsss_dist/losses.py": {"kernels"},
    "wsss_dist/metrics.py": {"kernels", "wsss_dist.dist"},
    "wsss_dist/methods": {
        "kernels",
        "wsss_dist.models",
        "wsss_dist.cam",
        "wsss_dist.losses",
        "wsss_dist.dist",
        "wsss_dist.data.batch",
        "wsss_dist.data.transforms",
        "wsss_dist.methods.base",
    },
    "wsss_dist/peers": {
        "kernels",
        "wsss_dist.peers",
        "wsss_dist.methods",
        "wsss_dist.models",
        "wsss_dist.data.batch",
    },
    "wsss_dist/benchmark": {
        "kernels",
        "wsss_dist.benchmark",
        "wsss_dist.peers",
        "wsss_dist.methods",
        "wsss_dist.models",
        "wsss_dist.engine",
        "wsss_dist.precision",
        "wsss_dist.config",
        "wsss_dist.data",
        "wsss_dist.dist",
    },
    "wsss_dist/scaling": {
        "wsss_dist.models",
        "wsss_dist.scaling",
        "wsss_dist.benchmark",
        "wsss_dist.command",
        "wsss_dist.config",
        "wsss_dist.data",
        "wsss_dist.dist",
        "wsss_dist.engine",
        "wsss_dist.methods",
        "wsss_dist.pipeline",
    },
    "wsss_dist/stages": {
        "kernels",
        "wsss_dist.stages",
        "wsss_dist.agreement",
        "wsss_dist.cam",
        "wsss_dist.crf",
        "wsss_dist.data",
        "wsss_dist.dist",
        "wsss_dist.methods.base",
        "wsss_dist.metrics",
        "wsss_dist.trained",
    },
}
OWNERS = {"deepspeed": "wsss_dist/engine.py", "torch.distributed": "wsss_dist/dist.py"}
FILES = sorted(p for part in ("kernels", "wsss_dist", "launch") for p in (ROOT / part).rglob("*.py"))


def _imports(path: Path) -> set[str]:
    """Full names a file imports; those for type checkers alone are left out."""
    tree = ast.parse(path.read_text())
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{a.name}" for a in node.names}
    return names


def _is_in(name: str, part: str) -> bool:
    return name == part or name.startswith(part + ".")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_one_way(path):
    relative = str(path.relative_to(ROOT))
    ours = {n for n in _imports(path) if n.split(".")[0] in ("kernels", "wsss_dist", "launch", "tests")}
    for part, allowed in ALLOWED.items():
        if relative == part or relative.startswith(part + "/"):
            allowed = allowed if part == "kernels" else allowed | SHARED
            wrong = {n for n in ours if not any(_is_in(n, a) for a in allowed)}
            assert not wrong, f"{relative} may not import {sorted(wrong)}"
    assert not any(_is_in(n, "launch") or _is_in(n, "tests") for n in ours)


@pytest.mark.parametrize("package", OWNERS)
def test_one_file_alone_imports(package):
    found = {str(p.relative_to(ROOT)) for p in FILES if any(_is_in(n, package) for n in _imports(p))}
    assert found == {OWNERS[package]}


def test_the_rules_see_a_wrong_import(tmp_path):
    (tmp_path / "a.py").write_text("def f():\n    from wsss_dist import trainer\n    import torch.distributed as d\n")
    assert _imports(tmp_path / "a.py") == {"wsss_dist.trainer", "torch.distributed"}
