"""Which backbones the classifier's feature map takes."""

import pytest
import torch

from wsss_dist.models.features import FeatureConfig, FeatureExtractor


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_patch16_224", "deit3_small_patch16_224"])
def test_plain_vits_of_every_family_are_taken(name):
    body = FeatureExtractor(FeatureConfig(name=name, weights=None, depth=2, aux_block=1))
    assert body.is_vit and body.patch_size == 16
    with torch.no_grad():
        assert body(torch.zeros(1, 3, 32, 48)).shape == (1, body.dim, 2, 3)
