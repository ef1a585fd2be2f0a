"""tgmae-engine export | build | check | agree | distill: make and judge what scores patches."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from engines.config import CLIPConfig, LastBlock, TowerSpec
from tgmae.cli.scorers import Agree, Distill
from tgmae.cli.subcommands import run_subcommand
from tgmae.masks.config import MaskConfig
from tgmae.training.parallel import choose_device

if TYPE_CHECKING:  # open_clip takes seconds to import, and --help should not
    from engines.patch_similarity import PatchSimilarity
    from engines.towers.clip_towers import Tower

_CAPTIONS: tuple[str, ...] = (
    "a person moving something",
    "an animal running outdoors",
    "a red ball",
    "putting a cup on a table",
)


@dataclass(frozen=True)
class TowerCommand:
    """Which part of CLIP, for which pictures; the defaults are those of the presets at 224²."""

    clip: CLIPConfig = field(default_factory=CLIPConfig)
    tower: Literal["patch", "dense", "student"] = "patch"  # as mask.scorer
    patch_size: int = 16  # pixels
    height: int = 224  # of a frame, in pixels
    width: int = 224
    last_block: LastBlock = "clearclip"  # of tower dense, as mask.dense
    student: Path | None = None  # file made by `tgmae-engine distill`, for tower student

    def spec(self) -> TowerSpec:
        """Return which tower is meant. Raises ValueError for sizes that do not fit."""
        if self.patch_size < 1 or min(self.height, self.width) < self.patch_size:
            raise ValueError(f"a frame of {self.height}×{self.width} has no patches of {self.patch_size} pixels")
        if self.height % self.patch_size or self.width % self.patch_size:
            raise ValueError(
                "--height and --width must be multiples of --patch-size, "
                f"got {self.height}, {self.width} and {self.patch_size}"
            )
        if self.tower == "student" and self.student is None:
            raise ValueError("--tower student needs --student FILE, made by: tgmae-engine distill MANIFEST")
        return TowerSpec(kind=self.tower, last_block=self.last_block, student=self.student)

    @property
    def patches(self) -> int:
        """In a frame."""
        return (self.height // self.patch_size) * (self.width // self.patch_size)

    def batch(self, tower: Tower) -> int:
        """Inputs in one pass, as a run would have them; a plan is built for that many."""
        from engines.auto_batch import inputs_per_pass

        return inputs_per_pass(tower, self.clip, self.patches, self.dtype().itemsize, self._device())

    def make_tower(self) -> Tower:
        from engines.clip_model import load_clip
        from engines.patch_similarity import make_tower

        spec = self.spec()
        return make_tower(load_clip(self.clip), spec, self.patch_size, self.height, self.width)

    def dtype(self) -> torch.dtype:
        from engines.engine import choose_dtype

        return choose_dtype(self.clip, self._device())

    def _device(self) -> torch.device:
        # A plan may be built without the GPU that it is for.
        on_gpu = self.clip.engine.startswith("tensorrt") or torch.cuda.is_available()
        return torch.device("cuda" if on_gpu else "cpu")


@dataclass(frozen=True)
class Export(TowerCommand):
    """Write the ONNX graph of a tower, in the form that --clip.engine takes."""

    out: Path | None = None  # folder; by default clip.cache_dir, where a run looks for it
    opset: Literal[18, 23] | None = (
        None  # 23 has an Attention operator, 18 spells it out; by default as the engine needs
    )

    def run(self) -> None:
        from engines.backends.onnx_engine import count_operators

        path = _export(self, self.make_tower(), self.out, self.opset)
        counts = count_operators(path)
        print(f"{path}: {_mib(path)}, {sum(counts.values())} nodes, {counts.get('Attention', 0)} of them Attention")
        print(", ".join(f"{name} {count}" for name, count in counts.items()))


@dataclass(frozen=True)
class Build(TowerCommand):
    """Build the TensorRT plan of a tower, for --clip.engine tensorrt or tensorrt_rtx, and for --clip.batch."""

    target: str | None = None  # such as sm80: build for that GPU without having it (tensorrt_rtx only)
    out: Path | None = None  # folder; by default plans in clip.cache_dir, where a run looks for it

    def run(self) -> None:
        from engines.backends.tensorrt_plan import build_plan, choose_target, describe_plan, load_library

        library = self.clip.engine
        if library not in ("tensorrt", "tensorrt_rtx"):
            raise ValueError(f"only TensorRT has plans: --clip.engine tensorrt or tensorrt_rtx, not {library}")
        choose_target(load_library(library), library, self.target, None)  # before the export, which takes long
        if self.target is not None and self.clip.batch is None:
            raise ValueError(
                "how much goes through a plan at once follows from its GPU: with --target give --clip.batch"
            )
        out = self.out or self.clip.cache_dir.expanduser() / "plans"
        tower = self.make_tower()
        batch = self.batch(tower)
        graph = _export(self, tower, None, None)
        started = time.perf_counter()
        path = build_plan(graph, out, library, batch, self.target)
        seconds = time.perf_counter() - started
        plan = describe_plan(path)
        least, tuned, most = plan.profile
        print(f"{path}: {_mib(path)}, {seconds:.1f} s; {plan.library} {plan.version} for {plan.gpu}")
        print(f"batch {least} to {most}, tuned for {tuned}")
        for kind, tensors in (("in ", plan.inputs), ("out", plan.outputs)):
            for tensor in tensors:
                shape = ", ".join("batch" if size == -1 else str(size) for size in tensor.shape)
                print(f"{kind} {tensor.name} {tensor.dtype} [{shape}]")


@dataclass(frozen=True)
class Check(TowerCommand):
    """Compare --clip.engine with torch in float32, on random pixels and on real clips; exit 1 where they differ.

    Cosines are of each patch's two embeddings. Agreement is the share of masked patches (60 %) that both choose, over
    frames and captions.
    """

    manifest: Path | None = None  # compare on frames of these videos too, and with their captions
    frames: int = 16  # of each kind
    min_cosine: float = 0.99  # of any patch; less is an error. fp16 reaches about .999, fp8 .998
    device: Literal["auto", "cuda", "cpu"] = "auto"
    seed: int = 0

    def run(self) -> None:
        from engines.clip_model import load_clip
        from engines.patch_similarity import make_patch_similarity

        spec, device = self.spec(), choose_device(self.device)
        if self.frames < 1:
            raise ValueError(f"--frames must be at least 1, got {self.frames}")
        draw = torch.Generator().manual_seed(self.seed)
        shape = (self.frames, self.height, self.width, 3)
        pixels = {"random pixels": torch.randint(0, 256, shape, dtype=torch.uint8, generator=draw)}
        captions = _CAPTIONS
        if self.manifest is not None:
            pixels["real clips"], captions = _read_clips(self.manifest, self.frames, self.height, self.width)
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
            raise ValueError(f"{self.clip.engine} differs from torch: a cosine of {worst:.6f}, below {self.min_cosine}")


def _export(command: TowerCommand, tower: Tower, out: Path | None, opset: int | None) -> Path:
    from engines.backends.onnx_engine import OPSET_ATTENTION, export_tower
    from engines.backends.tensorrt_plan import choose_opset, load_library

    dtype, library = command.dtype(), command.clip.engine
    if opset is None:
        opset = OPSET_ATTENTION
        if library in ("tensorrt", "tensorrt_rtx"):
            opset = choose_opset(load_library(library), library, dtype)
    return export_tower(tower, dtype, out or command.clip.cache_dir.expanduser(), opset)


def _compare(
    ours: PatchSimilarity, reference: PatchSimilarity, frames: Tensor, texts: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """Cosine of each patch [F, N], and agreement of each frame and caption [F, C]; on the CPU."""
    from tgmae.masks.agreement import mask_agreement

    def embed(features: PatchSimilarity) -> Tensor:
        # One frame, then as many as fit: a dynamic batch that is none would show.
        most = features.frames_per_pass(frames)
        pieces = [frames[:1], *(frames[start : start + most] for start in range(1, len(frames), most))]
        return torch.cat([features.embed(piece).float() for piece in pieces])

    a, b = embed(ours), embed(reference)
    scores, wanted = (torch.einsum("fne,ce->fcn", x, texts).cpu() for x in (a, b))
    return torch.cosine_similarity(a, b, dim=-1).cpu(), mask_agreement(scores, wanted, k)


def _read_clips(path: Path, count: int, height: int, width: int) -> tuple[Tensor, tuple[str, ...]]:
    """The centres of middle frames of up to `count` videos, uint8 [F, H, W, 3], and some of the videos' captions."""
    from dali_pipelines.pyav_pipeline import read_clip
    from dali_pipelines.types import ClipRequest, CropBox
    from dali_pipelines.video.decode import DecodeError
    from tgmae.data.manifest import read_manifest

    if height != width:
        raise ValueError(f"clips are cut square: --manifest needs --height equal to --width, got {height} and {width}")
    manifest = read_manifest(path)
    frames: list[Tensor] = []
    captions: list[str] = []
    for row in torch.linspace(0, len(manifest) - 1, min(count, len(manifest))).long().tolist():
        video = manifest[row]
        side = min(video.width, video.height)
        crop = CropBox(x=(video.width - side) // 2, y=(video.height - side) // 2, width=side, height=side)
        request = ClipRequest(
            row=row, epoch=0, position=row, frames=(video.start + video.length // 2,), crop=crop, flip=False, caption=0,
            mask_seed=0,
        )  # fmt: skip
        try:
            frames.append(read_clip(manifest.file(row), video, request, height))
        except DecodeError as error:
            print(f"left out {video.name}: {error}")
            continue
        captions.extend(caption.text for caption in video.captions[:1])
    if not frames:
        raise ValueError(f"not one of the videos of {path} could be read")
    return torch.cat(frames), tuple(dict.fromkeys(captions))[:8] or _CAPTIONS


def _mib(path: Path) -> str:
    return f"{path.stat().st_size / 2**20:.1f} MiB"


def main() -> None:
    commands = {"export": Export, "build": Build, "check": Check, "agree": Agree, "distill": Distill}
    run_subcommand("tgmae-engine", __doc__, commands)


if __name__ == "__main__":
    main()
