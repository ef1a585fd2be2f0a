"""python -m tgmae.shapes.tiny_clip: train the tiny CLIP with which the demo scores patches without a download.

The class, the tokenizer and the loss are open_clip's own; only the size is unusual. What it learns from is in
`tiny_clip_data`, how it is judged in `tiny_clip_eval`. The same seed gives the same weights on one machine.
"""

from __future__ import annotations

import json
import math
import os
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
from tqdm import tqdm

from dali_pipelines.processes import make_pool
from engines.config import SHAPES_CLIP
from tgmae.shapes.tiny_clip_card import describe, write_readme
from tgmae.shapes.tiny_clip_data import Picture, draw_crops, draw_pictures, make_crop_generator
from tgmae.shapes.tiny_clip_eval import evaluate, make_true_clips

IMAGE_SIZE = 24
MODEL: dict[str, Any] = {
    "embed_dim": 64,
    # Nine tokens and the class token: a patch costs about 2 MFLOP.
    "vision_cfg": {"image_size": IMAGE_SIZE, "patch_size": 8, "width": 64, "head_width": 32, "layers": 2},
    # Narrow, because the vocabulary's table is nearly all of the file.
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
PREPROCESSING = {
    "size": IMAGE_SIZE, "mean": list(open_clip.OPENAI_DATASET_MEAN), "std": list(open_clip.OPENAI_DATASET_STD),
    "interpolation": "bicubic",
}  # fmt: skip
_CROPS_A_PICTURE = 16  # in one batch


@dataclass(frozen=True, kw_only=True)
class Options:
    """Train the demo's tiny CLIP on generated scenes, measure it on held-out clips, and write it for open_clip."""

    out: Path = SHAPES_CLIP  # folder to write into
    seed: int = 0
    steps: int = 1000
    scenes: int = 3000  # drawn before training; every step cuts new crops from some of them
    batch_size: int = 512  # crops
    learning_rate: float = 2e-3  # after 50 steps of warm-up; falls to 0 along a cosine
    clips: int = 96  # with one object, and as many with two, that the result is measured on
    workers: int = 2  # processes that draw scenes; the weights do not depend on it

    def __post_init__(self) -> None:
        for name in ("steps", "scenes", "clips", "workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.batch_size < 1 or self.batch_size % _CROPS_A_PICTURE:
            raise ValueError(f"batch_size must be a multiple of {_CROPS_A_PICTURE}, got {self.batch_size}")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}")


def train(options: Options, pictures: list[Picture]) -> tuple[open_clip.CLIP, list[float]]:
    """A CLIP trained from nothing, in evaluation mode, and the loss of every step."""
    torch.manual_seed(options.seed)
    model = open_clip.CLIP(**MODEL)
    tokenize = _remember(open_clip.SimpleTokenizer())
    loss_of = ClipLoss()
    # No weight decay: it would shrink the embeddings of all words that no caption here holds.
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=options.learning_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True
    )
    schedule = LambdaLR(
        optimizer, lambda step: min((step + 1) / 50, 0.5 + 0.5 * math.cos(math.pi * step / options.steps))
    )
    generator = make_crop_generator(options.seed)
    mean, std = (torch.tensor(PREPROCESSING[name])[:, None, None] for name in ("mean", "std"))
    losses: list[float] = []
    progress = tqdm(range(options.steps), desc="training", unit="step")
    for step in progress:
        crops = draw_crops(generator, pictures, options.batch_size // _CROPS_A_PICTURE, _CROPS_A_PICTURE, IMAGE_SIZE)
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
    """What `model.encode_text` gives, normalised, at a sixth of its cost: int64 [n, 77] → float32 [n, E].

    The padding behind the longest text is left out: attention looks back only, so nothing before it changes.
    """
    ends = tokens.argmax(dim=1)
    length = int(ends.max()) + 1
    x = model.token_embedding(tokens[:, :length]) + model.positional_embedding[:length]
    x = model.transformer(x, attn_mask=model.attn_mask[:length, :length])
    x = model.ln_final(x)[torch.arange(len(tokens)), ends]
    return nn.functional.normalize(x @ model.text_projection, dim=-1)


def save(model: nn.Module, folder: Path) -> None:
    """Weights in float16 and the configuration, as open_clip reads them from a folder."""
    weights = {name: tensor.detach().half().contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    (folder / "open_clip_model.safetensors").chmod(0o644)  # safetensors writes for the owner alone
    config = json.dumps({"model_cfg": MODEL, "preprocess_cfg": PREPROCESSING}, indent=2)
    (folder / "open_clip_config.json").write_text(config + "\n")


def run(options: Options) -> dict[str, Any]:
    """Train, measure what was saved, write the folder; returns the card.

    Files of an earlier run are replaced at the end, one by one.
    """
    started = time.perf_counter()
    options.out.mkdir(parents=True, exist_ok=True)
    with make_pool(options.workers) as pool:
        pictures = draw_pictures(options.scenes, options.seed, pool)
    model, losses = train(options, pictures)
    train_s = time.perf_counter() - started
    with tempfile.TemporaryDirectory(dir=options.out, prefix=".new-") as name:
        folder = Path(name)
        save(model, folder)
        loaded = open_clip.create_model(f"local-dir:{folder}").eval()  # float16 is judged, not what was trained
        single, double = (
            make_true_clips(
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
            os.replace(folder / file, options.out / file)
    return card


def main() -> None:
    try:
        options = tyro.cli(Options, prog="python -m tgmae.shapes.tiny_clip")
        # More threads gain little on a model of this size, and lose much where the cores are shared; with one, the
        # weights follow from the seed.
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
    """One caption → int64 [77]; the few thousand captions there are come again and again."""
    known: dict[str, Tensor] = {}

    def tokenize(caption: str) -> Tensor:
        if caption not in known:
            known[caption] = tokenizer([caption])[0]
        return known[caption]

    return tokenize


if __name__ == "__main__":
    main()
