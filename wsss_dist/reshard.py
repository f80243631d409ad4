"""The optimiser state that N ranks saved under ZeRO 1 to 3, dealt to another number of ranks.

DeepSpeed loads the state of as many ranks only. Its converter to a "universal checkpoint" knows Adam alone (SGD ends in
KeyError: 'exp_avg') and writes some four files per parameter, which a killed run would leave half done. Here each rank
reads its own part out of the files of the N ranks, which are mapped into memory, and nothing is written.

Under ZeRO a parameter group (ZeRO 3: a sub-group) is flattened, and each rank holds a part of it: the weights in
float32 and, of the same length, the tensors of the optimiser's state. `Layout` says which elements lie where.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wsss_dist import dist
from wsss_dist.errors import UserError

# the names in DeepSpeed's files: ZeRO 1 and 2, ZeRO 3
_FLAT = ("single_partition_of_fp32_groups", "fp32_flat_groups")
_OPTIMIZER = ("base_optimizer_state", "optimizer_state_dict")


class Piece(NamedTuple):
    """Elements `first` .. `first + count` - 1 of a flattened parameter, from `start` on in the part of a rank."""

    rank: int
    group: int
    start: int
    first: int
    count: int


# parameter -> its pieces in the order of its elements
Layout = dict[str, list[Piece]]


def layout_of_slices(mappings: list[list[dict[str, Any]]]) -> Layout:
    """Layout under ZeRO 1 and 2.

    Args:
        mappings: "param_slice_mappings" of each rank: for each group, parameter -> its address (numel, start).
    """
    layout: Layout = {}
    for rank, groups in enumerate(mappings):
        for group, slices in enumerate(groups):
            for name, address in slices.items():
                pieces = layout.setdefault(name, [])
                first = pieces[-1].first + pieces[-1].count if pieces else 0
                pieces.append(Piece(rank, group, address.start, first, address.numel))
    return layout


def layout_of_shapes(groups: list[dict[str, Iterable[int]]], world_size: int) -> Layout:
    """Layout under ZeRO 3: of each parameter every rank holds as many elements, the last ones padded.

    Args:
        groups: "param_shapes": for each sub-group, parameter -> shape, in their order.
        world_size: number of ranks.
    """
    layout: Layout = {}
    for group, shapes in enumerate(groups):
        start = 0
        for name, shape in shapes.items():
            numel = math.prod(shape)
            part = math.ceil(numel / world_size)
            bounds = [min(rank * part, numel) for rank in range(world_size + 1)]
            layout[name] = [Piece(r, group, start, bounds[r], bounds[r + 1] - bounds[r]) for r in range(world_size)]
            start += part
    return layout


def deal(folder: Path, ranks: int, mine: dict[str, Any], shapes: list[dict]) -> tuple[dict[str, Any], dict[str, Any]]:
    """This rank's part of the state that another number of ranks saved; a collective call.

    Args:
        folder: where DeepSpeed wrote its files.
        ranks: the number of ranks that wrote them.
        mine: state of the optimiser on this rank, of which the lengths are taken.
        shapes: for each group (ZeRO 3: sub-group) of the optimiser, parameter -> shape, in their order.
    Returns:
        what `load_state_dict` of the optimiser under ZeRO takes, and the counters of the engine.
    Raises:
        UserError: a file is missing, the parameters are others, or they are split in a way that is not known here.
    """
    if _FLAT[1] in mine:
        target = layout_of_shapes(shapes, dist.world_size())
        check_lengths(target, dist.rank(), mine[_FLAT[1]], ranks)
    else:
        target = layout_of_slices(dist.all_gather_object(mine["param_slice_mappings"]))
    saved, source, counters = read_parts(folder, ranks)
    return dealt(saved, source, mine, target, dist.rank()), counters


def dealt(saved: list[dict[str, Any]], source: Layout, mine: dict[str, Any], target: Layout, rank: int) -> dict:
    """The ZeRO state of one rank, made of that of other ranks.

    Args:
        saved: state of the optimiser ("optimizer_state_dict" of a file) of each rank that saved one.
        source: where the parameters lie in it.
        mine: state of the optimiser on this rank, of which the lengths are taken.
        target: where the parameters lie on the ranks of this run.
        rank: this rank.
    Returns:
        what `load_state_dict` of the optimiser under ZeRO takes.
    Raises:
        UserError: other parameters, or parts of another length than the layouts say.
    """
    stage3 = _FLAT[1] in mine
    flat, optimizer = _FLAT[stage3], _OPTIMIZER[stage3]
    if _counts(source) != _counts(target):
        wrong = sorted(n for n in {*source, *target} if _counts(source).get(n) != _counts(target).get(n))
        raise UserError(
            f"checkpoint: its optimiser state is of other parameters than those of this model ('{wrong[0]}' differs); "
            "go back to the code and the config that wrote it, or give the run another run.name"
        )
    # what is kept without the padding at its end is made as long as the state beside it
    padding = mine.get("group_paddings") or [0] * len(mine[flat])
    lengths = [len(part) + pad for part, pad in zip(mine[flat], padding, strict=True)]
    states = [s[optimizer]["state"] for s in saved]
    weights = [_fill(n, g, lambda r, o: saved[r][flat][o], source, target, rank) for g, n in enumerate(lengths)]
    new: dict[int, dict[str, Any]] = {}
    for group, length in enumerate(lengths):
        old = next(source[name][0].group for name, pieces in target.items() if pieces[0].group == group)
        if old not in states[0]:  # no step was made, or SGD without momentum
            continue
        new[group] = {}
        for key, value in states[0][old].items():
            if isinstance(value, Tensor) and value.dim():
                new[group][key] = _fill(length, group, lambda r, o, k=key: states[r][o][k], source, target, rank)
            else:  # the number of steps
                new[group][key] = value.clone() if isinstance(value, Tensor) else value
    groups = [
        {**theirs, "params": ours["params"]}
        for theirs, ours in zip(saved[0][optimizer]["param_groups"], mine[optimizer]["param_groups"], strict=True)
    ]
    return {**mine, flat: weights, optimizer: {"state": new, "param_groups": groups}}


def _counts(layout: Layout) -> dict[str, int]:
    return {name: sum(p.count for p in pieces) for name, pieces in layout.items()}


def _fill(
    length: int, group: int, part: Callable[[int, int], Tensor], source: Layout, target: Layout, rank: int
) -> Tensor:
    """Part `rank` of a group, [length] float32: copied from `part(rank, group)` of those who saved it, else zero."""
    out = torch.zeros(length)
    for name, pieces in target.items():
        for to in pieces:
            if (to.rank, to.group) != (rank, group):
                continue
            for of in source[name]:
                first, end = max(to.first, of.first), min(to.first + to.count, of.first + of.count)
                if first < end:
                    values = part(of.rank, of.group)[of.start + first - of.first :][: end - first]
                    out[to.start + first - to.first :][: end - first].copy_(values)
    return out


def read_parts(folder: Path, world_size: int) -> tuple[list[dict[str, Any]], Layout, dict[str, Any]]:
    """What `world_size` ranks saved into a folder: state of each, layout, and the counters of the engine.

    The tensors are mapped, not read. Only the classes that the caller allows are unpickled.

    Raises:
        UserError: the files are not those of so many ranks, each with a part of every parameter.
    """

    def read(pattern: str) -> dict[str, Any]:
        found = sorted(folder.glob(pattern))
        if len(found) != 1:
            raise UserError(
                f"checkpoint: {folder} holds {len(found)} files {pattern}, expected one; put a whole copy there"
            )
        return torch.load(found[0], map_location="cpu", mmap=True, weights_only=True)

    parts = [read(f"*zero_pp_rank_{r}_mp_rank_00_optim_states.pt")["optimizer_state_dict"] for r in range(world_size)]
    if _FLAT[0] in parts[0]:
        return parts, layout_of_slices([p["param_slice_mappings"] for p in parts]), read("mp_rank_00_model_states.pt")
    counters = read("*zero_pp_rank_0_mp_rank_00_model_states.pt")
    layout = layout_of_shapes(counters["param_shapes"], world_size)
    check_lengths(layout, 0, parts[0][_FLAT[1]], world_size)
    return parts, layout, counters


def check_lengths(layout: Layout, rank: int, parts: list[Tensor], ranks: int) -> None:
    """Hold that the parts of a rank are as long as a layout of ZeRO 3 says; `ranks` wrote the checkpoint.

    Raises:
        UserError: they are not, as with settings of DeepSpeed that split the parameters in another way.
    """
    ends = [0] * len(parts)
    for pieces in layout.values():
        longest = max(p.count for p in pieces)  # that of the first rank; the last ones are padded
        piece = pieces[rank]
        ends[piece.group] = max(ends[piece.group], piece.start + longest)
    for part, end in zip(parts, ends, strict=True):
        if part is None or part.numel() != end:
            raise UserError(
                "checkpoint: its optimiser state is split in a way that cannot be dealt to another number of ranks "
                f"(section 'deepspeed': zero_optimization); start {ranks} ranks, as many as wrote it"
            )
