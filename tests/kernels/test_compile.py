"""Every kernel compiles for a Hopper GPU (sm_90), with its launcher's arguments at production size. Needs no GPU.

Run as a program, this file compiles them and prints a line a kernel; the test starts it without TRITON_INTERPRET.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def compile_all() -> list[dict[str, Any]]:
    """Call the launchers on CPU tensors, with a driver that claims to be an H100 and stops before the launch."""
    import torch
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from kernels.gather_tokens import MEAN, STD, gather_tokens_kernel
    from kernels.masked_mse import masked_mse_kernel
    from kernels.quantize_rows import quantize_rows_kernel
    from kernels.topk_mask import topk_mask_kernel

    class Hopper:
        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

    compiled: list[dict[str, Any]] = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            dump = [knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", file.name]
            sass = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
        used = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", sass)}
        memory = sorted(set(re.findall(r"\b(?:LDG|STG)\.[A-Z0-9.]+", sass)))
        compiled.append({"name": self.__name__, "case": case, **used, "memory": memory, "sm": "sm_90" in sass})
        return kernel

    driver.set_active(Hopper())
    JITFunction.run = compile_only

    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        case = f"{dtype}"
        topk_mask_kernel(torch.zeros(2, 8, 196, dtype=dtype), 117)
    for silu in (False, True):
        for width in (768, 3072):
            case = f"{width} wide, SiLU {silu}"
            quantize_rows_kernel(torch.zeros(200, width, dtype=torch.bfloat16), silu)
    case = "tube, k 1"  # Triton compiles integers equal to 1 in as constants; strides of 0 and 1 occur, too
    topk_mask_kernel(torch.zeros(2, 1, 1568).expand(2, 8, 1568), 1)

    frames = torch.zeros(2, 16, 224, 224, 3, dtype=torch.uint8)
    index = torch.zeros(2, 632, dtype=torch.int32)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        case = f"{dtype}"
        gather_tokens_kernel(frames, index, 16, 2, dtype, MEAN, STD)
        prediction = torch.zeros(2, 632, 1536, dtype=dtype, requires_grad=True)
        torch.autograd.grad(masked_mse_kernel(prediction, frames, index, 16, 2), prediction)
    case = "every patch of every other frame"
    gather_tokens_kernel(frames[:, ::2], None, 16, 1, torch.float16, MEAN, STD)
    case = "patch 14, one token, int64"
    gather_tokens_kernel(frames, index[:, :1].long(), 14, 1, torch.bfloat16, MEAN, STD)
    prediction = torch.zeros(2, 1, 588, requires_grad=True)
    torch.autograd.grad(masked_mse_kernel(prediction, frames, index[:, :1].long(), 14, 1), prediction)
    return compiled


@pytest.mark.slow
def test_kernels_compile_for_hopper(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    compiled = [json.loads(line) for line in done.stdout.splitlines()]
    counts = {name: sum(kernel["name"] == name for kernel in compiled) for name in {x["name"] for x in compiled}}
    assert counts == {"_topk_mask": 4, "_gather_tokens": 5, "_forward": 4, "_backward": 4, "_quantize_rows": 4}
    for kernel in compiled:
        assert kernel["sm"], kernel
        assert kernel["STACK"] == kernel["LOCAL"] == 0, f"spills registers: {kernel}"
    # The roofline estimates assume whole 16-byte pieces wherever the frames' rows allow them.
    for kernel in compiled:
        if kernel["name"] == "_quantize_rows":
            assert "LDG.E.128" in kernel["memory"], kernel
            assert not {"LDG.E.U16", "STG.E.U8"} & set(kernel["memory"]), kernel
        if kernel["name"] in ("_gather_tokens", "_backward") and "patch 14" not in kernel["case"]:
            assert "LDG.E.128" in kernel["memory"], kernel
            assert "STG.E.128" in kernel["memory"], kernel
            assert not {"LDG.E.U8", "STG.E.U16"} & set(kernel["memory"]), kernel


if __name__ == "__main__":
    for line in compile_all():
        print(json.dumps(line))
