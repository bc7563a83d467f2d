"""Images and prompts for the tests of evaluation."""

import hashlib

import numpy as np
from PIL import Image

PROMPTS = [f"a {color} {shape}" for color in ("red", "green", "blue") for shape in ("circle", "square")]


def write_images(folder, num, seed=0, side=64):
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for i in range(num):
        small = rng.integers(0, 256, (4, 4, 3), np.uint8)
        Image.fromarray(small).resize((side, side + i % 3), Image.Resampling.BICUBIC).save(folder / f"{i:03d}.png")
    return folder


def digests(folder):
    """The sha256 of every file but manifests, which hold times."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and "manifest" not in path.parts)
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
