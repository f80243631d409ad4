"""Operators of weakly supervised segmentation: each a plain-torch reference, some with native twins.

The names below are the API. `configure` sets the backends, `available_backends` lists those that can run.
"""

from kernels.backend import available_backends, check_backends, configure
from kernels.c2am_contrast.op import c2am_contrast
from kernels.c2am_pool.op import c2am_pool
from kernels.class_patch_contrast.op import class_patch_contrast
from kernels.dense_crf.op import dense_crf, dense_crf_unary
from kernels.dense_energy.op import dense_energy
from kernels.dilate_regions.op import dilate_regions
from kernels.erase.op import erase_hard, erase_maximum, erase_soft
from kernels.max_upsampled_masks.op import max_upsampled_masks
from kernels.par.op import par
from kernels.patch_token_contrast.op import patch_token_contrast
from kernels.path_affinity_loss.op import path_affinity_counts, path_affinity_loss
from kernels.psl_loss.op import PSLLoss, psl_loss
from kernels.radius_mask.op import radius_mask
from kernels.random_walk.op import random_walk
from kernels.select_regions.op import RegionSelection, select_regions

__all__ = [
    "PSLLoss",
    "RegionSelection",
    "available_backends",
    "c2am_contrast",
    "c2am_pool",
    "check_backends",
    "class_patch_contrast",
    "configure",
    "dense_crf",
    "dense_crf_unary",
    "dense_energy",
    "dilate_regions",
    "erase_hard",
    "erase_maximum",
    "erase_soft",
    "max_upsampled_masks",
    "par",
    "patch_token_contrast",
    "path_affinity_counts",
    "path_affinity_loss",
    "psl_loss",
    "radius_mask",
    "random_walk",
    "select_regions",
]
