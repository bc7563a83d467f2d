"""Whether the box is up: a lock of the kernel's, which a supervisor holds as long as it lives."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

from infra.box.layout import BoxDir
from sdtrain.errors import UserError


@contextmanager
def hold(place: BoxDir) -> Iterator[IO[str]]:
    """Takes the box's lock, which the kernel gives back when this process ends, however that happens.

    Raises:
        UserError: another process has it.
    """
    with place.lock.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"The box in {place.root} is already up. `make down` ends it.") from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield file


def holder(place: BoxDir) -> int | None:
    """The running supervisor's process id; None if the box is down."""
    if not place.lock.exists():
        return None
    with place.lock.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return int(file.read() or 0) or None
    return None
