"""Layout of the convolutions and compiled blocks: each against the plain run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.methods import pcre_runs
from tests.methods.stage_runs import BACKBONE, batch_of, values
from tests.methods.tiny import NUM_CLASSES, random_batch, tiny_method
from tests.train import tiny, work
from tests.train.ranks import run_ranks
from wsss_dist import speed
from wsss_dist.config import parse_config
from wsss_dist.engine import build_engine
from wsss_dist.errors import UserError
from wsss_dist.methods import load_method
from wsss_dist.optim import OptimConfig, build_optimizer

PLAIN = {"name": "resnet18", "weights": None}
SPLIT = {"deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}}}


# ---- channels_last -------------------------------------------------------------------------------------------------


def section(name: str, folder: Path) -> dict:
    if name == "pnoc":
        method, path = load_method("pnoc"), folder / "model.safetensors"
        save_file(method.Method(method.Config(variant="plain", backbone=BACKBONE), NUM_CLASSES, 20).state_dict(), path)
        second = {"backbone": BACKBONE, "weights": str(path)}
        return {"name": "pnoc", "backbone": BACKBONE, "second": second, "threshold": 1.0}
    extra = {
        "affinity": {"backbone": {**BACKBONE, "frozen_stages": 5}, "radius": 5},
        "aepsl": {"backbone": BACKBONE, "variant": "segmentation"},
        "classifier": {"backbone": PLAIN},
        "deeplab": {"backbone": {"name": "resnest14d", "weights": None}, "width": 16, "dropout": False},
    }
    return {"name": name, "backbone": BACKBONE, **extra.get(name, {})}


@pytest.mark.parametrize("name", ["classifier", "deeplab", "pnoc", "c2am", "affinity", "aepsl"])
def test_channels_last_gives_the_loss_and_the_gradients_of_the_plain_layout(name, tmp_path):
    torch.manual_seed(7)
    method, results = section(name, tmp_path), []
    for channels_last in (False, True):
        cfg = parse_config(values(method, engine="plain", channels_last=channels_last))
        torch.manual_seed(1)
        engine = build_engine(load_method(name).Method(cfg.method, NUM_CLASSES, cfg.train.steps), cfg)
        seen = []
        conv = next(m for m in engine.module.modules() if isinstance(m, torch.nn.Conv2d))
        conv.register_forward_hook(lambda m, x, y, seen=seen: seen.extend([x[0], m.weight, y]))
        loss = engine.forward(batch_of(12), 12)["loss"]
        loss.backward()
        grads = {n: p.grad for n, p in engine.module.named_parameters() if p.grad is not None}
        results.append((loss.detach(), grads, engine.weights()))
        formats = [x.is_contiguous(memory_format=torch.channels_last) for x in seen[:3]]
        assert formats == [channels_last] * 3, formats
    (loss, grads, weights), (other, other_grads, other_weights) = results
    torch.testing.assert_close(other, loss, rtol=1e-5, atol=1e-6)
    assert grads.keys() == other_grads.keys()
    flat, other_flat = (torch.cat([g[n].flatten() for n in grads]) for g in (grads, other_grads))
    # float32 sums in another order; BatchNorm over a few cells makes the differences larger on their way down
    assert (other_flat - flat).norm() < 1e-3 * flat.norm()
    for key, value in other_weights.items():  # running statistics among them
        assert value.is_contiguous()
        torch.testing.assert_close(value, weights[key], rtol=1e-4, atol=1e-5)


ENGINES = [
    {"train__engine": "plain"},
    {"train__zero_stage": 0},
    {"train__zero_stage": 1, "train__precision": "bf16"},
    {"train__zero_stage": 2},
    {"train__zero_stage": 3, **SPLIT},
]


def test_every_engine_takes_channels_last_on_two_ranks(tmp_path):
    def of(channels_last: bool) -> list[dict]:
        return [tiny.values(**e, train__steps=6, train__channels_last=channels_last) for e in ENGINES]

    plain = run_ranks(2, tmp_path, work.each, work.train, of(False))
    last = run_ranks(2, tmp_path, work.each, work.train, of(True))
    assert last[0] == last[1], "the ranks ended with different losses or weights"
    for settings, (a, _), (b, _) in zip(ENGINES, plain[0], last[0], strict=True):
        assert b == pytest.approx(a, rel=3e-2 if "train__precision" in settings else 1e-5), settings


@pytest.mark.parametrize("engine", [{"train__engine": "plain"}, {"train__zero_stage": 0}])
def test_a_run_goes_on_in_another_layout(engine, tmp_path):
    """Saved with the channels last, resumed without, and the other way round: the run that never changed."""
    plain, last = (tiny.values(**engine, train__steps=6, train__channels_last=c) for c in (False, True))
    cases = [(plain, last), (last, plain)]
    for losses, whole, shapes, strides in run_ranks(1, tmp_path, work.each, work.resumed_as, cases, tmp_path)[0]:
        assert losses == pytest.approx(whole, rel=1e-5)
        assert shapes, "everything is saved contiguous"
        assert strides, "the moments have the layout of the weights"


def test_a_loaded_state_is_laid_out_as_the_weights():
    def make(memory_format: torch.memory_format) -> tuple:
        conv = torch.nn.Conv2d(3, 4, 3).to(memory_format=memory_format)
        return conv, build_optimizer(conv, [{"name": "all", "params": list(conv.parameters())}], OptimConfig(lr=0.1))

    conv, optimizer = make(torch.contiguous_format)
    conv(torch.randn(2, 3, 5, 5)).square().mean().backward()
    optimizer.step()
    other, second = make(torch.channels_last)
    second.load_state_dict(optimizer.state_dict())
    old, new = optimizer.state[conv.weight]["exp_avg"], second.state[other.weight]["exp_avg"]
    assert torch.equal(old, new) and new.stride() == other.weight.stride() != old.stride()


def test_channels_last_is_refused_for_a_vit():
    with pytest.raises(UserError, match="'train.channels_last' is for convolutional networks.*'pcre'.*remove it"):
        pcre_runs.engine_of(pcre_runs.values(engine="plain", channels_last=True))


# ---- compiled blocks -----------------------------------------------------------------------------------------------


@pytest.fixture
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def small(**train: object) -> dict:
    """Of a ViT the last block alone has no attention, and one scale makes the labels: three versions of a block."""
    config = pcre_runs.values(steps=4, **train)
    config["data"]["crop"] = 32
    config["method"]["backbone"] = {**config["method"]["backbone"], "depth": 3}
    config["method"] |= {"cam": {"scales": [1.0]}, "seg_dilations": [1]}
    config["method"] |= {"crme": None, "cpe": None}
    return config


def run(config: dict) -> tuple[list[float], list[str]]:
    engine = pcre_runs.engine_of(config)
    losses = [m["loss"] for m in pcre_runs.steps_of(engine, config, 0, 2)]
    return losses, list(engine.weights())


def test_compiled_vit_blocks_give_the_losses_and_the_keys_of_the_plain_ones(fresh):
    losses, keys = run(small(engine="plain"))
    graphs = torch._dynamo.utils.counters["stats"]
    before = graphs["unique_graphs"]
    for settings in ({"engine": "plain"}, {"zero_stage": 0}, {"zero_stage": 2}):
        compiled, names = run(small(compile=True, **settings))
        assert compiled == pytest.approx(losses, rel=1e-5), settings
        assert names == keys
    assert graphs["unique_graphs"] - before >= 4, "nothing was compiled"


def test_many_sizes_share_few_versions_of_a_block(fresh):
    method = tiny_method()
    speed._compile(method, "pcre", backend="aot_eager")
    counters = torch._dynamo.utils.counters
    before = counters["stats"]["unique_graphs"]
    with torch.no_grad():
        for side in (32, 48, 64, 80, 112, 160):
            method.backbone(torch.randn(2, 3, side, side + 16))
        first = counters["stats"]["unique_graphs"] - before
        for side in (96, 128, 144, 176, 192):
            method.backbone(torch.randn(3, 3, side, side + 16))
    assert 0 < first <= 6 and counters["stats"]["unique_graphs"] - before <= first + 2


@pytest.mark.parametrize("name", ["resnet18", "resnest14d"])
def test_blocks_of_convolutional_networks_compile_whole(name, fresh):
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        deeplab = load_method("deeplab")
        cfg = deeplab.Config(backbone={"name": name, "weights": None}, width=16, dropout=False)
        method = deeplab.Method(cfg, NUM_CLASSES, 20).train()
        keys = list(method.state_dict())
        if compiled:
            speed._compile(method, "deeplab", backend="aot_eager")
        losses = []
        for side in (64, 96):
            batch = random_batch(side=side)
            batch.maps["labels"] = torch.zeros(4, side, side, dtype=torch.uint8)
            loss = method(batch, 0)["loss"]
            loss.backward()
            losses.append(loss.detach())
        statistics = torch.cat([b.double().flatten() for b in method.buffers()])
        results.append((torch.stack(losses), statistics))
        assert list(method.state_dict()) == keys
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-5, atol=0)
    torch.testing.assert_close(results[1][1], results[0][1], rtol=1e-4, atol=1e-5)


def test_recomputed_vit_blocks_compile_too(fresh):
    results = []
    for compiled in (False, True):
        method = tiny_method(backbone={"name": "vit_tiny_patch16_224", "weights": None, "recompute": True, "depth": 3})
        if compiled:
            speed._compile(method, "pcre", backend="aot_eager")
        loss = method(random_batch(), 5)["loss"]
        loss.backward()
        results.append((loss.detach(), method.backbone.blocks[0].attn.qkv.weight.grad))
    for a, b in zip(*results, strict=True):
        assert (b - a).norm() <= 1e-5 * a.norm()


def test_an_error_of_the_compiler_is_one_sentence(fresh, monkeypatch):
    engine = pcre_runs.engine_of(small(engine="plain", compile=True))

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no compiler here")

    engine.module.backbone.compile_blocks(fullgraph=True, backend=broken)
    with pytest.raises(UserError, match="'train.compile' is true.*set train.compile: false"):
        pcre_runs.steps_of(engine, small(), 0, 1)


def test_evaluation_runs_the_blocks_as_they_are_written(fresh):
    engine = pcre_runs.engine_of(small(engine="plain", compile=True))
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with engine.evaluation() as method:
        method.backbone(torch.randn(1, 3, 32, 32))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"name": "pnoc", "variant": "plain", "backbone": {**PLAIN, "recompute": True}}, "'recompute' of a ResNet"),
        ({"name": "aepsl", "variant": "erasing", "backbone": {"weights": None}}, "'aepsl' has no block of a ViT"),
    ],
)
def test_what_cannot_be_compiled_is_refused(method, message):
    cfg = parse_config(values(method, engine="plain", compile=True))
    with pytest.raises(UserError, match=message):
        build_engine(load_method(cfg.method_name).Method(cfg.method, NUM_CLASSES, 20), cfg)


def test_compiled_blocks_and_zero_3_are_refused():
    with pytest.raises(UserError, match="'train.compile' is true and 'train.zero_stage' is 3.*train.compile: false"):
        parse_config(pcre_runs.values(zero_stage=3, compile=True))
