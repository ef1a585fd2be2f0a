"""DALI and the PyAV reference give the same frames exactly and the same pixels within a tolerance."""

from __future__ import annotations

import io
import os
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from av.video.reformatter import Colorspace

from dali_pipelines.dali_pipeline import DaliPipeline
from dali_pipelines.nvdec import CODECS, CodecLimits
from dali_pipelines.pyav_pipeline import PyavPipeline
from dali_pipelines.types import BatchSampler, ClipPipeline, ClipRequest, CropBox
from dali_pipelines.video.decode import _crop_and_resize
from dali_pipelines.video.excerpt import cut_excerpt
from dali_pipelines.video.geometry import turn_upright
from dali_pipelines.workers.clip_worker import ClipWorker
from tests.support.requests import Plan, make_worker, request
from tests.support.videos import read_number, write_numbered
from tgmae.config.data import DataConfig
from tgmae.data.indexing import index_folder
from tgmae.data.manifest import Manifest, read_manifest
from tgmae.data.sampling import ClipSampler

SIZE, NUM_FRAMES = 64, 8
CUDA = torch.device("cuda", 0)
ANY_SIZE = CodecLimits(engines=1, min_width=1, min_height=1, max_width=8192, max_height=8192, max_macroblocks=2**18)

# Mean absolute difference of 8-bit values that the pipelines may show on smooth pictures, and its 99th percentile. They
# differ in the order of resizing and colour conversion (FFmpeg resizes YUV, the reference resizes RGB).
MEAN_TOLERANCE, P99_TOLERANCE = 2.0, 12.0


def run(pipeline: ClipPipeline) -> torch.Tensor:
    try:
        return pipeline.next_batch().frames
    finally:
        pipeline.close()


def both(manifest: Manifest, requests: tuple[ClipRequest, ...], **data: int) -> tuple[torch.Tensor, torch.Tensor]:
    plan = Plan(requests)
    fast = run(DaliPipeline(manifest, plan, DataConfig(**{"num_workers": 1, **data}), SIZE))
    return fast, run(PyavPipeline(manifest, plan, SIZE))


VIDEOS = {
    "h264.mp4": dict(codec="libx264", g="12", bf="2"),
    "h264.mkv": dict(codec="libx264", g="250", bf="3"),
    "vp9.webm": dict(codec="libvpx-vp9", g="12"),
    "mjpeg.avi": dict(codec="mjpeg", pix_fmt="yuvj420p"),
    "mpeg4.avi": dict(codec="mpeg4"),
    "hevc.mp4": dict(codec="libx265", g="12"),
    "odd_h264.mkv": dict(codec="libx264", width=161, height=121, pix_fmt="yuv444p"),
    "odd_vp9.webm": dict(codec="libvpx-vp9", width=161, height=121),
    "portrait.mp4": dict(codec="libx264", width=120, height=160),
    "rotated_90.mp4": dict(codec="libx264", rotation=90),
    "rotated_180.mp4": dict(codec="libx264", rotation=180),
    "rotated_270.mp4": dict(codec="libx264", rotation=270),
    "rotated_vp9.mp4": dict(codec="libvpx-vp9", rotation=90),
    "mirrored.mp4": dict(codec="libx264", mirrored=True),
    "mirrored_90.mp4": dict(codec="libx264", rotation=90, mirrored=True),
    "mirrored_vp9_180.mp4": dict(codec="libvpx-vp9", rotation=180, mirrored=True),
    "mirrored_vp9_270.mp4": dict(codec="libvpx-vp9", rotation=270, mirrored=True),
    "short.mp4": dict(codec="libx264", num_frames=5),
    "short.webm": dict(codec="libvpx-vp9", num_frames=5),
}


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """One numbered video a kind."""
    folder = tmp_path_factory.mktemp("numbered")
    for name, options in VIDEOS.items():
        write_numbered(folder / name, **options)  # type: ignore[arg-type]
    index_folder(folder, folder / "manifest.parquet", min_frames=2)
    manifest = read_manifest(folder / "manifest.parquet")
    assert len(manifest) == len(VIDEOS)
    return manifest


@pytest.mark.slow
def test_frames_are_the_ones_asked_for(numbered: Manifest) -> None:
    """Every kind of video in one batch, windows that start in the middle and end at the last frame."""
    requests = []
    for row in range(len(numbered)):
        last = numbered[row].num_frames - 1
        wanted = (1, 2, 4, 4, 4, 4, 4, 4) if last < 8 else (14, 17, 20, 23, 26, 29, 32, 39)
        requests.append(request(numbered, row, wanted))
    fast, slow = both(numbered, tuple(requests), num_workers=2)
    for row, wanted in enumerate(requests):
        for pipeline, clips in (("dali", fast), ("reference", slow)):
            numbers = tuple(read_number(picture) for picture in clips[row].numpy())
            assert numbers == wanted.frames, f"{pipeline}, {numbered[row].path}"


@pytest.mark.slow
def test_pixels_agree(numbered: Manifest) -> None:
    """Crops at odd places, flips and rotations: within the stated tolerance for every kind of video."""
    requests = tuple(
        request(
            numbered,
            row,
            tuple(min(frame, numbered[row].num_frames - 1) for frame in range(0, 16, 2)),
            crop=CropBox(x=13, y=7, width=97, height=103),
            flip=row % 2 == 1,
        )
        for row in range(len(numbered))
    )
    fast, slow = both(numbered, requests)
    for row in range(len(numbered)):
        difference = (fast[row].float() - slow[row].float()).abs()
        # The number blocks are hard edges; the gradient below them shows geometry and colour.
        mean, p99 = difference.mean().item(), difference.flatten().quantile(0.99).item()
        assert mean < MEAN_TOLERANCE, f"{numbered[row].path}: mean {mean}"
        assert p99 < 6 * P99_TOLERANCE, f"{numbered[row].path}: 99th percentile {p99}"
        smooth = difference[:, SIZE * 3 // 4 :]
        assert smooth.quantile(0.99).item() < P99_TOLERANCE, f"{numbered[row].path}: {smooth.quantile(0.99)}"


def test_a_wrong_flip_or_crop_would_be_seen(numbered: Manifest) -> None:
    """The tolerance is tight enough to tell a flip, and a crop moved by four pixels."""
    row = 0
    frames = tuple(range(8))
    crop = CropBox(x=20, y=10, width=90, height=90)
    truth = run(PyavPipeline(numbered, Plan((request(numbered, row, frames, crop=crop),)), SIZE)).float()
    for change in ({"flip": True}, {"crop": replace(crop, x=24)}):
        plan = Plan((request(numbered, row, frames, **{"crop": crop, **change}),))
        other = run(PyavPipeline(numbered, plan, SIZE)).float()
        assert (truth - other).abs().mean() > MEAN_TOLERANCE


@pytest.mark.slow
def test_repeat_cuts_several_clips_from_one_decode(numbered: Manifest) -> None:
    """data.repeat=2: two clips with the same frames and their own crops, natively decoded and not."""
    requests = []
    for row in (0, 2, 9):
        for crop in (CropBox(x=0, y=0, width=80, height=80), CropBox(x=20, y=30, width=90, height=80)):
            requests.append(request(numbered, row, (0, 3, 6, 9, 12, 15, 18, 21), crop=crop, flip=crop.x > 0))
    fast, slow = both(numbered, tuple(requests), repeat=2)
    assert fast.shape == (6, NUM_FRAMES, SIZE, SIZE, 3)
    for place in range(6):
        assert (fast[place].float() - slow[place].float()).abs().mean() < MEAN_TOLERANCE
    assert (fast[0].float() - fast[1].float()).abs().mean() > 5


@pytest.mark.slow
def test_first_batch_is_where_a_resumed_run_goes_on(shapes: Path) -> None:
    """Batch 3 of a fresh pipeline equals the first batch of one that starts there; both are deterministic."""
    manifest = read_manifest(shapes)
    data = DataConfig(manifest=shapes, stride=2, num_workers=2)
    plan = ClipSampler(manifest=manifest, data=data, num_frames=NUM_FRAMES, batch_size=4, seed=3)
    fresh, resumed = DaliPipeline(manifest, plan, data, SIZE), DaliPipeline(manifest, plan, data, SIZE, first_batch=3)
    try:
        batches = [fresh.next_batch() for _ in range(4)]
        again = resumed.next_batch()
    finally:
        fresh.close()
        resumed.close()
    assert again.requests == batches[3].requests == plan(3)
    assert torch.equal(again.frames, batches[3].frames)
    assert not torch.equal(batches[0].frames, batches[1].frames)


@pytest.mark.slow
def test_repeat_of_turned_videos(numbered: Manifest) -> None:
    """data.repeat with rotated videos of either kind of decoding, one clip flipped and one not."""
    rows = [row for row in range(len(numbered)) if numbered[row].rotation]
    assert {numbered[row].codec for row in rows} == {"h264", "vp9"}
    requests = [
        request(numbered, row, tuple(range(0, 24, 3)), crop=CropBox(x=x, y=11, width=90, height=80), flip=x > 0)
        for row in rows
        for x in (0, 31)
    ]
    fast, slow = both(numbered, tuple(requests), repeat=2)
    for clip, other, wanted in zip(fast, slow, requests, strict=True):
        assert (clip.float() - other.float()).abs().mean() < MEAN_TOLERANCE, wanted


@pytest.mark.slow
def test_batches_stay_as_they_were(shapes: Path) -> None:
    """The loader holds one batch while the next ones are made, and pictures are drawn after the pipeline is closed."""
    manifest = read_manifest(shapes)
    data = DataConfig(manifest=shapes, stride=2, num_workers=1)
    plan = ClipSampler(manifest=manifest, data=data, num_frames=NUM_FRAMES, batch_size=4, seed=3)
    pipeline = DaliPipeline(manifest, plan, data, SIZE)
    try:
        held = [pipeline.next_batch().frames for _ in range(3)]
        copies = [frames.clone() for frames in held]
        for _ in range(8):
            pipeline.next_batch()
    finally:
        pipeline.close()
    assert all(torch.equal(frames, copy) for frames, copy in zip(held, copies, strict=True))
    held[0].fill_(0)  # nobody else's memory: the others keep what they hold
    assert all(torch.equal(frames, copy) for frames, copy in zip(held[1:], copies[1:], strict=True))


def test_workers_plan_their_own_decode_only(shapes: Path) -> None:
    """With a plan that knows its units, and with one that does not, a worker gets the same clip."""
    manifest = read_manifest(shapes)
    data = DataConfig(manifest=shapes, stride=2, repeat=2, flip=True)
    plan = ClipSampler(manifest=manifest, data=data, num_frames=NUM_FRAMES, batch_size=6, seed=3)
    whole: BatchSampler = lambda batch: plan(batch)  # noqa: E731
    for unit in range(3):
        shape, rings, found = (2, 3, 2, NUM_FRAMES, SIZE, SIZE, 3), [], []
        for sampler in (plan, whole):
            worker = ClipWorker(videos=manifest, sampler=sampler, limits=None, shape=shape)
            rings.append(np.zeros(shape, np.uint8))
            found.append(worker((5 * 3 + unit) * 2 + 1, memoryview(rings[-1].reshape(-1))))
        assert np.array_equal(*rings)
        assert rings[0][1, unit].any()
        assert not rings[0][0].any()
        assert all(np.array_equal(a, b) for a, b in zip(found[0].arrays(), found[1].arrays(), strict=True))
        assert found[0].frames.tolist() == sorted(set(plan(5)[2 * unit].frames))


class TestBrokenFiles:
    """A video deleted, truncated or corrupted after indexing costs its own clip, not the run."""

    @pytest.fixture
    def manifest(self, tmp_path: Path) -> Manifest:
        for name in ("a.mp4", "b.webm", "c.mp4", "d.webm", "e.webm"):
            write_numbered(tmp_path / name, codec="libx264" if name.endswith("mp4") else "libvpx-vp9", g="12")
        index_folder(tmp_path, tmp_path / "manifest.parquet")
        (tmp_path / "a.mp4").unlink()
        with (tmp_path / "b.webm").open("r+b") as file:
            file.truncate(1500)
        # Bytes changed in place, size and date kept: only decoding can tell.
        corrupted, stat = tmp_path / "d.webm", (tmp_path / "d.webm").stat()
        content = bytearray(corrupted.read_bytes())
        content[300:] = np.random.default_rng(0).bytes(len(content) - 300)
        corrupted.write_bytes(content)
        os.utime(corrupted, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        return read_manifest(tmp_path / "manifest.parquet")

    @pytest.mark.slow
    @pytest.mark.parametrize("kind", ["dali", "reference"])
    def test_named_and_replaced(self, manifest: Manifest, kind: str) -> None:
        frames = (0, 4, 8, 12, 16, 20, 24, 28)
        plan = Plan(tuple(request(manifest, row, frames, mask_seed=row) for row in range(5)))
        pipeline: ClipPipeline = (
            DaliPipeline(manifest, plan, DataConfig(), SIZE) if kind == "dali" else PyavPipeline(manifest, plan, SIZE)
        )
        try:
            for _ in range(2):  # the pipeline lives on
                batch = pipeline.next_batch()
                skipped = {video.path: video.reason for video in batch.skipped}
                assert set(skipped) == {"a.mp4", "b.webm", "d.webm"}
                assert "No such file" in skipped["a.mp4"]
                assert skipped["b.webm"].startswith("changed since it was indexed")
                assert batch.frames.shape[0] == 5
                assert [r.row for r in batch.requests] == [2, 2, 2, 4, 4]
                assert [r.mask_seed for r in batch.requests] == [0, 1, 2, 3, 4]
                assert torch.equal(batch.frames[0], batch.frames[2])
                for clip in batch.frames:
                    assert tuple(read_number(picture) for picture in clip.numpy()) == frames
        finally:
            pipeline.close()

    @pytest.mark.slow
    def test_nothing_left_is_an_error(self, manifest: Manifest) -> None:
        plan = Plan((request(manifest, 0, tuple(range(8))),))
        for pipeline in (DaliPipeline(manifest, plan, DataConfig(), SIZE), PyavPipeline(manifest, plan, SIZE)):
            with pytest.raises(ValueError, match=r"none of the videos of 16 batches(.|\n)*a\.mp4"):
                run(pipeline)


LARGE = {  # enough for NVDEC, which takes no HEVC below 144 pixels and no VP9 below 128
    "h264.mp4": dict(codec="libx264", g="12", bf="2"),
    "h264_odd.mkv": dict(codec="libx264", g="12", width=340, height=256),
    "hevc.mp4": dict(codec="libx265", g="12"),
    "vp9.webm": dict(codec="libvpx-vp9", g="12"),
    "rotated_90.mp4": dict(codec="libx264", rotation=90),
    "rotated_180.mp4": dict(codec="libx264", rotation=180),
    "rotated_270.mp4": dict(codec="libx265", rotation=270),
}


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder = tmp_path_factory.mktemp("large")
    for name, options in LARGE.items():
        write_numbered(folder / name, **{"width": 256, "height": 192, **options})  # type: ignore[arg-type]
    index_folder(folder, folder / "manifest.parquet")
    return read_manifest(folder / "manifest.parquet")


@pytest.mark.slow
def test_what_nvdec_takes_is_handed_to_it(numbered: Manifest, large: Manifest) -> None:
    """Excerpts, in which FFmpeg finds the frames that DALI is asked for."""
    found = set()
    for manifest in (numbered, large):
        requests = tuple(
            request(manifest, row, tuple(min(number, manifest[row].num_frames - 1) for number in range(14, 30, 2)))
            for row in range(len(manifest))
        )
        source = make_worker(manifest, Plan(requests), dict.fromkeys(CODECS, ANY_SIZE))
        for row, wanted in enumerate(requests):
            prepared = source.prepare((wanted,), True, np.empty(source.shape[2:], np.uint8))
            assert prepared.is_native == source.is_native(row), manifest[row].path
            assert not (prepared.is_native and manifest[row].width % 2), manifest[row].path
            if prepared.encoded is not None:
                found.add(manifest[row].codec)
                with av.open(io.BytesIO(prepared.encoded.tobytes()), "r") as container:
                    pictures = [picture.to_ndarray(format="rgb24") for picture in container.decode(video=0)]
                upright = [turn_upright(pictures[number].astype(np.uint8), manifest[row]) for number in prepared.frames]
                assert tuple(read_number(upright[place]) for place in prepared.order) == wanted.frames
    assert {"h264", "hevc", "vp9"} <= found


@pytest.mark.gpu
@pytest.mark.usefixtures("nvdec")
@pytest.mark.parametrize("repeat", [1, 2])
def test_gpu_decoding_agrees(numbered: Manifest, large: Manifest, repeat: int) -> None:
    """NVDEC, and PyAV for what it does not take: the same frames, and pixels within twice the tolerance."""
    for manifest in (large, numbered):
        requests = tuple(
            request(
                manifest, row, tuple(min(frame, manifest[row].num_frames - 1) for frame in range(0, 16, 2)),
                flip=repeat == 2 and place == 1,
            )
            for row in range(len(manifest))
            for place in range(repeat)
        )  # fmt: skip
        pipeline = DaliPipeline(manifest, Plan(requests), DataConfig(decode="gpu", repeat=repeat), SIZE, device=CUDA)
        native = [pipeline.feed.worker.is_native(row) for row in range(len(manifest))]
        assert any(native)
        assert all(native) or manifest is numbered
        assert not any(is_native for row, is_native in enumerate(native) if manifest[row].pixel_format == "yuv444p")
        fast = run(pipeline)
        assert fast.is_cuda
        slow = run(PyavPipeline(manifest, Plan(requests), SIZE))
        for place, wanted in enumerate(requests):
            path = manifest[wanted.row].path
            clip = fast[place].cpu()
            upright = clip.flip(2) if wanted.flip else clip
            assert tuple(read_number(picture) for picture in upright.numpy()) == wanted.frames, path
            assert (clip.float() - slow[place].float()).abs().mean() < 2 * MEAN_TOLERANCE, path


@pytest.mark.gpu
def test_clips_decoded_on_the_cpu_go_to_the_gpu(numbered: Manifest) -> None:
    """--data.decode cpu beside a GPU: the clips of the CPU pipeline but for the rounding of DALI's resize there."""
    rows = [row for row in range(len(numbered)) for _ in range(2)]
    requests = tuple(
        request(
            numbered, row, tuple(min(frame, numbered[row].num_frames - 1) for frame in range(0, 16, 2)),
            crop=CropBox(x=13, y=7, width=97, height=103), flip=place % 2 == 1,
        )
        for place, row in enumerate(rows)
    )  # fmt: skip
    for repeat in (1, 2):
        data = DataConfig(decode="cpu", repeat=repeat)
        found = run(DaliPipeline(numbered, Plan(requests), data, SIZE, device=CUDA))
        assert found.is_cuda
        expected = run(DaliPipeline(numbered, Plan(requests), data, SIZE))
        assert (found.cpu().int() - expected.int()).abs().max() <= 1


@pytest.mark.gpu
@pytest.mark.usefixtures("nvdec")
def test_turns_of_several_gpu_pipelines(large: Manifest) -> None:
    """Four pipelines give what one gives, turned and flipped clips too."""
    requests = tuple(request(large, row, tuple(range(0, 16, 2)), flip=row % 2 == 1) for row in range(len(large)))
    found = []
    for pipelines in (1, 4):
        pipeline = DaliPipeline(large, Plan(requests), DataConfig(pipelines=pipelines), SIZE, device=CUDA)
        try:
            found.append([pipeline.next_batch().frames.cpu() for _ in range(5)])
        finally:
            pipeline.close()
    for one, four in zip(*found, strict=True):
        assert torch.equal(one, four)


def damage(file: Path, how: str) -> None:
    """Size and date kept, so that the file still goes to NVDEC."""
    content, stat = bytearray(file.read_bytes()), file.stat()
    third = len(content) // 3
    content[third : 2 * third] = np.random.default_rng(0).bytes(third)
    if how == "cut off":
        content[third:] = bytes(len(content) - third)
    file.write_bytes(content)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.gpu
@pytest.mark.usefixtures("nvdec")
@pytest.mark.parametrize("how", ["overwritten", "cut off"])
def test_gpu_decoding_survives_damaged_files(tmp_path: Path, how: str) -> None:
    """They cost their own clips, not the run and no other clip. A cut takes all that an MP4 says of its frames.

    Drivers differ in what they conceal, so that nothing is said of the damaged clips but their shape: NVDEC may deliver
    something, or fail, and then PyAV decodes the file or another video's clip stands in.
    """
    names = ("a.mp4", "b.mp4", "c.mkv", "d.mp4")  # b and c will be damaged
    for name in names:
        write_numbered(tmp_path / name, width=256, height=192, g="12", bf="2")
    index_folder(tmp_path, tmp_path / "m.parquet", num_workers=1)
    manifest = read_manifest(tmp_path / "m.parquet")
    frames = tuple(range(8, 40, 4))
    plan, data = Plan(tuple(request(manifest, row, frames) for row in range(4))), DataConfig(decode="gpu", pipelines=2)
    found = []
    for is_damaged in (False, True):
        if is_damaged:
            damage(tmp_path / names[1], how)
            damage(tmp_path / names[2], how)
        pipeline = DaliPipeline(manifest, plan, data, SIZE, device=CUDA)
        assert all(pipeline.feed.worker.is_native(row) for row in range(4))
        try:
            found.append([pipeline.next_batch().frames.cpu() for _ in range(5)])
        finally:
            pipeline.close()
    for clean, damaged in zip(*found, strict=True):
        assert damaged.shape == (4, NUM_FRAMES, SIZE, SIZE, 3)
        for place in (0, 3):
            assert tuple(read_number(picture) for picture in damaged[place].numpy()) == frames
            # PyAV may have taken over all videos of a batch, if DALI decodes each of them alone.
            assert (damaged[place].float() - clean[place].float()).abs().mean() < 2 * MEAN_TOLERANCE


@pytest.mark.parametrize(
    "pixels", ["yuv420p10le", "yuv422p10le", "yuv444p10le", "nv12", "p010le", "yuv420p", "yuvj420p"]
)
def test_crops_begin_at_any_pixel(pixels: str) -> None:
    """With two bytes a sample, or both chroma samples side by side, too: an odd x is in the middle of neither."""
    rows, columns = np.mgrid[:96, :128].astype(np.float64)
    picture = np.stack([2 * columns, 255 - 2 * columns, 2 * rows], axis=-1).round().clip(0, 255).astype(np.uint8)
    frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=pixels)
    for x in (20, 21, 22, 23):
        graph = _crop_and_resize(frame, CropBox(x=x, y=7, width=64, height=64), 64, 64)
        graph.push(frame)
        found = graph.pull().to_ndarray().astype(int)
        assert np.abs(found - picture[7:71, x : x + 64]).mean() < 2 * MEAN_TOLERANCE, x


def write_coloured(file: Path, codec: str, tag: str) -> None:
    """Four colours from left to right, converted as the tag says."""
    picture = np.zeros((192, 256, 3), np.uint8)
    for place, colour in enumerate(((190, 60, 50), (50, 180, 60), (60, 50, 190), (180, 140, 110))):
        picture[:, 64 * place : 64 * (place + 1)] = colour
    with av.open(str(file), "w") as container:
        stream = container.add_stream(codec, rate=25, options={"crf": "10", "b": "0"})
        stream.width, stream.height, stream.pix_fmt = 256, 192, "yuv420p"
        stream.codec_context.colorspace = Colorspace[tag]
        for _ in range(20):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(
                format="yuv420p", dst_colorspace=Colorspace[tag]
            )
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def check_colours(folder: Path, codec: str, device: torch.device, decode: str) -> None:
    for tag in ("ITU709", "ITU601"):
        write_coloured(folder / f"{tag}.webm", codec, tag)
    index_folder(folder, folder / "m.parquet", num_workers=1)
    manifest = read_manifest(folder / "m.parquet")
    plan = Plan(tuple(request(manifest, row, tuple(range(8)), flip=bool(row)) for row in range(2)))
    pipeline = DaliPipeline(manifest, plan, DataConfig(decode=decode), SIZE, device=device)  # type: ignore[arg-type]
    into = np.empty(pipeline.feed.worker.shape[2:], np.uint8)
    samples = [pipeline.feed.worker.prepare((wanted,), True, into) for wanted in plan(0)]
    assert [sample.arrays()[2].tolist() for sample in samples] == [[1, 0, 0], [1, 0, 1]]
    found, truth = run(pipeline).cpu(), run(PyavPipeline(manifest, plan, SIZE))
    places = torch.arange(8, SIZE, 16)  # the middles of the colours
    difference = found[..., places, :].int() - truth[..., places, :].int()
    assert difference.abs().max() <= 4


@pytest.mark.slow
def test_colours_are_those_of_the_tags(tmp_path: Path) -> None:
    """BT.709 read as BT.601 would be 22 levels off."""
    check_colours(tmp_path, "libvpx-vp9", torch.device("cpu"), "auto")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.webm"])
def test_excerpts_know_their_colours(tmp_path: Path, name: str) -> None:
    """Of H.264 in MP4 too, where only the stream says them."""
    codec = "libvpx-vp9" if name.endswith("webm") else "libx264"
    write_coloured(tmp_path / name, codec, "ITU709")
    index_folder(tmp_path, tmp_path / "m.parquet", num_workers=1)
    manifest = read_manifest(tmp_path / "m.parquet")
    assert cut_excerpt(manifest.file(0), manifest[0], (3, 5)).colour_space == Colorspace.ITU709


@pytest.mark.gpu
@pytest.mark.usefixtures("nvdec")
def test_gpu_colours_are_those_of_the_tags(tmp_path: Path) -> None:
    check_colours(tmp_path, "libvpx-vp9", CUDA, "gpu")


@pytest.mark.slow
def test_a_flip_is_exactly_that(numbered: Manifest) -> None:
    """Resizing to a negative extent is resizing and flipping, whoever decodes, however the video is turned."""
    crop, frames = CropBox(x=13, y=7, width=97, height=103), (0, 1, 2, 3, 3, 4, 4, 4)
    requests = [
        request(numbered, row, frames, crop=crop, flip=flip) for row in range(len(numbered)) for flip in (False, True)
    ]
    plain, flipped = run(DaliPipeline(numbered, Plan(tuple(requests)), DataConfig(repeat=2), SIZE)).view(
        len(numbered), 2, NUM_FRAMES, SIZE, SIZE, 3
    ).unbind(1)  # fmt: skip
    for row in range(len(numbered)):
        assert torch.equal(flipped[row], plain[row].flip(2)), numbered[row].path
