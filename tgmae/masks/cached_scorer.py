"""The scorer that reads score maps made by `tgmae-data scores`.

A map covers the whole frame with square cells, as many along the short side as a clip has patches. There is one map for
every `every`-th frame and every caption, in float16. The scores of a clip are the map under its own crop, interpolated
bilinearly at the centres of its patches. Cropping, flipping and resizing therefore follow from the request.

Dimensions: F scored frames, C captions of a video, Y X cells, S slots, N patches per slot.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dali_pipelines.types import ClipBatch, ClipRequest, CropBox, Video
from engines.config import CLIPConfig
from tgmae.captions.clip_choice import advise_clip
from tgmae.config.run import InputConfig
from tgmae.data.manifest import Manifest
from tgmae.masks.maps.frames import shapes_of
from tgmae.masks.maps.store import Key, MapFolder, digest_videos

COMMAND = "tgmae-data scores"


def score_key(clip: str, identity: str, tower: str, patch_size: int, cells: int, every: int) -> Key:
    """Describe what score maps depend on besides videos and captions.

    clip      fingerprint of CLIP's weights    identity  `CLIPConfig.identity`, by which it is recognised unloaded
    tower     name of the network, which tells the scorer and, for dense, the last block
    cells     cells along the short side       every     frames from one map to the next
    """
    sizes = {"patch_size": patch_size, "cells": cells, "every": every}
    return {"dtype": "float16", "clip": clip, "clip_identity": identity, "tower": tower, **sizes}


class CachedScorer:
    """Reads scores from a folder of maps.

    Raises ValueError where the maps do not fit the CLIP, geometry, videos or captions. No CLIP is loaded, unless the
    maps do not know by its name which one made them.
    """

    needs_text = False

    def __init__(self, config: InputConfig, manifest: Manifest, device: torch.device) -> None:
        assert isinstance(config.mask.scores, Path)
        self.device = device
        self.side = config.model.image_size // config.model.patch_size
        self.slots, self.tubelet = config.model.num_slots, config.model.tubelet_size
        self.frames_per_tubelet = config.mask.frames_per_tubelet
        self.maps = MapFolder(config.mask.scores, COMMAND)
        tower, self.every = str(self.maps.key.get("tower")), int(self.maps.key.get("every", 1))
        fingerprint, held = str(self.maps.key.get("clip")), self.maps.key.get("clip_identity")
        identity = config.clip.identity()
        geometry = (tower, config.model.patch_size, self.side, self.every)
        self.maps.check(score_key(fingerprint, identity, *geometry))
        # CLIP is not used for anything here, and its identity stands beside the maps. Where it is another one, a local
        # CLIP may still be the same; a name of another is not downloaded only to be refused.
        if identity != held:
            if held is not None and not config.clip.is_local:
                name = "shapes" if held == CLIPConfig(model="shapes").identity() else str(held)
                raise ValueError(
                    f"the maps in {config.mask.scores} were made with the CLIP {name!r} (now {identity!r}); give the "
                    f"--clip.model and --clip.weights that they were made with, or make maps with {COMMAND}"
                )
            from engines.clip_model import load_clip

            self.maps.check(score_key(load_clip(config.clip).fingerprint, identity, *geometry))
        shapes = shapes_of(manifest, self.side, self.every)
        notes = self.maps.check_videos(manifest, digest_videos(manifest, "captions"), shapes)
        self.note = "\n".join(filter(None, [notes, advise_clip(config.clip.is_demos, manifest)]))

    def __call__(self, clips: ClipBatch, text: Tensor | None = None) -> Tensor:
        """Return float32 [B, S, N]."""
        pairs = zip(clips.videos, clips.requests, strict=True)
        scores = np.stack([self.score(video, request) for video, request in pairs])
        return torch.from_numpy(scores).to(self.device, non_blocking=True)

    def score(self, video: Video, request: ClipRequest) -> NDArray[np.float32]:
        """Return float32 [S, N] of one clip: the maps nearest to its scored frames, under its crop."""
        maps = self.maps.read(video.name)
        # The maps of a segment begin at its start. Where `every` divides that, ties are decided as for the whole file.
        frames = (np.array(request.frames) - video.start % self.every).reshape(self.slots, self.tubelet)
        places = np.rint(frames[:, : self.frames_per_tubelet] / self.every).astype(int) - video.start // self.every
        nearest = np.minimum(places, len(maps) - 1)
        chosen = maps[nearest, request.caption].astype(np.float32).mean(1)  # [S, Y, X]
        down, across = crop_weights(video, request.crop, request.flip, chosen.shape[1:], self.side)
        scores: NDArray[np.float32] = (down @ chosen @ across.T).reshape(self.slots, -1)
        return scores


def crop_weights(
    video: Video, crop: CropBox, flip: bool, grid: tuple[int, ...], side: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return bilinear weights of a map's rows and columns at the patch centres of a crop: float32 [side, Y], [side, X].

    The map's cells divide the whole frame evenly. Beyond the outermost cell centres, the outermost cells are used.
    """
    centres = (np.arange(side) + 0.5) / side
    rows = (crop.y + centres * crop.height) / video.height * grid[0] - 0.5
    columns = (crop.x + centres * crop.width) / video.width * grid[1] - 0.5
    return _weights(rows, grid[0]), _weights(columns[::-1] if flip else columns, grid[1])


def _weights(places: NDArray[np.float64], cells: int) -> NDArray[np.float32]:
    """Return weights whose row i interpolates between the two cells around places[i]."""
    distance = np.abs(np.clip(places, 0, cells - 1)[:, None] - np.arange(cells))
    weights: NDArray[np.float32] = np.maximum(0, 1 - distance).astype(np.float32)
    return weights
