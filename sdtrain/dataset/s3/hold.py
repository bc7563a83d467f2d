"""The processes and machines that work for the command which holds a dataset on S3.

They do not take the lock, but must not write for a holder that has lost it. So the holder's token goes with the work
that they get, and before each write they look whether the lock in the store still bears it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from sdtrain.dataset.s3.lock import LOCK_NAME
from sdtrain.dataset.s3.store import ObjectStore
from sdtrain.errors import UserError

_working_for: ContextVar[str] = ContextVar("working_for", default="")


@contextmanager
def working_for(token: str) -> Iterator[None]:
    """What is written within is written for the holder with this token."""
    before = _working_for.set(token)
    try:
        yield
    finally:
        _working_for.reset(before)


def check_hold(store: ObjectStore) -> None:
    """Must be asked before anything is written by a process that has not taken the lock itself.

    Raises:
        UserError: the command that this is done for does not hold the dataset any more.
    """
    token, held = _working_for.get(), store.read(LOCK_NAME)
    if not token or held is None or token.encode() not in held.content:
        raise UserError(
            f"{store.url}: the command that this work is for has ended, or another one has taken the dataset over. "
            "What was finished is kept; run the command again when nobody is at work."
        )
