"""The demo data set depends on its seed alone, and its boxes, captions and labels are true."""

from __future__ import annotations

import csv
from pathlib import Path

import av
import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from tgmae.data.manifest import read_manifest
from tgmae.shapes.scenes import (
    COLORS,
    HEIGHT,
    MOTIONS,
    NUM_FRAMES,
    SHAPES,
    WIDTH,
    MovingShape,
    make_shapes,
    render_clip,
    sample_object,
    write_clip,
)

COUNT = 10


def decode(file: Path) -> NDArray[np.uint8]:
    with av.open(str(file)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def is_coloured(frame: NDArray[np.uint8], color: str, similarity: float = 0.998) -> NDArray[np.bool_]:
    """Return where pixels [..., 3] have the hue of an object. The texture darkens a colour but keeps its hue."""
    pixels, wanted = frame.astype(np.float64), np.array(COLORS[color], np.float64)
    cosine = pixels @ wanted / (np.linalg.norm(pixels, axis=-1) * np.linalg.norm(wanted) + 1e-9)
    found: NDArray[np.bool_] = cosine > similarity
    return found


def draw_single(index: int) -> tuple[NDArray[np.uint8], MovingShape]:
    frames, [obj] = render_clip(np.random.default_rng((0, index)), 1)
    return frames, obj


@pytest.fixture(scope="module", params=["h264", "vp9"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a data set with two objects per clip."""
    folder = tmp_path_factory.mktemp(request.param)
    make_shapes(folder, count=COUNT, seed=5, codec=request.param, num_objects=2, num_workers=2)
    return folder


# Seeds


def test_same_seed_same_frames_and_objects() -> None:
    def draw(seed: int) -> tuple[NDArray[np.uint8], list[str], list[tuple[int, int, int, int]]]:
        frames, objects = render_clip(np.random.default_rng((seed, 3)), 2)
        return frames, [t.caption for t in objects], [t.box(number) for t in objects for number in range(NUM_FRAMES)]

    one, same, other = draw(0), draw(0), draw(1)
    np.testing.assert_array_equal(one[0], same[0])
    assert one[1:] == same[1:]
    assert np.abs(one[0].astype(int) - other[0]).mean() > 10
    assert one[2] != other[2]


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["h264", "vp9"])
def test_same_seed_same_decoded_frames(tmp_path: Path, codec: str) -> None:
    (tmp_path / "videos").mkdir()
    decoded = set()
    for _ in range(6):
        write_clip(7, out=tmp_path, seed=5, codec=codec, num_objects=2)  # type: ignore[arg-type]
        [file] = (tmp_path / "videos").iterdir()
        decoded.add(decode(file).tobytes())
    assert len(decoded) == 1


@pytest.mark.slow
def test_a_clip_follows_from_seed_and_index_alone(made: Path) -> None:
    """The number of clips, the number of processes and the clips made before do not matter."""
    stored = pq.read_table(made / "boxes.parquet").to_pylist()
    for index in (0, 7):
        frames, objects = render_clip(np.random.default_rng((5, index)), 2)
        [file] = (made / "videos").glob(f"{index:05d}.*")
        assert np.abs(decode(file).astype(int) - frames).mean() < 6  # compression; another clip differs by over 10
        boxes = [row["boxes"] for row in stored if row["path"] == f"videos/{file.name}"]
        assert boxes == [[list(obj.box(number)) for number in range(NUM_FRAMES)] for obj in objects]


def test_clips_of_one_seed_differ() -> None:
    assert len({draw_single(index)[0].tobytes() for index in range(8)}) == 8


# Boxes


@pytest.mark.slow
def test_boxes_hold_the_object_and_little_else() -> None:
    drawn = [draw_single(index) for index in range(20)]
    coloured = [(frames, obj) for frames, obj in drawn if obj.color != "white"]  # the background has that hue
    assert len(coloured) > 12
    for frames, obj in coloured:
        for number in range(0, NUM_FRAMES, 3):
            check_box(frames[number], obj, number)


def check_box(frame: NDArray[np.uint8], obj: MovingShape, number: int) -> None:
    left, top, right, bottom = obj.box(number)
    assert 0 <= left < right <= WIDTH
    assert 0 <= top < bottom <= HEIGHT
    found = is_coloured(frame, obj.color)
    nearby = np.zeros_like(found)
    nearby[max(top - 6, 0) : bottom + 6, max(left - 6, 0) : right + 6] = True
    assert (found & ~nearby).sum() < 0.03 * found.sum(), obj.caption  # specks of the background may have the hue
    y, x = np.nonzero(found & nearby)
    assert len(x) > 100, obj.caption
    assert left <= x.min() <= x.max() < right, obj.caption
    assert top <= y.min() <= y.max() < bottom, obj.caption
    # Pixels on the edge blend with the background; the tip of a star blends for a few.
    assert max(x.min() - left, y.min() - top, right - 1 - x.max(), bottom - 1 - y.max()) <= 4, obj.caption


@pytest.mark.slow
def test_boxes_fit_the_decoded_videos(made: Path) -> None:
    """A stored box belongs to the file, object and frame that it names."""
    manifest = read_manifest(made / "manifest.parquet")
    videos = {manifest[row].path: decode(Path(manifest.file(row))) for row in range(len(manifest))}
    checked = 0
    for row in pq.read_table(made / "boxes.parquet").to_pylist():
        if row["color"] in ("white", "pink", "red"):  # compression sometimes moves the background near these
            continue
        frames = videos[row["path"]]
        assert len(frames) == len(row["boxes"]) == NUM_FRAMES
        for number in range(1, NUM_FRAMES, 6):
            left, top, right, bottom = row["boxes"][number]
            found = is_coloured(frames[number], row["color"], 0.99)
            if found.sum() > 150:  # the other object may lie on top
                assert found[max(top - 3, 0) : bottom + 3, max(left - 3, 0) : right + 3].sum() > 0.9 * found.sum()
                checked += 1
    assert checked > 40


def centre(box: tuple[int, int, int, int]) -> tuple[float, float]:
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


@pytest.mark.parametrize("motion", MOTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_boxes_move_as_the_motion_says(motion: str, shape: str) -> None:
    for seed in range(5):
        obj = sample_object(np.random.default_rng(seed), motion, "red", shape)
        boxes = [obj.box(number) for number in range(NUM_FRAMES)]
        (x0, y0), (x1, y1) = centre(boxes[0]), centre(boxes[-1])
        areas = np.array([(b[2] - b[0]) * (b[3] - b[1]) for b in boxes])
        along = {"left": x0 - x1, "right": x1 - x0, "up": y0 - y1, "down": y1 - y0}
        if motion in along:
            assert along[motion] > 40
            steps = np.diff([centre(box)["up down".count(motion)] for box in boxes])
            assert (steps <= 0.5).all() if motion in ("left", "up") else (steps >= -0.5).all()
            assert abs(y1 - y0 if motion in ("left", "right") else x1 - x0) < 1
        elif motion == "growing":
            assert areas[-1] > 3 * areas[0]
        elif motion == "shrinking":
            assert areas[0] > 3 * areas[-1]
        elif motion == "spinning":
            middles = np.array([centre(box) for box in boxes])
            assert np.ptp(middles, axis=0).max() < 20
            assert np.ptp(obj.angle) == pytest.approx(2 * np.pi)
        else:  # circling: there and back
            middles = np.array([centre(box) for box in boxes])
            assert np.ptp(middles, axis=0).min() > 30
            assert np.hypot(x1 - x0, y1 - y0) < 3


def test_objects_stay_inside_the_frame() -> None:
    draw = np.random.default_rng(0)
    for motion in MOTIONS:
        for shape in SHAPES:
            obj = sample_object(draw, motion, "red", shape)
            corners = np.concatenate([obj.corners(number) for number in range(NUM_FRAMES)])
            assert corners.min() > -0.01
            assert corners[:, 0].max() < WIDTH + 0.01
            assert corners[:, 1].max() < HEIGHT + 0.01


# Labels, captions, splits


def test_captions_labels_and_splits_agree(made: Path) -> None:
    manifest = read_manifest(made / "manifest.parquet")
    assert len(manifest) == COUNT
    boxes = {(row["path"], row["caption"]): row for row in pq.read_table(made / "boxes.parquet").to_pylist()}
    assert len(boxes) == 2 * COUNT
    with (made / "captions.csv").open(newline="") as file:
        listed = {row["path"]: row for row in csv.DictReader(file)}
    for number in range(COUNT):
        video = manifest[number]
        assert video.split == ("val" if number % 5 == 4 else "train")
        assert (video.num_frames, video.fps, video.width, video.height) == (NUM_FRAMES, 25.0, WIDTH, HEIGHT)
        assert video.codec == ("vp9" if video.path.endswith(".webm") else "h264")
        assert len(video.keyframes) >= 3  # so that decoding can start in the middle
        assert video.label == boxes[video.path, 0]["motion"] in MOTIONS
        assert len(video.captions) == 2
        for place, caption in enumerate(video.texts):
            obj = boxes[video.path, place]
            words = caption.split()
            assert words[0] == ("an" if words[1][0] in "aeiou" else "a")
            assert words[1:3] == [obj["color"], obj["shape"]]
            assert words[3:] in ([obj["motion"]], ["moving", obj["motion"]])
            assert listed[video.path][f"caption{place}"] == caption


@pytest.mark.slow
def test_two_objects_differ_in_colour_and_shape() -> None:
    for index in range(12):
        _, objects = render_clip(np.random.default_rng((0, index)), 2)
        assert len({obj.color for obj in objects}) == len({obj.shape for obj in objects}) == 2


@pytest.mark.slow
def test_drawn_in_the_colour_that_is_named() -> None:
    """With two objects the second lies on top, so its middle shows its own colour."""
    for index in range(12):
        frames, objects = render_clip(np.random.default_rng((1, index)), 2)
        top = objects[-1]
        for number in (0, NUM_FRAMES // 2, NUM_FRAMES - 1):
            x, y = int(top.x[number]), int(top.y[number])
            assert is_coloured(frames[number, y - 2 : y + 3, x - 2 : x + 3], top.color, 0.999).all()


@pytest.mark.parametrize(("count", "num_objects"), [(0, 1), (-1, 1), (4, 0), (4, 3)])
def test_impossible_counts_are_refused(tmp_path: Path, count: int, num_objects: int) -> None:
    with pytest.raises(ValueError, match=f"at least one clip and 1 or 2 objects, got {count} and {num_objects}"):
        make_shapes(tmp_path / "out", count=count, seed=0, codec="h264", num_objects=num_objects, num_workers=1)
    assert not (tmp_path / "out").exists()
