"""The blocks of CLIP's image encoder, laid out for speed. Matrix products are linear layers, so FP8 can replace them.

A block holds copies of CLIP's weights and computes the same function as open_clip's block. QuickGELU, x ·
sigmoid(1.702 x), is written as SiLU, x · sigmoid(x), with 1.702 folded into the layer before it and 1 / 1.702 into the
layer after it: one pass over the widest activations of the network instead of three.

Dimensions: n patches or frames, L tokens, D width, E embedding.
"""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engines.towers.image_encoder import Encoder, ResidualBlock

if TYPE_CHECKING:
    from open_clip.transformer import ResidualAttentionBlock

EncoderBlock: TypeAlias = "ResidualAttentionBlock | ResidualBlock"
_QUICK_GELU = 1.702


class Block(nn.Module):
    """One pre-norm transformer block, [n, L, D] → [n, L, D].

    peak_values   numbers per token at the widest point: the residual and its norm, and the MLP before and after the
                  activation
    """

    def __init__(self, block: EncoderBlock) -> None:
        super().__init__()
        attention, mlp = block.attn, block.mlp
        quick = type(mlp.gelu).__name__ == "QuickGELU"  # open_clip's or ours
        scale = _QUICK_GELU if quick else 1.0
        self.num_heads: int = attention.num_heads
        self.ln_1, self.ln_2 = copy.deepcopy(block.ln_1), copy.deepcopy(block.ln_2)
        self.ls_1, self.ls_2 = copy.deepcopy(block.ls_1), copy.deepcopy(block.ls_2)
        self.qkv: nn.Module = _linear(attention.in_proj_weight, attention.in_proj_bias)
        self.out: nn.Module = _linear(attention.out_proj.weight, attention.out_proj.bias)
        self.fc: nn.Module = _linear(mlp.c_fc.weight * scale, mlp.c_fc.bias * scale)
        self.activation = nn.SiLU() if quick else copy.deepcopy(mlp.gelu)
        self.proj: nn.Module = _linear(mlp.c_proj.weight / scale, mlp.c_proj.bias)
        self.peak_values = 2 * mlp.c_fc.in_features + 2 * mlp.c_fc.out_features

    def extra_repr(self) -> str:
        """Print the number of heads: the printed form enters a graph's fingerprint, and weights do not determine it."""
        return f"num_heads={self.num_heads}"

    def forward(self, x: Tensor) -> Tensor:  # [n, L, D] → [n, L, D]
        return self.finish(x, attend(*self.heads(self.ln_1(x))))

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values: [n, L, D] → three of [n, heads, L, D/heads]."""
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def merge(self, mixed: Tensor) -> Tensor:
        """Apply the projection after the attention: [n, heads, K, D/heads] → [n, K, D]."""
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out

    def finish(self, x: Tensor, mixed: Tensor) -> Tensor:
        """Apply residual, norm and MLP after the attention: [n, K, D], [n, heads, K, D/heads] → [n, K, D]."""
        x = x + self.ls_1(self.merge(mixed))
        out: Tensor = x + self.ls_2(self.proj(self.activation(self.fc(self.ln_2(x)))))
        return out


class ClassBlock(Block):
    """A block that computes the class token only, which attends to all tokens: [n, L, D] → [n, 1, D]."""

    def __init__(self, block: EncoderBlock) -> None:
        super().__init__(block)
        del self.qkv
        weight, bias = block.attn.in_proj_weight, block.attn.in_proj_bias
        width = weight.shape[1]
        self.q: nn.Module = _linear(weight[:width], bias[:width])
        self.kv: nn.Module = _linear(weight[width:], bias[width:])

    def forward(self, x: Tensor) -> Tensor:
        normed = self.ln_1(x)
        q = self.q(normed[:, :1]).view(x.shape[0], 1, self.num_heads, -1).transpose(1, 2)
        k, v = self.kv(normed).view(*x.shape[:2], 2, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        return self.finish(x[:, :1], attend(q, k, v))


class Trunk(nn.Module):
    """The layers around the blocks: class token, positions (float [L, D]) and first norm; last norm and projection."""

    def __init__(self, visual: Encoder, positions: Tensor) -> None:
        super().__init__()
        self.class_embedding, self.positions = _keep(visual.class_embedding), _keep(positions)
        self.ln_pre, self.ln_post = copy.deepcopy(visual.ln_pre), copy.deepcopy(visual.ln_post)
        self.proj = _keep(visual.proj)

    def embed(self, tokens: Tensor) -> Tensor:
        """Add class token, positions and norm: [n, L − 1, D] → [n, L, D]."""
        first = self.class_embedding.expand(tokens.shape[0], 1, -1)
        out: Tensor = self.ln_pre(torch.cat([first, tokens], dim=1) + self.positions)
        return out

    def project(self, x: Tensor) -> Tensor:
        """Project into the space shared with text, normalised to length 1: [..., D] → [..., E]."""
        return normalize(self.ln_post(x) @ self.proj)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Apply scaled dot-product attention: queries, keys, values [n, heads, L, D/heads] → the same shape."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1 / math.sqrt(q.shape[-1]))


def normalize(x: Tensor) -> Tensor:
    """Scale to length 1 along the last axis."""
    # In float32: in float16 squares may overflow, and the norm's lower bound of 1e-12 becomes 0, about which TensorRT
    # warns.
    return F.normalize(x.float(), dim=-1).to(x.dtype)


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    """Make a linear layer with copies of the weights."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    layer.weight, layer.bias = _keep(weight), _keep(bias)
    return layer


def _keep(tensor: Tensor) -> nn.Parameter:
    """Copy a weight. An engine moves and converts its copy, while CLIP still has to encode captions."""
    return nn.Parameter(tensor.detach().clone(), requires_grad=False)
