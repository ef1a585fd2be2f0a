"""tgmae-data compact: re-encode a data set for training, and report what that gained."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import tyro

from dali_pipelines.workers.processes import count_cores
from engines.files import write_atomically
from tgmae.cli.parser.subcommands import SharedCommand, name_some
from tgmae.data.coders import CompactConfig

if TYPE_CHECKING:  # --help does without pyarrow, PyAV and numpy
    from rich.table import Table

    from dali_pipelines.types import Video
    from dali_pipelines.workers.team import Team
    from tgmae.data.compact import CompactResult
    from tgmae.data.manifest import Manifest

_ROUNDS = 3
_SAMPLE_VIDEOS, _SAMPLE_FRAMES = 16, 600  # on which speed is measured; frames of each video
_WINDOWS, _WINDOW_FRAMES = 4, 16  # clips of each of these videos, and their frames

_Sample = list[tuple[str, "Video"]]


@dataclass(frozen=True)
class Compact(SharedCommand):
    """Re-encode a data set for training: small frames, frequent keyframes, no B frames. The originals stay.

    Writes the videos, manifest.parquet and compact.json: bytes, and how fast frames and clips are decoded before and
    after. After an interruption the same command resumes. Under torchrun the processes share the work.
    """

    EXAMPLES: ClassVar = (
        "tgmae-data compact data/mine.parquet --out data/mine-small  # Re-encode to H.264 with a short side of 256.",
        "tgmae-data compact data/mine.parquet --out data/mine-12fps --fps 12 --short-side 320  # Keep fewer frames.",
    )

    # Parquet file made by `tgmae-data index` or `tgmae-data shapes`.
    manifest: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MANIFEST")]
    out: Path  # Folder to write: a new one, or one that the same command has begun.
    config: Annotated[CompactConfig, tyro.conf.arg(name="")] = field(default_factory=CompactConfig)
    root: Path | None = None  # Folder of the videos, where it is not the one that the manifest names.
    workers: int = field(default_factory=count_cores)  # Processes that encode, with one thread each.

    def share(self, team: Team) -> None:
        from rich.console import Console

        from tgmae.data.compact import compact, help_compact
        from tgmae.data.manifest import count_videos, open_manifest

        if not team.is_main:
            help_compact(self.out, self.workers, team)
            return
        source = open_manifest(self.manifest, self.root)
        if self.manifest.resolve().parent == self.out.resolve():
            raise ValueError(f"--out must not be the folder of the manifest, got {self.out} for {self.manifest}")
        result = compact(source, self.out, self.config, self.workers, team)
        name_some("left out", result.excluded, f", listed in {result.report}")
        num_new = len(result.rows) - result.num_reused
        print(
            f"{result.manifest}: {count_videos(len(result.rows))} ({result.num_reused} done before), "
            f"{len(result.excluded)} left out{f' ({result.report} says why)' * bool(result.excluded)}, "
            f"{result.seconds:.1f} s"
        )
        path = self.out / "compact.json"
        report = _read_report(path, len(result.rows))
        if num_new or report is None:
            report = make_report(source, result)
            report["settings"] = asdict(self.config)
            write_atomically(path, (json.dumps(report, indent=2) + "\n").encode())
        else:
            print("nothing was left to do; the report is from the earlier run")
        Console().print(_draw_table(report))
        print(f"report: {path}")


def make_report(source: Manifest, result: CompactResult) -> dict[str, Any]:
    """Return the sizes of a data set before and after, and how fast one process decodes a sample of each.

    The two are measured in three alternating rounds.
    """
    import numpy as np

    from engines.progress import progress_bar
    from tgmae.data.manifest import read_manifest

    target = read_manifest(result.manifest)
    pairs = [(source[row], target[place]) for place, row in enumerate(result.rows)]
    places = np.unique(np.linspace(0, len(pairs) - 1, min(_SAMPLE_VIDEOS, len(pairs))).round().astype(int))
    samples = {
        "before": [(source.file(result.rows[place]), pairs[place][0]) for place in places],
        "after": [(target.file(int(place)), pairs[place][1]) for place in places],
    }
    rates: dict[str, dict[str, list[float]]] = {when: {"frames_per_s": [], "clips_per_s": []} for when in samples}
    bar = progress_bar(total=4 * _ROUNDS, desc="measuring decode speed")
    for _ in range(_ROUNDS):
        for name, decode in (("frames_per_s", decode_whole), ("clips_per_s", decode_windows)):
            for when, sample in samples.items():
                rates[when][name].append(_rate_of(decode, sample))
                bar.update()
    bar.close()
    sides = {"before": [before for before, _ in pairs], "after": [after for _, after in pairs]}
    return {
        **{when: {**_total(videos), **rates[when]} for when, videos in sides.items()},
        "measured_on": [pairs[place][1].path for place in places],
        "excluded": len(result.excluded),
    }


def decode_whole(file: str, video: Video, place: int) -> int:
    """Decode a video from its start, 600 frames at most, and return the number of frames."""
    from dali_pipelines.video.decode import decode_frames

    frames = range(video.start, min(video.end, video.start + _SAMPLE_FRAMES))
    return sum(1 for _ in decode_frames(file, video, frames, seek=video.segment is not None))


def decode_windows(file: str, video: Video, place: int) -> int:
    """Decode windows of 16 frames and return their number.

    place  seed of where the windows begin, as shares of the video's length
    """
    import numpy as np

    from dali_pipelines.video.decode import decode_frames

    length = min(_WINDOW_FRAMES, video.length)
    for share in np.random.default_rng(place).random(_WINDOWS):
        first = video.start + int(share * (video.length - length + 1))
        for _ in decode_frames(file, video, range(first, first + length), seek=True):
            pass
    return _WINDOWS


def _rate_of(decode: Callable[[str, Video, int], int], sample: _Sample) -> float:
    started = time.perf_counter()
    count = sum(decode(file, video, place) for place, (file, video) in enumerate(sample))
    return count / (time.perf_counter() - started)


def _total(videos: list[Video]) -> dict[str, float]:
    files = {video.path: video for video in videos}.values()  # several videos may be segments of one file
    num_bytes = sum(video.num_bytes for video in files)
    pixels = sum(video.num_frames * video.width * video.height for video in files)
    return {
        "files": len(files),
        "frames": sum(video.length for video in videos),
        "bytes": num_bytes,
        "bits_per_pixel": 8 * num_bytes / pixels,
        "hours": sum(video.length / video.fps for video in videos if video.fps > 0) / 3600,
    }


def _read_report(path: Path, num_files: int) -> dict[str, Any] | None:
    """Return the report of an earlier run; None if it is missing or describes other videos."""
    try:
        report: dict[str, Any] = json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return report if report["after"]["files"] == num_files else None


def _draw_table(report: dict[str, Any]) -> Table:
    from rich.table import Table

    before, after = report["before"], report["after"]
    table = Table("", "before", "after", "ratio")

    def add(name: str, old: float, new: float, text: Callable[[float], str]) -> None:
        table.add_row(name, text(old), text(new), f"{new / old:.2f}" if old else "")

    add("files", before["files"], after["files"], lambda value: f"{value:.0f}")
    add("frames", before["frames"], after["frames"], lambda value: f"{value:.0f}")
    add("length, h", before["hours"], after["hours"], lambda value: f"{value:.3f}")
    add("size, MiB", before["bytes"] / 2**20, after["bytes"] / 2**20, lambda value: f"{value:.1f}")
    add("bits per pixel", before["bits_per_pixel"], after["bits_per_pixel"], lambda value: f"{value:.3f}")
    for name, unit in (("frames_per_s", "frames/s, whole"), ("clips_per_s", "clips/s, 16 frames")):
        old, new = before[name], after[name]
        ratio = statistics.median(new) / statistics.median(old)
        table.add_row(unit, _spread(old), _spread(new), f"{ratio:.2f}")
    sample = report["measured_on"]
    table.caption = (
        f"decode speed: one process, {len(sample)} video{'s' * (len(sample) != 1)}, "
        f"median (lowest to highest) of {_ROUNDS} alternating rounds"
    )
    return table


def _spread(rates: list[float]) -> str:
    digits = 1 if min(rates) < 100 else 0
    return f"{statistics.median(rates):.{digits}f} ({min(rates):.{digits}f} to {max(rates):.{digits}f})"
