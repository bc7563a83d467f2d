"""CAPTION: decoded images -> all captions of each, with their sources."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pyarrow.compute as pc

from filters.caption.duplicates import Texts, duplicate_texts
from filters.caption.table import IN_CAPTIONS, Caption, write_captions
from filters.recipe import Recipe
from sdtrain.dataset.files import read_parquet
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.manifest import describe_outputs, num_selected_shards, require_entry, selected_shards
from sdtrain.dataset.shard_report import ShardReport, fingerprint
from sdtrain.dataset.stage import NOTHING, Stage, Table, nothing_beside
from sdtrain.pack.captions import ALT


def caption_shard(dataset: DatasetDir, recipe: Recipe, shard: int) -> ShardReport:
    """Writes the captions of one shard's decoded images, in the order of their keys.

    All of them, as only DECIDE knows which of a group of duplicates stays: whichever it is has the texts of the others.
    """
    images, config = decoded_images(dataset, shard), recipe.caption
    others = duplicate_texts(dataset, config, shard) if config.from_duplicates else {}
    captions = (caption for image in images for caption in _alt_texts(image, others.get(image["uid"], [])))
    write_captions(dataset.captions_table(shard), captions)
    outputs = describe_outputs(dataset, [dataset.captions_table(shard)])
    return ShardReport(stage="caption", shard=shard, num_in=len(images), num_out=len(images), outputs=outputs)


def decoded_images(dataset: DatasetDir, shard: int) -> list[dict[str, str]]:
    """Uid, key and caption of a shard's images that SCORE could decode, in the order of their keys."""
    scores = read_parquet(dataset.scores(shard), ["uid", "reason"])
    decoded = scores.filter(pc.is_null(scores["reason"]))["uid"]
    rows = read_parquet(dataset.images_table(shard), ["uid", "key", "caption"])
    images: list[dict[str, str]] = rows.filter(pc.is_in(rows["uid"], value_set=decoded)).to_pylist()
    return sorted(images, key=lambda image: image["key"])


def _alt_texts(image: dict[str, str], others: Texts) -> Iterator[Caption]:
    uid = image["uid"]
    yield Caption(uid, ALT, image["caption"] or "", uid)
    for other in others:
        yield Caption(uid, ALT, other["text"], other["origin"])


def _is_on(recipe: Recipe) -> bool:
    return recipe.caption.is_on


def _shards(dataset: DatasetDir, recipe: Recipe) -> list[int]:
    return list(selected_shards(dataset))


def _fingerprint(dataset: DatasetDir, recipe: Recipe, shard: int) -> str:
    grouped = require_entry(dataset, "dedup", 0)
    images = [require_entry(dataset, stage, shard) for stage in ("download", "score")]
    # The groups' fingerprint tells of all shards, from which texts of duplicates come.
    config = recipe.caption.described() | {"dedup": grouped.fingerprint}
    return fingerprint("caption/1", config, [*images, grouped])


def _run(dataset: DatasetDir, recipe: Recipe, shards: Sequence[int]) -> Iterator[ShardReport]:
    for shard in shards:
        yield caption_shard(dataset, recipe, shard)


CAPTION: Stage[Recipe] = Stage(
    *("caption", _shards, _fingerprint, _run),
    is_on=_is_on,
    inputs=dict.fromkeys(("download", "score", "dedup"), "all shards"),
    planned_by=None,
    num_shards=num_selected_shards,
    beside=nothing_beside,
    table=Table(
        view="captions",
        comment="All captions of the images, each with its source and the row that it comes from",
        columns={
            **dict.fromkeys(("uid", "source", "text"), "VARCHAR"),
            "num_tokens": "INTEGER",
            "similarity": "FLOAT",
            "origin_uid": "VARCHAR",
            "shard": "INTEGER",
        },
        path=DatasetDir.captions_table,
        rewriting=IN_CAPTIONS,
    ),
    drops=None,
    uses_gpu=False,
    needs=NOTHING,
    work=None,
)
