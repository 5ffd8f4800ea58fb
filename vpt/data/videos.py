"""Videos: which frames are sampled, and reading them out of files (PyAV, an extra)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from vpt.errors import DataError

# Opened as an image, a file with one of these endings is its middle frame.
SUFFIXES = frozenset(
    {".3gp", ".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv", ".ts", ".webm", ".wmv"}
)


@dataclass(frozen=True)
class VideoClip:
    """Frames of one size, `fps` of them a second; `times` has the second at which each stands in its video."""

    frames: list[Image.Image]
    fps: float
    times: Sequence[float] = ()


@dataclass(frozen=True)
class FrameSampling:
    """How densely videos are sampled: about `fps` frames a second, evenly spread, `max_frames` at most."""

    fps: float = 2.0
    max_frames: int = 16

    def frame_indices(self, total: int, rate: float) -> tuple[list[int], float]:
        """Numbers of the sampled frames, and how many of those come in a second.

        Args:
            total: frames of the video.
            rate: its frames in a second.
        """
        wanted = max(round(total * self.fps / rate), 1)
        count = min(wanted, total, self.max_frames)
        return [number * total // count for number in range(count)], rate * count / total


MIDDLE, ALL = "middle", "all"


def chosen_frames(clip: VideoClip, frames: str) -> VideoClip:
    """All frames of a clip, or as many as `frames` says: each the middle of one of so many equal parts."""
    total = len(clip.frames)
    count = total if frames == ALL else min(int(frames), total)
    numbers = [(2 * number + 1) * total // (2 * count) for number in range(count)]
    times = [clip.times[number] for number in numbers] if clip.times else ()
    return VideoClip([clip.frames[number] for number in numbers], clip.fps * count / total, times)


class VideoFile:
    """A video file: how many frames it has, at which rate, and any of them."""

    def __init__(self, path: Path, *, where: str, max_pixels: int, upright: bool = False) -> None:
        """Raises DataError, with `where` and the path, for whatever is no readable video.

        `upright`: turn frames as the file's display matrix says, as players do.
        """
        self.path, self.where, self.upright = path, where, upright
        with self._opened() as (container, stream):
            if not 0 < stream.width * stream.height <= max_pixels:
                raise DataError(
                    f"{where}: {path} has {stream.width}x{stream.height} pixels, allowed are 1 to {max_pixels}"
                )
            self.rate = float(stream.average_rate or stream.guessed_rate or 0)
            self.total = stream.frames or sum(1 for _ in container.decode(stream))  # not every container has a count
        if not self.total or not self.rate:
            raise DataError(f"{where}: video {path} has {self.total} frames at {self.rate} fps; encode it again")

    def frames(self, numbers: Sequence[int]) -> list[Image.Image]:
        """The frames with these numbers, in order."""
        wanted, found = set(numbers), {}
        with self._opened() as (container, stream):
            for number, frame in enumerate(container.decode(stream)):
                if number in wanted:
                    image = frame.to_image()
                    found[number] = image.rotate(frame.rotation, expand=True) if self.upright else image
                if len(found) == len(wanted):
                    break
        if len(found) < len(wanted):
            raise DataError(f"{self.where}: video {self.path} ends before frame {max(wanted)}; encode it again")
        return [found[number] for number in numbers]

    def middle_frame(self) -> Image.Image:
        """The frame halfway through."""
        return self.frames([self.total // 2])[0]

    @contextmanager
    def _opened(self) -> Iterator[tuple[Any, Any]]:
        """PyAV's container and its first video stream."""
        try:
            import av
        except ImportError:
            raise DataError(
                f"{self.where}: reading {self.path} needs PyAV; type: pip install av (or list the video's frames)"
            ) from None
        try:
            with av.open(str(self.path)) as container:
                yield container, container.streams.video[0]
        except FileNotFoundError:
            raise DataError(f"{self.where}: video {self.path} does not exist; is data.root right?") from None
        except (av.FFmpegError, IndexError, OSError, ValueError) as error:
            reason = "it holds no video" if isinstance(error, IndexError) else error
            raise DataError(
                f"{self.where}: video {self.path} cannot be read ({reason}); replace the file, or leave it out"
            ) from None
