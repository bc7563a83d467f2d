"""Finds networks' weights: local files, or published ones fetched once into a cache."""

from __future__ import annotations

import hashlib
import http.client
import logging
import os
import pickle
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdtrain.dataset.files import publish, sha256_of
from sdtrain.errors import UserError
from sdtrain.settings import nearest

# Weights for trials. If the published network is large, the first prefix means a small one of the same form.
RANDOM = "random:"
RANDOM_FULL = "random-full:"
DEMO_WEIGHTS = Path(__file__).parents[1] / "demo" / "weights"
_TIMEOUT_S = 60
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Published:
    """Published weights, and their file's name in the cache.

    `sha256` is None if the publisher names none and we have not seen the file. Such a file is trusted on first use: its
    digest is recorded beside it in the cache and must match from then on.
    """

    url: str
    file: str
    sha256: str | None = None


def find_weights(name: str, known: Mapping[str, Published], otherwise: str = "name another file") -> Path:
    """The weights file for a known name (fetched into the cache if needed) or a path.

    `known` are published weights by name; `otherwise` is the user's alternative if one cannot be fetched. UserError if
    there is no such file or name, the download failed, or the file is not the published one.
    """
    if name not in known:
        path = Path(name).expanduser()
        if not path.is_file():
            raise UserError(
                f"There are no weights '{name}': neither a file nor a known name.{nearest(name, list(known))}"
            )
        return path
    published = known[name]
    path = cache_dir() / published.file
    if not path.exists():
        _download(published, path, otherwise)
    digest = sha256_of(path)
    if published.sha256 and digest != published.sha256:
        raise UserError(
            f"{path} is not the published '{name}' (its sha256 differs): expected {published.sha256}, found {digest}. "
            "Delete it to fetch it again."
        )
    if not published.sha256:
        _check_first_seen(path, digest)
    return path


def cache_dir() -> Path:
    """The folder of fetched weights: $SDTRAIN_CACHE, or ~/.cache/sdtrain."""
    return Path(os.environ.get("SDTRAIN_CACHE") or Path.home() / ".cache" / "sdtrain")


def random_seed(name: str) -> int | None:
    """The seed of `random:SEED` and `random-full:SEED`, None for other names; UserError if it is no number."""
    if not name.startswith((RANDOM, RANDOM_FULL)):
        return None
    kind, _, seed = name.partition(":")
    try:
        return int(seed)
    except ValueError as error:
        raise UserError(f"Weights '{name}': after '{kind}:' comes a whole number, the seed.") from error


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Networks built inside have the same random weights each time; the caller's random state is unchanged."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed or 0)
        yield


def read_state(path: Path) -> dict[str, Any]:
    """Tensors by name from .safetensors or a PyTorch file, on the CPU; nothing is unpickled but tensors.

    UserError if the file is neither, or holds more than tensors.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, ValueError, EOFError, OSError) as error:
        raise UserError(f"{path} is not a file of weights that is safe to load: {error}") from error
    state = state.get("weights", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"{path} does not hold tensors by name, as a state dict does.")
    return dict(state)


def _check_first_seen(path: Path, digest: str) -> None:
    """Records the digest, in sha256sum's format, if there is none yet, and else compares."""
    seen = path.with_name(f"{path.name}.sha256")
    if not seen.exists():
        _log.warning("%s has no published digest; trusted now, with sha256 %s.", path, digest)
        with suppress(PermissionError), publish(seen) as temporary:  # a shared cache may not be writable
            temporary.write_text(f"{digest}  {path.name}\n")
    elif seen.read_text().split()[:1] != [digest]:
        raise UserError(
            f"{path} is not what it was when it was first used: its sha256 is {digest}, and {seen} has another. Delete "
            "it to fetch it again; delete both if you know why it changed."
        )


def _download(published: Published, path: Path, otherwise: str) -> None:
    try:
        with urllib.request.urlopen(published.url, timeout=_TIMEOUT_S) as response:  # noqa: S310  # a fixed https URL
            content = response.read()
    except (OSError, http.client.HTTPException) as error:  # the latter where the connection ends early
        raise UserError(
            f"The weights {published.file} are not in {path.parent} and could not be fetched ({error}). Download "
            f"{published.url} elsewhere and put it there, or {otherwise}."
        ) from error
    digest = hashlib.sha256(content).hexdigest()
    if published.sha256 and digest != published.sha256:
        raise UserError(
            f"{published.url} gave other bytes than the published {published.file}: expected sha256 "
            f"{published.sha256}, found {digest}; nothing was kept."
        )
    with publish(path) as temporary:
        temporary.write_bytes(content)


def clip_digest(model: str, weights: str | None) -> str:
    """Identifies CLIP's weights: open_clip's tag, a seed, or a file's digest; "none" without CLIP."""
    if weights is None or random_seed(weights) is not None:
        return weights or "none"
    path = Path(weights).expanduser()
    if not path.is_file():  # a tag: loading the weights refuses any other name
        return weights
    # Tags take precedence over files, and none has a folder.
    return weights if path.name == weights and _is_tag(model, weights) else sha256_of(find_weights(weights, {}))


def _is_tag(model: str, weights: str) -> bool:
    import open_clip

    return bool(open_clip.get_pretrained_cfg(model, weights))
