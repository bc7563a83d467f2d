"""Mirrors a work folder under a prefix on S3; work counts as finished once it is there.

S3 has no rename, but an object appears whole or not at all. So a shard's outputs are written first and its manifest
entry last, on S3 and then here; an entry found only here counts for nothing. The dataset is what is on S3; the work
folder is a partial copy, which may be deleted between two commands.
"""

from __future__ import annotations

import fcntl
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from threading import Lock

from sdtrain.dataset.files import has_fingerprint, publish, sha256_of
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.local_storage import LocalStorage, Stored
from sdtrain.dataset.s3.lock import RemoteLock, check_lock_token, holder
from sdtrain.dataset.s3.store import Object, ObjectStore
from sdtrain.dataset.s3.url import MARKER, S3Url, parse_url
from sdtrain.dataset.shard_report import parse_entry
from sdtrain.errors import UserError

_THREADS = 16
_SYNC_LOCK = ".s3-sync"
_MANIFEST = "manifest/"
_WHOLE = ("recipe.yaml", "removed.parquet", "removal.json", "report.html", "latents/info.json")
"""Files that no shard outputs and every command reads."""


class Mirror(LocalStorage):
    """One dataset on S3 and its work folder; `may_write` raises if this process may no longer change the dataset."""

    is_remote = True

    def __init__(self, dataset: DatasetDir, url: S3Url) -> None:
        super().__init__(dataset)
        self.store = ObjectStore(url)
        self.may_write: Callable[[], None] = lambda: check_lock_token(self.store)
        self._known: dict[str, Object] | None = None
        self._guard = Lock()

    def lock(self, command: str) -> RemoteLock:
        """Locks the dataset against all machines, and syncs its work folder."""
        lock = RemoteLock(self.store, command)
        try:
            self.may_write, self.lock_token = lock.check, lock.token
            self.store.sweep()
            self.sync()
        except UserError:
            lock.close()
            raise
        return lock

    def active_command(self) -> str | None:
        """Describes the command that holds the lock."""
        return holder(self.store)

    def sync(self, may_delete: bool = True) -> None:
        """Fetches the manifest, and deletes local files that it no longer lists."""
        with self._alone():
            self._known = found = self.store.list()
            names = {name for name in found if name.startswith(_MANIFEST)}
            here = {self.dataset.relative(path) for path in (self.dataset.root / "manifest").rglob("*.json")}
            if may_delete:
                for name in here - names:
                    self._drop(self.dataset.root / name)
                for name in set(_WHOLE) - found.keys():
                    (self.dataset.root / name).unlink(missing_ok=True)
            self._each(self._renew, sorted(names | (found.keys() & set(_WHOLE))))

    def push(self, entry: Path, content: bytes, outputs: Mapping[str, Stored], beside: Iterable[Path] = ()) -> None:
        """Uploads a shard's files, its manifest entry last."""
        self.may_write()
        name = self.dataset.relative(entry)
        changed = [n for n, output in outputs.items() if self.store.digest(n) != output.sha256]
        # In a removal the old entry stays, because its journal says that files and entries do not match.
        if changed and not self.dataset.removal.exists():
            self.store.delete(name)
        # Tar before table: whoever takes over half way finds what a killed run leaves on a disk.
        tars = [n for n in changed if n.endswith(".tar")]
        for n in tars:
            self.store.put(self.dataset.root / n, n, outputs[n].sha256)
        self._each(
            lambda n: self.store.put(self.dataset.root / n, n, outputs[n].sha256), [n for n in changed if n not in tars]
        )
        self.push_files(path for path in beside if path.exists())
        self.may_write()
        self.store.put_bytes(content, name)
        self._note({n: Object(output.bytes, "") for n, output in outputs.items()} | {name: Object(len(content), "")})

    def push_files(self, paths: Iterable[Path]) -> None:
        """Uploads files that are not there already."""
        self.may_write()

        def put(path: Path) -> None:
            name, digest = self.dataset.relative(path), sha256_of(path)
            if self.store.digest(name) != digest:
                self.store.put(path, name, digest)

        self._each(put, list(paths))

    def push_folder(self, folder: Path) -> None:
        """Mirrors a local folder to S3."""
        paths = [path for path in folder.rglob("*") if path.is_file()]
        self.push_files(paths)
        kept = {self.dataset.relative(path) for path in paths}
        self.store.delete(*(self.store.list(f"{self.dataset.relative(folder)}/").keys() - kept))

    def discard(self, path: Path) -> None:
        """Deletes a file, on S3 first."""
        self._discard(path)
        super().discard(path)

    def _discard(self, path: Path) -> None:
        name = self.dataset.relative(path)
        if name.startswith(_MANIFEST) and not path.exists() and name not in self._objects():
            return  # remote entries are all here too; a build asks for all shards before the first is made
        self.may_write()
        self.store.delete(name)
        self._objects().pop(name, None)

    def has(self, name: str, num_bytes: int) -> bool:
        """Whether a file of that size exists here or else on S3."""
        if (self.dataset.root / name).exists():
            return super().has(name, num_bytes)
        seen = self._objects().get(name)
        return seen is not None and seen.size == num_bytes

    def has_copy(self, name: str, sha256: str) -> bool:
        """Asks the store whether it has an object with that content."""
        return self.store.digest(name) == sha256

    def pull(self, wanted: Mapping[str, Stored | None]) -> None:
        """Fetches missing files."""
        self._each(lambda name: self._pull(name, wanted[name]), list(wanted))

    def read_part(self, path: Path, offset: int, num_bytes: int) -> bytes:
        """Reads part of the local file, or else of the object."""
        if path.exists():
            return super().read_part(path, offset, num_bytes)
        return self.store.read_part(self.dataset.relative(path), offset, num_bytes)

    def _pull(self, name: str, output: Stored | None) -> None:
        path = self.dataset.root / name
        if path.exists():
            return
        with _one_fetches(path):
            if not path.exists() and (output is not None or self.store.digest(name) is not None):
                self.store.fetch(name, path, output.sha256 if output else None)

    def _renew(self, name: str) -> None:
        """Fetches a small file if it differs from the local one."""
        path, seen = self.dataset.root / name, self._objects()[name]
        if path.exists() and path.stat().st_size == seen.size and _md5(path) == seen.etag:
            return
        read = self.store.read(name)
        if read is None:  # deleted since listing
            return
        if path.exists() and path.read_bytes() == read.content:  # some stores' ETags are no digests
            return
        if name.startswith(_MANIFEST):
            self._forget_others(read.content, name)
        with publish(path) as temporary:
            temporary.write_bytes(read.content)

    def _drop(self, entry: Path) -> None:
        """Deletes the entry and local files of a shard that another machine has undone."""
        paths = [self.dataset.root / name for name in parse_entry(entry.read_bytes(), entry).outputs]
        # Downloaded images stay: they are reused if they are whole, and may not be available a second time.
        if not any(map(has_fingerprint, paths)):
            for path in paths:
                path.unlink(missing_ok=True)
        entry.unlink()

    def _objects(self) -> dict[str, Object]:
        with self._guard:
            if self._known is None:
                self._known = self.store.list()
            return self._known

    def _forget_others(self, entry: bytes, name: str) -> None:
        """Deletes local files, such as a killed run's, that differ from those of a newly fetched entry."""
        for output_name, output in parse_entry(entry, self.dataset.root / name).outputs.items():
            path = self.dataset.root / output_name
            if path.exists() and (path.stat().st_size != output.bytes or sha256_of(path) != output.sha256):
                path.unlink()

    def _note(self, written: dict[str, Object]) -> None:
        with self._guard:
            if self._known is not None:
                self._known |= written

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Lets one process of this machine in at a time."""
        self.dataset.root.mkdir(parents=True, exist_ok=True)
        with (self.dataset.root / _SYNC_LOCK).open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    @staticmethod
    def _each(do: Callable[..., None], items: Iterable[object]) -> None:
        items = list(items)
        if len(items) < 2:
            for item in items:
                do(item)
            return
        with ThreadPoolExecutor(_THREADS) as threads:
            list(threads.map(do, items))


def mirror_of(dataset: DatasetDir) -> Mirror | None:
    """The mirror of a dataset; None for a local one."""
    url = dataset.url or _marked(dataset.root)
    return _mirror(dataset.root, url) if url else None


def _marked(root: Path) -> str:
    try:
        return (root / MARKER).read_text().strip()
    except OSError:
        return ""


@lru_cache(maxsize=8)
def _mirror(root: Path, url: str) -> Mirror:
    if _marked(root) not in ("", url):
        raise UserError(f"{root} is the work folder of {_marked(root)}, not of {url}. Choose another --work-dir.")
    root.mkdir(parents=True, exist_ok=True)
    if not _marked(root):
        with publish(root / MARKER) as temporary:
            temporary.write_text(url + "\n")
    return Mirror(DatasetDir(root, url), parse_url(url))


@contextmanager
def _one_fetches(path: Path) -> Iterator[None]:
    """Lets one thread or process fetch a file; others that want it wait."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(f".{path.name}.fetch")
    with lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
    lock.unlink(missing_ok=True)


def _md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
