"""The masked autoencoder: a ViT that sees the visible tokens only, and a light decoder that reconstructs the others.

Same function as Hugging Face's VideoMAEForPreTraining (tests/test_hf_format.py), same parameters up to a reordering.

Dimensions: B clips, T frames, H W pixels, L tokens, V visible, M masked, D width, P values a token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.gather_tokens import gather_tokens
from kernels.masked_mse import masked_mse
from tgmae.model.attention import Backend, attend
from tgmae.model.config import ModelConfig
from tgmae.model.token_masks import TokenMasks
from tgmae.telemetry.nvtx_ranges import named_range

# Hugging Face's VideoMAE leaves its decoder's last norm at torch's default, whatever layer_norm_eps says.
_DECODER_NORM_EPS = 1e-5


class Attention(nn.Module):
    """Self-attention; queries and values have a bias, keys have none (BEiT, VideoMAE)."""

    def __init__(self, width: int, num_heads: int, backend: Backend) -> None:
        super().__init__()
        self.num_heads, self.backend = num_heads, backend
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, last: int | None = None) -> Tensor:  # [B, L, D] → [B, L or last, D]
        no_bias = torch.zeros_like(self.q_bias)
        if last is None:
            bias = torch.cat([self.q_bias, no_bias, self.v_bias])
            q, k, v = self._heads(F.linear(x, self.qkv.weight, bias))
        else:
            q_weight, kv_weight = self.qkv.weight.tensor_split([x.shape[-1]])
            (q,) = self._heads(F.linear(x[:, -last:], q_weight, self.q_bias))
            k, v = self._heads(F.linear(x, kv_weight, torch.cat([no_bias, self.v_bias])))
        out: Tensor = self.out(attend(q, k, v, self.backend).flatten(-2))
        return out

    def _heads(self, packed: Tensor) -> tuple[Tensor, ...]:
        """[B, L, n·D] → n of [B, L, H, D/H]."""
        width = self.q_bias.shape[0]
        return packed.view(*packed.shape[:2], -1, self.num_heads, width // self.num_heads).unbind(2)


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float, norm_eps: float, backend: Backend) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=norm_eps)
        self.attention = Attention(width, num_heads, backend)
        self.norm2 = nn.LayerNorm(width, eps=norm_eps)
        hidden = int(width * mlp_ratio)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor, last: int | None = None) -> Tensor:
        """[B, L, D] → the same, or of the last so many tokens only [B, last, D]: they attend to all, and the rest of
        the block is computed for them alone.
        """
        mixed = self.attention(self.norm1(x), last)
        x = mixed + (x if last is None else x[:, -last:])
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class VideoMAE(nn.Module):
    """frames and masks → loss. `encode`, `decode` and the loss are its three lines.

    Weights are drawn from torch's global generator: seed it first.
    """

    def __init__(self, config: ModelConfig, attention: Backend = "sdpa") -> None:
        super().__init__()
        self.config, self.attention = config, attention
        width, inner = config.width, config.decoder_width
        self.patch_embed = nn.Linear(config.values_per_token, width)
        self.encoder = nn.ModuleList(
            Block(width, config.num_heads, config.mlp_ratio, config.norm_eps, attention) for _ in range(config.depth)
        )
        self.encoder_norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.to_decoder = nn.Linear(width, inner, bias=False)
        self.mask_token = nn.Parameter(torch.empty(1, 1, inner))
        self.decoder = nn.ModuleList(
            Block(inner, config.decoder_num_heads, config.mlp_ratio, config.norm_eps, attention)
            for _ in range(config.decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(inner, eps=_DECODER_NORM_EPS)
        self.head = nn.Linear(inner, config.values_per_token)
        self.register_buffer("positions", sinusoid_table(config.num_tokens, width), persistent=False)
        self.register_buffer("decoder_positions", sinusoid_table(config.num_tokens, inner), persistent=False)
        self.positions: Tensor
        self.decoder_positions: Tensor
        self.apply(_initialise)
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def forward(self, frames: Tensor, masks: TokenMasks) -> tuple[Tensor, Tensor]:
        """uint8 frames [B, T, H, W, 3] → (loss scalar, prediction [B, M, P])."""
        latent = self.encode(frames, masks.visible)
        prediction = self.decode(latent, masks)
        return self.loss(prediction, frames, masks.masked), prediction

    def gather(self, frames: Tensor, visible: Tensor, dtype: torch.dtype) -> Tensor:
        """uint8 frames [B, T, H, W, 3], token numbers int32 [B, V] → normalised pixels [B, V, P]."""
        return gather_tokens(frames, visible, self.config.patch_size, self.config.tubelet_size, dtype)

    def loss(self, prediction: Tensor, frames: Tensor, masked: Tensor) -> Tensor:
        """prediction [B, M, P], uint8 frames, token numbers int32 [B, M] → mean squared error, a scalar."""
        return masked_mse(prediction, frames, masked, self.config.patch_size, self.config.tubelet_size)

    def compile_blocks(self) -> None:
        """Let torch.compile fuse what it can inside each block; all blocks of one width share one compilation."""
        for block in [*self.encoder, *self.decoder]:
            block.compile(dynamic=False)

    def encode(self, frames: Tensor, visible: Tensor) -> Tensor:
        """uint8 frames [B, T, H, W, 3], token numbers int32 [B, V] → features [B, V, D]."""
        self._check_frames(frames)
        kind = frames.device.type
        # Under autocast the patch embedding wants its input in half precision: write it so at once.
        half = torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if half else self.patch_embed.weight.dtype
        with named_range("gather"):
            tokens = self.gather(frames, visible, dtype)
        x = self.patch_embed(tokens) + self.positions[visible.long()]
        for block in self.encoder:
            x = block(x)
        out: Tensor = self.encoder_norm(x)
        return out

    def decode(self, latent: Tensor, masks: TokenMasks) -> Tensor:
        """features [B, V, D] → normalised pixels of the masked tokens [B, M, P]."""
        seen = self.to_decoder(latent) + self.decoder_positions[masks.visible.long()]
        hidden = self.mask_token + self.decoder_positions[masks.masked.long()]
        x = torch.cat([seen, hidden], dim=1)
        *blocks, last = self.decoder
        for block in blocks:
            x = block(x)
        x = last(x, last=masks.masked.shape[1])  # nothing after it looks at the visible tokens
        out: Tensor = self.head(self.decoder_norm(x))
        return out

    def _check_frames(self, frames: Tensor) -> None:
        size, count = self.config.image_size, self.config.num_frames
        if frames.dtype != torch.uint8 or frames.shape[1:] != (count, size, size, 3):
            raise ValueError(
                f"expected uint8 frames [B, {count}, {size}, {size}, 3], got {frames.dtype} {list(frames.shape)}"
            )


def sinusoid_table(num_positions: int, width: int) -> Tensor:
    """Fixed positions float32 [L, D]: sines in even channels, cosines in odd ones (Vaswani et al. 2017, section 3.5).

    Tokens are numbered straight through slots, rows and columns, as VideoMAE does. Computed in float64.
    """
    channel = torch.arange(width, dtype=torch.float64)
    rate = 10000 ** (-2 * (channel // 2) / width)
    angle = torch.arange(num_positions, dtype=torch.float64)[:, None] * rate
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos()).float()


def _initialise(module: nn.Module) -> None:
    """Xavier-uniform matrices, the patch embedding included (He et al. 2022, MAE); zero biases."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
