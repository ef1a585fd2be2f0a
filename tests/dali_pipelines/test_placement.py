"""What NVDEC takes, by a driver that is asked through ctypes, and who decodes what."""

from __future__ import annotations

import ctypes
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dali_pipelines import nvdec
from dali_pipelines import placement as decoding
from dali_pipelines.dali_pipeline import describe_decoding
from dali_pipelines.nvdec import CODECS, CodecLimits, DecodeCaps, NoNvdec, load_library, read_limits
from dali_pipelines.open import open_pipeline
from dali_pipelines.placement import choose_placement, count_engines, find_clashes, find_nvdec
from dali_pipelines.types import CodedFormat
from dali_pipelines.workers.clip_worker import dali_decodes
from tests.support.requests import make_worker
from tests.support.videos import write_numbered
from tgmae.config.data import DataConfig
from tgmae.data.indexing import index_folder
from tgmae.data.manifest import read_manifest
from tgmae.data.sampling import ClipSampler
from tgmae.presets import PRESETS

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
LIMITS = CodecLimits(engines=7, min_width=48, min_height=16, max_width=4096, max_height=4096, max_macroblocks=65536)


def make_driver(supported: dict[int, dict[str, int]], error: int = 0) -> Any:
    """cuvidGetDecoderCaps as C code would call it: what it says of each codec's number; others give `error`."""

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(DecodeCaps))
    def get_caps(pointer: Any) -> int:
        caps = pointer.contents
        assert (caps.chroma, caps.bit_depth_minus_8) == (1, 0)
        if caps.codec not in supported:
            return error
        caps.is_supported = 1
        for name, value in supported[caps.codec].items():
            setattr(caps, name, value)
        return 0

    return get_caps


H200 = dict(num_engines=7, min_width=48, min_height=16, max_width=4096, max_height=4096, max_macroblocks=65536)


def test_the_structure_is_the_drivers() -> None:
    """Size and offsets of CUVIDDECODECAPS in NVIDIA's cuviddec.h."""
    assert ctypes.sizeof(DecodeCaps) == 88
    offsets = {name: getattr(DecodeCaps, name).offset for name, _ in DecodeCaps._fields_}
    assert offsets == {
        "codec": 0, "chroma": 4, "bit_depth_minus_8": 8, "reserved1": 12, "is_supported": 24, "num_engines": 25,
        "output_formats": 26, "max_width": 28, "max_height": 32, "max_macroblocks": 36, "min_width": 40,
        "min_height": 42, "has_histogram": 44, "counter_bit_depth": 45, "max_histogram_bins": 46, "reserved3": 48,
    }  # fmt: skip


def test_limits_are_what_the_driver_says() -> None:
    found = read_limits(make_driver({4: H200, 10: {**H200, "max_width": 8192}}))
    assert found == {"h264": LIMITS, "vp9": replace(LIMITS, max_width=8192)}
    assert pickle.loads(pickle.dumps(found)) == found  # for the workers
    # An older driver counts no engines and knows fewer codecs.
    found = read_limits(make_driver({8: {**H200, "num_engines": 0}}, error=1))
    assert found == {"hevc": replace(LIMITS, engines=1)}


def test_nothing_decoded_is_a_reason() -> None:
    with pytest.raises(NoNvdec, match="no codec is supported"):
        read_limits(make_driver({}))
    with pytest.raises(NoNvdec, match="CUDA error 201"):
        read_limits(make_driver({}, error=201))


def test_a_missing_library_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvdec, "LIBRARY", "libnosuchvideo.so.1")
    with pytest.raises(NoNvdec, match=r"libnosuchvideo.so.1.*driver capability video"):
        load_library()
    monkeypatch.setattr(nvdec, "LIBRARY", "libc.so.6")  # a library, but not the driver's
    with pytest.raises(NoNvdec, match="cuvidGetDecoderCaps"):
        load_library()


@pytest.mark.parametrize(
    ("width", "height", "fits"),
    [
        (48, 16, True), (46, 16, False), (48, 14, False), (4096, 4096, True), (4098, 16, False), (48, 4098, False),
        (340, 256, True), (427, 240, False), (426, 239, False), (427, 239, False),
    ],
)  # fmt: skip
def test_sizes(width: int, height: int, fits: bool) -> None:
    """DALI would write past the rows of odd sizes."""
    assert LIMITS.fit(width, height) == fits


def test_macroblocks_are_counted_whole() -> None:
    few = replace(LIMITS, max_macroblocks=22 * 16)
    assert few.fit(340, 256)  # coded as 352×256
    assert not few.fit(354, 256)


def test_who_decodes() -> None:
    limits = {"h264": LIMITS}
    video = CodedFormat("h264", "yuv420p", 340, 256)
    assert dali_decodes(video, limits)
    assert not dali_decodes(video, None)  # DALI's CPU decoder knows no H.264
    assert not dali_decodes(video._replace(codec="vp9"), limits)
    assert dali_decodes(video._replace(codec="vp9", width=9000, height=9000), None)
    assert not dali_decodes(video._replace(width=5000), limits)
    assert dali_decodes(video._replace(pixel_format="yuvj420p"), limits)
    for pixels in ("yuv420p10le", "yuv422p", "yuv444p"):
        assert not dali_decodes(video._replace(pixel_format=pixels), limits)
        assert dali_decodes(video._replace(codec="vp9", pixel_format=pixels), None)


def test_a_size_that_hides_another_is_left_to_pyav() -> None:
    """640×360 is coded as 640×368, under which DALI would find the session of a video that is so large."""
    sizes = [(640, 368), (640, 360), (640, 352), (340, 256), (352, 256), (1920, 1080), (1280, 720)]
    videos = [CodedFormat("h264", "yuv420p", *size) for size in sizes]
    limits = {"h264": LIMITS, "hevc": LIMITS}
    assert find_clashes(videos, limits) == {videos[1], videos[3]}
    assert find_clashes([*videos[1:3], CodedFormat("hevc", "yuv420p", 640, 368)], limits) == set()
    assert find_clashes([videos[1], videos[0]._replace(pixel_format="yuv420p10le")], limits) == set()
    hevc = CodedFormat("hevc", "yuv420p", 340, 256)
    assert find_clashes([hevc, hevc._replace(width=344)], limits) == {hevc}


def test_workers_keep_to_the_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A turned video is measured as it is coded; what is out of bounds is decoded in the worker."""
    write_numbered(tmp_path / "turned.mp4", rotation=90, width=120, height=160)  # coded as 160×120
    index_folder(tmp_path, tmp_path / "m.parquet", num_workers=1)
    manifest = read_manifest(tmp_path / "m.parquet")
    plan = ClipSampler(manifest=manifest, data=DataConfig(stride=1), num_frames=8, batch_size=1, seed=0)

    def decodes_itself(limits: CodecLimits) -> bool:
        source, into = make_worker(manifest, plan, {"h264": limits}, 32), np.zeros((1, 8, 32, 32, 3), np.uint8)
        prepared = source.prepare(plan(0), True, into)
        assert prepared.is_native == (prepared.encoded is not None) == (not into.any())
        return not prepared.is_native

    assert not decodes_itself(replace(LIMITS, max_width=160, max_height=120))
    assert decodes_itself(replace(LIMITS, max_width=120, max_height=160))
    assert decodes_itself(replace(LIMITS, max_macroblocks=79))  # of 80
    monkeypatch.setattr("dali_pipelines.video.excerpt.LARGEST", 100)
    assert decodes_itself(LIMITS)


@pytest.fixture
def find(monkeypatch: pytest.MonkeyPatch) -> Callable[[object], None]:
    """What the driver of a GPU says, on a machine without one."""

    def set_answer(answer: object) -> None:
        def find_nvdec(device: torch.device) -> object:
            if isinstance(answer, Exception):
                raise answer
            return answer

        monkeypatch.setattr(decoding, "find_nvdec", find_nvdec)

    return set_answer


def test_auto_takes_nvdec(find: Callable[[object], None]) -> None:
    find({"h264": LIMITS, "vp9": LIMITS})
    chosen = choose_placement(DataConfig(num_workers=8, prefetch=4), CUDA)
    assert (chosen.engines, chosen.device_id, chosen.reason) == (7, 0, "")
    assert (chosen.pipelines, chosen.threads, chosen.workers, chosen.prefetch) == (4, 4, 2, 1)  # 16 clips on 7 engines
    sizes = (("h264", 340), ("h264", 9000), ("mpeg2video", 340))
    videos = [CodedFormat(codec, "yuv420p", width, 256) for codec, width in sizes]
    assert chosen.describe(videos) == (
        "decoding h264 on the GPU: 7 NVDEC engines, 4 pipelines × 4 threads, 8 workers; "
        "PyAV decodes the rest: 1 h264, 1 mpeg2video; NVDEC is set up again for every clip of 1 videos "
        "whose sides are not multiples of 16 (tgmae-data compact fixes that)"
    )
    assert chosen.describe([CodedFormat("h264", "yuv420p", 336, 256)]).endswith("8 workers")
    one = choose_placement(DataConfig(pipelines=1, threads=3), CUDA)
    assert (one.pipelines, one.threads, one.workers, one.prefetch) == (1, 3, 2, 2)
    assert choose_placement(DataConfig(pipelines=3), CUDA).threads == 5


def test_engines_are_counted_once() -> None:
    assert count_engines({"h264": LIMITS, "hevc": replace(LIMITS, engines=3)}) == 7
    assert count_engines(None) == count_engines({}) == 0


def test_codecs_whose_pictures_dali_miscounts_stay_with_pyav() -> None:
    every = make_driver(dict.fromkeys(range(12), H200))
    assert set(read_limits(every)) == {"h264", "hevc", "vp8", "vp9"}


@pytest.mark.slow
def test_a_run_says_who_decodes(find: Callable[[object], None], tmp_path: Path) -> None:
    """Turned videos are measured as they are coded."""
    write_numbered(tmp_path / "turned.mp4", rotation=90, width=128, height=160)  # coded as 160×128
    write_numbered(tmp_path / "upright.mp4", width=128, height=160)
    index_folder(tmp_path, tmp_path / "m.parquet", num_workers=1)
    manifest, config = read_manifest(tmp_path / "m.parquet"), PRESETS["demo"]
    find({"h264": replace(LIMITS, max_height=130)})
    words = describe_decoding(choose_placement(config.data, CUDA), manifest, 29)
    assert words == (
        "decoding h264 on the GPU: 7 NVDEC engines, 4 pipelines × 4 threads, 4 workers; PyAV decodes the rest: 1 h264"
    )
    for kind in ("dali", "pyav"):
        sampler = ClipSampler(manifest=manifest, data=config.data, num_frames=8, batch_size=1, seed=0)
        pipeline = open_pipeline(kind, manifest, sampler, config.data, 96, 0, CPU)  # type: ignore[arg-type]
        assert pipeline.describe() == f"{kind}, decoding on the CPU{', 2 workers' * (kind == 'dali')}"
        pipeline.close()


@pytest.mark.slow
def test_a_run_says_what_nvdec_must_not_get(find: Callable[[object], None], tmp_path: Path) -> None:
    """Which only the files say, and of which a few are tried."""
    for number in range(40):
        write_numbered(tmp_path / f"{number:02}.{'avi' if number % 2 else 'mp4'}", num_frames=8, width=128, height=160)
    index_folder(tmp_path, tmp_path / "m.parquet", num_workers=1, min_frames=1)
    find({"h264": LIMITS})
    words = describe_decoding(choose_placement(DataConfig(), CUDA), read_manifest(tmp_path / "m.parquet"), 8)
    assert words.endswith(
        "4 workers; but 7 of 14 videos tried go to PyAV too (avi does not number the frames in its packets): "
        "tgmae-data compact fixes that"
    )


def test_auto_without_nvdec_says_why(find: Callable[[object], None]) -> None:
    find(NoNvdec("the library is missing"))
    chosen = choose_placement(DataConfig(), CUDA)
    assert (chosen.limits, chosen.device_id, chosen.pipelines, chosen.threads) == (None, 0, 1, 2)
    assert chosen.describe([]) == (
        "decoding on the CPU (the library is missing), then clips are copied to the GPU, 2 workers"
    )
    with pytest.raises(ValueError, match=r"--data.decode gpu cannot run: the library is missing; .*decode cpu"):
        choose_placement(DataConfig(decode="gpu"), CUDA)


def test_the_cpu_where_it_is_asked_for(find: Callable[[object], None]) -> None:
    find(AssertionError("not to be asked"))
    chosen = choose_placement(DataConfig(decode="cpu"), CUDA)
    assert (chosen.limits, chosen.device_id, chosen.reason) == (None, 0, "because of --data.decode cpu")
    for decode in ("auto", "cpu"):
        here = choose_placement(DataConfig(decode=decode, num_workers=5, pipelines=2), CPU)  # type: ignore[arg-type]
        assert (here.limits, here.device_id, here.reason) == (None, None, "")
        assert (here.pipelines, here.threads, here.workers, here.prefetch) == (2, 2, 2, 1)
        assert here.describe([]) == "decoding on the CPU, 2 pipelines × 2 threads, 4 workers"
    assert choose_placement(DataConfig(num_workers=1), CPU).describe([]) == "decoding on the CPU, 1 worker"
    with pytest.raises(ValueError, match=r"--data.decode gpu needs a CUDA device; use auto or cpu"):
        choose_placement(DataConfig(decode="gpu"), CPU)


def test_cuda_that_is_not_there_has_no_nvdec(monkeypatch: pytest.MonkeyPatch) -> None:
    """Although the driver is: the GPU hidden from the process, or too old for torch."""
    monkeypatch.setattr(decoding, "load_library", lambda: make_driver({4: H200}))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(NoNvdec, match="torch finds no CUDA device"):
        find_nvdec(CUDA)


@pytest.mark.gpu
@pytest.mark.usefixtures("nvdec")
def test_nvdec_of_this_gpu() -> None:
    found = find_nvdec(CUDA)
    assert {"h264", "hevc", "vp9"} <= found.keys() <= CODECS.keys()
    for limits in found.values():
        assert limits.engines >= 1
        assert limits.fit(1920, 1088), asdict(limits)
        assert not limits.fit(8, 8)
    chosen = choose_placement(DataConfig(), CUDA)
    assert chosen.limits == found
    assert chosen.device_id == 0


def test_workers_do_without_torch() -> None:
    """1.5 s and 300 MB each."""
    code = "import sys, dali_pipelines.workers.clip_worker, dali_pipelines.nvdec; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_cuts_are_those_of_a_resize_that_turns_over(tmp_path: Path) -> None:
    """Heights and widths are negative where the coded picture is flipped, before it is transposed."""
    for rotation in (0, 90, 180, 270):
        write_numbered(tmp_path / f"{rotation}.mp4", rotation=rotation)
    index_folder(tmp_path, tmp_path / "m.parquet", num_workers=1)
    manifest = read_manifest(tmp_path / "m.parquet")
    assert [manifest[row].rotation for row in range(4)] == [0, 180, 270, 90]
    data = DataConfig(stride=1, flip=True, crop_scales=(1.0,))
    plan = ClipSampler(manifest=manifest, data=data, num_frames=8, batch_size=4, seed=0)
    source = make_worker(manifest, plan, {"h264": LIMITS}, 32)
    signs = {0: (1, 1), 180: (-1, -1), 90: (-1, 1), 270: (1, -1)}  # 90: transposed, then left to right
    seen = set()
    for batch in range(4):
        for request in plan(batch):
            prepared = source.prepare((request,), True, np.empty(source.shape[2:], np.uint8))
            _, _, switches, cuts, *_ = prepared.arrays()
            rotation = manifest[request.row].rotation
            vertical, horizontal = signs[rotation]
            if request.flip and rotation % 180:
                vertical = -vertical  # left to right of the upright picture is top to bottom of the coded one
            elif request.flip:
                horizontal = -horizontal
            assert cuts[0, 4:].tolist() == [32 * vertical, 32 * horizontal]
            assert switches.tolist() == [1, rotation % 180 != 0, 0]
            seen.add((rotation, request.flip))
            assert np.all(cuts[0, 2:4] > cuts[0, :2])
    assert len(seen) >= 6
