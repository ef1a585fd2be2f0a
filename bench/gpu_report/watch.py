"""Record what nvidia-smi reports of a GPU while something runs on it."""

from __future__ import annotations

import csv
import shutil
import subprocess
from pathlib import Path

_SMI = ("utilization.gpu", "utilization.decoder", "memory.used")  # percent, percent, MiB


class GpuWatch:
    """Utilisation and memory from nvidia-smi, five times a second, while the context is open.

    Records nothing without nvidia-smi.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.process: subprocess.Popen[bytes] | None = None
        self._first = 0  # offset in the file, in bytes, of the first figures that count

    def __enter__(self) -> GpuWatch:
        if shutil.which("nvidia-smi"):
            query = f"--query-gpu={','.join(_SMI)}"
            with self.file.open("w") as output:
                self.process = subprocess.Popen(
                    ["nvidia-smi", query, "--format=csv,noheader,nounits", "-lms", "200"],
                    stdout=output, stderr=subprocess.DEVNULL,
                )  # fmt: skip
        return self

    def __exit__(self, *_: object) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait()

    def forget(self) -> None:
        """Discard the figures recorded so far."""
        self._first = self.file.stat().st_size if self.file.exists() else 0

    def read(self) -> dict[str, float]:
        """Return mean and maximum of each figure; nothing without nvidia-smi."""
        if not self.file.exists():
            return {}
        seen: dict[str, list[float]] = {name: [] for name in _SMI}
        with self.file.open() as file:
            file.seek(self._first)
            for row in csv.reader(file):
                for name, text in zip(_SMI, row, strict=False):
                    if text.strip().replace(".", "").isdigit():
                        seen[name].append(float(text))
        found: dict[str, float] = {}
        for name, values in seen.items():
            if values:
                found |= {f"{name}, mean": sum(values) / len(values), f"{name}, most": max(values)}
        return found
