"""The subcommands of tgmae-engine that make what an engine runs: export and build."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from engines.config import CLIPConfig, LastBlock, TowerSpec
from tgmae.cli.parser.subcommands import CLIP_FLAGS, Command

if TYPE_CHECKING:  # --help does without torch and open_clip, which take seconds to import
    import torch

    from engines.towers.clip_towers import Tower


@dataclass(frozen=True)
class TowerCommand(Command):
    """A command on a tower: the part of CLIP, or the student, that embeds patches of a size."""

    clip: CLIPConfig = field(default_factory=CLIPConfig)
    # Network that embeds patches, named like the scorer that uses it (--mask.scorer).
    #   patch    CLIP, with every patch as an image by itself
    #   dense    CLIP, with whole frames
    #   student  a small network made by `tgmae-engine distill`
    tower: Literal["patch", "dense", "student"] = "patch"
    patch_size: int = 16  # Height and width of a patch, in pixels.
    height: int = 224  # Height of a frame, in pixels.
    width: int = 224  # Width of a frame, in pixels.
    last_block: LastBlock = "clearclip"  # How the dense tower changes CLIP's last block (--mask.dense).
    student: Path | None = None  # File made by `tgmae-engine distill`, for the student tower.

    def spec(self) -> TowerSpec:
        """Return which tower is meant. Raises ValueError for sizes that do not fit."""
        if self.patch_size < 1:
            raise ValueError(f"--patch-size must be at least 1, got {self.patch_size}")
        if self.needs_size and min(self.height, self.width) < self.patch_size:
            raise ValueError(
                f"--height {self.height} --width {self.width} hold no patch of --patch-size {self.patch_size}"
            )
        if self.needs_size and (self.height % self.patch_size or self.width % self.patch_size):
            raise ValueError(
                "--height and --width must be multiples of --patch-size, "
                f"got {self.height}, {self.width} and {self.patch_size}"
            )
        if self.tower == "student" and self.student is None:
            raise ValueError("--tower student needs --student FILE; make it with: tgmae-engine distill MANIFEST")
        return TowerSpec(kind=self.tower, last_block=self.last_block, student=self.student)

    @property
    def needs_size(self) -> bool:
        """Whether the size of a frame matters."""
        return True

    @property
    def patches(self) -> int:
        """Patches in a frame."""
        return (self.height // self.patch_size) * (self.width // self.patch_size)

    def batch(self, tower: Tower) -> int:
        """Return how many inputs a run gives the tower at once; a plan is built for that many."""
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

    def export(self, tower: Tower, folder: Path, opset: int | None = None) -> Path:
        """Write the ONNX graph of a tower below `folder`, by default with the opset that --clip.engine needs."""
        from engines.backends.onnx_engine import OPSET_ATTENTION, export_tower
        from engines.backends.tensorrt_plan import choose_opset, load_library

        dtype, library = self.dtype(), self.clip.engine
        if opset is None:
            opset = OPSET_ATTENTION
            if library in ("tensorrt", "tensorrt_rtx"):
                opset = choose_opset(load_library(library), library, dtype)
        return export_tower(tower, dtype, folder, opset)

    def _device(self) -> torch.device:
        import torch

        # A plan may be built without the GPU that it is for.
        on_gpu = self.clip.engine.startswith("tensorrt") or torch.cuda.is_available()
        return torch.device("cuda" if on_gpu else "cpu")


@dataclass(frozen=True)
class Export(TowerCommand):
    """Write the ONNX graph of a tower, in the form that an engine needs."""

    EXAMPLES: ClassVar = (
        "tgmae-engine export --clip.model shapes --out graphs  # Write graphs/onnx/….onnx for the demo's tiny CLIP.",
        "tgmae-engine export --tower dense --clip.engine tensorrt --height 448 --width 448  "
        "# Export whole frames of CLIP ViT-B/32 for TensorRT.",
    )
    COMMON: ClassVar = ("tower", "clip.model", "clip.engine", "out")
    READS: ClassVar = tuple(name for name in CLIP_FLAGS if name not in ("clip.batch", "clip.cuda-graph"))

    out: Path | None = None  # Folder to write. Default: --clip.cache-dir, where a run looks for it.
    # ONNX opset: 23 has an Attention operator, 18 spells it out. Default: what the engine needs.
    opset: Literal[18, 23] | None = None

    @property
    def needs_size(self) -> bool:
        return self.tower == "dense"  # the graphs of the others take any number of patches

    def run(self) -> None:
        from engines.backends.onnx_engine import count_operators

        path = self.export(self.make_tower(), self.out or self.clip.cache_dir.expanduser(), self.opset)
        counts = count_operators(path)
        print(f"{path}: {_mib(path)}, {sum(counts.values())} nodes, {counts.get('Attention', 0)} of them Attention")
        print(", ".join(f"{name} {count}" for name, count in counts.items()))


@dataclass(frozen=True)
class Build(TowerCommand):
    """Build the TensorRT plan of a tower, for --clip.engine tensorrt or tensorrt_rtx.

    --clip.engine is required. A run builds the plan it needs by itself; this does it beforehand, or for another GPU.
    """

    EXAMPLES: ClassVar = (
        "tgmae-engine build --clip.engine tensorrt  # Build CLIP ViT-B/32's plan for this GPU.",
        "tgmae-engine build --clip.engine tensorrt_rtx --target sm89 --clip.batch 3528  "
        "# Build it for an L4 or L40S, on a machine without one.",
    )
    COMMON: ClassVar = ("clip.engine", "clip.model", "clip.batch", "tower", "target", "out")
    READS: ClassVar = tuple(name for name in CLIP_FLAGS if name != "clip.cuda-graph")
    CHOICES: ClassVar = {"clip.engine": ("tensorrt", "tensorrt_rtx")}  # the others have no plans

    target: str | None = None  # Build for this GPU architecture, such as sm80, without having it (tensorrt_rtx only).
    out: Path | None = None  # Folder to write. Default: plans in --clip.cache-dir, where a run looks for it.

    def run(self) -> None:
        from engines.backends.tensorrt_plan import build_plan, choose_target, describe_plan, load_library

        library = self.clip.engine
        if library not in ("tensorrt", "tensorrt_rtx"):
            raise ValueError(f"only TensorRT has plans: use --clip.engine tensorrt or tensorrt_rtx, not {library}")
        choose_target(load_library(library), library, self.target, None)  # before the export, which takes long
        if self.target is not None and self.clip.batch is None:
            raise ValueError("--target needs --clip.batch: how much a plan takes at once depends on the GPU")
        cache = self.clip.cache_dir.expanduser()
        tower = self.make_tower()
        batch = self.batch(tower)
        graph = self.export(tower, cache)
        started = time.perf_counter()
        path = build_plan(graph, self.out or cache / "plans", library, batch, self.target)
        seconds = time.perf_counter() - started
        plan = describe_plan(path)
        least, tuned, most = plan.profile
        print(f"{path}: {_mib(path)}, {seconds:.1f} s; {plan.library} {plan.version} for {plan.gpu}")
        print(f"batch {least} to {most}, tuned for {tuned}")
        for kind, tensors in (("in ", plan.inputs), ("out", plan.outputs)):
            for tensor in tensors:
                shape = ", ".join("batch" if size == -1 else str(size) for size in tensor.shape)
                print(f"{kind} {tensor.name} {tensor.dtype} [{shape}]")


def _mib(path: Path) -> str:
    return f"{path.stat().st_size / 2**20:.1f} MiB"
