"""Map (seed, epoch, position) to a `ClipRequest`. Nothing else in the loader is random.

Videos are drawn as one endless stream: a permutation of all rows, then the next epoch's permutation, and so on. Batch b
of rank r out of W takes its share of the stream's next W · (B / repeat) videos. Every video therefore comes exactly
once per epoch over all ranks, no batch is ever smaller, and resuming needs nothing but the batch number. With weights
for several data sets the stream is another one (`WeightedOrder`), of which an epoch takes as many videos.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from dali_pipelines.types import ClipRequest, CropBox, Video
from tgmae.config.captions import CaptionsConfig
from tgmae.config.data import DataConfig
from tgmae.data.manifest import Manifest
from tgmae.data.mixing.figures import order_by_weight
from tgmae.data.mixing.joined import data_sets, naming_set

# Independent random streams of one seed: the order of an epoch, the frames of a video, the rest of a clip.
_ORDER, _FRAMES, _CLIP = 0, 1, 2


@dataclass
class ClipSampler:
    """A `BatchSampler` for one process: call it with a batch number.

    num_frames   frames per clip           batch_size   clips per batch on this process
    """

    manifest: Manifest
    data: DataConfig
    num_frames: int
    batch_size: int
    seed: int
    rank: int = 0
    world_size: int = 1
    captions: CaptionsConfig = field(default_factory=CaptionsConfig)
    _order: tuple[int, NDArray[np.int64]] = field(default=(-1, np.empty(0, np.int64)), repr=False)

    def __post_init__(self) -> None:
        sets = data_sets(self.manifest)
        self._firsts = [one.first for one in sets]
        self._dealt = order_by_weight(sets, self.data, self.seed)
        for one in sets:
            with naming_set(one):
                self._check_lengths(one.manifest)

    def _check_lengths(self, manifest: Manifest) -> None:
        span = clip_span(self.data, self.num_frames)
        ends, starts = (manifest.table.column(name).to_pylist() for name in ("end_frame", "start_frame"))
        longest = max(end - start for start, end in zip(starts, ends, strict=True))
        if span > longest:
            raise ValueError(
                f"a clip spans {span} frames ({self.num_frames} frames, stride {self.data.stride}) but the longest "
                f"video has {longest}; lower --data.stride or --model.num-frames"
            )

    def __call__(self, batch: int) -> tuple[ClipRequest, ...]:
        """Return the requests of a batch. Requests that share a decode stand next to each other."""
        return tuple(request for unit in range(self._units) for request in self.unit(batch, unit))

    def unit(self, batch: int, unit: int) -> tuple[ClipRequest, ...]:
        """Return the `repeat` requests of a batch that share its decode number `unit`."""
        number = (batch * self.world_size + self.rank) * self._units + unit
        epoch, place = divmod(number, len(self.manifest))
        row = self._find_row(number)
        video = self.manifest[row]
        frames = sample_frames(_generator(self.seed, _FRAMES, epoch, place), video, self.data, self.num_frames)
        requests = []
        for repeat in range(self.data.repeat):
            position = place * self.data.repeat + repeat
            generator = _generator(self.seed, _CLIP, epoch, position)
            requests.append(
                ClipRequest(
                    row=row,
                    epoch=epoch,
                    position=position,
                    frames=frames,
                    crop=sample_crop(generator, video.width, video.height, self.data.crop_scales),
                    flip=self.data.flip and bool(generator.integers(2)),
                    caption=self._sample_caption(generator, video),
                    mask_seed=int(generator.integers(2**63)),
                    augment_seed=int(generator.integers(2**63)),
                )
            )
        return tuple(requests)

    @property
    def _units(self) -> int:
        return self.batch_size // self.data.repeat

    def _sample_caption(self, generator: Generator, video: Video) -> int:
        kept = self.captions.choose(video.captions) or [0]
        drawn = int(generator.integers(len(kept)))
        return kept[drawn if self.data.captions == "random" else 0]

    def _find_row(self, number: int) -> int:
        """Return the row of the video with a number in the stream."""
        if self._dealt is not None:
            data_set, row = self._dealt.find(number)
            return self._firsts[data_set] + row
        epoch, place = divmod(number, len(self.manifest))
        return int(self._epoch_order(epoch)[place])

    def _epoch_order(self, epoch: int) -> NDArray[np.int64]:
        if self._order[0] != epoch:
            self._order = (epoch, _generator(self.seed, _ORDER, epoch).permutation(len(self.manifest)))
        return self._order[1]


@dataclass(frozen=True)
class FixedClips:
    """A `BatchSampler` that gives the same requests over and over, in their order."""

    requests: tuple[ClipRequest, ...]
    batch_size: int

    def __call__(self, batch: int) -> tuple[ClipRequest, ...]:
        """Return the requests of a batch."""
        places = range(batch * self.batch_size, (batch + 1) * self.batch_size)
        return tuple(self.requests[place % len(self.requests)] for place in places)


def ends_period(step: int, batch_size: int, period: float) -> bool:
    """Return whether step number `step`, from 1, of `batch_size` clips is the first that completes another `period`.

    period   clips of the stream, such as an epoch's
    """
    return step * batch_size // period > (step - 1) * batch_size // period


def _generator(*key: int) -> Generator:
    return np.random.default_rng(key)


def clip_span(data: DataConfig, num_frames: int) -> int:
    """Return the number of video frames that a clip covers at least."""
    return (num_frames - 1) * data.stride + 1 if data.sampling == "dense" else num_frames


def sample_frames(generator: Generator, video: Video, data: DataConfig, num_frames: int) -> tuple[int, ...]:
    """Draw the frame numbers of a clip, ascending, within the video's segment.

    dense    `stride` apart from a random start. A video too short for that is read from its first frame, and the last
             frame that the stride reaches is repeated to the end (VideoMAE, kinetics.py).
    uniform  one random frame from each of num_frames equal parts (TSN, Wang et al. 2016). A video with fewer frames
             than parts gives each of its frames once, then repeats the last one.
    """
    if data.sampling == "dense":
        start = video.start + int(generator.integers(max(video.length - clip_span(data, num_frames), 0) + 1))
        last = start + (video.end - 1 - start) // data.stride * data.stride
        return tuple(min(start + step * data.stride, last) for step in range(num_frames))
    if video.length < num_frames:
        return tuple(video.start + min(step, video.length - 1) for step in range(num_frames))
    edges = video.start + np.arange(num_frames + 1) * video.length // num_frames
    return tuple(int(frame) for frame in generator.integers(edges[:-1], edges[1:]))


def sample_crop(generator: Generator, width: int, height: int, scales: Sequence[float]) -> CropBox:
    """Draw a multi-scale crop (VideoMAE's GroupMultiScaleCrop): sides from `scales` of the short side, at fixed places.

    Width and height may differ by one step of `scales`. The place is one of 13 on a 5×5 grid of quarter offsets:
    corners, edges and centre of the frame, and the centres of its quarters.
    """
    short = min(width, height)
    sides = [max(int(short * scale), 1) for scale in scales]
    pairs = [(w, h) for i, h in enumerate(sides) for j, w in enumerate(sides) if abs(i - j) <= 1]
    crop_width, crop_height = pairs[generator.integers(len(pairs))]
    quarter_x, quarter_y = _PLACES[generator.integers(len(_PLACES))]
    return CropBox(
        x=quarter_x * ((width - crop_width) // 4),
        y=quarter_y * ((height - crop_height) // 4),
        width=crop_width,
        height=crop_height,
    )


_PLACES = [(x, y) for y in range(5) for x in range(5) if (x + y) % 2 == 0]
