"""The signatures of reference images, by which they are recognised in a dataset: digests, hash, colours, embedding."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from filters.recipe import ScoreConfig
from filters.score.preprocess import pixel_sha256, thumbnail
from filters.search.index import IndexInfo
from filters.search.search import Encoder
from sdtrain.dataset.files import publish, read_parquet
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.manifest import describe_outputs
from sdtrain.dataset.progress import report_progress
from sdtrain.dataset.shard_report import ShardReport, fingerprint
from sdtrain.dataset.stage import Stage, plain_stage
from sdtrain.errors import UserError
from sdtrain.evaluation.layout import EvaluationDir, write_json
from sdtrain.evaluation.reference import Place, Reference
from sdtrain.images.decode import decode_rgb
from sdtrain.images.perceptual_hash import perceptual_hash
from sdtrain.models.weights import cache_dir

_PART_SIZE, _IMAGES_AT_ONCE = 512, 64
_STAGE = "signatures"


@dataclass(frozen=True)
class SignatureJob:
    """The input of the signatures' stage: a reference's digest and size, and CLIP as a dataset was scored with it.

    `clip` is None for a dataset without embeddings.
    """

    reference: str
    num: int
    clip: ScoreConfig | None
    clip_digest: str = ""

    @property
    def digest(self) -> str:
        """Of everything that the signatures depend on."""
        clip = [self.clip.clip_model, self.clip_digest] if self.clip else None
        return fingerprint("signatures/1", [self.reference, clip, _PART_SIZE])

    @property
    def directory(self) -> EvaluationDir:
        """The folder in the cache, which all evaluations with this reference share."""
        return EvaluationDir(cache_dir() / _STAGE / self.digest[:16])


@dataclass(frozen=True)
class Signatures:
    """Of M images: digests of the file's bytes and of the pixels, and arrays; `embeddings` (M, D) are of length 1."""

    sha256: list[str]
    pixel_sha256: list[str]
    hashes: NDArray[np.uint64]
    colors: NDArray[np.uint8]
    embeddings: NDArray[np.float32] | None


def prepare_signatures(reference: Reference, clip: ScoreConfig | None, clip_digest: str) -> SignatureJob:
    """The job that fills the cache with a reference's signatures."""
    job = SignatureJob(reference.digest, len(reference.places), clip, clip_digest)
    write_json(job.directory.images, [list(place) for place in reference.places])
    return job


def signature_stage() -> Stage[SignatureJob]:
    """The stage that reads and decodes each reference image once."""
    return plain_stage(_STAGE, _parts, _fingerprint, _run, uses_gpu=True)


@lru_cache(maxsize=2)  # each part of a search asks
def read_signatures(job: SignatureJob) -> Signatures:
    """All signatures, once the stage is finished."""
    paths = [_path(job.directory, part) for part in _parts(job.directory, job)]
    table = pa.concat_tables([read_parquet(path) for path in paths])
    colors = np.frombuffer(b"".join(table["thumbnail"].to_pylist()), np.uint8).reshape(len(table), -1)
    embeddings = np.stack(table["embedding"].to_numpy()) if job.clip else None
    sha256, pixel_sha256s = (table[name].to_pylist() for name in ("sha256", "pixel_sha256"))
    return Signatures(sha256, pixel_sha256s, table["phash"].to_numpy().view(np.uint64), colors, embeddings)


def _path(directory: DatasetDir, part: int) -> Path:
    return directory.root / _STAGE / f"{part:05d}.parquet"


def _parts(dataset: DatasetDir, job: SignatureJob) -> list[int]:
    return list(range(-(-job.num // _PART_SIZE)))


def _fingerprint(dataset: DatasetDir, job: SignatureJob, part: int) -> str:
    return job.digest


def _run(dataset: DatasetDir, job: SignatureJob, parts: Sequence[int]) -> Iterator[ShardReport]:
    places = [Place(*place) for place in json.loads(EvaluationDir(dataset.root).images.read_text())]
    for part in parts:
        some = places[part * _PART_SIZE : (part + 1) * _PART_SIZE]
        with publish(_path(dataset, part)) as temporary:
            pq.write_table(pa.Table.from_pylist(_rows(some, job, part)), temporary, compression="zstd")
        outputs = describe_outputs(dataset, [_path(dataset, part)])
        yield ShardReport(stage=_STAGE, shard=part, num_in=len(some), num_out=len(some), outputs=outputs)


def _rows(places: Sequence[Place], job: SignatureJob, part: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    starts = range(0, len(places), _IMAGES_AT_ONCE)
    for first in report_progress(starts, f"{_STAGE}, part {part}", len(starts), "batches"):
        contents = [place.read() for place in places[first : first + _IMAGES_AT_ONCE]]
        images = [_decoded(content, place) for content, place in zip(contents, places[first:], strict=False)]
        embedded = _encoder(job.clip, job.clip_digest).images(images) if job.clip else [None] * len(images)
        rows += [_row(*each) for each in zip(contents, images, embedded, strict=True)]
    return rows


def _row(content: bytes, image: Image.Image, embedding: NDArray[np.float32] | None) -> dict[str, Any]:
    return {
        "sha256": hashlib.sha256(content).hexdigest(),
        "pixel_sha256": pixel_sha256(image),
        "phash": perceptual_hash(image),
        "thumbnail": thumbnail(image),
        "embedding": embedding,
    }


def _decoded(content: bytes, place: Place) -> Image.Image:
    try:
        return decode_rgb(content)
    except OSError as error:
        raise UserError(f"{place.path} at byte {place.offset} is no image that can be read: {error}") from error


@lru_cache(maxsize=1)
def _encoder(clip: ScoreConfig, digest: str) -> Encoder:
    return Encoder(
        clip, IndexInfo(clip_model=clip.clip_model, clip_digest=digest, counts=[], num_vectors=0, num_lists=0)
    )
