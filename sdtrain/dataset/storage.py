"""The storage of a dataset: its directory alone, or a prefix on S3 whose work folder that is."""

from __future__ import annotations

from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.local_storage import LocalStorage
from sdtrain.dataset.s3.mirror import mirror_of


def storage_of(dataset: DatasetDir) -> LocalStorage:
    """Where the files of a dataset lie."""
    return mirror_of(dataset) or LocalStorage(dataset)
