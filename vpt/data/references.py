"""References that records hold: images, crops of images, and videos, by paths below the data root."""

import re
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from vpt.errors import DataError, shortened

_CROP = re.compile(r"^(?P<path>.*)_(?P<box>\d{1,9},\d{1,9},\d{1,9},\d{1,9})$", re.DOTALL)
_ADDRESS = re.compile(r"data:|[A-Za-z][A-Za-z0-9+.-]*:/")  # of something that is no file
Size = tuple[int, int]  # width and height in pixels
Pixels = tuple[int, int, int, int]
FRAME_RATES = 0.001, 1000  # the least and the most that a record may claim


@dataclass(frozen=True)
class ImageRef:
    """A path below the data root, and a crop (x0, y0, x1, y1) in pixels or None for the whole image.

    `transpose`, 0 to 7, is a way to flip and rotate a square, done before the crop (augmentation; 0 leaves it).
    `size` is that of the whole file, where the record says it: another file is refused when it is opened.
    """

    path: str
    crop: Pixels | None = None
    transpose: int = 0
    size: Size | None = field(default=None, compare=False)

    @classmethod
    def parse(cls, text: str) -> "ImageRef":
        """`a.jpg` or `a.jpg_x0,y0,x1,y1`."""
        match = _CROP.match(text)
        if match is None:
            return cls(text)
        x0, y0, x1, y1 = (int(number) for number in match["box"].split(","))
        return cls(match["path"], (x0, y0, x1, y1))

    @classmethod
    def read(cls, text: str, where: str) -> "ImageRef":
        """The reference that a record holds. Raises DataError for what is no path below the data root."""
        check_no_address(text, where)
        reference = cls.parse(text)
        path, quoted = PurePosixPath(reference.path), shortened(reference.path)
        if path.is_absolute() or ".." in path.parts:
            raise DataError(f"{where}: path {quoted} leaves data.root; give paths below data.root")
        check_text(reference.path, f"{where}: path {quoted}")
        return reference

    @property
    def frame(self) -> "ImageRef":
        """The image that actions encode or crop."""
        return self

    def as_json(self) -> str:
        """The reference as records spell it."""
        return f"{self.path}_{','.join(map(str, self.crop))}" if self.crop else self.path

    def __str__(self) -> str:
        size = f" of {self.size[0]}x{self.size[1]}" if self.size else ""
        return self.as_json() + (f" turned {self.transpose}" if self.transpose else "") + size


@dataclass(frozen=True)
class VideoRef:
    """Frames that follow each other `fps` times a second; or one video file, which knows its own rate (`fps` None)."""

    frames: tuple[ImageRef, ...]
    fps: float | None = None

    @classmethod
    def read(cls, value: Any, where: str) -> "VideoRef":
        """Read {"frames": [paths], "fps": number}, or a path. Raises DataError for anything else."""
        if isinstance(value, str):
            return cls((ImageRef.read(value, where),))
        if not isinstance(value, dict) or set(value) != {"frames", "fps"}:
            raise DataError(f'{where} must be {{"frames": [image paths], "fps": number}}, or a path to a video file')
        frames, fps = value["frames"], value["fps"]
        if not isinstance(frames, list) or not frames or not all(isinstance(path, str) for path in frames):
            raise DataError(f"{where}: `frames` must be a list of paths with at least one entry")
        low, high = FRAME_RATES
        if isinstance(fps, bool) or not isinstance(fps, int | float) or not low <= fps <= high:
            raise DataError(f"{where}: `fps` is {fps!r}; it must be the frames in a second, from {low} to {high}")
        return cls(tuple(ImageRef.read(path, where) for path in frames), float(fps))

    @property
    def frame(self) -> ImageRef:
        """The image that actions encode or crop: the middle frame (a video file opened as an image is that)."""
        return self.frames[len(self.frames) // 2]

    def as_json(self) -> str | dict[str, Any]:
        """The reference as records spell it."""
        if self.fps is None:
            return self.frames[0].path
        return {"frames": [frame.as_json() for frame in self.frames], "fps": self.fps}

    def __str__(self) -> str:
        return f"video {self.as_json()}"


def check_no_address(text: str, where: str) -> None:
    """Raise DataError for a URL or a `data:` URI where the path of an image belongs."""
    if _ADDRESS.match(text):
        found = f"{where}: {shortened(text)}"
        raise DataError(f"{found}: images are files, in records below data.root; save it, and give its path")


def check_text(text: str, what: str) -> None:
    r"""Raise DataError for text that cannot be written: half of a pair of surrogates, as JSON's \ud800 spells it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{what} holds half a character at {error.start}, no Unicode text; write it again") from None


Reference = ImageRef | VideoRef
