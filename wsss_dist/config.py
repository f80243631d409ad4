"""RunConfig: the parts' configs put together, read from YAML, and what must hold between two parts."""

from __future__ import annotations

import difflib
import math
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, SerializeAsAny, field_validator

from wsss_dist.data import DataConfig
from wsss_dist.ds_config import check_deepspeed_section
from wsss_dist.errors import UserError
from wsss_dist.evaluate import EvalConfig
from wsss_dist.methods import load_method
from wsss_dist.optim import OptimConfig
from wsss_dist.report import ReportConfig
from wsss_dist.schema import ConfigPath, StrictModel, parse

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


class RunSection(StrictModel):
    """`run:` section. The run folder is dir/name."""

    name: str
    dir: ConfigPath = Path("runs")
    seed: int = Field(0, ge=0, lt=2**31)

    @field_validator("name")
    @classmethod
    def _name_is_a_folder_name(cls, value: str) -> str:
        if not value or value in (".", "..") or set(value) & set("/\\\0"):
            raise ValueError("must be a plain folder name")
        return value


class TrainConfig(StrictModel):
    """`train:` section. Batch sizes in images; `*_every` in optimiser steps, null for never."""

    steps: int = Field(gt=0)
    # images per optimiser step over all ranks; never changes with the number of ranks
    global_batch: int = Field(gt=0)
    # images per forward pass of one rank; global_batch = micro_batch * ranks * accumulation
    micro_batch: int = Field(gt=0)
    engine: Literal["deepspeed", "plain"] = "deepspeed"
    precision: Literal["fp32", "bf16"] = "fp32"
    zero_stage: int = Field(0, ge=0, le=3)
    # convolutional networks: weights and images with the channels last in memory, which most convolutions are faster on
    channels_last: bool = False
    # run every block of a ViT or a ResNet by torch.compile, in training steps; what comes after training
    # runs them as they are written. The first step then takes some minutes; not with zero_stage 3
    compile: bool = False
    # largest gradient norm; null: no clipping
    grad_clip: float | None = Field(None, gt=0)
    log_every: int = Field(10, gt=0)
    eval_every: int | None = Field(None, gt=0)
    save_every: int | None = Field(None, gt=0)
    # number of checkpoints kept
    keep: int = Field(2, ge=1)
    # go on from the newest good checkpoint of the run folder
    resume: bool = True
    # save and stop cleanly once this many steps are done
    stop_after: int | None = Field(None, gt=0)
    # what to do about a loss or gradient that is not finite; "skip" gives up after max_skips steps in a row
    nonfinite: Literal["stop", "skip"] = "stop"
    max_skips: int = Field(10, ge=1)
    # seconds a collective waits for a rank
    timeout_s: int = Field(1800, gt=0)


class RunConfig(StrictModel):
    """One run. `method` is the parsed `Config` of the method's module."""

    run: RunSection
    method: SerializeAsAny[StrictModel]
    data: DataConfig
    optim: OptimConfig
    train: TrainConfig
    eval: EvalConfig = EvalConfig()
    report: ReportConfig = ReportConfig()
    kernels: dict[str, str] = {"default": "auto"}
    deepspeed: dict[str, Any] = {}

    @property
    def method_name(self) -> str:
        """Name of the method: the file its Config is written in."""
        return type(self.method).__module__.rpartition(".")[2]

    @property
    def run_dir(self) -> Path:
        """The run folder."""
        return self.run.dir / self.run.name

    def to_yaml(self) -> str:
        """The resolved config, every default filled in; loading it gives an equal config."""
        values = self.model_dump(mode="json")
        values["method"] = {"name": self.method_name, **values["method"]}
        return yaml.safe_dump(values, sort_keys=False)


def find_config(name: str | Path) -> Path:
    """A config file: as given, else in `configs/` here, else in the `configs/` of the repository.

    Raises:
        UserError: there is none, with the nearest known name.
    """
    for path in (Path(name), Path("configs") / name, CONFIGS / name):
        if path.is_file():
            return path
    known = sorted({p.name for folder in (Path("configs"), CONFIGS) for p in folder.glob("*.yaml")})
    near = difflib.get_close_matches(Path(name).name, known, n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"files in configs/: {', '.join(known) or 'none'}"
    raise UserError(f"config: no file '{name}', neither as given nor in configs/; {hint}")


class _Loader(yaml.SafeLoader):
    """Safe loader that takes a key written twice for a mistake."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict:
    seen: set[Any] = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise yaml.constructor.ConstructorError(None, None, "a key must be a plain word", key.start_mark)
        if key.value in seen:
            raise yaml.constructor.ConstructorError(None, None, f"key '{key.value}' is there twice", key.start_mark)
        seen.add(key.value)
    loader.flatten_mapping(node)  # after the look for repetitions: a key may override one that << brings
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def _read_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506  a subclass of SafeLoader
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        fix = "indent with spaces, YAML takes no tabs" if "'\\t'" in str(error.problem) else "correct the YAML"
        raise UserError(f"config: {where}{line}: {error.problem or error.context}; {fix}") from None
    except yaml.YAMLError as error:
        raise UserError(f"config: {where}: {error}; correct the YAML") from None


def _override(values: dict, setting: str) -> None:
    """Write one `--set a.b=value` into nested mappings; the value is read as YAML."""
    key, equals, text = setting.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise UserError(f"command line: --set {setting!r} must look like section.key=value, for example optim.lr=1e-4")
    inner = values
    for i, part in enumerate(parts[:-1]):
        if inner.get(part) is None:
            inner[part] = {}
        inner = inner[part]
        if not isinstance(inner, dict):
            key = ".".join(parts[: i + 1])
            raise UserError(f"command line: --set {setting}: '{key}' is {inner!r}, not a section; set {key} itself")
    inner[parts[-1]] = _read_yaml(text, f"--set {setting}")


def load_config(path: str | Path, overrides: list[str] = ()) -> RunConfig:
    """Read, override and check the config file of one training; see `read_config`.

    Raises:
        UserError: every problem found, one sentence a line: the dotted key, what came, what is expected.
    """
    return parse_config(read_config(path, overrides))


def read_config(path: str | Path, overrides: list[str] = ()) -> dict[str, Any]:
    """The sections of a config file, overridden but not checked.

    `base: FILE` in the file names another config, whose keys it changes: mappings are merged key by key.

    Args:
        path: file name, looked up as `find_config` does.
        overrides: settings "section.key=value", applied in order.
    Raises:
        UserError: no such file, no YAML, or a setting that is none.
    """
    values = _read_file(find_config(path))
    for setting in overrides:
        _override(values, setting)
    return values


def merged(base: Any, own: Any) -> Any:
    """Two nested values: mappings are merged key by key, and `own` wins."""
    if not (isinstance(base, dict) and isinstance(own, dict)):
        return own
    return {**base, **{k: merged(base[k], v) if k in base else v for k, v in own.items()}}


def _read_file(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    try:
        values = _read_yaml(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config: cannot read {path} ({error}); expected a text file in UTF-8: correct it") from None
    if not isinstance(values, dict):
        raise UserError(f"config: {path} must hold sections (run, method, data, optim, train), found {values!r}")
    if "base" not in values:
        return values
    base = find_config(str(values.pop("base")))
    if base.resolve() in (p.resolve() for p in (*above, path)):
        raise UserError(f"config: {path} has the 'base' {base}, which leads back to it; name another file")
    return merged(_read_file(base, (*above, path)), values)


def parse_config(values: dict) -> RunConfig:
    """RunConfig from nested mappings; raises UserError like `load_config`."""
    problems, method = [], None
    section = values.get("method")
    if "method" in values:
        try:
            method = _parse_method(section)
        except UserError as error:
            problems.append(str(error))
            method = StrictModel()
    try:
        cfg = parse(RunConfig, {**values, "method": method} if "method" in values else values, "")
    except UserError as error:
        problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))
    check(cfg)
    return cfg


def _parse_method(section: Any) -> StrictModel:
    if not isinstance(section, dict) or not isinstance(section.get("name"), str):
        raise UserError(f"config: 'method' must be a mapping with a 'name', as {{name: pcre}}, found {section!r}")
    config = load_method(section["name"]).Config
    named = "name" in config.model_fields
    return parse(config, {k: v for k, v in section.items() if named or k != "name"}, "method")


def check(cfg: RunConfig) -> None:
    """What must hold between keys of two sections, world size aside.

    Raises:
        UserError: one sentence that names both keys.
    """
    train, optim = cfg.train, cfg.optim
    if optim.warmup_steps >= train.steps:
        raise UserError(
            f"config: 'optim.warmup_steps' is {optim.warmup_steps}, which must be below 'train.steps' ({train.steps}); "
            "lower the warm-up or train longer"
        )
    if train.global_batch % train.micro_batch:
        raise UserError(
            f"config: 'train.global_batch' ({train.global_batch}) is no multiple of 'train.micro_batch' "
            f"({train.micro_batch}); change the micro batch, the global batch is part of the recipe"
        )
    if cfg.data.augment == "native" and train.micro_batch != 1:
        raise UserError(
            f"config: 'data.augment' is native, which gives images of many sizes, but 'train.micro_batch' is "
            f"{train.micro_batch}; set it to 1 (train.global_batch says how many make a step)"
        )
    if train.engine == "plain":
        for key, used in (("train.zero_stage", train.zero_stage), ("deepspeed", cfg.deepspeed)):
            if used:
                raise UserError(f"config: '{key}' is {used!r} but 'train.engine' is plain; set train.engine: deepspeed")
    if train.compile and train.zero_stage == 3:
        raise UserError(
            "config: 'train.compile' is true and 'train.zero_stage' is 3, which fetches the weights of a layer as it "
            "runs, in code that cannot be compiled; set train.zero_stage to 2 or less, or train.compile: false"
        )
    if train.eval_every and not cfg.data.eval_splits:
        raise UserError(
            f"config: 'train.eval_every' is {train.eval_every} but 'data.eval_splits' is empty; name a split with masks"
        )
    check_deepspeed_section(cfg.deepspeed)
    if check_run := getattr(cfg.method, "check_run", None):
        check_run(cfg)


def check_sizes(cfg: RunConfig, patch: int) -> None:
    """Training crops, and the images of an evaluation at its smallest scale, must hold a patch.

    Args:
        cfg: the run.
        patch: side of the backbone's patch in pixels.
    Raises:
        UserError: they do not; says how large they must be.
    """
    sizes = [("data.crop", cfg.data.crop, 1.0)]
    if cfg.data.eval_splits and cfg.eval.size is not None:
        sizes.append(("eval.size", cfg.eval.size, min(*cfg.eval.cam_scales, *cfg.eval.seg_scales)))
    for key, side, scale in sizes:
        if int(side * scale) < patch:
            at = "" if scale == 1 else f" (at the smallest scale {int(side * scale)})"
            raise UserError(
                f"config: '{key}' is {side} pixels{at}, less than a patch of the backbone, {patch} pixels; "
                f"raise it to {math.ceil(patch / scale)} or more"
            )


def check_world(cfg: RunConfig, world_size: int) -> None:
    """The global batch must split evenly over ranks.

    Raises:
        UserError: it does not; says which numbers of ranks work.
    """
    chunks = cfg.train.global_batch // cfg.train.micro_batch
    if chunks % world_size:
        fits = [n for n in range(1, chunks + 1) if chunks % n == 0]
        raise UserError(
            f"config: 'train.global_batch' ({cfg.train.global_batch}) is no multiple of 'train.micro_batch' "
            f"({cfg.train.micro_batch}) times {world_size} ranks; start {' or '.join(map(str, fits))} ranks, "
            "or change the micro batch"
        )
