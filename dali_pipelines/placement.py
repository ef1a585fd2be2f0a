"""Where videos are decoded, and how many pipelines, threads and workers share that: the one place that decides it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from dali_pipelines.nvdec import CodecLimits, NoNvdec, load_library, read_limits
from dali_pipelines.types import CodedFormat
from dali_pipelines.worker import dali_decodes
from tgmae.data.config import DataConfig

# DALI's threads of one pipeline share a CUDA stream and wait for it after every frame, so that engines only work side
# by side for several pipelines.
_NVDEC_PIPELINES = 4
_BLOCKS = 16, 8, 32, 64  # pixels: H.264's, and what HEVC and VP9 may round to
_CLIPS_AN_ENGINE = 2  # under way at once, so that an engine has the next one while a thread prepares its clip


@dataclass(frozen=True, kw_only=True)
class Placement:
    """What `DaliPipeline` does on one device.

    limits     what NVDEC decodes, by codec; None where videos are decoded on the CPU
    device_id  the GPU on which clips come out; None for the CPU
    reason     why a GPU does not decode although clips go there; "" where it does, or nothing goes there
    """

    limits: Mapping[str, CodecLimits] | None
    device_id: int | None
    reason: str
    pipelines: int  # that take turns with the batches
    threads: int  # of DALI, in each pipeline
    workers: int  # processes of each pipeline
    prefetch: int  # batches that each pipeline's workers run ahead

    @property
    def engines(self) -> int:
        """NVDEC's engines; 0 where videos are decoded on the CPU."""
        return count_engines(self.limits)

    def native(self, kinds: Iterable[CodedFormat]) -> set[CodedFormat]:
        """Of the kinds of videos in a data set those that go to NVDEC."""
        if self.limits is None:
            return set()
        kinds = set(kinds)
        return {kind for kind in kinds if dali_decodes(kind, self.limits)} - find_clashes(kinds, self.limits)

    def describe(self, videos: Iterable[CodedFormat]) -> str:
        """In words for a run's first lines."""
        workers = self.pipelines * self.workers
        shared = f"{workers} worker{'s' * (workers > 1)}"
        if self.limits is not None or self.pipelines > 1 or self.threads != self.workers:
            many = f"{self.pipelines} pipeline{'s' * (self.pipelines > 1)}"
            shared = f"{many} × {self.threads} thread{'s' * (self.threads > 1)}, {shared}"
        if self.limits is None:
            turned_over = f" ({self.reason}), clips are turned over to the GPU" if self.reason else ""
            return f"decoding on the CPU{turned_over}, {shared}"
        kinds = Counter(videos)
        native, rest = self.native(kinds), Counter[str]()
        for kind in kinds.keys() - native:
            rest[kind.codec] += kinds[kind]
        odd = sum(kinds[kind] for kind in native if not _is_aligned(kind))
        counts = ", ".join(f"{count} {codec}" for codec, count in sorted(rest.items()))
        others = f"; PyAV decodes the rest: {counts}" if rest else ""
        if odd:
            others += (
                f"; {odd} with sides that are no multiples of {_BLOCKS[0]}, for each of whose clips NVDEC is set up "
                "anew (tgmae-data compact mends that)"
            )
        engines = f"{self.engines} NVDEC engine{'s' * (self.engines > 1)}"
        codecs = ", ".join(sorted({kind.codec for kind in native})) or "nothing"
        return f"decoding {codecs} on the GPU: {engines}, {shared}{others}"


def find_clashes(kinds: Iterable[CodedFormat], limits: Mapping[str, CodecLimits]) -> set[CodedFormat]:
    """Kinds of videos that NVDEC must not get beside the others that it takes.

    DALI 2.4 keeps a decoder session under the size that is shown, and looks for one by the size that is coded, in whole
    blocks (frames_decoder_gpu.cc). 640×360, coded as 640×368, would find one made for 640×368, and take its colours
    from eight rows too far down.
    """
    kinds = set(kinds)
    sizes = {(kind.codec, kind.width, kind.height) for kind in kinds if dali_decodes(kind, limits)}
    return {
        kind
        for kind in kinds
        if any(
            padded != (kind.width, kind.height) and (kind.codec, *padded) in sizes
            for block in _BLOCKS
            for padded in [(-(-kind.width // block) * block, -(-kind.height // block) * block)]
        )
    }


def _is_aligned(kind: CodedFormat) -> bool:
    return kind.width % _BLOCKS[0] == kind.height % _BLOCKS[0] == 0


def count_engines(limits: Mapping[str, CodecLimits] | None) -> int:
    """NVDEC's engines, 0 without limits."""
    return max((of_codec.engines for of_codec in (limits or {}).values()), default=0)


def find_nvdec(device: torch.device) -> dict[str, CodecLimits]:
    """What NVDEC decodes on a CUDA device. Raises NoNvdec where that is nothing."""
    get_caps = load_library()
    if not torch.cuda.is_available():
        raise NoNvdec("torch finds no CUDA device")
    with torch.cuda.device(device):
        torch.zeros(1, device=device)  # makes the CUDA context that the library asks about
        return read_limits(get_caps)


def choose_placement(data: DataConfig, device: torch.device) -> Placement:
    """Where `data.decode` has the clips of a training device decoded; auto takes NVDEC where it is.

    Raises ValueError where the GPU was asked for and cannot decode.
    """
    if device.type != "cuda":
        if data.decode == "gpu":
            raise ValueError("--data.decode gpu needs a CUDA device; choose auto or cpu")
        return _share(data, None, None, "")
    if data.decode == "cpu":
        return _share(data, None, _index(device), "as --data.decode says")
    try:
        return _share(data, find_nvdec(device), _index(device), "")
    except NoNvdec as error:
        if data.decode == "gpu":
            raise ValueError(f"--data.decode gpu cannot run: {error}; or choose --data.decode cpu") from error
        return _share(data, None, _index(device), str(error))


def _share(data: DataConfig, limits: Mapping[str, CodecLimits] | None, device_id: int | None, reason: str) -> Placement:
    engines = count_engines(limits)
    pipelines = data.pipelines or (_NVDEC_PIPELINES if engines else 1)
    workers = max(data.num_workers // pipelines, 1)
    return Placement(
        limits=limits, device_id=device_id, reason=reason, pipelines=pipelines,
        threads=data.threads or (-(-_CLIPS_AN_ENGINE * engines // pipelines) if engines else workers),
        workers=workers, prefetch=max(data.prefetch // pipelines, 1),
    )  # fmt: skip


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index
