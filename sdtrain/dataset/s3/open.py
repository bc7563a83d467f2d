"""From what a user names, a directory or s3://…, to a dataset that can be read here."""

from __future__ import annotations

import fcntl
from contextlib import closing
from functools import lru_cache
from pathlib import Path

from sdtrain.dataset.files import refuse_url
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.s3.lock import holder
from sdtrain.dataset.s3.mirror import mirror_of
from sdtrain.dataset.s3.url import is_s3, parse_url, work_folder
from sdtrain.errors import UserError


def dataset_at(url: str, work_dir: Path | None = None) -> DatasetDir:
    """The dataset at a URL, with its work folder; nothing is read yet.

    Raises:
        UserError: the URL names no place, or holds a secret.
    """
    place = parse_url(url)
    return DatasetDir(work_folder(place, work_dir), str(place))


def open_dataset(name: str) -> DatasetDir:
    """A dataset as its user names it; of one on S3, the record of what is finished is brought here.

    Raises:
        UserError: the store cannot be reached, or refuses.
    """
    if not is_s3(name):
        return DatasetDir(refuse_url(Path(name)).absolute())
    dataset = dataset_at(name)
    mirror = mirror_of(dataset)
    if mirror:
        mirror.sync(may_delete=_nobody_writes(dataset))
    return dataset


def open_to_ask(name: str, command: str) -> DatasetDir:
    """A dataset as its user names it; of one on S3, the tables of all stages are brought here.

    Args:
        name: a directory, or s3://…
        command: that asks, such as "sdtrain search".

    Raises:
        UserError: the dataset is being changed, or cannot be read.
    """
    from sdtrain.dataset.s3.sync import fetch_tables

    dataset = open_dataset(name)
    if dataset.url:
        _refuse_while_held(dataset, f"run {command} again")
        fetch_tables(dataset)
    return dataset


@lru_cache(maxsize=64)
def training_root(name: str, online_vae: bool = False) -> Path:
    """The directory to train from: of a dataset on S3 its work folder, with the tables; tars come when first needed.

    The store is asked once in a process: each rank names its datasets twice, and a list of a large one takes long.

    Args:
        name: a directory, or s3://…
        online_vae: packed images are read, and no latents.

    Raises:
        UserError: the dataset is being changed, or cannot be read.
    """
    if not is_s3(name):
        return refuse_url(Path(name))
    from sdtrain.dataset.s3.sync import fetch_outputs

    dataset = open_dataset(name)
    _refuse_while_held(dataset, "start the training again")
    fetch_outputs(dataset, "pack" if online_vae else "encode", tars=False)
    return dataset.root


def _refuse_while_held(dataset: DatasetDir, again: str) -> None:
    mirror = mirror_of(dataset)
    if mirror and (said := holder(mirror.store)):
        raise UserError(f"{dataset} is in use: {said} Wait for the end, and {again}.")


def _nobody_writes(dataset: DatasetDir) -> bool:
    """Whether no command of this machine changes the dataset."""
    dataset.root.mkdir(parents=True, exist_ok=True)
    with closing(dataset.lock.open("a")) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return False
    return True
