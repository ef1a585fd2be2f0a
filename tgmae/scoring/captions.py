"""Captions of a manifest: which ones count, and their embeddings, computed once and kept on disk.

Dimensions: B clips, C distinct captions, E embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from tgmae.files import lock_file, replacing
from tgmae.manifest import Manifest
from tgmae.types import ClipRequest

if TYPE_CHECKING:  # open_clip takes seconds to import, and whoever masks without text does without it
    from engines.clip import Clip


def require_captions(manifest: Manifest, no_caption: Literal["error", "exclude", "label"]) -> tuple[Manifest, str]:
    """Drop empty captions, then treat the videos left without any as `no_caption` says.

    Returns the manifest, in which every video has a caption, and what was done for that ("" for nothing).
    Raises ValueError, naming them, where they are an error, have no label to take, or are all there is.
    """
    texts = [[text.strip() for text in row if text.strip()] for row in manifest.table.column("captions").to_pylist()]
    missing = [row for row, captions in enumerate(texts) if not captions]
    paths = manifest.table.column("path")
    labels = [str(label).replace("_", " ").strip() for label in manifest.table.column("label").to_pylist()]
    bare = [row for row in missing if not labels[row]]
    if missing and no_caption == "error":
        advice = ["leave them out: --mask.no-caption exclude"] * (len(missing) < len(manifest))
        advice += ["take their labels for captions: --mask.no-caption label"] * (not bare)
        advice += ["train without text: --mask.kind tube"]
        raise ValueError(
            f"{len(missing)} of {len(manifest)} videos have no caption, such as {_some(paths, missing)}. Captions come "
            f"with tgmae-data index FOLDER --csv FILE; or {'; or '.join(advice)}"
        )
    note = ""
    if missing and no_caption == "label":
        if bare:
            raise ValueError(
                f"{len(bare)} videos have neither caption nor label, such as {_some(paths, bare)}; "
                "leave them out with --mask.no-caption exclude"
            )
        for row in missing:
            texts[row] = [labels[row]]
        note = f"{len(missing)} videos without a caption take their label for one"
    column = manifest.table.schema.get_field_index("captions")
    table = manifest.table.set_column(column, "captions", pa.array(texts, pa.list_(pa.string())))
    if missing and no_caption == "exclude":
        if len(missing) == len(manifest):
            raise ValueError(
                f"not one of the {len(manifest)} videos has a caption; mask without text: --mask.kind tube"
            )
        table = table.filter(pa.array(bool(captions) for captions in texts))
        note = f"{len(missing)} videos without a caption are left out"
    return Manifest(table, manifest.root), note


class CaptionEmbeddings:
    """Text embeddings of every caption of a manifest, on one device.

    table  float32 [C, E], L2-normalised        note  how many captions CLIP cannot read to their end, "" for none
    """

    def __init__(self, manifest: Manifest, clip: Clip, cache_dir: Path, device: torch.device) -> None:
        rows = manifest.table.column("captions").to_pylist()
        distinct = sorted({text for captions in rows for text in captions})
        number = {text: index for index, text in enumerate(distinct)}
        self._numbers: NDArray[np.int64] = np.array([number[text] for captions in rows for text in captions], np.int64)
        self._starts: NDArray[np.int64] = np.cumsum([0, *(len(captions) for captions in rows)])
        table, too_long = embed_captions(clip, distinct, cache_dir, device)
        self.table = table.to(device)
        self.note = (
            f"{sum(too_long)} of {len(distinct)} captions are longer than CLIP's "
            f"{clip.tokenizer.context_length} tokens; what is beyond does not count"
        ) * any(too_long)

    def __call__(self, requests: Sequence[ClipRequest]) -> Tensor:
        """The embeddings of the requests' captions, float32 [B, E]."""
        index = [int(self._numbers[self._starts[request.row] + request.caption]) for request in requests]
        return self.table[torch.tensor(index).to(self.table.device, non_blocking=True)]

    def of_row(self, row: int) -> Tensor:
        """The embeddings of all captions of one video, float32 [captions, E]."""
        return self.table[torch.from_numpy(self._numbers[self._starts[row] : self._starts[row + 1]])]


def embed_captions(
    clip: Clip, captions: Sequence[str], cache_dir: Path, device: torch.device
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


def _some(paths: pa.ChunkedArray, rows: Sequence[int]) -> str:
    return ", ".join(paths[row].as_py() for row in rows[:3]) + (" …" if len(rows) > 3 else "")
