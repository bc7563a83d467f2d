"""Stores a dataset's files on the local disk, and defines the interface of every storage."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

from sdtrain.dataset.layout import DatasetDir


class Closable(Protocol):
    """A lock, held until it is closed."""

    def close(self) -> None:
        """Releases it."""


class Stored(Protocol):
    """An output of a manifest entry."""

    sha256: str
    bytes: int


class LocalStorage:
    """The files of one dataset, all in its directory.

    A remote storage (`sdtrain.dataset.s3`) keeps copies in that directory: it fetches files before they are read, and a
    written file counts once it is stored remotely. Here most methods have nothing to do. `lock_token` is of the command
    that holds the dataset, for the processes that write for it; "" without one.
    """

    is_remote = False
    lock_token = ""

    def __init__(self, dataset: DatasetDir) -> None:
        self.dataset = dataset

    def lock(self, command: str) -> Closable | None:
        """Locks the dataset against other machines and syncs the manifest; UserError if another command holds it."""
        return None

    def active_command(self) -> str | None:
        """Describes the command, of any machine, that is changing the dataset now."""
        return None

    def sync(self, may_delete: bool = True) -> None:
        """Updates the local manifest; `may_delete` says that no command of this machine is about to record a shard."""

    def finish(self) -> None:
        """Called at the end of a command that held the lock and did not fail, when nobody writes for it any more."""

    def push(self, entry: Path, content: bytes, outputs: Mapping[str, Stored], beside: Iterable[Path] = ()) -> None:
        """Stores a finished shard before its manifest `entry` is written here, with that `content`.

        `outputs` are by name, under their final names; files `beside` belong to it but not to the manifest.
        """

    def push_files(self, paths: Iterable[Path]) -> None:
        """Stores files that no manifest entry lists."""

    def push_folder(self, folder: Path) -> None:
        """Mirrors a local folder, deleting remote files that it lacks."""

    def discard(self, path: Path) -> None:
        """Deletes a file if it exists."""
        path.unlink(missing_ok=True)

    def has(self, name: str, num_bytes: int) -> bool:
        """Whether a file of that size exists."""
        try:
            return os.stat(f"{self.dataset.root}/{name}").st_size == num_bytes  # noqa: PTH116 - asked of every file
        except (FileNotFoundError, NotADirectoryError):
            return False

    def has_copy(self, name: str, sha256: str) -> bool:
        """Whether a file with that content is also stored remotely now."""
        return False

    def pull(self, wanted: Mapping[str, Stored | None]) -> None:
        """Fetches missing files; each must have the content given, None for any."""

    def read_part(self, path: Path, offset: int, num_bytes: int) -> bytes:
        """Reads part of a file without fetching the whole.

        OSError if the file is missing, UserError if the store cannot be reached, or refuses.
        """
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(num_bytes)
