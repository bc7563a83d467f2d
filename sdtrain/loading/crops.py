"""Tells which crop of an image a sample shows in each of its epochs."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

from sdtrain.dataset.tars import members_in


@dataclass(frozen=True)
class Crop:
    """The part of an image that a sample shows: left, top, right and bottom, in an image of `source_px`, (w, h)."""

    box: tuple[float, ...]
    source_px: tuple[int, ...]


def crop_number(seed: int, uid: str, epoch: int, num_crops: int) -> int:
    """Which of its encoded crops a sample shows: each epoch the next one, from a random first one."""
    if num_crops == 1:
        return 0
    first = hashlib.blake2b(f"crop {seed} {uid}".encode(), digest_size=8).digest()
    return (int.from_bytes(first, "little") + epoch) % num_crops


def recorded_crops(content: bytes) -> list[Crop]:
    """The crops of a sample, from the part of its latents tar with its JSON; none where they are not recorded."""
    bodies = [body for _, extension, body in members_in(content) if extension == "json"]
    recorded = json.loads(bodies[-1]) if bodies else {}
    boxes = recorded.get("crop_boxes") or [recorded.get("crop_box")]
    return [Crop(tuple(box), tuple(recorded["source_px"])) for box in boxes] if boxes[0] is not None else []
