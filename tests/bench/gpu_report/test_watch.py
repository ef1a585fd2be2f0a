"""What nvidia-smi reports is summarised, from the moment that counts."""

from __future__ import annotations

from pathlib import Path

from bench.gpu_report.watch import GpuWatch


def test_utilisation_is_means_and_maxima(tmp_path: Path) -> None:
    file = tmp_path / "smi.csv"
    assert GpuWatch(file).read() == {}
    file.write_text("10, 50, 1000\n30, 100, 3000\n[N/A], [N/A], 2000\n")
    assert GpuWatch(file).read() == {
        "utilization.gpu, mean": 20, "utilization.gpu, most": 30, "utilization.decoder, mean": 75,
        "utilization.decoder, most": 100, "memory.used, mean": 2000, "memory.used, most": 3000,
    }  # fmt: skip


def test_a_watch_forgets_what_came_before(tmp_path: Path) -> None:
    file = tmp_path / "smi.csv"
    watch = GpuWatch(file)
    watch.forget()
    assert watch.read() == {}
    file.write_text("10, 50, 1000\n")
    watch.forget()
    with file.open("a") as more:
        more.write("30, 80, 3000\n")
    assert watch.read()["utilization.decoder, mean"] == 80
