"""The processes and machines that work for the command which holds a dataset on S3.

They do not take the lock, but must not write for a holder that has lost it. So the holder leaves its token in the work
folder, which they share; a batch remembers the token that it began under, and looks before each write whether the lock
in the store still bears it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from sdtrain.data.files import publish
from sdtrain.data.remote.lock import LOCK_NAME
from sdtrain.data.remote.store import ObjectStore
from sdtrain.errors import UserError

_FILE = ".s3-hold"
_working_for: ContextVar[str] = ContextVar("working_for", default="")


def leave_token(folder: Path, token: str) -> None:
    """Tells those who share a work folder who holds its dataset."""
    with publish(folder / _FILE) as temporary:
        temporary.write_text(token)


@contextmanager
def working_for_holder(folder: Path) -> Iterator[None]:
    """What is written within is written for the command that holds the dataset as this begins."""
    before = _working_for.set(_read(folder))
    try:
        yield
    finally:
        _working_for.reset(before)


def check_hold(store: ObjectStore, folder: Path) -> None:
    """Must be asked before anything is written by a process that has not taken the lock itself.

    Raises:
        UserError: the command that this is done for does not hold the dataset any more.
    """
    token, held = _working_for.get() or _read(folder), store.read(LOCK_NAME)
    if not token or held is None or token.encode() not in held.content:
        raise UserError(
            f"{store.url}: the command that this work is for has ended, or another one has taken the dataset over. "
            "What was finished is kept; run the command again when nobody is at work."
        )


def _read(folder: Path) -> str:
    try:
        return (folder / _FILE).read_text()
    except FileNotFoundError:
        return ""
