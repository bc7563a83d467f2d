"""Groups of duplicates by level: exact, perceptual, altered, copied and semantic ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from filters.dedup.altered import Limits, Miniatures
from filters.dedup.clusters import MAX_ONE_CLUSTER, load_faiss, num_clusters_for
from filters.dedup.columns import Columns, Images, store_columns
from filters.dedup.ordering import Rows, divide_rows, in_threads
from filters.dedup.perceptual import confirm_all, link_near_duplicates
from filters.dedup.similar import link_similar, similarity_of
from filters.dedup.union_find import Components
from filters.recipe import DuplicatesConfig
from sdtrain.dataset.progress import report_progress
from sdtrain.errors import UserError

LEVELS = ("exact", "perceptual", "altered", "copied", "semantic")
# Up to here, levels beyond the recipe's are searched too, to report what they would drop; those of embeddings only
# while all pairs can be compared.
_MAX_PREVIEW, _MAX_PREVIEW_RADIUS = 1_000_000, 8
_ROWS_AT_ONCE, _MEMORY_MIB = 1 << 17, 1024
_TABLE = pa.schema([("uid", pa.string()), ("group_id", pa.string()), ("kind", pa.string())])
_MEMBERS = pa.schema([("uid", pa.string()), ("root", pa.int64()), ("level", pa.uint8())])
_GROUPED = """
CREATE TABLE groups AS SELECT root, min(uid) AS group_id, min(level) AS level FROM read_parquet($members) GROUP BY root
"""
_IN_ORDER = """
SELECT uid, group_id, $levels[m.level] AS kind FROM read_parquet($members) m JOIN groups USING (root) ORDER BY uid
"""
# The first level's image of each group stays.
_DROPPED = """
SELECT $levels[level] AS kind, sum(num)::BIGINT FROM (
    SELECT level, count(*) AS num FROM read_parquet($members) GROUP BY level
    UNION ALL SELECT level, -count(*) FROM groups GROUP BY level
) GROUP BY level HAVING sum(num) > 0 ORDER BY kind
"""


@dataclass
class Found:
    """The result of a search for duplicates: the number of images dropped if one of each group stays.

    `removed` counts by searched level, `dropped` by kind for the written groups.
    """

    num_images: int
    removed: dict[str, int] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)


def group_images(images: Images, config: DuplicatesConfig, folder: Path, target: Path) -> Found:
    """Writes the groups of duplicates, byte-identical for any order of images.

    Memory holds 8 bytes per image and pieces of bounded size. The rest is memory-mapped in the empty `folder`: up to
    210 bytes per image, plus embeddings if compared, SSCD's eight times. `target` is Parquet sorted by uid, for groups
    of two and more: uid, group_id (the group's smallest uid), kind (the first level at which the image has a
    duplicate). UserError if the level's miniatures or embeddings are not there, or faiss is needed and not installed.
    """
    found, components = Found(images.num), Components(images.num)
    kinds, members = np.zeros(images.num, np.uint8), folder / "members.parquet"
    asked = config.searched(images.has_sscd)
    for level in _search(images, config, folder, components):
        found.removed[level] = components.num_linked
        if level in asked:
            kinds[(kinds == 0) & components.grouped()] = 1 + LEVELS.index(level)
        if asked[-1:] == (level,):
            _write_members(images, kinds, components, members)
    found.dropped = _write_groups(members, folder, target)
    return found


def _search(images: Images, config: DuplicatesConfig, folder: Path, components: Components) -> Iterator[str]:
    """Links the duplicates of each level in turn, yielding the level when done."""
    levels = _levels(images, config)
    if not levels:
        return
    columns = store_columns(images, folder, with_appearance="perceptual" in levels)
    link_exact(columns, components)
    yield "exact"
    limits = Limits(config.altered_agreement, config.overlaid_agreement)
    miniatures = Miniatures.store(images, columns, limits) if "altered" in levels else None
    if "perceptual" in levels:
        confirm = miniatures.confirm if miniatures else confirm_all
        link_near_duplicates(columns, config.radius, components, confirm)
        yield "perceptual"
    if miniatures:
        miniatures.link_altered(components)
        yield "altered"
    for level in ("copied", "semantic"):
        if level in levels:
            link_similar(images, similarity_of(level, config), config, folder, components)
            yield level


def _levels(images: Images, config: DuplicatesConfig) -> Sequence[str]:
    """Returns the requested levels, and cheap ones beyond them.

    UserError if a later level's needs are not met, so that it does not fail after hours of earlier levels.
    """
    asked, levels = config.searched(images.has_sscd), ["exact"]
    few = images.num <= _MAX_PREVIEW and config.radius <= _MAX_PREVIEW_RADIUS
    if "perceptual" in asked or few:
        levels.append("perceptual")
    if "altered" in asked:
        if not images.has_miniatures:
            raise UserError(
                f"duplicates.level: {config.level} compares miniatures, and the scores hold none. Set "
                "score.store_miniatures: true, or duplicates.level to perceptual."
            )
        levels.append("altered")
    one_cluster = num_clusters_for(images.num, config.num_clusters) == 1
    all_pairs = few and one_cluster and images.num <= MAX_ONE_CLUSTER
    if "copied" in asked:
        if not images.has_sscd:
            raise UserError(
                f"duplicates.level: {config.level} compares SSCD's embeddings, and the scores hold none. Set "
                "score.sscd_weights, or duplicates.level to altered or perceptual."
            )
        levels.append("copied")
    elif all_pairs and images.has_sscd and "semantic" not in asked:  # which counts all levels before it
        levels.append("copied")
    if "semantic" in asked:
        if not images.has_embeddings:
            raise UserError(
                f"duplicates.level: {config.level} compares CLIP's embeddings, and the scores hold none. Set "
                "score.store_embeddings: true (and score.clip_weights), or duplicates.level to perceptual."
            )
        levels.append("semantic")
    elif all_pairs and images.has_embeddings:
        levels.append("semantic")
    if not one_cluster and {"copied", "semantic"} & set(asked):
        load_faiss(f"duplicates.level: {config.level}, for so many images,")
    return levels if images.num else ()


def _write_members(images: Images, kinds: NDArray[np.uint8], components: Components, target: Path) -> None:
    start = 0
    with pq.ParquetWriter(target, _MEMBERS) as writer:
        for table in images.read(["uid"]):
            chosen = np.flatnonzero(kinds[start : start + len(table)])
            nodes, start = chosen + start, start + len(table)
            columns = [table["uid"].take(chosen), components.roots(nodes), kinds[nodes]]
            writer.write_table(pa.table(columns, names=_MEMBERS.names).cast(_MEMBERS))


def _write_groups(members: Path, folder: Path, target: Path) -> dict[str, int]:
    """Writes the groups; returns the number of images dropped by kind if the first kind's image of each group stays."""
    with (
        closing(duckdb.connect(folder / "groups.duckdb")) as database,
        pq.ParquetWriter(target, _TABLE, compression="zstd") as writer,
    ):
        if not members.exists():
            return {}
        database.execute("SET memory_limit = ?", [f"{_MEMORY_MIB}MiB"])
        database.execute("SET temp_directory = ?", [str(folder / "spill")])
        values: dict[str, object] = {"members": str(members)}
        database.execute(_GROUPED, values)
        values |= {"levels": list(LEVELS)}
        for table in _equal_pieces(database.execute(_IN_ORDER, values).to_arrow_reader(_ROWS_AT_ONCE)):
            writer.write_table(table.cast(_TABLE))
        return dict(database.execute(_DROPPED, values).fetchall())


def _equal_pieces(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.Table]:
    """Yields tables of `_ROWS_AT_ONCE` rows, and the rest, for row groups that do not depend on threads."""
    waiting, num = list[pa.RecordBatch](), 0
    for batch in batches:
        waiting.append(batch)
        num += len(batch)
        while num >= _ROWS_AT_ONCE:
            table = pa.Table.from_batches(waiting)
            yield table.slice(0, _ROWS_AT_ONCE)
            waiting, num = table.slice(_ROWS_AT_ONCE).to_batches(), num - _ROWS_AT_ONCE
    if num:
        yield pa.Table.from_batches(waiting)


def link_exact(columns: Columns, components: Components) -> None:
    """Links each image to the first with the same digest of pixels or file; decodes no image.

    Equal files seldom have different pixels, but reused shards may hold two different re-encodings of one file.
    """
    for kind in ("pixels", "bytes"):
        pieces = divide_rows(columns.words(f"{kind}0"), columns.words(f"{kind}1"), columns.folder)
        counted = report_progress(pieces, f"dedup: equal {kind}", columns.num, "images", lambda rows: len(rows.nodes))
        for rows in in_threads(Rows.repeated, counted):
            starts = rows.starts_of_runs()
            first = rows.nodes[starts][np.cumsum(starts) - 1]
            linked = (first != rows.nodes) & ((rows.first | rows.second) != 0)  # zero: unknown digest
            components.link(first[linked], rows.nodes[linked])
