"""Reads and writes a shard's statistics: img2dataset's, and the selection that the shard was made of."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sdtrain.download.rows import Row


@dataclass(frozen=True)
class Origin:
    """When a shard was downloaded (Unix times), and the sha256 of its selection file; None if it is not known.

    With the settings, that digest gives the fingerprint in the shard's table: so it shows, when the selection has
    changed, that the settings have not.
    """

    start_time: float
    end_time: float
    selection_sha256: str | None


def write_stats(path: Path, rows: Sequence[Row], origin: Origin) -> None:
    """Writes img2dataset's statistics, with our reasons in place of its messages, and one key more."""
    status = Counter(row["status"] for row in rows)
    stats = {
        "count": len(rows),
        "successes": status["success"],
        "failed_to_download": status["failed_to_download"],
        "failed_to_resize": status["failed_to_resize"],
        "duration": origin.end_time - origin.start_time,
        "start_time": origin.start_time,
        "end_time": origin.end_time,
        "status_dict": dict(sorted(Counter(row["reason"] or "success" for row in rows).items())),
        "selection_sha256": origin.selection_sha256,
    }
    path.write_text(json.dumps(stats, indent=4))


def read_origin(path: Path) -> Origin | None:
    """The origin in a shard's statistics, without a digest if an earlier version wrote them; None if there are none."""
    try:
        stats = json.loads(path.read_bytes())
        return Origin(stats["start_time"], stats["end_time"], stats.get("selection_sha256"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
