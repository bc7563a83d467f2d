"""DEDUP: which pictures are copies of one another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from filters.recipe import Recipe
from sdtrain.data.dataset import DatasetDir
from sdtrain.data.files import publish
from sdtrain.data.manifest import ShardReport, describe_outputs, fingerprint, require_entry
from sdtrain.data.selection import selected_shards
from sdtrain.data.stage import Stage

# Largest difference (0 to 255) between the 4x4 colour thumbnails of copies. The perceptual hash sees brightness only,
# so a red and a blue disc look alike to it; recompressed and resized copies differ by 3 or less.
MAX_COLOR_DIFFERENCE = 16
_HASH_BITS = 64
_CHUNK_PAIRS = 1 << 20
_TABLE = pa.schema([("uid", pa.string()), ("group_id", pa.string()), ("kind", pa.string())])

Pairs = NDArray[np.int64]


def exact_pairs(digests: Sequence[str] | NDArray[np.void]) -> Pairs:
    """(P, 2) index pairs (first, other) that link each picture to the first of the same digest."""
    _, first, group = np.unique(np.asarray(digests), return_index=True, return_inverse=True)
    linked = np.stack([first[group], np.arange(len(digests))], axis=1).astype(np.int64)
    return linked[linked[:, 0] != linked[:, 1]]


def perceptual_pairs(hashes: NDArray[np.uint64], radius: int) -> Pairs:
    """(P, 2) index pairs whose 64-bit hashes differ in at most `radius` bits; none is missed.

    Two such hashes agree in at least one of radius + 1 bands of bits (pigeonhole principle), so only pictures that
    share a band are compared: Manku et al., "Detecting Near-Duplicates for Web Crawling", WWW 2007.
    """
    edges = np.linspace(0, _HASH_BITS, radius + 2).astype(int)
    num, found = max(1, len(hashes)), [np.empty(0, np.int64)]
    for low, high in pairwise(edges.tolist()):
        band = (hashes >> np.uint64(low)) & np.uint64((1 << (high - low)) - 1)
        for pairs in _pairs_within_groups(band):
            distance = np.bitwise_count(hashes[pairs[:, 0]] ^ hashes[pairs[:, 1]])
            close = pairs[distance <= radius]
            found.append(close[:, 0] * num + close[:, 1])  # one number a pair: those sort faster than rows
    codes = np.unique(np.concatenate(found))
    return np.stack([codes // num, codes % num], axis=1)


def alike_pairs(hashes: NDArray[np.uint64], colors: NDArray[np.uint8], radius: int) -> Pairs:
    """(P, 2) index pairs that link pictures which look alike: hashes within `radius`, and colours agree.

    Not all such pairs, but enough to connect what all of them connect. Blank pictures hash alike whatever their colour,
    and come by the thousand: those with equal colours are linked to the first of them, which alone is compared with
    others; pictures of one hash are linked as a tree; and only different hashes are compared bit by bit. So memory
    grows with the number of pictures and not with its square.

    Args:
        hashes: (N,) perceptual hashes.
        colors: (N, C) thumbnails' channel values.
        radius: largest number of differing bits.
    """
    seen = np.concatenate([hashes.view(np.uint8).reshape(len(hashes), -1), colors], axis=1)
    equal = exact_pairs(np.ascontiguousarray(seen).view(f"V{seen.shape[1]}").ravel())
    alone = np.setdiff1d(np.arange(len(hashes)), equal[:, 1])
    order = alone[np.argsort(hashes[alone], kind="stable")]
    distinct, starts, counts = np.unique(hashes[order], return_index=True, return_counts=True)
    members = [order[s : s + c] for s, c in zip(starts[counts > 1], counts[counts > 1], strict=True)]
    links = [equal, *(_tree(group, colors) for group in members)]
    labels = _components(len(hashes), np.concatenate(links))

    near = perceptual_pairs(distinct, radius)
    single = (counts[near] == 1).all(axis=1)
    pairs = order[starts[near[single]]]
    links.append(pairs[_agree(colors[pairs[:, 0]], colors[pairs[:, 1]])])
    for some, others in near[~single]:
        few, many = sorted((order[starts[h] : starts[h] + counts[h]] for h in (some, others)), key=len)
        links += [_bridges(picture, many, colors, labels) for picture in few]
    return np.concatenate(links)


def _agree(colors: NDArray[np.uint8], others: NDArray[np.uint8]) -> NDArray[np.bool_]:
    difference = np.maximum(colors, others) - np.minimum(colors, others)
    agree: NDArray[np.bool_] = difference.max(axis=-1, initial=0) <= MAX_COLOR_DIFFERENCE
    return agree


def _tree(members: NDArray[np.int64], colors: NDArray[np.uint8]) -> Pairs:
    """Links between members whose colours agree, one less than there are members in each connected set."""
    links, reached, waiting = [np.empty((0, 2), np.int64)], list[int](), members
    while len(waiting):
        if not reached:
            reached, waiting = [int(waiting[0])], waiting[1:]
        picture = reached.pop()
        agree = _agree(colors[waiting], colors[picture])
        if agree.any():
            found, waiting = waiting[agree], waiting[~agree]
            links.append(_star(picture, found))
            reached += found.tolist()
    return np.concatenate(links)


def _bridges(picture: int, others: NDArray[np.int64], colors: NDArray[np.uint8], labels: NDArray[np.int64]) -> Pairs:
    """Links from a picture to one other of each connected set in which one agrees with it."""
    agreeing = others[_agree(colors[others], colors[picture])]
    return _star(picture, agreeing[np.unique(labels[agreeing], return_index=True)[1]])


def _star(center: int, others: NDArray[np.int64]) -> Pairs:
    return np.stack([np.full_like(others, center), others], axis=1)


def _pairs_within_groups(band: NDArray[np.uint64]) -> Iterator[Pairs]:
    """All pairs of positions with equal values, in pieces of bounded size."""
    order = np.argsort(band, kind="stable")
    ordered = band[order]
    same = np.arange(len(band))
    # The n-th neighbour to the right, for growing n: only where the one before was equal can this one be.
    for distance in range(1, len(band)):
        same = same[same < len(band) - distance]
        same = same[ordered[same + distance] == ordered[same]]
        if not len(same):
            return
        for start in range(0, len(same), _CHUNK_PAIRS):
            part = same[start : start + _CHUNK_PAIRS]
            yield np.sort(np.stack([order[part], order[part + distance]], axis=1), axis=1)


def group_pictures(pictures: pa.Table, level: str, radius: int) -> pa.Table:
    """The groups of copies among pictures.

    Args:
        pictures: uid, pixel_sha256, phash, thumbnail (48 bytes), sorted by uid.
        level: `off`, `exact` or `perceptual` (which includes exact copies).
        radius: largest distance of perceptual hashes.

    Returns:
        uid, group_id (the smallest uid of the group), kind (`exact` or `perceptual`), for groups of two and more.
    """
    uids = np.asarray(pictures["uid"].to_pylist(), dtype=object)
    if level == "off" or len(uids) < 2:
        return _TABLE.empty_table()
    exact = exact_pairs(pictures["pixel_sha256"].to_pylist())
    near = np.empty((0, 2), np.int64)
    if level == "perceptual":
        hashes = pictures["phash"].to_numpy().view(np.uint64)
        near = alike_pairs(hashes, _colors(pictures["thumbnail"]), radius)
    labels = _components(len(uids), np.concatenate([exact, near]))
    sizes, copies = np.bincount(labels), np.zeros(len(uids), bool)
    copies[exact.ravel()] = True
    # Sorted by uid, so the first of a component has its smallest uid.
    first_of = np.unique(labels, return_index=True)[1]
    members = np.flatnonzero(sizes[labels] > 1)
    kinds = np.where(copies[members], "exact", "perceptual")
    return pa.table([uids[members].tolist(), uids[first_of[labels[members]]].tolist(), kinds.tolist()], schema=_TABLE)


def _colors(thumbnails: pa.ChunkedArray) -> NDArray[np.uint8]:
    return np.frombuffer(b"".join(thumbnails.to_pylist()), np.uint8).reshape(len(thumbnails), -1)


def _components(num_nodes: int, pairs: Pairs) -> NDArray[np.int64]:
    edges = coo_array((np.ones(len(pairs), bool), (pairs[:, 0], pairs[:, 1])), shape=(num_nodes, num_nodes))
    labels: NDArray[np.int64] = connected_components(edges, directed=False)[1]
    return labels


def _shards(dataset: DatasetDir, recipe: Recipe) -> list[int]:
    return [0]


def _score_shards(dataset: DatasetDir) -> list[int]:
    return list(selected_shards(dataset))


def _fingerprint(dataset: DatasetDir, recipe: Recipe, shard: int) -> str:
    inputs = [require_entry(dataset, "score", shard) for shard in _score_shards(dataset)]
    return fingerprint("dedup/1", recipe.duplicates.model_dump(mode="json"), inputs)


def _run(dataset: DatasetDir, recipe: Recipe, shards: Sequence[int]) -> Iterator[ShardReport]:
    columns = ["uid", "pixel_sha256", "phash", "thumbnail", "reason"]
    tables = [pq.read_table(dataset.scores(shard), columns=columns) for shard in _score_shards(dataset)]
    pictures = pa.concat_tables(tables)
    pictures = pictures.filter(pc.is_null(pictures["reason"])).sort_by("uid")
    groups = group_pictures(pictures, recipe.duplicates.level, recipe.duplicates.radius)
    with publish(dataset.duplicates) as temporary:
        pq.write_table(groups, temporary, compression="zstd")
    dropped = _dropped(groups)
    outputs = describe_outputs(dataset, [dataset.duplicates])
    num_out = len(pictures) - sum(dropped.values())
    yield ShardReport(stage="dedup", shard=0, num_in=len(pictures), num_out=num_out, dropped=dropped, outputs=outputs)


def _dropped(groups: pa.Table) -> dict[str, int]:
    """How many pictures of each kind go if one of every group stays."""
    counts: dict[str, int] = {}
    for kinds in groups.group_by("group_id").aggregate([("kind", "list")])["kind_list"].to_pylist():
        for kind in sorted(kinds)[1:]:
            counts[kind] = counts.get(kind, 0) + 1
    return dict(sorted(counts.items()))


DEDUP: Stage[Recipe] = Stage("dedup", _shards, _fingerprint, _run)
