"""Which attention is the fastest at our shapes: xformers', torch's SDPA, cuDNN's, FlashAttention 3 or 4?

    python -m bench.attention
    python -m bench.attention --batch 128 --rounds 3

Times forward and backward of one block's attention at the shapes of ViT-B: the encoder on the visible tokens of every
mask ratio, and the decoder on all tokens. TFLOP/s counts two matrix products forward and five backward. Kernels that
are not installed or do not run here are left out and named. A CPU runs SDPA only, on one clip in float32. Writes
bench/results/attention.<cpu or GPU>.json. Not yet run on a GPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn.attention import SDPBackend

from bench.harness.command_line import run_from_shell
from bench.harness.measure import measure
from bench.harness.report import save_report, write_report
from bench.harness.tables import Row, Table
from bench.workloads.attention import Kernel, find_attention, make_attention_inputs, using_attention
from tgmae.config.masks import MaskConfig
from tgmae.config.model import ModelConfig
from tgmae.model.attention import attend
from tgmae.training.parallel import choose_device


@dataclass(frozen=True)
class Options:
    rounds: int = 5  # measurements of every row, taken in turn
    batch: int = 64  # clips, on CUDA
    repeats: int = 20  # forward and backward passes in a round, on CUDA


def tflops(inputs: list[torch.Tensor], kernel: Kernel, repeats: int) -> float:
    """Return the TFLOP/s of forward and backward over `repeats` repeats."""
    q, k, v = inputs
    synchronize: Callable[[], None] = torch.cuda.synchronize if q.is_cuda else lambda: None
    with using_attention(kernel) as backend:
        for count in (1, repeats):  # the first is a warm-up
            synchronize()
            started = time.perf_counter()
            for _ in range(count):
                out = attend(q, k, v, backend)
                torch.autograd.grad(out, inputs, out)
            synchronize()
            seconds = (time.perf_counter() - started) / count
    batch, tokens, heads, channels = q.shape
    return 7 * 2 * batch * heads * tokens**2 * channels / seconds / 1e12


def chosen_operator(inputs: list[torch.Tensor]) -> str:
    """Return the names of the forward and backward operators that xformers dispatches to."""
    from xformers.ops import fmha

    q, k, v = inputs
    query = fmha.Inputs(query=q, key=k, value=v)
    forward, backward = fmha._dispatch_fw(query, True), fmha._dispatch_bw(query, None)
    return f"{forward.NAME}, {backward.NAME}"


def chosen_by_sdpa(inputs: list[torch.Tensor]) -> str:
    """Return the kernel behind torch's scaled_dot_product_attention: cuDNN's on Hopper, if it is recent enough."""
    q, k, v = (x.transpose(1, 2) for x in inputs)
    return SDPBackend(torch._fused_sdp_choice(q, k, v)).name


def run(options: Options) -> None:
    device, model = choose_device("auto"), ModelConfig()
    on_gpu = device.type == "cuda"
    available, left_out = find_attention(device)
    shapes = {}
    for ratio in (0.9, 0.75, 0.65, 0.6):
        visible = model.num_tokens - MaskConfig(ratio=ratio).masked_per_slot(model.patches_per_slot) * model.num_slots
        shapes[f"encoder, γ {ratio}: {visible} tokens"] = (visible, model.num_heads, model.width)
    shapes[f"decoder: {model.num_tokens} tokens"] = (model.num_tokens, model.decoder_num_heads, model.decoder_width)
    tables, operators, kernels = [], {}, {}
    for title, (tokens, heads, width) in shapes.items():
        inputs = make_attention_inputs(options.batch if on_gpu else 1, tokens, heads, width, device)
        work: dict[str, Callable[[], float]] = {
            kernel: partial(tflops, inputs, kernel, options.repeats if on_gpu else 1) for kernel in available
        }
        rows = [Row(name, values) for name, values in measure(work, options.rounds, title).items()]
        tables.append(Table(title, "TFLOP/s", rows, relative_to="sdpa", note="\n".join(left_out)))
        save_report("attention", tables, None, device)
        kernels[title] = chosen_by_sdpa(inputs)
        if "xformers" in available:
            operators[title] = chosen_operator(inputs)
    headline = {"sdpa chose": kernels} | ({"xformers chose (forward, backward)": operators} if operators else {})
    write_report("attention", tables, headline, device)


def main() -> None:
    run_from_shell(run, Options, __doc__)


if __name__ == "__main__":
    main()
