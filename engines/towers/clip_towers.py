"""CLIP's image encoder, reshaped for scoring patches. Towers run in torch and are exported to ONNX.

    PatchTower    raw 16×16 patches → one embedding each, as if each had been resized to CLIP's input (Fan et al. §3.3)
    FrameTower    whole frames → one embedding per patch, in one forward pass
    StudentTower  raw patches → embeddings like PatchTower's, from a small network

Every tower takes pixels normalised by CLIP's mean and deviation and returns L2-normalised embeddings. Raise
GRAPH_VERSION (engines/backends/onnx_engine.py) when a change here alters the exported graph; a test says when.

Dimensions: n patches or frames, G tokens of CLIP's own grid, L = G + 1 with the class token, D width, E embedding,
P values of a raw patch in the order (row, column, channel).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engines.config import LastBlock
from engines.towers.blocks import Block, ClassBlock, Trunk, attend, normalize
from engines.towers.image_encoder import Encoder

# Standard deviation of NACLIP's neighbourhood prior, in tokens (Hajimiri et al. 2024, section 4.1).
_NACLIP_DEVIATION = 5.0


class Tower(nn.Module):
    """A network that an engine runs, with the sizes that determine how much goes into one pass.

    name          distinguishes the towers of one CLIP
    input_shape   shape of one patch or frame, without the batch
    tokens        rows that one patch or frame adds to each matrix product
    width         columns of the narrowest of those products
    peak_values   numbers that one patch or frame holds at the widest point of the network
    """

    name: str
    input_shape: tuple[int, ...]
    tokens: int
    width: int
    peak_values: int


class PatchTower(Tower):
    """The paper's scorer: each patch is resized to CLIP's input (bicubic), encoded, and read at the class token.

    Resizing and CLIP's patch embedding are both linear, so one matrix maps the raw patch to all of CLIP's tokens, and
    the enlarged images never exist. Only the class token leaves the last block, so that block computes queries and MLP
    for that token only.
    """

    def __init__(self, visual: Encoder, patch_size: int) -> None:
        super().__init__()
        self.name, self.input_shape = f"patch{patch_size}", (patch_size**2 * 3,)
        self.embed = nn.Parameter(fold_embedding(visual, patch_size), requires_grad=False)  # [G·D, P]
        self.trunk = Trunk(visual, visual.positional_embedding)
        *blocks, last = visual.transformer.resblocks
        self.blocks = nn.ModuleList(map(Block, blocks))
        self.last = ClassBlock(last)
        self.tokens, self.width = self.trunk.positions.shape
        self.peak_values = self.tokens * self.last.peak_values

    def forward(self, patches: Tensor) -> Tensor:  # [n, P] → [n, E]
        x = self.trunk.embed(F.linear(patches, self.embed).view(patches.shape[0], -1, self.width))
        for block in self.blocks:
            x = block(x)
        return self.trunk.project(self.last(x)[:, 0])


class FrameTower(Tower):
    """The dense scorer: frames are resized so that CLIP has one token per patch, and encoded in one forward pass.

    The last block is changed so that patch tokens stay in the space that CLIP shares with text:

    maskclip   every token attends to itself only                                     (Zhou et al., ECCV 2022)
    sclip      softmax(q·q) + softmax(k·k) instead of softmax(q·k)                     (Wang et al., ECCV 2024)
    clearclip  softmax(q·q), without residual and MLP                                  (Lan et al., ECCV 2024)
    naclip     softmax(k·k + a Gaussian of the distance), without residual and MLP     (Hajimiri et al., WACV 2025)
    """

    def __init__(self, visual: Encoder, height: int, width: int, patch_size: int, last_block: LastBlock) -> None:
        super().__init__()
        self.last_block = last_block
        rows, columns = height // patch_size, width // patch_size
        self.grid, self.patch = (rows, columns), visual.conv1.kernel_size[0]
        self.name, self.input_shape = f"{last_block}{patch_size}-{height}x{width}", (3, height, width)
        self.register_buffer("resize_rows", resize_matrix(height, rows * self.patch).float())
        self.register_buffer("resize_columns", resize_matrix(width, columns * self.patch).float())
        self.register_buffer("nearness", _nearness(rows, columns))
        self.resize_rows: Tensor
        self.resize_columns: Tensor
        self.nearness: Tensor
        # A matrix, where CLIP has a convolution: cuDNN uses TF32 for convolutions, even if float32 is requested.
        self.embed = nn.Parameter(visual.conv1.weight.detach().flatten(1).clone(), requires_grad=False)  # [D, 3·y·x]
        self.trunk = Trunk(visual, resize_positions(visual, rows, columns))
        *blocks, last = visual.transformer.resblocks
        self.blocks = nn.ModuleList(map(Block, blocks))
        self.last = Block(last)
        self.tokens, self.width = self.trunk.positions.shape
        resized = 3 * rows * columns * self.patch**2
        self.peak_values = max(2 * resized, self.tokens * self.last.peak_values)

    def forward(self, frames: Tensor) -> Tensor:  # [n, 3, H, W] → [n, G, E]
        resized = self.resize_rows @ frames @ self.resize_columns.t()
        x = self.trunk.embed(F.linear(self._cut(resized), self.embed))
        for block in self.blocks:
            x = block(x)
        return self.trunk.project(self._run_last(x)[:, 1:])

    def _cut(self, frames: Tensor) -> Tensor:
        """Cut frames into CLIP's own patches: [n, 3, H, W] → [n, G, 3·y·x]."""
        rows, columns = self.grid
        cells = frames.view(-1, 3, rows, self.patch, columns, self.patch)
        return cells.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

    def _run_last(self, x: Tensor) -> Tensor:
        """Run the last block as `last_block` changes it: [n, L, D] → [n, L, D]."""
        q, k, v = self.last.heads(self.last.ln_1(x))
        match self.last_block:
            case "maskclip":
                mixed = v
            case "sclip":
                mixed = attend(q, q, v) + attend(k, k, v)
            case "clearclip":
                mixed = attend(q, q, v)
            case "naclip":
                mixed = attend(k, k, v, self.nearness)
        if self.last_block in ("maskclip", "sclip"):
            return self.last.finish(x, mixed)
        return self.last.merge(mixed)


class StudentTower(Tower):
    """A multilayer perceptron that imitates `PatchTower`; made by `tgmae-engine distill`."""

    def __init__(self, patch_size: int, hidden: int, embed: int) -> None:
        super().__init__()
        values = patch_size**2 * 3
        self.name, self.input_shape = f"student{patch_size}-{hidden}", (values,)
        self.tokens, self.width, self.peak_values = 1, min(hidden, embed), values + 2 * hidden
        self.layers = nn.Sequential(
            nn.Linear(values, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, embed)
        )

    def forward(self, patches: Tensor) -> Tensor:  # [n, P] → [n, E]
        return normalize(self.layers(patches))


def resize_matrix(size: int, target: int) -> Tensor:
    """Return the matrix of a bicubic resize along one axis, float64 [target, size].

    As in PIL and torchvision: antialiased, a = -½.
    """
    eye = torch.eye(size, dtype=torch.float64)[None, None]
    return F.interpolate(eye, (target, size), mode="bicubic", antialias=True)[0, 0]


def fold_embedding(visual: Encoder, patch_size: int) -> Tensor:
    """Fold the bicubic resize of a raw patch and CLIP's patch embedding into one matrix, float32 [G·D, P].

    Computed in float64.
    """
    rows, columns = visual.grid_size
    kernel = visual.conv1.weight.double()  # [D, 3, y, x]
    height, width = kernel.shape[2:]
    down = resize_matrix(patch_size, rows * height).view(rows, height, patch_size)
    across = resize_matrix(patch_size, columns * width).view(columns, width, patch_size)
    folded = torch.einsum("dcyx,gyi,hxj->ghdijc", kernel, down, across)
    return folded.reshape(rows * columns * kernel.shape[0], -1).float()


def resize_positions(visual: Encoder, rows: int, columns: int) -> Tensor:
    """Resize CLIP's position embeddings to another grid, float32 [1 + rows·columns, D].

    Bicubic, as open_clip does it. The class token's embedding stays.
    """
    table: Tensor = visual.positional_embedding.detach().float()
    if (rows, columns) == tuple(visual.grid_size):
        return table.clone()
    grid = table[1:].T.view(1, -1, *visual.grid_size)
    grid = F.interpolate(grid, (rows, columns), mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([table[:1], grid[0].flatten(1).T])


def _nearness(rows: int, columns: int) -> Tensor:
    """Return the log-weights [L, L] that NACLIP adds: a Gaussian of two patches' distance; 0 for the class token."""
    place = torch.cartesian_prod(torch.arange(float(rows)), torch.arange(float(columns))).view(-1, 2)
    bias = torch.exp(-torch.cdist(place, place).square() / (2 * _NACLIP_DEVIATION**2))
    return F.pad(bias, (1, 0, 1, 0))
