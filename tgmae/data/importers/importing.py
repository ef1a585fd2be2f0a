"""Plan an import: read the official lists, find the videos that they name, and say what is and is not there."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from engines.files import replacing
from tgmae.data.importers.datasets import recognise_lists, recognise_videos
from tgmae.data.importers.matching import Matches, Missing, match_videos
from tgmae.data.importers.names import DatasetName
from tgmae.data.importers.official_files import FormatError, NoListError, OfficialFiles
from tgmae.data.importers.samples import Dataset, Sample, compare, drop_repeats
from tgmae.data.indexing import check_paths
from tgmae.data.listing import Listing, list_folder, make_printable
from tgmae.data.manifest import read_manifest

_SHOWN = 5


@dataclass(frozen=True)
class ImportPlan:
    """What is to be indexed, and what the user should know before that begins.

    lines    what was found, a sentence each
    missing  clips without a file
    """

    listing: Listing
    lines: list[str]
    missing: list[Missing]


def plan_import(name: DatasetName, dataset: Dataset, annotations: Path, videos: Path, out: Path) -> ImportPlan:
    """Read the lists of `annotations`, and match them with the files below `videos`.

    Raises FormatError, naming the data set that they are of where that shows, for other files than the official ones;
    ValueError where none of the videos is there, and where the manifest `out` holds captions that no list gives.
    """
    check_paths(videos, out, None)
    files = OfficialFiles(annotations)
    try:
        lines = dataset.read(files)
        samples, repeats = drop_repeats(lines)
    except FormatError as error:
        there = f"; {files.describe()}" * isinstance(error, NoListError)
        raise FormatError(f"{dataset.title}: {error}{there}{recognise_lists(files, name)}") from error
    if not samples:
        raise FormatError(f"{dataset.title}: the lists in {annotations} are empty")
    listing = list_folder(videos, "", out)
    paths = [entry.path for entry in listing.entries]
    found = match_videos(dataset, samples, paths)
    if not found.entries:
        raise ValueError(make_printable(_describe_nothing(name, dataset, samples, videos, listing)))
    _check_captions(out, found)
    said = [compare(dataset, lines), *files.notes, *filter(None, [repeats]), *_describe_matches(found, samples)]
    # Files that the folder holds beside its videos are not worth a line in an import: the lists say what is meant.
    return ImportPlan(Listing(found.entries, listing.unreadable), [*map(make_printable, said)], found.missing)


def write_missing(path: Path, missing: Sequence[Missing]) -> None:
    """Write the clips that were not found as a CSV."""
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        rows = ((clip.path, clip.split, clip.reason) for clip in missing)
        csv.writer(file).writerows([("clip", "split", "reason"), *rows])


def _describe_matches(found: Matches, samples: Sequence[Sample]) -> list[str]:
    segments = f" ({len(found.entries):,} segments)" * any(entry.span for entry in found.entries)
    num_files = len({entry.path for entry in found.entries})
    wanted = len({(sample.video, sample.clip_start) for sample in samples})
    lines = [f"found {num_files:,} of {wanted:,} videos{segments}"]
    if found.doubles:
        are = "video is" if len(found.doubles) == 1 else "videos are"
        lines.append(
            f"{len(found.doubles):,} {are} there more than once; of {found.doubles[0][0]} and "
            f"{found.doubles[0][1]} the first is taken"
        )
    if found.unlisted:
        some = ", ".join(found.unlisted[:_SHOWN]) + ", …" * (len(found.unlisted) > _SHOWN)
        are = "video is in no list, and is" if len(found.unlisted) == 1 else "videos are in no list, and are"
        lines.append(f"{len(found.unlisted):,} other {are} left out: {some}")
    return lines


def _describe_nothing(
    name: DatasetName, dataset: Dataset, samples: Sequence[Sample], videos: Path, listing: Listing
) -> str:
    looked = f"looked for files such as {dataset.example}, for {len(samples):,} lines from {samples[0].name} on"
    paths = [entry.path for entry in listing.entries]
    if paths:
        some = ", ".join(paths[:_SHOWN]) + ", …" * (len(paths) > _SHOWN)
        there = f"it holds {len(paths):,} other videos ({some}){recognise_videos(paths, name)}"
    else:
        others = listing.describe_others()
        there = f"it holds {others}, and no videos" if others else "it holds no files"
    return f"none of {dataset.title}'s videos is below {videos}: {looked}; {there}; give the right folder with --videos"


def _check_captions(out: Path, found: Matches) -> None:
    """Raise ValueError where the manifest that is there has captions from elsewhere, which an import would drop."""
    try:
        before = read_manifest(out)
    except (FileNotFoundError, ValueError):
        return  # indexing says what is wrong with it
    given = {caption.source for entry in found.entries for caption in entry.captions}
    sources = Counter(caption.source for row in before.captions() for caption in row)
    if lost := {source: number for source, number in sources.items() if source not in given}:
        listed = ", ".join(f"{number} from {source or 'an unknown source'}" for source, number in lost.items())
        raise ValueError(
            f"{out} holds captions that an import would drop ({listed}); write elsewhere with --out, or delete it first"
        )
