"""One of the DALI pipelines that serve batches round-robin.

It rebuilds itself when a corrupt file crashes the decoder.
"""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from dali_pipelines.graph import build_clips, decode_alone, short_reason
from dali_pipelines.placement import Placement
from dali_pipelines.types import BatchSampler, ClipRequest, VideoTable
from dali_pipelines.video.decode import DecodeError, decode_clips
from dali_pipelines.video.excerpt import NoExcerpt
from dali_pipelines.workers.feed import ClipFeed, PreparedBatch

# As DALI 2.4 and CUDA's libraries say it.
_OUT_OF_MEMORY = re.compile("CUDA allocation failed|[Oo]ut of memory|OUT_OF_MEMORY|MemoryAllocation|Can't allocate")


@dataclass(frozen=True, kw_only=True)
class PipelineSpec:
    """The task that all pipelines of one loader share."""

    videos: VideoTable
    sampler: BatchSampler
    size: int  # height and width of the clips, in pixels
    placement: Placement
    queue: int  # batches that DALI works on at once, per pipeline
    feed: ClipFeed


class ResilientPipeline:
    """A DALI pipeline for the batches `batch`, `batch` + `step`, `batch` + 2 · `step`, …; `batch` is the next one."""

    def __init__(self, spec: PipelineSpec, batch: int, step: int) -> None:
        self.spec, self.batch, self.step = spec, batch, step
        self.failures = 0  # consecutive failures that no single file explains
        self.taken: int | None = None  # the last batch, which the feed still keeps
        self._build()

    def _build(self) -> None:
        spec = self.spec
        self.entering = self.batch  # the next batch that the graph asks for
        self.pipe = build_clips(self._feed, spec.feed.repeat, spec.placement, spec.feed.num_units, spec.queue)
        self.is_ahead = False
        self.problem: RuntimeError | None = None

    def _feed(self) -> tuple[list[NDArray[Any]], ...]:
        inputs = self.spec.feed.inputs(self.entering)
        self.entering += self.step
        return inputs

    def start(self) -> None:
        """Start the first batches without waiting for them. A failure is raised when they are taken."""
        try:
            self.pipe.schedule_run()
        except RuntimeError as error:
            self.problem = error.with_traceback(None)
        self.is_ahead = True

    def take(self, stream: Any) -> tuple[list[Any], PreparedBatch]:
        """Return the graph's outputs for the next batch, ready for whatever is queued on a CUDA stream from now on.

        Raises ValueError where DALI fails batch after batch or runs out of memory, or where the workers fail.
        """
        if self.taken is not None:
            self.spec.feed.release(self.taken)
            self.taken = None
        try:
            outputs = self._take(stream)
        except RuntimeError as error:
            if _OUT_OF_MEMORY.search(str(error)):
                raise ValueError(
                    f"DALI ran out of memory: {short_reason(error)}. Use a lower --device-batch-size, or fewer "
                    "--data.pipelines or --data.threads"
                ) from error
            problem = error.with_traceback(None)  # its frames would keep the pipeline alive
        else:
            self.failures = 0
            return outputs
        self._recover(problem)
        return self._take(stream)

    def _take(self, stream: Any) -> tuple[list[Any], PreparedBatch]:
        if not self.is_ahead:
            self.pipe.schedule_run()
        self.is_ahead = False
        if self.problem is not None:
            raise self.problem
        outputs = list(self.pipe.outputs(stream))
        self.taken = self.batch
        self.batch += self.step
        return outputs, self.spec.feed.fetch(self.taken)

    def _recover(self, error: RuntimeError) -> None:
        """Rebuild the pipeline without the files that broke it: the ones that DALI cannot decode alone either.

        If DALI decodes each of them alone, or none of them although PyAV can, the fault is not in single files. The
        whole batch then goes to PyAV, and the third such failure in a row is an error.
        """
        self.pipe = None
        feed = self.spec.feed
        native = feed.fetch(self.batch).native()
        reasons = {row: reason for row, request in native.items() if (reason := self._try_alone(request))}
        readable = [row for row in reasons if self._is_readable(native[row])]
        if not reasons or (readable and len(reasons) == len(native)):
            self.failures += 1
            if self.failures > 2:
                raise ValueError(
                    f"DALI fails batch after batch where PyAV does not: {short_reason(error)}. "
                    "Use --data.decode cpu or --pipeline pyav; tgmae-info says what this machine has"
                ) from error
        if not reasons:
            readable = list(native)
        if news := [row for row in readable if row not in feed.distrusted]:
            listed = "\n".join(
                f"  {self.spec.videos[row].name}: {reasons.get(row, short_reason(error))}" for row in news
            )
            warnings.warn(f"DALI cannot decode these videos, so PyAV decodes them from now on:\n{listed}", stacklevel=4)
        feed.distrusted.update(reasons or native)
        feed.withdraw(range(self.batch, self.entering, self.step))
        self._build()

    def _try_alone(self, request: ClipRequest) -> str | None:
        """Return why DALI fails on one clip, or None where it does not."""
        videos, row = self.spec.videos, request.row
        try:
            return decode_alone(videos.file(row), videos[row], request, self.spec.placement)
        except NoExcerpt:  # DALI never gets this file
            return None
        except DecodeError as error:  # the file is gone; its worker will report that
            return str(error)

    def _is_readable(self, request: ClipRequest) -> bool:
        """Return whether PyAV decodes a clip."""
        videos, row = self.spec.videos, request.row
        try:
            decode_clips(videos.file(row), videos[row], [request], self.spec.size)
        except DecodeError:
            return False
        return True
