"""The same batches over and over. A module of its own, because decode workers import it, and do without torch."""

from __future__ import annotations

from dataclasses import dataclass

from dali_pipelines.types import ClipRequest
from tgmae.data.sampling import ClipSampler


@dataclass
class Cycle(ClipSampler):
    """The same batches over and over, so that every measurement has the same clips wherever it begins."""

    num_batches: int = 1

    def unit(self, batch: int, unit: int) -> tuple[ClipRequest, ...]:
        return super().unit(batch % self.num_batches, unit)
