"""Opens the dataset that a user names: a directory or a URL on S3."""

from __future__ import annotations

import fcntl
from contextlib import closing
from functools import lru_cache
from pathlib import Path

from sdtrain.dataset.files import refuse_url
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.s3.url import is_s3, parse_url, work_folder
from sdtrain.dataset.storage import storage_of
from sdtrain.dataset.sync import fetch_outputs, fetch_tables
from sdtrain.errors import UserError


def dataset_at(name: str, work_dir: Path | None = None) -> DatasetDir:
    """A dataset by its name, a directory or s3://…, without reading anything.

    `work_dir` is the parent of S3 datasets' work folders. UserError if the URL is incomplete, or holds a secret.
    """
    if not is_s3(name):
        return DatasetDir(refuse_url(Path(name)).absolute())
    url = parse_url(name)
    return DatasetDir(work_folder(url, work_dir), str(url))


def open_dataset(name: str) -> DatasetDir:
    """A dataset by its name, with its manifest synced; UserError if the store cannot be reached, or refuses."""
    dataset = dataset_at(name)
    if dataset.url:
        storage_of(dataset).sync(may_delete=_nobody_writes(dataset))
    return dataset


def open_to_ask(name: str, command: str) -> DatasetDir:
    """A dataset by its name, a directory or s3://…, with the tables of all stages fetched.

    `command` is the reader's name, such as "sdtrain search". UserError if the dataset is being changed, or unreadable.
    """
    dataset = open_dataset(name)
    if dataset.url:
        _refuse_while_changed(dataset, f"run {command} again")
        fetch_tables(dataset)
    return dataset


@lru_cache(maxsize=64)
def training_root(name: str, online_vae: bool = False) -> Path:
    """The directory to train from; on S3, the work folder with its tables, while tars follow when first needed.

    With `online_vae`, packed images are read instead of latents. A process asks the store only once: each rank opens
    its datasets twice, and listing a large one takes long. UserError if the dataset is being changed, or unreadable.
    """
    if not is_s3(name):
        return refuse_url(Path(name))
    dataset = open_dataset(name)
    _refuse_while_changed(dataset, "start the training again")
    fetch_outputs(dataset, "pack" if online_vae else "encode", tars=False)
    return dataset.root


def _refuse_while_changed(dataset: DatasetDir, again: str) -> None:
    if command := storage_of(dataset).active_command():
        raise UserError(f"{dataset} is in use: {command} Wait for the end, and {again}.")


def _nobody_writes(dataset: DatasetDir) -> bool:
    dataset.root.mkdir(parents=True, exist_ok=True)
    with closing(dataset.lock.open("a")) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return False
    return True
