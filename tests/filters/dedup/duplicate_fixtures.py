"""Images, hashes and embeddings whose copies are known, and a slow search that cannot be wrong."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from scipy.sparse.csgraph import connected_components

from filters.dedup.columns import COLOR_BYTES, Images
from filters.dedup.levels import LEVELS, Found, group_images
from filters.dedup.perceptual import MAX_COLOR_DIFFERENCE
from filters.recipe import DuplicatesConfig
from filters.score.preprocess import pixel_sha256, thumbnail
from sdtrain.images.miniature import MINIATURE_BYTES, SOURCE_PX, miniature
from sdtrain.images.perceptual_hash import perceptual_hash

Groups = dict[int, tuple[int, str]]


def planted_hashes(num: int, seed: int) -> np.ndarray:
    """Random 64-bit hashes, half of which are others with 0 to 20 bits flipped."""
    rng = np.random.default_rng(seed)
    hashes = rng.integers(0, 2**64, num, dtype=np.uint64)
    for i in range(num // 2, num):
        flipped = rng.choice(64, int(rng.integers(0, 21)), replace=False)
        hashes[i] = hashes[int(rng.integers(num // 2))] ^ np.uint64(sum(1 << int(bit) for bit in flipped))
    return hashes


def uid_of(number: int) -> str:
    return f"{number:032x}"


def digest_of(content: object) -> str:
    return hashlib.sha256(repr(content).encode()).hexdigest()


def table_of(images: list[Image.Image]) -> pa.Table:
    """What SCORE finds out about images; image i has uid i, and its file is like no other."""
    return pa.table({
        "uid": [uid_of(i) for i in range(len(images))],
        "pixel_sha256": [pixel_sha256(p) for p in images],
        "sha256": pa.array([None] * len(images), pa.string()),
        "phash": pa.array([perceptual_hash(p) for p in images], pa.int64()),
        "thumbnail": [thumbnail(p) for p in images],
        "miniature": pa.array([miniature(squashed(p)) for p in images], pa.binary(MINIATURE_BYTES)),
    })  # fmt: skip


def squashed(image: Image.Image) -> Image.Image:
    """The view that miniatures are made of."""
    return image.resize((SOURCE_PX, SOURCE_PX), Image.Resampling.BILINEAR)


def looks_table(hashes: np.ndarray, colors: np.ndarray, pixels: Any = None, files: Any = None) -> pa.Table:
    """Images with these hashes, channel values (N, 48), and contents of pixels and files; else all different."""
    num = len(hashes)
    return pa.table({
        "uid": [uid_of(i) for i in range(num)],
        "pixel_sha256": pa.array([digest_of(p) for p in (range(num) if pixels is None else pixels)], pa.string()),
        "sha256": pa.array([f if f is None else digest_of(f) for f in files or [None] * num], pa.string()),
        "phash": pa.array(np.asarray(hashes, np.uint64).view(np.int64)),
        "thumbnail": pa.array([row.tobytes() for row in np.asarray(colors, np.uint8)], pa.binary()),
    })  # fmt: skip


def with_embeddings(table: pa.Table, vectors: np.ndarray, column: str = "embedding") -> pa.Table:
    flat = pa.array(np.asarray(vectors, np.float16).ravel())
    return table.append_column(column, pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1]))


def images_of(*tables: pa.Table) -> Images:
    names = tables[0].column_names
    return Images(
        lambda columns: (t.select(list(columns)) for t in tables),
        sum(map(len, tables)),
        has_embeddings="embedding" in names,
        has_miniatures="miniature" in names,
        has_sscd="sscd_embedding" in names,
    )


def search(*tables: pa.Table, **settings: Any) -> tuple[Found, list[dict[str, str]]]:
    """What is found among the images of some tables, and the rows that are written."""
    config = DuplicatesConfig.model_validate({"level": "perceptual"} | settings)
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "duplicates.parquet"
        found = group_images(images_of(*tables), config, Path(folder), target)
        return found, pq.read_table(target).to_pylist()


def groups_of(*tables: pa.Table, **settings: Any) -> Groups:
    """Image number -> (number of its group's first, kind)."""
    rows = search(*tables, **settings)[1]
    return {int(row["uid"], 16): (int(row["group_id"], 16), row["kind"]) for row in rows}


def close_hashes(hashes: np.ndarray, radius: int) -> np.ndarray:
    """(N, N) whether hashes are within the radius, by comparing all with all."""
    return np.bitwise_count(hashes[:, None] ^ hashes[None, :]) <= radius


def alike(hashes: np.ndarray, colors: np.ndarray, radius: int) -> np.ndarray:
    """(N, N) whether images look alike, by comparing all with all."""
    difference = np.abs(colors[:, None].astype(int) - colors[None, :]).max(axis=2)
    return close_hashes(hashes, radius) & (difference <= MAX_COLOR_DIFFERENCE)


def groups_by_brute_force(relations: list[np.ndarray]) -> Groups:
    """What `groups_of` must give, from one (N, N) relation a level: but for altered and copied images, in order."""
    kinds, together = dict[int, str](), np.eye(len(relations[0]), dtype=bool)
    levels = [level for level in LEVELS if level not in ("altered", "copied")]
    for level, relation in zip(levels, relations, strict=False):
        together |= relation
        labels = connected_components(together, directed=False)[1]
        for i in np.flatnonzero(np.bincount(labels)[labels] > 1).tolist():
            kinds.setdefault(i, level)
    first = {label: i for i, label in reversed(list(enumerate(labels.tolist())))}
    return {i: (first[labels[i]], kind) for i, kind in sorted(kinds.items())}


def distinct_colors(num: int) -> np.ndarray:
    """(num, 48) random channel values; that two agree in all channels is as good as impossible."""
    return np.random.default_rng(0).integers(0, 256, (num, COLOR_BYTES), dtype=np.uint8)
