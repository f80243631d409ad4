"""The keys of a config that do not say what a run computes, each by its full dotted name; `*` stands for a free name.

A key that is in none of these lists counts. `stages.<name>.` before a key, as in a config with stages, is passed over.
"""

from __future__ import annotations

import fnmatch
import re

# Where a thing lies that is the same thing wherever it lies, or holds nothing but copies. A node may have its own, and
# another start may find it elsewhere. Images, tags and classes at data.root, without those of data.leave_out, are
# compared by their digest.
COPIES = ("data.root", "data.leave_out", "data.cache.dir", "method.backbone.token_cache", "run.dir")
# Where something is read from that nothing else compares. A node may have its own copy; at another start it may be
# another thing. A training that goes on has its weights from its checkpoint.
MAPS = ("data.maps.*.dir",)
WEIGHTS = ("method.backbone.weights", "method.second.weights", "method.second.backbone.weights", "method.start")
PLACES = (*COPIES, *MAPS, *WEIGHTS)
# What reading costs a node: one with fewer cores or a smaller disk may have other values than the others.
OF_A_NODE = ("data.num_workers", "data.cache", "data.cache.gb")
# Memory, time, logging, saving, and when a run gives up: the weights and scores of a run that ends are the same
# whatever is set. The ranks still have to agree on them. Not in it is what rounds otherwise (train.compile,
# train.channels_last, train.micro_batch, eval.batch, kernels, deepspeed).
HOW = (
    *OF_A_NODE,
    *("method.backbone.recompute", "method.second.backbone.recompute"),
    *("data.maps.*.made_by", "data.max_damaged"),
    *("train.log_every", "train.eval_every", "train.save_every", "train.keep"),
    *("train.resume", "train.stop_after", "train.timeout_s", "train.max_skips"),
    *("eval.limit", "report.num_images"),
)
# Of the data section, what an evaluation alone depends on.
OF_EVALUATION = ("data.eval_splits", "data.val_limit")


def is_place(key: str) -> bool:
    """Does it say where something lies, so that nodes may differ in it?"""
    return _is_one_of(key, PLACES)


def is_weights(key: str) -> bool:
    """Does it name weights that a training starts from, and that a checkpoint replaces?"""
    return _is_one_of(key, WEIGHTS)


def may_differ_between_nodes(key: str) -> bool:
    """May one rank have another value than the others?"""
    return _is_one_of(key, (*PLACES, *OF_A_NODE))


def changes_nothing(key: str) -> bool:
    """Does a run with another value compute the same, as long as the digest of its data is the same?"""
    return _is_one_of(key, (*COPIES, *HOW))


def changes_no_step(key: str) -> bool:
    """The same, of the training steps alone."""
    return changes_nothing(key) or _is_one_of(key, OF_EVALUATION)


def _is_one_of(key: str, patterns: tuple[str, ...]) -> bool:
    key = re.sub(r"^stages\.[^.]+\.", "", key)
    return any(fnmatch.fnmatchcase(key, pattern) for pattern in patterns)
