"""Multi-stage methods: a config with `stages:` is run stage by stage, and only what changed is run again.

    run: {name: voc_pnoc, seed: 0}
    data: {...}                      # sections beside `stages` are what every stage has, unless it says otherwise
    stages:
      classifier: {kind: train, method: {...}, optim: {...}, train: {...}}
      cams: {kind: cams, network: "${classifier}", ...}

The folder of a stage is run.dir/run.name/<stage>. `${classifier}` in a value stands for the folder of an earlier stage
and makes that stage an input. `train` is a run of the trainer; every other kind is a module of wsss_dist/stages.

A finished stage leaves stage.json: its section (but for keys that cannot change what it makes), the names and tags of
its images, the digests of its inputs, the digest of what it made. It is skipped as long as these are the same and its
files are there; otherwise its folder is set aside as <stage>.old and it runs again, and with it whatever depends on it,
if it makes something else. A stage that was killed goes on where it was: at its newest checkpoint, or with the files
that are missing.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wsss_dist import dist
from wsss_dist.agreement import check_same, check_shared, facts_of_config, facts_of_data
from wsss_dist.checkpoint import newest_step
from wsss_dist.config import RunConfig, RunSection, merged, parse_config
from wsss_dist.data import DataConfig, build_dataset
from wsss_dist.data.problems import noted
from wsss_dist.errors import UserError, collective
from wsss_dist.files import write_whole
from wsss_dist.keys import changes_nothing
from wsss_dist.pipeline_report import build_pipeline_report, scores_text
from wsss_dist.report import ReportConfig
from wsss_dist.run_lock import RunLock
from wsss_dist.schema import StrictModel, parse
from wsss_dist.signals import interruptible
from wsss_dist.stages import load_kind, stage_kinds
from wsss_dist.stages.base import Stage, split_names
from wsss_dist.trained import export_weights
from wsss_dist.trainer import DONE, Trainer, commit, configure_kernels

DONE_FILE, STARTED_FILE = "stage.json", "started.json"
# ranks wait for each other at the end of a stage alone
STAGE_TIMEOUT_S = 6 * 3600
_REFERENCE = re.compile(r"\$\{([^}]*)\}")
# sections that a stage may have of its own, on top of the common ones
_COMMON = ("data", "eval", "report", "kernels", "deepspeed", "optim", "train")
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")


@dataclass
class Entry:
    """One stage: its section as written, merged with the common ones; the stages it reads; its parsed config."""

    name: str
    kind: str
    section: dict[str, Any]
    inputs: list[str]
    folder: Path
    config: RunConfig | StrictModel


class Pipeline:
    """All stages of a config, parsed and checked before the first one runs.

    Raises:
        UserError: a mistake in any stage, named by its dotted key.
    """

    def __init__(self, values: dict[str, Any]):
        self.values = values
        values = dict(values)
        stages = values.pop("stages")
        self.run = parse(RunSection, values.pop("run", {}), "run")
        unknown = sorted(set(values) - set(_COMMON))
        if unknown:
            raise UserError(
                f"config: unknown key '{unknown[0]}' beside 'stages'; known keys: run, stages, {', '.join(_COMMON)}"
            )
        if not isinstance(stages, dict) or not stages:
            raise UserError(f"config: 'stages' must be a mapping of names to stages, found {stages!r}")
        self.folder = self.run.dir / self.run.name
        self.kernels = values.get("kernels", {"default": "auto"})
        self.data = parse(DataConfig, values["data"], "data") if "data" in values else None
        self.report = parse(ReportConfig, values.get("report", {}), "report")
        self._lock: RunLock | None = None
        self._fresh: set[str] = set()  # stages that are known to be done with this config
        self._images: dict[str, str] = {}  # what says which images a split has -> images and classes, as found
        self.entries: dict[str, Entry] = {}
        for name, section in stages.items():
            self.entries[name] = self._entry(name, section, values)

    def _entry(self, name: str, section: Any, common: dict[str, Any]) -> Entry:
        where = f"stages.{name}"
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise UserError(f"config: 'stages' names a stage {name!r}; a name is letters, digits and _, as a folder's")
        kinds = ["train", *stage_kinds()]
        if not isinstance(section, dict) or section.get("kind") not in kinds:
            found = section.get("kind") if isinstance(section, dict) else section
            raise UserError(f"config: '{where}.kind' is {found!r}; expected one of {', '.join(kinds)}")
        section = {**section, **_sections(section, common)}
        inputs = sorted(set(_references(section)))
        for other in inputs:
            if other not in self.entries:
                known = f"stages before it: {', '.join(self.entries) or 'none'}"
                raise UserError(f"config: '{where}' refers to ${{{other}}}, which is no earlier stage; {known}")
        resolved = _resolved({k: v for k, v in section.items() if k != "kind"}, self.folder)
        try:
            config = self._parse(name, section["kind"], resolved)
        except UserError as error:
            lines = str(error).splitlines()
            raise UserError("\n".join(f"stage '{name}': {line}" for line in lines)) from None
        return Entry(name, section["kind"], section, inputs, self.folder / name, config)

    def _parse(self, name: str, kind: str, section: dict[str, Any]) -> RunConfig | StrictModel:
        if kind == "train":
            return parse_config({"run": {"name": name, "dir": str(self.folder), "seed": self.run.seed}, **section})
        return parse(load_kind(kind).Config, section, "")

    def start(self, only: str | None = None, until: str | None = None) -> int:
        """Run the stages that are not done, or some of them, and write the table of scores and the report.

        A collective call.

        Args:
            only: name of the stage to run; those it reads must be done.
            until: name of a stage to run with all that it depends on.
        Returns:
            DONE, or the exit status of a training that a signal or train.stop_after ended.
        """
        if only is not None and until is not None:
            raise UserError("command line: --stage and --until exclude each other; give one of them")
        for option, name in (("--stage", only), ("--until", until)):
            if name is not None and name not in self.entries:
                raise UserError(f"command line: {option} {name} is none of the stages: {', '.join(self.entries)}")
        wanted = {only} if only is not None else self._needed(until)
        dist.init(STAGE_TIMEOUT_S)
        check_same(lambda: facts_of_config({**self.values, "wanted": sorted(wanted)}))
        dist.on_main(self._take_lock)
        try:
            check_shared(self.folder)
            with interruptible():
                return self._start([entry for name, entry in self.entries.items() if name in wanted])
        finally:
            if self._lock is not None:
                self._lock.release()

    def _needed(self, name: str | None) -> set[str]:
        """A stage and all that it depends on; None: every stage."""
        if name is None:
            return set(self.entries)
        return {name}.union(*(self._needed(other) for other in self.entries[name].inputs))

    def _start(self, entries: list[Entry]) -> int:
        for entry in entries:
            key = self._key(entry)
            if self._is_done(entry, key):
                _say(f"stage {entry.name}: done before, and nothing it depends on has changed")
                continue
            dist.on_main(lambda entry=entry, key=key: _open(entry, key))
            _say(f"stage {entry.name}: {entry.kind}")
            begin = time.perf_counter()
            status, scores = self._run(entry)
            if scores is None:
                return status
            # of this start alone, where the stage was killed before
            made = {"seconds": round(time.perf_counter() - begin, 1), "scores": scores}
            dist.on_main(lambda entry=entry, key=key, made=made: _close(entry, key, made))
            self._fresh.add(entry.name)
            _say(f"stage {entry.name}: done in {made['seconds']:.0f} s")
        current = self._current()
        report = dist.on_main(lambda: self._report(current))
        _say(dist.on_main(lambda: scores_text(self.folder)))
        _say(f"report: {report}")
        return DONE

    def _take_lock(self) -> None:
        self._lock = RunLock(self.folder, report=_say)

    def _report(self, stages: list[str]) -> Path:
        return build_pipeline_report(self.folder, stages, self.run.seed, self.data, self.report.num_images)

    def _current(self) -> list[str]:
        """The stages that are done with this config and these inputs: a part of a run may leave others as they were."""
        return [name for name, entry in self.entries.items() if self._is_current(entry)]

    def _is_current(self, entry: Entry) -> bool:
        """Is a stage done with this config, and all that it reads?"""
        if entry.name in self._fresh:
            return True
        return all(self._is_current(self.entries[other]) for other in entry.inputs) and self._is_done(
            entry, self._key(entry)
        )

    def _is_done(self, entry: Entry, key: dict[str, Any]) -> bool:
        if done := dist.on_main(lambda: _is_done(entry, key)):
            self._fresh.add(entry.name)
        return done

    def _run(self, entry: Entry) -> tuple[int, dict[str, Any] | None]:
        """Exit status and scores, split -> kind -> metrics; None for a training that is not at its end."""
        if entry.kind != "train":
            dist.init(STAGE_TIMEOUT_S)
            configure_kernels(self.kernels)
            with noted(entry.folder):
                return DONE, load_kind(entry.kind).run(Stage(entry.name, entry.folder, entry.config, _say))
        status = Trainer(entry.config).train()
        if status != DONE or dist.on_main(lambda: newest_step(entry.folder)) < entry.config.train.steps:
            return status, None  # stopped, with a checkpoint to go on from
        data = entry.config.data
        dist.on_main(lambda: export_weights(entry.folder, build_dataset(data, data.train_split).class_names))
        return status, dist.on_main(lambda: _trained_scores(entry.folder))

    def _key(self, entry: Entry) -> dict[str, Any]:
        """What the result of a stage depends on."""
        inputs = {}
        for other in entry.inputs:
            made = dist.on_main(lambda other=other: _read(self.entries[other].folder / DONE_FILE))
            if made is None or not self._is_current(self.entries[other]):
                state = "not done" if made is None else "done with another config, data or inputs, or has lost files"
                raise collective(
                    UserError(
                        f"stage '{entry.name}' reads stage '{other}', which is {state}; run the config without "
                        f"--stage, or with --stage {other} first"
                    )
                )
            inputs[other] = made["outputs"]
        return {
            "kind": entry.kind,
            "section": _counting(entry.section),
            "data": self._data_of(entry),
            "seed": self.run.seed,
            "inputs": inputs,
        }

    def _data_of(self, entry: Entry) -> dict[str, str]:
        """Split -> images and classes; a collective call, which holds that they are the same on every rank."""
        cfg = entry.config.data
        names = split_names(entry.config) if entry.kind != "train" else [cfg.train_split, *cfg.eval_splits]
        key_of = {name: _images_of(cfg, name) for name in dict.fromkeys(names)}

        def facts() -> dict[str, Any]:
            found: dict[str, Any] = {}
            for name, key in key_of.items():
                if key not in self._images:
                    of_split = facts_of_data(name, build_dataset(cfg, name))
                    self._images[key] = "; ".join(of_split.values())
                    found |= of_split
            return found

        check_same(facts)
        return {name: self._images[key] for name, key in key_of.items()}


def _images_of(cfg: DataConfig, split: str) -> str:
    """The keys that `build_dataset` asks for the images of a split, so that stages with the same open it once."""
    keys = cfg.model_dump_json(include={"format", "root", "classes", "untagged", "leave_out"})
    limit = cfg.train_limit if split == cfg.train_split else None
    return f"{keys} {split} {limit} {cfg.leave_out is not None and split in cfg.eval_splits}"


def _takes(kind: str, key: str) -> bool:
    """Does a stage of this kind have a section `key`?"""
    return kind == "train" or key in load_kind(kind).Config.model_fields


def _sections(section: dict[str, Any], common: dict[str, Any]) -> dict[str, Any]:
    """The common sections that a stage takes, with its own keys in them; a training is evaluated only if it says so."""
    out = {}
    for key in _COMMON:
        if key in common and (key in section or _takes(section["kind"], key)):
            shared = common[key]
            if key == "data" and section["kind"] == "train" and isinstance(shared, dict):
                shared = {**shared, "eval_splits": []}
            out[key] = merged(shared, section.get(key, {}))
    return out


def _counting(value: Any, key: str = "") -> Any:
    """The nested value without the keys that cannot change what a stage makes."""
    if not isinstance(value, dict):
        return value
    named = ((f"{key}.{name}" if key else name, name, inner) for name, inner in value.items())
    return {name: _counting(inner, dotted) for dotted, name, inner in named if not changes_nothing(dotted)}


def _references(value: Any) -> list[str]:
    """Names of the stages that the strings of a nested value refer to."""
    if isinstance(value, dict):
        return [name for inner in value.values() for name in _references(inner)]
    if isinstance(value, list):
        return [name for inner in value for name in _references(inner)]
    return _REFERENCE.findall(value) if isinstance(value, str) else []


def _resolved(value: Any, folder: Path) -> Any:
    """The nested value with the folders of the stages in place of the references."""
    if isinstance(value, dict):
        return {k: _resolved(v, folder) for k, v in value.items()}
    if isinstance(value, list):
        return [_resolved(v, folder) for v in value]
    return _REFERENCE.sub(lambda m: str(folder / m[1]), value) if isinstance(value, str) else value


def _is_done(entry: Entry, key: dict[str, Any]) -> bool:
    made = _read(entry.folder / DONE_FILE)
    return made is not None and made["key"] == _digest(key) and made.get("files") == len(_outputs(entry))


def _open(entry: Entry, key: dict[str, Any]) -> None:
    """Start a stage, or go on with it: what another section or other inputs made is set aside."""
    started = _read(entry.folder / STARTED_FILE)
    if entry.folder.exists() and (started is None or started["key"] != _digest(key)):
        number = 1
        while (old := entry.folder.with_name(f"{entry.name}.old{f'-{number}' if number > 1 else ''}")).exists():
            number += 1
        entry.folder.rename(old)
        _say(f"stage {entry.name}: what other settings, images or inputs have made is kept as {old.name}")
    entry.folder.mkdir(parents=True, exist_ok=True)
    (entry.folder / DONE_FILE).unlink(missing_ok=True)
    _write(entry.folder / STARTED_FILE, {"key": _digest(key)})


def _close(entry: Entry, key: dict[str, Any], made: dict[str, Any]) -> None:
    """Write the manifest of a finished stage."""
    manifest = {"stage": entry.name, "key": _digest(key), **key, "commit": commit()}
    files = _outputs(entry)
    _write(
        entry.folder / DONE_FILE,
        {**manifest, "outputs": _digest_of(files, entry.folder), "files": len(files), **made},
    )


def _trained_scores(folder: Path) -> dict[str, Any]:
    """What the final evaluation of a training found, if it had splits to evaluate on."""
    result = _read(folder / "result.json")
    return {} if result is None else {split: record["kinds"] for split, record in result["splits"].items()}


def _outputs(entry: Entry) -> list[Path]:
    """The files that later stages may read: the weights, or all below out/."""
    files = [entry.folder / "model.safetensors"] if entry.kind == "train" else sorted(entry.folder.glob("out/**/*"))
    return [path for path in files if path.is_file()]


def _digest_of(files: list[Path], folder: Path) -> str:
    """SHA-256 over the names and contents of files."""
    total = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        total.update(f"{path.relative_to(folder)} {digest}\n".encode())
    return total.hexdigest()


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return None


def _write(path: Path, value: dict[str, Any]) -> None:
    write_whole(path, json.dumps(value, indent=1))


def _say(text: str) -> None:
    if dist.is_main():
        print(text, flush=True)
