"""Caches VAE digests for fingerprints, so that a build with nothing to do loads neither the VAE nor its libraries."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from sdtrain.dataset.files import publish
from sdtrain.models.weights import DEMO_WEIGHTS, cache_dir

# Raise it whenever `sdtrain.formats.frozen.vae_digest` changes its result for a file.
_RULE = "vae/2"
_SUFFIXES = (".json", ".safetensors", ".bin", ".ckpt")
# A second change within the time stamps' resolution would go unnoticed.
_SETTLED_S = 2.0
_computed: dict[str, str] = {}
_remembered: dict[str, str] = {}


def vae_digest(name: str) -> str:
    """`sdtrain.formats.frozen.vae_digest`, cached on disk until the VAE's files change; UserError: no such VAE."""
    if name not in _computed and name not in _remembered:
        note = _note_of(_files_of_vae(name))
        if known := note and _read(note):
            _remembered[name] = known
    return _computed.get(name) or _remembered.get(name) or compute_vae_digest(name)


def compute_vae_digest(name: str) -> str:
    """Computes the digest once per process, from the weights it loads; call it before working with the VAE.

    UserError if there is no such VAE.
    """
    from sdtrain.formats.frozen import vae_digest

    if name not in _computed:
        _computed[name] = vae_digest(name)
        note = _note_of(_files_of_vae(name))
        if note is not None:
            with suppress(PermissionError), publish(note) as temporary:  # the cache may belong to another user
                temporary.write_text(f"{_computed[name]}\n")
    return _computed[name]


def _files_of_vae(name: str) -> list[Path]:
    """The VAE's local files; empty if unknown."""
    root = DEMO_WEIGHTS if name == "demo" else Path(name)
    if root.is_file():
        return [root]
    if not root.is_dir():
        found = _fetched(name)
        if found is None:
            return []
        root = found
    folder = root / "vae" if (root / "vae").is_dir() else root
    return sorted(path for path in folder.iterdir() if path.suffix in _SUFFIXES)


def _fetched(name: str) -> Path | None:
    """The folder where the hub's library keeps a model it has fetched."""
    if name.startswith((".", "/")) or name.count("/") != 1:
        return None
    from huggingface_hub import try_to_load_from_cache

    for config in ("vae/config.json", "config.json"):
        path = try_to_load_from_cache(name, config)
        if isinstance(path, str):
            return Path(path).parent
    return None


def _note_of(files: Sequence[Path]) -> Path | None:
    """The cache file for these files' digest; its name depends on everything by which a change of theirs would show."""
    stats = [path.stat() for path in files]
    if not files or max(max(stat.st_mtime, stat.st_ctime) for stat in stats) > time.time() - _SETTLED_S:
        return None
    seen = [
        (str(path.resolve()), stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
        for path, stat in zip(files, stats, strict=True)
    ]
    return cache_dir() / "digests" / hashlib.sha256(json.dumps([_RULE, seen]).encode()).hexdigest()


def _read(note: Path) -> str | None:
    with suppress(OSError):
        found = note.read_text().strip()
        return found if re.fullmatch("[0-9a-f]{64}", found) else None
    return None
