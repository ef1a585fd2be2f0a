"""Caption embeddings, computed once per distinct caption and kept on disk.

Dimensions: C distinct captions, E embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from engines.clip_model import CLIPModel
from engines.files import lock_file, replacing


def embed_captions(
    clip: CLIPModel, captions: Sequence[str], cache_dir: Path, device: torch.device
) -> tuple[Tensor, list[bool]]:
    """Embeddings float32 [C, E] on the CPU, and which captions are too long for CLIP.

    Those that `cache_dir` holds from before are not computed again. Processes that want the same ones take turns: the
    first computes them.
    """
    path = cache_dir.expanduser() / f"captions-{clip.fingerprint}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    with lock_file(path):
        known, table, too_long = _read_embeddings(path)
        new = [text for text in captions if text not in known]
        if new:
            added = clip.encode_text(new, device)
            table = torch.cat([table, added]) if known else added
            known.update({text: len(known) + index for index, text in enumerate(new)})
            too_long = too_long + clip.too_long(new)
            columns = {
                "caption": list(known),
                "embedding": pa.FixedSizeListArray.from_arrays(pa.array(table.numpy().ravel()), table.shape[1]),
                "too_long": too_long,
            }
            with replacing(path) as temporary:
                pq.write_table(pa.table(columns), temporary, write_page_checksum=True)
    rows = [known[text] for text in captions]
    return table[rows], [too_long[row] for row in rows]


def _read_embeddings(path: Path) -> tuple[dict[str, int], Tensor, list[bool]]:
    """Rows by caption, embeddings and too_long of a cache; empty where there is none or it is damaged."""
    if not path.exists():
        return {}, torch.empty(0), []
    try:
        stored = pq.read_table(path, page_checksum_verification=True)
        known = {text: index for index, text in enumerate(stored.column("caption").to_pylist())}
        flat = stored.column("embedding").combine_chunks().flatten().to_numpy()
        return known, torch.from_numpy(flat.copy()).view(len(known), -1), stored.column("too_long").to_pylist()
    except (pa.ArrowException, OSError, KeyError, RuntimeError):
        return {}, torch.empty(0), []  # it is only a cache
