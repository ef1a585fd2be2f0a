"""Motion-guided masks, on motion that is known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from dali_pipelines.types import ClipBatch, CropBox
from dali_pipelines.video.motion import BLOCK, UNIT
from engines.config import CLIPConfig
from tests.support.videos import make_video
from tests.tgmae.masks.test_motion_field import batch, folder_of, request
from tgmae.config.data import DataConfig
from tgmae.config.masks import MaskConfig
from tgmae.config.model import ModelConfig
from tgmae.config.run import InputConfig
from tgmae.data.manifest import Manifest, read_manifest
from tgmae.data.sampling import ClipSampler
from tgmae.masks.maps.build_motion import build_motion
from tgmae.masks.motion_scorer import MotionScorer
from tgmae.masks.scorer import bind_scorer
from tgmae.masks.select import select_masks
from tgmae.presets import PRESETS
from tgmae.shapes.judge import judge
from tgmae.shapes.scenes import make_shapes
from tgmae.shapes.truth import object_coverage, read_objects

CPU = torch.device("cpu")
SIDE = 8  # patches
MODEL = ModelConfig(image_size=SIDE * 16, num_frames=8)
SLOTS = 4
PIXELS = SIDE * BLOCK  # of the test's videos: a cell is a patch
VIDEO = make_video(width=PIXELS, height=PIXELS)


def config(folder: Path, kind: str, ratio: float = 0.25) -> InputConfig:
    mask = MaskConfig(kind=kind, ratio=ratio, motion=folder)  # type: ignore[arg-type]
    return InputConfig(model=MODEL, mask=mask, data=DataConfig(stride=2))


def scorer_of(tmp_path: Path, motion: NDArray[np.int8], kind: str, ratio: float = 0.25) -> MotionScorer:
    """For one video of 8×8 cells, of which a clip shows all."""
    video = make_video(width=PIXELS, height=PIXELS, num_frames=len(motion))
    manifest = folder_of(tmp_path, [video], [motion])
    return MotionScorer(config(tmp_path / "motion", kind, ratio), manifest, CPU)


def clip(flip: bool = False, mask_seed: int = 0, start: int = 3) -> ClipBatch:
    whole = CropBox(x=0, y=0, width=PIXELS, height=PIXELS)
    return batch([VIDEO], request(0, range(start, start + 16, 2), whole, flip, mask_seed))


def masked(scores: Tensor, ratio: float = 0.25) -> NDArray[np.bool_]:
    """Which patches are masked: bool [S, rows, columns] of the first clip."""
    plan = select_masks(MaskConfig(ratio=ratio), MODEL, scores)
    hidden = np.zeros(SLOTS * SIDE**2, bool)
    hidden[plan.masked[0]] = True
    return hidden.reshape(SLOTS, SIDE, SIDE)


def moving_block(velocity: tuple[float, float], frames: int = 30) -> NDArray[np.int8]:
    """A 4×4 block of cells moves, in pixels a frame; its corner lies at cell (2, 3) in frame 4; the rest is still."""
    motion = np.zeros((frames, 2, SIDE, SIDE), np.int8)
    for number in range(frames):
        x, y = (round(start + (number - 4) * v / BLOCK) for start, v in zip((2, 3), velocity, strict=True))
        for axis in range(2):
            motion[number, axis, max(y, 0) : max(y + 4, 0), max(x, 0) : max(x + 4, 0)] = velocity[axis] / UNIT
    return motion


def test_mgm_masks_what_moves(tmp_path: Path) -> None:
    motion = np.zeros((30, 2, SIDE, SIDE), np.int8)
    motion[:, :, 1:7, 1:8] = [[[3 / UNIT]], [[4 / UNIT]]]  # 5 pixels a frame
    scorer = scorer_of(tmp_path, motion, "mgm")
    scores = scorer(clip())
    assert torch.equal(scores, scorer(clip()))
    assert scores.shape == (1, SLOTS, SIDE**2)
    speed = scores.view(SLOTS, SIDE, SIDE)
    # Away from the block's border, which bilinear reading blurs.
    np.testing.assert_allclose(speed[:, 3:6, 4:7], 5, atol=2e-3)
    np.testing.assert_allclose(speed[:, :, 0], speed[:, :, 0].clamp(max=2.6))
    assert masked(scores)[:, 1:7, 1:8].sum() == SLOTS * 16


@pytest.mark.parametrize("kind", ["mgm", "mgm_box", "mgmae"])
def test_a_flipped_clip_has_a_flipped_mask(kind: str, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    coarse = generator.integers(-24, 24, (30, 2, SIDE, SIDE)).astype(np.int8)
    scorer = scorer_of(tmp_path, coarse, kind)
    if kind == "mgmae":  # its bumps are drawn in the flipped clip: draw them mirrored for the other one
        drawn = scorer._bump_centres

        def mirrored(field, clips):  # type: ignore[no-untyped-def]
            centres = drawn(field, clips).clone()
            flipped = torch.where(field.flips[:, None], 1 - centres[..., 0], centres[..., 0])
            return torch.stack([flipped, centres[..., 1]], -1)

        scorer._bump_centres = mirrored  # type: ignore[method-assign]
    plain, flipped = (scorer(clip(flip)).view(SLOTS, SIDE, SIDE) for flip in (False, True))
    np.testing.assert_allclose(flipped, plain.flip(2), atol=5e-3 if kind != "mgm_box" else 1e-4)
    assert not np.allclose(flipped, plain, atol=5e-3)


def test_still_patches_are_drawn_by_lot(tmp_path: Path) -> None:
    scorer = scorer_of(tmp_path, np.zeros((30, 2, SIDE, SIDE), np.int8), "mgm")
    share = np.mean([masked(scorer(clip(mask_seed=seed))) for seed in range(60)], axis=(0, 1))
    assert share.min() > 0.1
    assert share.max() < 0.4
    assert (masked(scorer(clip(mask_seed=1))) != masked(scorer(clip(mask_seed=2)))).any()


def test_a_box_without_motion_is_drawn_by_lot(tmp_path: Path) -> None:
    scorer = scorer_of(tmp_path, np.zeros((30, 2, SIDE, SIDE), np.int8), "mgm_box")
    boxes = {masked(scorer(clip(mask_seed=seed))).tobytes() for seed in range(20)}
    assert len(boxes) > 5
    assert torch.equal(scorer(clip(mask_seed=3)), scorer(clip(mask_seed=3)))


@pytest.mark.parametrize("kind", ["mgm_box", "mgmae"])
def test_a_repeated_frame_carries_nothing_on(kind: str, tmp_path: Path) -> None:
    """A video that ends after three of eight frames: from then on the picture stands, and so does the mask."""
    scorer = scorer_of(tmp_path, moving_block((3.0, 2.0)), kind)
    whole = CropBox(x=0, y=0, width=PIXELS, height=PIXELS)
    scores = scorer(batch([VIDEO], request(0, (1, 5, 9, 9, 9, 9, 9, 9), whole)))
    assert not torch.equal(scores[0, 0], scores[0, 2])
    torch.testing.assert_close(scores[0, 2], scores[0, 3], rtol=0, atol=1e-6)
    moving = scorer(batch([VIDEO], request(0, range(1, 17, 2), whole)))
    assert not torch.allclose(moving[0, 0], moving[0, 2], atol=1e-3)


def test_the_box_rides_on_the_motion(tmp_path: Path) -> None:
    """Three pixels a frame right and two up, at stride 2 and two frames a slot."""
    scorer = scorer_of(tmp_path, moving_block((3.0, -2.0)), "mgm_box")
    hidden = masked(scorer(clip()))
    centres = []
    for slot in range(SLOTS):
        rows, columns = np.nonzero(hidden[slot])
        assert (rows.max() - rows.min(), columns.max() - columns.min()) == (3, 3)  # sixteen patches: a 4×4 box
        centres.append((columns.mean(), rows.mean()))
    # In frame 3, the clip's first, the block's middle is at (3.5, 4.5): four patches are fastest. Then 12 pixels right
    # and 8 up a slot.
    np.testing.assert_allclose(centres[0], (3.5, 4.5), atol=1)
    np.testing.assert_allclose(np.subtract(centres[3], centres[0]), (2.25, -1.5), atol=0.8)


@pytest.mark.parametrize("velocity", [(9.0, 0.0), (-9.0, 5.0), (0.0, -9.0)])
def test_the_box_stays_inside(velocity: tuple[float, float], tmp_path: Path) -> None:
    hidden = masked(scorer_of(tmp_path, moving_block(velocity), "mgm_box")(clip()))
    assert (hidden.sum((1, 2)) == 16).all()
    for slot in hidden:
        rows, columns = np.nonzero(slot)
        assert (np.ptp(rows), np.ptp(columns)) == (3, 3)


def bumps(centres: NDArray[np.float64], shift: tuple[float, float]) -> NDArray[np.float64]:
    """Mean over a patch's four points of MGMAE's map, seen `shift` pixels away: [rows, columns]."""
    out = np.empty((SIDE, SIDE))
    for row, column in np.ndindex(SIDE, SIDE):
        values = []
        for dy in (4, 12):
            for dx in (4, 12):
                here = np.array([column * 16 + dx, row * 16 + dy], float)
                there = here - shift
                place = there if ((there >= 0) & (there <= PIXELS)).all() else here
                values.append(np.exp(-(((centres - place) ** 2).sum(1) / 16.0**2)).max())
        out[row, column] = np.mean(values)
    return out


@pytest.mark.parametrize("velocity", [(0.0, 0.0), (2.0, 0.0), (-1.5, 1.0)])
def test_bumps_are_carried_along(velocity: tuple[float, float], tmp_path: Path) -> None:
    """Under even motion the map of a frame is the middle frame's, shifted; what comes from outside is the map there."""
    motion = np.tile((np.array(velocity) / UNIT).astype(np.int8)[:, None, None], (30, 1, SIDE, SIDE))
    scorer = scorer_of(tmp_path, motion, "mgmae", 0.75)
    scores = scorer(clip(mask_seed=5)).view(SLOTS, SIDE, SIDE)
    drawn = np.random.default_rng(5).permutation(SIDE**2)[: SIDE**2 // 4]
    centres = np.stack([drawn % SIDE * 16 + 8, drawn // SIDE * 16 + 8], 1).astype(float)
    for slot in range(SLOTS):
        frames = (2 * slot, 2 * slot + 1)
        maps = [bumps(centres, tuple((frame - 4) * 2 * v for v in velocity)) for frame in frames]  # type: ignore[arg-type]
        np.testing.assert_allclose(-scores[slot], np.mean(maps, axis=0), atol=2e-4)
    if velocity == (0.0, 0.0):
        visible = ~masked(scores.view(1, SLOTS, -1), 0.75)
        assert (visible == visible[0]).all()
        assert visible[0][drawn // SIDE, drawn % SIDE].mean() > 0.7  # bumps beside each other win over lone ones


def test_masks_depend_on_their_own_clip_only(tmp_path: Path) -> None:
    generator = np.random.default_rng(3)
    videos = [make_video(path=f"{n}.mp4", width=w, height=h) for n, (w, h) in enumerate([(160, 120), (64, 200)])]
    motion = [
        generator.integers(-30, 30, (40, 2, -(-video.height // 16), -(-video.width // 16))).astype(np.int8)
        for video in videos
    ]
    manifest = folder_of(tmp_path, videos, motion)
    crop = CropBox(x=4, y=2, width=50, height=60)
    requests = [request(0, range(0, 32, 4), crop, mask_seed=1), request(1, range(5, 21, 2), crop, True, mask_seed=2)]
    for kind in ("mgm", "mgm_box", "mgmae"):
        scorer = MotionScorer(config(tmp_path / "motion", kind), manifest, CPU)
        together = scorer(batch(manifest, *requests))
        for number, one in enumerate(requests):
            assert torch.equal(scorer(batch(manifest, one))[0], together[number])


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["mgm", "mgm_box", "mgmae"])
def test_a_gpu_scores_alike(kind: str, tmp_path: Path) -> None:
    motion = np.random.default_rng(4).integers(-30, 30, (30, 2, SIDE, SIDE)).astype(np.int8)
    manifest = folder_of(tmp_path, [make_video(width=PIXELS, height=PIXELS, num_frames=30)], [motion])
    on_cpu, on_gpu = (
        MotionScorer(config(tmp_path / "motion", kind), manifest, torch.device(name))(clip())
        for name in ("cpu", "cuda")
    )
    assert on_gpu.is_cuda
    np.testing.assert_allclose(on_gpu.cpu(), on_cpu, atol=1e-3)


# The paper's motivation: motion finds what moves before a still camera, and the background where the camera moves


def judged(manifest: Manifest, kind: str, cache_dir: Path) -> dict[str, float]:
    demo = PRESETS["demo"]
    mask = replace(demo.mask, kind=kind, motion=manifest.root / "motion")  # type: ignore[arg-type]
    settings = InputConfig(
        model=demo.model, data=replace(demo.data, split=""), mask=mask,
        clip=CLIPConfig(model="shapes", cache_dir=cache_dir),
    )  # fmt: skip
    from dali_pipelines.pyav_pipeline import PyavPipeline

    plan = ClipSampler(manifest=manifest, data=settings.data, num_frames=8, batch_size=len(manifest), seed=0)
    clips = PyavPipeline(manifest, plan, 96).next_batch()
    assert not clips.skipped
    scores = bind_scorer(settings, manifest, CPU)(clips).numpy()
    objects = read_objects(manifest.root)
    truth = [
        object_coverage(objects[manifest[request.row].path][0], request, 96, 16, 2) >= 0.5 for request in clips.requests
    ]
    return judge(truth, list(scores), mask.masked_per_slot(36))


@pytest.mark.slow
def test_a_panning_camera_defeats_motion_and_not_text(tmp_path: Path, cache_dir: Path) -> None:
    found: dict[tuple[str, str], dict[str, float]] = {}
    for camera in ("still", "panning"):
        folder = tmp_path / camera
        make_shapes(folder, count=24, seed=11, codec="h264", num_objects=1, num_workers=1, camera=camera)  # type: ignore[arg-type]
        manifest = read_manifest(folder / "manifest.parquet")
        build_motion(manifest, folder / "motion", 0)
        for kind in ("mgm", "mgm_box", "tgm"):
            found[camera, kind] = judged(manifest, kind, cache_dir)
    assert found["still", "mgm"]["masked_top"] > 0.95
    assert found["still", "mgm"]["auc_slot"] > 0.9
    assert found["still", "mgm_box"]["masked_top"] > 0.8
    assert found["panning", "mgm"]["auc_slot"] < 0.4
    assert found["panning", "mgm"]["masked_top"] < 0.4  # random masks: .58
    for camera in ("still", "panning"):
        assert found[camera, "tgm"]["auc_slot"] > 0.95
        assert found[camera, "tgm"]["masked_top"] > 0.97
