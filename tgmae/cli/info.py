"""tgmae-info: versions, devices, and which backends can be used here and why the others cannot."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform

import torch
from rich.console import Console
from rich.table import Table

from dali_pipelines.nvdec import NoNvdec
from dali_pipelines.placement import count_engines, find_nvdec
from dali_pipelines.worker import CPU_CODECS
from engines.backends.tensorrt_plan import Library, load_library
from engines.towers.fp8 import CAPABILITY
from tgmae import __version__
from tgmae.model.attention import Backend, choose_attention

PACKAGES = (
    "torch", "torchvision", "triton", "nvidia-dali-cuda130", "xformers", "av", "numpy", "pyarrow", "tyro",
    "tensorboard", "transformers", "open_clip_torch", "onnx", "onnxruntime", "tensorrt", "tensorrt-rtx-cu13-libs",
)  # fmt: skip


def versions() -> dict[str, str]:
    """Version of each package, or "not installed"."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def devices() -> list[str]:
    """One line a device."""
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    lines = [f"CPU: {len(os.sched_getaffinity(0))} cores, {memory_gib:.0f} GiB"]
    for number in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(number)
        lines.append(
            f"GPU {number}: {card.name}, {card.total_memory / 2**30:.0f} GiB, compute {card.major}.{card.minor}"
        )
    return lines


def backends() -> dict[str, str]:
    """Each choice a run can make: "yes", perhaps with what it covers, or "no" and the reason."""
    found = {"pipeline pyav": "yes", "attention sdpa": "yes", "engine torch": "yes"}
    try:
        importlib.import_module("nvidia.dali")
        found["pipeline dali, cpu"] = f"yes; decodes {', '.join(sorted(CPU_CODECS))} itself, the rest with PyAV"
        found["pipeline dali, gpu (NVDEC)"] = _describe_nvdec()
    except ImportError as error:
        found["pipeline dali"] = f"no: {error}; pip install nvidia-dali-cuda130"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backends: list[Backend] = ["xformers", "cudnn"]
    for backend in backends:
        try:
            found[f"attention {choose_attention(backend, device)}"] = "yes"
        except ValueError as error:
            found[f"attention {backend}"] = f"no: {error}"
    found["engine onnxruntime"] = _describe_onnxruntime()
    libraries: list[Library] = ["tensorrt", "tensorrt_rtx"]
    for library in libraries:
        found[f"engine {library}"] = _describe_tensorrt(library)
    if not torch.cuda.is_available():
        found["precision"] = "fp32, bf16; for CLIP also fp8, a slow simulation"
    elif not torch.cuda.is_bf16_supported():
        found["precision"] = "fp32, and fp16 for CLIP; this GPU is older than Ampere and has no bf16"
    else:
        fp8 = torch.cuda.get_device_capability() >= CAPABILITY
        found["precision"] = "bf16, fp32; for CLIP also fp16" + (
            " and fp8" if fp8 else f"; fp8 needs compute capability {CAPABILITY[0]}.{CAPABILITY[1]}"
        )
    return found


def conflicts() -> list[str]:
    """What is installed that gets in the way."""
    try:
        version = importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        return []
    return [
        f"the package kernels {version} (Hugging Face) has the import name of tgmae's own `kernels`; "
        "pip uninstall kernels, or keep tgmae in an environment of its own"
    ]


def _describe_onnxruntime() -> str:
    on_gpu = torch.cuda.is_available()
    if importlib.util.find_spec("onnxruntime") is None:
        return f"no: not installed; pip install {'onnxruntime-gpu' if on_gpu else 'onnxruntime'}"
    if on_gpu:
        import onnxruntime

        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            return "no: this onnxruntime runs on a CPU only; pip install onnxruntime-gpu"
    return "yes"


def _describe_tensorrt(library: Library) -> str:
    try:
        load_library(library)
    except ValueError as error:
        return f"no: {error}" if torch.cuda.is_available() else f"no: it runs on CUDA only ({error})"
    return "yes" if torch.cuda.is_available() else f"builds plans; does not run them: {_no_cuda()}"


def _describe_nvdec() -> str:
    """What the first GPU's NVDEC decodes, or why it does not."""
    if not torch.cuda.is_available():
        return f"no: {_no_cuda()}"
    try:
        limits = find_nvdec(torch.device("cuda", 0))
    except NoNvdec as error:
        return f"no: {error}"
    return f"yes; {count_engines(limits)} NVDEC engines, 4:2:0 pictures of 8 bits: " + ", ".join(
        f"{name} {codec.min_width}×{codec.min_height} to {codec.max_width}×{codec.max_height}"
        for name, codec in limits.items()
    )


def _no_cuda() -> str:
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    return "torch finds no CUDA device (no GPU, no driver, or a driver too old for CUDA " + torch.version.cuda + ")"


def main() -> None:
    console = Console()
    console.print(f"tgmae {__version__}, Python {platform.python_version()}, {platform.platform()}", highlight=False)
    for line in devices():
        console.print(line, highlight=False)
    for title, rows in (("versions", versions()), ("backends", backends())):
        table = Table(title=title, show_header=False, title_justify="left")
        for name, value in rows.items():
            table.add_row(name, value)
        console.print(table)
    for line in conflicts():
        console.print(f"conflict: {line}", highlight=False)


if __name__ == "__main__":
    main()
