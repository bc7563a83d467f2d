"""Writes latents/info.json, with which training checks a dataset's latents."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from sdtrain.dataset.config import EncodeConfig
from sdtrain.dataset.files import numbered_files, one_process_at_a_time, publish
from sdtrain.dataset.layout import DatasetDir
from sdtrain.encode.text import describe_text
from sdtrain.errors import UserError
from sdtrain.formats.digests import vae_digest
from sdtrain.images.crops import Size, bucket_sizes

SCHEMA_VERSION = 1
NORMALISATION = "x / 127.5 - 1"
"""The VAE's input for pixels 0..255: forgetting it spoils latents without any error."""
CHECK_KEY = "sdtrain.check"
"""In the tables' metadata, JSON: how well the checked latents reproduce their images."""
VAE_KEY = "sdtrain.vae_sha256"
"""In the tables' metadata: digest of the VAE that encoded the shard."""
TEXT_KEY = "sdtrain.text_encoder_sha256"
"""In the tables' metadata: digest of the text encoder that made the shard's embeddings; absent if it has none."""
ROWS_KEY = "sdtrain.rows_sha256"
"""In the tables' metadata: digest of the rows, so that the footer identifies the table."""
SIZES_KEY = "sdtrain.samples_of_size"
"""In the tables' metadata, JSON: the number of rows of each size in latents/info.json."""


def sizes_px(config: EncodeConfig) -> list[Size]:
    """Width and height of the VAE's input: one square, unless there are buckets."""
    if config.bucket_step_px:
        return bucket_sizes(config.resolution, config.bucket_step_px, config.bucket_max_aspect)
    return list(config.buckets) or [(config.resolution, config.resolution)]


def vae_digest_in(dataset: DatasetDir, name: str) -> str:
    """The digest under which a dataset knows a VAE; an earlier version's stays, so nothing is encoded again.

    UserError if there is no such VAE.
    """
    recorded, digest = _recorded(dataset.latents_info), vae_digest(name)
    return digest if recorded in (None, digest) else _known_digest(name, recorded, digest)


def _recorded(path: Path) -> str | None:
    try:
        digest = json.loads(path.read_text()).get("vae_sha256")
    except (OSError, ValueError, AttributeError):
        return None  # not there yet, or damaged: the next shard writes it again
    return digest if isinstance(digest, str) else None


@lru_cache(maxsize=4)
def _known_digest(name: str, recorded: str, digest: str) -> str:
    from sdtrain.formats.frozen import recorded_vae_digest  # late, because it imports torch

    return recorded_vae_digest(name, recorded)


def latents_info(dataset: DatasetDir, config: EncodeConfig) -> dict[str, Any]:
    """The content of latents/info.json."""
    from sdtrain.formats.frozen import vae_scaling_factor

    sizes = sizes_px(config)
    content = {
        "schema_version": SCHEMA_VERSION,
        "vae": config.vae,
        "vae_sha256": vae_digest_in(dataset, config.vae),
        "scaling_factor": vae_scaling_factor(config.vae),
        "resolution": config.resolution,
        "normalisation": NORMALISATION,
        "resize": f"shorter side, bicubic, {_crops(config)}",
        "content": "posterior mean and log-variance, unscaled",
        "dtype": "float16",
    }
    if config.precision != "fp32":
        content["precision"] = config.precision
    if config.num_crops > 1:
        content["num_crops"] = config.num_crops
    if sizes != [(config.resolution, config.resolution)]:
        content["buckets"] = sizes
    if config.text_embeddings != "none":
        content["text_embeddings"] = describe_text(config.text_encoder, config.text_embeddings)
    return content


def _crops(config: EncodeConfig) -> str:
    if config.num_crops > 1:
        return "random crops"
    return f"{config.crop} crop"


def describe_rows(*columns: Sequence[Any]) -> str:
    """Digest of a table's columns: uid, caption, offset, and the lists of captions if there are any."""
    content = json.dumps([list(column) for column in columns], ensure_ascii=False)
    return hashlib.sha256(content.encode()).hexdigest()


def write_info(dataset: DatasetDir, config: EncodeConfig, shard: int) -> None:
    """Writes latents/info.json once a shard's table is there, with the decode quality of the first finished shard."""
    with one_process_at_a_time(dataset.latents_info.parent):
        quality = _quality(_first_table(dataset, shard))
        content = latents_info(dataset, config) | ({"check": quality} if quality else {})
        with publish(dataset.latents_info) as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n")


def _first_table(dataset: DatasetDir, shard: int) -> Path:
    """The first shard's table of those on disk, one of which is `shard`'s.

    Listing them for every shard would make the cost of all quadratic; the shard recorded before was the first then.
    """
    if (first := dataset.latents_table(0)).exists():
        return first
    recorded = _recorded_first(dataset.latents_info)
    if recorded is not None and dataset.latents_table(recorded).exists():
        return dataset.latents_table(min(recorded, shard))
    return next(iter(numbered_files(first.parent, ".parquet").values()), dataset.latents_table(shard))


def _recorded_first(path: Path) -> int | None:
    try:
        return int(json.loads(path.read_text())["check"]["shard"])
    except (OSError, ValueError, TypeError, KeyError):
        return None  # not there yet, damaged, or the first one had nothing to check


def _quality(table: Path) -> dict[str, Any] | None:
    if not table.exists():
        return None
    stated = (pq.read_schema(table).metadata or {}).get(CHECK_KEY.encode())
    return {"shard": table.stem, **json.loads(stated)} if stated else None


def require_latents(root: Path) -> None:
    """Raises UserError if the dataset has no latents."""
    if not DatasetDir(root).latents_info.exists():
        raise no_latents(root)


def no_latents(root: Path) -> UserError:
    """The error for a dataset that has not been encoded."""
    return UserError(f"There are no latents in {root / 'latents'}: run `make demo` first, or pass --data DIR.")
