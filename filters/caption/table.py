"""The tables of captions: one row for each caption of an image, and how removed samples leave them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from filters.recipe import Recipe
from sdtrain.dataset.files import publish, read_parquet
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.manifest import read_entry
from sdtrain.dataset.rewriting import Removed, Rewriting, described_again
from sdtrain.dataset.shard_report import ShardReport
from sdtrain.models.clip_tokens import count_tokens

SCHEMA = pa.schema(
    [
        ("uid", pa.string()),
        ("source", pa.string()),
        ("text", pa.string()),
        ("num_tokens", pa.int32()),  # of CLIP, with the start and the end token: all is read up to 77
        ("similarity", pa.float32()),
        ("origin_uid", pa.string()),
        ("pixels", pa.uint64()),  # of the image, the beginning of their sha256: whether an answer is still about them
    ]
)


@dataclass(frozen=True, slots=True)
class Caption:
    """One caption of an image.

    Attributes:
        uid: the image's.
        source: `alt`, or the name of the prompt that a network answered.
        origin_uid: the row that the text comes from: the image's own, or a duplicate's.
        similarity: CLIP's cosine between image and text; None if it was not measured.
    """

    uid: str
    source: str
    text: str
    origin_uid: str
    similarity: float | None = None


def write_captions(
    path: Path,
    captions: Iterable[Caption],
    described: Mapping[str, str] | None = None,
    pixels: Mapping[str, int] | None = None,
) -> None:
    """Writes a shard's captions, of each image in turn; an empty text is none, and a text of one image counts once.

    `described` goes into the file's metadata, under `sdtrain.caption.`; `pixels` are by uid.
    """
    schema = SCHEMA.with_metadata({f"sdtrain.caption.{name}": value for name, value in (described or {}).items()})
    seen = set[tuple[str, str]]()
    columns: dict[str, list[object]] = {name: [] for name in SCHEMA.names if name not in ("num_tokens", "pixels")}
    for caption in captions:
        identity = caption.uid, caption.text
        if caption.text.strip() and identity not in seen:
            seen.add(identity)
            for name, values in columns.items():
                values.append(getattr(caption, name))
    texts = pa.array(columns["text"], pa.string())
    of_images = [(pixels or {}).get(str(uid)) for uid in columns["uid"]]
    counted = {**columns, "text": texts, "num_tokens": count_tokens(texts.to_pylist()), "pixels": of_images}
    with publish(path) as temporary:
        pq.write_table(pa.table([counted[name] for name in SCHEMA.names], schema), temporary, compression="zstd")


def described_in(path: Path) -> dict[str, str]:
    """What a table of captions says of how they came to be (`write_captions`)."""
    found, prefix = pq.read_schema(path).metadata or {}, b"sdtrain.caption."
    return {
        name.removeprefix(prefix).decode(): value.decode() for name, value in found.items() if name.startswith(prefix)
    }


def _drop(dataset: DatasetDir, recipe: Recipe, shard: int, removed: Removed) -> None:
    if not (removed.uids or removed.origins):
        return
    rows = read_parquet(removed.table)
    gone = pa.array(sorted({*removed.uids, *removed.origins}), pa.string())
    is_gone = pc.or_(*(pc.is_in(rows[name], value_set=gone) for name in ("uid", "origin_uid")))
    with publish(removed.table) as temporary:
        pq.write_table(rows.filter(pc.invert(is_gone)), temporary, compression="zstd")


def _recount(dataset: DatasetDir, entry: ShardReport, tables: Sequence[Path]) -> ShardReport:
    scored = read_entry(dataset, "score", entry.shard)  # counts images, some of which may have no caption
    num = scored.num_out if scored else entry.num_out
    return described_again(dataset, entry, {"num_in": num, "num_out": num})


IN_CAPTIONS: Rewriting[Recipe] = Rewriting(
    origins={"origin_uid": "origin_uid"}, has_tar=False, drop=_drop, recount=_recount
)
