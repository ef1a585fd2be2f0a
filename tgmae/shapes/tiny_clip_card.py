"""The tiny CLIP's card.json and, made from it, its README.md. No number is typed by hand."""

from __future__ import annotations

import os
import platform
import textwrap
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import nn

from tgmae.shapes.tiny_clip_eval import EVALUATION_SEED

_VERSIONS = ("torch", "open_clip_torch", "numpy", "av", "pillow")


def describe(
    model: nn.Module, folder: Path, *, options: dict[str, Any], loss: float, train_s: float, total_s: float,
    measured: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """Return the card: how the weights in `folder` were made, with which versions, and how well they do."""
    # Leave out the folder that the weights were written to: it says nothing about them.
    arguments = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in options.items() if name != "out")
    visual = model.visual
    assert isinstance(visual, nn.Module)
    return {
        "command": f"python -m tgmae.shapes.tiny_clip {arguments}",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} CPU cores",
        "versions": {"python": platform.python_version(), **{name: version(name) for name in _VERSIONS}},
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "vision_parameters": sum(weight.numel() for weight in visual.parameters()),
        "size_bytes": (folder / "open_clip_model.safetensors").stat().st_size,
        "loss": round(loss, 4),
        "train_s": round(train_s, 1),
        "total_s": round(total_s, 1),
        "evaluation_seed": EVALUATION_SEED,
        "measured": measured,
    }


def write_readme(path: Path, card: dict[str, Any]) -> None:
    """Write the card as a Markdown page."""
    measured, pairs = card["measured"], card["measured"]["two_objects"]
    versions = ", ".join(f"{name} {number}" for name, number in card["versions"].items())
    rows = {
        "patch, both frames of a tubelet": measured["patch_frames2"],
        "patch, first frame": measured["patch_frames1"],
        "ground truth of the first frame": measured["truth_frames1"],
        **{f"dense, {name[6:]}": row for name, row in measured.items() if name.startswith("dense_")},
    }
    parts = [
        "# A tiny CLIP for the shapes clips",
        _fill(
            "An open_clip model of the usual kind (ViT with a class token, causal text transformer, contrastive loss) "
            "and an unusual size. It knows the moving shapes of the demo and nothing else. It stands in for "
            "CLIP ViT-B/32 where that cannot be downloaded. Words that occur in no caption of the demo have random "
            "embeddings."
        ),
        _fill(
            "Load it with `open_clip.create_model('local-dir:engines/tiny_clip')`; in tgmae it is `--clip.model "
            "shapes`. The command that trains it (`make tiny-clip`) writes this page and card.json."
        ),
        "## How it was made",
        f"    {card['command']}",
        _fill(
            f"On {card['date']}, {card['machine']}: {card['train_s']:.0f} s to draw scenes and train, "
            f"{card['total_s']:.0f} s with the measurements. {versions}. {card['parameters']:,} parameters, "
            f"{card['vision_parameters']:,} of them in the image encoder; {card['size_bytes'] / 2**20:.1f} MiB in "
            f"float16. Loss over the last 50 steps: {card['loss']:.3f}."
        ),
        _fill(
            "Data: crops, from one patch to the whole frame, of generated scenes with one or two objects, encoded and "
            "decoded with x264 and captioned by what the crop shows (tgmae/shapes/tiny_clip_data.py). The scenes come "
            "from a stream of random numbers that no data set of any seed draws from."
        ),
        "## How well it does",
        _fill(
            f"Measured on {measured['clips']} clips with one object and {measured['two_object_clips']} with two, "
            f"generated from seed {card['evaluation_seed']}, decoded from H.264 and cropped as the demo does. An "
            "object's patches are the ones it covers by at least half, averaged over the two frames of a tubelet: "
            f"{measured['object_patches']} of the {measured['patches']} patches of a slot. AUC is the area under the "
            "ROC curve of the score for telling these patches from all others; chance gives .5."
        ),
        _table(
            ("score by the clip's caption", "AUC in a clip", "AUC in a slot", "found", "masked", "visible, bottom"),
            (
                (
                    name, row["auc_clip"], row["auc_slot"], row["found"],
                    f"{row['masked_top']:.3f} of {row['oracle_top']:.3f}",
                    f"{row['visible_bottom']:.3f} of {row['oracle_bottom']:.3f}",
                )
                for name, row in rows.items()
            ),
        ),
        _fill(
            "found: share of the object's patches that are found by taking the best-scored patches of a slot, as many "
            "as the object has there. masked: share of the object's patches that are masked at ratio .6, out of the "
            "most that any score could reach; chance gives .6. visible: share that stays visible when the lowest "
            "scores are masked; chance gives .4. Objects move within a tubelet, so scores of the first frame alone can "
            "be no better than that frame's own ground truth."
        ),
        _table(
            ("two objects, AUC in a clip", "first named", "second named"),
            (
                ("against the other object's patches", pairs["first"], pairs["second"]),
                ("the same, named by shape alone", pairs["first_by_shape"], pairs["second_by_shape"]),
                ("against all other patches", pairs["first_in_all"], pairs["second_in_all"]),
            ),
        ),
        _table(("one object, asked for as", "AUC in a clip"), measured["auc_by_wording"].items()),
        _table(("one object, of the colour", "AUC in a clip"), measured["auc_by_color"].items()),
    ]  # fmt: skip
    path.write_text("\n\n".join(parts) + "\n")


def _fill(text: str) -> str:
    return textwrap.fill(text, 120, break_on_hyphens=False, break_long_words=False)


def _table(header: tuple[str, ...], rows: Iterable[Iterable[str | float]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    cells = [[f"{cell:.3f}" if isinstance(cell, float) else cell for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)
