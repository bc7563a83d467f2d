"""Planted copies that each level of duplicates finds, and hard negatives that it groups."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from filters.dedup.columns import Images
from filters.dedup.levels import group_images
from filters.recipe import DuplicatesConfig
from filters.score.preprocess import pixel_sha256, thumbnail
from sdtrain.images.miniature import MINIATURE_BYTES, SOURCE_PX, miniature
from sdtrain.images.perceptual_hash import perceptual_hash
from tests.benchmarks.look_alikes import hard_negatives
from tests.benchmarks.planted import CHANGES, base_images

CONFIG, ALTERED_CONFIG = DuplicatesConfig(level="perceptual"), DuplicatesConfig(level="altered")
PROMISED = {"perceptual": tuple(CHANGES)[:2], "altered": tuple(CHANGES)[:5]}
ALTERED = PROMISED["altered"][2:]


def find_planted(
    described: pa.Table, copies: dict[str, pa.Table], config: DuplicatesConfig
) -> tuple[dict[str, float], dict[str, float]]:
    """By change, the share of copies that are found, and the share of grouped images that belong there."""
    recall, precision = dict[str, float](), dict[str, float]()
    for change, changed in copies.items():
        groups = _groups(pa.concat_tables([described, changed]), config)
        num = len(described)
        found = sum(i in groups and groups[i] == groups.get(num + i) for i in range(num))
        right = sum(first == i % num for i, first in groups.items())
        recall[change] = found / num
        precision[change] = right / len(groups) if groups else 1.0
        print(
            f"{config.level:12} {change:24} recall {recall[change]:6.3f}   precision {precision[change]:6.3f}",
            flush=True,
        )
    return recall, precision


def count_negatives(kinds: dict[str, list[Image.Image]], config: DuplicatesConfig) -> dict[str, float]:
    """By kind of look-alikes, the share of different images that are grouped."""
    shares = dict[str, float]()
    for kind, images in kinds.items():
        shares[kind] = len(_groups(described_images(images, 0), config)) / len(images)
        print(f"{config.level:12} {kind:24} wrongly grouped {shares[kind]:6.3f} of {len(images)}", flush=True)
    return shares


def find_among_look_alikes(
    kinds: dict[str, list[Image.Image]], config: DuplicatesConfig
) -> tuple[dict[str, float], dict[str, float]]:
    """By kind, the share of copies that are found among look-alikes, and the share of right pairs in the groups.

    An image has one copy, by one of the three altered changes in turn.
    """
    recall, precision = dict[str, float](), dict[str, float]()
    for kind, images in kinds.items():
        copies = [CHANGES[ALTERED[i % len(ALTERED)]](image) for i, image in enumerate(images)]
        groups, num = _groups(described_images([*images, *copies], 0), config), len(images)
        found = sum(i in groups and groups[i] == groups.get(num + i) for i in range(num))
        num_pairs = sum(size * (size - 1) // 2 for size in Counter(groups.values()).values())
        recall[kind], precision[kind] = found / num, found / num_pairs if num_pairs else 1.0
        print(
            f"{config.level:12} {kind:24} recall {recall[kind]:6.3f}   precision {precision[kind]:6.3f} of pairs",
            flush=True,
        )
    return recall, precision


def described_images(images: Sequence[Image.Image], first: int) -> pa.Table:
    """What SCORE would know of images."""
    return pa.table({
        "uid": [f"{first + i:032x}" for i in range(len(images))],
        "pixel_sha256": [pixel_sha256(p) for p in images],
        "sha256": pa.array([None] * len(images), pa.string()),
        "phash": pa.array([perceptual_hash(p) for p in images], pa.int64()),
        "thumbnail": [thumbnail(p) for p in images],
        "miniature": pa.array([_miniature(p) for p in images], pa.binary(MINIATURE_BYTES)),
    })  # fmt: skip


def _miniature(image: Image.Image) -> bytes:
    return miniature(image.resize((SOURCE_PX, SOURCE_PX), Image.Resampling.BILINEAR))


def _groups(table: pa.Table, config: DuplicatesConfig) -> dict[int, int]:
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "groups.parquet"
        images = Images(lambda columns: iter([table.select(list(columns))]), len(table), has_miniatures=True)
        group_images(images, config, Path(folder), target)
        rows = pq.read_table(target).to_pylist()
    return {int(row["uid"], 16): int(row["group_id"], 16) for row in rows}


def measure_quality(num_scenes: int) -> dict[str, float]:
    """Prints what each level finds of planted copies and groups of hard negatives; returns the means of the levels."""
    images = base_images(num_scenes)
    described = described_images(images, 0)
    copies = {
        change: described_images([make(image) for image in images], len(images)) for change, make in CHANGES.items()
    }
    kinds = hard_negatives(120 if num_scenes >= 400 else 24)
    figures = dict[str, float]()
    for config, suffix in ((CONFIG, ""), (ALTERED_CONFIG, "_altered")):
        recall, precision = find_planted(described, copies, config)
        count_negatives(kinds, config)
        means = {
            "recall": list(recall.values()),
            "recall_promised": [recall[change] for change in PROMISED[config.level]],
            "precision": list(precision.values()),
        }
        figures |= {name + suffix: round(float(np.mean(values)), 3) for name, values in means.items()}
    find_among_look_alikes(kinds, ALTERED_CONFIG)
    return figures
