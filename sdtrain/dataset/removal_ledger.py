"""Records samples removed for good, as digests that recognise them when they return but reveal nothing."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sdtrain.dataset.addresses import host_of
from sdtrain.dataset.files import publish, read_parquet
from sdtrain.dataset.uid import uid_of
from sdtrain.errors import UserError

REMOVED = "removed"
"""The drop reason of rows that were removed before."""

Kind = Literal["uid", "url", "host", "sha256", "phash"]
LEDGER = pa.schema(
    [
        ("kind", pa.string()),
        ("digest", pa.string()),  # of the key; none for a perceptual hash, whose distances need the hash itself
        ("phash", pa.int64()),
        ("radius", pa.int32()),  # of a perceptual hash: most differing bits
        ("labels", pa.int32()),  # of a host: its number of labels
        ("listed_by", pa.string()),  # the key used in the user's list; none for keys derived from its entries
        ("removed_at", pa.timestamp("s", tz="UTC")),
    ]
)


def key_digest(kind: Kind, value: str) -> str:
    """The ledger's digest of a uid, URL, host or sha256."""
    return hashlib.sha256(f"{kind}\n{value}".encode()).hexdigest()


def digest_sql(kind: str, value: str) -> str:
    """`key_digest` as SQL."""
    return f"sha256('{kind}' || chr(10) || {value})"


def read_ledger(path: Path) -> pa.Table:
    """All rows of a dataset's ledger; none if nothing was ever removed. UserError if the file is damaged."""
    try:
        return read_parquet(path).cast(LEDGER) if path.exists() else LEDGER.empty_table()
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"{path}, which says what may not come back, cannot be read ({error}). Put it back from a backup: without "
            "it, removed images would be fetched again."
        ) from error


def write_ledger(path: Path, rows: pa.Table) -> None:
    """Writes the whole ledger."""
    with publish(path) as temporary:
        pq.write_table(rows, temporary, compression="zstd")


def removed_hashes(ledger: pa.Table) -> pa.Table:
    """The distinct pairs of perceptual hash and radius in a ledger, in order."""
    rows = ledger.filter(pc.equal(ledger["kind"], "phash")).select(["phash", "radius"])
    return rows.group_by(["phash", "radius"]).aggregate([]).sort_by([("phash", "ascending"), ("radius", "ascending")])


class RemovedRows:
    """Recognises removed rows of metadata, by uid, URL or host."""

    def __init__(self, ledger: pa.Table) -> None:
        self._digests = frozenset(ledger["digest"].drop_null().to_pylist())

    def __contains__(self, row: tuple[str | None, str | None]) -> bool:
        """Whether (URL, caption) was removed."""
        url, caption = (row[0] or "").strip(), row[1] or ""
        labels = host_of(url).split(".")
        keys: list[tuple[Kind, str]] = [("url", url), ("uid", uid_of(url, caption))]
        keys += [("host", ".".join(labels[begin:])) for begin in range(len(labels))]
        return bool(self._digests) and any(key_digest(kind, value) in self._digests for kind, value in keys)


@lru_cache(maxsize=1)
def refused_images(path: Path | None) -> frozenset[str]:
    """Digests of the sha256 of removed images."""
    if path is None:
        return frozenset()
    rows = read_ledger(path)
    return frozenset(rows.filter(pc.equal(rows["kind"], "sha256"))["digest"].to_pylist())
