"""Lets one command at a time, on any machine, change a dataset on S3: an object is the lock, and a pulse keeps it.

It is created on the condition that there is none (`If-None-Match: *`) and renewed on the condition that it is still
ours (`If-Match`). A killed holder stops renewing: after EXPIRY_S, by the store's clock alone, the next command takes
over, on the condition that the lock is still the expired one, so that only one command wins. A holder that slept longer
than that (a suspended laptop) finds the lock changed and ends before it writes more. Between its last check of the lock
and the end of an upload then under way, it may still replace an object.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from datetime import datetime
from threading import Event, Thread

from sdtrain.dataset.s3.store import ConflictError, ObjectStore, Read
from sdtrain.errors import UserError

LOCK_NAME = "dataset.lock"
EXPIRY_S = float(os.environ.get("SDTRAIN_LOCK_EXPIRY_S", "120"))
_log = logging.getLogger(__name__)
_token: ContextVar[str] = ContextVar("lock_token", default="")


class RemoteLock:
    """A lock on a dataset on S3, with a unique `token`, until it is closed or its pulse ends.

    UserError if another command holds it, or the store has no conditional writes.
    """

    def __init__(self, store: ObjectStore, command: str) -> None:
        self._store, self._pid = store, os.getpid()
        since = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
        signed = {"command": command, "pid": os.getpid(), "host": socket.gethostname(), "since": since}
        self.token = secrets.token_hex(8)
        self._signed = signed | {"token": self.token}
        self._beats, self._is_lost, self._ended = 0, False, Event()
        self._renewed = _now()
        self._etag = self._take(command)
        self._require_conditions()
        self._pulse = Thread(target=self._beat, daemon=True, name="dataset lock")
        self._pulse.start()

    @property
    def is_held(self) -> bool:
        """Whether it has not been closed."""
        return not self._ended.is_set()

    def check(self) -> None:
        """Call it before each write; UserError if another command has taken over."""
        if not self._is_lost and _now() - self._renewed > EXPIRY_S / 2:
            self._look()  # after sleep, or a long silence of the store, the pulse may not know yet
        if self._is_lost:
            raise UserError(
                f"{self._store.url}: another command has taken this dataset over, because nothing was heard from here "
                f"for {EXPIRY_S:.0f} seconds. What was finished is kept; run the command again when that one has ended."
            )

    def close(self) -> None:
        """Releases the lock; does nothing in a forked child."""
        if os.getpid() != self._pid or self._ended.is_set():
            return
        self._ended.set()
        self._pulse.join()
        with suppress(UserError):  # it expires anyway
            if not self._is_lost:
                self._look()
            if not self._is_lost:
                self._store.delete(LOCK_NAME)

    def _take(self, command: str) -> str:
        try:
            return self._write(IfNoneMatch="*")
        except ConflictError:
            held = self._store.read(LOCK_NAME)
        try:
            if held is None:
                return self._write(IfNoneMatch="*")
            if self._is_ours(held):
                return held.etag
            if held.age_s > EXPIRY_S:
                _log.warning("%s: the lock of a command that ended without letting go is taken over.", self._store.url)
                return self._write(IfMatch=held.etag)
        except ConflictError:
            held = self._store.read(LOCK_NAME)
        raise UserError(
            f"{self._store.url} is in use: {_said(held.content if held else b'')} Wait for the end, and run {command} "
            f"again. If that command was killed, the lock ends {EXPIRY_S:.0f} seconds after its last sign of life."
        )

    def _require_conditions(self) -> None:
        """Some stores ignore the condition of a write; two commands would then both believe to hold the lock."""
        with suppress(ConflictError):
            self._write(IfNoneMatch="*")
            self._store.delete(LOCK_NAME)
            raise UserError(
                f"The store of {self._store.url} does not know conditional writes (If-None-Match), by which one "
                "command at a time changes a dataset. Use one that does, or build on a disk and copy."
            )

    def _beat(self) -> None:
        while not self._ended.wait(EXPIRY_S / 4):
            try:
                self._renew()
            except UserError as error:  # the next beat may succeed
                _log.warning("The lock could not be renewed. %s", error)
            if self._is_lost:
                return

    def _renew(self) -> None:
        try:
            self._etag = self._write(IfMatch=self._etag)
        except ConflictError:
            self._look()
        self._renewed = _now()

    def _look(self) -> None:
        """Asks the store whether the lock is still ours."""
        held = self._store.read(LOCK_NAME)
        if held is None or not self._is_ours(held):
            self._is_lost = True
        else:
            self._etag = held.etag

    def _is_ours(self, held: Read) -> bool:
        """Recognises our own content after a write whose answer was lost and which was retried."""
        return self.token.encode() in held.content

    def _write(self, **condition: str) -> str:
        self._beats += 1  # changes the content, hence the ETag
        content = json.dumps(self._signed | {"beat": self._beats}) + "\n"
        return self._store.put_bytes(content.encode(), LOCK_NAME, **condition)


def _now() -> float:
    """Seconds, including those during which the machine slept."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def holder(store: ObjectStore) -> str | None:
    """Describes the command that is changing a dataset now, if any."""
    held = store.read(LOCK_NAME)
    return _said(held.content) if held and held.age_s <= EXPIRY_S else None


def _said(content: bytes) -> str:
    with suppress(ValueError, KeyError, TypeError):
        signed = json.loads(content)
        return f"{signed['command']} is running (process {signed['pid']} on {signed['host']}, since {signed['since']})."
    return "Another command uses it."


@contextmanager
def with_lock_token(token: str) -> Iterator[None]:
    """Within the block, this process writes for the command whose lock has this token.

    A command's processes and machines do not take the lock, but must not write once it is lost, so they receive its
    token with their work and check it before each write.
    """
    before = _token.set(token)
    try:
        yield
    finally:
        _token.reset(before)


def current_token() -> str:
    """The token of the command that this process writes for; "" without one."""
    return _token.get()


def check_lock_token(store: ObjectStore) -> None:
    """Call it before each write in a process without a lock of its own; UserError if its command has lost the lock."""
    token, held = _token.get(), store.read(LOCK_NAME)
    if not token or held is None or token.encode() not in held.content:
        raise UserError(
            f"{store.url}: the command that this work is for has ended, or another one has taken the dataset over. "
            "What was finished is kept; run the command again when no other command uses it."
        )
