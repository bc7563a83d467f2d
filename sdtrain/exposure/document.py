"""Describes the uses of samples: whole for JSON, a row a use for CSV, a row a sample for the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from sdtrain.exposure.captions import caption_of
from sdtrain.exposure.crops import crop_of
from sdtrain.exposure.exposures import DROPPED, KEPT, Exposures
from sdtrain.exposure.shard_rows import Ints

MOST_CROPS = 100
"""Samples up to which crops are read: each takes reads of its shard."""


def document(exposures: Exposures) -> dict[str, Any]:
    """All of it, for JSON."""
    first = exposures.first()
    return {
        "num_samples": len(exposures.samples),
        "num_used": exposures.num_used,
        "num_uses": len(exposures.uses),
        "first_use": None if first is None else _use_of(exposures, *first),
        "clean_checkpoint": None if first is None else clean_checkpoint(exposures, first),
        "runs": [{"run": str(trained.run), "num_steps": trained.num_steps} for trained in exposures.chain],
        "samples": [_sample(exposures, row, uses) for row, uses in exposures.of_each()],
        "remarks": list(exposures.remarks),
    }


def clean_checkpoint(exposures: Exposures, first: tuple[int, int]) -> dict[str, Any] | None:
    """The newest checkpoint at hand from before a use."""
    found = exposures.clean_checkpoint(first)
    return None if found is None else {"run": str(found.run), "step": found.step, "path": str(found.path)}


def use_rows(exposures: Exposures) -> Iterator[dict[str, Any]]:
    """One row a use, with its sample."""
    for row, uses in exposures.of_each():
        sample = _named(exposures, row)
        for use in _uses(exposures, uses):
            yield sample | use


def sample_rows(exposures: Exposures) -> Iterator[dict[str, Any]]:
    """One row a sample: how often it was used, and first and last when."""
    for row, uses in exposures.of_each():
        first, last = (uses[0], uses[-1]) if len(uses) else (None, None)
        named = _named(exposures, row)
        yield {
            "uid": named["uid"],
            "url": named["url"],
            "removed": "yes" if named["is_removed"] else "",
            "times": len(uses),
            "dropped": int((exposures.uses.captions[uses] == DROPPED).sum()),
            "first": "" if first is None else _moment(exposures, int(first)),
            "last": "" if last is None else _moment(exposures, int(last)),
        }


def _named(exposures: Exposures, row: int) -> dict[str, Any]:
    sample = exposures.samples.slice(row, 1).to_pylist()[0]
    return {"uid": sample["uid"] or "", "url": sample["url"] or "", "is_removed": sample["name"] < 0}


def _sample(exposures: Exposures, row: int, uses: Ints) -> dict[str, Any]:
    return (
        _named(exposures, row)
        | {"uid_digest": exposures.samples["key"][row].as_py()}
        | {"uses": list(_uses(exposures, uses))}
    )


def _uses(exposures: Exposures, uses: Ints) -> Iterator[dict[str, Any]]:
    has_crops = len(exposures.samples) <= MOST_CROPS
    for use in uses.tolist():
        crop, caption = crop_of(exposures, use) if has_crops else None, caption_of(exposures, use)
        yield {
            **_use_of(exposures, exposures.uses.runs[use], exposures.uses.steps[use]),
            "position": int(exposures.uses.positions[use]),
            "epoch": int(exposures.uses.epochs[use]),
            "caption": caption and caption.text,
            "source": caption and caption.source,
            "is_dropped": {DROPPED: True, KEPT: False}.get(int(exposures.uses.captions[use])),
            "crop": None if crop is None else asdict(crop),
        }


def _use_of(exposures: Exposures, run: int, step: int) -> dict[str, Any]:
    return {"run": str(exposures.chain[run].run), "step": int(step)}


def _moment(exposures: Exposures, use: int) -> str:
    return f"{exposures.chain[exposures.uses.runs[use]].run}: {exposures.uses.steps[use]:,}"
