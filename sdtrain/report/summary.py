"""The first screen of a report: numbers with the commands that give them again, sampled images, curves, contents."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Facts:
    """Numbers as (value, name), and the command that gives them again."""

    numbers: Sequence[tuple[str, str]]
    command: str


@dataclass(frozen=True)
class Drawn:
    """Sampled images as (file, prompt, note), and the command that draws them."""

    images: Sequence[tuple[Path, str, str]]
    command: str


@dataclass(frozen=True)
class Summary:
    """What a report says first, beside the numbers of its dataset and training."""

    built: str
    """What was built, in a sentence or two."""
    facts: Sequence[Facts]
    drawn: Drawn
    curve: str
    """The title of the section whose image is shown beside the loss."""
    where: str
    """Where the commands run."""


def place_drawn(drawn: Drawn, images: Path) -> dict[str, Any]:
    """Copies the sampled images into the page's folder of images."""
    shown = []
    for number, (file, prompt, note) in enumerate(drawn.images):
        shutil.copyfile(file, images / f"drawn-{number}.png")
        shown.append({"image": f"pictures/drawn-{number}.png", "prompt": prompt, "note": note})
    return {"images": shown, "command": drawn.command}


def anchor(title: str) -> str:
    """A section's name in links: its title's letters and digits, with dashes between the words."""
    return "-".join(re.findall(r"[a-z0-9]+", title.lower()))
