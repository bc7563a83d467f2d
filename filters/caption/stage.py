"""CAPTION: decoded images -> all captions of each, with their sources."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from filters.caption.duplicates import Texts, duplicate_texts
from filters.caption.generate import SETTING, Generated, generate, weights_of
from filters.caption.table import IN_CAPTIONS, Caption, write_captions
from filters.caption_config import PROMPTS, CaptionConfig, CaptionModelConfig
from filters.recipe import Recipe
from sdtrain.dataset.files import read_parquet
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.manifest import describe_outputs, num_selected_shards, read_entry, require_entry, selected_shards
from sdtrain.dataset.shard_report import ShardReport, fingerprint
from sdtrain.dataset.stage import Needs, Openers, Stage, Table, nothing_beside
from sdtrain.dataset.sync import evict_after
from sdtrain.dataset.work import WORK
from sdtrain.endpoint.answer_log import clear_finished
from sdtrain.endpoint.ask import check_endpoint
from sdtrain.endpoint.images import pixels_of
from sdtrain.pack.captions import ALT

_log = logging.getLogger(__name__)


def caption_shard(dataset: DatasetDir, recipe: Recipe, shard: int) -> ShardReport:
    """Writes the captions of one shard's decoded images, in the order of their keys.

    All of them, as only DECIDE knows which of a group of duplicates stays: whichever it is has the texts of the others.
    """
    images, config = decoded_images(dataset, shard), recipe.caption
    others = duplicate_texts(dataset, config, shard) if config.from_duplicates else {}
    generated = generate(dataset, config, shard, images) if config.is_generated else Generated()
    captions = [caption for image in images for caption in _captions(image, others, generated)]
    metadata = _described(config, generated) if config.is_generated else {}
    pixels = {image["uid"]: image["pixels"] for image in images if image["pixels"] is not None}
    measured = _measured(dataset, recipe, shard, captions, images)
    write_captions(dataset.captions_table(shard), measured, metadata, pixels)
    outputs = describe_outputs(dataset, [dataset.captions_table(shard)])
    counts = {"num_in": len(images), "num_out": len(images)}
    return ShardReport(stage="caption", shard=shard, **counts, outputs=outputs, notes=generated.remarks())


def decoded_images(dataset: DatasetDir, shard: int) -> list[dict[str, Any]]:
    """Uid, key, caption and pixels (`pixels_of`) of a shard's images that SCORE could decode, in their keys' order."""
    pixels = pixels_of(dataset, shard)
    rows = read_parquet(dataset.images_table(shard), ["uid", "key", "caption"]).to_pylist()
    images = [row | {"pixels": pixels[row["uid"]]} for row in rows if row["uid"] in pixels]
    return sorted(images, key=lambda image: str(image["key"]))


def _captions(image: Mapping[str, Any], others: dict[str, Texts], generated: Generated) -> Iterator[Caption]:
    uid = image["uid"]
    yield Caption(uid, ALT, image["caption"] or "", uid)
    for other in others.get(uid, []):
        yield Caption(uid, ALT, other["text"], other["origin"])
    yield from generated.captions.get(uid, [])


def _measured(
    dataset: DatasetDir, recipe: Recipe, shard: int, captions: list[Caption], images: list[dict[str, Any]]
) -> list[Caption]:
    if recipe.score.clip_weights is None or not recipe.caption.is_measured:
        return captions
    from filters.caption.similarity import with_similarity  # would import torch

    return with_similarity(dataset, recipe.score, shard, captions, {image["uid"]: image["key"] for image in images})


def _described(config: CaptionConfig, generated: Generated) -> dict[str, str]:
    """The provenance of generated captions, for the table's metadata."""
    asked = {"settings": json.dumps(config.described()), "model_digest": ", ".join(weights_of(config))}
    network = config.endpoint.model if config.endpoint else config.model.name if config.model else ""
    revision = (config.model.revision if config.model else None) or ""
    return asked | {"model": network, "revision": revision} | generated.described()


def _is_on(recipe: Recipe) -> bool:
    return recipe.caption.is_on


def _shards(dataset: DatasetDir, recipe: Recipe) -> list[int]:
    return list(selected_shards(dataset))


def _fingerprint(dataset: DatasetDir, recipe: Recipe, shard: int) -> str:
    grouped = require_entry(dataset, "dedup", 0)
    images = [require_entry(dataset, stage, shard) for stage in ("download", "score")]
    # The groups' fingerprint tells of all shards, from which texts of duplicates come.
    config = recipe.caption.described() | {"dedup": grouped.fingerprint}
    return fingerprint("caption/1", config, [*images, grouped], weights_of(recipe.caption))


def _run(dataset: DatasetDir, recipe: Recipe, shards: Sequence[int]) -> Iterator[ShardReport]:
    logs = dataset.caption_answers(0).parent.glob("*.jsonl")
    clear_finished(logs, lambda shard: read_entry(dataset, "caption", shard) is not None)
    if recipe.caption.endpoint:
        num_images = sum(require_entry(dataset, "score", shard).num_out for shard in shards)
        _log.warning("caption: %s", _say_requests(recipe.caption, num_images))
    for shard in shards:
        yield caption_shard(dataset, recipe, shard)
        dataset.caption_answers(shard).unlink(missing_ok=True)  # the shard is recorded
        evict_after(dataset, require_entry(dataset, "download", shard), [])


def _files(recipe: Recipe) -> Openers:
    config = recipe.caption.endpoint
    return {SETTING: partial(check_endpoint, config, SETTING)} if config else {}


def _networks(recipe: Recipe) -> Openers:
    config = recipe.caption.model
    return {"caption.model": partial(_load, config)} if config else {}


def _load(config: CaptionModelConfig) -> str:
    from filters.caption.captioner import load_captioner, model_digest

    load_captioner(config)
    return f"{config.name}: {model_digest(config)[:12]}"


def _sized(recipe: Recipe, num_rows: int) -> Openers:
    config = recipe.caption
    return {SETTING: partial(_say_requests, config, num_rows)} if config.endpoint else {}


def _say_requests(config: CaptionConfig, num_images: int) -> str:
    if config.endpoint is None:
        raise AssertionError("without a server nothing is asked")
    num, url = len(config.prompts or PROMPTS), config.endpoint.url
    return f"up to {num_images * num:,} requests to {url}, {num} about each image, which is sent there"


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
            "pixels": "UBIGINT",
            "shard": "INTEGER",
        },
        path=DatasetDir.captions_table,
        rewriting=IN_CAPTIONS,
    ),
    drops=None,
    uses_gpu=True,
    needs=Needs(files=_files, networks=_networks, sized=_sized),
    work=WORK["caption"],
)
