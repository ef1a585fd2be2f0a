"""The demo's data set, generated when it is first needed."""

from __future__ import annotations

import os
import time
from pathlib import Path

from tgmae.config.data import DEMO_MANIFEST

NUM_CLIPS = 320


def provide_demo(manifest: Path) -> None:
    """Generate the demo's data set if `manifest` is the demo's and does not exist.

    Raises ValueError under torchrun, where every process would write the same files.
    """
    if manifest != DEMO_MANIFEST or DEMO_MANIFEST.exists():
        return
    if "WORLD_SIZE" in os.environ:
        raise ValueError(
            f"{DEMO_MANIFEST} is missing; generate it before torchrun: tgmae-data shapes {DEMO_MANIFEST.parent}"
        )
    from dali_pipelines.workers.processes import count_cores
    from tgmae.shapes.scenes import make_shapes

    started = time.perf_counter()
    result = make_shapes(
        DEMO_MANIFEST.parent, count=NUM_CLIPS, seed=0, codec="h264", num_objects=1, num_workers=count_cores(),
        camera="drifting",
    )  # fmt: skip
    print(result.describe(DEMO_MANIFEST, time.perf_counter() - started), flush=True)
