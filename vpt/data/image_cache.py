"""An LRU cache of processed images, one per data worker or server."""

from collections import OrderedDict
from threading import Lock

from vpt.data.transforms import ProcessedImage

ImageKey = tuple[str, str]  # root and reference of an image: the same key is the same pixels


class ImageCache:
    """Processed images by transform and reference, the least recently used dropped beyond `megabytes`. Threads may
    share it.
    """

    def __init__(self, megabytes: int) -> None:
        self.limit, self.held = megabytes << 20, 0
        self._entries: OrderedDict[tuple[str, ImageKey], ProcessedImage] = OrderedDict()
        self._lock = Lock()

    def __reduce__(self) -> tuple[type["ImageCache"], tuple[int]]:
        """A copy, as of a data worker, is empty."""
        return ImageCache, (self.limit >> 20,)

    def get(self, transform: str, key: ImageKey) -> ProcessedImage | None:
        with self._lock:
            image = self._entries.get((transform, key))
            if image is not None:
                self._entries.move_to_end((transform, key))
            return image

    def put(self, transform: str, key: ImageKey, image: ProcessedImage) -> None:
        if image.nbytes > self.limit:
            return
        with self._lock:
            before = self._entries.pop((transform, key), None)
            self._entries[transform, key] = image
            self.held += image.nbytes - (before.nbytes if before is not None else 0)
            while self.held > self.limit:
                self.held -= self._entries.popitem(last=False)[1].nbytes
