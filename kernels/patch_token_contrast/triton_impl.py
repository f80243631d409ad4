"""The contrast losses in Triton: one kernel over tiles of pairs, one that turns their signs into the gradient.

The pair kernel computes each cosine once (half of the square for patch tokens) and leaves behind sums and counts per
tile, sums per row, and the sign of each cosine in two bits: all that the gradient needs, since the weight of a pair
follows from its labels and the totals. No float atomics, no sync with the host.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gradient import fake_outputs, register_gradient
from kernels.patch_token_contrast.reference import EPS

BLOCK = 64  # tokens of a tile
BLOCK_D = 64  # width of a step through the tokens
BLOCK_OUT = 128  # columns of the gradient per program
BLOCK_TILES = 1024
HALF_PRODUCTS = True  # False: half tokens too are multiplied in fp32; the interpreter cannot multiply bf16


@triton.jit
def _norm_kernel(x, norm, d, BLOCK: tl.constexpr):
    """norm [rows] of x [rows, d], fp32."""
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, d, BLOCK):
        column = start + tl.arange(0, BLOCK)
        value = tl.load(x + row * d + column, mask=column < d, other=0.0).to(tl.float32)
        total += value * value
    tl.store(norm + row, tl.sqrt(tl.sum(total, 0)))


@triton.jit
def _inverse(norm, token, count, EPS: tl.constexpr):
    return 1.0 / tl.maximum(tl.load(norm + token, mask=token < count, other=1.0), EPS)


@triton.jit
def _row_labels(labels, present, image, token, m, ignore, PAIRED: tl.constexpr):
    """Labels of the rows and whether they take part: patches as the columns, or classes, of which c has label c + 1."""
    inside = token < m
    if PAIRED:
        label = tl.load(labels + image * m + token, mask=inside, other=0).to(tl.int64)
        return label, inside & (label != ignore)
    return (token + 1).to(tl.int64), tl.load(present + image * m + token, mask=inside, other=0) != 0


@triton.jit
def _store_codes(codes, place, code, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Four codes of two bits to a byte."""
    shift = 2 * tl.arange(0, 4)[None, None, :]
    packed = tl.sum(tl.reshape(code, (ROWS, COLUMNS // 4, 4)) << shift, 2)
    tl.store(codes + place, packed.to(tl.uint8))


@triton.jit
def _pairs_kernel(
    x, y, x_norm, y_norm, labels, present, ignore, codes, row_sums, tile_sums, tile_counts, m, n, d, tiles_n,
    PAIRED: tl.constexpr, GRADIENT: tl.constexpr, HALF: tl.constexpr, PRECISION: tl.constexpr, EPS: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Tile (ti, tj) of the similarity of x [B, m, d] to y [B, n, d]; PAIRED: x is y, tj >= ti stands for both halves.

    codes [B, tiles * BLOCK, tiles_n * BLOCK / 4], row_sums [2, B, tiles_n, m], tile_* [2, B * tiles].
    """
    tile, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    tiles, images = tl.num_programs(0), tl.num_programs(1)
    ti, tj = tile // tiles_n, tile % tiles_n
    if PAIRED and tj < ti:
        for kind in tl.static_range(2):
            tl.store(tile_sums + kind * images * tiles + image * tiles + tile, 0.0)
            tl.store(tile_counts + kind * images * tiles + image * tiles + tile, 0)
        return
    i, j = ti * BLOCK + tl.arange(0, BLOCK), tj * BLOCK + tl.arange(0, BLOCK)
    product = tl.zeros((BLOCK, BLOCK), tl.float32)
    x_rows, y_rows = x + (image * m + i)[:, None] * d, y + (image * n + j)[None, :] * d
    for start in range(0, d, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        a = tl.load(x_rows + column[None, :], mask=(i < m)[:, None] & (column < d)[None, :], other=0.0)
        b = tl.load(y_rows + column[:, None], mask=(j < n)[None, :] & (column < d)[:, None], other=0.0)
        if not HALF:
            a, b = a.to(tl.float32), b.to(tl.float32)
        product = tl.dot(a, b, product, input_precision=PRECISION)
    scale = _inverse(x_norm + image * m, i, m, EPS)[:, None] * _inverse(y_norm + image * n, j, n, EPS)[None, :]
    cosine = product * scale
    label_i, takes_part = _row_labels(labels, present, image, i, m, ignore, PAIRED)
    label_j = tl.load(labels + image * n + j, mask=j < n, other=0).to(tl.int64)
    pairs = takes_part[:, None] & ((j < n) & (label_j != ignore))[None, :]
    times = 1
    if PAIRED:
        pairs = pairs & (i[:, None] != j[None, :])
        times = tl.where(ti < tj, 2, 1)
    same = label_i[:, None] == label_j[None, :]
    for kind in tl.static_range(2):
        chosen = pairs & (same if kind == 0 else ~same)
        size = tl.where(chosen, tl.abs(cosine), 0.0)
        sums = tl.sum(size, 1)
        place = kind * images * tiles + image * tiles + tile
        tl.store(tile_sums + place, times * tl.sum(sums, 0))
        tl.store(tile_counts + place, times * tl.sum(tl.sum(chosen.to(tl.int32), 1), 0))
        if GRADIENT:
            base = row_sums + (kind * images + image) * tiles_n * m
            tl.store(base + tj * m + i, sums, mask=i < m)
            if PAIRED and ti < tj:
                tl.store(base + ti * m + j, tl.sum(size, 0), mask=j < m)
    if GRADIENT:
        code = tl.where(pairs & (cosine > 0), 1, tl.where(pairs & (cosine < 0), 2, 0))
        quarter, width = tl.arange(0, BLOCK // 4), tiles_n * (BLOCK // 4)
        base = codes + image * (tiles // tiles_n) * BLOCK * width
        place = i[:, None].to(tl.int64) * width + (tj * (BLOCK // 4) + quarter)[None, :]
        _store_codes(base, place, code, BLOCK, BLOCK)
        if PAIRED and ti < tj:
            place = j[:, None].to(tl.int64) * width + (ti * (BLOCK // 4) + quarter)[None, :]
            _store_codes(base, place, tl.trans(code), BLOCK, BLOCK)


@triton.jit
def _total_kernel(tile_sums, tile_counts, loss, weights, count, FACTOR: tl.constexpr, BLOCK: tl.constexpr):
    """The loss, and the weights [2] of a positive and a negative pair in the gradient."""
    mean_pos, mean_neg = 0.0, 0.0
    for kind in tl.static_range(2):
        sums, counts = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.int64)
        for start in range(0, count, BLOCK):
            tile = start + tl.arange(0, BLOCK)
            sums += tl.load(tile_sums + kind * count + tile, mask=tile < count, other=0.0).to(tl.float64)
            counts += tl.load(tile_counts + kind * count + tile, mask=tile < count, other=0).to(tl.int64)
        number = tl.sum(counts, 0).to(tl.float64) + 1.0
        mean = tl.sum(sums, 0) / number
        if kind == 0:
            mean_pos = mean
            tl.store(weights, (-FACTOR / number).to(tl.float32))
        else:
            mean_neg = mean
            tl.store(weights + 1, (FACTOR / number).to(tl.float32))
    tl.store(loss, (0.5 * (1.0 - mean_pos) + 0.5 * mean_neg).to(tl.float32))


@triton.jit
def _gradient_kernel(
    x, y, x_norm, y_norm, labels, present, ignore, codes, row_sums, weights, gradient, m, n, d, tiles_n,
    PAIRED: tl.constexpr, HALF: tl.constexpr, PRECISION: tl.constexpr, EPS: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):  # fmt: skip
    """gradient [B, m, d] with respect to x, one tile of rows and columns."""
    tile, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    images, blocks = tl.num_programs(1), tl.cdiv(d, BLOCK_OUT)
    i = (tile // blocks) * BLOCK + tl.arange(0, BLOCK)
    column = (tile % blocks) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    label_i, _ = _row_labels(labels, present, image, i, m, ignore, PAIRED)
    positive, negative = tl.load(weights), tl.load(weights + 1)
    width = tiles_n * (BLOCK // 4)
    rows = codes + (image * tl.cdiv(m, BLOCK) * BLOCK + i)[:, None] * width
    total = tl.zeros((BLOCK, BLOCK_OUT), tl.float32)
    for start in range(0, n, BLOCK):
        j = start + tl.arange(0, BLOCK)
        code = (tl.load(rows + (j // 4)[None, :]).to(tl.int32) >> (2 * (j % 4))[None, :]) & 3
        label_j = tl.load(labels + image * n + j, mask=j < n, other=0).to(tl.int64)
        weight = tl.where(label_i[:, None] == label_j[None, :], positive, negative)
        weight = tl.where(code == 1, weight, tl.where(code == 2, -weight, 0.0))
        weight = weight * _inverse(y_norm + image * n, j, n, EPS)[None, :]
        mask = (j < n)[:, None] & (column < d)[None, :]
        value = tl.load(y + (image * n + j)[:, None] * d + column[None, :], mask=mask, other=0.0)
        if HALF:  # bf16 for fp16 tokens too: the weights are too small for fp16
            total = tl.dot(weight.to(tl.bfloat16), value.to(tl.bfloat16), total)
        else:
            total = tl.dot(weight, value.to(tl.float32), total, input_precision=PRECISION)
    along = tl.zeros((BLOCK,), tl.float32)  # e . f of a row, from its sums of |cos|
    sums = row_sums + image * tiles_n * m
    for t in range(0, tiles_n):
        along += positive * tl.load(sums + t * m + i, mask=i < m, other=0.0)
        along += negative * tl.load(sums + (images * tiles_n + t) * m + i, mask=i < m, other=0.0)
    norm = tl.load(x_norm + image * m + i, mask=i < m, other=1.0)
    along = tl.where(norm >= EPS, along, 0.0)
    inverse = 1.0 / tl.maximum(norm, EPS)
    mask = (i < m)[:, None] & (column < d)[None, :]
    place = (image * m + i)[:, None] * d + column[None, :]
    own = tl.load(x + place, mask=mask, other=0.0).to(tl.float32) * inverse[:, None]
    tl.store(gradient + place, (total - along[:, None] * own) * inverse[:, None], mask=mask)


def _norms(x: Tensor) -> Tensor:
    norm = x.new_empty(x.shape[:2], dtype=torch.float32)
    if norm.numel():
        _norm_kernel[(norm.numel(),)](x, norm, x.shape[2], BLOCK=256)
    return norm


def contrast(
    x: Tensor, y: Tensor, labels: Tensor, present: Tensor | None, ignore_index: int, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    """The loss and its gradient with respect to x [B, M, D], fp32; `present` None: x is y, the patch tokens."""
    for tokens in (x, y):
        if tokens.dtype == torch.float64:
            raise TypeError("the triton backend computes in fp32; use backend='reference' for float64")
    paired = present is None
    y, labels = y.contiguous(), labels.contiguous()
    x = y if paired else x.contiguous()
    present = labels if paired else present.contiguous()
    (b, m, d), n = x.shape, y.shape[1]
    tiles_m, tiles_n = triton.cdiv(m, BLOCK), triton.cdiv(n, BLOCK)
    tiles = tiles_m * tiles_n
    x_norm = _norms(x)
    y_norm = x_norm if paired else _norms(y)
    fp32 = {"dtype": torch.float32, "device": x.device}
    tile_sums = torch.empty(2, b * tiles, **fp32)
    tile_counts = torch.empty(2, b * tiles, dtype=torch.int32, device=x.device)
    row_sums = torch.empty((2, b, tiles_n, m) if with_gradient else 0, **fp32)
    shape = (b, tiles_m * BLOCK, tiles_n * BLOCK // 4) if with_gradient else 0
    codes = torch.empty(shape, dtype=torch.uint8, device=x.device)
    loss, weights = torch.empty((), **fp32), torch.empty(2, **fp32)
    half = HALF_PRODUCTS and x.dtype == y.dtype != torch.float32
    precision = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"
    shared = {"PAIRED": paired, "HALF": half, "PRECISION": precision, "EPS": EPS, "BLOCK": BLOCK}
    inputs = x, y, x_norm, y_norm, labels, present, ignore_index, codes, row_sums
    if b * tiles:
        _pairs_kernel[(tiles, b)](
            *inputs, tile_sums, tile_counts, m, n, d, tiles_n, GRADIENT=with_gradient, BLOCK_D=BLOCK_D, **shared
        )
    factor = 1.0 if paired else 0.5
    _total_kernel[(1,)](tile_sums, tile_counts, loss, weights, b * tiles, FACTOR=factor, BLOCK=BLOCK_TILES)
    gradient = torch.empty(x.shape if with_gradient else 0, **fp32)
    if gradient.numel() and n:
        programs = (tiles_m * triton.cdiv(d, BLOCK_OUT), b)
        _gradient_kernel[programs](*inputs, weights, gradient, m, n, d, tiles_n, BLOCK_OUT=BLOCK_OUT, **shared)
    else:
        gradient.zero_()
    return loss, gradient


@torch.library.custom_op("wsss_triton::patch_token_contrast", mutates_args=())
def patch_token_contrast(
    tokens: Tensor, labels: Tensor, ignore_index: int, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    return contrast(tokens, tokens, labels, None, ignore_index, with_gradient)


@patch_token_contrast.register_fake
def _fake(tokens, labels, ignore_index, with_gradient):
    return fake_outputs(tokens, with_gradient)


register_gradient("wsss_triton::patch_token_contrast")
