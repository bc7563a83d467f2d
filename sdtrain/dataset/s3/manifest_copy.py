"""Keeps a work folder's manifest like the bucket's, at the price of a few requests while a seal in the bucket holds.

The JSON entries in the bucket are the record. At its end, a command that changed any stores a table of each stage's
entries (`manifest/STAGE.parquet`) and then a seal (`manifest/seal.json`), which names these tables' digests; a command
deletes the seal before it changes the first entry. Where there is a seal, the tables say all that a listing would, and
every output that an entry lists was in the bucket; where there is none, the manifest is listed. Nobody notices by the
seal what was changed by other means than by sdtrain's commands: whoever does that deletes the seal too.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from pydantic import BaseModel, ValidationError

from sdtrain.dataset.files import has_fingerprint, publish, sha256_of
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.manifest_table import stage_entries, stored_entries, write_table
from sdtrain.dataset.s3.store import Object, ObjectStore
from sdtrain.dataset.shard_report import parse_entry
from sdtrain.errors import UserError

SEAL = "manifest/seal.json"
_MANIFEST = "manifest/"
_ENTRY = re.compile(r"manifest/[^/]+/([0-9]{5}|[1-9][0-9]{5,8})[.]json")
_TABLE = re.compile(r"manifest/[^/]+\.parquet")
_LOCAL_SEAL = ".s3-seal"
_WORTH_A_TABLE = 50
"""Entries that must differ before the tables are fetched, parts of which may be out of date, rather than each entry."""
_THREADS = 16


class SealedTable(BaseModel):
    """A stage's table in the bucket."""

    sha256: str
    num_bytes: int
    num_entries: int


class Seal(BaseModel):
    """Says that these tables, by their stages' folders, hold all entries as they are in the bucket."""

    token: str
    tables: dict[str, SealedTable]


class ManifestCopy:
    """The entries of a dataset in a bucket and their copies in its work folder.

    Attributes:
        has_outputs: whether every output that an entry lists was in the bucket when the seal was made, or written since
            by the command that this process belongs to.
        synced_by: the token of the lock under which this process synced last; "" without one.
    """

    def __init__(self, dataset: DatasetDir, store: ObjectStore) -> None:
        self._dataset, self._store = dataset, store
        self._same: dict[str, str] = {}
        self._unsealed_by, self._must_flush = "", False
        self.has_outputs, self.synced_by = False, ""

    def sync(self, may_delete: bool, token: str) -> None:
        """Updates the entries here; `token` is of the lock that this process holds, "" without one.

        `may_delete`: nobody on this machine is recording a shard, so entries that the bucket lacks are deleted here.
        """
        seal = self._read_seal()
        if seal is None or not self._follow(seal, may_delete):
            if seal is not None and token:  # so that this command makes another one
                self.unseal(token)
            self._list(may_delete)
        was_held = bool(token) and self.synced_by == token
        self.has_outputs = seal is not None or (was_held and self.has_outputs)
        self.synced_by = token

    def unseal(self, token: str) -> None:
        """Call it before an entry changes; `token` is of the lock under which it does."""
        if token and self._unsealed_by == token:
            return
        self._store.delete(SEAL)
        self._local_seal.unlink(missing_ok=True)
        self._unsealed_by = token

    def doubt(self, name: str, sha256: str | None) -> None:
        """Call it when an output could not be read; if the bucket lacks it, the next command lists what there is."""
        with suppress(UserError):  # who may only read cannot help it
            if (found := self._store.digest(name)) is None or (sha256 and found != sha256):
                self._store.delete(SEAL)

    def seal(self, may_write: Callable[[], None]) -> None:
        """Stores tables and seal, unless the seal still holds or not all outputs are in the bucket.

        Only for the holder of the lock, when nobody writes for it any more.
        """
        if self._read_seal() is not None or self._dataset.removal.exists():
            return
        may_write()
        found = self._list(may_delete=True)
        stages = self._stages()
        if not self.has_outputs and not all(map(self._finds_outputs, stages)):
            return
        tables = dict(map(self._store_table, stages))
        stale = {name for name in found if _TABLE.fullmatch(name)} - {_table_name(stage) for stage in tables}
        self._store.delete(*stale)
        content = Seal(token=secrets.token_hex(8), tables=tables).model_dump_json()
        may_write()
        self._store.put_bytes(content.encode(), SEAL)
        self._note(content)
        self.has_outputs = True

    @property
    def _local_seal(self) -> Path:
        return self._dataset.root / _LOCAL_SEAL

    def _read_seal(self) -> Seal | None:
        read = self._store.read(SEAL)
        if read is None:
            return None
        with suppress(ValidationError):  # of a later version: what it says is not known, so it says nothing
            return Seal.model_validate_json(read.content)
        return None

    def _note(self, content: str) -> None:
        with publish(self._local_seal) as temporary:
            temporary.write_text(content)

    def _stages(self) -> list[str]:
        """The folders here with entries."""
        return sorted({name.split("/")[1] for name in self._local_entries()})

    def _local_entries(self) -> Iterator[str]:
        for folder in (self._dataset.root / "manifest").glob("*/"):
            with os.scandir(folder) as files:
                names = [f"{_MANIFEST}{folder.name}/{file.name}" for file in files]
            yield from filter(is_entry, names)

    def _store_table(self, stage: str) -> tuple[str, SealedTable]:
        file, num_entries = write_table(self._dataset.root / _MANIFEST / stage)
        digest, name = sha256_of(file), _table_name(stage)
        if self._store.digest(name) != digest:
            self._store.put(file, name, digest)
        return stage, SealedTable(sha256=digest, num_bytes=file.stat().st_size, num_entries=num_entries)

    def _finds_outputs(self, stage: str) -> bool:
        """Whether the bucket has all outputs of a stage, by a listing of their folders."""
        entries = stage_entries(self._dataset.root / _MANIFEST / stage)
        outputs = {name: output.bytes for entry in entries for name, output in entry.outputs.items()}
        found = {
            name: seen.size
            for folder in set(map(listed_with, outputs))
            for name, seen in self._store.list(folder).items()
        }
        return all(found.get(name) == num_bytes for name, num_bytes in outputs.items())

    def _follow(self, seal: Seal, may_delete: bool) -> bool:
        """Updates the entries from the sealed tables, if there are other ones here; returns whether that was possible.

        It is not while another command replaces the tables, and where one was deleted or damaged by hand.
        """
        content = seal.model_dump_json()
        with suppress(FileNotFoundError):
            if self._local_seal.read_text() == content and self._counts() == _counts_of(seal):
                return True
        try:
            for stage, table in seal.tables.items():
                self._fetch_table(stage, table.sha256, table.num_bytes)
        except UserError:
            return False
        kept = {name for stage in seal.tables for name in self._unpack(stage, may_delete)}
        self._flush()
        if may_delete:
            self._drop(set(self._local_entries()) - kept)
            self._note(content)
        return True

    def _counts(self) -> dict[str, int]:
        return dict(Counter(name.split("/")[1] for name in self._local_entries()))

    def _fetch_table(self, stage: str, sha256: str, num_bytes: int) -> None:
        path = self._dataset.root / _table_name(stage)
        if not path.exists() or sha256_of(path) != sha256:
            self._store.fetch(_table_name(stage), path, sha256, num_bytes)

    def _unpack(self, stage: str, may_replace: bool) -> Iterator[str]:
        """Writes the entries of a table here that are missing, or differ; yields the names of all.

        Not `may_replace`: a command of this machine records shards, so what is here may be newer than the table.
        """
        for shard, mtime_ns, content in stored_entries(self._dataset.root / _MANIFEST / stage):
            name = f"{_MANIFEST}{stage}/{shard:05d}.json"
            path = self._dataset.root / name
            if not path.exists() or (may_replace and path.read_bytes() != content):
                self._write(name, content, is_durable=False)
                if mtime_ns > 0:  # so that the table here need not be made again
                    os.utime(path, ns=(mtime_ns, mtime_ns))
            yield name

    def _list(self, may_delete: bool) -> dict[str, Object]:
        """Updates the entries from a listing, which is returned."""
        found = self._store.list(_MANIFEST)
        listed = {name: seen for name, seen in found.items() if _ENTRY.fullmatch(name)}
        if may_delete:
            self._drop(set(self._local_entries()) - listed.keys())
        missing = [name for name, seen in listed.items() if not self._is_same(name, seen)]
        if len(missing) >= _WORTH_A_TABLE:
            missing = self._take_from_tables({name: listed[name] for name in missing}, found)
        in_threads(self._fetch, missing)
        return found

    def _is_same(self, name: str, seen: Object) -> bool:
        path = self._dataset.root / name
        if not path.exists():
            return False
        if self._same.get(name) != seen.etag:
            if path.stat().st_size != seen.size or _md5(path.read_bytes()) != seen.etag:
                return False
            self._same[name] = seen.etag
        return True

    def _take_from_tables(self, missing: Mapping[str, Object], found: Mapping[str, Object]) -> list[str]:
        """Takes entries that are in a table as they are in the bucket; returns the names of the others."""
        taken = set[str]()
        for stage in sorted({name.split("/")[1] for name in missing}):
            if (table := found.get(_table_name(stage))) is None:
                continue
            with suppress(UserError):  # replaced meanwhile, or damaged
                self._fetch_table(stage, self._store.digest(_table_name(stage)) or "", table.size)
                taken |= self._take(stage, missing)
        self._flush()
        return [name for name in missing if name not in taken]

    def _take(self, stage: str, missing: Mapping[str, Object]) -> set[str]:
        taken = set[str]()
        for shard, _, content in stored_entries(self._dataset.root / _MANIFEST / stage):
            name = f"{_MANIFEST}{stage}/{shard:05d}.json"
            if name in missing and _md5(content) == missing[name].etag:
                self._write(name, content, is_durable=False)
                taken.add(name)
        return taken

    def _fetch(self, name: str) -> None:
        read = self._store.read(name)
        if read is None:  # deleted since it was listed
            return
        path = self._dataset.root / name
        if not path.exists() or path.read_bytes() != read.content:  # some stores' ETags are no digests
            self._write(name, read.content)
        self._same[name] = read.etag

    def _write(self, name: str, content: bytes, is_durable: bool = True) -> None:
        self._forget_others(content, name)
        with publish(self._dataset.root / name, is_durable) as temporary:
            temporary.write_bytes(content)
        self._must_flush |= not is_durable

    def _flush(self) -> None:
        """Brings many new entries to the disk at once."""
        if self._must_flush:
            os.sync()
            self._must_flush = False

    def _forget_others(self, entry: bytes, name: str) -> None:
        """Deletes local files, such as a killed run's, that differ from those of a newly fetched entry."""
        for output_name, output in parse_entry(entry, self._dataset.root / name).outputs.items():
            path = self._dataset.root / output_name
            if path.exists() and (path.stat().st_size != output.bytes or sha256_of(path) != output.sha256):
                path.unlink()

    def _drop(self, names: Iterable[str]) -> None:
        """Deletes entries and local files of shards that another machine has undone."""
        for entry in (self._dataset.root / name for name in names):
            paths = [self._dataset.root / name for name in parse_entry(entry.read_bytes(), entry).outputs]
            # Downloaded images stay: they are reused if they are whole, and may not be available a second time.
            if not any(map(has_fingerprint, paths)):
                for path in paths:
                    path.unlink(missing_ok=True)
            entry.unlink()


def is_entry(name: str) -> bool:
    """Whether a file of a dataset is a manifest entry."""
    return _ENTRY.fullmatch(name) is not None


def listed_with(name: str) -> str:
    """The beginning of a name by which to list a file: its folder, or at the top its own name."""
    return name[: name.rfind("/") + 1] or name


def in_threads(do: Callable[..., None], items: Iterable[object]) -> None:
    """Calls a function that waits for the store for each item."""
    items = list(items)
    if len(items) < 2:
        for item in items:
            do(item)
        return
    with ThreadPoolExecutor(_THREADS) as threads:
        list(threads.map(do, items))


def _table_name(stage: str) -> str:
    return f"{_MANIFEST}{stage}.parquet"


def _counts_of(seal: Seal) -> dict[str, int]:
    return {stage: table.num_entries for stage, table in seal.tables.items()}


def _md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()
