"""What --mask.scorer auto stands for, and the files that masks find beside a manifest without a flag.

`tgmae-data scores` writes folders scores-SCORER beside the manifest, and `tgmae-data motion` the folder motion. A run
looks for them there. Flags and, in a run that is resumed, what it began with come first.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from tgmae.config.as_flags import type_flags
from tgmae.config.masks import MOTION_KINDS, MaskConfig
from tgmae.config.paths import Paths, list_paths
from tgmae.config.run import InputConfig
from tgmae.data.manifest import Manifest
from tgmae.data.mixing.joined import data_sets, naming_set

Config = TypeVar("Config", bound=InputConfig)

MOTION_FOLDER = "motion"
_NEAREST_FIRST = ("scores-patch", "scores-dense", "scores-student")  # to the paper's way; other names follow
# What decides whether score maps fit, among the flags of `tgmae-data scores`.
_FLAGS = (
    "clip.model", "clip.weights", "clip.tag", "clip.trust_code", "model.image_size", "model.patch_size", "data.root",
    "data.split", "captions.sources", "mask.no_caption",
)  # fmt: skip


def scores_folder(manifest: Path, scorer: str) -> Path:
    """Return where the score maps of a manifest are written and looked for."""
    return manifest.parent / f"scores-{scorer}"


def motion_folder(manifest: Path) -> Path:
    """Return where the motion of a manifest's videos is written and looked for."""
    return manifest.parent / MOTION_FOLDER


def choose_scorer(config: Config, manifest: Manifest, earlier: Mapping[str, Any] | None = None) -> tuple[Config, str]:
    """Return the configuration with a definite scorer and its files, and what the user should know, "" for nothing.

    manifest  the videos to score, with the captions that are scored
    earlier   settings of the masks of the run that is resumed, as a checkpoint holds them: it continues with its files

    A configuration that leaves nothing open is returned as it is. Raises ValueError where there are no files and
    scoring without them would take longer than training.
    """
    mask, note = config.mask, ""
    if earlier is not None and earlier.get("kind") != mask.kind:
        earlier = None
    if mask.kind == "tgm" and mask.scorer == "auto":
        mask, note = _choose_similarity(config, manifest, earlier)
    elif mask.kind in MOTION_KINDS and mask.motion is None and not (mask.kind == "mgmae" and mask.flow):
        mask, note = _find_motion(config, earlier)
    return replace(config, mask=mask), note


def _choose_similarity(
    config: InputConfig, manifest: Manifest, earlier: Mapping[str, Any] | None
) -> tuple[MaskConfig, str]:
    mask = config.mask
    if mask.scores and mask.student:
        raise ValueError(
            "--mask.scores and --mask.student name two scorers; leave out one of them, or choose with --mask.scorer"
        )
    if mask.scores or mask.student:
        return replace(mask, scorer="cached" if mask.scores else "student"), ""
    if earlier is not None:
        student = Path(earlier["student"]) if earlier.get("student") else None
        return replace(mask, scorer=earlier["scorer"], scores=_read_paths(earlier.get("scores")), student=student), ""

    sets = data_sets(manifest)
    if len(sets) > 1:
        chosen = []
        for one in sets:
            with naming_set(one):
                chosen.append(_choose_similarity(_of_set(config, one.number), one.manifest, None))
        if any(own.scorer != "cached" for own, _ in chosen):  # of all or of none
            return replace(mask, scorer="patch"), "\n".join(note for own, note in chosen if own.scorer != "cached")
        folders = tuple(path for own, _ in chosen for path in list_paths(own.scores))
        return replace(mask, scorer="cached", scores=folders), "\n".join(note for _, note in chosen)

    from tgmae.masks.cached_scorer import CachedScorer

    refusals = []
    [path] = config.data.manifests
    for folder in _list_scores(path):
        found = replace(mask, scorer="cached", scores=folder)
        try:
            CachedScorer(replace(config, mask=found), manifest, torch.device("cpu"))
        except (ValueError, OSError) as error:
            refusals.append(str(error))
        else:
            return found, f"score maps found beside the manifest: {folder} (--mask.scorer patch does without them)"
    if config.clip.is_tiny:
        return replace(mask, scorer="patch"), f"scorer patch, because {refusals[0]}" if refusals else ""
    if refusals:
        raise ValueError(f"no score maps beside {config.data.manifest} fit: {'; '.join(refusals)}")
    raise ValueError(
        f"no score maps beside {config.data.manifest}, and --mask.scorer patch would send every patch of every clip "
        f"through CLIP {config.clip.model}; make them once with: {name_command(config)}"
    )


def _list_scores(manifest: Path) -> Sequence[Path]:
    """Return the folders of score maps beside a manifest, those that are nearest to the paper's way first."""
    rank = {name: place for place, name in enumerate(_NEAREST_FIRST)}
    folders = (path.parent for path in manifest.parent.glob("scores-*/maps.json"))
    return sorted(folders, key=lambda folder: (rank.get(folder.name, len(rank)), folder.name))


def name_command(config: InputConfig) -> str:
    """Return the command line that makes the score maps which training with this configuration looks for."""
    usual = InputConfig()  # the preset's values, as far as maps depend on them
    words = ["tgmae-data", "scores", str(config.data.manifest), "--preset", "ssv2"]
    return shlex.join([*words, *type_flags(config, usual, _FLAGS)])


def _of_set(config: InputConfig, number: int) -> InputConfig:
    """Return the configuration for one of several data sets."""
    data = config.data
    root = data.roots[number] if data.roots else None
    return replace(config, data=replace(data, manifest=data.manifests[number], root=root, weights=None))


def _read_paths(saved: Any) -> Paths | None:
    """Return one path, several or none, as a checkpoint holds them."""
    return tuple(map(Path, saved)) if isinstance(saved, list) else Path(saved) if saved else None


def _find_motion(config: InputConfig, earlier: Mapping[str, Any] | None) -> tuple[MaskConfig, str]:
    mask = config.mask
    if earlier is not None and earlier.get("motion"):
        return replace(mask, motion=_read_paths(earlier["motion"])), ""
    if (count := len(config.data.manifests)) > 1:
        found = [_find_motion(_of_set(config, number), None) for number in range(count)]
        folders = tuple(path for own, _ in found for path in list_paths(own.motion))
        return replace(mask, motion=folders), "\n".join(note for _, note in found)
    folder = motion_folder(config.data.manifests[0])
    if (folder / "maps.json").is_file():
        return replace(mask, motion=folder), f"motion found beside the manifest: {folder}"
    root = ["--root", str(config.data.root)] if config.data.root else []
    command = shlex.join(["tgmae-data", "motion", str(config.data.manifest), *root])
    raise ValueError(
        f"--mask.kind {mask.kind} needs --mask.motion FOLDER, as there is no motion in {folder}; make it with: "
        f"{command}" + " (or give --mask.flow, a RAFT checkpoint)" * (mask.kind == "mgmae")
    )
