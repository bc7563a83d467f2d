"""The storage of a dataset: its directory alone, or a prefix on S3 whose work folder that is."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from sdtrain.dataset.files import publish
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.local_storage import LocalStorage
from sdtrain.dataset.s3.mirror import Mirror
from sdtrain.dataset.s3.url import MARKER, parse_url
from sdtrain.errors import UserError


def storage_of(dataset: DatasetDir) -> LocalStorage:
    """Where the files of a dataset lie."""
    url = dataset.url or _marked(dataset.root)
    return _mirror(dataset.root, url) if url else LocalStorage(dataset)


def _marked(root: Path) -> str:
    try:
        return (root / MARKER).read_text().strip()
    except OSError:
        return ""


@lru_cache(maxsize=8)
def _mirror(root: Path, url: str) -> Mirror:
    if _marked(root) not in ("", url):
        raise UserError(f"{root} is the work folder of {_marked(root)}, not of {url}. Choose another --work-dir.")
    root.mkdir(parents=True, exist_ok=True)
    if not _marked(root):
        with publish(root / MARKER) as temporary:
            temporary.write_text(url + "\n")
    return Mirror(DatasetDir(root, url), parse_url(url))
