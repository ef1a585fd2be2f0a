"""Chips and their figures are found by the names that torch gives GPUs."""

from __future__ import annotations

import pytest
import torch

from bench.harness.ceilings import peak_tflops
from bench.harness.chips import CHIPS, find_chip, short_name


def test_chips_are_found_by_torchs_names() -> None:
    for name, chip in {
        "NVIDIA H200": "H200", "NVIDIA H100 80GB HBM3": "H100", "NVIDIA H100 PCIe": "H100 PCIe", "h200": "H200",
        "NVIDIA A100-SXM4-80GB": "A100", "NVIDIA A100-PCIE-40GB": "A100 PCIe 40GB", "NVIDIA L40S": "L40S",
        "NVIDIA H100 NVL": "H100 NVL", "NVIDIA H200 NVL": "H200 NVL", "NVIDIA A10": "A10",
    }.items():  # fmt: skip
        assert find_chip(name).name == chip
    for unknown in ("Tesla T4", "NVIDIA GH200 480GB", "NVIDIA A10G", "NVIDIA H100 MIG 1g.10gb", "NVIDIA B200"):
        with pytest.raises(ValueError, match=rf"no figures for GPU '{unknown}'; known GPUs: H200, H200 NVL, "):
            find_chip(unknown)


def test_names_of_gpus_as_files_have_them() -> None:
    for name, short in {
        "NVIDIA H100 80GB HBM3": "h100", "NVIDIA H100 PCIe": "h100-pcie", "NVIDIA H100 NVL": "h100-nvl",
        "NVIDIA H200": "h200", "NVIDIA H200 NVL": "h200-nvl", "NVIDIA A100-SXM4-80GB": "a100", "NVIDIA L40S": "l40s",
        "NVIDIA A100-SXM4-40GB": "a100-40gb", "NVIDIA GeForce RTX 4090": "rtx-4090", "Tesla T4": "t4",
        "Tesla V100-SXM2-16GB": "v100-16gb", "NVIDIA H100 80GB HBM3 MIG 1g.10gb": "h100-mig-1g-10gb",
    }.items():  # fmt: skip
        assert short_name(name) == short
    assert len({short_name(name) for name in CHIPS}) == len(CHIPS)
    assert [find_chip(short_name(name)) for name in CHIPS] == list(CHIPS.values())


def test_peaks_are_found_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 0)
    for name, peak in {
        "NVIDIA H200": 989, "NVIDIA H200 NVL": 835, "NVIDIA H100 80GB HBM3": 989, "NVIDIA H100 PCIe": 756,
        "NVIDIA A100-SXM4-80GB": 312, "NVIDIA L40S": 362, "NVIDIA L4": 121, "NVIDIA B200": None, "Tesla T4": None,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        assert peak_tflops(device) == peak
    assert peak_tflops(torch.device("cpu")) is None
