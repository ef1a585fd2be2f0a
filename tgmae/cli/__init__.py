"""Console scripts: tgmae-train, tgmae-data, tgmae-engine, tgmae-viz, tgmae-info."""

import os

# Before torch is imported: its threads otherwise spin while they wait for each other. On two busy cores 30 training
# steps took 62 s so, and 11 s without.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
