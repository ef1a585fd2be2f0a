"""tgmae-info: versions, devices, and which backends run here and why the others do not.

torch and xformers take seconds to import. Without a CUDA driver torch finds no device, so it is imported only where
there is one. "yes" means that the library was imported, and "installed" that it was only found.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import runpy
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from tgmae import __version__
from tgmae.cli.parser.flags import UsageError
from tgmae.cli.parser.subcommands import Command, exit_for_usage, parse_command

PROG = "tgmae-info"
PACKAGES = (
    "torch", "torchvision", "triton", "nvidia-dali-cuda130", "xformers", "av", "numpy", "pyarrow", "tyro",
    "tensorboard", "transformers", "open_clip_torch", "onnx", "onnxruntime", "tensorrt", "tensorrt-rtx-cu13-libs",
)  # fmt: skip
_CUDA_DRIVER = "libcuda.so.1"


@dataclass(frozen=True)
class Info(Command):
    """Print versions and devices, and which backends run here and why the others do not."""

    EXAMPLES: ClassVar = (
        "tgmae-info  # Print tables.",
        "tgmae-info --json  # Print JSON, for a script or a bug report.",
    )

    json: bool = False  # Print JSON instead of tables.

    def run(self) -> None:
        _start_dali()
        if self.json:
            facts = {
                "tgmae": __version__, "python": platform.python_version(), "platform": platform.platform(),
                "devices": devices(), "versions": versions(), "backends": backends(), "conflicts": conflicts(),
            }  # fmt: skip
            print(json.dumps(facts, indent=2, ensure_ascii=False))
        else:
            _print_tables()


def versions() -> dict[str, str]:
    """Return the version of each package, or "not installed"."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def devices() -> list[str]:
    """Return one line for the CPU and one for each GPU."""
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    lines = [f"CPU: {len(os.sched_getaffinity(0))} cores, {memory_gib:.0f} GiB"]
    torch = find_cuda()
    for number in range(torch.cuda.device_count() if torch else 0):
        card = torch.cuda.get_device_properties(number)
        lines.append(
            f"GPU {number}: {card.name}, {card.total_memory / 2**30:.0f} GiB, compute {card.major}.{card.minor}"
        )
    return lines


def backends() -> dict[str, str]:
    """Return what can be said of each choice that a run has.

    "yes", perhaps with what it covers; "installed"; "no", or what it does instead, and the reason.
    """
    _start_dali()
    torch = find_cuda()
    pyav = _try_import("av", "pip install av")
    others = {
        "attention sdpa": _describe_torch(),
        "attention xformers": _describe_xformers(),
        "attention cudnn": _describe_cudnn(),
        "engine torch": _describe_torch(),
        "engine onnxruntime": _describe_onnxruntime(),
        "engine tensorrt": _describe_tensorrt("tensorrt"),
        "engine tensorrt_rtx": _describe_tensorrt("tensorrt_rtx"),
    }
    found = {"pipeline pyav": pyav, **_describe_dali(), **others}
    if torch is None:
        found["precision"] = "fp32, bf16; for CLIP also fp8, a slow simulation"
    elif not torch.cuda.is_bf16_supported():
        found["precision"] = "fp32, and fp16 for CLIP; this GPU is older than Ampere and has no bf16"
    else:
        from engines.towers.fp8 import CAPABILITY

        fp8 = torch.cuda.get_device_capability() >= CAPABILITY
        found["precision"] = "bf16, fp32; for CLIP also fp16" + (
            " and fp8" if fp8 else f"; fp8 needs compute capability {CAPABILITY[0]}.{CAPABILITY[1]}"
        )
    return found


def conflicts() -> list[str]:
    """Return what is installed and gets in the way."""
    try:
        version = importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        return []
    return [
        f"the package kernels {version} (Hugging Face) has the import name of tgmae's own `kernels`; "
        "pip uninstall kernels, or keep tgmae in an environment of its own"
    ]


@functools.cache
def find_cuda() -> Any:
    """Return torch if it finds a CUDA device, else None. Without a CUDA driver torch is not even imported."""
    try:
        ctypes.CDLL(_CUDA_DRIVER)
        torch = importlib.import_module("torch")
    except (OSError, ImportError):
        return None
    return torch if torch.cuda.is_available() else None


def why_no_cuda() -> str:
    """Return why torch finds no CUDA device."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return "torch is not installed"
    cuda = runpy.run_path(str(Path(spec.origin).with_name("version.py"))).get("cuda")
    if cuda is None:
        return "this torch is built without CUDA"
    try:
        ctypes.CDLL(_CUDA_DRIVER)
    except OSError:
        return "there is no CUDA driver (no GPU, or a container without access to it)"
    return f"torch finds no CUDA device (no GPU, or a driver too old for CUDA {cuda})"


def _try_import(module: str, install: str) -> str:
    try:
        importlib.import_module(module)
    except (ImportError, OSError) as error:
        return f"no: {error}; {install}"
    return "yes"


def _describe_torch() -> str:
    if find_cuda():
        return "yes"
    return "no: not installed; pip install torch" if importlib.util.find_spec("torch") is None else "installed"


@functools.cache
def _start_dali() -> subprocess.Popen[str]:
    """Import DALI in a process of its own. That takes a second, and others may be imported here meanwhile."""
    return subprocess.Popen([sys.executable, "-c", "import nvidia.dali"], stderr=subprocess.PIPE, text=True)


@functools.cache
def _describe_dali() -> dict[str, str]:
    _, errors = _start_dali().communicate()
    if _start_dali().returncode != 0:
        reason = errors.strip().rpartition("\n")[2]  # of the traceback: "ImportError: …"
        return {"pipeline dali": f"no: {reason.partition(': ')[2] or reason}; pip install nvidia-dali-cuda130"}
    from dali_pipelines.workers.clip_worker import CPU_CODECS

    on_cpu = f"yes; decodes {', '.join(sorted(CPU_CODECS))} itself, the rest with PyAV"
    return {"pipeline dali, cpu": on_cpu, "pipeline dali, gpu (NVDEC)": _describe_nvdec()}


def _describe_nvdec() -> str:
    """Return what the first GPU's NVDEC decodes, or why it decodes nothing."""
    torch = find_cuda()
    if torch is None:
        return f"no: {why_no_cuda()}"
    from dali_pipelines.nvdec import NoNvdec
    from dali_pipelines.placement import count_engines, find_nvdec

    try:
        limits = find_nvdec(torch.device("cuda", 0))
    except NoNvdec as error:
        return f"no: {error}"
    return f"yes; {count_engines(limits)} NVDEC engines, 4:2:0 frames of 8 bits: " + ", ".join(
        f"{name} {codec.min_width}×{codec.min_height} to {codec.max_width}×{codec.max_height}"
        for name, codec in limits.items()
    )


def _describe_xformers() -> str:
    if find_cuda() is None:
        return f"no: {why_no_cuda()}; use --model.attention sdpa"
    if importlib.util.find_spec("xformers") is None:
        return "no: not installed; pip install xformers==0.0.35, or use --model.attention sdpa"
    return "installed; a run that uses it tells if its operators do not work beside this torch"


def _describe_cudnn() -> str:
    torch = find_cuda()
    if torch is None:
        return f"no: {why_no_cuda()}; use --model.attention sdpa"
    from tgmae.model.attention import choose_attention

    try:
        choose_attention("cudnn", torch.device("cuda"))
    except ValueError as error:
        return f"no: {error}"
    return "yes"


def _describe_onnxruntime() -> str:
    package = "onnxruntime-gpu" if find_cuda() else "onnxruntime"
    answer = _try_import("onnxruntime", f"pip install {package}")
    if answer == "yes" and find_cuda():
        providers = importlib.import_module("onnxruntime").get_available_providers()
        if "CUDAExecutionProvider" not in providers:
            return "no: this onnxruntime runs on a CPU only; pip install onnxruntime-gpu"
    return answer


def _describe_tensorrt(library: Literal["tensorrt", "tensorrt_rtx"]) -> str:
    if find_cuda():
        from engines.backends.tensorrt_plan import load_library

        try:
            load_library(library)
        except ValueError as error:
            return f"no: {error}"
        return "yes"
    answer = f"no: it runs on CUDA only, and {why_no_cuda()}"
    if library == "tensorrt_rtx":  # the one that builds plans for a GPU that is not there
        for module in ("tensorrt_rtx", "tensorrt_rtx_bindings"):
            if _try_import(module, "") == "yes":
                return f"builds plans; does not run them: {why_no_cuda()}"
    return answer


def _print_tables() -> None:
    from rich.console import Console
    from rich.table import Table

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


def main() -> None:
    try:
        parse_command(PROG, Info, sys.argv[1:]).run()
    except UsageError as error:
        exit_for_usage(PROG, error)


if __name__ == "__main__":
    main()
