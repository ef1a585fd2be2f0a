"""Metrics survive a crash and a resume without duplicate or broken lines."""

from __future__ import annotations

import contextlib
import io
import json
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.support.faults.disks import full_disk
from tests.support.faults.flips import TryFlips
from tgmae.pictures.loss_curve import draw_loss
from tgmae.telemetry.metrics import METRICS_FILE, MetricsWriter, Throughput, read_metrics


def write(run_dir: Path, first_step: int, steps: range, loss: float = 1.0, tensorboard: bool = False) -> None:
    with closing(MetricsWriter(run_dir, first_step, tensorboard)) as writer:
        for step in steps:
            writer.write(step, {"loss": loss, "wait_share": 0.25})


def test_reports_come_back_in_order(tmp_path: Path) -> None:
    write(tmp_path, 0, range(5, 30, 5))
    expected = [{"step": step, "loss": 1.0, "wait_share": 0.25} for step in range(5, 30, 5)]
    assert read_metrics(tmp_path) == expected
    lines = [json.loads(line) for line in (tmp_path / METRICS_FILE).read_text().splitlines()]
    assert [line.pop("checksum") and line for line in lines] == expected


def test_a_report_is_on_disk_at_once(tmp_path: Path) -> None:
    with closing(MetricsWriter(tmp_path, 0, tensorboard=False)) as writer:
        writer.write(1, {"loss": 2.0})
        assert read_metrics(tmp_path) == [{"step": 1, "loss": 2.0}]


def test_resume_drops_the_steps_that_are_redone(tmp_path: Path) -> None:
    write(tmp_path, 0, range(1, 11), loss=1.0)
    write(tmp_path, 6, range(7, 9), loss=2.0)
    got = [(line["step"], line["loss"]) for line in read_metrics(tmp_path)]
    assert got == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 1.0), (5, 1.0), (6, 1.0), (7, 2.0), (8, 2.0)]
    assert [path.name for path in tmp_path.iterdir()] == [METRICS_FILE]


def test_a_fresh_start_drops_everything(tmp_path: Path) -> None:
    write(tmp_path, 0, range(1, 4))
    write(tmp_path, 0, range(0))
    assert read_metrics(tmp_path) == []


@pytest.mark.parametrize("cut", [1, 2, 5, 30])
def test_a_truncated_line_is_ignored(tmp_path: Path, cut: int) -> None:
    write(tmp_path, 0, range(1, 4))
    file = tmp_path / METRICS_FILE
    whole = file.read_bytes()
    file.write_bytes(whole[: -1 - cut])
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]
    write(tmp_path, 3, range(4, 6))  # new lines do not run into the rest of the broken one
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 4, 5]


@pytest.mark.parametrize(
    ("damage", "left"),
    [
        (lambda lines: [*lines[:4], b"\0" * 300], [1, 2, 3, 4]),  # what a power cut can leave
        (lambda lines: [lines[0], b"\xff\xfe" + lines[1], *lines[2:]], [1, 3, 4, 5]),
        (lambda lines: [lines[0].replace(b"step", b"stfp"), *lines[1:]], [2, 3, 4, 5]),
        (lambda lines: [lines[0], lines[1].replace(b"0.25", b"0.75"), *lines[2:]], [1, 3, 4, 5]),
        (lambda lines: [*lines[:3], lines[3].replace(b"checksum", b"chgcksum"), lines[4]], [1, 2, 3, 5]),
        (lambda lines: [*lines[:2], b"7", *lines[3:]], [1, 2, 4, 5]),
        (lambda lines: [*lines[:2], b'{"step": 3, "loss": null}', *lines[3:]], [1, 2, 4, 5]),  # edited
        (lambda lines: [*lines[:4], lines[4][:9]], [1, 2, 3, 4]),
    ],
)
def test_damaged_lines_are_left_out_and_named(
    tmp_path: Path, damage: Callable[[list[bytes]], list[bytes]], left: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, 0, range(1, 6))
    file = tmp_path / METRICS_FILE
    file.write_bytes(b"\n".join(damage(file.read_bytes().split(b"\n")[:5])))
    number = next(number for number in range(1, 6) if number not in left)
    assert [line["step"] for line in read_metrics(tmp_path)] == left
    assert capsys.readouterr().err == f"left out of {file}, cut off or damaged: lines {number}\n"
    with closing(MetricsWriter(tmp_path, 5, tensorboard=False)) as writer:
        assert writer.note == f"left out of {file}, cut off or damaged: lines {number}"
    with closing(MetricsWriter(tmp_path, 5, tensorboard=False)) as writer:
        assert writer.note == ""
    assert [line["step"] for line in read_metrics(tmp_path)] == left


def test_no_flipped_bit_is_silent(tmp_path: Path, try_flips: TryFlips) -> None:
    write(tmp_path, 0, range(1, 9))
    whole = read_metrics(tmp_path)

    def read() -> object:
        found = read_metrics(tmp_path)
        if 6 <= len(found) < 8 and all(line in whole for line in found):  # a lost end of a line costs two
            raise ValueError("left out and named")
        return found

    assert try_flips(tmp_path / METRICS_FILE, read).refused


def test_reports_of_other_programs_and_of_earlier_versions_are_read(tmp_path: Path) -> None:
    """A checksum is of values: their order and white space may change, and there may be none."""
    write(tmp_path, 0, range(1, 3))
    lines = [json.loads(line) for line in (tmp_path / METRICS_FILE).read_text().splitlines()]
    expected = read_metrics(tmp_path)
    for texts in (
        [json.dumps(line, separators=(",", ":"), sort_keys=True) for line in lines],
        [json.dumps({name: value for name, value in line.items() if name != "checksum"}) for line in lines],
    ):
        (tmp_path / METRICS_FILE).write_text("\n".join(texts))
        assert read_metrics(tmp_path) == expected


@pytest.mark.parametrize(("limit", "tensorboard", "name"), [(100, False, METRICS_FILE), (1200, True, "tensorboard")])
def test_a_full_disk_is_one_error_that_names_the_file(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], limit: int, tensorboard: bool, name: str
) -> None:
    """And TensorBoard's thread says nothing of its own."""
    writer = MetricsWriter(tmp_path, 0, tensorboard)
    writer.write(1, {"loss": 1.0})

    def fill() -> None:
        for step in range(2, 12 if tensorboard else 5):
            writer.write(step, {"loss": 1.0, "rate": 1.0, "norm": 1.0})
        writer.close()

    with full_disk(limit):
        with pytest.raises(OSError, match=str(tmp_path / name)):
            fill()
        with contextlib.suppress(OSError):
            writer.close()
    assert "Traceback" not in capfd.readouterr().err


def test_no_file_means_no_reports(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []


def test_tensorboard_has_the_same_numbers(tmp_path: Path) -> None:
    write(tmp_path, 0, range(1, 11), loss=1.0, tensorboard=True)
    write(tmp_path, 6, range(7, 9), loss=2.0, tensorboard=True)
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    got = sorted((event.step, event.value) for event in board.Scalars("loss"))
    assert got == [(line["step"], line["loss"]) for line in read_metrics(tmp_path)]
    assert {event.value for event in board.Scalars("wait_share")} == {0.25}


def test_tensorboard_has_the_same_pictures(tmp_path: Path) -> None:
    """Beside the numbers, without those that a resumed run draws again."""
    (tmp_path / "pictures").mkdir()
    drawn = {}
    for first, steps in ((0, (1, 5)), (3, (5, 7))):
        with closing(MetricsWriter(tmp_path, first, tensorboard=True)) as writer:
            for step in steps:
                path = tmp_path / "pictures" / f"{step}.png"
                drawn[step] = np.random.default_rng(first + step).integers(0, 256, (20, 30, 3), np.uint8)
                Image.fromarray(drawn[step]).save(path)
                writer.write_picture(step, path)
            writer.write(steps[-1], {"loss": 1.0})
    board = EventAccumulator(str(tmp_path / "tensorboard"), {"images": 0}).Reload()
    assert board.Tags()["scalars"] == ["loss"]
    events = board.Images("pictures")
    assert [event.step for event in events] == [1, 5, 7]
    for event in events:
        shown = np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))
        np.testing.assert_array_equal(shown, drawn[event.step])


def test_without_tensorboard_no_picture_is_read(tmp_path: Path) -> None:
    with closing(MetricsWriter(tmp_path, 0, tensorboard=False)) as writer:
        writer.write_picture(1, tmp_path / "missing.png")
    assert not (tmp_path / "tensorboard").exists()


def test_draw_loss_writes_a_picture(tmp_path: Path) -> None:
    assert draw_loss(tmp_path) is None
    write(tmp_path, 0, range(1, 20))
    path = draw_loss(tmp_path)
    assert path == tmp_path / "loss.png"
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert picture.width > 400
        colours = picture.convert("RGB").getcolors(1 << 20)
    assert colours is not None
    assert (31, 119, 180) in {colour for _, colour in colours}  # tab:blue, the loss


def test_losses_on_held_out_clips_are_drawn_and_in_tensorboard(tmp_path: Path) -> None:
    with closing(MetricsWriter(tmp_path, 0, tensorboard=True)) as writer:
        for step in range(1, 9):
            if step % 4 == 0:
                writer.write(step, {"validation_loss": 2.0, "validation_share": 0.5})
            writer.write(step, {"loss": 1.0, "wait_share": 0.25})
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in board.Scalars("validation_loss")] == [(4, 2.0), (8, 2.0)]
    path = draw_loss(tmp_path)
    assert path is not None
    with Image.open(path) as picture:
        height = picture.height // 2
        colours = picture.convert("RGB").crop((0, 0, picture.width, height)).getcolors(1 << 20)
    assert colours is not None
    assert (255, 127, 14) in {colour for _, colour in colours}  # tab:orange


def test_a_pause_does_not_count() -> None:
    """A minute of validation changes no speed, and is reported as a share of the run."""
    throughput = Throughput()
    throughput.count(8, {"loss": 1.0})
    time.sleep(0.01)
    throughput._run_begun_s -= 60  # as if a minute had passed
    throughput._begun_s -= 60
    throughput.pause(60)
    assert throughput.report(0.0, {})["step_ms"] < 50_000
    assert 0.5 < throughput.paused_share < 1
    assert "% validating" in throughput.summary(0.0)


def test_throughput_counts_since_the_last_report() -> None:
    """Clock readings before and after each call bracket the times, so that a busy machine changes nothing."""
    clock = time.perf_counter
    before_s, throughput, after_s = clock(), Throughput(), clock()
    time.sleep(0.05)
    throughput.count(8, {"loss": 1.0})
    throughput.count(8, {"loss": 0.5})
    before_first_s, first, after_first_s = clock(), throughput.report(0.02, {"score": 0.01}), clock()
    shortest_s, longest_s = before_first_s - after_s, after_first_s - before_s
    assert 16 / longest_s <= first["clips_per_s"] <= 16 / shortest_s
    assert 1000 * shortest_s / 2 <= first["step_ms"] <= 1000 * longest_s / 2
    assert first["wait_ms"] == pytest.approx(10)
    assert first["loss"] == pytest.approx(0.75)
    assert 0.02 / longest_s <= first["wait_share"] <= 0.02 / shortest_s
    assert first["score_share"] == pytest.approx(first["wait_share"] / 2)
    assert "mask_share" not in first
    time.sleep(0.02)
    throughput.count(4, {"loss": 0.25})
    before_second_s, second, after_second_s = clock(), throughput.report(0.03, {"score": 0.04, "mask": 0.002}), clock()
    assert 4 / (after_second_s - before_first_s) <= second["clips_per_s"] <= 4 / (before_second_s - after_first_s)
    assert second["wait_ms"] == pytest.approx(10)
    assert second["loss"] == pytest.approx(0.25)
    # The totals rose from 0.01 to 0.04, for a stage that came later from nothing to 0.002; waiting from 0.02 to 0.03.
    assert second["score_share"] == pytest.approx(3 * second["wait_share"])
    assert second["mask_share"] == pytest.approx(0.2 * second["wait_share"])
    words, end_s = throughput.summary(waited_s=0.03), clock()
    first_step_s = float(words.split("after ")[1].split(" s)")[0])
    assert 0 < first_step_s <= after_first_s - before_s + 0.05
    rate, share = float(words.split(", ")[1].split()[0]), float(words.split(", ")[2].split("%")[0])
    assert 20 / (end_s - before_s) - 0.1 <= rate <= 20 / (after_second_s - after_s) + 0.1
    assert 3 / (end_s - before_s) - 1 <= share <= 3 / (after_second_s - after_s) + 1
