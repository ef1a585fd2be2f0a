"""The demo's data set, generated when it is first needed."""

from __future__ import annotations

import time
from pathlib import Path

from engines.files import lock_file
from tgmae.config.data import DEMO_MANIFEST

NUM_CLIPS = 320


def provide_demo(manifest: Path) -> None:
    """Generate the demo's data set if `manifest` is the demo's and does not exist.

    Processes that want it at the same time, as torchrun's do, wait for the one that came first.
    """
    if manifest != DEMO_MANIFEST or DEMO_MANIFEST.exists():
        return
    from dali_pipelines.workers.processes import count_cores
    from tgmae.shapes.scenes import make_shapes

    folder = DEMO_MANIFEST.parent
    folder.mkdir(parents=True, exist_ok=True)
    with lock_file(folder / "demo"):
        if DEMO_MANIFEST.exists():
            return
        started = time.perf_counter()
        result = make_shapes(
            folder, count=NUM_CLIPS, seed=0, codec="h264", num_objects=1, num_workers=count_cores(), camera="drifting"
        )
        print(result.describe(DEMO_MANIFEST, time.perf_counter() - started), flush=True)
