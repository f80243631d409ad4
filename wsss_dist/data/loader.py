"""The order of the samples, worker processes, and the replacement of damaged files.

G global batch, A micro batches per rank and step, n images. The sample at position p of step s is a function of
(seed, s, p) alone: not of the number of ranks or workers, nor of where a run was resumed.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Iterable, Iterator
from multiprocessing.util import Finalize

import numpy as np
import torch
from torch.utils.data import DataLoader

from wsss_dist.data.batch import Batch, EvalSample
from wsss_dist.data.config import DataConfig
from wsss_dist.data.dataset import Dataset
from wsss_dist.data.decode import DamagedImage
from wsss_dist.data.erased import fill_erased, read_manifest
from wsss_dist.data.maps import check_maps, read_maps
from wsss_dist.data.order import epoch_order
from wsss_dist.data.transforms import augment, clear_padding, normalise, sample_generator
from wsss_dist.errors import BadFile, UserError

# So many unreadable files in a row are no accident: a wrong folder, or a disk that is gone.
MAX_IN_A_ROW = 50
# Training batches that each worker prepares ahead.
PREFETCH = 4


class TrainLoader:
    """Iterates over the steps start_step .. start_step + num_steps - 1; see `build_train_loader`."""

    def __init__(self, dataset: Dataset, cfg: DataConfig, seed: int, sampler: _ChunkSampler) -> None:
        self._sampler = sampler
        self._loader = DataLoader(
            _TrainSamples(dataset, cfg, seed),
            batch_sampler=sampler,
            collate_fn=_unwrap,
            **_workers(cfg.num_workers, PREFETCH),
        )

    def __len__(self) -> int:
        return self._sampler.num_steps

    def __iter__(self) -> Iterator[list[Batch]]:
        micro: list[Batch] = []
        for item in self._loader:
            micro.append(_raise_mistakes(item))
            if len(micro) == self._sampler.chunks_per_step:
                yield micro
                micro = []


def build_train_loader(
    dataset: Dataset,
    cfg: DataConfig,
    *,
    seed: int,
    global_batch: int,
    micro_batch: int,
    rank: int,
    world_size: int,
    start_step: int,
    num_steps: int,
) -> TrainLoader:
    """Batches of this rank for `num_steps` steps from `start_step` on; one item a step.

    An item is the list of the A = global_batch / (micro_batch * world_size) micro batches of the step. A global batch
    is cut into chunks of micro_batch consecutive samples; chunk m * world_size + rank is micro batch m of that rank.
    Each epoch is a permutation of the images keyed by (seed, epoch), cut into n // global_batch steps; the rest is
    dropped. Starting at a later step costs nothing: no skipped sample is decoded.

    Args:
        dataset: the training split; its masks are never opened.
        cfg: augmentation, maps and num_workers. That every image has its maps is looked up here, and a few are read.
        seed: >= 0, key of the order and of the augmentation.
        num_steps: how many steps to yield.
    Raises:
        UserError: fewer images than a global batch, batch sizes that do not divide, or a map missing or wrong.
    """
    if min(global_batch, micro_batch, world_size) < 1 or global_batch % (micro_batch * world_size):
        raise UserError(
            f"train.global_batch is {global_batch}; expected a multiple of train.micro_batch x number of ranks = "
            f"{micro_batch} x {world_size}: change one of the three"
        )
    if len(dataset) < global_batch:
        raise UserError(
            f"data: '{dataset.name}' has {len(dataset)} images, fewer than train.global_batch = {global_batch}; "
            "lower train.global_batch, or add images"
        )
    assert 0 <= rank < world_size and start_step >= 0 and num_steps >= 0 and seed >= 0
    check_maps(dataset, cfg.maps)
    sampler = _ChunkSampler(len(dataset), seed, global_batch, micro_batch, rank, world_size, start_step, num_steps)
    return TrainLoader(dataset, cfg, seed, sampler)


class _ChunkSampler:
    """Yields, chunk by chunk, the (step, position, index) of the samples of one rank."""

    def __init__(self, n, seed, global_batch, micro_batch, rank, world_size, start_step, num_steps) -> None:
        self.n, self.seed = n, seed
        self.global_batch, self.micro_batch = global_batch, micro_batch
        self.rank, self.world_size = rank, world_size
        self.start_step, self.num_steps = start_step, num_steps
        self.chunks_per_step = global_batch // (micro_batch * world_size)

    def __len__(self) -> int:
        return self.num_steps * self.chunks_per_step

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        steps_per_epoch = self.n // self.global_batch
        epoch, order = -1, None
        for step in range(self.start_step, self.start_step + self.num_steps):
            if step // steps_per_epoch != epoch:
                epoch = step // steps_per_epoch
                order = epoch_order(self.n, self.seed, epoch)
            first = step % steps_per_epoch * self.global_batch
            for m in range(self.chunks_per_step):
                begin = (m * self.world_size + self.rank) * self.micro_batch
                end = begin + self.micro_batch
                images = order[first + begin : first + end].tolist()
                yield [(step, p, i) for p, i in zip(range(begin, end), images, strict=True)]


class _TrainSamples(torch.utils.data.Dataset):
    """Makes a whole micro batch in one call, in the worker: decode, augment, normalise, stack."""

    def __init__(self, dataset: Dataset, cfg: DataConfig, seed: int) -> None:
        self.dataset, self.cfg, self.seed = dataset, cfg, seed
        erased = {name: m for name, m in cfg.maps.items() if m.kind == "erased"}
        self.means = {name: read_manifest(m.dir).mean for name, m in erased.items()}

    def __getitems__(self, keys: list[tuple[int, int, int]]) -> list[Batch | UserError]:
        try:
            return [self._batch(keys)]
        except UserError as error:
            # handed over as a value: raised here, it would reach the user wrapped in a worker's traceback
            return [error]

    def _batch(self, keys: list[tuple[int, int, int]]) -> Batch:
        samples, labels, ids, draws, damaged = [], [], [], [], []
        for step, position, index in keys:
            index, picture = _read_or_next(self.dataset, index, damaged)
            maps = read_maps(self.dataset, index, self.cfg.maps, picture.shape[:2])
            rng = sample_generator(self.seed, step, position)
            samples.append(augment(picture, self.cfg, rng, maps))
            draws.append(rng.random())
            labels.append(torch.from_numpy(self.dataset.labels(index)))
            ids.append(self.dataset.id(index))
        images = normalise(torch.stack([sample.image for sample in samples]))
        boxes = [sample.box for sample in samples]
        if self.cfg.padding == "mean":
            clear_padding(images, boxes)
        stacked = {name: torch.stack([sample.maps[name] for sample in samples]) for name in self.cfg.maps}
        for name, mean in self.means.items():
            fill_erased(images, stacked[name], mean)
        return Batch(
            images=images,
            labels=torch.stack(labels),
            boxes=torch.tensor(boxes, dtype=torch.int64),
            ids=ids,
            flipped=torch.tensor([sample.flipped for sample in samples]),
            damaged=damaged,
            draws=torch.tensor(draws, dtype=torch.float64),
            maps=stacked,
        )


def _read_or_next(dataset: Dataset, index: int, damaged: list[tuple[str, str]]) -> tuple[int, np.ndarray]:
    """The image at `index`, or the next readable one; what was skipped is appended to `damaged`."""
    last = None
    for k in range(min(len(dataset), MAX_IN_A_ROW)):
        try:
            return (index + k) % len(dataset), dataset.image((index + k) % len(dataset))
        except DamagedImage as error:
            last = error
            damaged.append((error.path, error.reason))
    count = min(len(dataset), MAX_IN_A_ROW)
    message = (
        f"data: {count} images of '{dataset.name}' in a row cannot be read (last: {last}); check data.root and the "
        "disk, or prepare the data again"
    )
    raise BadFile(last.path, last.reason, message, damaged[-count:])


def build_eval_loader(dataset: Dataset, cfg: DataConfig, rows: Iterable[int], ahead: int = 4) -> DataLoader:
    """Images of an evaluation split with tags and masks, one `EvalSample` an item; mask None in a split without.

    Args:
        dataset: the split.
        cfg: num_workers.
        rows, ahead: as of `build_inference_loader`.
    Raises:
        UserError: iterating: an image or mask that cannot be read; leaving it out would change the score.
    """
    if dataset.has_masks:
        dataset.open_masks()
    return _EvalLoader(_EvalSamples(dataset, masks=True), rows, cfg.num_workers, ahead)


def build_inference_loader(dataset: Dataset, cfg: DataConfig, rows: Iterable[int], ahead: int = 4) -> DataLoader:
    """Images of a split with id and tags and without masks, for a stage that makes something of each.

    One `EvalSample` an item, its mask None: the masks of the split are never opened.

    Args:
        dataset: the split.
        cfg: num_workers.
        rows: positions of the images in the order wanted, asked for one by one.
        ahead: so many images are asked for and read ahead of their use, at least one a worker. More than that would
            hold images back from ranks that are free, where the ranks share them.
    Raises:
        UserError: iterating: an image that cannot be read.
    """
    return _EvalLoader(_EvalSamples(dataset, masks=False), rows, cfg.num_workers, ahead)


def check_eval_samples(dataset: Dataset, cfg: DataConfig, count: int = 8) -> None:
    """Read up to `count` evenly strided images of an evaluation split with masks, to find a mistake early.

    Raises:
        UserError: what iterating over `build_eval_loader` would raise.
    """
    chosen = chosen_rows(dataset, cfg.val_limit)
    for k in range(min(count, len(chosen))):
        _eval_sample(dataset, int(chosen[k * len(chosen) // min(count, len(chosen))]), masks=True)


def chosen_rows(dataset: Dataset, limit: int | None) -> np.ndarray:
    """Positions of `limit` evenly strided images of a split, or of all, int64."""
    if limit is None or limit >= len(dataset):
        return np.arange(len(dataset))
    return np.arange(limit) * len(dataset) // limit


class _EvalLoader(DataLoader):
    def __init__(self, samples: _EvalSamples, rows: Iterable[int], num_workers: int, ahead: int) -> None:
        prefetch = -(-ahead // max(1, num_workers))
        super().__init__(samples, batch_size=None, sampler=rows, **_workers(num_workers, prefetch))

    def __iter__(self) -> Iterator[EvalSample]:
        for item in super().__iter__():
            yield _raise_mistakes(item)


class _EvalSamples(torch.utils.data.Dataset):
    def __init__(self, dataset: Dataset, masks: bool) -> None:
        self.dataset, self.masks = dataset, masks

    def __getitem__(self, row: int) -> EvalSample | UserError:
        try:
            return _eval_sample(self.dataset, int(row), self.masks)
        except UserError as error:
            return error


def _eval_sample(dataset: Dataset, index: int, masks: bool) -> EvalSample:
    try:
        image = dataset.image(index)
    except DamagedImage as error:
        kind, harm = ("evaluation split", "change the score") if masks else ("split", "leave the next stage without it")
        message = (
            f"data: image {error.path} of the {kind} '{dataset.name}' cannot be read ({error.reason}); replace the "
            "file, or leave it out (data.leave_out names a problems.csv, `python launch/prepare_data.py check` makes "
            f"one of the whole split): leaving it out silently would {harm}"
        )
        raise BadFile(error.path, error.reason, message) from None
    mask = None
    if masks and dataset.has_masks:
        mask = dataset.mask(index)
        if mask.shape != image.shape[:2]:
            height, width, _ = image.shape
            what = f"is {mask.shape[0]} x {mask.shape[1]} (height x width), the image is {height} x {width}"
            message = f"data: the mask of {dataset.path(index)} {what}; expected the same size: make the mask again"
            raise BadFile(dataset.mask_file(index) or dataset.path(index), f"the mask {what}", message)
    return EvalSample(
        index=index,
        id=dataset.id(index),
        image=torch.from_numpy(image).permute(2, 0, 1).contiguous(),
        labels=torch.from_numpy(dataset.labels(index)),
        mask=None if mask is None else torch.from_numpy(mask),
    )


def _workers(num_workers: int, prefetch: int) -> dict:
    # its own generator: torch's global one, which the models draw from, is the same with and without a loader
    settings: dict = {
        "num_workers": num_workers,
        "pin_memory": torch.cuda.is_available(),
        "generator": torch.Generator(),
    }
    if num_workers:
        settings |= {"prefetch_factor": prefetch, "worker_init_fn": _ignore_signals}
        Finalize(None, _kill_workers, exitpriority=0)
    return settings


def _ignore_signals(_: int) -> None:
    """A signal to the whole process group is for the process that uses the images, which ends its workers itself."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def _kill_workers() -> None:
    """At the end of this process: multiprocessing would send them SIGTERM and wait until they are gone."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler takes the end of a worker for an error
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def _unwrap(items: list) -> Batch | UserError:
    return items[0]


def _raise_mistakes(item):
    if isinstance(item, UserError):
        raise item
    return item
