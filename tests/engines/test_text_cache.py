"""The file of caption embeddings: its format, which older caches have, and what happens to a damaged one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from engines.text_cache import embed_captions

CPU = torch.device("cpu")


class FakeModel:
    """Embeds a caption as its length, and remembers what it was asked for."""

    captions_key = "0123456789abcdef"

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    def encode_text(self, captions: Sequence[str], device: torch.device) -> Tensor:
        self.asked.append(list(captions))
        return torch.tensor([[float(len(text)), 1.5, -0.25] for text in captions])

    def too_long(self, captions: Sequence[str]) -> list[bool]:
        return [len(text) > 3 for text in captions]


def embed(model: FakeModel, captions: list[str], folder: Path) -> tuple[Tensor, list[bool]]:
    return embed_captions(model, captions, folder, CPU)  # type: ignore[arg-type]


def test_the_format_of_the_file(tmp_path: Path) -> None:
    embed(FakeModel(), ["b", "a cat"], tmp_path)
    path = tmp_path / "captions-0123456789abcdef.parquet"
    table = pq.read_table(path)
    assert table.schema.remove_metadata() == pa.schema(
        {"caption": pa.string(), "embedding": pa.list_(pa.float32(), 3), "too_long": pa.bool_()}
    )
    assert table.to_pydict() == {
        "caption": ["b", "a cat"], "embedding": [[1.0, 1.5, -0.25], [5.0, 1.5, -0.25]], "too_long": [False, True],
    }  # fmt: skip


def test_a_file_written_before_is_read(tmp_path: Path) -> None:
    flat = pa.array([1.0, 2.0, 3.0, 4.0], pa.float32())
    columns = {
        "caption": ["x", "y"], "embedding": pa.FixedSizeListArray.from_arrays(flat, 2), "too_long": [True, False],
    }  # fmt: skip
    pq.write_table(pa.table(columns), tmp_path / f"captions-{FakeModel.captions_key}.parquet", write_page_checksum=True)
    model = FakeModel()
    table, too_long = embed(model, ["y", "x"], tmp_path)
    assert table.tolist() == [[3.0, 4.0], [1.0, 2.0]]
    assert too_long == [False, True]
    assert model.asked == []


def test_captions_that_repeat_are_encoded_once(tmp_path: Path) -> None:
    model = FakeModel()
    table, too_long = embed(model, ["a", "long", "a", "b", "long"], tmp_path)
    assert model.asked == [["a", "long", "b"]]
    assert table[:, 0].tolist() == [1.0, 4.0, 1.0, 1.0, 4.0]
    assert too_long == [False, True, False, False, True]
    again, _ = embed(model, ["b", "b"], tmp_path)
    assert torch.equal(again, table[[3, 3]])
    assert len(model.asked) == 1


def test_a_changed_bit_is_found_by_its_checksum(tmp_path: Path) -> None:
    model = FakeModel()
    captions = [f"caption {number}" for number in range(50)]
    expected, _ = embed(model, captions, tmp_path)
    path = tmp_path / f"captions-{FakeModel.captions_key}.parquet"
    whole = bytearray(path.read_bytes())
    place = bytes(whole).index(expected[0].numpy().tobytes())
    whole[place + 6] ^= 1  # in the second number: a wrong embedding that is still a number
    path.write_bytes(whole)
    assert torch.equal(embed(model, captions, tmp_path)[0], expected)
    assert len(model.asked) == 2
    embed(model, captions, tmp_path)
    assert len(model.asked) == 2  # the file is whole again
