"""Packed samples with captions of several sources, as the stages `caption` and `pack` write them."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from sdtrain.dataset.files import publish
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.manifest import describe_outputs, read_entry, write_entry
from sdtrain.dataset.tars import read_samples, write_samples
from sdtrain.download.image_shards import image_location
from sdtrain.pack.captions import OTHERS, describe_sources, others_of

Captions = list[dict[str, str]]


def captions_of(number: int) -> Captions:
    """Every sample's alt text, two more of some, and a `long` one of every third."""
    uid, other = f"{number:032x}", f"{100 + number:032x}"
    captions = [("alt", f"Bild {number}", uid)]
    captions += [("short", f"short {number} {turn}", uid) for turn in "ab"] if number % 2 else []
    captions += [("alt", f"wie {number} anderswo heißt", other)] if number % 2 else []
    captions += [("long", f"a long text of {number}", uid)] if number % 3 == 0 else []
    return [dict(zip(("source", "text", "origin_uid"), caption, strict=True)) for caption in captions]


def add_captions(dataset: DatasetDir) -> DatasetDir:
    """The packed dataset, with these captions in its JSON and tables."""
    for tar in sorted(dataset.packed_tar(0).parent.glob("*.tar")):
        table = tar.with_suffix(".parquet")
        with publish(tar) as temporary:
            written = write_samples(temporary, _captioned(tar))
        rows = [
            row | image_location(place) | {OTHERS: others_of(row["uid"], captions_of(int(row["key"])))}
            for row, place in zip(pq.read_table(table).to_pylist(), written, strict=True)
        ]
        described = describe_sources(captions_of(int(row["key"])) for row in rows)
        pq.write_table(pa.Table.from_pylist(rows).replace_schema_metadata(described), table)
        entry = read_entry(dataset, "pack", int(tar.stem))
        write_entry(dataset, entry.model_copy(update={"outputs": describe_outputs(dataset, [tar, table])}))
    return dataset


def _captioned(tar) -> Iterator[tuple[str, dict[str, bytes]]]:
    for key, members in read_samples(tar):
        sample = json.loads(members["json"]) | {"captions": captions_of(int(key))}
        yield key, members | {"json": json.dumps(sample, ensure_ascii=False, sort_keys=True).encode()}
