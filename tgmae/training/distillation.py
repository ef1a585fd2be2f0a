"""Distil a student scorer from `patch` on the user's own clips, for `tgmae-engine distill`.

Dimensions: F frames, N patches per frame, n patches, P values of a raw patch, C captions, E embedding.
"""

from __future__ import annotations

import hashlib
import io
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dali_pipelines.open import open_pipeline
from engines.clip_model import CLIPModel, load_clip
from engines.config import TowerSpec
from engines.files import write_atomically
from engines.patch_similarity import make_patch_similarity
from engines.progress import progress_bar
from engines.torch_files import read_torch_file
from engines.towers.clip_towers import StudentTower
from engines.towers.student import load_student, read_about, save_student
from kernels.gather_tokens import gather_tokens
from tgmae.captions.clip_choice import advise_clip
from tgmae.captions.embeddings import CaptionEmbeddings
from tgmae.config.run import InputConfig
from tgmae.config.training import DistillConfig
from tgmae.data.manifest import Manifest
from tgmae.data.sampling import ClipSampler
from tgmae.masks.agreement import load_clips, mask_agreement, name_skipped, rank_correlation
from tgmae.masks.scorer import make_scorer
from tgmae.training.loader import InputStalled, start_input_thread, take_batch
from tgmae.training.process import Stopped, StopRequest, stop_requests

_SAVE_EVERY = 20  # rounds
_MAX_TEXTS = 256  # captions in the loss


def distill(
    config: InputConfig,
    manifest: Manifest,
    held_out: Manifest,
    out: Path,
    options: DistillConfig,
    device: torch.device,
) -> dict[str, float | int | str]:
    """Train a student, measure it on `held_out`, and write it to `out`; return the measurements.

    Every `_SAVE_EVERY` rounds the state goes to OUT.partial, from which a killed run resumes. A finished student is not
    trained again. Raises ValueError where a round has too few patches, where OUT.partial is damaged or `out` is another
    file, or where the pipeline cannot run here; OSError where a file cannot be written.
    """
    model, size = config.model, config.model.image_size
    clip = load_clip(config.clip)
    teacher = make_patch_similarity(clip, config.clip, TowerSpec(kind="patch"), model.patch_size, size, size, device)
    captions = CaptionEmbeddings(manifest, clip, config.clip.cache_dir, device)
    for note in filter(None, [advise_clip(clip.is_demos, manifest), captions.note]):
        print(note)
    torch.manual_seed(config.seed)  # after CLIP, which draws initial weights where open_clip has to be asked
    texts = captions.table
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
    about = {
        "settings": hashlib.sha256(settings.encode()).hexdigest()[:16],
        "checked": repr((held_out.fingerprint, options.check_clips, config.mask.ratio, config.mask.frames_per_tubelet)),
    }
    if (finished := _find_finished(out, partial, about["settings"])) is not None:
        if finished.get("checked") == about["checked"]:
            print(f"nothing to do: {out} was distilled with these settings; remove it to distill it again")
            return finished
        measured = finished | about | _measure(config, held_out, clip, out, options.check_clips, device)
        save_student(out, load_student(out, clip.fingerprint, model.patch_size), clip.fingerprint, measured)
        return measured
    if partial.exists():
        state = _load_state(partial)
        if state["settings"] == settings:
            fit.load_state(state)
            print(f"resuming from {partial}, round {fit.step // steps_per_round}")
        else:
            print(f"{partial} was made with other settings; starting over")
    first = fit.step // steps_per_round

    sampler = ClipSampler(
        manifest=manifest, data=replace(config.data, repeat=1), num_frames=model.num_frames,
        batch_size=options.clips, seed=config.seed, captions=config.captions,
    )  # fmt: skip
    pipeline = open_pipeline(options.pipeline, manifest, sampler, sampler.data, size, first, device)
    # A thread waits for the workers, so that this one can act on a signal while no batch comes.
    thread = start_input_thread(device)
    bar = progress_bar(
        range(first, options.rounds), initial=first, total=options.rounds, desc="distilling", unit="round"
    )
    losses: list[float] = []
    skipped: set[int] = set()
    try:
        with stop_requests() as stop:
            for number in bar:
                # One frame of each tubelet, since the other is nearly the same. The batch is held until the end of the
                # round, when the GPU has read it.
                try:
                    batch = take_batch(thread.submit(pipeline.next_batch), lambda: stop.requested)
                except InputStalled:
                    _save_state(partial, {"settings": settings, **fit.state()})
                    raise _stopped(stop, number, ", as no input came") from None
                name_skipped(batch, skipped)
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
                    raise _stopped(stop, number + 1)
    finally:
        pipeline.interrupt()
        thread.shutdown(wait=True, cancel_futures=True)
        pipeline.close()

    measured = {"patches": fit.step * options.batch, "steps": fit.step}
    save_student(out, tower.eval(), clip.fingerprint, measured)
    measured |= about | _measure(config, held_out, clip, out, options.check_clips, device)
    save_student(out, tower, clip.fingerprint, measured)
    partial.unlink(missing_ok=True)
    return measured


def _stopped(stop: StopRequest, rounds: int, why: str = "") -> Stopped:
    name = signal.Signals(stop.number).name
    return Stopped(stop.number, f"stopped by {name} after round {rounds}{why}; the same command resumes from there")


def _measure(
    config: InputConfig, held_out: Manifest, clip: CLIPModel, student: Path, num_clips: int, device: torch.device
) -> dict[str, float | int | str]:
    """Compare the student's masks with the teacher's on clips that it was not trained on."""
    batches = load_clips(config, held_out, num_clips, min(16, num_clips), device)
    captions = CaptionEmbeddings(held_out, clip, config.clip.cache_dir, device)
    scores = []
    for name in ("patch", "student"):
        mask = replace(config.mask, kind="tgm", scorer=name, student=student)
        scorer = make_scorer(replace(config, mask=mask), held_out, device, clip)
        scores.append(torch.cat([scorer(clips, captions(clips)).cpu() for clips in batches]))
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


def _find_finished(out: Path, partial: Path, settings: str) -> dict[str, float | int | str] | None:
    """Return the measurements of a student that these settings made, None where it is still to be made."""
    if not out.exists():
        return None
    measured: dict[str, float | int | str] = read_about(out)["measured"]  # raises for a file that is not a student
    if measured.get("settings") == settings:
        return measured
    if not partial.exists():
        print(f"{out} was distilled with other settings, and will be replaced")
    return None


def _load_state(path: Path) -> dict[str, Any]:
    try:
        state = read_torch_file(path)
    except ValueError as error:
        raise ValueError(f"{error}; remove it to distill from the start") from error
    if not isinstance(state, dict) or not {"settings", "step", "tower", "optimizer", "schedule"} <= state.keys():
        raise ValueError(f"{path} is not a state of tgmae-engine distill; remove it to distill from the start")
    return state


def _save_state(path: Path, state: dict[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()  # torch.save reports a full disk as an error of its own zip writer
    torch.save(state, buffer)
    try:
        write_atomically(path, buffer.getbuffer())
    except OSError as error:
        raise OSError(f"{path} could not be written: {error.strerror}; the same command resumes from there") from error


class Distillation:
    """Fits a student to pairs of patches and CLIP embeddings, step by step.

    The loss has two parts. The first is the squared error of the cosines between the patches of a batch and a set of
    text embeddings: masks are made of these. The second is one minus the cosine between student and teacher, which
    helps with texts that the student has not seen.

    num_steps   steps of the whole run; the learning rate follows half a cosine
    texts       float32 [C, E], the captions that scores are wanted for
    """

    def __init__(self, tower: StudentTower, texts: Tensor, num_steps: int, learning_rate: float) -> None:
        self.tower, self.texts, self.step, self.num_steps = tower.train(), texts, 0, num_steps
        self.optimizer = torch.optim.AdamW(tower.parameters(), lr=learning_rate, weight_decay=0.01)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, num_steps)

    def update(self, patches: Tensor, teacher: Tensor) -> float:
        """Take a step on normalised patches [n, P] and teacher embeddings [n, E]; return the loss."""
        student = self.tower(patches)
        # Only differences between patches move a mask, so the mean over the patches is subtracted first.
        wanted, given = ((x @ self.texts.T) for x in (teacher, student))
        spread = wanted.std(0, keepdim=True) + 1e-6
        centred = [(x - x.mean(0, keepdim=True)) / spread for x in (wanted, given)]
        loss = (centred[0] - centred[1]).square().mean() + (1 - (student * teacher).sum(-1)).mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        self.step += 1
        return float(loss.detach())

    def state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "tower": self.tower.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.tower.load_state_dict(state["tower"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])


def split_rows(count: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield shuffled row numbers in groups of `size`; the remainder is dropped."""
    order = torch.randperm(count, generator=generator)
    for start in range(0, count - size + 1, size):
        yield order[start : start + size]
