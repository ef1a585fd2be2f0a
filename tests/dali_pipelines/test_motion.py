"""Motion vectors: a patch of texture that moves by (3, -2) pixels a frame gives that vector in its blocks."""

from __future__ import annotations

import os
from pathlib import Path

import av
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from dali_pipelines.types import Video
from dali_pipelines.video.decode import DecodeError
from dali_pipelines.video.motion import BLOCK, UNIT, read_motion
from tests.support.videos import make_video, stamp

WIDTH, HEIGHT, FRAMES, SIDE = 320, 240, 40, 64
CASES = {
    "p frames": ("libx264", "h264", {"bf": "0", "refs": "1", "g": "100"}),
    "b pyramid": ("libx264", "h264", {"bf": "3", "b-pyramid": "normal", "refs": "1", "g": "100"}),
    "short gop": ("libx264", "h264", {"bf": "0", "refs": "1", "g": "8"}),
    "mpeg4": ("mpeg4", "mpeg4", {"g": "100", "qscale": "2"}),
    "mpeg4 with b frames": ("mpeg4", "mpeg4", {"g": "100", "qscale": "2", "bf": "2"}),
}


def write_moving(path: Path, encoder: str, options: dict[str, str]) -> None:
    """A textured square moves right by 3 and up by 2 pixels a frame, over a textured still background.

    Even ground would not do: its blocks take on their neighbours' motion, which costs the encoder nothing.
    """
    generator = np.random.default_rng(0)

    def texture(width: int, height: int) -> NDArray[np.uint8]:
        noise = generator.integers(0, 255, (height // 4, width // 4, 3)).astype(np.uint8)
        return np.asarray(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC))

    square, ground = texture(SIDE, SIDE), texture(WIDTH, HEIGHT)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(encoder, rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for number in range(FRAMES):
            x, y = corner(number)
            frame = ground.copy()
            frame[y : y + SIDE, x : x + SIDE] = square
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def corner(number: int) -> tuple[int, int]:
    return 20 + 3 * number, 150 - 2 * number


def video(file: Path, codec: str, rotation: int = 0, mirrored: bool = False) -> Video:
    width, height = (HEIGHT, WIDTH) if rotation % 180 else (WIDTH, HEIGHT)
    return stamp(
        make_video(
            codec=codec, num_frames=FRAMES, width=width, height=height, rotation=rotation, mirrored=mirrored,
            keyframes=(0,), keyframe_pts=(0,),
        ),
        file,
    )  # fmt: skip


def inside(motion: NDArray[np.int8], number: int) -> NDArray[np.float64]:
    """Vectors in pixels a frame, [blocks, 2], of the blocks that lie well inside the square."""
    x, y = corner(number)
    rows = slice(-(-(y + 8) // BLOCK), (y + SIDE - 8) // BLOCK)
    columns = slice(-(-(x + 8) // BLOCK), (x + SIDE - 8) // BLOCK)
    return motion[number, :, rows, columns].reshape(2, -1).T * UNIT


@pytest.mark.parametrize("case", list(CASES))
def test_a_known_motion_is_read(case: str, tmp_path: Path) -> None:
    encoder, codec, options = CASES[case]
    write_moving(tmp_path / "a.mp4", encoder, options)
    motion = read_motion(str(tmp_path / "a.mp4"), video(tmp_path / "a.mp4", codec))
    assert motion.shape == (FRAMES, 2, HEIGHT // BLOCK, WIDTH // BLOCK)
    # FFmpeg's MPEG-4 encoder takes some frames to find steps of nine pixels, from P frame to P frame.
    first = 16 if "with b" in case else 1
    vectors = np.concatenate([inside(motion, number) for number in range(first, FRAMES)])
    right = (np.abs(vectors - [3, -2]) <= 0.5).all(1)
    assert right.mean() > 0.95
    for number in range(first, FRAMES):  # frames without vectors of their own too
        np.testing.assert_allclose(np.median(inside(motion, number), axis=0), [3, -2], atol=0.5)
    still = motion[:, :, :, 17:]  # the square does not come here before frame 63
    assert np.abs(still).mean() * UNIT < 0.05


TURNS = [
    (90, False, (2, 3)), (180, False, (-3, 2)), (270, False, (-2, -3)),
    (0, True, (-3, -2)), (90, True, (-2, 3)), (180, True, (3, 2)), (270, True, (2, -3)),
]  # fmt: skip


@pytest.mark.parametrize(("rotation", "mirrored", "expected"), TURNS)
def test_vectors_turn_with_the_picture(
    rotation: int, mirrored: bool, expected: tuple[int, int], tmp_path: Path
) -> None:
    """Right and up is, after a quarter turn clockwise, down and right; mirrored then, down and left."""
    write_moving(tmp_path / "a.mp4", "libx264", {"bf": "0", "refs": "1", "g": "100"})
    plain = read_motion(str(tmp_path / "a.mp4"), video(tmp_path / "a.mp4", "h264"))
    turned = read_motion(str(tmp_path / "a.mp4"), video(tmp_path / "a.mp4", "h264", rotation, mirrored))
    expected_speed = np.rot90(np.hypot(*np.moveaxis(plain.astype(float), 1, 0)), -rotation // 90, axes=(1, 2))
    np.testing.assert_array_equal(
        np.hypot(*np.moveaxis(turned.astype(float), 1, 0)),
        expected_speed[..., ::-1] if mirrored else expected_speed,
    )
    moving = np.abs(turned).sum(1) * UNIT > 4
    found = np.moveaxis(turned, 1, -1)[moving] * UNIT
    np.testing.assert_allclose(np.median(found, axis=0), expected, atol=0.5)


def test_what_has_no_vectors_says_so(tmp_path: Path) -> None:
    file = tmp_path / "intra.mp4"
    write_moving(file, "libx264", {"g": "1"})
    with pytest.raises(ValueError, match=r"vp9 videos carry no motion vectors; h264 and mpeg4 do"):
        read_motion(str(file), video(file, "vp9"))
    with pytest.raises(DecodeError, match="No such file or directory"):
        read_motion(str(tmp_path / "missing.mp4"), video(file, "h264"))
    with pytest.raises(DecodeError, match="its frames carry no motion vectors"):
        read_motion(str(file), video(file, "h264"))


def test_no_motion_of_a_file_that_was_replaced(tmp_path: Path) -> None:
    """Its vectors would be kept under the digest of the video that was indexed."""
    file = tmp_path / "a.mp4"
    write_moving(file, "libx264", {"bf": "0"})
    indexed = video(file, "h264")
    os.utime(file, ns=(indexed.mtime_ns, indexed.mtime_ns + 1))
    with pytest.raises(DecodeError, match="changed since it was indexed"):
        read_motion(str(file), indexed)
