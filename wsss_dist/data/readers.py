"""From `data.format` to the class that reads it."""

from __future__ import annotations

from wsss_dist.data.coco import CocoDataset
from wsss_dist.data.config import DataConfig
from wsss_dist.data.dataset import Dataset
from wsss_dist.data.folder import FolderDataset
from wsss_dist.data.problems import LeftOut
from wsss_dist.data.shards import ShardDataset
from wsss_dist.data.voc import VocDataset

_READERS = {"coco": CocoDataset, "voc": VocDataset, "folder": FolderDataset}


def build_dataset(cfg: DataConfig, split: str) -> Dataset:
    """Open one split of the configured data set.

    Args:
        cfg: format, root, cache, classes, leave_out, untagged, and train_limit for the training split.
        split: name of the split, as in cfg.train_split or cfg.eval_splits.
    Raises:
        UserError: a file or a class is missing, repeated or not what the format says.
    """
    left_out = LeftOut(cfg.leave_out)
    if cfg.format == "shards":
        dataset = ShardDataset(cfg.root, split, cfg.classes, cfg.cache)
    else:
        dataset = _READERS[cfg.format](cfg.root, split, cfg.classes, left_out)
    if left_out:
        dataset.leave_out(left_out, masks=split in cfg.eval_splits)
    if cfg.untagged == "drop":
        dataset.drop_untagged()
    if split == cfg.train_split:
        dataset.keep_strided(cfg.train_limit)
    return dataset
