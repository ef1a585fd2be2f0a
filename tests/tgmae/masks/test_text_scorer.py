"""Scores are what one gets by really enlarging every patch, encoding it with open_clip and comparing it with the text.

Dimensions: B clips, T frames, F frames, S slots, N patches a slot, L tokens of CLIP, D width.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from dali_pipelines.pyav_pipeline import PyavPipeline
from dali_pipelines.types import Caption, ClipBatch
from engines.clip_model import CLIPModel, load_clip
from engines.config import CLIPConfig
from engines.open_clip_model import OpenCLIP
from engines.towers.clip_towers import FrameTower
from tests.support.videos import clip_batch
from tgmae.config.data import DataConfig
from tgmae.config.masks import MaskConfig
from tgmae.config.model import ModelConfig
from tgmae.config.run import InputConfig
from tgmae.data.manifest import Manifest, read_manifest
from tgmae.data.sampling import ClipSampler
from tgmae.masks import text_scorer
from tgmae.masks.scorer import BoundScorer, bind_scorer
from tgmae.masks.select import select_masks
from tgmae.training.loader import Loader

CPU = torch.device("cpu")
SIZE, PATCH, SIDE, SLOTS = 96, 16, 6, 4
LAST_BLOCKS = ("maskclip", "sclip", "clearclip", "naclip")
CAPTIONS = ("a red circle moving left", "a blue star spinning")


# The naive way: PIL resizes, open_clip encodes


def resize(picture: NDArray[np.float32], height: int, width: int) -> NDArray[np.float32]:
    """Bicubic by PIL in floating point, channel by channel: [H, W, C] → [height, width, C]."""
    planes = [
        np.asarray(Image.fromarray(np.ascontiguousarray(plane)).resize((width, height), Image.Resampling.BICUBIC))
        for plane in np.moveaxis(picture, -1, 0)
    ]
    return np.stack(planes, axis=-1)


def resize_bytes(picture: NDArray[np.uint8], height: int, width: int) -> NDArray[np.float32]:
    """As CLIP's own preprocessing does it: PIL on 8-bit pixels, rounded and clipped."""
    return np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC), np.float32)


def embed_text(clip: CLIPModel, caption: str) -> NDArray[np.float64]:
    with torch.inference_mode():
        raw = clip.model.encode_text(open_clip.get_tokenizer("ViT-B-32")([caption]))[0]  # type: ignore[operator]
    text: NDArray[np.float64] = raw.double().numpy()
    return text / np.linalg.norm(text)


def score_naively(
    clip: CLIPModel, frames: torch.Tensor, captions: list[str], patch: int = PATCH, as_bytes: bool = False
) -> NDArray[np.float64]:
    """uint8 [F, H, W, 3] and a caption a frame → cosines [F, N], one patch after another."""
    size = clip.visual.image_size
    height, width = size if isinstance(size, tuple) else (size, size)
    images = []
    for frame in frames.numpy():
        for y in range(0, frame.shape[0], patch):
            for x in range(0, frame.shape[1], patch):
                piece = frame[y : y + patch, x : x + patch]
                large = (
                    resize_bytes(np.ascontiguousarray(piece), height, width)
                    if as_bytes
                    else resize(piece.astype(np.float32), height, width)
                )
                images.append((large / 255 - np.array(clip.mean)) / np.array(clip.std))
    pixels = torch.from_numpy(np.stack(images)).float().permute(0, 3, 1, 2)
    with torch.inference_mode():
        raw = torch.cat([clip.model.encode_image(some) for some in pixels.split(64)]).double().numpy()  # type: ignore[operator]
    images_by_frame = (raw / np.linalg.norm(raw, axis=1, keepdims=True)).reshape(len(frames), -1, raw.shape[1])
    texts = {caption: embed_text(clip, caption) for caption in set(captions)}
    return np.stack([of_frame @ texts[text] for of_frame, text in zip(images_by_frame, captions, strict=True)])


def same_share(ours: torch.Tensor, theirs: NDArray[np.float64], k: int) -> float:
    """Of all tokens, the share that both mask or both leave; [..., N] each."""
    hidden = []
    for scores in (ours.double().numpy(), theirs):
        mask = np.zeros(scores.shape, bool)
        np.put_along_axis(mask, np.argsort(-scores, axis=-1, kind="stable")[..., :k], True, axis=-1)
        hidden.append(mask)
    return float((hidden[0] == hidden[1]).mean())


# Clips of the shapes data


@pytest.fixture(scope="module")
def clip() -> CLIPModel:
    return load_clip(CLIPConfig(model="shapes"))


@pytest.fixture(scope="module")
def manifest(shapes: Path) -> Manifest:
    """The training clips, each with a second caption that is wrong."""
    whole = read_manifest(shapes).select_split("train")
    return whole.with_captions([[captions[0], Caption(CAPTIONS[1], "test")] for captions in whole.captions()])


@pytest.fixture(scope="module")
def config(cache_dir: Path) -> InputConfig:
    return InputConfig(
        model=ModelConfig(image_size=SIZE, num_frames=8),
        data=DataConfig(stride=4, flip=True),
        clip=CLIPConfig(model="shapes", cache_dir=cache_dir),
    )


@pytest.fixture(scope="module")
def clips(manifest: Manifest, config: InputConfig) -> ClipBatch:
    """Four clips; both captions and both sides occur."""
    plan = ClipSampler(manifest=manifest, data=config.data, num_frames=8, batch_size=4, seed=0)
    batch = PyavPipeline(manifest, plan, SIZE).next_batch()
    assert {request.caption for request in batch.requests} == {0, 1}
    assert {request.flip for request in batch.requests} == {False, True}
    return batch


@pytest.fixture(scope="module")
def naive(clip: CLIPModel, manifest: Manifest, clips: ClipBatch) -> NDArray[np.float64]:
    """Cosines of every frame [B, T, N]."""
    captions = [manifest[request.row].texts[request.caption] for request in clips.requests for _ in range(8)]
    return score_naively(clip, clips.frames.flatten(0, 1), captions).reshape(4, 8, -1)


def make(config: InputConfig, manifest: Manifest, **mask: object) -> BoundScorer:
    return bind_scorer(replace(config, mask=MaskConfig(**mask)), manifest, CPU)  # type: ignore[arg-type]


# patch


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_patch_equals_enlarging_and_encoding(
    config: InputConfig, manifest: Manifest, clips: ClipBatch, naive: NDArray[np.float64], count: int
) -> None:
    """One frame a tubelet is its first, two are their mean; each clip with its own caption."""
    scores = make(config, manifest, frames_per_tubelet=count)(clips)
    expected = naive.reshape(4, SLOTS, 2, -1)[:, :, :count].mean(2)
    assert (scores.dtype, tuple(scores.shape)) == (torch.float32, (4, SLOTS, SIDE**2))
    np.testing.assert_allclose(scores.numpy(), expected, rtol=0, atol=1e-4)
    assert same_share(scores, expected, k=21) >= 0.999
    assert expected.std() > 0.02  # a tolerance of 1e-4 means something


def test_the_two_frames_of_a_tubelet_differ(naive: NDArray[np.float64]) -> None:
    """So that the test above would see which one was taken."""
    first, second = naive.reshape(4, SLOTS, 2, -1)[:, :, 0], naive.reshape(4, SLOTS, 2, -1)[:, :, 1]
    assert np.abs(first - second).max() > 0.01


@pytest.mark.slow
def test_patch_with_the_real_network(config: InputConfig, manifest: Manifest, clips: ClipBatch) -> None:
    """ViT-B/32 with QuickGELU at its own 224², weights drawn at random: 16 patches of one frame."""
    torch.manual_seed(0)
    model = open_clip.create_model("ViT-B-32-quickgelu").eval().requires_grad_(False)
    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    big = CLIPModel.of(OpenCLIP(model=model, tokenizer=tokenizer, mean=mean, std=std))
    assert big.visual.image_size == (224, 224)
    config = replace(
        config, model=replace(config.model, image_size=64, num_frames=2), mask=MaskConfig(frames_per_tubelet=1)
    )
    one = clip_batch(clips.frames[:1, :2, 16:80, 16:80].contiguous(), clips.requests[:1], manifest)
    scores = bind_scorer(config, manifest, CPU, big)(one)[0]
    request = one.requests[0]
    expected = score_naively(big, one.frames[0, :1], [manifest[request.row].texts[request.caption]])
    np.testing.assert_allclose(scores.numpy(), expected, rtol=0, atol=1e-4)
    assert same_share(scores, expected, k=9) >= 0.999
    assert np.ptp(expected) > 0.005


def test_resizing_8_bit_pixels_changes_little(
    clip: CLIPModel,
    manifest: Manifest,
    clips: ClipBatch,
    naive: NDArray[np.float64],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """CLIP's own preprocessing rounds and clips the enlarged pixels to 8 bits; the fold cannot. How far that leads."""
    captions = [manifest[request.row].texts[request.caption] for request in clips.requests for _ in range(8)]
    rounded = score_naively(clip, clips.frames.flatten(0, 1), captions, as_bytes=True).reshape(naive.shape)
    share = same_share(torch.from_numpy(naive), rounded, k=21)
    # The worst pictures for it: black and white blocks of 4², whose overshoot is clipped at every edge.
    blocks = np.random.default_rng(0).integers(0, 2, (8, 24, 24, 1)) * 255
    hard = torch.from_numpy(blocks.repeat(4, 1).repeat(4, 2).repeat(3, 3).astype(np.uint8))
    exact, clipped = (score_naively(clip, hard, [CAPTIONS[0]] * 8, as_bytes=as_bytes) for as_bytes in (False, True))
    hard_share = same_share(torch.from_numpy(exact), clipped, k=21)
    with capsys.disabled():
        print(
            f" [8-bit resize: cosines off by {np.abs(rounded - naive).mean():.1e}, {share:.4f} of masks agree; on hard "
            f"edges {np.abs(exact - clipped).mean():.1e}, {hard_share:.4f}] ",
            end="",
        )
    assert np.abs(rounded - naive).max() < 0.03
    assert share > 0.9
    assert hard_share > 0.8


@pytest.mark.slow
def test_result_does_not_depend_on_the_batch_of_the_engine(
    config: InputConfig, manifest: Manifest, clips: ClipBatch
) -> None:
    """One frame at a time, five, or all; fewer patches than a frame has."""
    for scorer in ("patch", "dense"):
        whole = make(config, manifest, scorer=scorer)(clips)
        for batch in (1, 5 * SIDE**2 + 1, 7 * SIDE**2):
            parts = make(replace(config, clip=replace(config.clip, batch=batch)), manifest, scorer=scorer)(clips)
            torch.testing.assert_close(parts, whole, rtol=0, atol=2e-6)


@pytest.mark.slow
def test_the_frames_of_a_batch_are_known(
    config: InputConfig, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pass is fitted to them: three clips of 4 slots, both frames of each scored."""
    seen = []
    monkeypatch.setattr(text_scorer, "make_patch_similarity", lambda *given: seen.append(given[-1]))
    for clips in (None, 3):
        bind_scorer(config, manifest, CPU, num_clips=clips)
    assert seen == [None, 3 * SLOTS * 2]


def test_scores_of_a_clip_do_not_depend_on_its_neighbours(
    config: InputConfig, manifest: Manifest, clips: ClipBatch
) -> None:
    whole = make(config, manifest)(clips)
    for place in range(4):
        alone = clip_batch(clips.frames[place : place + 1], clips.requests[place : place + 1], manifest)
        torch.testing.assert_close(make(config, manifest)(alone)[0], whole[place], rtol=0, atol=2e-6)


def test_captions_and_flips_of_the_requests_are_honoured(
    clip: CLIPModel, config: InputConfig, manifest: Manifest, clips: ClipBatch
) -> None:
    """The same frames under either caption, and mirrored by the pipeline: what the naive way says of each."""
    request = replace(clips.requests[0], flip=False)
    requests = (replace(request, caption=0), replace(request, caption=1), replace(request, caption=1, flip=True))
    batch = PyavPipeline(manifest, lambda _: requests, SIZE).next_batch()
    scores = make(config, manifest, frames_per_tubelet=1)(batch)
    plain = batch.frames[0, ::2]
    captions = manifest[request.row].texts
    for place, (frames, caption) in enumerate(
        [(plain, captions[0]), (plain, captions[1]), (plain.flip(2), captions[1])]
    ):
        expected = score_naively(clip, frames, [caption] * SLOTS)
        np.testing.assert_allclose(scores[place].numpy(), expected, rtol=0, atol=1e-4)
    assert (scores[0] - scores[1]).abs().max() > 0.01
    assert (scores[1] - scores[2]).abs().max() > 0.01


def test_bottom_masks_what_is_least_like_the_caption(
    config: InputConfig, manifest: Manifest, clips: ClipBatch, naive: NDArray[np.float64]
) -> None:
    mask = MaskConfig(order="bottom", frames_per_tubelet=1)
    scores = bind_scorer(replace(config, mask=mask), manifest, CPU)(clips)
    hidden = torch.zeros(4, SLOTS * SIDE**2, dtype=torch.bool)
    hidden.scatter_(1, select_masks(mask, config.model, scores).masked.long(), True)
    least = np.argsort(naive[:, ::2], axis=-1)[..., :21]  # floor(.6 · 36)
    expected = np.zeros((4, SLOTS, SIDE**2), bool)
    np.put_along_axis(expected, least, True, axis=-1)
    assert (hidden.view(4, SLOTS, -1).numpy() == expected).mean() >= 0.999


# dense


def attend(
    q: NDArray[np.float64], k: NDArray[np.float64], heads: int, bias: float | NDArray[np.float64] = 0.0
) -> NDArray[np.float64]:
    """Attention weights [heads, L, L] of q, k [L, D]."""
    split = [x.reshape(len(x), heads, -1).transpose(1, 0, 2) for x in (q, k)]
    logits = split[0] @ split[1].transpose(0, 2, 1) / np.sqrt(split[0].shape[-1]) + bias
    weights: NDArray[np.float64] = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def dense_naively(clip: CLIPModel, frame: torch.Tensor, caption: str, last_block: str) -> NDArray[np.float64]:
    """One frame uint8 [H, W, 3] → cosines [N]: open_clip's own blocks up to the last, that one by hand, in float64."""
    visual = copy.deepcopy(clip.open_clip.visual).double()
    cell = visual.conv1.kernel_size[0]
    rows, columns = frame.shape[0] // PATCH, frame.shape[1] // PATCH
    pixels = resize(frame.numpy().astype(np.float32), rows * cell, columns * cell)
    pixels = (pixels / 255 - np.array(clip.mean)) / np.array(clip.std)
    with torch.inference_mode():
        tokens = visual.conv1(torch.from_numpy(pixels).double().permute(2, 0, 1)[None]).flatten(2)[0].T
        table = visual.positional_embedding.float().numpy()
        grid = resize(table[1:].reshape(*visual.grid_size, -1), rows, columns).reshape(rows * columns, -1)
        x = torch.cat([visual.class_embedding[None], tokens]) + torch.from_numpy(np.concatenate([table[:1], grid]))
        x = visual.ln_pre(x)[None]
        *blocks, last = visual.transformer.resblocks
        for block in blocks:
            x = block(x)
        weight, bias = last.attn.in_proj_weight.numpy(), last.attn.in_proj_bias.numpy()
        q, k, v = np.split(last.ln_1(x)[0].numpy() @ weight.T + bias, 3, axis=1)
        heads = last.attn.num_heads
        eye = np.eye(len(q))[None].repeat(heads, 0)
        near = np.zeros((len(q), len(q)))
        for i in range(rows * columns):
            for j in range(rows * columns):
                distance = (i // columns - j // columns) ** 2 + (i % columns - j % columns) ** 2
                near[i + 1, j + 1] = np.exp(-distance / (2 * 5.0**2))
        weights = {
            "maskclip": lambda: eye,
            "sclip": lambda: attend(q, q, heads) + attend(k, k, heads),
            "clearclip": lambda: attend(q, q, heads),
            "naclip": lambda: attend(k, k, heads, near),
        }[last_block]()
        mixed = (weights @ v.reshape(len(v), heads, -1).transpose(1, 0, 2)).transpose(1, 0, 2).reshape(len(v), -1)
        out = last.attn.out_proj(torch.from_numpy(mixed))[None]
        if last_block in ("maskclip", "sclip"):
            out = x + out
            out = out + last.mlp(last.ln_2(out))
        raw = (visual.ln_post(out[0, 1:]) @ visual.proj).numpy()
    cosines: NDArray[np.float64] = raw @ embed_text(clip, caption) / np.linalg.norm(raw, axis=1)
    return cosines


@pytest.mark.slow
@pytest.mark.parametrize("last_block", LAST_BLOCKS)
def test_dense_equals_a_computation_by_hand(
    clip: CLIPModel, config: InputConfig, manifest: Manifest, clips: ClipBatch, last_block: str
) -> None:
    """Each frame alone, in float64, with attention written out; the mean over a tubelet's two frames."""
    scores = make(config, manifest, scorer="dense", dense=last_block)(clips)
    assert (scores.dtype, tuple(scores.shape)) == (torch.float32, (4, SLOTS, SIDE**2))
    for place in (0, 3):
        request = clips.requests[place]
        caption = manifest[request.row].texts[request.caption]
        frames = [dense_naively(clip, frame, caption, last_block) for frame in clips.frames[place, 2:4]]
        np.testing.assert_allclose(scores[place, 1].numpy(), np.mean(frames, axis=0), rtol=0, atol=1e-4)


def test_dense_variants_differ(config: InputConfig, manifest: Manifest, clips: ClipBatch) -> None:
    found = [make(config, manifest, scorer="dense", dense=name)(clips) for name in LAST_BLOCKS]
    for place, one in enumerate(found):
        for other in found[place + 1 :]:
            assert (one - other).abs().max() > 1e-3


def test_dense_at_clips_own_grid_changes_neither_pixels_nor_positions(clip: CLIPModel) -> None:
    cell, side = clip.visual.conv1.kernel_size[0], clip.visual.grid_size[0]
    tower = FrameTower(clip.visual, side * cell, side * cell, cell, "clearclip")
    assert torch.equal(tower.trunk.positions, clip.visual.positional_embedding)
    torch.testing.assert_close(tower.resize_rows, torch.eye(side * cell), rtol=0, atol=1e-6)


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("scorer", ["patch", "dense"])
@pytest.mark.parametrize(
    ("precision", "agreed_least", "tolerance"),
    [("fp32", 0.999, 1e-3), ("fp16", 0.97, 1e-2), ("bf16", 0.95, 3e-2), ("fp8", 0.85, 0.15)],
)
def test_a_gpu_scores_as_the_cpu_does(
    config: InputConfig, manifest: Manifest, clips: ClipBatch, scorer: str, precision: str, agreed_least: float,
    tolerance: float,
) -> None:  # fmt: skip
    """Through the loader's side stream, while the consumer's stream is busy."""
    device = torch.device("cuda")
    if precision == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no FP8 products")
    expected = make(config, manifest, scorer=scorer)(clips)
    # 32 frames: two passes of the CUDA graph and a rest.
    clip = replace(config.clip, precision=precision, batch=12 * SIDE**2)  # type: ignore[arg-type]
    changed = replace(config, mask=MaskConfig(scorer=scorer), clip=clip)  # type: ignore[arg-type]
    wanted = select_masks(changed.mask, changed.model, expected)
    given = bind_scorer(changed, manifest, device)

    class Same:
        def next_batch(self) -> ClipBatch:
            return clips

        def describe(self) -> str:
            return ""

        def close(self) -> None: ...

    loader = Loader(Same(), given, changed.mask, changed.model, device)
    try:
        for _ in range(8):
            batch = loader.next_batch()
            torch.cuda._sleep(20_000_000)
            masked = batch.masks.masked.clone()
            hidden = torch.zeros(len(masked), changed.model.num_tokens, dtype=torch.bool)
            agreed = hidden.scatter(1, wanted.masked.long(), True).gather(1, masked.cpu().long()).float().mean()
            assert agreed > agreed_least
    finally:
        loader.close()
    # Only now: the loader's thread was ahead with one more batch, and a CUDA graph is for one thread at a time.
    cosines = given(replace(clips, frames=clips.frames.to(device))).cpu()
    torch.testing.assert_close(cosines, expected, rtol=0, atol=tolerance)
