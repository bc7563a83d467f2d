"""Reads and writes tar shards in WebDataset's layout: equal samples give equal bytes, and damage is detected."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from sdtrain.errors import UserError

BLOCK_BYTES, RECORD_BYTES = tarfile.BLOCKSIZE, tarfile.RECORDSIZE


@dataclass(frozen=True)
class Member:
    """The location of one member's bytes in the tar file."""

    offset: int
    size: int


@dataclass(frozen=True)
class SampleIndex:
    """One sample of a tar: its key, and its members by extension (without the leading dot)."""

    key: str
    members: dict[str, Member] = field(default_factory=dict)


def write_samples(path: Path, samples: Iterable[tuple[str, dict[str, bytes]]]) -> list[SampleIndex]:
    """Writes samples as `{key}.{extension}` members, in the given order; returns each member's data offset and length.

    A sample's members are sorted by extension. Headers hold only name and size (GNU format, mtime 0, uid and gid 0,
    mode 0644, no owner names), so equal samples give equal files.
    """
    index = []
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for key, members in samples:
            sample = SampleIndex(key)
            for extension in sorted(members):
                sample.members[extension] = _append(tar, f"{key}.{extension}", members[extension])
            index.append(sample)
    return index


def read_samples(path: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yields (key, {extension: bytes}) for every sample, one in memory at a time.

    UserError if the file is not a tar, ends too early, or has a damaged header.
    """
    key, sample = "", dict[str, bytes]()
    for name, body in _members(path, with_bodies=True):
        member_key, extension = _split(name.name)
        if member_key != key and sample:
            yield key, sample
            sample = {}
        key = member_key
        if extension in sample:
            raise _damaged(path, f"it holds {name.name} twice")
        sample[extension] = body
    if sample:
        yield key, sample


def index_samples(path: Path) -> list[SampleIndex]:
    """Locates every member of every sample, reading only the headers; UserError as for `read_samples`."""
    index: list[SampleIndex] = []
    for info, _ in _members(path, with_bodies=False):
        key, extension = _split(info.name)
        if not index or index[-1].key != key:
            index.append(SampleIndex(key))
        if extension in index[-1].members:
            raise _damaged(path, f"it holds {info.name} twice")
        index[-1].members[extension] = Member(info.offset_data, info.size)
    return index


def _append(tar: tarfile.TarFile, name: str, body: bytes) -> Member:
    info = tarfile.TarInfo(name)  # its defaults are our fixed header: mtime 0, ids 0, mode 0644, no names
    info.size = len(body)
    tar.addfile(info, io.BytesIO(body))
    padded = -(-info.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    return Member(tar.offset - padded, info.size)


def _members(path: Path, with_bodies: bool) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            while (info := tar.next()) is not None:
                body = tar.extractfile(info) if info.isreg() and with_bodies else None
                if info.isreg():
                    yield info, body.read() if body else b""
                tar.members = []  # type: ignore[attr-defined]  # else a streamed tar is remembered header by header
            # tarfile takes a damaged header, or the end of the file, for the end of the archive.
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise _damaged(path, f"no valid header at byte {tar.offset}")
    except FileNotFoundError as error:
        raise UserError(f"There is no file {path}. Run the build again: it makes what is missing.") from error
    except tarfile.TarError as error:
        raise _damaged(path, str(error)) from error


def _split(name: str) -> tuple[str, str]:
    """WebDataset's rule: the extension begins at the first dot of the file name."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension


def _damaged(path: Path, detail: str) -> UserError:
    return UserError(f"{path} is damaged or cut short ({detail}). Delete it and run the build again: it is rebuilt.")


def members_in(content: bytes) -> Iterator[tuple[str, str, bytes]]:
    """Key, extension and bytes of each member in a piece of a tar that begins with a header.

    ValueError if the piece ends within one.
    """
    at = 0
    while at + BLOCK_BYTES <= len(content) and content[at] != 0:
        info = tarfile.TarInfo.frombuf(content[at : at + BLOCK_BYTES], "utf-8", "strict")
        key, _, extension = info.name.partition(".")
        body = content[at + BLOCK_BYTES : at + BLOCK_BYTES + info.size]
        if len(body) < info.size:
            raise ValueError("the tar is cut short")
        yield key, extension, body
        at += BLOCK_BYTES + padded(info.size)


def padded(size: int) -> int:
    """The bytes that a member of `size` bytes takes, without its header."""
    return -(-size // BLOCK_BYTES) * BLOCK_BYTES
