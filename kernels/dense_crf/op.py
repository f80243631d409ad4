"""Fully connected CRF: sharpens class probabilities along the edges of the image."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import checks
from kernels.backend import choose, native_problem, register
from kernels.dense_crf import reference

MODES = ("fast", "ring", "exact")
MAX_PRUNE = 0.1


def _native(
    unary: Tensor,
    image: Tensor,
    spatial: tuple[float, float],
    bilateral: tuple[float, float, float],
    iterations: int,
    mode: str,
    prune: float,
    sizes: list[tuple[int, int]] | None,
) -> Tensor:
    if unary.dtype == torch.float64:
        raise TypeError("dense_crf: the native backend computes in fp32; use backend='reference' for float64")
    flat = [int(n) for size in sizes or () for n in size]
    return torch.ops.wsss.dense_crf(
        unary.float(), image.float(), *map(float, spatial), *map(float, bilateral), iterations, float(prune), flat, mode
    )


if native_problem("gaussian_filter") is None:

    @torch.library.register_fake("wsss::dense_crf")
    def _fake(unary, *_, **__):
        return unary.new_empty(unary.shape)

    @torch.library.register_fake("wsss::gaussian_filter")
    def _fake_filter(image, planes, sigma_xy, sigma_rgb):
        return planes.new_empty(planes.shape)


register("dense_crf", reference=reference.dense_crf, native=_native)


def dense_crf(
    unary: Tensor,
    image: Tensor,
    *,
    spatial: tuple[float, float] = (3.0, 3.0),
    bilateral: tuple[float, float, float] = (80.0, 13.0, 10.0),
    iterations: int = 10,
    mode: str = "fast",
    prune: float = 0.0,
    sizes: list[tuple[int, int]] | None = None,
    backend: str | None = None,
) -> Tensor:
    """Mean-field marginals of the dense CRF with Potts compatibility.

    Q0 = softmax(-U); Q <- softmax(-U + sum_k w_k n_k K_k (n_k Q)) with n_k = (K_k 1 + 1e-20)^-1/2; the pixel's own term
    is included, as in pydensecrf. K(i, j) = exp(-|f_i - f_j|^2 / 2), f = (x, y) / sigma_xy for the spatial kernel and
    (x / sigma_xy, y / sigma_xy, rgb / sigma_rgb) for the bilateral one.

    unary       [B, K, H, W] = -log p; fp32, bf16, fp16, or fp64 (then all is computed in fp64, by the reference).
    image       [B, 3, H, W] RGB in 0..255, uint8 or floating point.
    spatial     (sigma_xy in pixels, weight); bilateral (sigma_xy in pixels, sigma_rgb in grey levels, weight).
                Weight 0 leaves a kernel out.
    iterations  >= 0.
    mode        "fast": permutohedral lattice for both kernels, parity with pydensecrf.
                "ring": the bilateral lattice with smaller cells, two blurs and a ring of ghost vertices
                (kernels/lattice.py), the spatial kernel as true sums along rows and columns, since a lattice would only
                add its error. For sigma_rgb of about 5 and less; costs more time and memory than fast.
                "exact": true Gaussian sums for both, O((HW)^2) time, the oracle; the native code leaves out what lies
                beyond e^-18 by tiles of near pixels, and stays within 2e-5 of fp64 in the tests.
                Total variation distance to exact, fast / ring, on synthetic photographs of 375x500 with 21 classes
                (accuracy.py): bilateral (80, 13, 10) 1.1e-3 / 1.2e-3; (64, 5, 4) 1.4e-3 / 5e-4; (50, 5, 10) 3.4e-3 /
                1.9e-3. Largest error of one application of the bilateral kernel: 0.09 / 0.05, 0.21 / 0.08, 0.30 /
                0.09. Process time of one thread in the same order: fast 0.2, 0.3, 0.5 s, ring 0.5, 2.3, 7.5 s, exact
                some minutes.
    prune       in [0, 0.1], in units of the exponents (nats); 0 is off. Class c of an image gets no messages if
                max_i Q0_i(c) R < prune, R = max_i sum_k w_k n_i (K_k n_k)_i being the largest message there can be; it
                keeps its unary energy in the softmax. Messages are >= 0, so Q_i(c) never exceeds Q0_i(c) e^m with m the
                largest message of c, and m <= prune e^m in every iteration: what is left out of an exponent stays below
                1.12 prune. One iteration so changes log Q by less than 1.12 prune. Over several, pixels that waver
                between two classes may amplify it.
    sizes       (h, w) of each image, in its top left corner, where a batch is padded to a common size; the padding
                changes no bit inside, and Q is 0 there. Default: no padding.
    Returns Q [B, K, H, W] float32 (float64 for float64 unary), without gradient; it sums to 1 over the classes.
    Raises ValueError or TypeError for a wrong shape, dtype, device, range, mode or non-finite input.
    Source: Kraehenbuehl and Koltun, "Efficient inference in fully connected CRFs" (NeurIPS 2011), equation 4.
    """
    checks.shape("dense_crf", "unary", unary, "B", "K", "H", "W")
    b, _, h, w = unary.shape
    checks.shape("dense_crf", "image", image, b, 3, h, w)
    checks.floating("dense_crf", unary=unary)
    if image.dtype != torch.uint8:
        checks.floating("dense_crf", image=image)
    checks.same_device("dense_crf", unary=unary, image=image)
    checks.number("dense_crf", "spatial sigma_xy", spatial[0], low=0.0, open=True)
    checks.number("dense_crf", "spatial weight", spatial[1], low=0.0)
    checks.number("dense_crf", "bilateral sigma_xy", bilateral[0], low=0.0, open=True)
    checks.number("dense_crf", "bilateral sigma_rgb", bilateral[1], low=0.0, open=True)
    checks.number("dense_crf", "bilateral weight", bilateral[2], low=0.0)
    if iterations < 0:
        raise ValueError(f"dense_crf: iterations must be >= 0, got {iterations}")
    if mode not in MODES:
        raise ValueError(f"dense_crf: mode must be one of {', '.join(MODES)}, got {mode!r}")
    checks.number("dense_crf", "prune", prune, low=0.0, high=MAX_PRUNE)
    if sizes is not None:
        sizes = [(int(own_h), int(own_w)) for own_h, own_w in sizes]
        if len(sizes) != b or not all(0 <= own_h <= h and 0 <= own_w <= w for own_h, own_w in sizes):
            raise ValueError(f"dense_crf: sizes must be {b} pairs (h, w) up to ({h}, {w}), got {sizes}")
    unary, image = unary.detach(), image.detach()
    for name, x in (("unary", unary), ("image", image)):
        # the extremes show NaN and infinity, several times cheaper than isfinite of every value
        if x.numel() > 0 and x.is_floating_point() and not torch.stack(x.aminmax()).isfinite().all():
            raise ValueError(f"dense_crf: {name} must be finite, got NaN or infinity")
    # fp64, and on a GPU ring and exact, are for the reference
    no_native = unary.dtype == torch.float64 or (unary.device.type == "cuda" and mode != "fast")
    run = choose("dense_crf", unary.device, backend, pass_over=("native",) if no_native else ())
    return run(unary, image, spatial, bilateral, iterations, mode, prune, sizes)


def dense_crf_unary(
    labels_or_probs: Tensor,
    num_classes: int,
    confidence: float | None = None,
    *,
    ignore_index: int = 255,
    clip: float = 1e-5,
) -> Tensor:
    """Unary energies -log p for `dense_crf`, by either recipe of pydensecrf.

    labels_or_probs  integers [B, H, W]: class 0..K-1 of each pixel, `ignore_index` = unsure (all classes equal); or
                     floating point [B, K, H, W]: probabilities.
    num_classes      K >= 1.
    confidence       labels: probability that a label is right, in (0, 1), default 0.7; the rest is shared by the other
                     classes. probabilities: share kept, in (0, 1]; the rest is spread evenly; default: all kept.
    clip             probabilities below it are raised to it, in (0, 1].
    Returns [B, K, H, W] float32 (float64 for float64 probabilities).
    Raises ValueError or TypeError for a wrong shape or range, or a label outside 0..K-1.
    """
    op, x = "dense_crf_unary", labels_or_probs
    checks.number(op, "num_classes", num_classes, low=1)
    if isinstance(x, Tensor) and x.is_floating_point():
        checks.shape(op, "labels_or_probs", x, "B", num_classes, "H", "W")
        if confidence is not None and not 0 < confidence <= 1:
            raise ValueError(f"{op}: confidence must lie in (0, 1] for probabilities, got {confidence}")
        if not 0 < clip <= 1:
            raise ValueError(f"{op}: clip must lie in (0, 1], got {clip}")
        return reference.unary_from_probs(x, confidence, clip)
    checks.shape(op, "labels_or_probs", x, "B", "H", "W")
    checks.integral(op, labels_or_probs=x)
    confidence = 0.7 if confidence is None else confidence
    checks.number(op, "confidence", confidence, low=0.0, high=1.0, open=True)
    if ((x != ignore_index) & ((x < 0) | (x >= num_classes))).any():
        raise ValueError(f"{op}: labels must lie in 0..{num_classes - 1} or be {ignore_index}, got others")
    return reference.unary_from_labels(x, num_classes, confidence, ignore_index)
