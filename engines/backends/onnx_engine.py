"""Towers as ONNX graphs: their export, and the engine that runs them with ONNX Runtime."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib.util
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from engines.clip_model import describe_network, fingerprint
from engines.files import lock_file, write_atomically
from engines.towers.clip_towers import Tower

INPUT, OUTPUT = "pixels", "embeddings"
# 23 is the first opset with an Attention operator, which GPU runtimes map to a fused kernel. 18 writes it out as
# MatMul, Softmax, MatMul, for runtimes without such a kernel. tensorrt_plan.choose_opset knows which those are, so
# nothing falls back silently. On a CPU ONNX Runtime is equally fast with both.
OPSET_ATTENTION, OPSET_PLAIN = 23, 18
# Raise this when a change to the towers' code changes what they compute, so that graphs and plans in users' caches are
# rebuilt. tests/engines/test_onnx_engine.py fails if an exported graph changed and this number did not.
GRAPH_VERSION = 1
_NAMES = {torch.float32: "fp32", torch.float16: "fp16"}
_NUMPY = {torch.float32: np.float32, torch.float16: np.float16}


def export_tower(tower: Tower, dtype: torch.dtype, cache_dir: Path, opset: int = OPSET_ATTENTION) -> Path:
    """Return the tower's graph, `cache_dir`/onnx/NAME.onnx; export it unless it is there.

    The graph maps pixels `dtype` [batch, *tower.input_shape] to embeddings `dtype` [batch, …, E], with a dynamic batch.
    The weights are inside the file. Its name and metadata contain the tower, dtype, opset and `graph_fingerprint`, so
    that a graph of other weights or other code is never mistaken for this one. An export of ViT-B/32 takes 5 to 10 s on
    a CPU.

    Raises ValueError for a dtype other than float32 and float16, a missing package, or a tower that cannot be exported.
    """
    for package in ("onnx", "onnxscript"):
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"the export needs the package {package}, which is not installed: pip install {package}")
    if dtype not in _NAMES:
        raise ValueError(f"a tower is exported in float32 or float16, got {dtype}: use --clip.precision fp32 or fp16")
    about = {
        "tgmae_tower": tower.name, "tgmae_dtype": _NAMES[dtype], "tgmae_opset": str(opset),
        "tgmae_fingerprint": graph_fingerprint(tower),
    }  # fmt: skip
    name = f"{tower.name}-{_NAMES[dtype]}-op{opset}-{about['tgmae_fingerprint']}"
    path = cache_dir / "onnx" / f"{name}.onnx"
    path.parent.mkdir(parents=True, exist_ok=True)
    with lock_file(path):
        if not _holds(path, about):
            tqdm.write(
                f"tgmae: exporting {path.name} to {path.parent}, which takes a few seconds; it is cached there",
                file=sys.stderr,
            )
            write_atomically(path, _export(tower, dtype, opset, about))
    return path


def graph_fingerprint(tower: Tower) -> str:
    """Return a digest of the weights, the structure of the network, torch's version and GRAPH_VERSION."""
    version = f"{torch.__version__} {GRAPH_VERSION}"
    return fingerprint(tower.state_dict(), name=f"{tower.name} {describe_network(tower)} {version}")


def count_operators(path: Path) -> dict[str, int]:
    """Count the nodes of each operator in a graph, most frequent first."""
    import onnx

    counts: dict[str, int] = {}
    for node in onnx.load(path).graph.node:
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _holds(path: Path, about: dict[str, str]) -> bool:
    """Return whether the file is there, has these metadata, and is whole to the last bit."""
    if not path.is_file():
        return False
    import onnx
    from google.protobuf.message import DecodeError

    with contextlib.suppress(DecodeError, ValueError):
        model = onnx.load(path)
        found = {entry.key: entry.value for entry in model.metadata_props}
        if found == about and model.doc_string == _checksum(model):
            return True
    print(f"tgmae: {path} is damaged; exporting it again", file=sys.stderr)
    return False


def _checksum(model: Any) -> str:
    """Return a digest of a graph without its doc string, which holds the digest."""
    said, model.doc_string = model.doc_string, ""
    digest = hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest()
    model.doc_string = said
    return f"sha256 without this line: {digest}"


def _export(tower: Tower, dtype: torch.dtype, opset: int, about: dict[str, str]) -> bytes:
    """Export a copy of the tower; return the serialised graph with `about` as its metadata."""
    module = copy.deepcopy(tower).eval().requires_grad_(False).to("cpu", dtype)
    # Two inputs, because the exporter would treat a batch of one as a constant.
    example = torch.zeros(2, *tower.input_shape, dtype=dtype)
    try:
        with _silence():
            program = torch.onnx.export(
                module, (example,), dynamo=True, external_data=False, opset_version=opset, verbose=False,
                input_names=[INPUT], output_names=[OUTPUT], dynamic_shapes=({0: torch.export.Dim("batch")},),
            )  # fmt: skip
    except torch.onnx.errors.OnnxExporterError as error:
        raise ValueError(f"the tower {tower.name} could not be exported at opset {opset}: {error}") from error
    assert program is not None
    model = program.model_proto
    for node in model.graph.node:
        del node.metadata_props[:]  # source locations, with the paths of this machine
    for key, value in about.items():
        model.metadata_props.add(key=key, value=value)
    try:
        model.doc_string = _checksum(model)
        data: bytes = model.SerializeToString()
    except Exception as error:  # protobuf's errors have their own base class
        raise ValueError(
            f"the tower {tower.name} in {dtype} exceeds the 2 GiB that one graph can hold ({error}); "
            "use --clip.precision fp16"
        ) from error
    return data


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Suppress the exporter's progress lines, torch's warnings about itself, and the logs of rewriting passes."""
    names = ("torch.onnx", "onnxscript", "onnx_ir")
    levels = [logging.getLogger(name).level for name in names]
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in zip(names, levels, strict=True):
            logging.getLogger(name).setLevel(level)


class OnnxEngine:
    """A tower's graph in ONNX Runtime. It reads and writes torch's memory in place, on one stream at a time.

    Raises ValueError, with what to install, if onnxruntime or its CUDA provider is missing.
    """

    def __init__(self, tower: Tower, dtype: torch.dtype, device: torch.device, cache_dir: Path) -> None:
        self.dtype, self.device = dtype, device
        self._index = 0
        self._stream: torch.cuda.Stream | None = None
        try:
            import onnxruntime
        except ImportError as error:
            package = "onnxruntime-gpu" if device.type == "cuda" else "onnxruntime"
            raise ValueError(f"--clip.engine onnxruntime cannot be loaded ({error}): pip install {package}") from error
        providers: list[Any] = ["CPUExecutionProvider"]
        if device.type == "cuda":
            if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
                raise ValueError(
                    "this onnxruntime has no CUDA provider: "
                    "pip uninstall onnxruntime && pip install onnxruntime-gpu, or use --clip.engine torch"
                )
            self._index = torch.cuda.current_device() if device.index is None else device.index
            # The session is bound to one stream: it cannot follow torch's current stream from call to call.
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            # TF32 is on by default, but whoever asks for fp32 wants exact results.
            cuda = {"device_id": self._index, "user_compute_stream": str(self._stream.cuda_stream), "use_tf32": "0"}
            providers.insert(0, ("CUDAExecutionProvider", cuda))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # By default idle threads spin between two batches, on cores that the training step needs.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        path = export_tower(tower, dtype, cache_dir)
        self._session = onnxruntime.InferenceSession(str(path), options, providers=providers)
        if self._stream is not None and self._session.get_providers()[0] != "CUDAExecutionProvider":
            raise ValueError(
                "onnxruntime's CUDA provider does not load here (its log above says why); "
                "install the onnxruntime-gpu that fits this CUDA and cuDNN, or use --clip.engine torch"
            )
        self._run_options = onnxruntime.RunOptions()
        # The stream keeps the order, so the host need not wait for the result.
        self._run_options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        self._input_shape = tower.input_shape
        self._output_shape: list[int] = self._session.get_outputs()[0].shape[1:]

    def __call__(self, x: Tensor) -> Tensor:
        """Embed [n, *tower.input_shape] → [n, …, E], for any n. Raises ValueError for any other input."""
        check_input(x, self._input_shape, self.dtype, self.device)
        x = to_plain_memory(x)
        out = torch.empty(x.shape[0], *self._output_shape, dtype=self.dtype, device=x.device)
        binding = self._session.io_binding()
        where = (self.device.type, self._index, _NUMPY[self.dtype])
        binding.bind_input(INPUT, *where, list(x.shape), x.data_ptr())
        binding.bind_output(OUTPUT, *where, list(out.shape), out.data_ptr())
        with on_stream(self._stream, x, out):
            self._session.run_with_iobinding(binding, self._run_options)
        return out


def check_input(x: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """Raise ValueError for an input that does not fit: an engine that is given bare addresses would not notice.

    shape   of one input, without the batch
    """
    if x.dtype != dtype or x.device.type != device.type or tuple(x.shape[1:]) != tuple(shape) or x.shape[0] < 1:
        raise ValueError(
            f"expected {dtype} [n, {', '.join(map(str, shape))}] on {device}, "
            f"got {x.dtype} {list(x.shape)} on {x.device}"
        )


def to_plain_memory(x: Tensor) -> Tensor:
    """Return the tensor itself if it is contiguous and aligned to 256 bytes, as TensorRT requires, otherwise a copy."""
    x = x.contiguous()
    return x.clone() if x.is_cuda and x.data_ptr() % 256 else x


@contextlib.contextmanager
def on_stream(stream: torch.cuda.Stream | None, *tensors: Tensor) -> Iterator[None]:
    """Run what the block enqueues on `stream` after torch's current stream, and the current stream after it.

    tensors   used on `stream`, so that their memory is not reused too early
    """
    if stream is None:
        yield
        return
    current = torch.cuda.current_stream(stream.device)
    stream.wait_stream(current)
    yield
    current.wait_stream(stream)
    for tensor in tensors:
        tensor.record_stream(stream)  # without this, torch reuses memory as soon as Python releases the tensor
