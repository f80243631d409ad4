"""The ViT with class tokens: what reads what, and what a frozen trunk with its token cache returns."""

import pytest
import timm
import torch

from tests.methods.tiny import backbone_config
from wsss_dist.errors import UserError
from wsss_dist.models.vit import ViT


def make(num_class_tokens=3, **changes):
    torch.manual_seed(0)
    return ViT(backbone_config(**changes), num_class_tokens).eval()


def spread_class_tokens(vit):
    with torch.no_grad():
        vit.class_tokens += torch.randn_like(vit.class_tokens)


def test_pcre_check_1_patches_never_see_class_tokens():
    vit, x = make(), torch.randn(2, 3, 64, 64)
    before = vit(x)
    first = before.class_tokens[:, :1]
    # copies of one [CLS] through the same operations: equal bit for bit up to the batch position inside a GEMM
    torch.testing.assert_close(before.class_tokens, first.expand_as(before.class_tokens), rtol=0, atol=1e-6)
    spread_class_tokens(vit)
    after = vit(x)
    torch.testing.assert_close(after.patches, before.patches, rtol=0, atol=1e-6)
    torch.testing.assert_close(after.aux, before.aux, rtol=0, atol=1e-6)
    assert (after.class_tokens - before.class_tokens).abs().max() > 1e-2


def test_pcre_check_2_last_block_has_no_query_and_key():
    vit, x = make(), torch.randn(1, 3, 64, 64)
    before = vit(x)
    with torch.no_grad():
        for part in (vit.blocks[-1].attn.qkv.weight, vit.blocks[-1].attn.qkv.bias):
            part[: 2 * vit.dim] = torch.randn_like(part[: 2 * vit.dim])
    after = vit(x)
    assert torch.equal(before.patches, after.patches) and torch.equal(before.class_tokens, after.class_tokens)
    with torch.no_grad():
        vit.blocks[-1].attn.qkv.weight[2 * vit.dim :] += 0.1
    assert not torch.equal(vit(x).patches, after.patches)


def test_with_attention_everywhere_patches_are_those_of_timm_without_cls():
    vit = make(num_class_tokens=0, last_block="attention")
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        tokens = vit.patch_embed(x).flatten(1, 2) + vit.patch_pos
        for block in vit.blocks:
            tokens = block(tokens)
        expected = vit.norm(tokens)
        # fused attention of timm and ours run the same kernels; only the layout of the inputs differs
        torch.testing.assert_close(vit(x).patches, expected, rtol=1e-4, atol=1e-4)


def test_a_rest_smaller_than_a_patch_is_cut_off_and_other_grids_work():
    vit = make()
    out = vit(torch.randn(1, 3, 90, 70))
    assert out.grid == (5, 4) and out.patches.shape == (1, 20, vit.dim)
    assert out.as_map(out.patches).shape == (1, vit.dim, 5, 4)


@pytest.mark.parametrize("name", ["vit_tiny_r_s16_p8_224", "resnet18", "vit_small_patch16_rope_224", "no_such_model"])
def test_other_architectures_are_refused_by_name(name):
    with pytest.raises(UserError, match=name):
        ViT(backbone_config(name=name), 2)


@pytest.mark.parametrize("name", ["vit_small_patch14_reg4_dinov2", "deit3_small_patch16_224", "deit_tiny_patch16_224"])
def test_registers_layer_scale_and_positionless_cls_are_supported(name):
    size = 4 * timm.create_model(name, img_size=56 if "14" in name else 64).patch_embed.patch_size[0]
    vit = make(name=name)
    out = vit(torch.randn(1, 3, size, size))
    assert out.class_tokens.shape == (1, 3, vit.dim) and out.patches.shape == (1, 16, vit.dim)


def test_frozen_blocks_take_no_gradient_and_class_tokens_start_as_cls():
    vit = make(frozen_blocks=9)
    out = vit(torch.randn(1, 3, 64, 64))
    (out.patches.sum() + out.class_tokens.pow(2).sum() + out.aux.sum()).backward()
    trained = {n for n, p in vit.named_parameters() if p.grad is not None}
    assert trained and all(n.split(".")[1] in {"9", "10", "11"} for n in trained if n.startswith("blocks"))
    assert {"class_tokens", "class_pos"} <= trained and "patch_pos" not in trained
    torch.testing.assert_close(out.class_tokens[:, 0], out.class_tokens[:, 2], rtol=0, atol=1e-6)


def test_frozen_trunk_equals_the_trained_one_at_the_start():
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        whole, frozen = make()(x), make(frozen_blocks=6)(x)
    # one class token instead of three in six blocks: other GEMM shapes, same sums
    torch.testing.assert_close(frozen.patches, whole.patches, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(frozen.class_tokens, whole.class_tokens, rtol=1e-4, atol=1e-4)


def test_token_cache_returns_the_same_bits_made_or_found(tmp_path):
    x = torch.randn(3, 3, 64, 64)
    first, second = (make(frozen_blocks=9, token_cache=tmp_path) for _ in range(2))
    with torch.no_grad():
        made = first(x)
        assert len(list(tmp_path.glob("*/*.npy"))) == 3
        second.blocks[0].mlp.fc1.weight.zero_()  # found on disk, so the frozen blocks do not run
        found = second(x[[1, 0, 2]])
        assert torch.equal(found.patches, made.patches[[1, 0, 2]])
        other = make(frozen_blocks=9)(x)
    assert not torch.equal(other.patches, made.patches)  # stored in half precision
    torch.testing.assert_close(other.patches, made.patches, rtol=0, atol=0.05)


def test_a_torn_cache_file_is_made_again(tmp_path):
    vit, x = make(frozen_blocks=9, token_cache=tmp_path), torch.randn(1, 3, 64, 64)
    made = vit(x).patches
    (file,) = tmp_path.glob("*/*.npy")
    file.write_bytes(file.read_bytes()[:100])
    assert torch.equal(vit(x).patches, made)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frozen_blocks": 12}, "frozen_blocks.*12 blocks"),
        ({"frozen_blocks": 9, "aux_block": 8}, "aux_block.*is 8"),
        ({"aux_block": 12}, "aux_block.*is 12"),
        ({"token_cache": "x"}, "token_cache.*set it above 0"),
        ({"weights": "/no/such/file.safetensors"}, "/no/such/file.safetensors does not exist"),
    ],
)
def test_impossible_backbones_name_the_key(changes, message):
    with pytest.raises(UserError, match=message):
        make(**changes)


def test_weights_of_another_model_are_refused_with_the_first_keys(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "w.safetensors"
    save_file({"blocks.0.nothing": torch.zeros(1)}, path, metadata={"note": "made up"})
    with pytest.raises(UserError, match=r"does not fit backbone 'vit_tiny_patch16_224': .* missing .*1 unknown"):
        make(weights=str(path))


def test_pickled_code_in_a_weights_file_is_refused_and_never_run(tmp_path):
    import pickle

    canary = tmp_path / "canary"

    class Payload:
        def __reduce__(self):
            return (open, (str(canary), "w"))

    path = tmp_path / "w.pth"
    path.write_bytes(pickle.dumps({"a": Payload()}))
    with pytest.raises(UserError, match="w.pth"):
        make(weights=str(path))
    assert not canary.exists()


def test_positions_of_another_grid_are_resized_on_load(tmp_path):
    from safetensors.torch import save_file

    source = timm.create_model("vit_tiny_patch16_224", img_size=96, num_classes=0)
    path = tmp_path / "w.safetensors"
    save_file({k: v.contiguous() for k, v in source.state_dict().items()}, path)
    vit = make(weights=str(path))
    assert vit.patch_pos.shape == (1, 196, vit.dim)
    assert torch.equal(vit.blocks[3].attn.qkv.weight, source.blocks[3].attn.qkv.weight)
