"""What the documents tell the reader to type exists: files, options, make targets, config keys, links."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from wsss_dist.config import parse_config, read_config
from wsss_dist.pipeline import Pipeline

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
TARGETS = ("quickstart", "quickstart-pnoc", "test", "bench", "lint", "setup")
# The environment variables of our own that something reads.
SETTINGS = {
    name
    for path in ("setup.py", "tests/kernels/fuzzing.py")
    for name in re.findall(r"""environ\.(?:get\(|setdefault\(|)\[?["'](WSSS_\w+)""", (ROOT / path).read_text())
}
MADE_LATER = ("runs/", ".venv/", "data/", "mydata")


def commands(document):
    """The lines of the bash blocks, continued lines joined."""
    for block in re.findall(r"```bash\n(.*?)```", document.read_text(), re.DOTALL):
        yield from (line for line in block.replace("\\\n", " ").splitlines() if line.strip())


ALL = [(d.name, c) for d in DOCUMENTS for c in commands(d)]


def test_there_are_commands():
    assert {"make quickstart", "make test"} <= {c for _, c in ALL}
    assert len(ALL) > 8


@pytest.mark.parametrize(("document", "command"), ALL)
def test_command(document, command):
    words = shlex.split(command, comments=True)
    while "=" in words[0]:  # environment for the command behind it
        name = words.pop(0).split("=")[0]
        assert not name.startswith("WSSS_") or name in SETTINGS, f"{document}: nothing reads {name}"
    known = {"make", "deepspeed", "torchrun", "python", "source", "srun", "sbatch", "launch/torchrun.sh"}
    row = words[0].startswith("launch/slurm/")  # START="..." in front of it
    assert words[0] in known or row, f"{document}: {words[0]} is new here; add how to check it"
    if words[0] == "make":
        assert all(word in TARGETS or "=" in word for word in words[1:])
        return
    for word in words[1:]:
        if word.endswith(".py"):
            assert (ROOT / word).is_file(), f"{document}: {command}"
    scripts = [word for word in words if word.startswith("launch/")]
    for script in scripts:
        assert (ROOT / script).is_file(), f"{document}: {script}"
        # the shell scripts hand their options on
        text = (ROOT / (script if script.endswith(".py") else "launch/train.py")).read_text()
        for option in (w for w in words[words.index(script) :] if w.startswith("--")):
            assert f'"{option}"' in text, f"{document}: {script} has no option {option}"
    if "--config" in words:
        overrides = [b for a, b in zip(words, words[1:], strict=False) if a == "--set"]
        values = read_config(words[words.index("--config") + 1], overrides)
        if "stages" not in values:
            parse_config(values)
        elif "--stage" in words:
            assert words[words.index("--stage") + 1] in Pipeline(values).entries
        else:
            Pipeline(values)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_links_and_paths(document):
    text = document.read_text()
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert link.startswith("https://") or (document.parent / link).exists(), link
    for path in re.findall(r"`((?:wsss_dist|launch|configs|tests|kernels|csrc|docs)/[\w./-]+)`", text):
        example = any(part in path for part in ("test_par", "csrc/par", "kernels/par"))
        assert example or (ROOT / path).exists(), f"{document.name} names {path}"


@pytest.mark.parametrize("target", TARGETS)
def test_make_target(target):
    if shutil.which("make") is None:
        pytest.skip("make is not installed; a GPU machine without build tools")
    done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for script in re.findall(r"\blaunch/\w+\.py", done.stdout):
        assert (ROOT / script).is_file()
    for module in re.findall(r"python -m (kernels[\w.]*)", done.stdout):
        assert (ROOT / (module.replace(".", "/") + ".py")).is_file(), f"make {target} runs {module}"


def test_ci_runs_lint_and_tests():
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111, "executable"
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
    lines = [line for line in script.read_text().splitlines() if line.startswith("make")]
    assert [line.split()[-1] for line in lines] == ["lint", "test"]


def test_licence_is_apache_2():
    assert "Apache License" in (ROOT / "LICENSE").read_text()[:200]
