"""Pretrained weights into timm models: from the timm hub by name, from a local file, or none at all."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from wsss_dist.errors import UserError


def create_backbone(name: str, weights: str | None, **kwargs) -> nn.Module:
    """A timm model without its classification head.

    Args:
        name: timm model name, with or without a pretrained tag.
        weights: "timm" (the tag's published weights, fetched and cached by timm), a `.safetensors`, `.pth`, `.pt` or
            `.bin` file with a state dict in timm's layout, or None for random initialisation.
        kwargs: passed to `timm.create_model`.
    Raises:
        UserError: unknown name, missing or unreadable file, or a state dict that does not fit.
        TypeError: the architecture does not take one of `kwargs`.
    """
    _check_name(name)
    state = None if weights in (None, "timm") else read_state_dict(Path(weights).expanduser())
    try:
        model = timm.create_model(name, pretrained=weights == "timm", num_classes=0, **kwargs)
    except TypeError:
        raise
    except Exception as error:  # the hub client and the networks raise many kinds
        reason = _first_line(error)
        if weights != "timm":
            options = ", ".join(f"{k} {v}" for k, v in kwargs.items())
            raise UserError(
                f"config: backbone {name!r} cannot be built with {options} ({reason}); change method.backbone"
            ) from None
        raise UserError(
            f"backbone {name!r}: its published weights could not be fetched ({reason}); go online, "
            "give a local file as method.backbone.weights, or null for random weights"
        ) from None
    if state is not None:
        _load_into(model, state, weights, name)
    return model


def _check_name(name: str) -> None:
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "choose one of timm.list_models('vit_*')"
        raise UserError(f"config: 'method.backbone.name' is {name!r}, which is not a timm model; {hint}")
    tagged = timm.list_pretrained(f"{architecture}.*")
    if tag and name not in tagged:
        raise UserError(
            f"config: 'method.backbone.name' is {name!r}, but timm {timm.__version__} knows no tag {tag!r} of it; "
            f"choose one of: {', '.join(tagged) or f'{architecture} without a tag'}"
        )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def weights_note(weights: str | None) -> str | None:
    """The `note` that a weights file carries in its safetensors metadata, such as how it was pretrained."""
    if weights in (None, "timm") or Path(weights).suffix != ".safetensors":
        return None
    with safe_open(Path(weights).expanduser(), "pt") as file:
        return (file.metadata() or {}).get("note")


def read_state_dict(path: Path, key: str = "method.backbone.weights") -> dict[str, Tensor]:
    """The tensors of a weights file, read without running any code in it.

    Args:
        path: a `.safetensors`, `.pth`, `.pt` or `.bin` file.
        key: the config key that names the file, for messages.
    Raises:
        UserError: the file is missing, damaged, or of another kind.
    """
    if not path.is_file():
        raise UserError(
            f"weights file {path} does not exist; correct {key} "
            "(`python launch/prepare_data.py weights` makes those of the quickstart)"
        )
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise UserError(
            f"weights file {path} cannot be read ({_first_line(error)}); it is damaged or of another format: "
            "download it again, or convert it to safetensors"
        ) from None
    except OSError:
        raise
    except Exception:  # an unpickling error means something else than tensors is inside
        raise UserError(
            f"weights file {path} is a pickle of more than tensors, which could run code, and is refused; "
            "save the state dict alone: safetensors.torch.save_file(model.state_dict(), ...)"
        ) from None
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(
            f"weights file {path} holds no state dict of tensors; save it with "
            "safetensors.torch.save_file(model.state_dict(), ...)"
        )
    return state


def _load_into(model: nn.Module, state: dict[str, Tensor], path: str, name: str) -> None:
    state = {k.removeprefix("module."): v for k, v in state.items()}
    wanted = model.state_dict()
    # the classifier, and what an EfficientNet has between its last level and it
    head = ("head.", "fc.", "classifier.", "head_dist.", "conv_head.", "bn2.")
    state = {k: v for k, v in state.items() if k in wanted or not k.startswith(head)}
    if "pos_embed" in state and "pos_embed" in wanted and state["pos_embed"].shape != wanted["pos_embed"].shape:
        state["pos_embed"] = resample_abs_pos_embed(
            state["pos_embed"],
            new_size=list(model.patch_embed.grid_size),
            num_prefix_tokens=0 if model.no_embed_class else model.num_prefix_tokens,
        )
    for key, count in wanted.items():  # files converted from Caffe or written before torch 0.4.1 have no counters
        if key.endswith(".num_batches_tracked"):
            state.setdefault(key, count)
    missing = sorted(set(wanted) - set(state))
    unknown = sorted(set(state) - set(wanted))
    shapes = sorted(k for k in set(state) & set(wanted) if state[k].shape != wanted[k].shape)
    problems = [
        f"{len(keys)} {what} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for what, keys in (("missing", missing), ("unknown", unknown), ("of another shape", shapes))
        if keys
    ]
    if problems:
        raise UserError(
            f"weights file {path} does not fit backbone {name!r}: {'; '.join(problems)}; "
            "correct method.backbone.name or method.backbone.weights"
        )
    model.load_state_dict(state)


_load_parts = True


@contextmanager
def no_parts() -> Iterator[None]:
    """Inside, `load_part` loads nothing: for who wants the structure of a network whose weights do not exist yet."""
    global _load_parts
    _load_parts = False
    try:
        yield
    finally:
        _load_parts = True


def load_part(module: nn.Module, path: Path, prefix: str, key: str) -> None:
    """Load a module from the part of a method's weights whose names start with `prefix`.

    Args:
        module: what gets the weights.
        path: `model.safetensors` of a finished run.
        prefix: "generator." and the like.
        key: the config key that names the file, for messages.
    Raises:
        UserError: the file is missing or damaged, or of another network or other classes.
    """
    if not _load_parts:
        return
    state = {k.removeprefix(prefix): v for k, v in read_state_dict(path, key).items() if k.startswith(prefix)}
    wanted = module.state_dict()
    for name in wanted:
        if name not in state or state[name].shape != wanted[name].shape:
            found = list(state[name].shape) if name in state else "nothing"
            raise UserError(
                f"weights file {path} ('{key}') does not fit: '{prefix}{name}' is {found} there, expected "
                f"{list(wanted[name].shape)}; name a run with the same backbone and classes"
            )
    module.load_state_dict({name: state[name] for name in wanted})
