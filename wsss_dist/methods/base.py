"""What the trainer and the evaluation ask of a method, and nothing more.

B batch, C foreground classes, K = C + 1 with background (0), H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

from wsss_dist.data.batch import Batch
from wsss_dist.errors import UserError
from wsss_dist.models.vit import ViT


def check_stage(run: object, *, needs: str | None = None, scored: bool = False) -> None:
    """What the run of one stage of a multi-stage method must have.

    Args:
        run: the whole RunConfig.
        needs: name of the map of an earlier stage that it is trained on.
        scored: does it predict classes, so that it can be evaluated on splits?
    Raises:
        UserError: the map is missing from data.maps, or there are splits to evaluate and nothing to score.
    """
    if needs is not None and needs not in run.data.maps:
        raise UserError(
            f"config: method '{run.method_name}' is trained on the map '{needs}' of an earlier stage, which is not in "
            f"'data.maps' ({', '.join(run.data.maps) or 'empty'}); add data.maps.{needs}"
        )
    if not scored and run.data.eval_splits:
        raise UserError(
            f"config: method '{run.method_name}' predicts no classes, but 'data.eval_splits' is "
            f"{run.data.eval_splits}; set data.eval_splits: []"
        )


@dataclass
class Prediction:
    """What a method says of B images, at the size of the images it was given.

    cam     [B, C, H, W] float32 in [0, 1], class activation maps, multiplied with the tags; None for a method without.
    logits  [B, K, H, W] float32 of the segmentation head, fused over scales and mirror images; None for a method
            without one.
    single  [B, K, H, W] float32, the same of the image itself alone: scale 1.0, no mirror image.
    extras  name -> [B, H, W] or [B, C, H, W] maps, where they are asked for ("crme": confidence-region masks in [0, 1],
            "pseudo": label map 0..C and 255 for undecided, which is scored too).
    """

    cam: Tensor | None = None
    logits: Tensor | None = None
    single: Tensor | None = None
    extras: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Views:
    """In which views a prediction sees an image, each with its mirror image, and what it shall hold.

    cam_scales  image scales for the CAM.
    seg_scales  image scales for the segmentation logits, 1.0 among them.
    fuse        "voc", "coco" or "mean", the rule that merges the logits of the scales (`cam.fuse_logits`).
    step        training step the weights stand at; None means trained to the end.
    extras      also fill `Prediction.extras`; else nothing is computed for them.
    """

    cam_scales: Sequence[float] = (1.0,)
    seg_scales: Sequence[float] = (1.0,)
    fuse: str = "voc"
    step: int | None = None
    extras: bool = False


class BaseMethod(nn.Module):
    """Base of every `Method`. Constructed as `Method(config, num_classes, train_steps)`.

    num_classes is C; train_steps is M, the length of the run, which the schedules are fractions of. For ZeRO-3 every
    submodule is called (not its methods), uses its own parameters alone, and returns tensors, tuples, lists or dicts.
    """

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        return self.training_step(batch, step)

    def training_step(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Losses of one micro batch at 0-based step `step`: "loss" (with graph) and any scalars to log."""
        raise NotImplementedError

    def trained_weights(self) -> list[Path]:
        """Weights of earlier runs that it was built from; their classes have to be those of this run."""
        return []

    @property
    def knows_tags(self) -> bool:
        """Does the segmentation of `predict` use the tags of the image?"""
        return False

    def after_step(self, step: int) -> None:
        """Called on every rank once per optimiser step, after it (moving averages and the like)."""

    def after_load(self, whole: BaseMethod | None = None) -> None:
        """Called on every rank after a checkpoint was loaded: what was made from the weights before is made again.

        A token cache is kept under a digest of the weights that make the tokens, so it has to be that of these weights,
        whatever the method was built with.

        Args:
            whole: a copy of the method that has all its weights, where this one does not (ZeRO-3).
        """
        for mine, theirs in zip(self.modules(), (whole or self).modules(), strict=True):
            if isinstance(theirs, ViT):
                theirs.open_cache()
                mine.cache = theirs.cache

    def predict(self, batch: Batch, views: Views) -> Prediction:
        """Predict without gradient for images (any size the backbone takes) with the tags that mask the CAM."""
        raise NotImplementedError

    def param_groups(self) -> list[dict]:
        """Groups for the optimiser: dicts with "name", "params" (list) and "lr_mult"; each parameter once.

        "weight_decay" in a group takes the place of `optim.weight_decay`.
        """
        raise NotImplementedError
