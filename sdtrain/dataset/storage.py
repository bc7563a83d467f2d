"""Picks a dataset's storage: its local directory, or a prefix on S3 mirrored there."""

from __future__ import annotations

from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.local_storage import LocalStorage
from sdtrain.dataset.s3.mirror import mirror_of


def storage_of(dataset: DatasetDir) -> LocalStorage:
    """The storage of a dataset's files."""
    return mirror_of(dataset) or LocalStorage(dataset)
