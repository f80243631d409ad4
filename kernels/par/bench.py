"""Benchmark cases of `par`: half-size images, as the pseudo labels use it; maps of two thresholds side by side."""

import torch

from kernels.par.op import par

FUNCTION = par
TOLERANCE = 1e-5  # ten sweeps of sums over 48 neighbours of values up to 1, in float32 and another order
CASES = {
    "quickstart 8x8x112": lambda: {"image": torch.rand(8, 3, 112, 112), "maps": torch.rand(8, 8, 112, 112)},
    "published 2x8x224": lambda: {"image": torch.rand(2, 3, 224, 224), "maps": torch.rand(2, 8, 224, 224)},
}
