"""DEDUP: scores -> groups of duplicates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from filters.dedup.columns import Images
from filters.dedup.levels import LEVELS, Found, group_images
from filters.dedup.removal import recount, regroup
from filters.recipe import Recipe
from sdtrain.dataset.files import publish, read_parquet, scratch
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.manifest import describe_outputs, require_entries, selected_shards
from sdtrain.dataset.rewriting import Rewriting
from sdtrain.dataset.shard_report import ShardReport, fingerprint
from sdtrain.dataset.stage import Needs, Openers, Stage, Table, always_on, no_openers, nothing_beside, one_shard
from sdtrain.dataset.tables.columns import schema_of
from sdtrain.dataset.work import WORK
from sdtrain.errors import UserError
from sdtrain.images.miniature import VERSION as MINIATURE_VERSION

_PREVIEWED = [level for level in LEVELS if level not in ("altered", "copied")]  # which need columns of their own
_MINIATURE = b"sdtrain.miniature"  # SCORE's record of the version
# SCORE's records of the embeddings' networks.
_NETWORKS = {"embedding": (b"sdtrain.clip_model", b"sdtrain.clip_digest"), "sscd_embedding": (b"sdtrain.sscd_digest",)}


def scored_images(dataset: DatasetDir) -> Images:
    """Returns the decodable images with SCORE's results; `UserError` if networks differ, or a table is missing."""
    shards = list(selected_shards(dataset))
    num = sum(entry.num_out for entry in require_entries(dataset, "score", shards))
    # Of each schema only this is kept: whole it takes about 10 kB.
    kinds = {_kind(schema_of(dataset.scores(shard))) for shard in shards}
    has_miniatures = {kind.miniature for kind in kinds} == {MINIATURE_VERSION.encode()}
    has_clip = _are_of_one_network(dataset, "CLIP", {kind.clip for kind in kinds})
    has_sscd = _are_of_one_network(dataset, "SSCD", {kind.sscd for kind in kinds})
    return Images(partial(_read, dataset, shards), num, has_clip, has_miniatures, has_sscd)


_Network = tuple[bytes | None, ...]


class _Kind(NamedTuple):
    """Whose a shard's optional columns are; None without the column."""

    clip: _Network | None
    sscd: _Network | None
    miniature: bytes | None


def _kind(schema: pa.Schema) -> _Kind:
    described = schema.metadata or {}
    clip, sscd = (
        tuple(described.get(name) for name in names) if column in schema.names else None
        for column, names in _NETWORKS.items()
    )
    return _Kind(clip, sscd, described.get(_MINIATURE) if "miniature" in schema.names else None)


def _are_of_one_network(dataset: DatasetDir, name: str, networks: set[_Network | None]) -> bool:
    """Returns whether all shards have embeddings; raises `UserError` if they cannot be compared."""
    if not networks or None in networks:
        return False
    if len(networks) > 1:
        raise UserError(
            f"The embeddings in {dataset.root / 'scores'} are of different {name} networks or weights, which cannot be "
            "compared. Run the build again: it scores again the shards that are not of the recipe."
        )
    return True


def check_decoders(dataset: DatasetDir) -> None:
    """Raises `UserError` if both CPU and GPU decoded shards, whose digests and hashes cannot be compared."""
    schemas = (schema_of(dataset.scores(shard)) for shard in selected_shards(dataset))
    if len({(schema.metadata or {}).get(b"sdtrain.decode", b"cpu") for schema in schemas}) > 1:
        raise UserError(
            f"Some shards in {dataset.root / 'scores'} were decoded by the CPU and others by a GPU, whose pixels "
            "differ, which hides duplicates. Set score.decode to cpu or gpu, and run the build again: it scores them "
            "again."
        )


def _read(dataset: DatasetDir, shards: Sequence[int], columns: Sequence[str]) -> Iterator[pa.Table]:
    for shard in shards:
        own = [name for name in columns if name != "sha256"]
        table = read_parquet(dataset.scores(shard), list(dict.fromkeys([*own, "uid", "reason"])))
        table = table.filter(pc.is_null(table["reason"]))
        if "sha256" in columns:  # of the original bytes, which only the download saw
            images = read_parquet(dataset.images_table(shard), ["uid", "sha256"])
            places = pc.index_in(table["uid"], value_set=images["uid"])
            table = table.append_column("sha256", images["sha256"].take(places))
        yield table.select(list(columns))


def _remarks(found: Found) -> list[str]:
    if not found.removed:
        return []
    counted = ", ".join(f"{level} {number:,}" for level, number in found.removed.items())
    others = [level for level in _PREVIEWED if level not in found.removed]
    unknown = f"; {' and '.join(others)} not counted" if others else ""
    return [f"of {found.num_images:,} images, each level of duplicates would drop: {counted}{unknown}"]


def _shards(dataset: DatasetDir, recipe: Recipe) -> list[int]:
    return [0]


def _fingerprint(dataset: DatasetDir, recipe: Recipe, shard: int) -> str:
    inputs = require_entries(dataset, "score", selected_shards(dataset))
    return fingerprint("dedup/2", recipe.duplicates.described(recipe.score.sscd_weights is not None), inputs)


def _run(dataset: DatasetDir, recipe: Recipe, shards: Sequence[int]) -> Iterator[ShardReport]:
    images = scored_images(dataset)
    if recipe.duplicates.level != "off":
        check_decoders(dataset)
    with scratch(dataset.root, "dedup") as folder, publish(dataset.duplicates) as temporary:
        found = group_images(images, recipe.duplicates, folder, temporary)
    yield ShardReport(
        stage="dedup",
        shard=0,
        num_in=images.num,
        num_out=images.num - sum(found.dropped.values()),
        dropped=found.dropped,
        outputs=describe_outputs(dataset, [dataset.duplicates]),
        notes=_remarks(found),
    )


def _path(dataset: DatasetDir, shard: int) -> Path:
    return dataset.duplicates


def _sized(recipe: Recipe, num_rows: int) -> Openers:
    compared = {"copied", "semantic"} & set(recipe.duplicates.searched(recipe.score.sscd_weights is not None))
    return {"duplicates.level": partial(_check_clusters, recipe, num_rows)} if compared else {}


def _check_clusters(recipe: Recipe, num_rows: int) -> str:
    from filters.dedup.clusters import load_faiss, num_clusters_for

    num_clusters = num_clusters_for(num_rows, recipe.duplicates.num_clusters)
    if num_clusters > 1:
        load_faiss(f"duplicates.level: {recipe.duplicates.level}, for so many images,")
    return f"{recipe.duplicates.level}, {num_clusters:,} clusters"


DEDUP: Stage[Recipe] = Stage(
    *("dedup", _shards, _fingerprint, _run),
    is_on=always_on,
    inputs={"score": "all shards", "download": "all shards"},
    planned_by=None,
    num_shards=one_shard,
    beside=nothing_beside,
    table=Table(
        view="duplicates",
        comment="Images that are duplicates of one another: those with one group_id",
        columns=dict.fromkeys(("uid", "group_id", "kind"), "VARCHAR"),
        path=_path,
        rewriting=Rewriting(origins={}, has_tar=False, drop=regroup, recount=recount),
    ),
    drops=None,  # DECIDE chooses which of a group stays
    uses_gpu=False,
    needs=Needs(files=no_openers, networks=no_openers, sized=_sized),
    work=WORK["dedup"],
)
