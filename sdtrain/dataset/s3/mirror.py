"""Mirrors a work folder under a prefix on S3; work counts as finished once it is there.

S3 has no rename, but an object appears whole or not at all. So a shard's outputs are written first and its manifest
entry last, on S3 and then here; an entry found only here counts for nothing. The dataset is what is on S3; the work
folder is a partial copy, which may be deleted between two commands.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from threading import Lock

from sdtrain.dataset.files import publish, sha256_of
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.local_storage import LocalStorage, Stored
from sdtrain.dataset.s3.lock import RemoteLock, check_lock_token, current_token, holder
from sdtrain.dataset.s3.manifest_copy import ManifestCopy, in_threads, is_entry, listed_with
from sdtrain.dataset.s3.store import Object, ObjectStore
from sdtrain.dataset.s3.url import MARKER, S3Url, parse_url
from sdtrain.errors import UserError

_SYNC_LOCK = ".s3-sync"
_WHOLE = ("recipe.yaml", "removed.parquet", "removed-rows.parquet", "removal.json", "report.html", "latents/info.json")
"""Files that no shard outputs and every command reads; all but the last lie at the top."""
_log = logging.getLogger(__name__)


class Mirror(LocalStorage):
    """One dataset on S3 and its work folder; `may_write` raises if this process may no longer change the dataset."""

    is_remote = True

    def __init__(self, dataset: DatasetDir, url: S3Url) -> None:
        super().__init__(dataset)
        self.store = ObjectStore(url)
        self.may_write: Callable[[], None] = lambda: check_lock_token(self.store)
        self._held: RemoteLock | None = None
        self._manifest = ManifestCopy(dataset, self.store)
        self._known: dict[str, dict[str, Object]] = {}
        self._guard = Lock()

    def lock(self, command: str) -> RemoteLock:
        """Locks the dataset against all machines, and syncs its work folder."""
        lock = RemoteLock(self.store, command)
        try:
            self._held, self.may_write, self.lock_token = lock, lock.check, lock.token
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
        token = self._held.token if self._held and self._held.is_held else ""
        with self._alone():
            if not token or self._manifest.synced_by != token:  # else nobody else can have changed these
                self._sync_whole(may_delete)
            self._manifest.sync(may_delete, token)
            with self._guard:
                self._known = {}

    def finish(self) -> None:
        """Seals the manifest, so that the next command need not list it."""
        try:
            with self._alone():
                self._manifest.seal(self.may_write)
        except UserError as error:
            _log.warning("All is stored, but the next command has to list the manifest. %s", error)

    def push(self, entry: Path, content: bytes, outputs: Mapping[str, Stored], beside: Iterable[Path] = ()) -> None:
        """Uploads a shard's files, its manifest entry last."""
        self.may_write()
        self._manifest.unseal(self._token)
        name = self.dataset.relative(entry)
        changed = [n for n, output in outputs.items() if self.store.digest(n) != output.sha256]
        # In a removal the old entry stays, because its journal says that files and entries do not match.
        if changed and not self.dataset.removal.exists():
            self.store.delete(name)
        # Tar before table: whoever takes over half way finds what a killed run leaves on a disk.
        tars = [n for n in changed if n.endswith(".tar")]
        for n in tars:
            self.store.put(self.dataset.root / n, n, outputs[n].sha256)
        in_threads(
            lambda n: self.store.put(self.dataset.root / n, n, outputs[n].sha256), [n for n in changed if n not in tars]
        )
        self.push_files(path for path in beside if path.exists())
        self.may_write()
        self.store.put_bytes(content, name)
        for n, output in outputs.items():
            self._note(n, Object(output.bytes, ""))

    def push_files(self, paths: Iterable[Path]) -> None:
        """Uploads files that are not there already."""
        self.may_write()

        def put(path: Path) -> None:
            name, digest = self.dataset.relative(path), sha256_of(path)
            if self.store.digest(name) != digest:
                self.store.put(path, name, digest)

        in_threads(put, list(paths))

    def push_folder(self, folder: Path) -> None:
        """Mirrors a local folder of small files to S3."""
        found = self.store.list(f"{self.dataset.relative(folder)}/")
        paths = {self.dataset.relative(path): path for path in folder.rglob("*") if path.is_file()}
        self.push_files(path for name, path in paths.items() if name not in found or _md5(path) != found[name].etag)
        self.store.delete(*(found.keys() - paths.keys()))

    def discard(self, path: Path) -> None:
        """Deletes a file, on S3 first."""
        self._discard(path)
        super().discard(path)

    def _discard(self, path: Path) -> None:
        name = self.dataset.relative(path)
        token = self._token
        if is_entry(name) and not path.exists() and token and self._manifest.synced_by == token:
            return  # remote entries are all here too; a build asks for all shards before the first is made
        self.may_write()
        self._manifest.unseal(token)
        self.store.delete(name)
        self._note(name, None)

    def has(self, name: str, num_bytes: int) -> bool:
        """Whether a file of that size exists here or else on S3, as far as the manifest's seal or a listing says."""
        if (self.dataset.root / name).exists():
            return super().has(name, num_bytes)
        if self._manifest.has_outputs:
            return True
        seen = self._listed(name)
        return seen is not None and seen.size == num_bytes

    def has_copy(self, name: str, sha256: str) -> bool:
        """Asks the store whether it has an object with that content."""
        return self.store.digest(name) == sha256

    def pull(self, wanted: Mapping[str, Stored | None]) -> None:
        """Fetches missing files."""
        missing = [name for name in wanted if not (self.dataset.root / name).exists()]
        in_threads(lambda name: self._pull(name, wanted[name]), missing)

    def read_part(self, path: Path, offset: int, num_bytes: int) -> bytes:
        """Reads part of the local file, or else of the object."""
        if path.exists():
            return super().read_part(path, offset, num_bytes)
        name = self.dataset.relative(path)
        try:
            return self.store.read_part(name, offset, num_bytes)
        except FileNotFoundError:
            self._manifest.doubt(name, None)
            raise

    def _pull(self, name: str, output: Stored | None) -> None:
        path = self.dataset.root / name
        if path.exists():
            return
        with _one_fetches(path):
            if path.exists() or (output is None and self.store.digest(name) is None):
                return
            try:
                self.store.fetch(name, path, *((output.sha256, output.bytes) if output else ()))
            except UserError:
                self._manifest.doubt(name, output.sha256 if output else None)
                raise

    def _sync_whole(self, may_delete: bool) -> None:
        """Fetches the files that every command reads."""
        found = self.store.list(delimiter="/") | self.store.list(_WHOLE[-1])
        if may_delete:
            for name in set(_WHOLE) - found.keys():
                (self.dataset.root / name).unlink(missing_ok=True)
        in_threads(lambda name: self._renew(name, found[name]), sorted(found.keys() & set(_WHOLE)))

    def _renew(self, name: str, seen: Object) -> None:
        """Fetches a small file if it differs from the local one."""
        path = self.dataset.root / name
        if path.exists() and path.stat().st_size == seen.size and _md5(path) == seen.etag:
            return
        read = self.store.read(name)
        if read is None:  # deleted since listing
            return
        if path.exists() and path.read_bytes() == read.content:  # some stores' ETags are no digests
            return
        with publish(path) as temporary:
            temporary.write_bytes(read.content)

    def _listed(self, name: str) -> Object | None:
        """An object, as its folder was listed when it was first asked for, and as this process wrote it since."""
        folder = listed_with(name)
        with self._guard:
            if folder not in self._known:
                self._known[folder] = self.store.list(folder)
            return self._known[folder].get(name)

    def _note(self, name: str, written: Object | None) -> None:
        with self._guard:
            known = self._known.get(listed_with(name), {})
            known.pop(name, None)
            if written:
                known[name] = written

    @property
    def _token(self) -> str:
        """Of the lock under which this process works; "" without one."""
        return self._held.token if self._held and self._held.is_held else current_token()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Lets one process of this machine in at a time."""
        self.dataset.root.mkdir(parents=True, exist_ok=True)
        with (self.dataset.root / _SYNC_LOCK).open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


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
