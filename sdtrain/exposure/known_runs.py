"""Lets a dataset know the runs that train on it, so that a removal can name those that saw what it takes out.

    DATASET/runs/<digest of host and directory>.json    {"host": ..., "run": ...}

No stage reads these files and no manifest lists them, so they change no byte or digest of the data.
"""

from __future__ import annotations

import hashlib
import json
import socket
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from sdtrain.dataset.files import publish
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.open import dataset_at
from sdtrain.errors import UserError
from sdtrain.exposure.lineage import lineage


@dataclass(frozen=True)
class KnownRun:
    """A run that trained on a dataset, or that descends from one that did."""

    host: str
    run: Path

    @property
    def is_at_hand(self) -> bool:
        """Whether its records can be read here: it may be another machine's, moved or deleted."""
        return (self.run / "config.yaml").exists()

    @property
    def file_name(self) -> str:
        """Its file among a dataset's."""
        return f"{hashlib.sha256(f'{self.host} {self.run}'.encode()).hexdigest()[:16]}.json"


def make_known(run: Path) -> list[str]:
    """Makes a run known to its datasets and to those of the runs that it descends from.

    Returns a sentence for each dataset on this machine that cannot be written.
    """
    known = KnownRun(socket.gethostname(), run.absolute())
    said = []
    for link in lineage(run):
        for source in link.config.data.all_sources if link.config else ():
            dataset = dataset_at(source.root)
            if dataset.root.is_dir() and (reason := _write(dataset, known)):
                said.append(f"{dataset} cannot be written ({reason}): a removal from it will not name this run.")
    return said


def _write(dataset: DatasetDir, known: KnownRun) -> str:
    path = dataset.known_runs / known.file_name
    if path.exists():
        return ""
    try:
        path.parent.mkdir(exist_ok=True)
        with publish(path) as temporary:
            temporary.write_text(json.dumps({"host": known.host, "run": str(known.run)}) + "\n")
    except (OSError, UserError) as error:
        return str(error)
    return ""


def known_runs(dataset: DatasetDir, others: Sequence[Path] = ()) -> list[KnownRun]:
    """The runs known to a dataset, and others that the user names, each once."""
    named = [KnownRun(socket.gethostname(), run.absolute()) for run in others]
    return list(dict.fromkeys([*named, *_read(dataset)]))


def _read(dataset: DatasetDir) -> Iterator[KnownRun]:
    for path in sorted(dataset.known_runs.glob("*.json")):
        with suppress(OSError, ValueError, KeyError, TypeError):
            content = json.loads(path.read_text())
            yield KnownRun(str(content["host"]), Path(content["run"]))
