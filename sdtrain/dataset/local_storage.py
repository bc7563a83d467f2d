"""A dataset's files on the local disk, and the interface that every storage has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

from sdtrain.dataset.layout import DatasetDir


class Closable(Protocol):
    """A lock that is held until it is closed."""

    def close(self) -> None:
        """Releases it."""


class Stored(Protocol):
    """An output of a manifest entry."""

    sha256: str
    bytes: int


class LocalStorage:
    """The files of one dataset, all of which lie in its directory.

    A storage elsewhere (`sdtrain.dataset.s3`) keeps copies in that directory: files are fetched before they are read,
    and what is written counts once it is there. Here most of that is nothing to do.

    Attributes:
        dataset: the directory.
        is_remote: whether files may be elsewhere.
        lock_token: of the command that holds the dataset, for the processes that write for it; "" without one.
    """

    is_remote = False
    lock_token = ""

    def __init__(self, dataset: DatasetDir) -> None:
        self.dataset = dataset

    def lock(self, command: str) -> Closable | None:
        """Locks the dataset against commands of other machines, and updates the record of what is finished.

        Raises:
            UserError: another command holds it.
        """
        return None

    def active_command(self) -> str | None:
        """A sentence about the command of any machine that changes the dataset now."""
        return None

    def sync(self, may_delete: bool = True) -> None:
        """Updates the record of what is finished.

        Args:
            may_delete: no command of this machine is about to record something.
        """

    def push(self, entry: Path, content: bytes, outputs: Mapping[str, Stored], beside: Iterable[Path] = ()) -> None:
        """Makes a shard count as finished, before its manifest entry is written here.

        Args:
            entry: the path that its manifest entry will have here.
            content: of the entry.
            outputs: by name, what it consists of; they have their final names here.
            beside: files that belong to it and are not in the manifest.
        """

    def push_files(self, paths: Iterable[Path]) -> None:
        """Stores files that no manifest entry lists."""

    def push_folder(self, folder: Path) -> None:
        """Stores a folder as it is here: what is not here is deleted there."""

    def discard(self, path: Path) -> None:
        """Deletes a file, if it is there."""
        path.unlink(missing_ok=True)

    def has(self, name: str, num_bytes: int) -> bool:
        """Whether a file of that size is there."""
        path = self.dataset.root / name
        return path.exists() and path.stat().st_size == num_bytes

    def has_copy(self, name: str, sha256: str) -> bool:
        """Whether a file is also elsewhere just now, with that content."""
        return False

    def pull(self, wanted: Mapping[str, Stored | None]) -> None:
        """Fetches files that are not here; of each, what its content must be, None for whatever is there."""

    def read_part(self, path: Path, offset: int, num_bytes: int) -> bytes:
        """A part of a file, which is not brought here for that.

        Raises:
            OSError: it is not there.
            UserError: the store cannot be reached, or refuses.
        """
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(num_bytes)
