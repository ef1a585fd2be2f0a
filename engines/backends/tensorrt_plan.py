"""TensorRT plans: a tower's ONNX graph compiled for one GPU, in a file whose name says everything it depends on.

The same code drives `tensorrt` (10 and 11) and `tensorrt_rtx`. The latter also builds on a machine without a GPU, for a
named architecture, so this file is tested everywhere, and only running a plan needs a GPU.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import re
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from engines.backends.onnx_engine import OPSET_ATTENTION, OPSET_PLAIN
from engines.files import lock_file, write_atomically
from engines.sealed import open_fields, read_sealed, seal_fields, write_sealed

Library = Literal["tensorrt", "tensorrt_rtx"]
# Modules that provide each library. NVIDIA's package tensorrt_rtx only re-exports its bindings and may be absent.
_MODULES = {"tensorrt": ("tensorrt",), "tensorrt_rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings")}
_INSTALL = {
    "tensorrt": "pip install tensorrt (its libraries come from NVIDIA's own package index)",
    "tensorrt_rtx": "pip install tensorrt-rtx-cu13",
}


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """An input or output of a plan; -1 stands for the batch."""

    name: str
    dtype: str  # numpy's name
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class PlanDescription:
    """The parameters of a build, written beside the plan, because only a machine with its GPU can read the plan."""

    library: str
    version: str
    gpu: str
    graph_hash: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    profile: tuple[int, int, int]  # batch: minimum, tuned for, maximum
    build_s: float
    plan_bytes: int
    plan_hash: str


def load_library(name: Library) -> Any:
    """Import `tensorrt` or `tensorrt_rtx`. Raises ValueError with what to install."""
    for module in _MODULES[name]:
        try:
            return importlib.import_module(module)
        except ModuleNotFoundError:
            continue
        except (ImportError, OSError) as error:  # the package is there, but not a shared library that it needs
            raise ValueError(f"{name} is installed but does not load: {error}") from error
    raise ValueError(f"{name} is not installed: {_INSTALL[name]}")


def choose_opset(trt: Any, library: Library, dtype: torch.dtype) -> int:
    """Return the opset to export for a library: the one with the operator Attention if the library has kernels for it.

    TensorRT's fused attention exists in half precision only. In float32 a build fails, or crashes if there is a mask
    (tensorrt_rtx 1.7.1). The parser knows Attention from TensorRT 10.14 on.
    """
    version = tuple(int(part) for part in trt.__version__.split(".")[:2])
    knows_attention = library == "tensorrt_rtx" or version >= (10, 14)
    return OPSET_ATTENTION if dtype == torch.float16 and knows_attention else OPSET_PLAIN


def build_plan(
    graph: Path,
    out_dir: Path,
    library: Library,
    batch: int,
    compute_capability: str | None = None,
    device: torch.device | None = None,
) -> Path:
    """Return the plan of a graph for batches of 1 to `batch`, in `out_dir`; build it unless it is there.

    compute_capability   architecture to build for, such as "sm80", without needing that GPU (tensorrt_rtx only)
    device               otherwise, the GPU to build for; None for the current one

    The file name contains graph, GPU, library, version, batch and the graph's hash, so a plan of anything else has
    another name. NAME.plan.json beside NAME.plan describes it (`describe_plan`); a plan that does not match its
    description is built again. A build takes seconds to minutes.

    Raises ValueError if there is no such library, GPU, target or graph, or if the build fails.
    """
    trt = load_library(library)
    target = choose_target(trt, library, compute_capability, device)
    gpu = target or _slug(torch.cuda.get_device_name(device))
    try:
        graph_hash = hashlib.sha256(graph.read_bytes()).hexdigest()[:12]
    except OSError as error:
        raise ValueError(f"cannot read the graph {graph}: {error.strerror}; tgmae-engine export makes one") from error
    path = out_dir / f"{graph.stem}-{gpu}-{library}-{trt.__version__}-b{batch}-{graph_hash}.plan"
    out_dir.mkdir(parents=True, exist_ok=True)
    with lock_file(path), contextlib.nullcontext() if target else torch.cuda.device(device):
        if path.is_file():
            try:
                describe_plan(path)
            except ValueError as error:
                print(f"tgmae: {error}; building it again", file=sys.stderr)
            else:
                return path
        tqdm.write(
            f"tgmae: building {path.name} in {out_dir}, which takes seconds to minutes; it is cached there",
            file=sys.stderr,
        )
        started = time.perf_counter()
        timing = out_dir / f"{library}-{trt.__version__}-{gpu}.timing" if library == "tensorrt" else None
        data, inputs, outputs = _build(trt, graph, batch, target, timing)
        write_atomically(path, data)
        description = PlanDescription(
            library=library, version=trt.__version__, gpu=gpu, graph_hash=graph_hash, inputs=inputs, outputs=outputs,
            profile=(1, batch, batch), build_s=round(time.perf_counter() - started, 2), plan_bytes=len(data),
            plan_hash=hashlib.sha256(data).hexdigest(),
        )  # fmt: skip
        write_atomically(_beside(path), json.dumps(seal_fields(asdict(description)), indent=1).encode())
    return path


def describe_plan(path: Path) -> PlanDescription:
    """Read the description beside a plan. Raises ValueError if either file is missing, damaged or does not match."""
    try:
        fields, is_whole = open_fields(json.loads(_beside(path).read_text(encoding="utf-8")))
        if not is_whole:
            raise ValueError
        for key in ("inputs", "outputs"):
            fields[key] = tuple(TensorSpec(**{**spec, "shape": tuple(spec["shape"])}) for spec in fields[key])
        description = PlanDescription(**{**fields, "profile": tuple(fields["profile"])})
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is not a plan of tgmae, or {_beside(path).name} is missing or damaged") from error
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != description.plan_hash:
        raise ValueError(f"the plan {path} is truncated, damaged or not the one that {_beside(path).name} describes")
    return description


def _beside(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def choose_target(trt: Any, library: Library, asked: str | None, device: torch.device | None) -> str | None:
    """Return the architecture to build for, such as "sm80"; None for tensorrt, which builds for the GPU it runs on.

    asked   the user's choice; None for the architecture of `device`

    Raises ValueError if there is no such target, or no GPU.
    """
    if library == "tensorrt":
        if asked is not None:
            raise ValueError(f"tensorrt builds for the GPU it runs on; --target {asked} is for tensorrt_rtx only")
        if not torch.cuda.is_available():
            raise ValueError(
                "tensorrt builds for the GPU it runs on, and this machine has none; tensorrt_rtx needs none"
            )
        return None
    known = [name.lower() for name in trt.ComputeCapability.__members__ if name.startswith("SM")]
    if asked is None:
        if not torch.cuda.is_available():
            raise ValueError(f"this machine has no GPU to build for; name a target: --target {'|'.join(known)}")
        asked = "sm{}{}".format(*torch.cuda.get_device_capability(device))
        if asked not in known:
            raise ValueError(
                f"tensorrt_rtx {trt.__version__} builds for {', '.join(known)} and not for this GPU ({asked}): "
                "use --clip.engine tensorrt"
            )
    if asked.lower() not in known:
        raise ValueError(f"tensorrt_rtx {trt.__version__} has no target {asked!r}; it has {', '.join(known)}")
    return asked.lower()


def _build(
    trt: Any, graph: Path, batch: int, target: str | None, timing: Path | None
) -> tuple[memoryview, tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Build a plan; return it serialised, with its inputs and its outputs."""
    log = make_log(trt)
    builder = trt.Builder(log)
    if builder is None:
        raise ValueError(f"TensorRT's builder does not start: {log.take_errors()}")
    # Read the graph. TensorRT 11 always uses strong types, and ignores the flag.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(graph)):
        problems = "; ".join(parser.get_error(number).desc() for number in range(parser.num_errors))
        raise ValueError(f"TensorRT {trt.__version__} cannot read the graph {graph}: {problems}")
    _let_decompose(trt, network, graph)

    # Set the precision, the target, and the range of batches.
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # on by default, but whoever asks for fp32 wants exact results
    if target is not None:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, target.upper()), 0)
    if network.num_inputs != 1 or network.get_input(0).shape[0] != -1 or -1 in tuple(network.get_input(0).shape)[1:]:
        raise ValueError(f"expected a graph with one input and a dynamic batch, as tgmae-engine export makes: {graph}")
    pixels = network.get_input(0)
    profile = builder.create_optimization_profile()
    rest = tuple(pixels.shape)[1:]
    # Tuned for the full batch: all passes over a batch of clips but the last have that size.
    profile.set_shape(pixels.name, (1, *rest), (batch, *rest), (batch, *rest))
    config.add_optimization_profile(profile)

    # Reuse the timings of earlier builds, build, and keep the new timings.
    if timing is not None:
        cache = config.create_timing_cache(read_sealed(timing))
        if cache is None or not config.set_timing_cache(cache, False):
            print(f"tgmae: {timing} is of another GPU or damaged; timing the kernels again", file=sys.stderr)
            config.set_timing_cache(config.create_timing_cache(b""), False)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise ValueError(f"TensorRT {trt.__version__} could not build {graph.name}: {log.take_errors()}")
    if timing is not None:
        write_sealed(timing, bytes(memoryview(config.get_timing_cache().serialize())))
    inputs = tuple(_describe(trt, network.get_input(number)) for number in range(network.num_inputs))
    outputs = tuple(_describe(trt, network.get_output(number)) for number in range(network.num_outputs))
    return memoryview(plan), inputs, outputs


def _describe(trt: Any, tensor: Any) -> TensorSpec:
    return TensorSpec(name=tensor.name, dtype=trt.nptype(tensor.dtype).__name__, shape=tuple(tensor.shape))


def _let_decompose(trt: Any, network: Any, graph: Path) -> None:
    """Allow attention of sizes without a fused kernel, such as heads of 16, to be computed by several kernels."""
    kind = getattr(trt.LayerType, "ATTENTION_INPUT", None)
    for number in range(network.num_layers):
        layer = network.get_layer(number)
        if kind is None or layer.type != kind:
            continue
        if layer.get_input(0).dtype == trt.float32:
            raise ValueError(
                f"{graph.name} has the operator Attention in float32, which TensorRT cannot build: "
                f"export it in fp16, or at opset {OPSET_PLAIN}"
            )
        layer.__class__ = trt.IAttentionInputLayer  # get_layer returns the base class for every layer
        layer.attention.decomposable = True


def make_log(trt: Any) -> Any:
    """Make a logger that prints warnings and collects errors for the exception that follows."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(message)
            elif severity == trt.ILogger.Severity.WARNING:
                print(f"tgmae: TensorRT warns: {message}", file=sys.stderr)

        def take_errors(self) -> str:
            text = "; ".join(self.errors)[:2000] or "it gave no reason"
            self.errors.clear()
            return text

    return Log()
