"""Decide where videos are decoded, and how many pipelines, threads and workers share the work.

Nothing else decides it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from dali_pipelines.config import DecodeConfig
from dali_pipelines.nvdec import CodecLimits, NoNvdec, load_library, read_limits
from dali_pipelines.types import CodedFormat
from dali_pipelines.workers.clip_worker import dali_decodes

# The threads of one DALI pipeline share a CUDA stream and wait for it after every frame. Only several pipelines keep
# several NVDEC engines busy.
_NVDEC_PIPELINES = 4
_BLOCKS = 16, 8, 32, 64  # pixels: H.264's blocks, and the sizes that HEVC and VP9 may round up to
_CLIPS_PER_ENGINE = 2  # in flight at once, so that an engine has the next clip while a thread finishes the last


@dataclass(frozen=True, kw_only=True)
class Placement:
    """How `DaliPipeline` works on one device.

    limits     what NVDEC can decode, by codec; None where videos are decoded on the CPU
    device_id  GPU on which clips come out; None for the CPU
    reason     why the GPU that clips go to does not decode them; "" where it does, or where there is no GPU
    """

    limits: Mapping[str, CodecLimits] | None
    device_id: int | None
    reason: str
    pipelines: int  # DALI pipelines that serve batches round-robin
    threads: int  # DALI threads per pipeline
    workers: int  # worker processes per pipeline
    prefetch: int  # batches that the workers of a pipeline prepare ahead

    @property
    def engines(self) -> int:
        """Number of NVDEC engines; 0 where videos are decoded on the CPU."""
        return count_engines(self.limits)

    def native(self, kinds: Iterable[CodedFormat]) -> set[CodedFormat]:
        """Return the formats, out of those of a data set, that go to NVDEC."""
        if self.limits is None:
            return set()
        kinds = set(kinds)
        return {kind for kind in kinds if dali_decodes(kind, self.limits)} - find_clashes(kinds, self.limits)

    def describe(self, videos: Iterable[CodedFormat]) -> str:
        """Say where videos of these formats are decoded, for a run's first lines."""
        workers = self.pipelines * self.workers
        shared = f"{workers} worker{'s' * (workers > 1)}"
        if self.limits is not None or self.pipelines > 1 or self.threads != self.workers:
            many = f"{self.pipelines} pipeline{'s' * (self.pipelines > 1)}"
            shared = f"{many} × {self.threads} thread{'s' * (self.threads > 1)}, {shared}"
        if self.limits is None:
            turned_over = f" ({self.reason}), then clips are copied to the GPU" if self.reason else ""
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
                f"; NVDEC is set up again for every clip of {odd} videos whose sides are not multiples of {_BLOCKS[0]} "
                "(tgmae-data compact fixes that)"
            )
        engines = f"{self.engines} NVDEC engine{'s' * (self.engines > 1)}"
        codecs = ", ".join(sorted({kind.codec for kind in native})) or "nothing"
        return f"decoding {codecs} on the GPU: {engines}, {shared}{others}"


def find_clashes(kinds: Iterable[CodedFormat], limits: Mapping[str, CodecLimits]) -> set[CodedFormat]:
    """Return the formats that NVDEC must not decode beside the other formats of the data set.

    DALI 2.4 stores a decoder session under its displayed size but looks it up by its coded size, in whole blocks
    (frames_decoder_gpu.cc). A 640×360 video, coded as 640×368, would reuse the session of a 640×368 video and read its
    chroma from eight rows too far down.
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
    """Return the number of NVDEC engines; 0 without limits."""
    return max((of_codec.engines for of_codec in (limits or {}).values()), default=0)


def find_nvdec(device: torch.device) -> dict[str, CodecLimits]:
    """Return what NVDEC decodes on a CUDA device, by codec. Raises NoNvdec where it decodes nothing."""
    get_caps = load_library()
    if not torch.cuda.is_available():
        raise NoNvdec("torch finds no CUDA device")
    with torch.cuda.device(device):
        torch.zeros(1, device=device)  # creates the CUDA context that the library asks about
        return read_limits(get_caps)


def choose_placement(config: DecodeConfig, device: torch.device) -> Placement:
    """Choose where videos are decoded for a training device, following `config.decode`; auto uses NVDEC if there is
    one.

    Raises ValueError where the GPU was asked for and cannot decode.
    """
    if device.type != "cuda":
        if config.decode == "gpu":
            raise ValueError("--data.decode gpu needs a CUDA device; use auto or cpu")
        return _share(config, None, None, "")
    if config.decode == "cpu":
        return _share(config, None, _index(device), "because of --data.decode cpu")
    try:
        return _share(config, find_nvdec(device), _index(device), "")
    except NoNvdec as error:
        if config.decode == "gpu":
            raise ValueError(f"--data.decode gpu cannot run: {error}; or use --data.decode cpu") from error
        return _share(config, None, _index(device), str(error))


def _share(
    config: DecodeConfig, limits: Mapping[str, CodecLimits] | None, device_id: int | None, reason: str
) -> Placement:
    engines = count_engines(limits)
    pipelines = config.pipelines or (_NVDEC_PIPELINES if engines else 1)
    workers = max(config.num_workers // pipelines, 1)
    return Placement(
        limits=limits, device_id=device_id, reason=reason, pipelines=pipelines,
        threads=config.threads or (-(-_CLIPS_PER_ENGINE * engines // pipelines) if engines else workers),
        workers=workers, prefetch=max(config.prefetch // pipelines, 1),
    )  # fmt: skip


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index
