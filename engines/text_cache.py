"""Caption embeddings, computed once per distinct caption and kept on disk.

Dimensions: C captions, E embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from engines.clip_model import CLIPModel
from engines.files import lock_file, replacing


@dataclass(frozen=True)
class _Cached:
    """The contents of a cache file.

    rows        of each caption in the other two
    embeddings  float32 [rows, E], L2-normalised
    too_long    which captions CLIP's tokenizer cuts off
    """

    rows: dict[str, int]
    embeddings: Tensor
    too_long: list[bool]


def embed_captions(
    clip_model: CLIPModel, captions: Sequence[str], cache_dir: Path, device: torch.device
) -> tuple[Tensor, list[bool]]:
    """Return L2-normalised embeddings float32 [C, E] on the CPU, and which captions are too long for CLIP.

    cache_dir   holds captions-KEY.parquet, one file per CLIP; created or extended if captions are missing
    device      where missing captions are encoded

    Captions may repeat. Processes that share a cache take turns: the first encodes the captions, the others read them.
    """
    path = cache_dir.expanduser() / f"captions-{clip_model.captions_key}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    with lock_file(path):
        cached = _read(path)
        missing = [text for text in dict.fromkeys(captions) if text not in cached.rows]
        if missing:
            cached = _extend(cached, clip_model, missing, device)
            _write(path, cached)
    rows = [cached.rows[text] for text in captions]
    return cached.embeddings[rows], [cached.too_long[row] for row in rows]


def _extend(cached: _Cached, clip_model: CLIPModel, captions: list[str], device: torch.device) -> _Cached:
    """Encode captions and append them."""
    added = clip_model.encode_text(captions, device)
    start = len(cached.rows)
    return _Cached(
        rows=cached.rows | {text: start + offset for offset, text in enumerate(captions)},
        embeddings=torch.cat([cached.embeddings, added]) if cached.rows else added,
        too_long=cached.too_long + clip_model.too_long(captions),
    )


def _write(path: Path, cached: _Cached) -> None:
    table = cached.embeddings
    columns = {
        "caption": list(cached.rows),
        "embedding": pa.FixedSizeListArray.from_arrays(pa.array(table.numpy().ravel()), table.shape[1]),
        "too_long": cached.too_long,
    }
    with replacing(path) as temporary:
        pq.write_table(pa.table(columns), temporary, write_page_checksum=True)


def _read(path: Path) -> _Cached:
    """Read a cache file. A missing or damaged one counts as empty, because everything in it can be computed again."""
    empty = _Cached({}, torch.empty(0), [])
    if not path.exists():
        return empty
    try:
        stored = pq.read_table(path, page_checksum_verification=True)
        rows = {text: row for row, text in enumerate(stored.column("caption").to_pylist())}
        flat = stored.column("embedding").combine_chunks().flatten().to_numpy()
        embeddings = torch.from_numpy(flat.copy()).view(len(rows), -1)
        return _Cached(rows, embeddings, stored.column("too_long").to_pylist())
    except (pa.ArrowException, OSError, KeyError, RuntimeError):
        return empty
