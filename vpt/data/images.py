"""Opening images and videos: below one root, cropped, limited in size, with errors that name the record."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from vpt.data.references import ImageRef, VideoRef
from vpt.data.transforms import RESAMPLING
from vpt.data.videos import SUFFIXES, FrameSampling, VideoClip, VideoFile
from vpt.errors import DataError

# Formats that images may have. Pillow knows more, among them PostScript, which it has another program run.
Image.init()
FORMATS = {"AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP"} & Image.OPEN.keys()
FLATTEST = 200  # times as long as wide: what Qwen's image processor still takes


@dataclass(frozen=True)
class MediaStore:
    """Images below `root`.

    Attributes:
        max_side: longer sides are resized to it, after the crop; crops are cut at full resolution.
        resample: `nearest` (upstream), `bilinear`, `bicubic` or `lanczos`.
        max_pixels: larger files are refused before they are decoded.
        sampling: which frames of a video are taken.
        render: makes the images instead of reading files, for a source that has none.
        apply_exif_rotation: turn images as their EXIF data say, as viewers show them. Boxes and crops of public data
            sets count in pixels as they are stored.
    """

    root: Path
    max_side: int = 512
    resample: str = "nearest"
    max_pixels: int = 100_000_000
    sampling: FrameSampling = field(default_factory=FrameSampling)
    render: Callable[[str], Image.Image] | None = None
    apply_exif_rotation: bool = False

    def image(self, reference: ImageRef, *, where: str) -> Image.Image:
        """The RGB image. Raises DataError with `where`, the path, and what to do."""
        return self.resize(self.full_resolution(reference, where=where))

    def full_resolution(self, reference: ImageRef, *, where: str) -> Image.Image:
        """The image at full resolution, which regions are cut out of."""
        return crop(self.original(reference, where=where), reference.crop, where=f"{where}: {reference.path}")

    def original(self, reference: ImageRef, *, where: str) -> Image.Image:
        """The whole file at full resolution, before any crop; of a video file, its middle frame."""
        if self.render is not None:
            return transposed(self.render(reference.path), reference.transpose)
        path = self.path(reference, where)
        if path.suffix.lower() in SUFFIXES:
            return transposed(
                VideoFile(path, where=where, max_pixels=self.max_pixels).middle_frame(), reference.transpose
            )
        try:
            with Image.open(path, formats=[*FORMATS]) as image:
                width, height = image.size
                if width * height > self.max_pixels or not width * height:
                    raise DataError(
                        f"{where}: {path} has {width}x{height} pixels, allowed are 1 to {self.max_pixels}; replace it, "
                        "or raise data.image.max_file_pixels"
                    )
                return transposed(
                    to_rgb(ImageOps.exif_transpose(image) if self.apply_exif_rotation else image), reference.transpose
                )
        except DataError:
            raise
        except Exception as error:  # decoders of broken files raise whatever comes to them
            raise DataError(
                f"{where}: image {path} cannot be read ({error}); replace the file, or leave it out"
            ) from None

    def video(self, reference: VideoRef, *, where: str) -> VideoClip:
        """The sampled frames, limited in size, all of them as large as the first. Raises DataError as `image` does."""
        if reference.fps is None:
            file = VideoFile(self.path(reference.frames[0], where), where=where, max_pixels=self.max_pixels)
            numbers, fps = self.sampling.frame_indices(file.total, file.rate)
            frames = [self.resize(frame) for frame in file.frames(numbers)]
        else:
            numbers, fps = self.sampling.frame_indices(len(reference.frames), reference.fps)
            frames = [self.image(reference.frames[number], where=where) for number in numbers]
        first = frames[0].size
        return VideoClip([f if f.size == first else f.resize(first, RESAMPLING["bicubic"]) for f in frames], fps)

    def path(self, reference: ImageRef, where: str) -> Path:
        """The file. Raises DataError where there is none, or where it lies outside the root."""
        path = self.root / reference.path
        try:
            inside, found = path.resolve().is_relative_to(self.root.resolve()), path.is_file()
        except (OSError, RuntimeError, ValueError) as error:  # a name too long, links in a circle, a NUL
            raise DataError(
                f"{where}: {str(path)!r} is no path of a file ({error}); mend or remove the record"
            ) from None
        if not inside:
            raise DataError(f"{where}: {path} is a link that leaves {self.root}; copy the file below data.root")
        if not found:
            raise DataError(f"{where}: file {path} does not exist; is data.root={self.root} right?")
        return path

    def resize(self, image: Image.Image) -> Image.Image:
        """The image with its long side at most `max_side`, its short side at least a `FLATTEST`-th of that."""
        longest = min(max(image.size), self.max_side)
        scale = longest / max(image.size)
        width, height = (max(round(extent * scale), math.ceil(longest / FLATTEST)) for extent in image.size)
        return image if (width, height) == image.size else image.resize((width, height), RESAMPLING[self.resample])


def to_rgb(image: Image.Image) -> Image.Image:
    """The first frame as RGB: what is transparent becomes white, as Qwen has it, and 16 bits of grey become 8."""
    if image.mode.startswith("I;16"):
        wide = np.asarray(image).astype(np.uint16)  # of either byte order
        return Image.fromarray((wide >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"numbers of mode {image.mode} have no known range; store 8 or 16 bits")
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


_TURNS = (None, *Image.Transpose)


def transposed(image: Image.Image, turn: int) -> Image.Image:
    """The image in one of its eight flips and rotations; 0 is as it is."""
    way = _TURNS[turn]
    return image if way is None else image.transpose(way)


def crop(image: Image.Image, box: tuple[int, int, int, int] | None, *, where: str) -> Image.Image:
    """Cut `box` out of `image`. Raises DataError where it leaves the image or is empty."""
    if box is None:
        return image
    x0, y0, x1, y1 = box
    width, height = image.size
    if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
        raise DataError(
            f"{where}: crop {','.join(map(str, box))} does not lie inside the image of {width}x{height} pixels "
            "(x0,y0,x1,y1 with x0 < x1 and y0 < y1)"
        )
    return image.crop(box)
