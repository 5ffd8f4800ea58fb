"""An LRU cache of processed images, one per data worker."""

from collections import OrderedDict

from vpt.data.transforms import ProcessedImage

ImageKey = tuple[str, str]  # root and reference of an image: the same key is the same pixels


class ImageCache:
    """Prepared images by view and reference, the least recently used dropped beyond `megabytes`."""

    def __init__(self, megabytes: int) -> None:
        self.limit, self.held = megabytes << 20, 0
        self._entries: OrderedDict[tuple[str, ImageKey], ProcessedImage] = OrderedDict()

    def get(self, view: str, key: ImageKey) -> ProcessedImage | None:
        look = self._entries.get((view, key))
        if look is not None:
            self._entries.move_to_end((view, key))
        return look

    def put(self, view: str, key: ImageKey, look: ProcessedImage) -> None:
        size = look.nbytes
        if size > self.limit:
            return
        before = self._entries.pop((view, key), None)
        self._entries[view, key] = look
        self.held += size - (before.nbytes if before is not None else 0)
        while self.held > self.limit:
            self.held -= self._entries.popitem(last=False)[1].nbytes
