"""Linear layers in FP8: products of e4m3 numbers with one scale a row, in bfloat16 out.

Each row of the activation, and each row of the weight, is divided by a scale that takes its largest value to 448, the
largest of e4m3, and rounded (4 significant bits). The activation's scales come from the row itself at every call, so
nothing has to be calibrated and no outlier of one patch costs another one precision.

On CUDA the product is `torch._scaled_mm`, at twice the rate of bfloat16 by the data sheets, and a Triton kernel makes
the rows: written out in torch operations the rounding would move some 17 bytes a value instead of 3, and eat up what
the product saves. On a CPU the same is computed by quantising, scaling back and multiplying in float32, so that
agreement can be measured anywhere.

Dimensions: M rows, K values of a row, N outputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engines.towers.blocks import Block, ClassBlock
from engines.towers.clip_towers import Tower
from kernels.quantize_rows import padded_scales, quantize_rows_kernel, quantize_rows_reference

CAPABILITY = (8, 9)  # the first compute capability with FP8 matrix products: Ada; Hopper is 9.0
# Of a block, by attribute. The projection behind the attention stays as it is: it is a twelfth of the arithmetic and
# cost as much agreement as the whole MLP (docs/decisions.md).
_LAYERS = ("qkv", "q", "kv", "fc", "proj")


class Fp8Linear(nn.Module):
    """A linear layer with its weight quantised once: [..., K] → bfloat16 [..., N], for any number of rows.

    silu   apply SiLU to the input first: on its way into FP8 it costs no pass over memory of its own

    Its tensors are plain attributes on `device`: converting the module that it is part of must not convert them. Raises
    ValueError where K or N is no multiple of 16, which the product asks for.
    """

    def __init__(self, layer: nn.Linear, device: torch.device, silu: bool = False) -> None:
        super().__init__()
        self.silu = silu
        self.outputs, self.inputs = layer.weight.shape
        if self.inputs % 16 or self.outputs % 16:
            raise ValueError(
                f"FP8 products need layers whose sizes are multiples of 16, got {self.inputs} to {self.outputs}: "
                "take --clip.precision bf16 or fp16 for this CLIP"
            )
        self.weight, self.scale = quantize_rows_reference(layer.weight.detach().to(device))
        self.bias = layer.bias.detach().to(device, torch.bfloat16)
        self.scale = F.pad(self.scale, (0, 0, 0, padded_scales(self.outputs) - self.outputs))[: self.outputs]

    def extra_repr(self) -> str:
        return f"{self.inputs} to {self.outputs}, e4m3{', SiLU before' * self.silu}"

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.inputs)
        out = self._multiply(rows) if x.is_cuda else self._multiply_reference(rows)
        return out.view(*x.shape[:-1], self.outputs)

    def _multiply_reference(self, rows: Tensor) -> Tensor:
        values, scale = quantize_rows_reference(rows, self.silu)
        return F.linear(values.float() * scale, self.weight.float() * self.scale, self.bias.float()).bfloat16()

    def _multiply(self, rows: Tensor) -> Tensor:
        return self.multiply_quantized(*quantize_rows_kernel(rows, self.silu))[: len(rows)]

    def multiply_quantized(self, values: Tensor, scale: Tensor) -> Tensor:
        """On CUDA: e4m3 [M, K], float32 [M, 1] → bfloat16 [M, N], M a multiple of 16."""
        # Accumulated in the tensor cores alone (fast_accum), at some 14 bits: far finer than e4m3's rounding.
        return torch._scaled_mm(
            values, self.weight.t(), scale, self.scale.t(), self.bias, out_dtype=torch.bfloat16, use_fast_accum=True
        )


def use_fp8(tower: Tower, device: torch.device) -> None:
    """Replace linear layers of the tower's blocks by FP8 ones on `device`, in place; quantises float32 weights.

    These are the projections to queries, keys and values and the MLP.

    Raises ValueError for a GPU before compute capability 8.9, for sizes that FP8 products cannot have, and for a tower
    without blocks, which has nothing to gain.
    """
    if device.type == "cuda" and (found := torch.cuda.get_device_capability(device)) < CAPABILITY:
        raise ValueError(
            f"clip.precision fp8 needs a GPU of compute capability {CAPABILITY[0]}.{CAPABILITY[1]} or later (Ada, "
            f"Hopper, Blackwell), got {torch.cuda.get_device_name(device)} with {found[0]}.{found[1]}: take fp16"
        )
    blocks = [module for module in tower.modules() if isinstance(module, Block | ClassBlock)]
    if not blocks:
        raise ValueError(
            f"clip.precision fp8 is for CLIP's own transformer; {tower.name} has none: take --clip.precision fp16"
        )
    for block in blocks:
        for name in _LAYERS:
            layer = getattr(block, name, None)
            if isinstance(layer, nn.Linear):
                silu = name == "proj" and isinstance(block.activation, nn.SiLU)
                setattr(block, name, Fp8Linear(layer, device, silu))
                if silu:
                    block.activation = nn.Identity()
