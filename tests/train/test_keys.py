"""The lists of keys that do not matter: every one exists, and what computes something else is in none."""

from __future__ import annotations

import fnmatch
import types
from collections.abc import Iterator
from typing import Any, Union, get_args, get_origin

import pytest
from pydantic import BaseModel

from tests.train import tiny
from wsss_dist import keys
from wsss_dist.agreement import facts_of_config
from wsss_dist.config import RunConfig, parse_config
from wsss_dist.methods import load_method, method_names
from wsss_dist.stages import load_kind, stage_kinds
from wsss_dist.trainer import _identity, _settings


def fields_of(annotation: Any, key: str) -> Iterator[str]:
    """The dotted keys below a field, itself among them; a name that the config gives is written `name`."""
    yield key
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        for name, field in annotation.model_fields.items():
            yield from fields_of(field.annotation, f"{key}.{name}" if key else name)
    elif get_origin(annotation) is dict:
        yield from fields_of(get_args(annotation)[1], f"{key}.name")
    elif get_origin(annotation) in (Union, types.UnionType):
        for inner in get_args(annotation):
            yield from fields_of(inner, key)


def known_keys() -> set[str]:
    found = set(fields_of(RunConfig, ""))
    for name in method_names():
        found |= set(fields_of(load_method(name).Config, "method"))
    for kind in stage_kinds():
        found |= set(fields_of(load_kind(kind).Config, ""))
    return found


def test_every_key_of_the_lists_exists():
    known = known_keys()
    assert {"data.maps.name.dir", "method.second.weights", "method.cpe.start", "train.steps", "network"} <= known
    for pattern in (*keys.PLACES, *keys.HOW, *keys.OF_EVALUATION):
        assert fnmatch.filter(known, pattern), f"no config has a key {pattern}"


def test_no_other_key_is_taken_for_one_of_them():
    places = {key for key in known_keys() if keys.is_place(key)}
    assert places == {"data.maps.name.dir" if "*" in pattern else pattern for pattern in keys.PLACES}
    computing = ("method.cpe.start", "method.crme.radius.start", "method.puzzle.start", "train.micro_batch", "network")
    for key in computing:
        assert not keys.changes_nothing(key) and not keys.may_differ_between_nodes(key), key
        assert not keys.changes_nothing(f"stages.classifier.{key}"), key
    assert keys.changes_nothing("stages.classifier.data.num_workers")
    # other weights or maps are another computation, wherever they lie
    assert not any(keys.changes_nothing(key) for key in (*keys.MAPS, *keys.WEIGHTS))


PCRE = {"name": "pcre", "backbone": {"name": "vit_tiny_patch16_224", "weights": None}, "cpe": {}}


@pytest.mark.parametrize(
    ("section", "key", "value", "compared"),
    [
        ("method", "cpe", {"start": 0.9}, True),
        ("train", "save_every", 7, True),
        ("data", "root", "elsewhere", False),
        ("data", "num_workers", 3, False),
        ("method", "backbone", {**PCRE["backbone"], "weights": "timm"}, False),
    ],
)
def test_what_the_ranks_have_to_agree_on(section, key, value, compared):
    values = tiny.values(method=PCRE)
    other = {**values, section: {**values[section], key: value}}
    one, two = (facts_of_config(parse_config(v).model_dump(mode="json")) for v in (values, other))
    assert (one != two) == compared


def test_what_a_checkpoint_compares():
    cfg = parse_config(tiny.values(method=PCRE))
    assert {"method.cpe.start", "method.backbone.name", "train.precision"} <= set(_identity(cfg, ["a"]))
    assert not {k for k in _identity(cfg, ["a"]) if keys.is_weights(k) or keys.changes_nothing(k)}
    assert {"data.crop", "optim.lr", "train.steps", "run.seed"} <= set(_settings(cfg))
    assert not {"data.root", "data.num_workers", "data.val_limit", "data.max_damaged"} & set(_settings(cfg))
