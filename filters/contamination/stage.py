"""Looks through the tables of a dataset for an evaluation's prompts and reference images, some shards at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from filters.contamination.near_hashes import NearHashes
from filters.contamination.signatures import SignatureJob, Signatures, read_signatures
from filters.dedup.clusters import unit
from filters.dedup.perceptual import agree
from sdtrain.dataset.files import publish, read_parquet
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.manifest import describe_outputs, entries, require_entries, selected_shards
from sdtrain.dataset.progress import report_progress
from sdtrain.dataset.shard_report import ShardReport, fingerprint
from sdtrain.dataset.stage import Stage, plain_stage
from sdtrain.dataset.sync import fetch_outputs
from sdtrain.dataset.tables.connection import connected
from sdtrain.evaluation.layout import EvaluationDir, read_texts

OF_PROMPTS, OF_IMAGES = ("text",), ("bytes", "pixels", "perceptual", "embedding")
"""How a prompt may be recognised, and an image."""
RADIUS, THRESHOLD = 4, 0.95
"""Bits in which perceptual hashes of one image may differ, and the least cosine of its embeddings: those of `dedup`."""

_SHARDS_AT_ONCE = 64
_COSINES_AT_ONCE = 1 << 24
_SCHEMA = pa.schema([("uid", pa.string()), ("way", pa.string()), ("item", pa.int32())])


@dataclass(frozen=True)
class TrainingJob:
    """The input of the stage: a dataset, the prompts' digest, and the job of the reference's signatures, if any."""

    training: DatasetDir
    prompts: str
    signatures: SignatureJob | None

    @property
    def name(self) -> str:
        """The stage's name, another for each dataset."""
        return f"training-{hashlib.sha256(str(self.training).encode()).hexdigest()[:12]}"

    @property
    def parts(self) -> list[int]:
        """The parts by number."""
        return list(range(-(-len(selected_shards(self.training)) // _SHARDS_AT_ONCE)))

    def shards(self, part: int) -> list[int]:
        """The dataset's shards of a part."""
        return list(selected_shards(self.training))[part * _SHARDS_AT_ONCE : (part + 1) * _SHARDS_AT_ONCE]

    def path(self, directory: DatasetDir, part: int) -> Path:
        """The table of what was found."""
        return directory.root / "training" / self.name / f"{part:05d}.parquet"


def training_stage(job: TrainingJob) -> Stage[TrainingJob]:
    """The stage that searches each part, in memory for the evaluation's items and one shard."""
    return plain_stage(job.name, _parts, _fingerprint, _run, uses_gpu=True)


def _parts(dataset: DatasetDir, job: TrainingJob) -> list[int]:
    return job.parts


def _fingerprint(dataset: DatasetDir, job: TrainingJob, part: int) -> str:
    shards = job.shards(part)
    inputs = [entry for stage in ("download", "score") for entry in require_entries(job.training, stage, shards)]
    captioned = entries(job.training, "caption")
    inputs += [entry for shard in shards if (entry := captioned.get(shard))]
    asked = [job.prompts, job.signatures.digest if job.signatures else None]
    return fingerprint("training/1", [asked, RADIUS, THRESHOLD], inputs)


def _run(dataset: DatasetDir, job: TrainingJob, parts: Sequence[int]) -> Iterator[ShardReport]:
    prompts = read_texts(EvaluationDir(dataset.root).prompts, job.prompts)
    known = read_signatures(job.signatures) if job.signatures else None
    near = NearHashes(known.hashes, RADIUS) if known else None
    for part in parts:
        shards = job.shards(part)
        for stage in ("download", "score", "caption"):
            fetch_outputs(job.training, stage, shards, tars=False)
        found = [_in_images(job.training, shards, prompts, known)]
        if known and near:
            found += [
                _in_scores(job.training.scores(shard), known, near)
                for shard in report_progress(shards, f"{job.name}, part {part}", len(shards), "shards")
            ]
        path = job.path(dataset, part)
        with publish(path) as temporary:
            hits = pa.concat_tables(found).sort_by([(name, "ascending") for name in ("way", "item", "uid")])
            pq.write_table(hits, temporary, compression="zstd")
        num = sum(pq.read_metadata(job.training.images_table(shard)).num_rows for shard in shards)
        outputs = describe_outputs(dataset, [path])
        yield ShardReport(stage=job.name, shard=part, num_in=num, num_out=num, outputs=outputs)


def _in_images(
    training: DatasetDir, shards: Sequence[int], prompts: Sequence[str], known: Signatures | None
) -> pa.Table:
    """Captions equal to a prompt, and files equal to a reference image's."""
    asked = [("asked_prompts", "text", prompts), ("asked_images", "sha256", known.sha256 if known else [])]
    with connected() as connection:
        for name, column, values in asked:
            items = np.arange(len(values), dtype=np.int32)
            connection.register(name, pa.table({column: pa.array(values, pa.string()), "item": items}))
        files = {"files": [str(training.images_table(shard)) for shard in shards]}
        captions = [str(path) for shard in shards if (path := training.captions_table(shard)).exists()]
        given = files | ({"captions": captions} if captions else {})
        found = connection.execute(_found_in_images(bool(captions)), given)
        return found.to_arrow_table().cast(_SCHEMA)


def _found_in_images(with_captions: bool) -> str:
    """The question to the tables of images, and to those of further captions: of duplicates, and generated ones."""
    further = " UNION ALL SELECT uid, text FROM read_parquet($captions)" if with_captions else ""
    return f"""
WITH seen AS (SELECT uid, caption, sha256 FROM read_parquet($files, union_by_name = true)),
     texts AS (SELECT uid, {_normalised("caption")} AS text FROM (SELECT uid, caption FROM seen{further})),
     prompts AS (SELECT {_normalised("text")} AS text, item FROM asked_prompts)
SELECT DISTINCT uid, 'text' AS way, item FROM texts JOIN prompts USING (text) WHERE text != ''
UNION ALL SELECT uid, 'bytes', item FROM seen JOIN asked_images USING (sha256)
"""  # noqa: S608 - only names of columns


def _normalised(column: str) -> str:
    """Letters and digits only: captions of the same words differ in case, spaces and the full stop at their end."""
    return rf"trim(regexp_replace(lower(nfc_normalize({column})), '[^\p{{L}}\p{{N}}]+', ' ', 'g'))"


def _in_scores(path: Path, known: Signatures, near: NearHashes) -> pa.Table:
    """Images of a shard with a reference image's pixels, hash and colours, or embedding."""
    names = set(pq.read_schema(path).names)
    columns = ["uid", "reason", "pixel_sha256", "phash", "thumbnail"]
    embeddings = known.embeddings if "embedding" in names else None
    table = read_parquet(path, columns + ["embedding"] * (embeddings is not None))
    table = table.filter(pc.is_null(table["reason"])).combine_chunks()
    pairs = {"pixels": _equal(table["pixel_sha256"], known.pixel_sha256), "perceptual": _alike(table, known, near)}
    if embeddings is not None:
        pairs["embedding"] = _similar(table, embeddings)
    return pa.concat_tables([_hits(table, way, *found) for way, found in pairs.items()])


def _hits(table: pa.Table, way: str, rows: NDArray[Any], items: NDArray[Any]) -> pa.Table:
    uids = table["uid"].take(pa.array(rows))
    return pa.table({"uid": uids, "way": pa.array([way] * len(rows), pa.string()), "item": items.astype(np.int32)})


def _equal(digests: pa.ChunkedArray, known: Sequence[str]) -> tuple[NDArray[Any], NDArray[Any]]:
    own = pa.table({"digest": digests, "row": np.arange(len(digests))})
    theirs = pa.table({"digest": pa.array(known, pa.string()), "item": np.arange(len(known))})
    both = own.join(theirs, "digest", join_type="inner")
    return both["row"].to_numpy(), both["item"].to_numpy()


def _alike(table: pa.Table, known: Signatures, near: NearHashes) -> tuple[NDArray[Any], NDArray[Any]]:
    rows, items = near.matches(table["phash"].to_numpy().view(np.uint64))
    colors = np.frombuffer(b"".join(table["thumbnail"].to_pylist()), np.uint8).reshape(len(table), -1)
    same = agree(colors[rows], known.colors[items]) if len(rows) else np.zeros(0, bool)
    return rows[same], items[same]


def _similar(table: pa.Table, known: NDArray[np.float32]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Each stored embedding with each of the reference's: N x M x D multiplications, on the GPU if there is one."""
    column = table["embedding"]
    where = np.flatnonzero(pc.is_valid(column).to_numpy())
    values = column.drop_null().combine_chunks().flatten().to_numpy(zero_copy_only=False)
    vectors = unit(values.reshape(len(where), known.shape[1]))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    asked, found = torch.from_numpy(known).to(device), [np.empty((0, 2), np.int64)]
    at_once = max(1, _COSINES_AT_ONCE // len(known))
    for first in range(0, len(where), at_once):
        cosines = torch.from_numpy(vectors[first : first + at_once]).to(device) @ asked.T
        found.append((cosines >= THRESHOLD).nonzero().cpu().numpy() + np.array([first, 0]))
    rows, items = np.concatenate(found).T
    return where[rows], items
