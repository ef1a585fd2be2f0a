"""A window of a video's frames, which a decoder is asked for."""

from __future__ import annotations

from dataclasses import dataclass

from dali_pipelines.types import Video


@dataclass(frozen=True)
class Window:
    """A file and the frame numbers wanted from it, ascending."""

    file: str
    video: Video
    frames: tuple[int, ...]

    @property
    def frames_passed(self) -> int:
        """Number of frames a decoder goes through, from the keyframe before the window to the window's end."""
        return self.frames[-1] + 1 - max(key for key in self.video.keyframes if key <= self.frames[0])
