"""python -m tgmae.shapes.tiny_clip: train the tiny CLIP with which the demo scores patches without a download.

The class, the tokenizer and the loss are open_clip's own; only the size is unusual. `tiny_clip_data` makes the training
data, `tiny_clip_eval` measures the result. On one machine, the same seed gives the same weights.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import tyro
from open_clip.loss import ClipLoss
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from dali_pipelines.workers.processes import make_pool
from engines.config import SHAPES_CLIP
from engines.files import write_atomically
from engines.progress import progress_bar
from tgmae.shapes.tiny_clip_card import describe, write_readme
from tgmae.shapes.tiny_clip_data import SceneFrame, make_crop_generator, make_frames, sample_crops
from tgmae.shapes.tiny_clip_eval import evaluate, make_labelled_clips

IMAGE_SIZE = 24
MODEL: dict[str, Any] = {
    "embed_dim": 64,
    # Nine tokens and the class token: a patch costs about 2 MFLOP.
    "vision_cfg": {"image_size": IMAGE_SIZE, "patch_size": 8, "width": 64, "head_width": 32, "layers": 2},
    # Narrow, because the embeddings of the vocabulary make up nearly all of the file.
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
PREPROCESSING = {
    "size": IMAGE_SIZE, "mean": list(open_clip.OPENAI_DATASET_MEAN), "std": list(open_clip.OPENAI_DATASET_STD),
    "interpolation": "bicubic",
}  # fmt: skip
_CROPS_PER_FRAME = 16  # in one batch


@dataclass(frozen=True, kw_only=True)
class Options:
    """Train the demo's tiny CLIP on generated scenes, measure it on held-out clips, and save it for open_clip."""

    out: Path = SHAPES_CLIP  # Folder to write into.
    seed: int = 0  # Random seed for scenes, crops and initial weights.
    steps: int = 1000  # Optimiser steps.
    scenes: int = 3000  # Scenes drawn before training. Every step cuts new crops from some of them.
    batch_size: int = 512  # Crops per step.
    learning_rate: float = 2e-3  # Learning rate after 50 steps of warm-up. It falls to 0 along a cosine.
    clips: int = 96  # Clips with one object, and as many with two, on which the result is measured.
    workers: int = 2  # Processes that draw scenes. The weights do not depend on it.

    def __post_init__(self) -> None:
        for name in ("steps", "scenes", "clips", "workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}")
        if self.batch_size < 1 or self.batch_size % _CROPS_PER_FRAME:
            raise ValueError(f"--batch-size must be a positive multiple of {_CROPS_PER_FRAME}, got {self.batch_size}")
        if self.seed < 0:
            raise ValueError(f"--seed must not be negative, got {self.seed}")


def train(options: Options, frames: list[SceneFrame]) -> tuple[open_clip.CLIP, list[float]]:
    """Train a CLIP from scratch. Returns it in evaluation mode, and the loss of every step."""
    torch.manual_seed(options.seed)
    model = open_clip.CLIP(**MODEL)
    tokenize = _remember(open_clip.SimpleTokenizer())
    loss_of = ClipLoss()
    # No weight decay: it would shrink the embeddings of all words that occur in no caption here.
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=options.learning_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True
    )
    schedule = LambdaLR(
        optimizer, lambda step: min((step + 1) / 50, 0.5 + 0.5 * math.cos(math.pi * step / options.steps))
    )
    generator = make_crop_generator(options.seed)
    mean, std = (torch.tensor(PREPROCESSING[name])[:, None, None] for name in ("mean", "std"))
    losses: list[float] = []
    progress = progress_bar(range(options.steps), desc="training", unit="step")
    for step in progress:
        crops = sample_crops(generator, frames, options.batch_size // _CROPS_PER_FRAME, _CROPS_PER_FRAME, IMAGE_SIZE)
        # Many crops share a caption; each is encoded once.
        distinct = sorted(set(crops.captions))
        number = {caption: place for place, caption in enumerate(distinct)}
        rows = torch.tensor([number[caption] for caption in crops.captions])
        images = model.encode_image((crops.images - mean) / std, normalize=True)
        texts = encode_text(model, torch.stack([tokenize(caption) for caption in distinct]))
        loss = loss_of(images, texts.index_select(0, rows), model.logit_scale.exp())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))  # as CLIP does (Radford et al. 2021, section 2.5)
        losses.append(loss.item())
        if step % 20 == 0:
            progress.set_postfix_str(f"loss {np.mean(losses[-20:]):.3f}")
    return model.eval(), losses


def encode_text(model: open_clip.CLIP, tokens: Tensor) -> Tensor:
    """Embed texts, int64 [n, 77] → float32 [n, E], as `model.encode_text(tokens, normalize=True)` does.

    This takes a sixth of the time, by leaving out the padding behind the longest text. Attention only looks back, so
    nothing before the padding changes.
    """
    ends = tokens.argmax(dim=1)
    length = int(ends.max()) + 1
    x = model.token_embedding(tokens[:, :length]) + model.positional_embedding[:length]
    x = model.transformer(x, attn_mask=model.attn_mask[:length, :length])
    x = model.ln_final(x)[torch.arange(len(tokens)), ends]
    return nn.functional.normalize(x @ model.text_projection, dim=-1)


def save(model: nn.Module, folder: Path) -> None:
    """Write the weights, in float16, and the configuration, as open_clip reads them from a folder."""
    weights = {name: tensor.detach().half().contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    config = json.dumps({"model_cfg": MODEL, "preprocess_cfg": PREPROCESSING}, indent=2)
    (folder / "open_clip_config.json").write_text(config + "\n")


def run(options: Options) -> dict[str, Any]:
    """Train, measure the saved weights, and write the folder. Returns the card.

    The files of an earlier run are replaced at the end, one by one.
    """
    started = time.perf_counter()
    options.out.mkdir(parents=True, exist_ok=True)
    with make_pool(options.workers) as pool:
        frames = make_frames(options.scenes, options.seed, pool)
    model, losses = train(options, frames)
    train_s = time.perf_counter() - started
    with tempfile.TemporaryDirectory(dir=options.out, prefix=".new-") as name:
        folder = Path(name)
        save(model, folder)
        loaded = open_clip.create_model(f"local-dir:{folder}").eval()  # measure the float16 weights that ship
        single, double = (
            make_labelled_clips(
                folder / f"clips{objects}", count=options.clips, num_objects=objects, workers=options.workers
            )
            for objects in (1, 2)
        )
        numbers = evaluate(loaded, open_clip.get_tokenizer(f"local-dir:{folder}"), single, double)
        card = describe(
            loaded, folder, options=vars(options), loss=float(np.mean(losses[-50:])), train_s=train_s,
            total_s=time.perf_counter() - started, measured=numbers,
        )  # fmt: skip
        (folder / "card.json").write_text(json.dumps(card, indent=2) + "\n")
        write_readme(folder / "README.md", card)
        for file in ("open_clip_config.json", "open_clip_model.safetensors", "card.json", "README.md"):
            write_atomically(options.out / file, (folder / file).read_bytes())
    return card


def main() -> None:
    try:
        options = tyro.cli(Options, prog="python -m tgmae.shapes.tiny_clip")
        # More threads gain little on a model of this size, and lose much where cores are shared. With one thread, the
        # weights depend on the seed alone.
        torch.set_num_threads(1)
        torch.use_deterministic_algorithms(True)
        card = run(options)
    except (ValueError, OSError) as error:
        sys.exit(f"tgmae.shapes.tiny_clip: {error}")
    except KeyboardInterrupt:
        sys.exit("tgmae.shapes.tiny_clip: interrupted; nothing was written")
    measured = card["measured"]
    print(
        f"{options.out}: {card['size_bytes'] / 2**20:.1f} MiB, trained in {card['train_s']:.0f} s; AUC "
        f"{measured['patch_frames2']['auc_clip']:.3f} by patch, {measured['dense_clearclip']['auc_clip']:.3f} dense, "
        f"{min(measured['two_objects']['first'], measured['two_objects']['second']):.3f} between two objects"
    )


def _remember(tokenizer: Any) -> Callable[[str], Tensor]:
    """Cache a tokenizer's result for one caption, int64 [77]: the few thousand captions recur all the time."""
    known: dict[str, Tensor] = {}

    def tokenize(caption: str) -> Tensor:
        if caption not in known:
            known[caption] = tokenizer([caption])[0]
        return known[caption]

    return tokenize


if __name__ == "__main__":
    main()
