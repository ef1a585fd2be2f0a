"""Distil a student scorer from `patch` on the user's own clips: `tgmae-engine distill`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from engines.clip import load_clip
from engines.features import make_features
from engines.student import Distillation, save_student, split_rows
from engines.towers import StudentTower
from kernels.gather_tokens import gather_tokens
from tgmae.config import DistillConfig, InputConfig
from tgmae.files import replacing
from tgmae.loader import make_pipeline
from tgmae.manifest import Manifest
from tgmae.sampling import ClipSampler
from tgmae.scoring.agreement import load_clips, mask_agreement, rank_correlation
from tgmae.scoring.captions import CaptionEmbeddings
from tgmae.scoring.choose import make_scorer
from tgmae.stopping import stop_requests

_SAVE_EVERY = 20  # rounds
_MAX_TEXTS = 256  # captions that the loss looks at


def distill(
    config: InputConfig,
    manifest: Manifest,
    held_out: Manifest,
    out: Path,
    options: DistillConfig,
    device: torch.device,
) -> dict[str, float | int | str]:
    """Train, measure on `held_out`, and write the student; returns what was measured.

    Every `_SAVE_EVERY` rounds the state goes to OUT.partial, from which a killed run goes on.
    """
    torch.manual_seed(config.seed)
    model, size = config.model, config.model.image_size
    clip = load_clip(config.clip)
    teacher = make_features(
        clip, config.clip, replace(config.mask, scorer="patch"), model.patch_size, size, size, device
    )
    texts = CaptionEmbeddings(manifest, clip, config.clip.cache_dir, device).table
    texts = texts[torch.randperm(len(texts))[:_MAX_TEXTS].to(device)]
    tower = StudentTower(model.patch_size, options.hidden, texts.shape[1]).to(device)
    steps_per_round = options.clips * model.num_slots * model.patches_per_slot // options.batch
    if not steps_per_round:
        raise ValueError(
            f"a round has {options.clips * model.num_slots * model.patches_per_slot} patches, fewer than --batch "
            f"{options.batch}; lower it or raise --clips"
        )
    fit = Distillation(tower, texts, options.rounds * steps_per_round, options.learning_rate)
    partial = out.with_name(out.name + ".partial")
    settings = repr(
        (clip.fingerprint, manifest.fingerprint, replace(options, check_clips=1), config.data, config.clip, model,
         config.seed)
    )  # fmt: skip
    if partial.exists():
        state = torch.load(partial, weights_only=True)
        if state["settings"] == settings:
            fit.load_state(state)
            print(f"going on from {partial}, round {fit.step // steps_per_round}")
        else:
            print(f"{partial} was begun with other settings; starting over")
    first = fit.step // steps_per_round

    plan = ClipSampler(
        manifest=manifest, data=replace(config.data, repeat=1), num_frames=model.num_frames,
        batch_size=options.clips, seed=config.seed,
    )  # fmt: skip
    pipeline = make_pipeline(replace(config, data=plan.data), options.pipeline, manifest, plan, first, device)
    bar = tqdm(range(first, options.rounds), initial=first, total=options.rounds, desc="distilling", unit="round")
    losses: list[float] = []
    try:
        with stop_requests() as stop:
            for number in bar:
                # One frame of each tubelet: the other is nearly the same.
                batch = pipeline.next_batch()  # held to the end of the round, whose losses wait for the GPU
                frames = batch.frames[:, :: model.tubelet_size].flatten(0, 1).to(device)
                patches = _patches(frames, model.patch_size, clip.mean, clip.std)
                wanted = teacher.embed(frames).float().flatten(0, 1)
                generator = torch.Generator().manual_seed(number + config.seed * options.rounds)
                for rows in split_rows(len(patches), options.batch, generator):
                    losses.append(fit.update(patches[rows.to(device)], wanted[rows.to(device)].clone()))
                bar.set_postfix_str(f"loss {sum(losses[-50:]) / len(losses[-50:]):.4f}")
                if (number + 1) % _SAVE_EVERY == 0 or stop.requested:
                    _save_state(partial, {"settings": settings, **fit.state()})
                if stop.requested:
                    raise KeyboardInterrupt
    finally:
        pipeline.close()

    measured: dict[str, float | int | str] = {"patches": fit.step * options.batch, "steps": fit.step}
    save_student(out, tower.eval(), clip.fingerprint, measured)
    measured |= _measure(config, held_out, out, options.check_clips, device)
    save_student(out, tower, clip.fingerprint, measured)
    partial.unlink(missing_ok=True)
    return measured


def _measure(
    config: InputConfig, held_out: Manifest, student: Path, num_clips: int, device: torch.device
) -> dict[str, float | int | str]:
    """Agreement of the student's masks with the teacher's on clips it was not trained on."""
    batches = load_clips(config, held_out, num_clips, min(16, num_clips), device)
    scores = []
    for scorer in ("patch", "student"):
        mask = replace(config.mask, kind="tgm", scorer=scorer, student=student)
        score = make_scorer(replace(config, mask=mask), held_out, device)
        scores.append(torch.cat([score(clips).cpu() for clips in batches]))
    k = config.mask.masked_per_slot(config.model.patches_per_slot)
    share = mask_agreement(scores[1], scores[0], k)
    return {
        "agreement": float(share.mean()),
        "agreement_p5": float(share.flatten().quantile(0.05)),
        "rank_correlation": float(rank_correlation(scores[1], scores[0]).mean()),
        "ratio": config.mask.ratio,
        "check_clips": len(scores[0]),
    }


def _patches(
    frames: Tensor, patch_size: int, mean: tuple[float, float, float], std: tuple[float, float, float]
) -> Tensor:
    """uint8 [F, H, W, 3] → normalised raw patches float32 [F·N, P]."""
    return gather_tokens(frames[:, None], None, patch_size, 1, torch.float32, mean, std).flatten(0, 1)


def _save_state(path: Path, state: dict[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        torch.save(state, temporary)
