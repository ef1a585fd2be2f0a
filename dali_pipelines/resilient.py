"""One DALI pipeline of those that take turns with the batches, and what becomes of it when a file kills its decoder."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

from dali_pipelines.graph import build_clips, decode_alone, short_reason
from dali_pipelines.placement import Placement
from dali_pipelines.types import BatchSampler, ClipRequest, VideoTable
from dali_pipelines.video.decode import DecodeError, decode_clips
from dali_pipelines.video.excerpt import NoExcerpt
from dali_pipelines.worker import ClipWorker


@dataclass(frozen=True, kw_only=True)
class Job:
    """What all lanes work on."""

    videos: VideoTable
    sampler: BatchSampler
    size: int  # pixels
    repeat: int  # clips from a decode
    placement: Placement
    distrusted: set[int]  # rows that DALI must not decode; whoever finds one tells the others


class ResilientPipeline:
    """A DALI pipeline for the batches `batch`, `batch` + `step`, `batch` + 2 · `step`, …; `batch` is the next one."""

    def __init__(self, job: Job, batch: int, step: int) -> None:
        self.job, self.batch, self.step = job, batch, step
        self.failures = 0  # in a row that single files do not explain
        self._build()

    def _build(self) -> None:
        job = self.job
        self.worker = ClipWorker(
            videos=job.videos, sampler=job.sampler, size=job.size, repeat=job.repeat, limits=job.placement.limits,
            first_batch=self.batch, step=self.step, distrusted=frozenset(job.distrusted),
        )  # fmt: skip
        self.pipe = build_clips(self.worker, job.placement, len(job.sampler(self.batch)) // job.repeat)
        self.is_ahead = False
        self.problem: RuntimeError | None = None

    def start(self) -> None:
        """Begin the first batches without waiting for them; what goes wrong is told when they are taken."""
        try:
            self.pipe.schedule_run()
        except RuntimeError as error:
            self.problem = error.with_traceback(None)
        self.is_ahead = True

    def take(self, stream: Any) -> list[Any]:
        """The graph's outputs for the next batch, ready for what is queued on a CUDA stream from now on.

        Raises ValueError where DALI fails batch after batch.
        """
        try:
            outputs = self._take(stream)
        except RuntimeError as error:
            problem = error.with_traceback(None)  # its frames would keep the pipeline and its processes alive
        else:
            self.failures = 0
            return outputs
        self._recover(problem)
        return self._take(stream)

    def _take(self, stream: Any) -> list[Any]:
        if not self.is_ahead:
            self.pipe.schedule_run()
        self.is_ahead = False
        if self.problem is not None:
            raise self.problem
        outputs = list(self.pipe.outputs(stream))
        self.batch += self.step
        return outputs

    def _recover(self, error: RuntimeError) -> None:
        """Build the pipeline again without the files that broke it: those that DALI cannot decode alone either.

        Where that is none of them, or every one although PyAV reads it, all are left to PyAV, and the third such
        failure in a row is an error: then it is not about single files.
        """
        self.close()
        requests = {request.row: request for request in self.job.sampler(self.batch)}
        native = {row: request for row, request in requests.items() if self.worker.is_native(row)}
        reasons = {row: reason for row, request in native.items() if (reason := self._try_alone(request))}
        readable = [row for row in reasons if self._is_readable(requests[row])]
        if not reasons or (readable and len(reasons) == len(native)):
            self.failures += 1
            if self.failures > 2:
                raise ValueError(
                    f"DALI fails batch after batch where PyAV does not: {short_reason(error)}. "
                    "Choose --data.decode cpu or --pipeline pyav; tgmae-info says what this machine has"
                ) from error
        if not reasons:
            readable = list(native)
        if news := [row for row in readable if row not in self.job.distrusted]:
            listed = "\n".join(
                f"  {self.job.videos[row].path}: {reasons.get(row, short_reason(error))}" for row in news
            )
            warnings.warn(f"DALI cannot decode what PyAV can, and from now on PyAV does:\n{listed}", stacklevel=4)
        self.job.distrusted.update(reasons or native)
        self._build()

    def _try_alone(self, request: ClipRequest) -> str | None:
        videos, row = self.job.videos, request.row
        try:
            return decode_alone(videos.file(row), videos[row], request, self.job.placement)
        except NoExcerpt:  # DALI has never seen it
            return None
        except DecodeError as error:  # gone since: the worker will say so
            return str(error)

    def _is_readable(self, request: ClipRequest) -> bool:
        videos, row = self.job.videos, request.row
        try:
            decode_clips(videos.file(row), videos[row], [request], self.job.size)
        except DecodeError:
            return False
        return True

    def close(self) -> None:
        """Stop the worker processes; DALI does so when the pipeline is collected."""
        self.pipe = None
