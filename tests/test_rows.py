"""Each published number has its start script, which names what exists; nothing is trained, and no Slurm is needed."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from wsss_dist.config import RunConfig, check_world
from wsss_dist.pipeline import Pipeline

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "launch" / "slurm"
SHARED = FOLDER / "train.sbatch"
SCRIPTS = sorted(p for p in FOLDER.glob("*.sbatch") if p != SHARED)
TABLE = re.findall(r"^\| `(\w+)` \| ([^|]+) \| ([\d., ]+) \|", (ROOT / "docs/reproduce.md").read_text(), re.MULTILINE)
# what a job has to have for launch/slurm/train.sbatch to save, be started again and go on
NEEDED = ("requeue", "open-mode", "signal", "output")


def directives(script: Path) -> dict[str, str]:
    """The #SBATCH lines of a script."""
    lines = re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", script.read_text(), re.MULTILINE)
    return dict(lines)


def handed_over(script: Path, folder: Path) -> list[str]:
    """The arguments that a script gives to what starts the training."""
    stub = folder / "start"
    stub.write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    stub.chmod(0o755)
    environment = {"START": str(stub), "PATH": "/usr/bin:/bin"}
    done = subprocess.run([str(script)], cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def parsed(words: list[str], monkeypatch) -> tuple[dict[str, RunConfig], str | None]:
    """The trainings that launch/train.py would start with these arguments, and its --until."""
    found: dict = {}

    class Trainer:
        def __init__(self, cfg: RunConfig):
            found["run"] = {cfg.run.name: cfg}

        def train(self) -> int:
            return 0

    def start(self: Pipeline, only: str | None = None, until: str | None = None) -> int:
        assert only is None and until in self.entries
        found["until"] = until
        found["run"] = {n: self.entries[n].config for n in self._needed(until) if self.entries[n].kind == "train"}
        return 0

    monkeypatch.setattr("wsss_dist.trainer.Trainer", Trainer)
    monkeypatch.setattr(Pipeline, "start", start)
    monkeypatch.setattr(sys, "argv", ["launch/train.py", *words])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "launch" / "train.py"), run_name="__main__")
    assert end.value.code == 0
    return found["run"], found.get("until")


def test_every_row_has_its_script_and_every_script_its_row():
    names = [name for name, *_ in TABLE]
    assert sorted(names) == [script.stem for script in SCRIPTS] and len(set(names)) == len(names) > 20


@pytest.mark.parametrize(("name", "what", "published"), TABLE, ids=lambda value: value if " " not in value else "")
def test_a_row_has_the_number_of_its_script(name, what, published):
    title = (FOLDER / f"{name}.sbatch").read_text().splitlines()[1]
    assert published.strip() in title.split(". docs/")[0].replace(":", " ").split(), title
    assert what.split(",")[0] in title, "the method"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.stem)
def test_a_script_names_what_exists(script, tmp_path, monkeypatch):
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
    assert script.stat().st_mode & 0o111, "executable"
    words = handed_over(script, tmp_path)
    trainings, until = parsed(words, monkeypatch)
    assert trainings
    given = directives(script)
    assert {key: given[key] for key in NEEDED} == {key: directives(SHARED)[key] for key in NEEDED}
    assert given["job-name"] == script.stem and given["gpus-per-node"] == given["ntasks-per-node"]
    for cfg in trainings.values():
        check_world(cfg, int(given["nodes"]) * int(given["ntasks-per-node"]))
        assert cfg.data.num_workers + 2 <= int(given["cpus-per-task"])
    if until is None:
        assert list(trainings) == [script.stem], "runs of two rows would take each other's folder"


def test_a_script_hands_its_arguments_to_srun(tmp_path):
    """Without START the words go through launch/slurm/train.sbatch; a stub stands for srun."""
    stub = tmp_path / "srun"
    stub.write_text("#!/bin/bash\nprintf '%s\\n' \"$@\"\n")
    stub.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_CPUS_PER_TASK": "6", "SLURM_JOB_ID": "1"}
    script = FOLDER / "pcre_coco.sbatch"
    command = [str(script), "--set", "run.seed=1"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    words = done.stdout.splitlines()
    begin = words.index("launch/train.py")
    assert words[begin - 1] == "python"
    assert words[begin + 1 :] == [*handed_over(script, tmp_path), "--set", "run.seed=1"]


def test_hours_are_known_for_every_script(tmp_path, monkeypatch):
    from wsss_dist.scaling.machine import MACHINES
    from wsss_dist.scaling.schedule import read_measured, schedule

    known = read_measured()
    for script in SCRIPTS:
        words = handed_over(script, tmp_path)
        overrides = [b for a, b in zip(words, words[1:], strict=False) if a == "--set"]
        until = words[words.index("--until") + 1] if "--until" in words else None
        ranks = int(directives(script)["ntasks-per-node"])
        config = words[words.index("--config") + 1]
        parts = schedule(config, overrides, MACHINES["A100"], ranks, until=until, known=known)
        assert sum(part.seconds for part in parts) > 60, script.stem
    assert json.dumps(known)
