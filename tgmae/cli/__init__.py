"""Console scripts: tgmae-train, tgmae-data, tgmae-engine, tgmae-viz, tgmae-info."""

import os

# Set before torch is imported, whose threads otherwise spin while they wait for each other. On two busy cores 30
# training steps took 62 s with spinning threads, and 11 s with passive ones.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
