"""How well a CLIP finds the objects of shapes clips: its scores patch by patch against the truth.

Dimensions: T frames, S slots, N patches a slot.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn
from tqdm import tqdm

from dali_pipelines.pyav_pipeline import read_clip
from dali_pipelines.types import ClipRequest
from engines.config import LastBlock
from engines.towers.clip_towers import FrameTower
from tgmae.data.manifest import read_manifest
from tgmae.data.sampling import ClipSampler
from tgmae.presets import PRESETS
from tgmae.shapes.judge import area_under_curve, judge, mean_of
from tgmae.shapes.scenes import MovingShape, make_shapes
from tgmae.shapes.truth import object_coverage, read_objects

DEMO = PRESETS["demo"]
SIZE, PATCH, TUBELET = DEMO.model.image_size, DEMO.model.patch_size, DEMO.model.tubelet_size
# Of the data sets that are evaluated on. Training draws from a stream no data set shows, see `tiny_clip_data`.
EVALUATION_SEED = 77_001
_DENSE: tuple[LastBlock, ...] = ("maskclip", "sclip", "clearclip", "naclip")


@dataclass(frozen=True)
class TrueClip:
    """frames uint8 [T, H, W, 3] as the demo would train on them; caption i names object i."""

    frames: Tensor
    request: ClipRequest
    objects: list[MovingShape]
    captions: tuple[str, ...]

    def coverage(self, number: int, frames_per_tubelet: int = TUBELET) -> NDArray[np.float32]:
        """Share of each patch of each tubelet that shows object `number`, [S, N]."""
        on_top = self.objects[number + 1 :]
        return object_coverage(
            self.objects[number], self.request, SIZE, PATCH, TUBELET, frames_per_tubelet, on_top=on_top
        )

    def truth(self, number: int) -> NDArray[np.bool_]:
        """The patches that object `number` covers at least half, [S, N]."""
        return self.coverage(number) >= 0.5


def make_true_clips(
    folder: Path, *, count: int, num_objects: int, workers: int, seed: int = EVALUATION_SEED
) -> list[TrueClip]:
    """Make a data set in `folder` and decode a clip of each of its videos, with the demo's crops."""
    make_shapes(folder, count=count, seed=seed, codec="h264", num_objects=num_objects, num_workers=workers)
    videos, objects = read_manifest(folder / "manifest.parquet"), read_objects(folder)
    plan = ClipSampler(videos, DEMO.data, DEMO.model.num_frames, batch_size=count, seed=seed)
    clips = []
    for request in plan(0):
        video = videos[request.row]
        frames = read_clip(videos.file(request.row), video, request, SIZE)
        clips.append(TrueClip(frames, request, objects[video.path], tuple(caption.text for caption in video.captions)))
    return clips


@torch.inference_mode()
def score_patches(model: nn.Module, frames: Tensor, texts: Tensor) -> Tensor:
    """Each patch enlarged alone to the model's input and compared with texts [C, E]: cosines [C, T, N].

    The paper's way (Fan et al., section 3.3), step by step; `engines` computes the same faster.
    """
    visual = _visual(model)
    pixels = _normalise(visual, frames)
    patches = pixels.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH).permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
    enlarged = F.interpolate(patches, visual.image_size, mode="bicubic", antialias=True)
    embeddings = F.normalize(visual(enlarged), dim=-1)
    cosines: Tensor = texts @ embeddings.T
    return cosines.view(len(texts), len(frames), -1)


@torch.inference_mode()
def score_densely(model: nn.Module, tower: FrameTower, frames: Tensor, texts: Tensor) -> Tensor:
    """Whole frames in one pass each, every patch one token: cosines [C, T, N]."""
    return torch.einsum("ce,tne->ctn", texts, tower(_normalise(_visual(model), frames)))


def evaluate(model: nn.Module, tokenizer: Any, single: list[TrueClip], double: list[TrueClip]) -> dict[str, Any]:
    """All that the card says, on clips with one object and clips with two.

    object_patches                 of `patches` in a slot, mean
    patch_frames1, patch_frames2   `_judge` of the paper's scores, read off one or both frames of each tubelet
    truth_frames1                  of the truth of the first frame: what patch_frames1 could reach
    dense_...                      of one pass a frame, both frames
    two_objects                    `_judge_pairs`
    auc_by_wording, auc_by_color   both frames, by patch
    """
    wordings = [_word(clip.objects[0]) for clip in single]
    encode = _Encoder(model, tokenizer)
    scored = []
    for clip, worded in zip(tqdm(single, desc="scoring", unit="clip"), wordings, strict=True):
        scored.append(score_patches(model, clip.frames, encode([clip.captions[0], *worded.values()])))
    both = [_pool(scores[0], TUBELET) for scores in scored]
    by_wording = {
        wording: [
            area_under_curve(clip.truth(0), _pool(scores[1 + place], TUBELET))
            for clip, scores in zip(single, scored, strict=True)
        ]
        for place, wording in enumerate(wordings[0])
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
    """Texts → float32 [n, E], of length 1."""

    model: nn.Module
    tokenizer: Any

    @torch.inference_mode()
    def __call__(self, texts: list[str]) -> Tensor:
        embeddings: Tensor = self.model.encode_text(self.tokenizer(texts), normalize=True)  # type: ignore[operator]
        return embeddings


def _word(thing: MovingShape) -> dict[str, str]:
    """Ways to ask for an object, by what is left of its caption."""
    article = thing.caption.split()[0]
    return {
        "a COLOR SHAPE": f"{article} {thing.color} {thing.shape}",
        "a COLOR shape": f"{article} {thing.color} shape",
        "COLOR": thing.color,
        "the SHAPE": f"the {thing.shape}",
        "SHAPE": thing.shape,
        "a shape": "a shape",
    }


def _score_all_densely(
    model: nn.Module, encode: _Encoder, clips: list[TrueClip], kind: LastBlock
) -> list[NDArray[np.float32]]:
    tower = FrameTower(_visual(model), SIZE, SIZE, PATCH, kind)
    texts = encode([clip.captions[0] for clip in clips])
    return [
        _pool(score_densely(model, tower, clip.frames, text[None])[0], TUBELET)
        for clip, text in zip(clips, texts, strict=True)
    ]


def _judge(clips: list[TrueClip], scores: list[NDArray[np.float32]]) -> dict[str, float]:
    """`judge` of scores [S, N] of each clip, at the demo's ratio, against its first object's patches."""
    truths = [clip.truth(0) for clip in clips]
    return judge(truths, scores, DEMO.mask.masked_per_slot(truths[0].shape[1]))


def _judge_pairs(model: nn.Module, encode: _Encoder, clips: list[TrueClip]) -> dict[str, float]:
    """Areas under the ROC curve for either object's name, mean over the clips.

    first, second                    patches of the named object against the other's
    first_by_shape, second_by_shape  the same, named by the shape alone
    first_in_all, second_in_all      patches of the named object against all others
    """
    areas: dict[str, list[float | None]] = defaultdict(list)
    for clip in clips:
        texts = encode([*clip.captions, *(f"the {thing.shape}" for thing in clip.objects)])
        scores = [_pool(values, TUBELET) for values in score_patches(model, clip.frames, texts)]
        truths = [clip.truth(0), clip.truth(1)]
        either = truths[0] | truths[1]
        for number, name in enumerate(("first", "second")):
            areas[name].append(area_under_curve(truths[number][either], scores[number][either]))
            areas[f"{name}_by_shape"].append(area_under_curve(truths[number][either], scores[2 + number][either]))
            areas[f"{name}_in_all"].append(area_under_curve(truths[number], scores[number]))
    return {name: mean_of(values) for name, values in areas.items()}


def _pool(scores: Tensor, taken: int) -> NDArray[np.float32]:
    """[T, N] → [S, N]: mean over the first `taken` frames of each tubelet."""
    pooled: NDArray[np.float32] = scores.view(-1, TUBELET, scores.shape[-1])[:, :taken].mean(dim=1).numpy()
    return pooled


def _visual(model: nn.Module) -> VisionTransformer:
    visual = model.visual
    assert isinstance(visual, VisionTransformer)
    return visual


def _normalise(visual: VisionTransformer, frames: Tensor) -> Tensor:
    """uint8 [T, H, W, 3] → float32 [T, 3, H, W] as the model wants it."""
    config = visual.preprocess_cfg
    mean, std = torch.tensor(config["mean"]), torch.tensor(config["std"])
    return ((frames / 255 - mean) / std).permute(0, 3, 1, 2)
