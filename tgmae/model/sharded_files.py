"""Checkpoints that several processes wrote together: folders of torch.distributed.checkpoint (DCP).

    step_00000100.dcp/header.json    all that is no tensor, sealed, with the digest of .metadata and torch's version
                     /.metadata      DCP's table: which part of which tensor lies where
                     /__0_0.distcp   the tensors of process 0, each as torch.save writes it; __1_0.distcp, …

Reading them takes no process group and runs no code from them. Any changed bit is noticed: header and table have
digests, and torch.save's records have checksums. The writer is in `tgmae/training/checkpoints/sharded.py`.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engines.files import write_atomically
from engines.sealed import open_fields, seal_fields
from engines.torch_files import DamagedFile, first_line, verify_records

HEADER, TABLE = "header.json", ".metadata"
_DCP = "torch.distributed.checkpoint"
# What DCP's table is pickled of. Its other classes hold bytes that are pickled in turn, and we write none.
_CLASSES = {
    (f"{_DCP}.metadata", name)
    for name in (
        "Metadata", "TensorStorageMetadata", "ChunkStorageMetadata", "TensorProperties", "MetadataIndex", "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    )
} | {(f"{_DCP}.filesystem", "_StorageInfo"), ("torch.serialization", "_get_layout"), ("torch", "Size")}  # fmt: skip


class _TableReader(pickle.Unpickler):
    """Unpickles DCP's table and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if (module, name) in _CLASSES or is_dtype:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it holds a pickled {module}.{name}")


def is_sharded_folder(path: Path) -> bool:
    """Return whether a folder is such a checkpoint, whole or damaged."""
    return path.suffix == ".dcp" or (path / TABLE).exists()


def write_header(folder: Path, fields: Mapping[str, Any]) -> None:
    """Write the header of a folder that DCP has finished, and flush both to disk."""
    sealed = seal_fields({**fields, "torch": str(torch.__version__), "table": _digest(folder)})
    write_atomically(folder / HEADER, json.dumps(sealed).encode(), sync=True)


def _digest(folder: Path) -> str:
    return hashlib.blake2b((folder / TABLE).read_bytes(), digest_size=16).hexdigest()


def read_header(folder: Path) -> dict[str, Any]:
    """Return the header's fields, and tensors without contents by name under "tensors".

    Raises DamagedFile, or ValueError where this torch cannot read such folders.
    """
    try:
        fields, is_whole = open_fields(json.loads((folder / HEADER).read_text(encoding="utf-8")))
        if not is_whole or fields["table"] != _digest(folder):
            raise ValueError("it is damaged (wrong checksum)")
    except Exception as error:
        raise _damage(folder, error) from error
    table = _read_table(folder, fields["torch"])
    tensors = table.state_dict_metadata.items()
    shapes = {name: torch.empty(one.size, dtype=one.properties.dtype, device="meta") for name, one in tensors}
    return {**fields, "tensors": shapes}


def verify_tensors(folder: Path, rank: int = 0, size: int = 1) -> None:
    """Compare the checksums of every `size`-th tensor, from number `rank` on. Raises DamagedFile."""
    pieces = sorted({(one.relative_path, one.offset, one.length) for one in _read_table(folder).storage_data.values()})
    try:
        for name, offset, length in pieces[rank::size]:
            with (folder / Path(name).name).open("rb") as file:
                file.seek(offset)
                if len(piece := file.read(length)) < length:
                    raise ValueError(f"its file {name} is cut off")
            verify_records(io.BytesIO(piece))
    except Exception as error:  # zipfile raises many kinds
        raise _damage(folder, error) from error


def read_tensors(folder: Path, into: dict[str, Tensor]) -> None:
    """Fill tensors by name, in place: whole ones, or the parts of DTensors that this process holds.

    Raises DamagedFile.
    """
    table, dcp = _read_table(folder), _import_dcp(folder)

    class Reader(dcp.FileSystemReader):  # type: ignore[misc, name-defined]
        """Takes the table that was unpickled with care."""

        def read_metadata(self, *_: Any, **__: Any) -> Any:
            return table

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*load in a single process")  # each reads what is its own
            dcp.load(into, storage_reader=Reader(folder), no_dist=True)
    except dcp.CheckpointException as failure:
        error = next(iter(failure.failures.values()))[0]
        raise _damage(folder, error) from failure


def _read_table(folder: Path, written_with: str = "") -> Any:
    _import_dcp(folder)
    try:
        with (folder / TABLE).open("rb") as file:
            return _TableReader(file).load()
    except Exception as error:
        problem = _damage(folder, error)
        if written_with not in ("", torch.__version__):
            problem = DamagedFile(f"{problem}; torch {written_with} wrote it, this is torch {torch.__version__}")
        raise problem from error


def _damage(folder: Path, error: BaseException) -> DamagedFile:
    if isinstance(error, FileNotFoundError) and error.filename is not None:
        return DamagedFile(f"{folder} is not a readable checkpoint: {Path(error.filename).name} is missing")
    return DamagedFile(f"{folder} is not a readable checkpoint: {first_line(error)}")


def _import_dcp(folder: Path) -> Any:
    """Return torch.distributed.checkpoint. Raises ValueError where this build of torch has none."""
    try:
        import torch.distributed.checkpoint as dcp
    except ImportError as error:
        raise ValueError(
            f"{folder} was written by processes that shared the network (--parallel fsdp), and torch "
            f"{torch.__version__} is built without {_DCP}, which reads it; use a torch that has it, or start from "
            "exported weights with --init-from RUN/hf"
        ) from error
    return dcp
