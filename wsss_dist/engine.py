"""One optimiser step over a list of micro batches: DeepSpeedEngine and its slow, plain twin PlainEngine.

The only file that imports deepspeed, and only once an engine is built. Both engines see the same losses in fp32; the
random state is set from (seed, step, micro batch of the global batch), so it depends neither on the number of ranks nor
on a resume.
"""

from __future__ import annotations

import copy
import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from wsss_dist import dist
from wsss_dist.buffers import fill_buffers, shared_buffers
from wsss_dist.data.batch import Batch
from wsss_dist.ds_config import ds_config
from wsss_dist.errors import TrainingError, UserError
from wsss_dist.optim import build_optimizer, set_lr
from wsss_dist.precision import Autocast, inference
from wsss_dist.reshard import deal

if TYPE_CHECKING:
    from wsss_dist.config import RunConfig
    from wsss_dist.methods.base import BaseMethod

WEIGHTS = "model.safetensors"
_STATE = "engine.pt"


def build_engine(method: BaseMethod, cfg: RunConfig) -> Engine:
    """The engine that `train.engine` names. `method` is moved to the device and must not be used beside the engine."""
    return (DeepSpeedEngine if cfg.train.engine == "deepspeed" else PlainEngine)(method, cfg)


class Engine:
    """What the two engines share. `module` is the method; `forward`, `backward`, `update` and the state are theirs."""

    def __init__(self, method: BaseMethod, cfg: RunConfig):
        self.cfg, self.device = cfg, dist.device()
        self.module = method.to(self.device).train()
        self.skips = 0  # steps skipped in a row
        for tensor in [*self.module.parameters(), *self.module.buffers()]:
            dist.broadcast(tensor)
        params = list(self.module.parameters())
        # weights twice (ours and the engine's), and two moments of those that are trained
        self.checkpoint_bytes = sum(p.numel() * 4 * (4 if p.requires_grad else 2) for p in params)
        self.optimizer = build_optimizer(self.module, self.module.param_groups(), cfg.optim)
        self.network = Autocast(self.module, cfg)

    def train_step(self, batches: list[Batch], step: int) -> dict[str, float]:
        """One optimiser step.

        Args:
            batches: the micro batches of this rank; micro batch m is number m * world_size + rank of the global batch.
            step: 0-based step.
        Returns:
            the method's scalars ("loss" among them), averaged over micro batches and ranks, and "lr". A skipped step
            has a loss that is not finite or "skipped" 1.
        Raises:
            TrainingError: a loss or gradient is not finite on some rank and the policy is to stop; no weight changed.
        """
        lr = set_lr(self.optimizer.param_groups, step, self.cfg.optim, self.cfg.train.steps)
        logged, metrics, finite = [], {}, True
        for m, batch in enumerate(batches):
            last = m == len(batches) - 1
            _seed(self.cfg.run.seed, step, m * dist.world_size() + dist.rank())
            out = self.forward(batch.to(self.device), step)
            loss, names = out["loss"], sorted(out)
            logged.append(torch.stack([torch.as_tensor(out[k], device=self.device).detach().double() for k in names]))
            if last:
                bad = ~torch.stack(logged)[:, names.index("loss")].isfinite()
                metrics, finite = _average(names, logged, bad)
                if not finite:
                    self._stop_or_skip(step, "loss", [b.ids for b, is_bad in zip(batches, bad, strict=True) if is_bad])
                    loss = loss * math.nan  # gradients of every rank become NaN, whichever loss it was
            self.backward(loss, last, len(batches))
        if self.update(finite):
            self.skips = 0
            self.module.after_step(step)
        else:
            if finite:
                self._stop_or_skip(step, "gradient", [b.ids for b in batches])
                metrics["skipped"] = 1.0
            self.skips += 1
            if self.skips >= self.cfg.train.max_skips:
                raise TrainingError(
                    f"training: {self.skips} steps in a row, up to step {step}, had a loss or gradient that is not "
                    "finite; lower optim.lr or look at the data of these steps"
                )
        return {**metrics, "lr": lr}

    def _stop_or_skip(self, step: int, what: str, ids: list[list[str]]) -> None:
        if self.cfg.train.nonfinite == "skip":
            return
        names = [i for rank in dist.all_gather_object(ids) for batch in rank for i in batch]
        shown = ", ".join(names[:32]) + (f" and {len(names) - 32} more" if len(names) > 32 else "")
        raise TrainingError(
            f"training: the {what} of step {step} is not finite (samples: {shown}); nothing was updated. "
            "Look at these samples, lower optim.lr, or set train.nonfinite: skip"
        )

    def weights(self, everywhere: bool = False) -> dict[str, Tensor]:
        """Full state of the method on the CPU, floating tensors as float32, buffers shared; a collective call.

        Args:
            everywhere: on every rank; else the other ranks than 0 get an empty dict.
        """
        keep = everywhere or dist.is_main()
        shared, out = shared_buffers(self.module), {}
        for name, tensor in {**self.module.state_dict(keep_vars=True), **shared}.items():
            with self.gathered(tensor):
                if keep:
                    value = tensor.detach().cpu()
                    out[name] = (value.float() if value.is_floating_point() else value).clone().contiguous()
        return out

    def gathered(self, tensor: Tensor) -> Any:
        """A context in which a parameter is whole."""
        return nullcontext()

    @contextmanager
    def evaluation(self) -> Iterator[BaseMethod]:
        """The method with all its weights, the same on every rank, for inference without gradient.

        Training flags and buffers are restored after it. Ranks may call the method a different number of times inside.
        """
        modes = [(m, m.training) for m in self.module.modules()]
        shared = shared_buffers(self.module)
        own = {name: b.detach().clone() for name, b in self.module.named_buffers() if name in shared}
        self.module.eval()
        try:
            fill_buffers(self.module, shared)
            with inference(self.cfg.train):
                yield self.module
        finally:
            fill_buffers(self.module, own)
            for module, mode in modes:
                module.training = mode

    def save(self, folder: Path) -> None:
        """Write weights and engine state; a collective call that raises only after every collective is done."""
        weights = self.weights()
        error: Exception | None = None
        if dist.is_main():
            try:
                save_file(weights, folder / WEIGHTS)
            except Exception as caught:  # safetensors has its own class for a full disk
                error = caught
        self.save_state(folder)
        if error is not None:
            raise error

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Losses of one micro batch."""
        raise NotImplementedError

    def backward(self, loss: Tensor, last: bool, num_micro: int) -> None:
        """Add the gradient of one of `num_micro` micro batches."""
        raise NotImplementedError

    def update(self, finite: bool) -> bool:
        """Step and clear the gradients; False, with the weights untouched, where they are not finite on some rank."""
        raise NotImplementedError

    def save_state(self, folder: Path) -> None:
        """Write what `load` needs beside the weights; collective."""
        raise NotImplementedError

    def load(self, folder: Path, ranks: int) -> None:
        """Restore what `save` wrote on that number of ranks; collective."""
        raise NotImplementedError


class PlainEngine(Engine):
    """Plain PyTorch: accumulate, average the gradients over ranks in one flat tensor, clip, step."""

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        return self.network(batch, step)

    def backward(self, loss: Tensor, last: bool, num_micro: int) -> None:
        (loss / num_micro).backward()

    def update(self, finite: bool) -> bool:
        params = [p for g in self.optimizer.param_groups for p in g["params"]]
        for p in params:
            if p.grad is None:  # as DeepSpeed does: no gradient is a gradient of zero
                p.grad = torch.zeros_like(p)
        if dist.world_size() > 1:
            flat = dist.all_reduce_mean(torch.cat([p.grad.reshape(-1) for p in params]))
            for p, grad in zip(params, flat.split([p.numel() for p in params]), strict=True):
                p.grad.copy_(grad.view_as(p))  # which keeps its layout
        norm = nn.utils.clip_grad_norm_(params, self.cfg.train.grad_clip or math.inf)
        finite = finite and math.isfinite(norm)
        if finite:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return finite

    def save_state(self, folder: Path) -> None:
        if dist.is_main():
            with open(folder / _STATE, "wb") as file:
                torch.save(self.optimizer.state_dict(), file)

    def load(self, folder: Path, ranks: int) -> None:
        self.module.load_state_dict(load_file(folder / WEIGHTS))
        self.optimizer.load_state_dict(torch.load(folder / _STATE, map_location="cpu", weights_only=True))


class DeepSpeedEngine(Engine):
    """The method under DeepSpeed, ZeRO stage 0 to 3, with torch's AdamW, so that nothing is compiled at start."""

    def __init__(self, method: BaseMethod, cfg: RunConfig):
        super().__init__(method, cfg)
        deepspeed = _import_deepspeed()
        self.zero_stage = cfg.train.zero_stage
        buffers = {name: b.detach().clone() for name, b in self.module.named_buffers()}
        # under ZeRO-3 no rank holds the whole method, and evaluation calls it a different number of times on each
        self._whole = copy.deepcopy(self.module).cpu() if self.zero_stage == 3 else None
        if self.zero_stage == 3:
            for module in self.module.modules():
                module.register_forward_hook(_check_output)
        dist.init(cfg.train.timeout_s, single_group=True)
        self._gathered = deepspeed.zero.GatheredParameters
        settings = {"config": ds_config(cfg, dist.world_size()), "dist_init_required": False}
        try:
            self.engine, self.optimizer, _, _ = deepspeed.initialize(
                model=self.network, optimizer=self.optimizer, **settings
            )
        except Exception as error:  # of many kinds, TypeError and AttributeError among them
            if not cfg.deepspeed or isinstance(error, torch.OutOfMemoryError):
                raise
            reason = " ".join(str(error).partition(" [type=")[0].split())
            raise UserError(
                f"config: DeepSpeed does not accept the section 'deepspeed' ({reason}); correct or remove that key"
            ) from error
        self.engine.checkpoint_engine = self._files = _checkpoint_files(self.engine.checkpoint_engine)
        for name, buffer in self.module.named_buffers():  # the bf16 section casts buffers too: statistics, prototypes
            buffer.data = buffers[name].to(self.device)
        dist.set_timeouts(cfg.train.timeout_s)

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        return self.engine(batch, step)

    def backward(self, loss: Tensor, last: bool, num_micro: int) -> None:
        self.engine.backward(loss)  # divides by the number of micro batches, reduces at the last one
        if not last:
            self.engine.step()

    def update(self, finite: bool) -> bool:
        if self.zero_stage == 0 and self.cfg.train.precision == "fp32":
            # the one mode in which DeepSpeed does not look at the gradients itself; they are reduced already
            norm = nn.utils.get_total_norm([p.grad for p in self.module.parameters() if p.grad is not None])
            if not (finite and math.isfinite(norm)):
                self.engine.zero_grad()
                self.engine.micro_steps += 1
                return False
        self.engine.step()
        applied = self.engine.was_step_applied()
        if applied and not finite:
            raise TrainingError("training: DeepSpeed applied a step with a loss that is not finite; resume the run")
        return applied

    def gathered(self, tensor: Tensor) -> Any:
        return self._gathered([tensor]) if hasattr(tensor, "ds_id") else nullcontext()

    @contextmanager
    def evaluation(self) -> Iterator[BaseMethod]:
        if self._whole is None:
            with super().evaluation() as method:
                yield method
            return
        # buffers outside the state dict first, then the state with what the ranks share
        fill_buffers(self._whole, dict(self.module.named_buffers()))
        self._whole.load_state_dict(self.weights(everywhere=True))
        try:
            with inference(self.cfg.train):
                yield self._whole.to(self.device).eval()
        finally:
            self._whole.cpu()

    def save_state(self, folder: Path) -> None:
        self._files.error = None
        self.engine.save_checkpoint(str(folder), tag="ds", save_latest=False)
        if self._files.error is not None:
            raise self._files.error

    def load(self, folder: Path, ranks: int) -> None:
        with _restricted_loading():
            if self.zero_stage > 0 and ranks != dist.world_size():
                self._load_dealt(folder, ranks)
                return
            path, _ = self.engine.load_checkpoint(str(folder), tag="ds")
        assert path is not None, f"DeepSpeed found nothing in {folder}"

    def _load_dealt(self, folder: Path, ranks: int) -> None:
        """Load what another number of ranks saved, which DeepSpeed refuses under ZeRO."""
        optimizer, weights = self.engine.optimizer, load_file(folder / WEIGHTS)
        state, counters = deal(folder / "ds", ranks, optimizer.state_dict(), self.engine._get_zero_param_shapes())
        for name, param in self.module.named_parameters():
            with self._gathered([param], modifier_rank=0) if hasattr(param, "ds_id") else nullcontext():
                param.data.copy_(weights[name])
        if self.zero_stage == 3:
            optimizer.checkpoint_event_prologue()
        optimizer.load_state_dict([state] * dist.world_size(), load_from_fp32_weights=True)
        if self.zero_stage == 3:
            optimizer.checkpoint_event_epilogue()
        for key in ("global_steps", "global_samples", "skipped_steps"):
            setattr(self.engine, key, counters[key])


def _import_deepspeed() -> Any:
    """DeepSpeed, without the compilation of C++ that it starts on a CPU, and without what it says at every step."""
    import deepspeed

    os.environ.setdefault("LOCAL_RANK", "0")  # asked for even in a single process without a launcher
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)

    if not torch.cuda.is_available():
        # a collective for inference only; where the table is gone DeepSpeed compiles it, which works but takes minutes
        getattr(deepspeed.ops, "__compatible_ops__", {})["deepspeed_shm_comm"] = False
    return deepspeed


def _check_output(module: nn.Module, inputs: Any, output: Any) -> None:
    """ZeRO-3 fetches weights for the backward pass by the tensors in a module's output, of these types alone."""
    if not isinstance(output, Tensor | tuple | list | dict | None):
        raise TypeError(
            f"under ZeRO-3 a module must return tensors, tuples (also named ones), lists or dicts; "
            f"{type(module).__name__} returned {type(output).__name__}"
        )


def _checkpoint_files(original: Any) -> Any:
    """DeepSpeed's writer, made to note an error instead of raising it: no rank may leave the others in a barrier."""
    from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine

    class Files(TorchCheckpointEngine):
        error: Exception | None = None

        def save(self, state_dict: dict, path: str) -> None:
            try:
                with open(path, "wb") as file:
                    torch.save(state_dict, file)
            except Exception as caught:
                self.error = self.error or caught

    files = Files()
    files.zipfile_serialization = original.zipfile_serialization
    return files


def _state_classes() -> list[type]:
    """The only classes, beside tensors and plain values, that DeepSpeed's own files may hold."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]


@contextmanager
def _restricted_loading() -> Iterator[None]:
    """Every torch.load inside unpickles tensors, plain values and these classes alone, whatever DeepSpeed asks for."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = {name: os.environ[name]} if name in os.environ else {}
    os.environ[name] = "1"
    try:
        with torch.serialization.safe_globals(_state_classes()):
            yield
    finally:
        del os.environ[name]
        os.environ.update(before)


def _seed(seed: int, step: int, chunk: int) -> None:
    """Random state of one micro batch: SplitMix64 of the three numbers, so that neighbours are unrelated."""
    value = 0
    for number in (seed, step, chunk):
        value = (value + number + 0x9E3779B97F4A7C15) % 2**64
        value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        value = (value ^ value >> 27) * 0x94D049BB133111EB % 2**64
        value ^= value >> 31
    torch.manual_seed(value >> 1)


def _average(names: list[str], logged: list[Tensor], bad: Tensor) -> tuple[dict[str, float], bool]:
    """Mean of the scalars over micro batches and ranks, and whether no loss was bad, in one reduction."""
    mine = torch.stack(logged).mean(0)
    values = dist.all_reduce_mean(torch.cat([mine, bad.sum().to(mine)[None]])).tolist()
    return dict(zip(names, values[:-1], strict=True)), values[-1] == 0
