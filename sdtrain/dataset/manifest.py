"""The record of what is finished: one JSON entry a stage and shard, written last."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, model_validator

from sdtrain.dataset.files import publish, sha256_of
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.s3.files import discard
from sdtrain.dataset.s3.mirror import mirror_of
from sdtrain.errors import UserError
from sdtrain.redaction import without_secrets

SCHEMA_VERSION = 1


class Output(BaseModel):
    """One file that a stage wrote."""

    model_config = ConfigDict(extra="forbid")
    sha256: str
    bytes: int


class ShardReport(BaseModel):
    """What one stage did with one shard. No sample disappears: in = out + dropped by reason."""

    model_config = ConfigDict(extra="forbid")
    schema_version: int = SCHEMA_VERSION
    stage: str
    shard: int
    fingerprint: str = ""
    num_in: int
    num_out: int
    dropped: dict[str, int] = {}
    outputs: dict[str, Output] = {}
    inputs: list[str] = []
    """Files from outside that were read, by name, size and digest."""
    notes: list[Annotated[str, AfterValidator(without_secrets)]] = []
    """What was done on purpose with odd input, as sentences."""
    seconds: float = 0.0
    finished_at: float = 0.0
    """Unix time when the work ended; 0 where it was not noted. The file's own time is that of its last copy."""

    @model_validator(mode="after")
    def _counts_add_up(self) -> ShardReport:
        if self.num_in != self.num_out + sum(self.dropped.values()):
            raise ValueError(
                f"{self.stage} shard {self.shard}: {self.num_in} samples came in, but {self.num_out} went out and "
                f"{sum(self.dropped.values())} were dropped for a reason: samples were lost"
            )
        return self


def fingerprint(stage: str, config: Any, inputs: Iterable[ShardReport] = (), weights: Iterable[str] = ()) -> str:
    """Hex digest of everything that decides a shard's bytes.

    Args:
        stage: the stage's name and version, such as "score/1".
        config: the part of the configuration that matters, as JSON-like data.
        inputs: entries of the shards that are read.
        weights: digests of the model weights used.
    """
    described = {
        "stage": stage,
        "config": config,
        "inputs": [{name: output.sha256 for name, output in entry.outputs.items()} for entry in inputs],
        "weights": list(weights),
    }
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def describe_outputs(dataset: DatasetDir, paths: Iterable[Path]) -> dict[str, Output]:
    """Digests and sizes of finished files, by their name inside the dataset."""
    return {dataset.relative(p): Output(sha256=sha256_of(p), bytes=p.stat().st_size) for p in paths}


def write_entry(dataset: DatasetDir, entry: ShardReport, beside: Iterable[Path] = ()) -> None:
    """Makes the shard count as finished, on S3 first. Call it after every output has its final name.

    Args:
        dataset: whose.
        entry: of the shard.
        beside: files that its outputs need and it does not list.
    """
    path, content = dataset.manifest_entry(entry.stage, entry.shard), entry.model_dump_json(indent=1) + "\n"
    if mirror := mirror_of(dataset):
        mirror.push(path, content.encode(), entry.outputs, beside)
    with publish(path) as temporary:
        temporary.write_text(content)


def forget_entry(dataset: DatasetDir, stage: str, shard: int) -> None:
    """Makes a shard count as not finished, before its outputs are touched."""
    discard(dataset, dataset.manifest_entry(stage, shard))


def read_entry(dataset: DatasetDir, stage: str, shard: int) -> ShardReport | None:
    """The entry of a finished shard, or None.

    Raises:
        UserError: the entry exists but was written by another version, or is damaged.
    """
    path = dataset.manifest_entry(stage, shard)
    return parse_entry(path.read_bytes(), path) if path.exists() else None


def parse_entry(content: bytes, path: Path) -> ShardReport:
    """What an entry says; `path` is for sentences.

    Raises:
        UserError: it was written by another version, or is damaged.
    """
    try:
        entry = ShardReport.model_validate_json(content)
    except ValidationError as error:
        raise UserError(
            f"{path} is not a manifest entry that this version can read; delete it to redo the shard."
        ) from error
    if entry.schema_version != SCHEMA_VERSION:
        raise UserError(
            f"{path} has schema version {entry.schema_version}, this sdtrain reads {SCHEMA_VERSION}. "
            "Use the sdtrain that wrote it, or build into another --output."
        )
    return entry


def require_entry(dataset: DatasetDir, stage: str, shard: int) -> ShardReport:
    """The entry of an upstream shard whose output is about to be read.

    Raises:
        UserError: the upstream stage has not finished that shard.
    """
    entry = read_entry(dataset, stage, shard)
    if entry is None:
        raise UserError(
            f"Shard {shard:05d} of stage '{stage}' is not finished in {dataset.root}. Run `sdtrain build` (or the "
            "build flow) again: it continues where it stopped."
        )
    return entry


def entries(dataset: DatasetDir, stage: str) -> list[ShardReport]:
    """All finished shards of a stage, in order."""
    found = sorted(dataset.manifest_entry(stage, 0).parent.glob("[0-9]*.json"))
    return [require_entry(dataset, stage, int(path.stem)) for path in found]


def recorded_stages(dataset: DatasetDir) -> list[str]:
    """The names of all stages that have finished shards, in no particular order."""
    return sorted(path.name for path in (dataset.root / "manifest").glob("*") if path.is_dir())


def is_whole(dataset: DatasetDir, entry: ShardReport) -> bool:
    """Whether every output of the entry still lies there, or on S3, with its recorded size."""
    return all(_is_there(dataset, name, output.bytes) for name, output in entry.outputs.items())


def _is_there(dataset: DatasetDir, name: str, num_bytes: int) -> bool:
    path = dataset.root / name
    if path.exists():
        return path.stat().st_size == num_bytes
    mirror = mirror_of(dataset)
    return mirror is not None and mirror.has(name, num_bytes)
