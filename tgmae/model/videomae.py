"""VideoMAE: a ViT encoder that sees only the visible tokens, and a light decoder that reconstructs the masked ones.

It computes the same function as Hugging Face's VideoMAEForPreTraining, with the same parameters in another order;
tests/tgmae/model/test_huggingface.py compares the two.

Dimensions: B clips, T frames, H W pixels, L tokens, V visible, M masked, D width, E decoder width, P values per token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels.gather_tokens import gather_tokens
from kernels.masked_mse import masked_mse
from tgmae.config.model import ModelConfig
from tgmae.model.attention import Backend, attend
from tgmae.model.token_masks import TokenMasks
from tgmae.telemetry.nvtx_ranges import named_range

# Hugging Face's VideoMAE leaves the decoder's last norm at torch's default, whatever layer_norm_eps says.
_DECODER_NORM_EPS = 1e-5


class Norm(nn.LayerNorm):
    """A layer norm that computes in the precision of its input, also where FSDP gives it weights of a lower one."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class Attention(nn.Module):
    """Self-attention. Queries and values have a bias, keys have none (as in BEiT and VideoMAE)."""

    def __init__(self, width: int, num_heads: int, backend: Backend) -> None:
        super().__init__()
        self.num_heads, self.backend = num_heads, backend
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, last: int | None = None) -> Tensor:
        """Attend from all tokens to all tokens [B, L, D]; with `last`, from the last so many only: [B, last, D]."""
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
        """Split n packed projections [B, L, n·D] into n tensors [B, L, heads, D / heads]."""
        width = self.q_bias.shape[0]
        return packed.view(*packed.shape[:2], -1, self.num_heads, width // self.num_heads).unbind(2)


class Block(nn.Module):
    """A pre-norm transformer block.

    recomputes   whether the backward pass computes again what is inside the block, instead of keeping it
    """

    recomputes = False

    def __init__(self, width: int, num_heads: int, mlp_ratio: float, norm_eps: float, backend: Backend) -> None:
        super().__init__()
        self.norm1 = Norm(width, eps=norm_eps)
        self.attention = Attention(width, num_heads, backend)
        self.norm2 = Norm(width, eps=norm_eps)
        hidden = int(width * mlp_ratio)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor, last: int | None = None) -> Tensor:
        """Transform tokens [B, L, D].

        With `last`, return only the last so many tokens [B, last, D]. They attend to all tokens; everything else in the
        block is computed for them alone.
        """
        if self.recomputes and torch.is_grad_enabled():
            # Nothing in a block is random, so no state of a generator has to be kept for the second time.
            again: Tensor = checkpoint(self._transform, x, last, use_reentrant=False, preserve_rng_state=False)
            return again
        return self._transform(x, last)

    def _transform(self, x: Tensor, last: int | None) -> Tensor:
        mixed = self.attention(self.norm1(x), last)
        x = mixed + (x if last is None else x[:, -last:])
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class Reconstruction(NamedTuple):
    """What the masked autoencoder makes of a batch.

    loss        scalar, 0 where nothing was decoded
    prediction  [B, M, P], pixels of the masked tokens, normalised per token; None where nothing was decoded
    features    [B, D], the mean of the encoder's visible tokens
    """

    loss: Tensor
    prediction: Tensor | None
    features: Tensor


class VideoMAE(nn.Module):
    """The masked autoencoder: frames and masks in, loss out. `forward` is its three steps: encode, decode, loss.

    Weights are drawn from torch's global random generator; seed it first.
    """

    def __init__(self, config: ModelConfig, attention: Backend = "sdpa") -> None:
        super().__init__()
        self.config, self.attention = config, attention
        width, inner = config.width, config.decoder_width
        self.patch_embed = nn.Linear(config.values_per_token, width)
        self.encoder = nn.ModuleList(
            Block(width, config.num_heads, config.mlp_ratio, config.norm_eps, attention) for _ in range(config.depth)
        )
        self.encoder_norm = Norm(width, eps=config.norm_eps)
        self.to_decoder = nn.Linear(width, inner, bias=False)
        self.mask_token = nn.Parameter(torch.empty(1, 1, inner))
        self.decoder = nn.ModuleList(
            Block(inner, config.decoder_num_heads, config.mlp_ratio, config.norm_eps, attention)
            for _ in range(config.decoder_depth)
        )
        self.decoder_norm = Norm(inner, eps=_DECODER_NORM_EPS)
        self.head = nn.Linear(inner, config.values_per_token)
        self.register_buffer("positions", sinusoid_table(config.num_tokens, width), persistent=False)
        self.register_buffer("decoder_positions", sinusoid_table(config.num_tokens, inner), persistent=False)
        self.positions: Tensor
        self.decoder_positions: Tensor
        # As in VideoMAE's code: patch embedding and to_decoder keep torch's default, uniform within ±1/√inputs.
        for part in (self.encoder, self.decoder, self.head):
            part.apply(_initialise)
        nn.init.trunc_normal_(self.mask_token, std=0.02, a=-0.02, b=0.02)

    def forward(self, frames: Tensor, masks: TokenMasks, decode: bool = True) -> Reconstruction:
        """Reconstruct the masked tokens of uint8 frames [B, T, H, W, 3]; without `decode`, only encode the others."""
        latent = self.encode(frames, masks.visible)  # [B, V, D]
        features = latent.mean(1)  # [B, D]
        if not decode:
            return Reconstruction(features.new_zeros(()), None, features)
        prediction = self.decode(latent, masks)  # [B, M, P]
        return Reconstruction(self.loss(prediction, frames, masks.masked), prediction, features)

    def encode(self, frames: Tensor, visible: Tensor) -> Tensor:
        """Return features [B, V, D] of the visible tokens (numbers int32 [B, V]) of uint8 frames [B, T, H, W, 3]."""
        self._check_frames(frames)
        kind = frames.device.type
        # Under autocast the patch embedding wants its input in half precision: gather it in that precision.
        half = torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if half else self.patch_embed.weight.dtype
        with named_range("gather"):
            tokens = self.gather(frames, visible, dtype)  # [B, V, P]
        x = self.patch_embed(tokens) + self.positions[visible.long()]  # [B, V, D]
        for block in self.encoder:
            x = block(x)
        out: Tensor = self.encoder_norm(x)
        return out

    def decode(self, latent: Tensor, masks: TokenMasks) -> Tensor:
        """Return the predicted pixels [B, M, P] of the masked tokens, normalised per token, from features [B, V, D]."""
        seen = self.to_decoder(latent) + self.decoder_positions[masks.visible.long()]  # [B, V, E]
        hidden = self.mask_token + self.decoder_positions[masks.masked.long()]  # [B, M, E]
        # Attention does not care about the order of tokens: the masked ones simply go last.
        x = torch.cat([seen, hidden], dim=1)  # [B, V + M, E]
        *blocks, last_block = self.decoder
        for block in blocks:
            x = block(x)
        x = last_block(x, last=masks.masked.shape[1])  # [B, M, E]: nothing after it reads the visible tokens
        out: Tensor = self.head(self.decoder_norm(x))
        return out

    def gather(self, frames: Tensor, visible: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the normalised pixels [B, V, P] of tokens int32 [B, V]. Subclasses may replace this kernel."""
        return gather_tokens(frames, visible, self.config.patch_size, self.config.tubelet_size, dtype)

    def loss(self, prediction: Tensor, frames: Tensor, masked: Tensor) -> Tensor:
        """Return the mean squared error of prediction [B, M, P], a scalar. Subclasses may replace this kernel."""
        return masked_mse(prediction, frames, masked, self.config.patch_size, self.config.tubelet_size)

    @property
    def blocks(self) -> list[Block]:
        """Every transformer block, those of the encoder first."""
        return [block for block in [*self.encoder, *self.decoder] if isinstance(block, Block)]

    def recompute_blocks(self) -> None:
        """Keep only each block's input for the backward pass (activation checkpointing)."""
        for block in self.blocks:
            block.recomputes = True

    def compile_blocks(self) -> None:
        """Let torch.compile fuse the operations inside each block. All blocks of one width share one compilation."""
        for block in self.blocks:
            block.compile(dynamic=False)

    def _check_frames(self, frames: Tensor) -> None:
        size, count = self.config.image_size, self.config.num_frames
        if frames.dtype != torch.uint8 or frames.shape[1:] != (count, size, size, 3):
            raise ValueError(
                f"expected uint8 frames [B, {count}, {size}, {size}, 3], got {frames.dtype} {list(frames.shape)}"
            )


def sinusoid_table(num_positions: int, width: int) -> Tensor:
    """Return fixed positions float32 [L, D]: sines in even channels, cosines in odd ones.

    Source: Vaswani et al. 2017, section 3.5. As in VideoMAE, tokens are numbered consecutively through slots, rows
    and columns. Computed in float64.
    """
    channel = torch.arange(width, dtype=torch.float64)
    rate = 10000 ** (-2 * (channel // 2) / width)
    angle = torch.arange(num_positions, dtype=torch.float64)[:, None] * rate
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos()).float()


def _initialise(module: nn.Module) -> None:
    """Initialise matrices Xavier-uniform (He et al. 2022, MAE) and biases to zero."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
