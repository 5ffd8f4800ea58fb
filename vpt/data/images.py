"""Opening images and videos: below one root, cropped, limited in size, with errors that name the record."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

from vpt.data.crops import clip_to_image
from vpt.data.references import ImageRef, Reference, Size, VideoRef
from vpt.data.stored_files import StoredFile, find_stored
from vpt.data.transforms import RESAMPLING
from vpt.data.videos import SUFFIXES, FrameSampling, VideoClip, VideoFile
from vpt.errors import DataError, shortened

# Formats that images may have. Pillow knows more, among them PostScript, which it has another program run.
Image.init()
FORMATS = {"AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP"} & Image.OPEN.keys()
# Pillow's own limit, which warns at one number of pixels and refuses at another, makes way for MediaStore.max_pixels.
Image.MAX_IMAGE_PIXELS = None
MAX_ASPECT_RATIO = 200  # times as long as wide: what Qwen's image processor still takes
# What the upstream code makes of images beyond MAX_ASPECT_RATIO, and of sides that are shorter
UPSTREAM_ASPECT_RATIO, UPSTREAM_MIN_SIDE = 180, 28


@dataclass(frozen=True)
class MediaStore:
    """Images below `root`.

    Attributes:
        max_side: longer sides are resized to it; crops are cut at full resolution, and limited after that.
        crop_max_side: likewise of crops; None: as `max_side`.
        resample: `nearest` (upstream), `bilinear`, `bicubic` or `lanczos`.
        sizing: `rounded`, or `upstream` for the sizes that the upstream code comes to.
        max_pixels: larger files are refused before they are decoded.
        sampling: which frames of a video are taken.
        render: makes the images instead of reading files, for a source that has none.
        apply_exif_rotation: turn images as their EXIF data say, as viewers show them, and videos as theirs do. Boxes
            and crops of public data sets count in pixels as they are stored.
    """

    root: Path
    max_side: int = 512
    resample: str = "nearest"
    max_pixels: int = 100_000_000
    sampling: FrameSampling = field(default_factory=FrameSampling)
    render: Callable[[str], Image.Image] | None = None
    apply_exif_rotation: bool = False
    sizing: str = "rounded"
    crop_max_side: int | None = None

    def image(self, reference: ImageRef, *, where: str) -> Image.Image:
        """The RGB image. Raises DataError with `where`, the path, and what to do."""
        return self.resize(self.full_resolution(reference, where=where), crop=reference.crop is not None)

    def full_resolution(self, reference: ImageRef, *, where: str) -> Image.Image:
        """The image at full resolution, which regions are cut out of."""
        image = self.original(reference, where=where)
        if reference.crop is None:
            return image
        return image.crop(clip_to_image(reference.crop, image.size, where=f"{where}: {reference.path}: crop"))

    def original(self, reference: ImageRef, *, where: str) -> Image.Image:
        """The whole file at full resolution, before any crop; of a video file, its middle frame."""
        image = self._whole(reference, where)
        check_size(image.size, reference, where=where)
        return transposed(image, reference.transpose)

    def size(self, reference: ImageRef, *, where: str) -> Size:
        """Width and height of the whole file, which is not decoded for it unless it is a video."""
        if self.render is not None or Path(reference.path).suffix.lower() in SUFFIXES:
            return self._whole(reference, where).size
        file = self.file(reference, where)
        with reading(file, where), Image.open(file.opened(), formats=[*FORMATS]) as image:
            self._check_pixels(image, f"{where}: image {file}")
            sideways = self.apply_exif_rotation and image.getexif().get(ExifTags.Base.Orientation, 1) in range(5, 9)
            size = image.size[::-1] if sideways else image.size
        check_size(size, reference, where=where)
        return size

    def check(self, reference: Reference, *, where: str) -> None:
        """Raise DataError for an image or video that cannot be used, as far as its file shows without being decoded."""
        if isinstance(reference, VideoRef) and reference.fps is not None:
            for frame in reference.frames:
                self.check(frame, where=where)
        elif self.render is None:
            image = reference.frame
            file = self.file(image, where)
            if isinstance(reference, VideoRef) or file.suffix in SUFFIXES:
                self._video_file(file, where)
                return
            size = self.size(image, where=where)
            if image.crop is not None:
                clip_to_image(image.crop, size, where=f"{where}: {image.path}: crop")
            if _may_be_cut(file):
                self.open(file, where=where)

    def _whole(self, reference: ImageRef, where: str) -> Image.Image:
        if self.render is not None:
            return self.render(reference.path)
        return self.open(self.file(reference, where), where=where)

    def open(self, file: StoredFile, *, where: str) -> Image.Image:
        """An image file, or the middle frame of a video file, in RGB. Raises DataError for whatever is neither."""
        if file.suffix in SUFFIXES:
            return self._video_file(file, where).middle_frame()
        with reading(file, where), Image.open(file.opened(), formats=[*FORMATS]) as image:
            return self.decode(image, f"{where}: image {file}")

    def decode(self, image: Image.Image, name: str) -> Image.Image:
        """An image of any mode, decoded or not, in RGB, turned by its EXIF data where that is asked for."""
        self._check_pixels(image, name)
        return to_rgb(ImageOps.exif_transpose(image) if self.apply_exif_rotation else image)

    def _check_pixels(self, image: Image.Image, name: str) -> None:
        width, height = image.size
        if not 0 < width * height <= self.max_pixels:
            raise DataError(
                f"{name} has {width}x{height} pixels, allowed are 1 to {self.max_pixels}; replace it, or raise "
                "data.image.max_file_pixels"
            )

    def _video_file(self, file: StoredFile, where: str) -> VideoFile:
        if file.member:
            raise DataError(f"{where}: {file} is a video, which is read from a file of its own alone; unpack it")
        return VideoFile(file.path, where=where, max_pixels=self.max_pixels, upright=self.apply_exif_rotation)

    def video(self, reference: VideoRef, *, where: str) -> VideoClip:
        """The sampled frames, limited in size, all of them as large as the first. Raises DataError as `image` does."""
        if reference.fps is None:
            file = self._video_file(self.file(reference.frames[0], where), where)
            rate = file.rate
            numbers, fps = self.sampling.frame_indices(file.total, rate)
            frames = [self.resize(frame) for frame in file.frames(numbers)]
        else:
            rate = reference.fps
            numbers, fps = self.sampling.frame_indices(len(reference.frames), rate)
            frames = [self.image(reference.frames[number], where=where) for number in numbers]
        first = frames[0].size
        frames = [f if f.size == first else f.resize(first, RESAMPLING["bicubic"]) for f in frames]
        return VideoClip(frames, fps, [number / rate for number in numbers])

    def file(self, reference: ImageRef, where: str) -> StoredFile:
        """The file. Raises DataError where there is none, or where it lies outside the root."""
        path = self.root / reference.path
        try:
            inside, file = path.resolve().is_relative_to(self.root.resolve()), find_stored(path)
        except (OSError, RuntimeError, ValueError) as error:  # a name too long, links in a circle, a NUL
            why = (isinstance(error, OSError) and error.strerror) or error
            raise DataError(
                f"{where}: {shortened(str(path))} is no path of a file ({why}); mend or remove the record"
            ) from None
        if not inside:
            raise DataError(f"{where}: {path} is a link that leaves {self.root}; copy the file below data.root")
        if file is None:
            raise DataError(f"{where}: file {path} does not exist; is data.root={self.root} right?")
        return file

    def resize(self, image: Image.Image, *, crop: bool = False) -> Image.Image:
        """An image, or a `crop`, with its long side limited, and not too narrow for Qwen's image processor."""
        most = self.crop_max_side if crop and self.crop_max_side is not None else self.max_side
        if self.sizing == "upstream":
            return self._resize_as_upstream(image, most)
        longest = min(max(image.size), most)
        scale = longest / max(image.size)
        width, height = (max(round(extent * scale), math.ceil(longest / MAX_ASPECT_RATIO)) for extent in image.size)
        return image if (width, height) == image.size else image.resize((width, height), RESAMPLING[self.resample])

    def _resize_as_upstream(self, image: Image.Image, most: int) -> Image.Image:
        """Limited by cutting both sides to whole pixels; then sides below 28 and too flat ratios raised by nearest."""
        if max(image.size) > most:
            scale = most / max(image.size)  # a factor, whose product may be a hair below a whole number
            width, height = (max(int(extent * scale), 1) for extent in image.size)
            image = image.resize((width, height), RESAMPLING[self.resample])
        width, height = (max(extent, UPSTREAM_MIN_SIDE) for extent in image.size)
        image = image.resize((width, height), Image.Resampling.NEAREST)
        limited = [
            other * UPSTREAM_ASPECT_RATIO if own / other > MAX_ASPECT_RATIO else own
            for own, other in ((width, height), (height, width))
        ]
        return image.resize((limited[0], limited[1]), Image.Resampling.NEAREST)


@contextmanager
def reading(name: object, where: str) -> Iterator[None]:
    """Make a DataError about the image `name` of whatever is raised while it is read."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # decoders of broken files raise whatever comes to them
        raise DataError(f"{where}: image {name} cannot be read ({error}); replace the file, or leave it out") from None


def check_size(size: Size, reference: ImageRef, *, where: str) -> None:
    """Raise DataError where a file is not as large as the record that names it says."""
    if reference.size not in (None, size):
        (width, height), (own_width, own_height) = reference.size or size, size
        raise DataError(
            f"{where}: {reference.path} has {own_width}x{own_height} pixels, its record was made for {width}x{height}; "
            "bring the image of that size, or convert the record again (vpt convert --images)"
        )


def _may_be_cut(file: StoredFile) -> bool:
    """Whether a JPEG or PNG does not end as such files do: it is then likely, but not sure, to be half a file."""
    head, tail = file.ends()
    return (head[:2] == b"\xff\xd8" and b"\xff\xd9" not in tail) or (head == b"\x89PNG" and b"IEND" not in tail)


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
