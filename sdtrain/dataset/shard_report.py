"""Defines the report of one stage about one shard, which its manifest entry records."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, model_validator

from sdtrain.dataset.layout import current_stage
from sdtrain.errors import UserError
from sdtrain.redaction import without_secrets

SCHEMA_VERSION = 1

StageName = Annotated[str, AfterValidator(current_stage)]
"""A stage's name as read from a record, whose writer may have known it by a former one."""


class Output(BaseModel):
    """One output file of a stage."""

    model_config = ConfigDict(extra="forbid")
    sha256: str
    bytes: int


class ShardReport(BaseModel):
    """A stage's work on one shard. No sample disappears: in = out + dropped by reason."""

    model_config = ConfigDict(extra="forbid")
    schema_version: int = SCHEMA_VERSION
    stage: StageName
    shard: int
    fingerprint: str = ""
    num_in: int
    num_out: int
    dropped: dict[str, int] = {}
    outputs: dict[str, Output] = {}
    inputs: list[str] = []
    """External files read, by name, size and digest."""
    notes: list[Annotated[str, AfterValidator(without_secrets)]] = []
    """Remarks, as sentences, on odd input handled on purpose."""
    seconds: float = 0.0
    finished_at: float = 0.0
    """Unix time of completion; 0 if not recorded. The file's own time is that of its last copy."""

    @model_validator(mode="after")
    def _counts_add_up(self) -> ShardReport:
        if self.num_in != self.num_out + sum(self.dropped.values()):
            raise ValueError(
                f"{self.stage} shard {self.shard}: {self.num_in} samples came in, but {self.num_out} went out and "
                f"{sum(self.dropped.values())} were dropped for a reason: samples were lost"
            )
        return self


def parse_entry(content: bytes, path: Path | Callable[[], Path]) -> ShardReport:
    """Parses an entry; `path` is for messages. UserError if another version wrote it, or it is damaged."""
    try:
        entry = ShardReport.model_validate_json(content)
    except ValidationError as error:
        raise UserError(
            f"{_path(path)} is not a manifest entry that this version can read; delete it to redo the shard."
        ) from error
    if entry.schema_version != SCHEMA_VERSION:
        raise UserError(
            f"{_path(path)} has schema version {entry.schema_version}, this sdtrain reads {SCHEMA_VERSION}. "
            "Use the sdtrain that wrote it, or build into another --output."
        )
    return entry


def _path(path: Path | Callable[[], Path]) -> Path:
    return path if isinstance(path, Path) else path()


def fingerprint(stage: str, config: Any, inputs: Iterable[ShardReport] = (), weights: Iterable[str] = ()) -> str:
    """Hex digest of everything that determines a shard's bytes.

    `stage` is name and version ("score/1"), which a renamed stage keeps because finished datasets record the digest;
    `inputs` are the entries of the shards read, `weights` the models' digests.
    """
    # The digest of one JSON object with sorted keys, which is not held whole: `inputs` may be of 100,000 shards.
    digest = hashlib.sha256(f'{{"config": {_json(config)}, "inputs": ['.encode())
    for number, entry in enumerate(inputs):
        files = {name: output.sha256 for name, output in entry.outputs.items()}
        digest.update(f"{', ' if number else ''}{_json(files)}".encode())
    digest.update(f'], "stage": {_json(stage)}, "weights": {_json(list(weights))}}}'.encode())
    return digest.hexdigest()


def _json(value: object) -> str:
    return json.dumps(value, sort_keys=True)
