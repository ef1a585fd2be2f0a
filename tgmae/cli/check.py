"""tgmae-engine check: compare an engine with the reference."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from engines.config import CLIPConfig
from tgmae.cli.parser.subcommands import CLIP_FLAGS, Command
from tgmae.cli.tower import TowerCommand
from tgmae.config.masks import MaskConfig

if TYPE_CHECKING:  # --help does without torch
    from torch import Tensor

    from engines.patch_similarity import PatchSimilarity
    from tgmae.data.manifest import Manifest

_CAPTIONS: tuple[str, ...] = (
    "a person moving something",
    "an animal running outdoors",
    "a red ball",
    "putting a cup on a table",
)


@dataclass(frozen=True)
class Check(TowerCommand):
    """Compare an engine with torch in float32, on random pixels and on real frames; exit with 1 if they differ.

    The cosine is that of a patch's two embeddings. The agreement is the share of masked patches (60 %) that both
    choose, over frames and captions.
    """

    EXAMPLES: ClassVar = (
        "tgmae-engine check --clip.engine onnxruntime --clip.model shapes --manifest data/shapes/manifest.parquet  "
        "# Check ONNX Runtime on the demo's clips.",
        "tgmae-engine check --clip.precision fp8 --manifest data/ssv2/manifest.parquet  "
        "# See how far FP8 moves the masks.",
    )
    COMMON: ClassVar = ("clip.engine", "clip.precision", "clip.model", "tower", "manifest", "min-cosine", "device")
    READS: ClassVar = CLIP_FLAGS

    manifest: Path | None = None  # Compare on frames of these videos as well, and with their captions.
    frames: int = 16  # Frames of random pixels, and frames of videos.
    # Fail if the cosine of any patch is lower. fp16 reaches about 0.999, fp8 about 0.998.
    min_cosine: float = 0.99
    device: Literal["auto", "cuda", "cpu"] = "auto"  # auto uses CUDA if there is a GPU.
    seed: int = 0  # Random seed of the random pixels.

    @classmethod
    def make_default(cls, arguments: Sequence[str]) -> Command:
        # The manifest decides the default of --clip.model, and is therefore read before the other flags.
        values = [argument.removeprefix("--manifest=") for argument in arguments]
        manifest = next((Path(value) for value in values if value.endswith(".parquet")), None)
        if manifest is None:
            return cls()
        from tgmae.captions.clip_choice import default_clip

        return cls(clip=CLIPConfig(model=default_clip(manifest)))

    def run(self) -> None:
        spec = self.spec()
        if self.frames < 1:
            raise ValueError(f"--frames must be at least 1, got {self.frames}")
        import torch
        from rich.console import Console
        from rich.table import Table

        from engines.clip_model import load_clip
        from engines.patch_similarity import make_patch_similarity
        from tgmae.captions.clip_choice import advise_clip
        from tgmae.data.manifest import read_manifest
        from tgmae.training.parallel import choose_device

        device = choose_device(self.device)
        draw = torch.Generator().manual_seed(self.seed)
        shape = (self.frames, self.height, self.width, 3)
        pixels = {"random pixels": torch.randint(0, 256, shape, dtype=torch.uint8, generator=draw)}
        captions = _CAPTIONS
        if self.manifest is not None:
            if self.height != self.width:
                raise ValueError(
                    f"--manifest needs --height equal to --width, got {self.height} and {self.width}: crops are square"
                )
            manifest = read_manifest(self.manifest)
            pixels["real clips"], captions = _read_frames(manifest, self.frames, self.height)
            if warning := advise_clip(self.clip.is_demos, manifest):
                print(warning)
        clip = load_clip(self.clip)
        plain = dataclasses.replace(self.clip, engine="torch", precision="fp32")
        ours, reference = (
            make_patch_similarity(clip, config, spec, self.patch_size, self.height, self.width, device)
            for config in (self.clip, plain)
        )
        texts = clip.encode_text(captions, device).to(device)
        precision = "fp8" if self.clip.precision == "fp8" else str(ours.engine.dtype).removeprefix("torch.")
        table = Table(title=f"{self.clip.engine} in {precision} on {device.type} against torch in float32: {ours.name}")
        for heading in ("pixels", "patches", "mean cosine", "min cosine", "agreement", "5th percentile"):
            table.add_column(heading, justify="left" if heading == "pixels" else "right")
        worst = 1.0
        for name, some in pixels.items():
            cosines, agreement = _compare(ours, reference, some, texts, MaskConfig().masked_per_slot(self.patches))
            # A comparison with NaN is false: an engine that returns it must not pass.
            worst = min(worst, float(cosines.min())) if not cosines.isnan().any() else float("nan")
            table.add_row(
                name, str(cosines.numel()), f"{cosines.mean():.6f}", f"{cosines.min():.6f}", f"{agreement.mean():.4f}",
                f"{agreement.flatten().quantile(0.05):.4f}",
            )  # fmt: skip
            if worst != worst:
                break
        Console().print(table)
        if not worst >= self.min_cosine:
            raise ValueError(
                f"{self.clip.engine} differs from torch: a cosine of {worst:.6f}, below --min-cosine {self.min_cosine}"
            )


def _compare(
    ours: PatchSimilarity, reference: PatchSimilarity, frames: Tensor, texts: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """Return the cosine of each patch [F, N] and the agreement of each frame and caption [F, C], on the CPU."""
    import torch

    from tgmae.masks.agreement import mask_agreement

    def embed(features: PatchSimilarity) -> Tensor:
        # One frame by itself, then full passes: an engine that only works for one batch size would show.
        most = features.frames_per_pass(frames)
        pieces = [frames[:1], *(frames[start : start + most] for start in range(1, len(frames), most))]
        return torch.cat([features.embed(piece).float() for piece in pieces])

    a, b = embed(ours), embed(reference)
    scores, wanted = (torch.einsum("fne,ce->fcn", x, texts).cpu() for x in (a, b))
    return torch.cosine_similarity(a, b, dim=-1).cpu(), mask_agreement(scores, wanted, k)


def _read_frames(manifest: Manifest, count: int, side: int) -> tuple[Tensor, tuple[str, ...]]:
    """Return the centre of the middle frame of up to `count` videos, uint8 [F, H, W, 3], and up to 8 captions.

    Videos that cannot be read are named and left out. Raises ValueError if none is left.
    """
    import torch

    from dali_pipelines.pyav_pipeline import read_clip
    from dali_pipelines.types import ClipRequest, CropBox
    from dali_pipelines.video.decode import DecodeError

    frames: list[Tensor] = []
    captions: list[str] = []
    for row in torch.linspace(0, len(manifest) - 1, min(count, len(manifest))).long().tolist():
        video = manifest[row]
        square = min(video.width, video.height)
        crop = CropBox(x=(video.width - square) // 2, y=(video.height - square) // 2, width=square, height=square)
        request = ClipRequest(
            row=row, epoch=0, position=row, frames=(video.start + video.length // 2,), crop=crop, flip=False, caption=0,
            mask_seed=0,
        )  # fmt: skip
        try:
            frames.append(read_clip(manifest.file(row), video, request, side))
        except DecodeError as error:
            print(f"left out {video.name}: {error}")
            continue
        captions.extend(caption.text for caption in video.captions[:1])
    if not frames:
        raise ValueError(f"not one of the videos of {manifest.root} could be read")
    return torch.cat(frames), tuple(dict.fromkeys(captions))[:8] or _CAPTIONS
