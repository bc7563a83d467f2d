"""Locks a dataset for one command that changes it, or for any number that read it."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import IO, Any

import psutil

from sdtrain.dataset.files import refuse_url
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.local_storage import Closable
from sdtrain.dataset.storage import storage_of
from sdtrain.errors import UserError

# Errors of file systems without locks: some network mounts, and FUSE.
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
_log = logging.getLogger(__name__)
_held: weakref.WeakSet[DatasetLock] = weakref.WeakSet()


class DatasetLock:
    """A lock on a dataset, until the block ends, it is closed or collected, or the process ends, even by kill -9.

    It is a kernel lock (flock), and for S3 also an object there (`sdtrain.dataset.s3.lock`), so a crash leaves nothing
    to clear. Only the process that runs a command takes it, not its threads, workers and other machines. `finish` is
    called at the end of a block that did not fail.
    """

    def __init__(self, file: IO[str] | None) -> None:
        self._file = file
        self.remote: Closable | None = None
        self.finish: Callable[[], None] = _nothing
        _held.add(self)

    def __enter__(self) -> DatasetLock:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.finish()
        finally:
            self.close()

    def close(self) -> None:
        """Releases the lock."""
        if self.remote is not None:
            self.remote.close()
        if self._file is not None:
            self._file.close()


def lock_to_change(dataset: DatasetDir, command: str) -> DatasetLock:
    """Locks a dataset, created if missing, for a command that writes; UserError if it is in use or read-only."""
    lock = lock_folder(dataset.root, dataset.lock, command)
    try:
        storage = storage_of(dataset)
        lock.remote, lock.finish = storage.lock(command), storage.finish
    except UserError:
        lock.close()
        raise
    return lock


def lock_folder(folder: Path, file_name: Path, command: str) -> DatasetLock:
    """Locks a folder, created if missing, for one writing process; the lock file stays there.

    UserError if it is in use, or cannot be written.
    """
    try:
        refuse_url(folder).mkdir(parents=True, exist_ok=True)
        file = file_name.open("a+")
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror}). Choose another --output.") from error
    if _is_locked(file, fcntl.LOCK_EX, folder, command):
        file.truncate(0)  # earlier holders have ended
        _sign(file, command)
    return DatasetLock(file)


def active_commands(dataset: DatasetDir) -> list[str]:
    """Describes each command that uses a dataset, as far as visible from here, without blocking any.

    Asks the store only if the dataset is named by its URL, not by its work folder.
    """
    users: list[str] = []
    with suppress(OSError), dataset.lock.open() as file:
        users += _users(file)
    elsewhere = storage_of(dataset).active_command() if dataset.url else None
    if elsewhere and not any(user.startswith(elsewhere.partition(", since ")[0]) for user in users):
        users.append(elsewhere)
    return users


def lock_to_read(dataset: DatasetDir, command: str) -> DatasetLock:
    """Locks a dataset for a command that only reads, beside other readers; on S3, other machines do not see it.

    UserError if it is being changed, or a removal was interrupted, so that its files are inconsistent.
    """
    file = _opened_to_read(dataset.lock)
    if file and _is_locked(file, fcntl.LOCK_SH, dataset.root, command) and file.writable():
        _sign(file, command)
    if dataset.removal.exists():
        raise UserError(
            f"Samples were being taken out of {dataset.root} when that was interrupted, so its files do not fit each "
            "other. Run the same `sdtrain remove` or `sdtrain build` first: it brings the removal to its end."
        )
    return DatasetLock(file)


def _opened_to_read(path: Path) -> IO[str] | None:
    """None for a read-only dataset without a lock file, which cannot be changed from here."""
    for mode in ("a+", "r"):
        with suppress(OSError):
            return path.open(mode)
    return None


def _is_locked(file: IO[str], kind: int, folder: Path, command: str) -> bool:
    """Whether the lock was acquired; False, with a logged warning, if the file system has none."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
        return True
    except BlockingIOError as error:
        users = list(_users(file)) or ["Another command uses it."]
        file.close()
        raise UserError(f"{folder} is in use: {' '.join(users)} Wait for the end, and run {command} again.") from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        _log.warning("The file system of %s has no locks: start nothing else that changes it.", folder)
        return False


def _sign(file: IO[str], command: str) -> None:
    now = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    signed = {"command": command, "pid": os.getpid(), "host": socket.gethostname(), "since": now}
    file.write(json.dumps(signed) + "\n")  # at the end, after any other signatures
    file.flush()


def _users(file: IO[str]) -> Iterator[str]:
    """Describes each signer that still runs, as far as visible from here."""
    file.seek(0)
    for line in dict.fromkeys(file):
        with suppress(ValueError, TypeError, KeyError):
            signed: dict[str, Any] = json.loads(line)
            if signed["host"] != socket.gethostname() or psutil.pid_exists(signed["pid"]):
                yield (
                    f"{signed['command']} is running (process {signed['pid']} on {signed['host']}, since "
                    f"{signed['since']})."
                )


def _nothing() -> None:
    """For a dataset whose storage has nothing to finish."""


def _forget_in_child() -> None:
    # A forked child inherits the lock, which must not outlive the parent.
    for lock in list(_held):
        lock.close()


os.register_at_fork(after_in_child=_forget_in_child)
