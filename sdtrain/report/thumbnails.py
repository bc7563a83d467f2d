"""Small copies of downloaded images."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.s3.files import read_part
from sdtrain.images.decode import decode_rgb

THUMBNAIL_PX = 160


class Thumbnails:
    """Makes the thumbnails of a report; an image that is shown twice is made once.

    Args:
        dataset: where the images are.
        folder: where the thumbnails go.
    """

    def __init__(self, dataset: DatasetDir, folder: Path) -> None:
        self._dataset, self._folder = dataset, folder

    def make(self, key: str, shard: int, offset: int | None, num_bytes: int | None) -> Path | None:
        """The thumbnail of one downloaded image; None if it was never fetched or is damaged."""
        path = self._folder / f"{key}.jpg"
        if path.exists():
            return path
        if offset is None or num_bytes is None:
            return None
        try:
            content = read_part(self._dataset, self._dataset.images_tar(shard), offset, num_bytes)
            return save_thumbnail(decode_rgb(content), path)
        except OSError:
            return None


def save_thumbnail(image: Image.Image, path: Path) -> Path:
    """Writes an image, made small, as JPEG."""
    image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    image.save(path, quality=85)
    return path
