"""Measure how well a CLIP finds the objects of shapes clips: its scores against the ground truth, patch by patch.

Dimensions: T frames, S slots, N patches per slot, C texts, E width of the embeddings.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from numpy.typing import NDArray
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from dali_pipelines.pyav_pipeline import read_clip
from dali_pipelines.types import ClipRequest
from engines.config import LastBlock
from engines.progress import progress_bar
from engines.towers.clip_towers import FrameTower
from tgmae.data.manifest import read_manifest
from tgmae.data.sampling import ClipSampler
from tgmae.presets import PRESETS
from tgmae.shapes.judge import area_under_curve, judge, mean_of
from tgmae.shapes.scenes import MovingShape, make_shapes
from tgmae.shapes.truth import object_coverage, read_objects

DEMO = PRESETS["demo"]
SIZE, PATCH, TUBELET = DEMO.model.image_size, DEMO.model.patch_size, DEMO.model.tubelet_size
# Seed of the data sets to measure on. Training data comes from a stream that no data set shows (`tiny_clip_data`).
EVALUATION_SEED = 77_001
_DENSE: tuple[LastBlock, ...] = ("maskclip", "sclip", "clearclip", "naclip")


@dataclass(frozen=True)
class LabelledClip:
    """A clip as the demo trains on it, with its ground truth.

    frames    uint8 [T, H, W, 3]
    captions  caption i names object i
    """

    frames: Tensor
    request: ClipRequest
    objects: list[MovingShape]
    captions: tuple[str, ...]

    def __repr__(self) -> str:
        return f"LabelledClip(frames uint8 {list(self.frames.shape)}, {self.frames.device}, {self.captions})"

    def coverage(self, number: int, frames_per_tubelet: int = TUBELET) -> NDArray[np.float32]:
        """Return the share of each patch of each tubelet that shows object `number`, float32 [S, N]."""
        on_top = self.objects[number + 1 :]
        return object_coverage(
            self.objects[number], self.request, SIZE, PATCH, TUBELET, frames_per_tubelet, on_top=on_top
        )

    def truth(self, number: int) -> NDArray[np.bool_]:
        """Return which patches object `number` covers by at least half, bool [S, N]."""
        return self.coverage(number) >= 0.5


def make_labelled_clips(
    folder: Path, *, count: int, num_objects: int, workers: int, seed: int = EVALUATION_SEED
) -> list[LabelledClip]:
    """Generate a data set in `folder` and decode one clip from each of its videos, with the demo's crops."""
    make_shapes(folder, count=count, seed=seed, codec="h264", num_objects=num_objects, num_workers=workers)
    videos, objects = read_manifest(folder / "manifest.parquet"), read_objects(folder)
    sampler = ClipSampler(videos, DEMO.data, DEMO.model.num_frames, batch_size=count, seed=seed)
    clips = []
    for request in sampler(0):
        video = videos[request.row]
        frames = read_clip(videos.file(request.row), video, request, SIZE)
        clips.append(LabelledClip(frames, request, objects[video.path], video.texts))
    return clips


@torch.inference_mode()
def score_patches(model: nn.Module, frames: Tensor, texts: Tensor) -> Tensor:
    """Enlarge each patch to the model's input size and compare it with texts [C, E]: cosines [C, T, N].

    This is the paper's method (Fan et al. 2024, section 3.3) step by step. `engines` computes the same faster.
    """
    visual = _visual(model)
    pixels = _normalise(visual, frames)
    patches = rearrange(pixels, "t c (h p) (w q) -> (t h w) c p q", p=PATCH, q=PATCH)
    enlarged = F.interpolate(patches, visual.image_size, mode="bicubic", antialias=True)
    embeddings = F.normalize(visual(enlarged), dim=-1)
    return rearrange(texts @ embeddings.T, "c (t n) -> c t n", t=len(frames))


@torch.inference_mode()
def score_densely(model: nn.Module, tower: FrameTower, frames: Tensor, texts: Tensor) -> Tensor:
    """Encode each frame in one pass, with one token per patch, and compare with texts [C, E]: cosines [C, T, N]."""
    return torch.einsum("ce,tne->ctn", texts, tower(_normalise(_visual(model), frames)))


def evaluate(
    model: nn.Module, tokenizer: Any, single: list[LabelledClip], double: list[LabelledClip]
) -> dict[str, Any]:
    """Measure everything that the card says, on clips with one object and clips with two.

    object_patches                 mean number of the object's patches in a slot, out of `patches`
    patch_frames1, patch_frames2   `_judge` of the paper's scores, of the first or of both frames of each tubelet
    truth_frames1                  `_judge` of the first frame's ground truth: the best that patch_frames1 could reach
    dense_...                      `_judge` of the scores of one pass per frame, both frames
    two_objects                    `_judge_pairs`
    auc_by_wording, auc_by_color   AUC in a clip of the paper's scores, both frames
    """
    encode = _Encoder(model, tokenizer)
    # Score each clip by its caption (text 0) and by every other wording of it (texts 1, 2, …).
    phrases = [_phrase(clip.objects[0]) for clip in single]
    scored = []
    for clip, phrase in zip(progress_bar(single, desc="scoring", unit="clip"), phrases, strict=True):
        scored.append(score_patches(model, clip.frames, encode([clip.captions[0], *phrase.values()])))
    both = [_pool(scores[0], TUBELET) for scores in scored]
    by_wording = {
        wording: [
            area_under_curve(clip.truth(0), _pool(scores[number], TUBELET))
            for clip, scores in zip(single, scored, strict=True)
        ]
        for number, wording in enumerate(phrases[0], start=1)
    }
    by_color: dict[str, list[float | None]] = defaultdict(list)
    for clip, values in zip(single, both, strict=True):
        by_color[clip.objects[0].color].append(area_under_curve(clip.truth(0), values))
    return {
        "clips": len(single),
        "two_object_clips": len(double),
        "object_patches": round(float(np.mean([clip.truth(0).sum(axis=1) for clip in single])), 2),
        "patches": single[0].truth(0).shape[1],
        "patch_frames2": _judge(single, both),
        "patch_frames1": _judge(single, [_pool(scores[0], 1) for scores in scored]),
        "truth_frames1": _judge(single, [clip.coverage(0, 1) for clip in single]),
        **{f"dense_{kind}": _judge(single, _score_all_densely(model, encode, single, kind)) for kind in _DENSE},
        "two_objects": _judge_pairs(model, encode, double),
        "auc_by_wording": {wording: mean_of(areas) for wording, areas in by_wording.items()},
        "auc_by_color": {color: mean_of(areas) for color, areas in sorted(by_color.items())},
    }


@dataclass(frozen=True)
class _Encoder:
    """Embeds texts as float32 [C, E], L2-normalised."""

    model: nn.Module
    tokenizer: Any

    @torch.inference_mode()
    def __call__(self, texts: list[str]) -> Tensor:
        embeddings: Tensor = self.model.encode_text(self.tokenizer(texts), normalize=True)  # type: ignore[operator]
        return embeddings


def _phrase(obj: MovingShape) -> dict[str, str]:
    """Return the ways to ask for an object, by what they keep of its caption."""
    article = obj.caption.split()[0]
    return {
        "a COLOR SHAPE": f"{article} {obj.color} {obj.shape}",
        "a COLOR shape": f"{article} {obj.color} shape",
        "COLOR": obj.color,
        "the SHAPE": f"the {obj.shape}",
        "SHAPE": obj.shape,
        "a shape": "a shape",
    }


def _score_all_densely(
    model: nn.Module, encode: _Encoder, clips: list[LabelledClip], kind: LastBlock
) -> list[NDArray[np.float32]]:
    tower = FrameTower(_visual(model), SIZE, SIZE, PATCH, kind)
    texts = encode([clip.captions[0] for clip in clips])
    return [
        _pool(score_densely(model, tower, clip.frames, text[None])[0], TUBELET)
        for clip, text in zip(clips, texts, strict=True)
    ]


def _judge(clips: list[LabelledClip], scores: list[NDArray[np.float32]]) -> dict[str, float]:
    """Judge the scores [S, N] of each clip at the demo's mask ratio, against the patches of its first object."""
    truths = [clip.truth(0) for clip in clips]
    return judge(truths, scores, DEMO.mask.masked_per_slot(truths[0].shape[1]))


def _judge_pairs(model: nn.Module, encode: _Encoder, clips: list[LabelledClip]) -> dict[str, float]:
    """Measure the area under the ROC curve for the name of either object, averaged over the clips.

    first, second                    the named object's patches against the other object's
    first_by_shape, second_by_shape  the same, with the object named by its shape alone
    first_in_all, second_in_all      the named object's patches against all others
    """
    areas: dict[str, list[float | None]] = defaultdict(list)
    for clip in clips:
        texts = encode([*clip.captions, *(f"the {obj.shape}" for obj in clip.objects)])
        scores = [_pool(values, TUBELET) for values in score_patches(model, clip.frames, texts)]
        truths = [clip.truth(0), clip.truth(1)]
        either = truths[0] | truths[1]
        for number, name in enumerate(("first", "second")):
            areas[name].append(area_under_curve(truths[number][either], scores[number][either]))
            areas[f"{name}_by_shape"].append(area_under_curve(truths[number][either], scores[2 + number][either]))
            areas[f"{name}_in_all"].append(area_under_curve(truths[number], scores[number]))
    return {name: mean_of(values) for name, values in areas.items()}


def _pool(scores: Tensor, taken: int) -> NDArray[np.float32]:
    """Average [T, N] over the first `taken` frames of each tubelet: [S, N]."""
    pooled: NDArray[np.float32] = rearrange(scores, "(s t) n -> s t n", t=TUBELET)[:, :taken].mean(dim=1).numpy()
    return pooled


def _visual(model: nn.Module) -> VisionTransformer:
    visual = model.visual
    assert isinstance(visual, VisionTransformer)
    return visual


def _normalise(visual: VisionTransformer, frames: Tensor) -> Tensor:
    """Turn frames uint8 [T, H, W, 3] into the model's input, float32 [T, 3, H, W]."""
    config = visual.preprocess_cfg
    mean, std = torch.tensor(config["mean"]), torch.tensor(config["std"])
    return rearrange((frames / 255 - mean) / std, "t h w c -> t c h w")
