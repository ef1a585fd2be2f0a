"""What can be read off features of the clips: the probes' accuracy. And what captions tell apart, and masks hide."""

from __future__ import annotations

import time
from itertools import combinations
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bench.study.probe import probe, rotate_pixels
from engines.clip_model import load_clip
from tgmae.captions.embeddings import CaptionEmbeddings
from tgmae.config.run import TrainConfig
from tgmae.data.manifest import Manifest
from tgmae.evaluation.features import Pool, extract_features
from tgmae.masks.agreement import load_clips
from tgmae.masks.scorer import bind_scorer
from tgmae.masks.select import select_masks
from tgmae.model.videomae import VideoMAE
from tgmae.shapes.scenes import COLORS, MOTIONS, SHAPES
from tgmae.shapes.truth import object_coverage, read_objects
from tgmae.training.parallel import choose_device

NUM_CLASSES = {  # by task
    "motion": len(MOTIONS), "colour × shape": len(COLORS) * len(SHAPES), "colour": len(COLORS), "shape": len(SHAPES),
}  # fmt: skip


class Judge:
    """Probes features of the videos of shapes: learns from split train, and is judged by split val.

    labels   by task, one for each video of the manifest
    """

    def __init__(self, manifest: Manifest) -> None:
        objects = read_objects(manifest.root)
        videos = [manifest[row] for row in range(len(manifest))]
        shown = [objects[video.path][0] for video in videos]
        self.manifest = manifest
        self.is_held_out = np.array([video.split == "val" for video in videos])
        self.labels: dict[str, NDArray[np.str_]] = {
            "motion": np.array([one.motion for one in shown]),
            "colour × shape": np.array([f"{one.color} {one.shape}" for one in shown]),
            "colour": np.array([one.color for one in shown]),
            "shape": np.array([one.shape for one in shown]),
        }

    def judge(self, pool: VideoMAE | Pool, config: TrainConfig) -> dict[str, Any]:
        """Extract a network's features, or a function's, and return by task what `probe` does."""
        return self._judge(pool, config, is_pixels=False)

    def judge_pixels(self, config: TrainConfig) -> dict[str, Any]:
        """Return the same for the clips' own pixels."""
        return self._judge(lambda frames: frames.flatten(1), config, is_pixels=True)

    def _judge(self, pool: VideoMAE | Pool, config: TrainConfig, is_pixels: bool) -> dict[str, Any]:
        started = time.perf_counter()
        features = extract_features(
            pool, self.manifest, config.data, config.model, choose_device(config.device), pipeline=config.pipeline
        )
        held_out = self.is_held_out[features.rows]
        learned, tested = features.vectors[~held_out], features.vectors[held_out]
        if is_pixels:
            learned, tested = rotate_pixels(learned, tested)
        found: dict[str, Any] = {}
        for task, labels in self.labels.items():
            mine = labels[features.rows]
            found[task] = probe(learned, mine[~held_out], tested, mine[held_out], scaled=not is_pixels)._asdict()
        return {**found, "skipped": len(features.skipped), "probe_s": time.perf_counter() - started}


def compare_captions(manifest: Manifest, config: TrainConfig) -> dict[str, float]:
    """Return the mean cosine between CLIP's embeddings of captions that differ in nothing but one word, by that word.

    The contrastive loss teaches a difference the less, the nearer to 1 its cosine is.
    """
    objects = read_objects(manifest.root)
    captions = {(one.color, one.shape, one.motion): one.caption for (one,) in objects.values()}
    embeddings = CaptionEmbeddings(manifest, load_clip(config.clip), config.clip.cache_dir, torch.device("cpu"))
    vectors = dict(zip(captions, embeddings.of([*captions.values()]).numpy(), strict=True))
    found: dict[str, list[float]] = {}
    for one, other in combinations(vectors, 2):
        differing = [name for name, a, b in zip(("colour", "shape", "motion"), one, other, strict=True) if a != b]
        if len(differing) == 1:
            found.setdefault(differing[0], []).append(float(vectors[one] @ vectors[other]))
    return {name: float(np.mean(cosines)) for name, cosines in found.items()}


def measure_hidden(manifest: Manifest, config: TrainConfig, num_clips: int = 128) -> float:
    """Return the share of the objects' area that a cell's masks hide, in the first clips that it trains on."""
    trained, objects = manifest.select_split("train"), read_objects(manifest.root)
    device, model = choose_device(config.device), config.model
    scorer = bind_scorer(config, trained, device)
    hidden = total = 0.0
    for clips in load_clips(config, trained, num_clips, config.batch_size, device):
        masks = select_masks(config.mask, model, scorer(clips))
        for video, request, masked in zip(clips.videos, clips.requests, masks.masked.cpu().numpy(), strict=True):
            (shown,) = objects[video.path]
            area = object_coverage(shown, request, model.image_size, model.patch_size, model.tubelet_size).ravel()
            hidden, total = hidden + float(area[masked].sum()), total + float(area.sum())
    return hidden / total
