"""Linear layers in FP8: products of e4m3 numbers with one scale per row, bfloat16 out.

Each row of the activations, and each row of the weight, is scaled so that its largest magnitude becomes 448, the
largest number of e4m3, and rounded to 4 significant bits (kernels/quantize_rows.py). The scales of the activations come
from the rows themselves at every call, so nothing has to be calibrated, and an outlier in one patch costs no other
patch precision.

On CUDA the product is `torch._scaled_mm`, at twice the rate of bfloat16 by the data sheets, and the rows are quantised
by a Triton kernel: in torch operations the rounding would move about 17 bytes per value instead of 3, and use up what
the product saves. On a CPU the same is computed by quantising, scaling back and multiplying in float32, so that
agreement can be measured on any machine.

Dimensions: M rows, K values per row, N outputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engines.towers.blocks import Block, ClassBlock
from engines.towers.clip_towers import Tower
from kernels.quantize_rows import padded_scales, quantize_rows, quantize_rows_reference

CAPABILITY = (8, 9)  # the first compute capability with FP8 matrix products: Ada; Hopper is 9.0
# Attributes of a block. The projection after the attention stays in bfloat16: it is a twelfth of the arithmetic, and in
# FP8 it cost as much agreement as the whole MLP (docs/log.md).
_LAYERS = ("qkv", "q", "kv", "fc", "proj")


class Fp8Linear(nn.Module):
    """A linear layer whose weight is quantised once: [..., K] → bfloat16 [..., N], for any number of rows.

    silu   apply SiLU to the input first; fused into the quantisation, it needs no pass over memory of its own

    Its tensors are plain attributes on `device`, so that converting the module around it does not convert them.
    Raises ValueError if K or N is not a multiple of 16, as the product requires.
    """

    def __init__(self, layer: nn.Linear, device: torch.device, silu: bool = False) -> None:
        super().__init__()
        self.silu = silu
        self.outputs, self.inputs = layer.weight.shape
        if self.inputs % 16 or self.outputs % 16:
            raise ValueError(
                f"FP8 products need layers whose sizes are multiples of 16, got {self.inputs} to {self.outputs}: "
                "use --clip.precision bf16 or fp16 for this CLIP"
            )
        self.weight, self.scale = quantize_rows_reference(layer.weight.detach().to(device))
        self.bias = layer.bias.detach().to(device, torch.bfloat16)
        # The product on CUDA reads scales beyond the last row: give them memory.
        self.scale = F.pad(self.scale, (0, 0, 0, padded_scales(self.outputs) - self.outputs))[: self.outputs]

    def extra_repr(self) -> str:
        return f"{self.inputs} to {self.outputs}, e4m3{', SiLU before' * self.silu}"

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.inputs)
        multiply = self.multiply_quantized if x.is_cuda else self._multiply_reference
        out = multiply(*quantize_rows(rows, self.silu))[: len(rows)]
        return out.view(*x.shape[:-1], self.outputs)

    def _multiply_reference(self, values: Tensor, scale: Tensor) -> Tensor:
        return F.linear(values.float() * scale, self.weight.float() * self.scale, self.bias.float()).bfloat16()

    def multiply_quantized(self, values: Tensor, scale: Tensor) -> Tensor:
        """Multiply on CUDA: e4m3 [M, K], float32 [M, 1] → bfloat16 [M, N], M a multiple of 16."""
        # fast_accum keeps sums inside the tensor cores, at about 14 bits: far finer than the rounding to e4m3.
        return torch._scaled_mm(
            values, self.weight.t(), scale, self.scale.t(), self.bias, out_dtype=torch.bfloat16, use_fast_accum=True
        )


def use_fp8(tower: Tower, device: torch.device) -> None:
    """Replace linear layers of the tower's blocks with FP8 ones on `device`, in place.

    The layers are the projections to queries, keys and values, and the MLP. Their weights must still be float32.

    Raises ValueError for a GPU below compute capability 8.9, for layer sizes that FP8 products do not support, and for
    a tower without blocks, which would gain nothing.
    """
    if device.type == "cuda" and (found := torch.cuda.get_device_capability(device)) < CAPABILITY:
        raise ValueError(
            f"--clip.precision fp8 needs a GPU of compute capability {CAPABILITY[0]}.{CAPABILITY[1]} or later (Ada, "
            f"Hopper, Blackwell), got {torch.cuda.get_device_name(device)} with {found[0]}.{found[1]}: use "
            "--clip.precision fp16"
        )
    blocks = [module for module in tower.modules() if isinstance(module, Block | ClassBlock)]
    if not blocks:
        raise ValueError(
            f"--clip.precision fp8 is for CLIP's own transformer; {tower.name} has none: use --clip.precision fp16"
        )
    for block in blocks:
        for name in _LAYERS:
            layer = getattr(block, name, None)
            if isinstance(layer, nn.Linear):
                silu = name == "proj" and isinstance(block.activation, nn.SiLU)
                setattr(block, name, Fp8Linear(layer, device, silu))
                if silu:
                    block.activation = nn.Identity()
