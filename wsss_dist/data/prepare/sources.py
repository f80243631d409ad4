"""Where the cut-outs and the backgrounds come from: Tux Paint's stamps, 3-D emoji, or a folder of one's own.

A cut-out is a picture with alpha. All pictures are named by their path below the source, and the names decide the
splits, so that a source may be unpacked anywhere.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from wsss_dist.data.prepare import emoji
from wsss_dist.data.prepare.fetch import FetchError, Package, fetch, sha256_of, unpack
from wsss_dist.errors import UserError

TUXPAINT = (
    Package(
        "deb",
        "tuxpaint-stamps-default",
        "2022.06.04-1",
        "tuxpaint-stamps-default_2022.06.04-1_all.deb",
        "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",
        "GPL-2 as a whole; single pictures public domain, CC-BY, CC-BY-SA or GFDL (see its changelog)",
    ),
    Package(
        "deb",
        "tuxpaint-data",
        "1:0.9.28-sdl2-1",
        "tuxpaint-data_1%3a0.9.28-sdl2-1_all.deb",
        "f5d0de8f9a70d2efc1241d19f26168cb8bf279f1b77abd3631e7a1a55c40e5e5",
        "GPL-2+",
    ),
)
EMOJI = Package(
    "npm",
    "@lobehub/fluent-emoji-3d",
    "1.1.0",
    "lobehub-fluent-emoji-3d-1.1.0.tgz",
    "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
    "MIT",
)

_MAMMALS = "animals/mammals"
# class -> patterns below the package's stamps folder; `*` stays within one folder, `**` does not
_STAMPS = {
    "bird": ["animals/birds/*"],
    "hoofed": [f"{_MAMMALS}/{n}" for n in "bovines/* camel/* deer/* equines/* giraffe pig* wildboar".split()],
    "carnivore": [f"{_MAMMALS}/{n}" for n in "cats/* dogs/* bears/* ferret badger aquatic/otter".split()],
    "rodent": [f"{_MAMMALS}/rodents/*", f"{_MAMMALS}/rabbit_little"],
    "sealife": ["animals/fish/*", *(f"{_MAMMALS}/aquatic/{n}" for n in ("dolphin", "orca", "whale"))],
    "flower": ["plants/flowers/*"],
    "fruit": ["food/fruit/*"],
    "vegetable": ["food/vegetables/*"],
    "vehicle": [
        *(f"vehicles/{n}" for n in "auto/* masstransit/* race/* cycle/* emergency/firetruck garbagetruck".split()),
        "vehicles/construction/dumper",
        *(f"military/vehicles/{n}" for n in ("bradley", "infantry-stryker", "ww2_german_gun")),
    ],
    "instrument": ["hobbies/music/**"],
    "tool": ["household/tools/*"],
}
_DISTRACTORS = (
    "sports/* space/planets/* household/* household/dishes/* medical/* seasonal/christmas/*_photo* food/nuts/* town/* "
    "hobbies/* animals/marsupials/* animals/lizards/* animals/amphibians/*"
).split()
# drawings, mirrored twins, and cut-outs whose alpha or content is off
_LEFT_OUT = (
    "*cartoon* *_mirror* *glass* */0_sun */rugby_goal* */sedan_police* */cementmixer medical/tooth plants/flowers/rose"
).split()
_TRAIN_SCENES = (
    "burnt_bark corn_maze mossy_log ocean_splash rocks spiders_web sun_behind_leaves trees_above trees_at_dusk "
    "wool_mill_machine"
).split()
_VAL_SCENES = "cliff ocean_waves redwoods_above mudstone sun_behind_clouds mossy_bark".split()
_PREFERRED = {
    "sealife": ["ocean_splash"],
    "bird": ["trees_above", "trees_at_dusk"],
    "flower": ["sun_behind_leaves", "corn_maze"],
    "vehicle": ["rocks", "wool_mill_machine"],
}
# classes whose objects have no upright position
_ANY_ANGLE = frozenset(("fruit", "vegetable", "flower", "tool"))


@dataclass(frozen=True)
class Source:
    """Pictures to compose from.

    name         "tuxpaint", "emoji" or the folder as it was given.
    about        one sentence that says what the scenes are made of.
    objects      class -> names of its cut-outs.
    distractors  names of cut-outs that stay background in the masks.
    backgrounds  names of the background pictures; `val_backgrounds` of them belong to the validation splits alone;
                 None lets the seed choose them.
    files        name -> file; a background without a file is drawn as noise from its name.
    preferred    class -> training backgrounds that it favours.
    any_angle    classes that may be turned by any angle.
    packages     what was fetched: name, version, file, sha256, licence.
    """

    name: str
    about: str
    objects: dict[str, list[str]]
    distractors: list[str]
    backgrounds: list[str]
    val_backgrounds: list[str] | None
    files: dict[str, Path]
    preferred: dict[str, list[str]] = field(default_factory=dict)
    any_angle: frozenset[str] = frozenset()
    packages: list[dict[str, str]] = field(default_factory=list)


def open_source(name: str, cache: Path, say: Callable[[str], None]) -> tuple[Source, str]:
    """Open "tuxpaint", "emoji", "auto" (tuxpaint, else emoji) or a folder.

    Returns:
        the source, and a sentence on why it is this one.
    Raises:
        UserError: it cannot be had, or the folder has no cut-outs.
    """
    builders = {"tuxpaint": _tuxpaint, "emoji": _emoji}
    if name in builders:
        try:
            return builders[name](cache, say), f"asked for by --source {name}"
        except FetchError as error:
            raise UserError(f"prepare: --source {name} cannot be had: {error}. Use another --source, or auto") from None
    if name != "auto":
        return _folder(Path(name)), f"asked for by --source {name}"
    try:
        return _tuxpaint(cache, say), "photographs are the better material, and the packages could be had"
    except FetchError as first:
        say(f"Tux Paint's stamps cannot be had ({first}); taking the emoji instead")
        try:
            return _emoji(cache, say), f"Tux Paint's stamps could not be had: {first}"
        except FetchError as second:
            raise UserError(
                f"prepare: no source of pictures can be had: tuxpaint ({first}), emoji ({second}). Go online, put the "
                "archives into --cache, or give a folder of your own cut-outs with --source"
            ) from None


def _tuxpaint(cache: Path, say: Callable[[str], None]) -> Source:
    stamps, data = (fetch(package, cache, say) for package in TUXPAINT)
    share = "usr/share/tuxpaint"
    folder = unpack(stamps, lambda n: _below(n, f"{share}/stamps/", ".png"), cache / f"stamps-{sha256_of(stamps)[:16]}")
    scenes = unpack(data, lambda n: _below(n, f"{share}/templates/", ".jpg"), cache / f"scenes-{sha256_of(data)[:16]}")
    names = sorted(str(p.relative_to(folder).with_suffix("")) for p in folder.rglob("*.png"))
    names = [n for n in names if not any(fnmatch.fnmatch(n, pattern) for pattern in _LEFT_OUT)]
    objects = {label: [n for n in names if _matches(n, patterns)] for label, patterns in _STAMPS.items()}
    taken = {n for members in objects.values() for n in members}
    backgrounds = _TRAIN_SCENES + _VAL_SCENES
    return Source(
        name="tuxpaint",
        about="photographic cut-outs (Tux Paint stamps) pasted on photographs (Tux Paint templates)",
        objects=objects,
        distractors=[n for n in names if _matches(n, _DISTRACTORS) and n not in taken],
        backgrounds=backgrounds,
        val_backgrounds=_VAL_SCENES,
        files={n: folder / f"{n}.png" for n in names} | {n: scenes / f"{n}.jpg" for n in backgrounds},
        preferred=_PREFERRED,
        any_angle=_ANY_ANGLE,
        packages=[_record(package, path) for package, path in zip(TUXPAINT, (stamps, data), strict=True)],
    )


def _emoji(cache: Path, say: Callable[[str], None]) -> Source:
    archive = fetch(EMOJI, cache, say)
    folder = unpack(archive, lambda n: _below(n, "package/assets/", ".webp"), cache / f"emoji-{EMOJI.sha256[:16]}")
    known = {p.stem.removesuffix("-fe0f"): p for p in sorted(folder.glob("*.webp"))}
    objects = {label: [c for c in codes.split() if c in known] for label, codes in emoji.CLASSES.items()}
    distractors = [c for c in emoji.DISTRACTORS.split() if c in known]
    used = [*distractors, *(c for codes in objects.values() for c in codes)]
    return Source(
        name="emoji",
        about="rendered 3-D emoji (no photographs) pasted on coloured noise",
        objects=objects,
        distractors=distractors,
        backgrounds=[f"noise-{k:02d}" for k in range(16)],
        val_backgrounds=None,
        files={code: known[code] for code in used},
        any_angle=_ANY_ANGLE,
        packages=[_record(EMOJI, archive)],
    )


def _folder(root: Path) -> Source:
    """class/*.png with alpha, backgrounds/*.{jpg,png}, and optionally distractors/*.png."""
    if not root.is_dir():
        raise UserError(f"prepare: --source is '{root}'; expected tuxpaint, emoji, auto, or an existing folder")
    found: dict[str, list[Path]] = {}
    for path in sorted(root.glob("*/*")):
        if path.suffix.lower() in (".png", ".webp", ".jpg", ".jpeg"):
            found.setdefault(path.parent.name, []).append(path)
    backgrounds, distractors = found.pop("backgrounds", []), found.pop("distractors", [])
    few = [label for label, paths in found.items() if len(paths) < 2]
    if not found or few or len(backgrounds) < 2:
        raise UserError(
            f"prepare: the folder {root} has {len(found)} classes, {len(backgrounds)} backgrounds, and fewer than two "
            f"cut-outs of: {', '.join(few) or 'no class'}; expected <class>/*.png with alpha, two or more a class, and "
            "two or more pictures in backgrounds/ (the validation splits get some of both)"
        )

    def name(path: Path) -> str:
        return f"{path.parent.name}/{path.name}"

    every = [*backgrounds, *distractors, *(p for paths in found.values() for p in paths)]
    return Source(
        name=str(root),
        about=f"the cut-outs of the folder '{root.name}' pasted on its backgrounds",
        objects={label: [name(p) for p in paths] for label, paths in found.items()},
        distractors=[name(p) for p in distractors],
        backgrounds=[name(p) for p in backgrounds],
        val_backgrounds=None,
        files={name(p): p for p in every},
        packages=[{"name": name(p), "sha256": sha256_of(p), "licence": "that of the folder's owner"} for p in every],
    )


def _below(name: str, prefix: str, ending: str) -> str | None:
    return name.removeprefix(prefix) if name.startswith(prefix) and name.endswith(ending) else None


def _matches(name: str, patterns: list[str]) -> bool:
    return any(
        fnmatch.fnmatch(name, pattern) and (pattern.endswith("**") or name.count("/") == pattern.count("/"))
        for pattern in patterns
    )


def _record(package: Package, path: Path) -> dict[str, str]:
    """What the manifest says of a package; another version shows in file and sha256."""
    same = path.name == package.file
    return {
        "registry": package.registry,
        "name": package.name,
        "version": package.version if same else f"not {package.version}: {path.name}",
        "file": path.name,
        "sha256": sha256_of(path),
        "licence": package.licence,
    }
