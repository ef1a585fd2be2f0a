"""GPU memory that training takes, by the clips in a forward pass: which device batch fits into which card?

    python -m bench.costs.memory

Takes a minute or a few; needs no GPU. Writes bench/results/memory.json and prints the table as Markdown, as in
docs/gpu.md.

The step's peak is counted by torch's MemTracker on tensors without contents, for two batch sizes; between and beyond
them it is a straight line. What the loader and DALI hold is counted by hand, from their sources. A decoder of DALI 2.4
keeps eight RGB frames (frames_decoder_gpu.h). Every sample of a batch has one, and all of them exist before the first
frame is decoded (video_decoder_base.h). Beside them lie the decoded windows and the finished clips. NVDEC's own
surfaces and the allocators' gaps are not counted.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache

from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from bench.costs.traffic import make_pass
from bench.harness.chips import CHIPS
from bench.harness.environment import environment
from bench.harness.report import RESULTS
from bench.harness.tables import Row, Table, markdown
from tgmae.config.model import ModelConfig
from tgmae.presets import PRESETS

GIB = 2**30
_FEW, _MORE = 2, 4  # clips at which the step is counted
_DALI_FRAMES = 8  # RGB frames that a decoder keeps
_PIPELINES, _QUEUE = 4, 2  # DALI pipelines, and finished batches in each: the defaults
_BATCHES = 4  # that the step is working on, that is queued, made, and being made
_CONTEXT = 0.5 * GIB  # assumed: CUDA's context and the libraries' kernels
_RATIO = 0.6
_VIDEOS = ((352, 256), (1280, 720))  # sizes: compacted, and as they often come


@cache
def step_bytes(model: ModelConfig, ratio: float, batch: int) -> float:
    """Return the most that the step holds: weights, gradients, AdamW's moments, activations; in float32 and bfloat16.

    Gradients and moments exist from the second pass on, and so count in full.
    """
    few, more = (_count_peak(model, ratio, clips) for clips in (_FEW, _MORE))
    return few + (more - few) / (_MORE - _FEW) * (batch - _FEW)


def _count_peak(model: ModelConfig, ratio: float, batch: int) -> float:
    with FakeTensorMode():
        network, run = make_pass(model, ratio, batch)
        tracker = MemTracker()
        tracker.track_external(network)
        with tracker:
            run()
        seen = tracker.get_tracker_snapshot("peak")
        parameters = sum(x.numel() * x.element_size() for x in network.parameters())
    return sum(kinds["Total"] for kinds in seen.values()) + 3 * parameters


def loading_bytes(model: ModelConfig, batch: int, pixels: int) -> int:
    """Return the bytes of batches, and of DALI's buffers for videos of `pixels` per frame that NVDEC decodes."""
    clip = model.num_frames * model.image_size**2 * 3
    sample = (_DALI_FRAMES + model.num_frames) * 3 * pixels + _QUEUE * clip
    return batch * (_BATCHES * clip + _PIPELINES * sample)


def memory_table(model: ModelConfig, ratio: float, sizes: Sequence[tuple[int, int]], title: str) -> Table:
    """Make a row for each device batch: the step, the loader at each size of video, and the cards that hold both."""
    cards = sorted({chip.memory_gb for chip in CHIPS.values()})
    rows = []
    for batch in (8, 16, 24, 32, 48, 64, 96, 128):
        step = step_bytes(model, ratio, batch)
        facts: dict[str, float | str] = {}
        for width, height in sizes:
            loading = loading_bytes(model, batch, width * height)
            total = step + loading + _CONTEXT
            fitting = [card for card in cards if card * 1e9 >= total]
            facts[f"loading {width}×{height}"] = loading / GIB
            facts[f"together, {width}×{height}"] = total / GIB
            facts[f"fits, {width}×{height}"] = f"{fitting[0]} GB" if fitting else "none"
        rows.append(Row(f"{batch} clips", [step / GIB], facts))
    note = (
        f"Cards of {', '.join(map(str, cards))} GB. {_PIPELINES} DALI pipelines; {_CONTEXT / GIB} GiB are assumed for "
        "CUDA's context. CLIP's patch or dense scorer comes on top; cached and student scorers take next to nothing."
    )
    return Table(title, "GiB of the step", rows, note=note)


def main() -> None:
    config = PRESETS["ssv2"]
    title = f"GPU memory, ViT-B, 16×224², γ {_RATIO}, bf16 autocast, not compiled"
    table = memory_table(config.model, _RATIO, _VIDEOS, title).to_dict()
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "memory.json"
    report = {**environment(), "counted": True, "headline": {}, "tables": [table]}
    path.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    print(markdown(table))


if __name__ == "__main__":
    main()
