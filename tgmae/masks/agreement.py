"""Measure how well each scorer's masks agree with those of `patch`, the paper's scorer, and what each costs.

Dimensions: B clips, S slots, N patches per slot, k masked patches per slot.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from tqdm import tqdm

from dali_pipelines.pyav_pipeline import PyavPipeline
from dali_pipelines.types import ClipBatch
from engines.clip_model import CLIPModel, load_clip
from engines.patch_similarity import make_tower
from engines.progress import progress_bar
from kernels.topk_mask import topk_mask
from tgmae.captions.embeddings import CaptionEmbeddings
from tgmae.config.masks import MaskConfig
from tgmae.config.model import ModelConfig
from tgmae.config.run import InputConfig
from tgmae.data.manifest import Manifest
from tgmae.data.sampling import ClipSampler
from tgmae.masks.scorer import Scorer, make_scorer
from tgmae.telemetry.flops import count_flops

_ROUNDS = 3


@dataclass(frozen=True, kw_only=True)
class ScorerReport:
    """One scorer compared with `patch` on the same clips. The mean and the 5th percentile are over slots."""

    name: str
    agreement: float  # |masked by both| / k, mean
    agreement_p5: float
    rank_correlation: float  # Spearman's, mean
    gflop_per_clip: float  # floating-point operations of the engine; 0 for cached
    clips_per_s: tuple[float, ...]  # in each of three rounds, with the clips in memory


def variants(config: InputConfig) -> dict[str, MaskConfig]:
    """Return the scorers that can be compared: `cached` and `student` only where `config.mask` names their files."""
    mask = replace(config.mask, kind="tgm", order="top")
    found = {"patch": replace(mask, scorer="patch")}
    if mask.frames_per_tubelet > 1:
        found["patch, first frame"] = replace(mask, scorer="patch", frames_per_tubelet=1)
    for last_block in ("maskclip", "sclip", "clearclip", "naclip"):
        found[f"dense, {last_block}"] = replace(mask, scorer="dense", dense=last_block)
    if mask.student is not None:
        found["student"] = replace(mask, scorer="student")
    if mask.scores is not None:
        found["cached"] = replace(mask, scorer="cached")
    return found


def load_clips(
    config: InputConfig, manifest: Manifest, num_clips: int, batch: int, device: torch.device
) -> list[ClipBatch]:
    """Decode the first clips that training would draw, on `device`; `num_clips` is rounded up to whole batches.

    Videos that cannot be read are named; copies of readable clips stand in their places.
    """
    sampler = ClipSampler(
        manifest=manifest, data=replace(config.data, repeat=1), num_frames=config.model.num_frames, batch_size=batch,
        seed=config.seed, captions=config.captions,
    )  # fmt: skip
    pipeline = PyavPipeline(manifest, sampler, config.model.image_size)
    batches = []
    skipped: set[int] = set()
    for _ in progress_bar(range(-(-num_clips // batch)), desc="decoding", unit="batch"):
        clips = pipeline.next_batch()
        name_skipped(clips, skipped)
        batches.append(replace(clips, frames=clips.frames.to(device)))
    return batches


def name_skipped(clips: ClipBatch, known: set[int]) -> None:
    """Name the videos of a batch that could not be read, once each; `known` rows are added to."""
    for video in clips.skipped:
        if video.row not in known:
            known.add(video.row)
            tqdm.write(f"skipped {video.path}: {video.reason}")


def compare_scorers(
    config: InputConfig, manifest: Manifest, batches: Sequence[ClipBatch], device: torch.device
) -> tuple[list[ScorerReport], dict[str, Tensor]]:
    """Return a report for each of `variants(config)`, and its scores, float32 [clips, S, N] on the CPU."""
    masks, clip = variants(config), load_clip(config.clip)
    captions = CaptionEmbeddings(manifest, clip, config.clip.cache_dir, device)
    texts = [captions(clips) for clips in batches]
    scorers = {name: make_scorer(replace(config, mask=mask), manifest, device, clip) for name, mask in masks.items()}
    for note in {captions.note, *(scorer.note for scorer in scorers.values())} - {""}:
        print(note)
    seconds: dict[str, list[float]] = {name: [] for name in masks}
    scores: dict[str, Tensor] = {}
    for _ in range(_ROUNDS):  # interleaved, so that a slow moment of the machine affects all scorers
        for name, scorer in progress_bar(scorers.items(), desc="scoring", unit="scorer"):
            spent, scores[name] = _score(scorer, batches, texts, device)
            seconds[name].append(spent)
    num_clips = sum(len(clips.requests) for clips in batches)
    k = config.mask.masked_per_slot(config.model.patches_per_slot)
    reports = []
    for name, mask in masks.items():
        share = mask_agreement(scores[name], scores["patch"], k)
        reports.append(
            ScorerReport(
                name=name,
                agreement=float(share.mean()),
                agreement_p5=float(share.flatten().quantile(0.05)),
                rank_correlation=float(rank_correlation(scores[name], scores["patch"]).mean()),
                gflop_per_clip=count_gflop(clip, config.model, mask),
                clips_per_s=tuple(num_clips / spent for spent in seconds[name]),
            )
        )
    return reports, scores


def mask_agreement(scores: Tensor, reference: Tensor, k: int) -> Tensor:
    """Return |top-k of both| / k for each slot: twice [B, S, N] → [B, S]."""
    chosen = []
    for x in (scores, reference):
        _, masked = topk_mask(x.float(), k)
        chosen.append(torch.zeros(x.shape, dtype=torch.bool).flatten(1).scatter(1, masked.long(), True).view(x.shape))
    return (chosen[0] & chosen[1]).sum(-1) / k


def rank_correlation(scores: Tensor, reference: Tensor) -> Tensor:
    """Return Spearman's rank correlation per slot: twice [B, S, N] → [B, S]; 0 where all scores of a slot are equal."""
    ranks = [torch.stack([_ranks(clip) for clip in x]) for x in (scores, reference)]
    centred = [x - x.mean(-1, keepdim=True) for x in ranks]
    return torch.cosine_similarity(centred[0], centred[1], dim=-1)


def _ranks(scores: Tensor) -> Tensor:
    """Rank each patch in its slot, [S, N] → [S, N]; equal scores share the mean of their ranks."""
    one, other = scores[:, :, None], scores[:, None, :]
    return (one > other).sum(-1) + 0.5 * (one == other).sum(-1)


def count_gflop(clip: CLIPModel, model: ModelConfig, mask: MaskConfig) -> float:
    """Floating-point operations of a scorer's tower for one clip, in 1e9; a multiply-add counts as two."""
    if mask.scorer == "cached":
        return 0.0
    tower = make_tower(clip, mask.tower(), model.patch_size, model.image_size, model.image_size).eval()
    with torch.inference_mode():
        flops = count_flops(lambda: tower(torch.zeros(1, *tower.input_shape)))
    per_frame = 1 if mask.scorer == "dense" else model.patches_per_slot
    frames = model.num_slots * mask.frames_per_tubelet
    return float(flops) * per_frame * frames / 1e9


def _score(
    scorer: Scorer, batches: Sequence[ClipBatch], texts: Sequence[Tensor], device: torch.device
) -> tuple[float, Tensor]:
    """Return the seconds it took, and scores float32 [clips, S, N] on the CPU."""
    started = time.perf_counter()
    scores = [scorer(clips, text) for clips, text in zip(batches, texts, strict=True)]
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started, torch.cat([x.cpu() for x in scores])
